// The walk over runs: the elements of a statistic are stretches of contiguous memory.

#pragma once

#include "norm/walk.h"

namespace {

// How channels lie along a run. uniform: one channel for all of it. segments: one after the other, long enough for loops
// of their own. elements: so short that gain and bias are spread out, one value for each element of a run.
enum class Affine { uniform, segments, elements };

// Sums over dy, or where gain varies along a run over dx̂ = dy·gain.
struct Totals {
  double dy, from_mu, u;
  void add(const double* t) { dy += t[0], from_mu += t[1], u += t[2]; }
};

// Runs: a statistic owns A runs of B elements, each of them contiguous.
struct Runs : Walk {
  static constexpr int64_t chunk_size = 16384, gather_bytes = 131072, most_in_panel = 8192, most_panel = 32, short_run = 64, longest_gathered = 256, shortest_segment = 16, most_blocks = 64, cached_bytes = 1 << 18;

  const Affine affine;
  const int64_t spread;  // values of gain and bias for each channel
  // A chunk is what one partial sum covers: a piece of a long run, or several short runs. Pieces are made of whole units,
  // the channels of a run, or divide them where they are long.
  const int64_t unit, divided, units, pieces, runs, chunks;
  // Short runs of one statistic are copied together first: they would push each other out of the cache. This is done for
  // a panel of statistics whose runs lie side by side, so that memory is read in longer stretches.
  const bool gathered;
  // A panel also serves statistics of one run each, where they lie: their formulas are evaluated several at a time. It holds so
  // many that x, dy and what is written stay in the first-level cache, or what was gathered nearly does.
  const bool paneled;
  const int64_t panel_step, panel_apart, panel;  // bytes and elements from a statistic of a panel to the next, and statistics
  const int64_t next_channel;       // from a statistic of a panel to the next: to divide for each takes longer
  // The loops work on a copy of a chunk where its type is narrow, or its runs are shorter than a pack.
  const bool copied;
  const int64_t copied_stride;
  // Gradients of gain and bias that several statistics share are summed in about most_blocks blocks.
  const int64_t stats_per_block, chunks_per_block, blocks_per_stat, blocks;
  // One statistic at a time keeps it in cache; with few statistics their chunks are shared out among the threads.
  const bool whole;
  // What is read next: of memory that is seen for the first time the next run, and of what is in the cache by then that of
  // the next statistic; and in a panel that is walked where it lies, that of the next panel. What is written next is
  // write_ahead bytes further, in whole runs where runs are short; and where they were gathered the next statistic's.
  const int64_t next_run, next_again, next_panel, next_write;

  Runs(const Call& c, const Kernels& k)
      : Walk(c, k),
        affine(kind_of_affine(c)), spread(affine == Affine::elements ? at.S : 1), unit(affine == Affine::uniform ? at.B : at.S),
        divided((unit + chunk_size - 1) / chunk_size), units(at.B / unit),
        pieces(divided > 1 ? units * divided : (units + chunk_size / unit - 1) / (chunk_size / unit)),
        runs(pieces > 1 ? 1 : larger(1, chunk_size / larger(at.B, lanes))),
        chunks(pieces > 1 ? at.A * pieces : (at.A + runs - 1) / runs),
        gathered(affine == Affine::uniform && gains_by_gathering(c.n * wide_width)),
        paneled(gathered || (affine == Affine::uniform && at.A == 1 && chunks == 1 && !narrow && !known)),
        panel_step(gathered ? (c.n + lanes) * wide_width : at.sg2 * width), panel_apart(panel_step / wide_width),
        panel(larger(1, smaller(smaller(most_panel, at.G / (2 * c.threads)), (gathered ? 2 : 1) * most_in_panel / (c.n * wide_width)))),
        next_channel(at.Bc == 1 && at.C > 1),
        copied(narrow || at.B < lanes), copied_stride(larger(at.B, lanes)), stats_per_block((at.G + most_blocks - 1) / most_blocks),
        chunks_per_block(at.G >= most_blocks ? chunks : (chunks * at.G + most_blocks - 1) / most_blocks),
        blocks_per_stat((chunks + chunks_per_block - 1) / chunks_per_block),
        blocks((at.G + stats_per_block - 1) / stats_per_block * blocks_per_stat),
        whole(c.threads == 1 || at.G >= 4 * c.threads || chunks == 1), next_run(copied || at.A == 1 ? 0 : at.sa),
        next_again(copied || !whole || c.n * width > cached_bytes ? next_run : at.G2 > 1 ? at.sg2 : at.sg1),
        next_panel(gathered ? 0 : panel * at.sg2),
        next_write(gathered ? at.sg2
                   : at.A == 1 || at.B * width >= 2 * write_ahead ? write_ahead / width
                                                                  : (write_ahead / width + at.B - 1) / at.B * at.sa) {}

  static Affine kind_of_affine(const Call& c) {
    const bool none = !(c.weight || c.bias || c.dw || c.db);
    if (c.layout->Bc == 1 || none) return Affine::uniform;
    return c.layout->S >= shortest_segment ? Affine::segments : Affine::elements;
  }
  // Whether the runs of a statistic, together of so many bytes, are walked faster once they lie side by side.
  bool gains_by_gathering(int64_t bytes) const {
    if (at.B < lanes) return true;
    if (at.A == 1) return false;
    return at.B < short_run || (at.B < longest_gathered && bytes <= gather_bytes);
  }

  int64_t start(int64_t g) const { return g / at.G2 * at.sg1 + g % at.G2 * at.sg2; }
  int64_t group(int64_t g) const { return g % (at.C / at.Bc); }

  // Where a chunk is: its first element in memory, that element's place in the run, and the block. Then the same as the
  // loops see it, which read x and dy, write `out`, and leave what they wrote to give_back.
  struct Chunk {
    int64_t offset, b;
    Block block;
    const void *x, *dy;
    void* out;
  };
  size_t copy_bytes() const { return copied ? (chunk_size + 2 * lanes) * wide_width : 0; }
  Chunk chunk(int64_t g, int64_t k, const Scratch& scratch, bool with_dy, void* out, int64_t next) const {
    Chunk c = {};
    int64_t a = k * runs, b = 0, end = at.B, rows = smaller(runs, at.A - a);
    if (pieces > 1) {
      int64_t piece = k % pieces, in = piece % divided;
      a = k / pieces;
      rows = 1;
      b = divided > 1 ? piece / divided * unit + unit * in / divided : units * piece / pieces * unit;
      end = divided > 1 ? piece / divided * unit + unit * (in + 1) / divided : units * (piece + 1) / pieces * unit;
    }
    c.offset = start(g) + a * at.sa + b;
    c.b = b;
    c.block = {rows, end - b, at.sa, at.sa, next, next_write, past_cache};
    c.x = move(call.x, c.offset);
    c.dy = with_dy ? move(call.dy, c.offset) : nullptr;
    c.out = out ? move(out, c.offset) : nullptr;
    if (!copied) return c;
    char *x = scratch.data, *dy = x + copy_bytes();
    copy_in(c.x, at.sa, x, copied_stride, rows, end - b);
    if (with_dy) copy_in(c.dy, at.sa, dy, copied_stride, rows, end - b);
    c.block.from = c.block.to = copied_stride;
    c.block.past_cache = false;
    c.block.write = 0;
    c.x = x;
    c.dy = dy;
    c.out = dy + copy_bytes();
    return c;
  }
  void give_back(const Chunk& c, void* out) const {
    if (copied) copy_out(c.out, copied_stride, move(out, c.offset), at.sa, c.block.rows, c.block.length);
  }

  // fn(channel of the statistic, elements from the start of the chunk, block) for each segment of a chunk
  template <class Fn> void segments(const Chunk& chunk, const Fn& fn) const {
    int64_t end = chunk.b + chunk.block.length;
    for (int64_t r = 0; r < chunk.block.rows; r++)
      for (int64_t from = chunk.b; from < end;) {
        int64_t c = from / unit, to = smaller((c + 1) * unit, end);
        fn(c, r * chunk.block.from + from - chunk.b, Block{1, to - from, 0, 0, chunk.block.next, chunk.block.write, chunk.block.past_cache});
        from = to;
      }
  }

  // gain or bias for each element of the runs of statistic g, from element b on
  const void* elements(const Parameter& parameter, int64_t g, int64_t b) const { return move_wide(parameter.values, group(g) * at.B + b); }
  Parameter spread_out(const void* data, Type type, double otherwise) const {
    return Parameter(data, type, wide, affine == Affine::elements ? at.C : 0, spread, at.B < lanes, otherwise);
  }

  // fn(from, to) for panels of neighbouring statistics.
  template <class Fn> void each_panel(const Fn& fn) const {
    const int64_t panels = (at.G2 + panel - 1) / panel;
    parallel(at.G1 * panels, call.threads, [&](int64_t i) {
      int64_t first = i / panels * at.G2, from = i % panels * panel;
      fn(first + from, first + smaller(at.G2, from + panel));
    });
  }
  // The statistics of a panel, each in one piece: where they lie, or copied to `out`. Then the runs of each are far apart,
  // and those two further on are asked for meanwhile.
  const char* gather(const void* tensor, int64_t from, int64_t to, char* out) const {
    const void* first = move(tensor, start(from));
    if (!gathered) return (const char*)first;
    if (!copied) loops.gather({at.A, at.B, at.sa, at.B, 2 * at.sa, false}, to - from, at.sg2, panel_apart, first, out);
    else
      for (int64_t i = 0; i < to - from; i++) copy_in(move(first, i * at.sg2), at.sa, out + i * panel_step, at.B, at.A, at.B);
    return out;
  }
  size_t panel_bytes(int64_t tensors) const { return gathered ? tensors * panel_step : 0; }
  // Gain and bias for each statistic of a panel, in the type of statistics, and the gain's product with 1/s once that is known.
  struct PanelParameters {
    const Runs& runs;
    alignas(64) char gains[most_panel * sizeof(double)], shifts[most_panel * sizeof(double)], scale[most_panel * sizeof(double)];
    const void *gain = nullptr, *shift = nullptr;

    PanelParameters(const Runs& r, int64_t from, int64_t count) : runs(r) {
      const Call& call = r.call;
      const int64_t c = r.group(from) * r.at.Bc;
      const bool in_order = r.next_channel == 1;  // else all statistics of the panel have one channel
      if (call.weight && in_order) gain = r.move_wide(call.weight, c);
      else if (call.weight) gain = fill(gains, count, [&](int64_t) { return r.gain(c); });
      if (call.bias && in_order && call.bias_type == r.wide) shift = r.move_wide(call.bias, c);
      else if (call.bias) shift = fill(shifts, count, [&](int64_t i) { return r.bias(c + i * r.next_channel); });
    }
    template <class Fn> const void* fill(void* out, int64_t count, const Fn& value) const {
      for (int64_t i = 0; i < count; i++) set_number(out, runs.wide, i, value(i));
      return out;
    }
    void find_scales(int64_t from, int64_t count) { runs.loops.column_scales(runs.call, from, from + count, gain, scale); }
  };

  template <class Fn> void each_chunk(const Fn& fn) const {
    parallel(at.G * chunks, call.threads, [&](int64_t i) { fn(i / chunks, i % chunks); });
  }

  void forward() const {
    Buffer buffer;
    double* partial = (double*)buffer.zeroed(2 * at.G * (chunks + 1) * sizeof(double));  // sums, and sums of powers
    double *partial_powers = partial + at.G * chunks, *sums = partial_powers + at.G * chunks, *powers = sums + at.G;
    Parameter gains = spread_out(call.weight, wide, 1), biases = spread_out(call.bias, call.bias_type, 0);

    auto fold = [&](const double* of_chunks, int64_t g) {
      double sum = 0;
      for (int64_t k = 0; k < chunks; k++) sum += of_chunks[g * chunks + k];
      return sum;
    };
    auto locate = [&](int64_t g) {
      sums[g] = fold(partial, g);
      loops.locations(call, g, g + 1, &sums[g]);
    };
    auto scale = [&](int64_t g) {
      powers[g] = fold(partial_powers, g);
      loops.scales(call, g, g + 1, &sums[g], &powers[g], true, true);
    };
    auto add = [&](int64_t g, int64_t k, const Chunk& c) { partial[g * chunks + k] = loops.sum(c.block, c.x); };
    auto add_powers = [&](int64_t g, int64_t k, const Chunk& c) {
      partial_powers[g * chunks + k] = loops.powers(c.block, c.x, centered ? saved(0, g) : 0, p);
    };
    auto put = [&](int64_t g, const Chunk& c) {
      double mu = saved(0, g), inverse = saved(1, g);
      int64_t first = group(g) * at.Bc;
      if (affine == Affine::uniform)
        loops.output(c.block, c.x, c.out, mu, inverse * gain(first), bias(first));
      else if (affine == Affine::segments)
        segments(c, [&](int64_t i, int64_t from, const Block& segment) {
          loops.output(segment, move_wide(c.x, from), move_wide(c.out, from), mu, inverse * gain(first + i), bias(first + i));
        });
      else
        loops.output_elements(c.block, c.x, c.out, mu, inverse, elements(gains, g, c.b), elements(biases, g, c.b));
      give_back(c, call.y);
    };
    auto sum_chunk = [&](int64_t g, int64_t k) {
      Scratch scratch(copy_bytes());
      add(g, k, chunk(g, k, scratch, false, nullptr, next_run));
    };
    auto power_chunk = [&](int64_t g, int64_t k) {
      Scratch scratch(copy_bytes());
      add_powers(g, k, chunk(g, k, scratch, false, nullptr, next_again));
    };
    auto output_chunk = [&](int64_t g, int64_t k) {
      Scratch scratch(3 * copy_bytes());
      put(g, chunk(g, k, scratch, false, call.y, next_again == next_run ? next_run : 0));
    };

    if (paneled) {
      each_panel([&](int64_t from, int64_t to) {
        const int64_t count = to - from;
        Scratch scratch(panel_bytes(2 * count));
        PanelParameters parameters(*this, from, count);
        char* y = scratch.data + panel_bytes(count);
        Block together = {1, call.n, 0, 0, 0, 0, false};
        const char* x = gather(call.x, from, to, scratch.data);
        loops.sum_each(together, count, panel_apart, x, sums + from);
        loops.locations(call, from, to, sums + from);
        loops.powers_each(together, count, panel_apart, x, centered ? saved_row(0, from) : nullptr, p, powers + from);
        loops.scales(call, from, to, sums + from, powers + from, true, true);
        parameters.find_scales(from, count);
        void* out = move(call.y, start(from));
        if (!copied) {
          Block spread = {at.A, at.B, at.B, at.sa, next_panel, next_write, past_cache};
          loops.output_each(spread, count, panel_apart, at.sg2, x, out, saved_row(0, from), parameters.scale, parameters.shift);
          return;
        }
        loops.output_each(together, count, panel_apart, panel_apart, x, y, saved_row(0, from), parameters.scale, parameters.shift);
        for (int64_t i = 0; i < count; i++) copy_out(y + i * panel_step, at.B, move(out, i * at.sg2), at.sa, at.A, at.B);
      });
    } else if (known) {
      loops.locations(call, 0, at.G, sums);
      loops.scales(call, 0, at.G, sums, powers, true, false);
      each_chunk([&](int64_t g, int64_t k) {
        Scratch scratch(3 * copy_bytes());
        Chunk c = chunk(g, k, scratch, false, call.y, next_run);
        add(g, k, c);
        add_powers(g, k, c);
        put(g, c);
      });
      for (int64_t g = 0; g < at.G; g++) sums[g] = fold(partial, g), powers[g] = fold(partial_powers, g);
      loops.scales(call, 0, at.G, sums, powers, false, true);
    } else if (whole) {
      parallel(at.G, call.threads, [&](int64_t g) {
        for (int64_t k = 0; k < chunks; k++) sum_chunk(g, k);
        locate(g);
        for (int64_t k = chunks; k-- > 0;) power_chunk(g, k);  // back and forth: what was read last is still in the cache
        scale(g);
        for (int64_t k = 0; k < chunks; k++) output_chunk(g, k);
      });
    } else {
      each_chunk(sum_chunk);
      for (int64_t g = 0; g < at.G; g++) locate(g);
      each_chunk(power_chunk);
      for (int64_t g = 0; g < at.G; g++) scale(g);
      each_chunk(output_chunk);
    }
  }

  void backward() const {
    // Of gain's and bias's gradients there is one value per statistic, or one per channel (or element) and block.
    const int64_t values = affine == Affine::uniform ? at.G : at.C * spread, stride = values + 16;
    const int64_t copies = affine == Affine::uniform ? 1 : blocks;
    Buffer totals, parameters, coefficients;
    Totals* partial = (Totals*)totals.allocate(at.G * (chunks + 1) * sizeof(Totals));
    double *of_dy = (double*)(partial + at.G * chunks), *of_from_mu = of_dy + at.G, *of_u = of_from_mu + at.G;
    double* dw = (double*)parameters.zeroed(2 * copies * stride * sizeof(double));
    double* db = dw + copies * stride;
    char* constant = (char*)coefficients.zeroed(2 * at.G * wide_width);
    char* along = constant + at.G * wide_width;
    Parameter gains = spread_out(call.weight, wide, 1);

    auto add = [&](int64_t g, int64_t k, const Chunk& c) {
      double mu = saved(0, g), inverse = saved(1, g), centre = centered ? mu : 0, t[3];
      int64_t first = group(g) * at.Bc, block = (g / stats_per_block * blocks_per_stat + k / chunks_per_block) * stride;
      Totals sum = {0, 0, 0};
      if (affine == Affine::uniform) {
        loops.gradients(c.block, c.x, c.dy, mu, centre, p, t);
        sum.add(t);
      } else if (affine == Affine::segments) {
        segments(c, [&](int64_t i, int64_t from, const Block& segment) {
          loops.gradients(segment, move_wide(c.x, from), move_wide(c.dy, from), mu, centre, p, t);
          dw[block + first + i] += t[1] * inverse;
          db[block + first + i] += t[0];
          t[0] *= gain(first + i);
          t[1] *= gain(first + i);
          sum.add(t);
        });
      } else {
        int64_t skip = block + first * at.S + c.b;
        loops.gradients_elements(c.block, c.x, c.dy, mu, centre, inverse, p, elements(gains, g, c.b), dw + skip, db + skip, t);
        sum.add(t);
      }
      partial[g * chunks + k] = sum;
    };
    auto put = [&](int64_t g, const Chunk& c) {
      double inverse = saved(1, g), centre = centered ? saved(0, g) : 0, b = wide_number(constant, g), u = wide_number(along, g);
      int64_t first = group(g) * at.Bc;
      if (affine == Affine::uniform)
        loops.input(c.block, c.x, c.dy, c.out, centre, inverse * gain(first), b, u, p);
      else if (affine == Affine::segments)
        segments(c, [&](int64_t i, int64_t from, const Block& segment) {
          loops.input(segment, move_wide(c.x, from), move_wide(c.dy, from), move_wide(c.out, from), centre, inverse * gain(first + i), b, u, p);
        });
      else
        loops.input_elements(c.block, c.x, c.dy, c.out, centre, inverse, b, u, p, elements(gains, g, c.b));
      give_back(c, call.dx);
    };
    auto add_chunk = [&](int64_t g, int64_t k) {
      Scratch scratch(2 * copy_bytes());
      add(g, k, chunk(g, k, scratch, true, nullptr, next_run));
    };
    auto input_chunk = [&](int64_t g, int64_t k) {
      Scratch scratch(3 * copy_bytes());
      put(g, chunk(g, k, scratch, true, call.dx, next_again));
    };
    auto stream = [&](int64_t from, int64_t to) {
      loops.stream_gradients(call, from, to, of_dy + from, of_from_mu + from, of_u + from, move_wide(constant, from), move_wide(along, from), true, true);
    };
    // From the sums of a statistic to dw, db, what dx needs, and the state.
    auto finish = [&](int64_t g) {
      if (affine == Affine::uniform) {
        double w = gain(group(g) * at.Bc);
        dw[g] = of_from_mu[g] * saved(1, g);
        db[g] = of_dy[g];
        of_dy[g] *= w;
        of_from_mu[g] *= w;
      }
      if (call.dx) stream(g, g + 1);
    };
    auto fold = [&](int64_t g) {
      Totals sum = {0, 0, 0};
      for (int64_t k = 0; k < chunks; k++) sum.add(&partial[g * chunks + k].dy);
      of_dy[g] = sum.dy, of_from_mu[g] = sum.from_mu, of_u[g] = sum.u;
      finish(g);
    };

    if (paneled) {
      each_panel([&](int64_t from, int64_t to) {
        const int64_t count = to - from;
        Scratch scratch(panel_bytes(3 * count));
        PanelParameters parameters(*this, from, count);
        char* dx = scratch.data + panel_bytes(2 * count);
        Block together = {1, call.n, 0, 0, 0, 0, false};
        const char *x = gather(call.x, from, to, scratch.data), *dy = gather(call.dy, from, to, scratch.data + panel_bytes(count));
        loops.gradients_each(together, count, panel_apart, x, dy, saved_row(0, from), centered, p, of_dy + from, of_from_mu + from, of_u + from);
        loops.parameter_gradients(call, from, to, of_dy + from, of_from_mu + from, parameters.gain, dw + from, db + from, nullptr, nullptr);
        if (!call.dx) return;
        stream(from, to);
        parameters.find_scales(from, count);
        const void *centre = centered ? saved_row(0, from) : nullptr, *b = move_wide(constant, from), *u = move_wide(along, from);
        void* out = move(call.dx, start(from));
        if (!copied) {
          Block spread = {at.A, at.B, at.B, at.sa, next_panel, next_write, past_cache};
          loops.input_each(spread, count, panel_apart, at.sg2, x, dy, out, centre, parameters.scale, b, u, p);
          return;
        }
        loops.input_each(together, count, panel_apart, panel_apart, x, dy, dx, centre, parameters.scale, b, u, p);
        for (int64_t i = 0; i < count; i++) copy_out(dx + i * panel_step, at.B, move(out, i * at.sg2), at.sa, at.A, at.B);
      });
    } else if (known && call.dx) {
      Buffer zeros;
      double* zero = (double*)zeros.zeroed(at.G * sizeof(double));
      loops.stream_gradients(call, 0, at.G, zero, zero, zero, constant, along, true, false);
      each_block([&](int64_t g, int64_t k) {
        Scratch scratch(3 * copy_bytes());
        Chunk c = chunk(g, k, scratch, true, call.dx, next_run);
        add(g, k, c);
        put(g, c);
      });
      for (int64_t g = 0; g < at.G; g++) fold(g);
    } else if (whole) {
      parallel((at.G + stats_per_block - 1) / stats_per_block, call.threads, [&](int64_t block) {
        int64_t end = smaller(at.G, (block + 1) * stats_per_block);
        for (int64_t g = block * stats_per_block; g < end; g++) {
          for (int64_t k = 0; k < chunks; k++) add_chunk(g, k);
          fold(g);
          for (int64_t k = call.dx ? chunks : 0; k-- > 0;) input_chunk(g, k);
        }
      });
    } else {
      each_block(add_chunk);
      for (int64_t g = 0; g < at.G; g++) fold(g);
      if (call.dx) each_chunk(input_chunk);
    }
    if (call.dw) add_channels(dw, copies, stride, values, call.dw, call.dw_type);
    if (call.db) add_channels(db, copies, stride, values, call.db, call.bias_type);
  }

  // As each_chunk; but chunks that add to the same block of dw and db are one thread's.
  template <class Fn> void each_block(const Fn& fn) const {
    if (affine == Affine::uniform) return each_chunk(fn);
    parallel(blocks, call.threads, [&](int64_t block) {
      int64_t g0 = block / blocks_per_stat * stats_per_block, k0 = block % blocks_per_stat * chunks_per_block;
      for (int64_t g = g0; g < smaller(at.G, g0 + stats_per_block); g++)
        for (int64_t k = k0; k < smaller(chunks, k0 + chunks_per_block); k++) fn(g, k);
    });
  }

  // Fold blocks, then what belongs to one channel, in order.
  void add_channels(double* sums, int64_t copies, int64_t stride, int64_t values, void* out, Type type) const {
    for (int64_t copy = 1; copy < copies; copy++)
      for (int64_t i = 0; i < values; i++) sums[i] += sums[copy * stride + i];
    for (int64_t i = at.C; spread == 1 && i < values; i++) sums[i % at.C] += sums[i];
    for (int64_t c = 0; c < at.C; c++)
      for (int64_t i = 0; i < spread; i++) sums[c] = i ? sums[c] + sums[c * spread + i] : sums[c * spread];
    set_parameter(out, type, at.C, sums);
  }
};

}  // namespace
