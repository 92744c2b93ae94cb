// What all walks over a tensor need: memory for the time of a call, parameters, and what follows from the call.

#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "common/threads.h"
#include "norm/call.h"

namespace {

// Memory for the time of a call: from a pool that the thread keeps, or where that is too small from the heap.
class Buffer {
  struct Pool {
    alignas(64) char data[65536];
    size_t used;
    int users;
  };
  static Pool& pool() {
    static thread_local Pool kept;
    return kept;
  }
  void* heap = nullptr;
  bool pooled = false;

 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    free(heap);
    if (pooled && --pool().users == 0) pool().used = 0;
  }
  void* allocate(size_t bytes) {
    Pool& p = pool();
    bytes = (bytes + 63) / 64 * 64 + 64;
    if (p.used + bytes <= sizeof p.data) {
      pooled = true;
      p.users++;
      p.used += bytes;
      return p.data + p.used - bytes;
    }
    heap = malloc(bytes);
    if (!heap) throw std::bad_alloc();
    return heap;
  }
  void* zeroed(size_t bytes) { return memset(allocate(bytes), 0, bytes); }
};

// Memory that a thread keeps from call to call, unless it is large.
struct Scratch {
  static constexpr size_t most_kept = 1 << 20;
  struct Kept {
    char* data = nullptr;
    ~Kept() { free(data); }
  };
  Buffer own;
  char* data;
  explicit Scratch(size_t bytes) {
    static thread_local Kept kept;
    if (bytes <= most_kept && !kept.data) kept.data = (char*)malloc(most_kept);
    data = bytes <= most_kept && kept.data ? kept.data : (char*)own.allocate(bytes);
  }
};

// A parameter in the type of statistics, each value repeated `times` and with room to be read in whole packs: the tensor
// itself where it can be, else a copy.
struct Parameter {
  Buffer copy;
  const void* values;
  Parameter(const void* data, Type type, Type wide, int64_t count, int64_t times, bool pad, double otherwise) : values(data) {
    if (data && type == wide && times == 1 && !pad) return;
    void* out = copy.zeroed((count * times + 16) * sizeof(double));
    values = out;
    for (int64_t c = 0; c < count; c++)
      for (int64_t i = 0; i < times; i++) set_number(out, wide, c * times + i, data ? number(data, type, c) : otherwise);
  }
};

// With weights (1, 0, 0) mu is known before a call starts; and the moment too, where the present does not bound it.
bool knows_mu(const Call& c) { return c.lasting && c.mix[0] == 1 && c.mix[1] == 0 && c.mix[2] == 0; }
bool is_one_pass(const Call& c) { return knows_mu(c) && c.formula->floor == 0; }

// What all walks need of a call.
struct Walk {
  static constexpr int64_t large_output = 1 << 24, write_ahead = 4096;  // bytes

  const Call& call;
  const Layout& at;
  const Kernels& loops;
  const Type wide;  // of statistics, and of all arithmetic
  const int64_t width, wide_width, lanes;  // bytes of an element and of a statistic, statistics in a pack
  const bool narrow;
  const double p;
  const bool centered;
  const bool past_cache;
  const bool known;

  Walk(const Call& c, const Kernels& k)
      : call(c), at(*c.layout), loops(k), wide(wide_of(c.type)),
        width(bytes(c.type)), wide_width(bytes(wide)), lanes(64 / wide_width),
        narrow(width == 2), p(c.formula->p), centered(c.formula->centered),
        past_cache(c.n * at.G * width >= large_output), known(is_one_pass(c)) {}

  template <class P> P* move(P* base, int64_t elements) const { return (P*)((char*)base + elements * width); }
  template <class P> P* move_wide(P* base, int64_t elements) const { return (P*)((char*)base + elements * wide_width); }
  double wide_number(const void* p, int64_t i) const { return wide == Type::f64 ? ((const double*)p)[i] : ((const float*)p)[i]; }
  void* saved_row(int row, int64_t g) const { return move_wide(call.saved, row * at.G + g); }
  double saved(int row, int64_t g) const { return wide_number(call.saved, row * at.G + g); }
  double gain(int64_t c) const { return call.weight ? wide_number(call.weight, c) : 1; }
  double bias(int64_t c) const { return call.bias ? number(call.bias, call.bias_type, c) : 0; }

  void set_parameter(void* out, Type type, int64_t count, const double* values) const {
    if (type == Type::f32) return loops.narrow_sums(values, (float*)out, count);
    for (int64_t i = 0; i < count; i++) set_number(out, type, i, values[i]);
  }
  // Rows of `length` elements from the tensor to a copy in the type of arithmetic, and back.
  void copy_in(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t length) const {
    for (int64_t r = 0; r < rows; r++) {
      const void* source = move(from, r * from_stride);
      void* target = move_wide(to, r * to_stride);
      if (call.type == Type::bf16) loops.widen_bfloat16(source, (float*)target, length);
      else if (call.type == Type::f16) loops.widen_float16(source, (float*)target, length);
      else memcpy(target, source, length * width);
    }
  }
  void copy_out(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t length) const {
    for (int64_t r = 0; r < rows; r++) {
      const void* source = move_wide(from, r * from_stride);
      void* target = move(to, r * to_stride);
      if (call.type == Type::bf16) loops.narrow_bfloat16((const float*)source, target, length);
      else if (call.type == Type::f16) loops.narrow_float16((const float*)source, target, length);
      else memcpy(target, source, length * width);
    }
  }
};

}  // namespace
