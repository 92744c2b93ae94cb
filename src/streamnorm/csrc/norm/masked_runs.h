// The walk over runs under a mask: what counts of a statistic is copied together, and results are copied back to where it lay.

#pragma once

#include "norm/mask.h"
#include "norm/runs.h"

namespace {

struct MaskedRuns : Walk {
  static constexpr int64_t chunk_size = 16384, shortest_segment = 16, most_blocks = 64;

  // A unit has one value of the mask for each of its elements: it is the part of a run that belongs to one channel. Or it is a whole
  // run, which counts or does not, where there is one element to a channel.
  const bool together;
  const bool elements;  // units are so short that gain and bias are spread out, one value for each element
  const int64_t unit, units;
  // A task is what is copied together at once: several units of a statistic, or a part of a long one.
  const int64_t parts, units_per_task, tasks;
  const int64_t next_run;  // in the mask
  // Gradients of gain and bias are summed in about most_blocks blocks, as in Runs.
  const int64_t stats_per_block, tasks_per_block, blocks_per_stat, blocks;
  const bool whole;
  const Parameter gains, biases;

  MaskedRuns(const Call& c, const Kernels& k)
      : Walk(c, k), together(at.S == 1 && at.Bc > 1), elements(at.Bc > 1 && at.S < shortest_segment), unit(together ? at.Bc : at.S), units(together ? at.A : at.A * at.Bc),
        parts((unit + chunk_size - 1) / chunk_size), units_per_task(larger(1, chunk_size / unit)),
        tasks(parts > 1 ? units * parts : (units + units_per_task - 1) / units_per_task), next_run(at.place(at.sa)),
        stats_per_block((at.G + most_blocks - 1) / most_blocks),
        tasks_per_block(at.G >= most_blocks ? tasks : (tasks * at.G + most_blocks - 1) / most_blocks),
        blocks_per_stat((tasks + tasks_per_block - 1) / tasks_per_block), blocks((at.G + stats_per_block - 1) / stats_per_block * blocks_per_stat),
        whole(c.threads == 1 || at.G >= 4 * c.threads || tasks == 1), gains(c.weight, wide, wide, elements ? at.C : 0, 1, false, 1),
        biases(c.bias, c.bias_type, wide, elements ? at.C : 0, 1, false, 0) {}

  int64_t start(int64_t g) const { return g / at.G2 * at.sg1 + g % at.G2 * at.sg2; }
  int64_t channel(int64_t g) const { return g % (at.C / at.Bc) * at.Bc; }  // the first one of a statistic
  int64_t block_of(int64_t g, int64_t k) const { return g / stats_per_block * blocks_per_stat + k / tasks_per_block; }

  // fn(first element, its channel, the mask there, elements) for each unit of a task, or its part
  template <class Fn> void each_unit(int64_t g, int64_t k, const Fn& fn) const {
    const int64_t first = parts > 1 ? k / parts : k * units_per_task, last = parts > 1 ? first + 1 : smaller(units, first + units_per_task);
    const int64_t from = unit * (k % parts) / parts, to = unit * (k % parts + 1) / parts, per_run = units / at.A, c0 = channel(g);
    int64_t a = first / per_run, i = first % per_run, run = start(g);
    const uint8_t* mask = call.mask + at.place(run) + a * next_run;
    run += a * at.sa;
    for (int64_t u = first; u < last; u++) {
      fn(run + i * at.S + from, together ? c0 + from : c0 + i, together ? mask : mask + from, to - from);
      if (++i == per_run) i = 0, run += at.sa, mask += next_run;
    }
  }
  int64_t kept_of(const uint8_t* mask, int64_t n) const { return together ? (*mask ? n : 0) : count_kept(mask, n); }
  int64_t gather(const uint8_t* mask, int64_t n, const void* from, void* to) const {
    if (!together) return gather_kept(width, mask, n, from, to);
    if (*mask) memcpy(to, from, n * width);
    return *mask ? n : 0;
  }
  int64_t scatter(const uint8_t* mask, int64_t n, const void* from, void* to) const {
    if (!together) return scatter_kept(width, mask, n, from, to);
    if (*mask) memcpy(to, from, n * width);
    else memset(to, 0, n * width);
    return *mask ? n : 0;
  }
  // The values of a parameter for `count` elements from a channel on, of which each has its own, or all have this one.
  void spread(const Parameter& parameter, int64_t channel, int64_t count, char* out) const {
    const void* values = move_wide(parameter.values, channel);
    if (together) memcpy(out, values, count * wide_width);
    else if (wide == Type::f64) for (int64_t i = 0; i < count; i++) ((double*)out)[i] = *(const double*)values;
    else for (int64_t i = 0; i < count; i++) ((float*)out)[i] = *(const float*)values;
  }

  // What counts of a task. It is copied once, however often it is looked at in turn.
  static Block stretch(int64_t n) { return {1, n, 0, 0, 0, 0, false}; }
  struct Piece {
    static constexpr int64_t room = (chunk_size + 64) * sizeof(double);
    const Scratch scratch{7 * room};
    char *const x = scratch.data, *const dy = x + room, *const out = dy + room, *const narrow = out + room, *const gain = narrow + room,
                *const bias = gain + room;
    double *const dw = (double*)bias, *const db = (double*)(bias + room);
    int64_t g = -1, k = -1, kept = 0;
  };
  void read(Piece& piece, int64_t g, int64_t k, bool with_dy) const {
    if (piece.g == g && piece.k == k) return;
    char *x = narrow ? piece.narrow : piece.x, *dy = narrow ? piece.narrow + Piece::room / 2 : piece.dy;
    piece.g = g;
    piece.k = k;
    piece.kept = 0;
    each_unit(g, k, [&](int64_t offset, int64_t c, const uint8_t* mask, int64_t n) {
      int64_t kept = gather(mask, n, move(call.x, offset), move(x, piece.kept));
      if (with_dy) gather(mask, n, move(call.dy, offset), move(dy, piece.kept));
      if (elements) spread(gains, c, kept, move_wide(piece.gain, piece.kept));
      if (elements && !with_dy) spread(biases, c, kept, move_wide(piece.bias, piece.kept));
      piece.kept += kept;
    });
    if (!narrow) return;
    copy_in(x, 0, piece.x, 0, 1, piece.kept);
    if (with_dy) copy_in(dy, 0, piece.dy, 0, 1, piece.kept);
  }
  void write(const Piece& piece, void* tensor) const {
    if (narrow) copy_out(piece.out, 0, piece.narrow, 0, 1, piece.kept);
    const char* from = narrow ? piece.narrow : piece.out;
    each_unit(piece.g, piece.k, [&](int64_t offset, int64_t, const uint8_t* mask, int64_t n) {
      from += scatter(mask, n, from, move(tensor, offset)) * width;
    });
  }
  // fn(channel, place in the piece, elements) for each stretch of a piece that belongs to one channel
  template <class Fn> void segments(const Piece& piece, const Fn& fn) const {
    if (at.Bc == 1) return fn(channel(piece.g), 0, piece.kept);
    int64_t from = 0;
    each_unit(piece.g, piece.k, [&](int64_t, int64_t c, const uint8_t* mask, int64_t n) {
      n = count_kept(mask, n);
      fn(c, from, n);
      from += n;
    });
  }
  template <class Fn> void each_task(const Fn& fn) const {
    parallel(at.G * tasks, call.threads, [&](int64_t i) {
      Piece piece;
      fn(piece, i / tasks, i % tasks);
    });
  }
  // The call as a statistic sees it, from the elements that its tasks have kept.
  Call of(int64_t g, const int64_t* kept) const {
    Call own = call;
    own.n = 0;
    for (int64_t k = 0; k < tasks; k++) own.n += kept[g * tasks + k];
    return own;
  }

  void forward() const {
    Buffer buffer;
    double* partial = (double*)buffer.zeroed(at.G * (3 * tasks + 2) * sizeof(double));
    double *partial_powers = partial + at.G * tasks, *sums = partial_powers + at.G * tasks, *powers = sums + at.G;
    int64_t* kept = (int64_t*)(powers + at.G);

    auto add = [&](Piece& piece, int64_t g, int64_t k) {
      read(piece, g, k, false);
      kept[g * tasks + k] = piece.kept;
      partial[g * tasks + k] = loops.sum(stretch(piece.kept), piece.x);
    };
    auto locate = [&](int64_t g) {
      for (int64_t k = 0; k < tasks; k++) sums[g] += partial[g * tasks + k];
      loops.locations(of(g, kept), g, g + 1, &sums[g]);
    };
    auto add_powers = [&](Piece& piece, int64_t g, int64_t k) {
      read(piece, g, k, false);
      partial_powers[g * tasks + k] = loops.powers(stretch(piece.kept), piece.x, centered ? saved(0, g) : 0, p);
    };
    auto scale = [&](int64_t g) {
      for (int64_t k = 0; k < tasks; k++) powers[g] += partial_powers[g * tasks + k];
      loops.scales(of(g, kept), g, g + 1, &sums[g], &powers[g], true, true);
    };
    auto put = [&](Piece& piece, int64_t g, int64_t k) {
      read(piece, g, k, false);
      double mu = saved(0, g), inverse = saved(1, g);
      if (elements) loops.output_elements(stretch(piece.kept), piece.x, piece.out, mu, inverse, piece.gain, piece.bias);
      else
        segments(piece, [&](int64_t c, int64_t from, int64_t n) {
          loops.output(stretch(n), move_wide(piece.x, from), move_wide(piece.out, from), mu, inverse * gain(c), bias(c));
        });
      write(piece, call.y);
    };

    if (whole) {
      parallel(at.G, call.threads, [&](int64_t g) {
        Piece piece;
        for (int64_t k = 0; k < tasks; k++) add(piece, g, k);
        locate(g);
        for (int64_t k = tasks; k-- > 0;) add_powers(piece, g, k);
        scale(g);
        for (int64_t k = 0; k < tasks; k++) put(piece, g, k);
      });
    } else {
      each_task(add);
      for (int64_t g = 0; g < at.G; g++) locate(g);
      each_task(add_powers);
      for (int64_t g = 0; g < at.G; g++) scale(g);
      each_task(put);
    }
  }

  void backward() const {
    Buffer buffer, parameters, coefficients;
    Totals* partial = (Totals*)buffer.allocate(at.G * tasks * (sizeof(Totals) + sizeof(int64_t)));
    int64_t* kept = (int64_t*)(partial + at.G * tasks);
    double* dw = (double*)parameters.zeroed(2 * blocks * at.C * sizeof(double));
    double* db = dw + blocks * at.C;
    char* constant = (char*)coefficients.zeroed(2 * at.G * wide_width);
    char* along = constant + at.G * wide_width;

    auto add = [&](Piece& piece, int64_t g, int64_t k) {
      read(piece, g, k, true);
      double mu = saved(0, g), inverse = saved(1, g), centre = centered ? mu : 0, t[3];
      double *to_dw = dw + block_of(g, k) * at.C, *to_db = db + block_of(g, k) * at.C;
      Totals& totals = partial[g * tasks + k] = {0, 0, 0};
      kept[g * tasks + k] = piece.kept;
      if (elements) {
        memset(piece.dw, 0, (piece.kept + 16) * sizeof(double));
        memset(piece.db, 0, (piece.kept + 16) * sizeof(double));
        loops.gradients_elements(stretch(piece.kept), piece.x, piece.dy, mu, centre, inverse, p, piece.gain, piece.dw, piece.db, t);
        totals.add(t);
        const double *from_dw = piece.dw, *from_db = piece.db;
        each_unit(g, k, [&](int64_t, int64_t c, const uint8_t* mask, int64_t n) {
          n = kept_of(mask, n);
          for (int64_t i = 0; i < n; i++) to_dw[together ? c + i : c] += *from_dw++, to_db[together ? c + i : c] += *from_db++;
        });
        return;
      }
      segments(piece, [&](int64_t c, int64_t from, int64_t n) {
        loops.gradients(stretch(n), move_wide(piece.x, from), move_wide(piece.dy, from), mu, centre, p, t);
        to_dw[c] += t[1] * inverse;
        to_db[c] += t[0];
        t[0] *= gain(c);
        t[1] *= gain(c);
        totals.add(t);
      });
    };
    // From the sums of a statistic to what dx needs, and the state.
    auto finish = [&](int64_t g) {
      Totals sum = {0, 0, 0};
      for (int64_t k = 0; k < tasks; k++) sum.add(&partial[g * tasks + k].dy);
      if (call.dx)
        loops.stream_gradients(of(g, kept), g, g + 1, &sum.dy, &sum.from_mu, &sum.u, move_wide(constant, g), move_wide(along, g), true, true);
    };
    auto put = [&](Piece& piece, int64_t g, int64_t k) {
      read(piece, g, k, true);
      double inverse = saved(1, g), centre = centered ? saved(0, g) : 0, b = wide_number(constant, g), u = wide_number(along, g);
      if (elements) loops.input_elements(stretch(piece.kept), piece.x, piece.dy, piece.out, centre, inverse, b, u, p, piece.gain);
      else
        segments(piece, [&](int64_t c, int64_t from, int64_t n) {
          loops.input(stretch(n), move_wide(piece.x, from), move_wide(piece.dy, from), move_wide(piece.out, from), centre, inverse * gain(c), b, u, p);
        });
      write(piece, call.dx);
    };

    if (whole) {
      parallel((at.G + stats_per_block - 1) / stats_per_block, call.threads, [&](int64_t block) {
        Piece piece;
        for (int64_t g = block * stats_per_block; g < smaller(at.G, (block + 1) * stats_per_block); g++) {
          for (int64_t k = 0; k < tasks; k++) add(piece, g, k);
          finish(g);
          for (int64_t k = call.dx ? tasks : 0; k-- > 0;) put(piece, g, k);
        }
      });
    } else {
      parallel(blocks, call.threads, [&](int64_t block) {  // what adds to the same block of dw and db is one thread's
        Piece piece;
        int64_t g0 = block / blocks_per_stat * stats_per_block, k0 = block % blocks_per_stat * tasks_per_block;
        for (int64_t g = g0; g < smaller(at.G, g0 + stats_per_block); g++)
          for (int64_t k = k0; k < smaller(tasks, k0 + tasks_per_block); k++) add(piece, g, k);
      });
      for (int64_t g = 0; g < at.G; g++) finish(g);
      if (call.dx) each_task(put);
    }
    if (call.dw) add_channels(dw, call.dw, call.dw_type);
    if (call.db) add_channels(db, call.db, call.bias_type);
  }

  // Fold the blocks, in order.
  void add_channels(double* sums, void* out, Type type) const {
    for (int64_t block = 1; block < blocks; block++)
      for (int64_t c = 0; c < at.C; c++) sums[c] += sums[block * at.C + c];
    set_parameter(out, type, at.C, sums);
  }
};

}  // namespace
