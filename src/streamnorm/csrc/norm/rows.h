// The walk over rows: a statistic is a column of a matrix, as where channels come last or there is nothing but channels.

#pragma once

#include "norm/mask.h"
#include "norm/walk.h"

namespace {

// Rows: a statistic is a column of a matrix whose rows are contiguous.
struct Rows : Walk {
  static constexpr int64_t task_size = 65536, strip_size = 4096, most_narrow = 256;

  const int64_t columns, stride;  // stride: columns, in whole packs
  const bool copied;              // as in Runs
  const int64_t copied_stride;
  const int64_t rows_per_task, rows_per_strip, rows_ahead, write_rows, tasks_per_block, tasks_per_outer, tasks;
  // Squares need no look of their own at x: those of a strip, from its own mean while it is in the cache, give them from any. Of an
  // infinite x they are NaN, as they are from a mu that x has made infinite; from one that was known they would be infinite.
  const bool merged;
  // The gradient of x looks at x but once, and leaves signs to itself, where they have room in the stretch of dx of their strip.
  const bool by_signs;

  Rows(const Call& c, const Kernels& k)
      : Walk(c, k), columns(at.C), stride((columns + 15) / 16 * 16), copied(narrow || columns < lanes || c.mask), copied_stride(larger(columns, lanes)),
        rows_per_task(larger(4, task_size / columns / 4 * 4)), rows_per_strip(columns > most_narrow ? 2 : larger(16, strip_size / copied_stride / 4 * 4)),
        rows_ahead(columns > most_narrow ? 2 : rows_per_strip / 2),
        write_rows(columns > most_narrow ? 2 : write_ahead / (columns * width)),
        tasks_per_block((at.B + rows_per_task - 1) / rows_per_task), tasks_per_outer(at.A * tasks_per_block), tasks(at.G1 * tasks_per_outer),
        merged(!knows_mu(c) && p == 2 && centered && columns <= most_narrow && !c.mask),
        by_signs(!known && p == 1 && c.dx && k.input_signs_columns && !copied && columns % lanes == 0 && at.sb == columns &&
                 rows_per_strip * columns <= strip_size) {}

  // Row `row` of what is saved, or an array of coefficients, from outer index o on.
  const void* saved(int row, int64_t o) const { return move_wide((const void*)call.saved, row * at.G + o * columns); }
  char* from_outer(char* values, int64_t o) const { return move_wide(values, o * columns); }

  // A strip of rows, small enough to stay in cache while its columns are walked, as the loops see it. Of wide rows it has two,
  // which are read nearly in the order of memory. What is `rows_ahead` is asked for meanwhile.
  struct Strip {
    int64_t o, before;  // outer index, and rows of the task before the strip
    Block block;
    const void *x, *dy;
    void* out;
  };
  // fn(task, strip) for each strip; what it writes is put into `out`. Whoever reads a tensor again goes the other way: what
  // was read last is still in the cache.
  template <class Fn> void each_strip(Way way, bool with_dy, void* out, const Fn& fn) const {
    if (call.mask) return each_kept_strip(with_dy, out, fn);
    parallel(tasks, call.threads, way, [&](int64_t task) {
      const size_t bytes = copied ? rows_per_strip * (copied_stride + 1) * wide_width : 0;
      Scratch scratch((1 + with_dy + (out != nullptr)) * bytes);
      int64_t o = task / tasks_per_outer, a = task % tasks_per_outer / tasks_per_block, first = task % tasks_per_block * rows_per_task;
      int64_t end = smaller(at.B, first + rows_per_task), base = o * at.sg1 + a * at.sa;
      for (int64_t r = first; r < end; r += rows_per_strip) {
        int64_t offset = base + r * at.sb, rows = smaller(rows_per_strip, end - r);
        const void *x = move(call.x, offset), *dy = with_dy ? move(call.dy, offset) : nullptr;
        void* to = out ? move(out, offset) : nullptr;
        if (!copied) {
          fn(task, Strip{o, r - first, {rows, columns, at.sb, at.sb, rows_ahead * at.sb, write_rows * at.sb, past_cache}, x, dy, to});
          continue;
        }
        char *x_copy = scratch.data, *dy_copy = x_copy + bytes, *out_copy = dy_copy + with_dy * bytes;
        copy_in(x, at.sb, x_copy, copied_stride, rows, columns);
        if (with_dy) copy_in(dy, at.sb, dy_copy, copied_stride, rows, columns);
        fn(task, Strip{o, r - first, {rows, columns, copied_stride, copied_stride, 0, 0, false}, x_copy, dy_copy, out_copy});
        if (out) copy_out(out_copy, copied_stride, to, at.sb, rows, columns);
      }
    });
  }

  // The same under a mask: a strip has rows that count, copied together, and the others are written as zeros.
  template <class Fn> void each_kept_strip(bool with_dy, void* out, const Fn& fn) const {
    parallel(tasks, call.threads, [&](int64_t task) {
      const int64_t row_bytes = copied_stride * wide_width, bytes = (rows_per_strip + 1) * row_bytes;
      Scratch scratch(3 * bytes);
      char *x = scratch.data, *dy = x + bytes, *results = dy + bytes;
      int64_t o = task / tasks_per_outer, a = task % tasks_per_outer / tasks_per_block, r = task % tasks_per_block * rows_per_task;
      int64_t end = smaller(at.B, r + rows_per_task), offset = o * at.sg1 + a * at.sa + r * at.sb;
      int64_t kept[strip_size / 8];  // where the rows of a strip begin
      const uint8_t* mask = call.mask + at.place(offset);
      while (r < end) {
        int64_t rows = 0;
        for (; r < end && rows < rows_per_strip; r++, offset += at.sb, mask += at.sb / columns) {
          if (*mask) kept[rows++] = offset;
          else if (out) memset(move(out, offset), 0, columns * width);
        }
        for (int64_t i = 0; i < rows; i++) copy_in(move(call.x, kept[i]), 0, x + i * row_bytes, 0, 1, columns);
        for (int64_t i = 0; with_dy && i < rows; i++) copy_in(move(call.dy, kept[i]), 0, dy + i * row_bytes, 0, 1, columns);
        if (rows) fn(task, Strip{o, 0, {rows, columns, copied_stride, copied_stride, 0, 0, false}, x, dy, results});
        for (int64_t i = 0; out && i < rows; i++) copy_out(results + i * row_bytes, 0, move(out, kept[i]), 0, 1, columns);
      }
    });
  }
  // The call as an outer index sees it: under a mask each has a number of elements of its own.
  const Call& of(int64_t o) const {
    if (!call.mask) return call;
    if (o == masked_outer) return masked;
    masked = call;
    masked.n = 0;
    masked_outer = o;
    for (int64_t a = 0; a < at.A; a++) {
      const uint8_t* mask = call.mask + at.place(o * at.sg1 + a * at.sa);
      for (int64_t r = 0; r < at.B; r++) masked.n += mask[r * (at.sb / columns)] != 0;
    }
    return masked;
  }
  mutable Call masked;
  mutable int64_t masked_outer = -1;

  // The sums of outer index o from those of its tasks, in order; in place where it has but one.
  void fold(double* sums, const double* partial, int64_t size) const {
    if (sums == partial) return;
    memset(sums, 0, at.G1 * size * sizeof(double));
    for (int64_t task = 0; task < tasks; task++)
      for (int64_t i = 0; i < size; i++) sums[task / tasks_per_outer * size + i] += partial[task * size + i];
  }
  // Mean and sum of squared deviations of a task so far, made to cover a strip too.
  void merge(const Strip& s, double* moments) const {
    alignas(64) double sums[3 * most_narrow], centre[most_narrow];
    double *of_d = sums + stride, *of_squares = of_d + stride;
    memset(sums, 0, 3 * stride * sizeof(double));
    Block now = s.block, ahead = s.block;
    now.next = 0;
    ahead.next = 2 * s.block.next;  // the next strip
    loops.sum_columns(now, s.x, sums);
    loops.means(columns, (double)s.block.rows, sums, centre);
    loops.moments_columns(ahead, s.x, centre, of_d, stride);
    loops.merge_moments(columns, (double)s.before, (double)s.block.rows, centre, of_d, of_squares, moments, moments + stride);
  }
  double rows_of(int64_t task) const { return (double)smaller(rows_per_task, at.B - task % tasks_per_block * rows_per_task); }
  // From the moments of the tasks, in order: the sums of each outer index; and once mu is known those of squares.
  void add_means(double* sums, const double* moments, int64_t size) const {
    for (int64_t task = 0; task < tasks; task++)
      loops.add_means(columns, rows_of(task), moments + task * size, sums + task / tasks_per_outer * size);
  }
  void add_squares(double* sums, const double* moments, int64_t size) const {
    for (int64_t task = 0; task < tasks; task++) {
      const double* mean = moments + task * size;
      int64_t o = task / tasks_per_outer;
      loops.add_squares(columns, rows_of(task), saved(0, o), mean, mean + stride, sums + o * size + stride);
    }
  }
  template <class Fn> void each_outer(const Fn& fn) const {
    for (int64_t o = 0; o < at.G1; o++) fn(o, o * columns, (o + 1) * columns);
  }

  void forward() const {
    const int64_t size = 2 * stride;  // sums, and sums of powers
    Buffer buffer, partial_buffer, coefficients;
    double* sums = (double*)buffer.zeroed(at.G1 * size * sizeof(double));
    double* partial = tasks_per_outer > 1 || merged ? (double*)partial_buffer.zeroed(tasks * size * sizeof(double)) : sums;
    Parameter bias(call.bias, call.bias_type, wide, columns, 1, columns < lanes, 0);
    char* scale = (char*)coefficients.allocate(at.G * wide_width + 64);

    auto locate = [&](int64_t o, int64_t from, int64_t to) { loops.locations(of(o), from, to, sums + o * size); };
    auto scales = [&](int64_t o, int64_t from, int64_t to) {
      loops.scales(of(o), from, to, sums + o * size, sums + o * size + stride, true, !known);
      loops.column_scales(call, from, to, call.weight, from_outer(scale, o));
    };
    auto advance = [&](int64_t o, int64_t from, int64_t to) {
      loops.scales(of(o), from, to, sums + o * size, sums + o * size + stride, false, true);
    };
    auto add = [&](int64_t task, const Strip& s) { loops.sum_columns(s.block, s.x, partial + task * size); };
    auto add_powers = [&](int64_t task, const Strip& s) {
      loops.powers_columns(s.block, s.x, centered ? saved(0, s.o) : nullptr, p, partial + task * size + stride);
    };
    auto put = [&](int64_t, const Strip& s) {
      loops.output_columns(s.block, s.x, s.out, saved(0, s.o), from_outer(scale, s.o), bias.values);
    };

    if (known) {
      each_outer(locate);
      each_outer(scales);
      each_strip(Way::forth, false, call.y, [&](int64_t task, const Strip& s) {
        add(task, s);
        add_powers(task, s);
        put(task, s);
      });
      fold(sums, partial, size);
      each_outer(advance);
      return;
    }
    if (merged) {
      each_strip(Way::forth, false, nullptr, [&](int64_t task, const Strip& s) { merge(s, partial + task * size); });
      add_means(sums, partial, size);
      each_outer(locate);
      add_squares(sums, partial, size);
    } else if (centered) {
      each_strip(Way::back, false, nullptr, add);
      fold(sums, partial, size);
      each_outer(locate);
      each_strip(Way::forth, false, nullptr, add_powers);
      fold(sums, partial, size);
    } else {
      each_strip(Way::forth, false, nullptr, [&](int64_t task, const Strip& s) {
        add(task, s);
        add_powers(task, s);
      });
      fold(sums, partial, size);
      each_outer(locate);
    }
    each_outer(scales);
    each_strip(Way::back, false, call.y, put);
  }

  void backward() const {
    const int64_t size = 3 * stride;  // sums of dy, of dy·(x − mu) and of u
    Buffer buffer, partial_buffer, coefficients, parameters;
    double* sums = (double*)buffer.zeroed(at.G1 * size * sizeof(double));
    double* partial = tasks_per_outer > 1 ? (double*)partial_buffer.zeroed(tasks * size * sizeof(double)) : sums;
    char* scale = (char*)coefficients.allocate(3 * at.G * wide_width + 64);
    char *constant = scale + at.G * wide_width, *along = constant + at.G * wide_width;
    // Gain and bias have their gradients at once where there is one outer index; else sums over those come first.
    const bool at_once = at.G1 == 1 && (!call.dw || call.dw_type == wide) && (!call.db || call.bias_type == wide);
    double* dw = at_once ? nullptr : (double*)parameters.zeroed(2 * columns * sizeof(double));
    double* db = at_once ? nullptr : dw + columns;

    auto stream = [&](int64_t o, int64_t from, int64_t to, bool use, bool advance) {
      double* t = sums + o * size;
      if (use) loops.column_scales(call, from, to, call.weight, from_outer(scale, o));
      loops.stream_gradients(of(o), from, to, t, t + stride, t + 2 * stride, from_outer(constant, o), from_outer(along, o), use, advance);
    };
    auto add_parameters = [&](int64_t o, int64_t from, int64_t to) {
      double* t = sums + o * size;
      loops.parameter_gradients(call, from, to, t, t + stride, call.weight, dw, db, at_once ? call.dw : nullptr, at_once ? call.db : nullptr);
    };
    auto add = [&](int64_t task, const Strip& s) {
      loops.gradients_columns(s.block, s.x, s.dy, saved(0, s.o), centered, p, partial + task * size, stride);
    };
    auto put = [&](int64_t, const Strip& s) {
      loops.input_columns(s.block, s.x, s.dy, s.out, centered ? saved(0, s.o) : nullptr, from_outer(scale, s.o),
                          from_outer(constant, s.o), from_outer(along, s.o), p);
    };
    auto add_and_leave_signs = [&](int64_t task, const Strip& s) {
      loops.gradients_signs_columns(s.block, s.x, s.dy, saved(0, s.o), centered, partial + task * size, stride, (uint32_t*)s.out);
    };
    auto put_by_signs = [&](int64_t, const Strip& s) {
      uint32_t signs[strip_size / 8];  // dx is written over them
      memcpy(signs, s.out, s.block.rows * columns / lanes * sizeof *signs);
      loops.input_signs_columns(s.block, signs, s.dy, s.out, from_outer(scale, s.o), from_outer(constant, s.o), from_outer(along, s.o));
    };

    if (known && call.dx) {
      each_outer([&](int64_t o, int64_t from, int64_t to) { stream(o, from, to, true, false); });
      each_strip(Way::forth, true, call.dx, [&](int64_t task, const Strip& s) {
        add(task, s);
        put(task, s);
      });
      fold(sums, partial, size);
      each_outer(add_parameters);
      each_outer([&](int64_t o, int64_t from, int64_t to) { stream(o, from, to, false, true); });
    } else {
      if (by_signs) each_strip(Way::forth, true, call.dx, add_and_leave_signs);
      else each_strip(Way::forth, true, nullptr, add);
      fold(sums, partial, size);
      each_outer(add_parameters);
      if (call.dx) each_outer([&](int64_t o, int64_t from, int64_t to) { stream(o, from, to, true, true); });
      if (by_signs) each_strip(Way::back, true, call.dx, put_by_signs);
      else if (call.dx) each_strip(Way::back, true, call.dx, put);
    }
    if (call.dw && !at_once) set_parameter(call.dw, call.dw_type, columns, dw);
    if (call.db && !at_once) set_parameter(call.db, call.bias_type, columns, db);
  }
};

}  // namespace
