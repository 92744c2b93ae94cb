// The C++ engine of streamnorm: training steps on CPU tensors.
//
// It knows nothing of PyTorch but two public interfaces: DLPack's C exchange table (through which a tensor's pointer,
// shape and strides are read without a copy or an owner) and the OpenMP runtime that PyTorch has loaded. native.py
// decides what comes here; the formulas are in native_kernels.h, and are explained in plain.py.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

// --- DLPack 1.x, the part that is used (https://github.com/dmlc/dlpack, dlpack.h) ------------------------------------

struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  struct { struct { uint32_t major, minor; } version; void* previous; } header;
  void *allocate, *from_object, *to_object;
  int (*borrow)(void* object, DLTensor* out);
  void* stream;
};

// --- what the kernels are told -----------------------------------------------------------------------------------------

namespace {

enum class Type : uint8_t { f32, f64, bf16, f16, other };
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

struct Formula {
  double p, k, eps;
  bool centered;
  bool windowed;
  double window, alpha[3], beta[3];
};

// Where the elements of a statistic are. Runs: statistic g = (g1, g2) owns A runs of B contiguous elements, at
// a·sa + g1·sg1 + g2·sg2. Rows: statistic g = (g1, c) is a column of A blocks of B rows, at g1·sg1 + a·sa + b·sb + c.
// Element b of a run belongs to channel (g mod C/Bc)·Bc + b / S.
struct Layout {
  bool rows;
  int64_t A, sa, G1, sg1, G2, sg2, B, sb;
  int64_t G, C, Bc, S;
};

struct Call {
  const Formula* formula;
  const Layout* layout;
  Type type;
  int threads;
  int64_t n;  // elements behind each statistic
  const void *x, *dy;
  void *y, *dx;
  const void *weight, *bias;
  Type weight_type, bias_type;
  void *dw, *db;
  const void* lasting;  // the stream: long (2, G), short (2, G), count (G); or their gradients'
  void* recent;
  int64_t* count;
  double mix[3];
  double grad_scale;
  void* saved;  // (3, G): mu, 1/s, slope
  double* moments;  // (G): m, where it is asked for
};

// A block of memory: `rows` stretches of `length` contiguous elements, `from` elements apart where they are read and `to`
// elements apart where they are written.
struct Block {
  int64_t rows, length, from, to;
};

// The loops of native_kernels.h for one storage type and p. `void*` without a note is of the storage type where it is x,
// y, dy or dx, and else of the type of statistics: double for double, float for all others.
struct Kernels {
  double (*sum)(const Block&, const void* x);
  double (*powers)(const Block&, const void* x, double centre, double p);
  void (*output)(const Block&, const void* x, void* y, double mu, double scale, double shift);
  void (*gradients[2])(const Block&, const void* x, const void* dy, double mu, double centre, double p, double* out);
  void (*input)(const Block&, const void* x, const void* dy, void* dx, double centre, double scale, double constant, double along, double p);

  void (*output_elements)(const Block&, const void* x, void* y, double mu, double inverse, const void* gain, const void* bias);
  void (*gradients_elements)(const Block&, const void* x, const void* dy, double mu, double centre, double inverse, double p,
                             const void* gain, double* dw, double* db, double* out);
  void (*input_elements)(const Block&, const void* x, const void* dy, void* dx, double centre, double inverse, double constant,
                         double along, double p, const void* gain);

  void (*sum_columns)(const Block&, const void* x, double* out);
  void (*powers_columns)(const Block&, const void* x, const void* centre, double p, double* out);
  void (*output_columns)(const Block&, const void* x, void* y, const void* mu, const void* scale, const void* shift);
  void (*gradients_columns[2])(const Block&, const void* x, const void* dy, const void* mu, bool centered, double p, double* out, int64_t stride);
  void (*input_columns)(const Block&, const void* x, const void* dy, void* dx, const void* centre, const void* scale,
                        const void* constant, const void* along, double p);

  void (*locations)(const Call&, int64_t from, int64_t to, const double* sums);
  void (*scales)(const Call&, int64_t from, int64_t to, const double* sums, const double* sums_of_powers);
  void (*stream_gradients)(const Call&, int64_t from, int64_t to, const double* sums, const double* sums_from_mu,
                           const double* sums_of_u, void* constant, void* along);
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory for the time of a call.
struct Buffer {
  void* data = nullptr;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
  void* allocate(size_t bytes) {
    data = malloc(bytes ? bytes : 1);
    if (!data) throw std::bad_alloc();
    return data;
  }
  void* zeroed(size_t bytes) {
    data = calloc(bytes ? bytes : 1, 1);
    if (!data) throw std::bad_alloc();
    return data;
  }
};

// Memory that a thread keeps between calls.
void* scratch(size_t bytes) {
  struct Kept {
    void* data = nullptr;
    size_t size = 0;
    ~Kept() { free(data); }
  };
  static thread_local Kept kept;
  if (kept.size < bytes) {
    free(kept.data);
    kept.size = 0;
    kept.data = malloc(bytes);
    if (!kept.data) throw std::bad_alloc();
    kept.size = bytes;
  }
  return kept.data;
}

float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// One element of a parameter, whatever its type.
double number(const void* p, Type type, int64_t i) {
  uint16_t h = type == Type::bf16 || type == Type::f16 ? ((const uint16_t*)p)[i] : 0;
  switch (type) {
    case Type::f64: return ((const double*)p)[i];
    case Type::bf16: return as_float((uint32_t)h << 16);
    case Type::f16: {
      int exponent = h >> 10 & 31, fraction = h & 1023;
      double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
      return h & 0x8000 ? -magnitude : magnitude;
    }
    default: return ((const float*)p)[i];
  }
}
void set_number(void* p, Type type, int64_t i, double value) {
  switch (type) {
    case Type::f64: ((double*)p)[i] = value; return;
    case Type::bf16: {
      uint32_t u = as_bits((float)value);
      ((uint16_t*)p)[i] = value != value ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
      return;
    }
    case Type::f16: {
      uint16_t sign = std::signbit(value) ? 0x8000 : 0;
      double a = std::fabs(value);
      int exponent;
      uint16_t bits;
      if (value != value) bits = 0x7e00;
      else if (a >= 65520) bits = 0x7c00;
      else if (a < 0x1p-14) bits = (uint16_t)nearbyint(a * 0x1p24);
      else {
        frexp(a, &exponent);
        bits = (uint16_t)(((exponent + 13) << 10) + (int)nearbyint(ldexp(a, 11 - exponent)));
      }
      ((uint16_t*)p)[i] = sign | bits;
      return;
    }
    default: ((float*)p)[i] = (float)value;
  }
}

// --- threads: those of the OpenMP runtime that PyTorch runs on -----------------------------------------------------------

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;
std::atomic<bool> forked{false};  // GNU's runtime does not survive a fork: a child stays on one thread

struct Team {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*run)(const void*, int64_t);
  const void* body;
};
void work(void* data) {
  Team& team = *(Team*)data;
  for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.tasks;) team.run(team.body, i);
}
void run_tasks(int64_t tasks, int threads, void (*run)(const void*, int64_t), const void* body) {
  Team team;
  team.tasks = tasks;
  team.run = run;
  team.body = body;
  threads = (int)smaller(threads, tasks);
  if (threads > 1 && gomp_parallel && !forked.load(std::memory_order_relaxed)) gomp_parallel(work, &team, (unsigned)threads, 0);
  else work(&team);
}
template <class Fn> void parallel(int64_t tasks, int threads, const Fn& fn) {
  run_tasks(tasks, threads, [](const void* body, int64_t i) { (*(const Fn*)body)(i); }, &fn);
}

}  // namespace

// --- the kernels, once per instruction set ---------------------------------------------------------------------------------

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_VARIANTS 1
#else
#define HAS_X86_VARIANTS 0
#endif

namespace {

#define ISA baseline
#define ISA_BYTES 16
#include "native_kernels.h"
#undef ISA
#undef ISA_BYTES

#if HAS_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2")
#define ISA avx2
#define ISA_BYTES 32
#include "native_kernels.h"
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define ISA avx512
#define ISA_BYTES 64
#include "native_kernels.h"
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options
#endif

struct Variant {
  const char* name;
  const Kernels* (*kernels)(Type, double p);
} const variants[] = {
#if HAS_X86_VARIANTS
    {"avx512", avx512::kernels},
    {"avx2", avx2::kernels},
#endif
    {"baseline", baseline::kernels},
};
const Variant* variant = nullptr;

bool can_run(const char* name) {
#if HAS_X86_VARIANTS
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2");
#endif
  return !strcmp(name, "baseline");
}

// --- gain and bias -------------------------------------------------------------------------------------------------------

// A parameter in the type of statistics, each value repeated `times`: the tensor itself where it can be, else a copy.
struct Parameter {
  Buffer copy;
  const void* values = nullptr;
  Parameter(const void* data, Type type, Type wide, int64_t count, int64_t times, double otherwise) {
    if (data && type == wide && times == 1) {
      values = data;
      return;
    }
    values = copy.allocate((count * times + 16) * sizeof(double));
    for (int64_t c = 0; c < count; c++)
      for (int64_t i = 0; i < times; i++) set_number(copy.data, wide, c * times + i, data ? number(data, type, c) : otherwise);
  }
};

// --- runs: a statistic owns A runs of B elements, each of them contiguous ------------------------------------------------

// How channels lie along a run. uniform: one channel for all of it. segments: one after the other, long enough for loops
// of their own. elements: so short that gain and bias are spread out, one value for each element of a run.
enum class Affine { uniform, segments, elements };

// Sums over dy, or where gain varies along a run over dx̂ = dy·gain.
struct Totals {
  double dy, from_mu, u;
  void add(const double* t) { dy += t[0], from_mu += t[1], u += t[2]; }
};

struct Runs {
  static constexpr int64_t chunk_size = 16384, gather_bytes = 32768, shortest_segment = 16, most_blocks = 64;

  const Call& call;
  const Layout& at;
  const Kernels& loops;
  const int64_t width;  // bytes of an element
  const double p;
  const bool centered;
  const Type wide;
  const Affine affine;
  const int64_t spread;  // values of gain and bias for each channel

  // A chunk is what one partial sum covers: a piece of a long run, or several short runs.
  const int64_t pieces, runs, chunks;
  // Many short runs of one statistic are copied together first: strided, they would push each other out of the cache.
  const bool gathered;
  // Gradients of gain and bias that several statistics share are summed in about most_blocks blocks.
  const int64_t stats_per_block, chunks_per_block, blocks_per_stat, blocks;
  // One statistic at a time keeps it in cache; with few statistics their chunks are shared out among the threads.
  const bool whole;

  Runs(const Call& c, const Kernels& k)
      : call(c), at(*c.layout), loops(k), width(c.type == Type::f64 ? 8 : c.type == Type::f32 ? 4 : 2), p(c.formula->p),
        centered(c.formula->centered), wide(c.type == Type::f64 ? Type::f64 : Type::f32),
        affine(at.Bc == 1 || !(c.weight || c.bias || c.dw || c.db) ? Affine::uniform : at.S >= shortest_segment ? Affine::segments : Affine::elements),
        spread(affine == Affine::elements ? at.S : 1), pieces((at.B + chunk_size - 1) / chunk_size),
        runs(pieces > 1 ? 1 : chunk_size / at.B), chunks(pieces > 1 ? at.A * pieces : (at.A + runs - 1) / runs),
        gathered(affine == Affine::uniform && at.A > 1 && c.n * width <= gather_bytes),
        stats_per_block((at.G + most_blocks - 1) / most_blocks),
        chunks_per_block(at.G >= most_blocks ? chunks : (chunks * at.G + most_blocks - 1) / most_blocks),
        blocks_per_stat((chunks + chunks_per_block - 1) / chunks_per_block),
        blocks((at.G + stats_per_block - 1) / stats_per_block * blocks_per_stat),
        whole(c.threads == 1 || at.G >= 4 * c.threads || chunks == 1) {}

  int64_t start(int64_t g) const { return g / at.G2 * at.sg1 + g % at.G2 * at.sg2; }
  int64_t group(int64_t g) const { return g % (at.C / at.Bc); }
  double saved(int row, int64_t g) const { return number(call.saved, wide, row * at.G + g); }
  double gain(int64_t c) const { return call.weight ? number(call.weight, call.weight_type, c) : 1; }
  double bias(int64_t c) const { return call.bias ? number(call.bias, call.bias_type, c) : 0; }
  template <class P> P* move(P* base, int64_t elements) const { return (P*)((char*)base + elements * width); }

  // Where a chunk is: its first element in memory, that element's place in the run, and the block.
  struct Place {
    int64_t offset, b;
    Block block;
  };
  Place place(int64_t g, int64_t chunk) const {
    if (pieces > 1) {
      int64_t b = chunk % pieces * chunk_size;
      return {start(g) + chunk / pieces * at.sa + b, b, {1, smaller(chunk_size, at.B - b), 0, 0}};
    }
    int64_t a = chunk * runs;
    return {start(g) + a * at.sa, 0, {smaller(runs, at.A - a), at.B, at.sa, at.sa}};
  }

  // fn(channel of the statistic, offset, block) for each segment of a chunk
  template <class Fn> void segments(const Place& at_chunk, const Fn& fn) const {
    int64_t end = at_chunk.b + at_chunk.block.length;
    for (int64_t r = 0; r < at_chunk.block.rows; r++)
      for (int64_t from = at_chunk.b; from < end;) {
        int64_t c = from / at.S, to = smaller((c + 1) * at.S, end);
        fn(c, at_chunk.offset + r * at.sa + from - at_chunk.b, Block{1, to - from, 0, 0});
        from = to;
      }
  }

  template <class Fn> void each_chunk(const Fn& fn) const {
    parallel(at.G * chunks, call.threads, [&](int64_t i) { fn(i / chunks, i % chunks); });
  }
  void gather(const void* from, int64_t g, char* to) const {
    for (int64_t a = 0; a < at.A; a++) memcpy(to + a * at.B * width, move(from, start(g) + a * at.sa), at.B * width);
  }

  void forward() const {
    Buffer buffer, gain_copy;
    double* partial = (double*)buffer.allocate(at.G * (chunks + 1) * sizeof(double));
    double* sums = partial + at.G * chunks;
    Parameter gains(affine == Affine::elements ? call.weight : nullptr, call.weight_type, wide, affine == Affine::elements ? at.C : 0, spread, 1);
    Parameter biases(affine == Affine::elements ? call.bias : nullptr, call.bias_type, wide, affine == Affine::elements ? at.C : 0, spread, 0);
    const int64_t wide_bytes = wide == Type::f64 ? 8 : 4;

    auto fold = [&](int64_t g) {
      double sum = 0;
      for (int64_t k = 0; k < chunks; k++) sum += partial[g * chunks + k];
      return sum;
    };
    auto locate = [&](int64_t g) {
      sums[g] = fold(g);
      loops.locations(call, g, g + 1, &sums[g]);
    };
    auto scale = [&](int64_t g) {
      double sum_of_powers = fold(g);
      loops.scales(call, g, g + 1, &sums[g], &sum_of_powers);
    };
    auto sum_chunk = [&](int64_t g, int64_t k) {
      Place at_chunk = place(g, k);
      partial[g * chunks + k] = loops.sum(at_chunk.block, move(call.x, at_chunk.offset));
    };
    auto power_chunk = [&](int64_t g, int64_t k) {
      Place at_chunk = place(g, k);
      partial[g * chunks + k] = loops.powers(at_chunk.block, move(call.x, at_chunk.offset), centered ? saved(0, g) : 0, p);
    };
    auto output_chunk = [&](int64_t g, int64_t k) {
      Place at_chunk = place(g, k);
      double mu = saved(0, g), inverse = saved(1, g);
      const void* x = move(call.x, at_chunk.offset);
      void* y = move(call.y, at_chunk.offset);
      int64_t first = group(g) * at.Bc;
      if (affine == Affine::uniform) {
        loops.output(at_chunk.block, x, y, mu, inverse * gain(first), bias(first));
      } else if (affine == Affine::segments) {
        segments(at_chunk, [&](int64_t c, int64_t offset, const Block& block) {
          loops.output(block, move(call.x, offset), move(call.y, offset), mu, inverse * gain(first + c), bias(first + c));
        });
      } else {
        int64_t skip = (first * at.S + at_chunk.b) * wide_bytes;
        loops.output_elements(at_chunk.block, x, y, mu, inverse, (char*)gains.values + skip, (char*)biases.values + skip);
      }
    };

    if (gathered) {
      parallel(at.G, call.threads, [&](int64_t g) {
        char* x = (char*)scratch(call.n * width);
        gather(call.x, g, x);
        Block all = {1, call.n, 0, 0};
        partial[g] = loops.sum(all, x);
        sums[g] = partial[g];
        loops.locations(call, g, g + 1, &sums[g]);
        partial[g] = loops.powers(all, x, centered ? saved(0, g) : 0, p);
        loops.scales(call, g, g + 1, &sums[g], &partial[g]);
        int64_t c = group(g) * at.Bc;
        loops.output({at.A, at.B, at.B, at.sa}, x, move(call.y, start(g)), saved(0, g), saved(1, g) * gain(c), bias(c));
      });
    } else if (whole) {
      parallel(at.G, call.threads, [&](int64_t g) {
        for (int64_t k = 0; k < chunks; k++) sum_chunk(g, k);
        locate(g);
        for (int64_t k = 0; k < chunks; k++) power_chunk(g, k);
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
    const bool needs_u = call.dx && centered;
    const int64_t wide_bytes = wide == Type::f64 ? 8 : 4;
    // Of gain's and bias's gradients there is one value per statistic, or one per channel (or element) and block.
    const int64_t values = affine == Affine::uniform ? at.G : at.C * spread, stride = values + 16;
    const int64_t copies = affine == Affine::uniform ? 1 : blocks;
    Buffer totals, parameters, coefficients;
    Totals* partial = (Totals*)totals.allocate(at.G * chunks * sizeof(Totals));
    double* dw = (double*)parameters.zeroed(2 * copies * stride * sizeof(double));
    double* db = dw + copies * stride;
    char* constant = (char*)coefficients.allocate(2 * at.G * sizeof(double));
    char* along = constant + at.G * sizeof(double);
    Parameter gains(affine == Affine::elements ? call.weight : nullptr, call.weight_type, wide, affine == Affine::elements ? at.C : 0, spread, 1);

    auto add_chunk = [&](int64_t g, int64_t k) {
      Place at_chunk = place(g, k);
      double mu = saved(0, g), inverse = saved(1, g), centre = centered ? mu : 0, t[3];
      const void *x = move(call.x, at_chunk.offset), *dy = move(call.dy, at_chunk.offset);
      int64_t first = group(g) * at.Bc, block = g / stats_per_block * blocks_per_stat + k / chunks_per_block;
      Totals sum = {0, 0, 0};
      if (affine == Affine::uniform) {
        loops.gradients[needs_u](at_chunk.block, x, dy, mu, centre, p, t);
        sum.add(t);
      } else if (affine == Affine::segments) {
        double *w = dw + block * stride + first, *b = db + block * stride + first;
        segments(at_chunk, [&](int64_t c, int64_t offset, const Block& segment) {
          loops.gradients[needs_u](segment, move(call.x, offset), move(call.dy, offset), mu, centre, p, t);
          w[c] += t[1] * inverse;
          b[c] += t[0];
          t[0] *= gain(first + c);
          t[1] *= gain(first + c);
          sum.add(t);
        });
      } else {
        int64_t skip = first * at.S + at_chunk.b;
        loops.gradients_elements(at_chunk.block, x, dy, mu, centre, inverse, p, (char*)gains.values + skip * wide_bytes,
                                 dw + block * stride + skip, db + block * stride + skip, t);
        sum.add(t);
      }
      partial[g * chunks + k] = sum;
    };
    auto finish = [&](int64_t g, Totals t) {
      if (affine == Affine::uniform) {
        dw[g] = t.from_mu * saved(1, g);
        db[g] = t.dy;
        t.dy *= gain(group(g) * at.Bc);
        t.from_mu *= gain(group(g) * at.Bc);
      }
      if (call.dx) loops.stream_gradients(call, g, g + 1, &t.dy, &t.from_mu, &t.u, constant + g * wide_bytes, along + g * wide_bytes);
    };
    auto fold = [&](int64_t g) {
      Totals t = {0, 0, 0};
      for (int64_t k = 0; k < chunks; k++) t.add(&partial[g * chunks + k].dy);
      finish(g, t);
    };
    auto input_chunk = [&](int64_t g, int64_t k) {
      Place at_chunk = place(g, k);
      double inverse = saved(1, g), centre = centered ? saved(0, g) : 0, b = number(constant, wide, g), u = number(along, wide, g);
      const void *x = move(call.x, at_chunk.offset), *dy = move(call.dy, at_chunk.offset);
      void* dx = move(call.dx, at_chunk.offset);
      int64_t first = group(g) * at.Bc;
      if (affine == Affine::uniform) {
        loops.input(at_chunk.block, x, dy, dx, centre, inverse * gain(first), b, u, p);
      } else if (affine == Affine::segments) {
        segments(at_chunk, [&](int64_t c, int64_t o, const Block& segment) {
          loops.input(segment, move(call.x, o), move(call.dy, o), move(call.dx, o), centre, inverse * gain(first + c), b, u, p);
        });
      } else {
        loops.input_elements(at_chunk.block, x, dy, dx, centre, inverse, b, u, p, (char*)gains.values + (first * at.S + at_chunk.b) * wide_bytes);
      }
    };

    if (gathered) {
      parallel(at.G, call.threads, [&](int64_t g) {
        char* x = (char*)scratch(2 * call.n * width);
        char* dy = x + call.n * width;
        gather(call.x, g, x);
        gather(call.dy, g, dy);
        double mu = saved(0, g), centre = centered ? mu : 0;
        loops.gradients[needs_u]({1, call.n, 0, 0}, x, dy, mu, centre, p, &partial[g].dy);
        finish(g, partial[g]);
        if (call.dx)
          loops.input({at.A, at.B, at.B, at.sa}, x, dy, move(call.dx, start(g)), centre, saved(1, g) * gain(group(g) * at.Bc),
                      number(constant, wide, g), number(along, wide, g), p);
      });
    } else if (whole) {
      parallel((at.G + stats_per_block - 1) / stats_per_block, call.threads, [&](int64_t block) {
        int64_t end = smaller(at.G, (block + 1) * stats_per_block);
        for (int64_t g = block * stats_per_block; g < end; g++) {
          for (int64_t k = 0; k < chunks; k++) add_chunk(g, k);
          fold(g);
          for (int64_t k = 0; call.dx && k < chunks; k++) input_chunk(g, k);
        }
      });
    } else {
      if (affine == Affine::uniform) each_chunk(add_chunk);
      else
        parallel(blocks, call.threads, [&](int64_t block) {
          int64_t g0 = block / blocks_per_stat * stats_per_block, k0 = block % blocks_per_stat * chunks_per_block;
          for (int64_t g = g0; g < smaller(at.G, g0 + stats_per_block); g++)
            for (int64_t k = k0; k < smaller(chunks, k0 + chunks_per_block); k++) add_chunk(g, k);
        });
      for (int64_t g = 0; g < at.G; g++) fold(g);
      if (call.dx) each_chunk(input_chunk);
    }
    if (call.dw) add_channels(dw, copies, stride, values, call.dw, call.weight_type);
    if (call.db) add_channels(db, copies, stride, values, call.db, call.bias_type);
  }

  // Fold blocks, then what belongs to one channel, in order.
  void add_channels(double* sums, int64_t copies, int64_t stride, int64_t values, void* out, Type type) const {
    for (int64_t copy = 1; copy < copies; copy++)
      for (int64_t i = 0; i < values; i++) sums[i] += sums[copy * stride + i];
    for (int64_t i = at.C; spread == 1 && i < values; i++) sums[i % at.C] += sums[i];
    for (int64_t c = 0; c < at.C; c++) {
      double sum = 0;
      for (int64_t i = 0; i < spread; i++) sum += sums[c * spread + i];
      set_number(out, type, c, sum);
    }
  }
};

// --- rows: a statistic is a column of a matrix whose rows are contiguous ---------------------------------------------------

struct Rows {
  static constexpr int64_t task_size = 65536, strip_size = 16384;

  const Call& call;
  const Layout& at;
  const Kernels& loops;
  const int64_t width, wide_bytes;
  const double p;
  const bool centered;
  const Type wide;
  const int64_t columns, stride;  // stride: columns, in whole packs
  const int64_t rows_per_task, rows_per_strip, tasks_per_block, tasks_per_outer, tasks;

  Rows(const Call& c, const Kernels& k)
      : call(c), at(*c.layout), loops(k), width(c.type == Type::f64 ? 8 : c.type == Type::f32 ? 4 : 2),
        wide_bytes(c.type == Type::f64 ? 8 : 4), p(c.formula->p), centered(c.formula->centered),
        wide(c.type == Type::f64 ? Type::f64 : Type::f32), columns(at.C), stride((columns + 15) / 16 * 16),
        rows_per_task(larger(4, task_size / columns / 4 * 4)), rows_per_strip(larger(16, strip_size / columns / 4 * 4)),
        tasks_per_block((at.B + rows_per_task - 1) / rows_per_task), tasks_per_outer(at.A * tasks_per_block), tasks(at.G1 * tasks_per_outer) {}

  template <class P> P* move(P* base, int64_t elements) const { return (P*)((char*)base + elements * width); }
  // Row `row` of what is saved, from outer index o on.
  const void* saved(int row, int64_t o) const { return (char*)call.saved + (row * at.G + o * columns) * wide_bytes; }

  // fn(offset, block) for each strip of a task, small enough to stay in cache while its columns are walked
  template <class Fn> void strips(int64_t task, const Fn& fn) const {
    int64_t o = task / tasks_per_outer, a = task % tasks_per_outer / tasks_per_block, first = task % tasks_per_block * rows_per_task;
    int64_t end = smaller(at.B, first + rows_per_task), base = o * at.sg1 + a * at.sa;
    for (int64_t r = first; r < end; r += rows_per_strip) fn(base + r * at.sb, Block{smaller(rows_per_strip, end - r), columns, at.sb, at.sb});
  }

  // sums[o·size ...] += partial[task·size ...], in order; nothing to do where a task is all that an outer index has
  void fold(double* sums, const double* partial, int64_t size) const {
    if (sums == partial) return;
    for (int64_t task = 0; task < tasks; task++)
      for (int64_t i = 0; i < size; i++) sums[task / tasks_per_outer * size + i] += partial[task * size + i];
  }

  void forward() const {
    Buffer buffer, partial_buffer, coefficients;
    double* sums = (double*)buffer.zeroed(2 * at.G1 * stride * sizeof(double));
    double* sums_of_powers = sums + at.G1 * stride;
    double *partial = sums, *partial_powers = sums_of_powers;
    if (tasks_per_outer > 1) {
      partial = (double*)partial_buffer.zeroed(2 * tasks * stride * sizeof(double));
      partial_powers = partial + tasks * stride;
    }
    Parameter gain(call.weight, call.weight_type, wide, columns, 1, 1), bias(call.bias, call.bias_type, wide, columns, 1, 0);
    char* scale = (char*)coefficients.allocate(at.G1 * columns * wide_bytes);

    parallel(tasks, call.threads, [&](int64_t task) {
      strips(task, [&](int64_t offset, const Block& block) { loops.sum_columns(block, move(call.x, offset), partial + task * stride); });
    });
    fold(sums, partial, stride);
    for (int64_t o = 0; o < at.G1; o++) loops.locations(call, o * columns, (o + 1) * columns, sums + o * stride);

    parallel(tasks, call.threads, [&](int64_t task) {
      const void* centre = centered ? saved(0, task / tasks_per_outer) : nullptr;
      strips(task, [&](int64_t offset, const Block& block) {
        loops.powers_columns(block, move(call.x, offset), centre, p, partial_powers + task * stride);
      });
    });
    fold(sums_of_powers, partial_powers, stride);
    for (int64_t o = 0; o < at.G1; o++) {
      loops.scales(call, o * columns, (o + 1) * columns, sums + o * stride, sums_of_powers + o * stride);
      multiply(saved(1, o), gain.values, scale + o * columns * wide_bytes);
    }

    parallel(tasks, call.threads, [&](int64_t task) {
      int64_t o = task / tasks_per_outer;
      strips(task, [&](int64_t offset, const Block& block) {
        loops.output_columns(block, move(call.x, offset), move(call.y, offset), saved(0, o), scale + o * columns * wide_bytes, bias.values);
      });
    });
  }

  void multiply(const void* a, const void* b, void* out) const {
    for (int64_t c = 0; c < columns; c++) {
      if (wide == Type::f64) ((double*)out)[c] = ((const double*)a)[c] * ((const double*)b)[c];
      else ((float*)out)[c] = ((const float*)a)[c] * ((const float*)b)[c];
    }
  }

  void backward() const {
    const bool needs_u = call.dx && centered;
    const int64_t size = 3 * stride;
    Buffer buffer, partial_buffer, coefficients, parameters;
    double* sums = (double*)buffer.zeroed(at.G1 * size * sizeof(double));
    double* partial = tasks_per_outer > 1 ? (double*)partial_buffer.zeroed(tasks * size * sizeof(double)) : sums;
    parallel(tasks, call.threads, [&](int64_t task) {
      const void* mu = saved(0, task / tasks_per_outer);
      strips(task, [&](int64_t offset, const Block& block) {
        loops.gradients_columns[needs_u](block, move(call.x, offset), move(call.dy, offset), mu, centered, p, partial + task * size, stride);
      });
    });
    fold(sums, partial, size);

    const int64_t bytes = columns * wide_bytes;
    Parameter gain(call.weight, call.weight_type, wide, columns, 1, 1);
    char* scale = (char*)coefficients.allocate(3 * at.G1 * bytes);
    char *constant = scale + at.G1 * bytes, *along = constant + at.G1 * bytes;
    double* dw = (double*)parameters.zeroed(2 * columns * sizeof(double));
    double* db = dw + columns;
    for (int64_t o = 0; o < at.G1; o++) {
      double *of_dy = sums + o * size, *of_from_mu = of_dy + stride, *of_u = of_from_mu + stride;
      for (int64_t c = 0; c < columns; c++) {
        dw[c] += of_from_mu[c] * number(saved(1, o), wide, c);
        db[c] += of_dy[c];
      }
      if (!call.dx) continue;
      for (int64_t c = 0; call.weight && c < columns; c++) {
        double w = number(gain.values, wide, c);
        of_dy[c] *= w;
        of_from_mu[c] *= w;
      }
      loops.stream_gradients(call, o * columns, (o + 1) * columns, of_dy, of_from_mu, of_u, constant + o * bytes, along + o * bytes);
      multiply(saved(1, o), gain.values, scale + o * bytes);
    }
    if (call.dx)
      parallel(tasks, call.threads, [&](int64_t task) {
        int64_t o = task / tasks_per_outer;
        const void* centre = centered ? saved(0, o) : nullptr;
        strips(task, [&](int64_t offset, const Block& block) {
          loops.input_columns(block, move(call.x, offset), move(call.dy, offset), move(call.dx, offset), centre, scale + o * bytes,
                              constant + o * bytes, along + o * bytes, p);
        });
      });
    for (int64_t c = 0; c < columns; c++) {
      if (call.dw) set_number(call.dw, call.weight_type, c, dw[c]);
      if (call.db) set_number(call.db, call.bias_type, c, db[c]);
    }
  }
};

template <class Walk> void walk(const Call& call, bool forward) {
  Walk kernel(call, *variant->kernels(call.type, call.formula->p));
  if (forward) kernel.forward();
  else kernel.backward();
}
void run(const Call& call, bool forward) { call.layout->rows ? walk<Rows>(call, forward) : walk<Runs>(call, forward); }

// --- from a view and a tensor's strides to a layout ----------------------------------------------------------------------

constexpr int max_axes = 16;

// What is known of a (view, formula) before any tensor is seen, and the layout of the tensor seen last.
struct Plan {
  int axes, dims;
  int64_t size[max_axes];
  int origin[max_axes];
  bool kept[max_axes];
  int64_t numel, samples, channels, n, G;
  Formula formula;
  bool known = false;
  int64_t strides[max_axes];
  Layout layout;
};

struct Axis {
  int64_t size, stride;
  int place;  // in the view
  bool kept, channel;
  int64_t channels, inner;  // of a merged block: channels in it, elements behind each
};

// Memory order, outermost first; neighbours merged where they can be stepped through as one.
int merge(const Plan& plan, const int64_t* strides, Axis* blocks) {
  Axis part[max_axes];
  int count = 0, axis = -1;
  int64_t step = 0;
  for (int i = plan.axes - 1; i >= 0; i--) {
    if (plan.origin[i] != axis) axis = plan.origin[i], step = strides[axis];
    bool channel = axis == 1;
    if (plan.size[i] > 1) part[count++] = {plan.size[i], step, i, plan.kept[i], channel, channel ? plan.size[i] : 1, channel ? 1 : plan.size[i]};
    step *= plan.size[i];
  }
  for (int i = 1; i < count; i++)  // sort by stride, smallest first; equal strides do not occur in what is accepted
    for (int j = i; j > 0 && part[j].stride < part[j - 1].stride; j--) {
      Axis swap = part[j];
      part[j] = part[j - 1];
      part[j - 1] = swap;
    }
  int merged = 0;
  for (int i = 0; i < count; i++) {
    Axis& outer = part[i];
    Axis* inner = merged ? &blocks[merged - 1] : nullptr;
    bool fits = inner && outer.stride == inner->stride * inner->size && outer.kept == inner->kept && outer.place < inner->place;
    // A block holds at most one stretch of channels, outermost: outer places never join channels inside.
    if (fits && (outer.channel || !inner->channel) && !(outer.kept && outer.channel != inner->channel)) {
      inner->size *= outer.size;
      inner->place = outer.place;
      if (outer.channel) inner->channels *= outer.size;
      else inner->inner *= outer.size;
      inner->channel = inner->channel || outer.channel;
    } else {
      blocks[merged++] = outer;
    }
  }
  for (int i = 0; i < merged / 2; i++) {
    Axis swap = blocks[i];
    blocks[i] = blocks[merged - 1 - i];
    blocks[merged - 1 - i] = swap;
  }
  return merged;
}

bool make_layout(const Plan& plan, const int64_t* strides, Layout& out) {
  Axis block[max_axes];
  int count = merge(plan, strides, block);
  for (int i = 0; i < count; i++)
    if (block[i].stride <= 0) return false;

  // g counts the kept axes in the order of the view, and its channels last: memory must agree.
  int last_kept = -1;
  bool channel_kept = false, channel_reduced = false;
  for (int i = 0; i < count; i++) {
    if (!block[i].kept) {
      channel_reduced = channel_reduced || block[i].channel;
      continue;
    }
    if (block[i].place < last_kept || (channel_kept && !block[i].channel)) return false;
    last_kept = block[i].place;
    channel_kept = channel_kept || block[i].channel;
  }
  for (int i = 0; i < plan.axes; i++)  // of split channels, the outer ones are kept
    for (int j = i + 1; j < plan.axes; j++)
      if (plan.origin[i] == 1 && plan.origin[j] == 1 && plan.size[i] > 1 && plan.size[j] > 1 && !plan.kept[i] && plan.kept[j]) return false;

  Layout l = {};
  l.A = l.G1 = l.G2 = l.B = l.sb = 1;
  l.C = plan.channels;
  l.G = plan.G;
  Axis* inner = count ? &block[count - 1] : nullptr;
  if (inner && inner->stride != 1) return false;
  l.rows = !inner || (inner->kept && inner->channel);
  if (inner && inner->kept && !inner->channel) return false;
  Axis *reduced[2] = {}, *kept[2] = {};
  int num_reduced = 0, num_kept = 0;
  for (int i = 0; i + 1 < count; i++) {
    int& found = block[i].kept ? num_kept : num_reduced;
    if (found == 2) return false;
    (block[i].kept ? kept : reduced)[found++] = &block[i];
  }
  if (l.rows) {
    if (num_kept > 1 || channel_reduced || (inner && inner->size != l.C)) return false;
    if (num_kept) l.G1 = kept[0]->size, l.sg1 = kept[0]->stride;
    Axis *a = num_reduced == 2 ? reduced[0] : nullptr, *b = num_reduced ? reduced[num_reduced - 1] : nullptr;
    if (a) l.A = a->size, l.sa = a->stride;
    if (b) l.B = b->size, l.sb = b->stride;
    l.Bc = l.S = 1;
  } else {
    if (num_reduced > 1 || (channel_reduced && !inner->channel)) return false;
    if (num_reduced) l.A = reduced[0]->size, l.sa = reduced[0]->stride;
    Axis *g1 = num_kept == 2 ? kept[0] : nullptr, *g2 = num_kept ? kept[num_kept - 1] : nullptr;
    if (g1) l.G1 = g1->size, l.sg1 = g1->stride;
    if (g2) l.G2 = g2->size, l.sg2 = g2->stride;
    l.B = inner->size;
    l.Bc = inner->channel ? inner->channels : 1;
    l.S = l.B / l.Bc;
  }
  out = l;
  return true;
}

// The layout of a tensor with these strides, or null where these kernels cannot walk it.
const Layout* find_layout(Plan& plan, const DLTensor& x) {
  if (plan.known && !memcmp(plan.strides, x.strides, plan.dims * sizeof(int64_t))) return &plan.layout;
  if (!make_layout(plan, x.strides, plan.layout)) {
    plan.known = false;
    return nullptr;
  }
  memcpy(plan.strides, x.strides, plan.dims * sizeof(int64_t));
  plan.known = true;
  return &plan.layout;
}

// --- tensors -------------------------------------------------------------------------------------------------------------

const DLPackExchangeAPI* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *get_num_threads = nullptr;

Type type_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return Type::other;
  if (t.dtype.code == 2) return t.dtype.bits == 32 ? Type::f32 : t.dtype.bits == 64 ? Type::f64 : t.dtype.bits == 16 ? Type::f16 : Type::other;
  return t.dtype.code == 4 && t.dtype.bits == 16 ? Type::bf16 : Type::other;
}
bool is_int64(const DLTensor& t) { return t.dtype.code == 0 && t.dtype.bits == 64 && t.dtype.lanes == 1; }
int64_t size_of(const DLTensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; i++) n *= t.shape[i];
  return n;
}

// A plain tensor in CPU memory; false, without a Python error, for any other.
bool borrow(PyObject* object, DLTensor& t) {
  PyObject* type = (PyObject*)Py_TYPE(object);
  if (type != tensor_type && type != parameter_type) return false;
  if (exchange->borrow(object, &t)) {
    PyErr_Clear();
    return false;
  }
  t.data = (char*)t.data + t.byte_offset;
  return t.device.type == 1 && t.data;
}
bool same_strides(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; i++)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}
bool is_contiguous(const DLTensor& t) {
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; i--) {
    if (t.shape[i] > 1 && t.strides[i] != step) return false;
    step *= t.shape[i];
  }
  return true;
}
// A contiguous tensor of `count` elements, such as a gain or a buffer of the state.
bool borrow_flat(PyObject* object, int64_t count, DLTensor& t) { return borrow(object, t) && size_of(t) == count && is_contiguous(t); }

// --- the Python functions --------------------------------------------------------------------------------------------------

constexpr int64_t alone = 32768;  // elements below which a second thread, or giving up the GIL, does not pay

PyObject* refuse(const char* what) {
  PyErr_Format(PyExc_ValueError, "the C++ engine was given %s that it does not take; this is an error in streamnorm", what);
  return nullptr;
}
const char* const plan_name = "streamnorm.plan";
void free_plan(PyObject* capsule) { delete (Plan*)PyCapsule_GetPointer(capsule, plan_name); }
Plan* get_plan(PyObject* capsule) { return (Plan*)PyCapsule_GetPointer(capsule, plan_name); }

PyObject* make_plan(PyObject*, PyObject* args) {
  PyObject *split, *kept, *origin;
  Formula f = {};
  int centered;
  if (!PyArg_ParseTuple(args, "O!O!O!dpddd(ddd)(ddd)", &PyTuple_Type, &split, &PyTuple_Type, &kept, &PyTuple_Type, &origin, &f.p,
                        &centered, &f.k, &f.eps, &f.window, &f.alpha[0], &f.alpha[1], &f.alpha[2], &f.beta[0], &f.beta[1], &f.beta[2]))
    return nullptr;
  f.centered = centered;
  f.windowed = f.window > 0;
  int axes = (int)PyTuple_Size(split);
  if (axes > max_axes || PyTuple_Size(origin) != axes) return refuse("a view of too many axes");
  Plan plan = {};
  plan.axes = axes;
  plan.formula = f;
  plan.numel = plan.samples = plan.channels = 1;
  for (int i = 0; i < axes; i++) {
    plan.size[i] = PyLong_AsLongLong(PyTuple_GetItem(split, i));
    plan.origin[i] = (int)PyLong_AsLong(PyTuple_GetItem(origin, i));
    plan.dims = plan.origin[i] + 1;
    plan.numel *= plan.size[i];
    if (plan.origin[i] == 0) plan.samples *= plan.size[i];
    if (plan.origin[i] == 1) plan.channels *= plan.size[i];
  }
  plan.G = 1;
  for (Py_ssize_t i = 0; i < PyTuple_Size(kept); i++) {
    long k = PyLong_AsLong(PyTuple_GetItem(kept, i));
    if (k < 0 || k >= axes) return refuse("a kept axis outside the view");
    plan.kept[k] = true;
    plan.G *= plan.size[k];
  }
  if (PyErr_Occurred()) return nullptr;
  if (plan.numel < 1 || plan.dims > max_axes) return refuse("an empty view");
  plan.n = plan.numel / plan.G;
  return PyCapsule_New(new Plan(plan), plan_name, free_plan);
}

// x is of the plan's shape and of a type and layout that the kernels take.
const Layout* read_input(Plan& plan, PyObject* object, DLTensor& x) {
  if (!borrow(object, x) || type_of(x) == Type::other || x.ndim != plan.dims) return nullptr;
  for (int i = 0, a = 0; i < x.ndim; i++) {
    int64_t size = 1;
    for (; a < plan.axes && plan.origin[a] == i; a++) size *= plan.size[a];
    if (size != x.shape[i]) return nullptr;
  }
  return find_layout(plan, x);
}

PyObject* accepts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return refuse("a number of arguments");
  Plan* plan = get_plan(args[0]);
  if (!plan) return nullptr;
  DLTensor x;
  return PyBool_FromLong(read_input(*plan, args[1], x) != nullptr);
}

bool read_parameter(PyObject* object, int64_t channels, const void*& data, Type& type) {
  if (object == Py_None) return true;
  DLTensor t;
  if (!borrow_flat(object, channels, t)) return false;
  data = t.data;
  type = type_of(t);
  return type != Type::other;
}

// state: (long, short, long_grad, short_grad, count, grad_count, samples, grad_samples). Reads the forward or the
// gradient half and counts the samples of this use; gives the mixing weights that follow.
bool read_state(Plan& plan, PyObject* state, bool grad, Type wide, Call& call) {
  const double* fixed = grad ? plan.formula.beta : plan.formula.alpha;
  memcpy(call.mix, fixed, sizeof call.mix);
  if (state == Py_None) {
    if (!grad) call.mix[0] = call.mix[1] = 0, call.mix[2] = 1;
    return true;
  }
  if (!PyTuple_Check(state) || PyTuple_Size(state) != 8) return false;
  DLTensor lasting, recent, count, samples;
  if (!borrow_flat(PyTuple_GetItem(state, grad ? 2 : 0), 2 * plan.G, lasting) || type_of(lasting) != wide) return false;
  if (!borrow_flat(PyTuple_GetItem(state, grad ? 3 : 1), 2 * plan.G, recent) || type_of(recent) != wide) return false;
  if (!borrow_flat(PyTuple_GetItem(state, grad ? 5 : 4), plan.G, count) || !is_int64(count)) return false;
  if (!borrow_flat(PyTuple_GetItem(state, grad ? 7 : 6), 1, samples) || !is_int64(samples)) return false;
  call.lasting = lasting.data;
  call.recent = recent.data;
  call.count = (int64_t*)count.data;
  int64_t seen = *(int64_t*)samples.data += plan.samples;
  if (plan.formula.windowed) {
    double total = plan.formula.window + (double)seen;
    call.mix[0] = plan.formula.window / total;
    call.mix[1] = (double)seen / total;
    call.mix[2] = 0;
  }
  return true;
}

bool execute(Call& call, int64_t numel, bool forward) {
  call.threads = 1;
  if (numel < alone) {
    try {
      run(call, forward);
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
      return false;
    }
    return true;
  }
  PyObject* threads = PyObject_CallFunctionObjArgs(get_num_threads, nullptr);
  if (!threads) return false;
  call.threads = (int)smaller(larger(1, PyLong_AsLong(threads)), (numel + alone - 1) / alone);
  Py_DecRef(threads);
  bool enough = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    run(call, forward);
  } catch (const std::bad_alloc&) {
    enough = false;
  }
  Py_END_ALLOW_THREADS
  if (!enough) PyErr_NoMemory();
  return enough;
}

// forward(plan, x, weight, bias, y, state, stats) -> saved
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 7) return refuse("a number of arguments");
  Plan* plan = get_plan(args[0]);
  if (!plan) return nullptr;
  DLTensor x, y;
  const Layout* layout = read_input(*plan, args[1], x);
  if (!layout) return refuse("an input");
  Layout walk = *layout;
  Call call = {};
  call.formula = &plan->formula;
  call.layout = &walk;
  call.type = type_of(x);
  call.n = plan->n;
  call.x = x.data;
  call.grad_scale = 1;
  Type wide = call.type == Type::f64 ? Type::f64 : Type::f32;
  if (!read_parameter(args[2], plan->channels, call.weight, call.weight_type)) return refuse("a gain");
  if (!read_parameter(args[3], plan->channels, call.bias, call.bias_type)) return refuse("a bias");
  if (!borrow(args[4], y) || type_of(y) != call.type || !same_strides(x, y)) return refuse("an output");
  call.y = y.data;
  DLTensor stats = {};
  Buffer moments;
  if (args[6] != Py_None) {
    if (!borrow_flat(args[6], 2 * plan->G, stats) || type_of(stats) == Type::other) return refuse("a tensor for statistics");
    call.moments = (double*)moments.zeroed(plan->G * sizeof(double));
  }
  PyObject* saved = PyBytes_FromStringAndSize(nullptr, 3 * plan->G * (wide == Type::f64 ? 8 : 4));
  if (!saved) return nullptr;
  call.saved = PyBytes_AsString(saved);
  if (!read_state(*plan, args[5], false, wide, call)) {
    Py_DecRef(saved);
    return refuse("a state");
  }
  if (!execute(call, plan->numel, true)) {
    Py_DecRef(saved);
    return nullptr;
  }
  for (int64_t i = 0; call.moments && i < plan->G; i++) {
    set_number(stats.data, type_of(stats), i, number(call.saved, wide, i));
    set_number(stats.data, type_of(stats), plan->G + i, call.moments[i]);
  }
  return saved;
}

// backward(plan, saved, dy, x, weight, dx, dw, db, state, grad_scale): fills dx, dw, db where they are not None
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 10) return refuse("a number of arguments");
  Plan* plan = get_plan(args[0]);
  if (!plan) return nullptr;
  DLTensor x, dy, t;
  const Layout* layout = read_input(*plan, args[3], x);
  if (!layout) return refuse("an input");
  Layout walk = *layout;
  Call call = {};
  call.formula = &plan->formula;
  call.layout = &walk;
  call.type = type_of(x);
  call.n = plan->n;
  call.x = x.data;
  Type wide = call.type == Type::f64 ? Type::f64 : Type::f32;
  call.saved = PyBytes_AsString(args[1]);
  if (!call.saved || PyBytes_Size(args[1]) != 3 * plan->G * (wide == Type::f64 ? 8 : 4)) return refuse("saved statistics");
  if (!borrow(args[2], dy) || type_of(dy) != call.type || !same_strides(x, dy)) return refuse("an output gradient");
  call.dy = dy.data;
  if (!read_parameter(args[4], plan->channels, call.weight, call.weight_type)) return refuse("a gain");
  if (args[5] != Py_None) {
    if (!borrow(args[5], t) || type_of(t) != call.type || !same_strides(x, t)) return refuse("an input gradient");
    call.dx = t.data;
  }
  const void* out;
  if (args[6] != Py_None) {
    if (!read_parameter(args[6], plan->channels, out, call.weight_type)) return refuse("a gain's gradient");
    call.dw = (void*)out;
  }
  if (args[7] != Py_None) {
    if (!read_parameter(args[7], plan->channels, out, call.bias_type)) return refuse("a bias's gradient");
    call.db = (void*)out;
  }
  call.grad_scale = 1;
  if (args[9] != Py_None) {
    if (!borrow_flat(args[9], 1, t) || type_of(t) == Type::other) return refuse("a gradient scale");
    call.grad_scale = number(t.data, type_of(t), 0);
  }
  if (call.dx && !read_state(*plan, args[8], true, wide, call)) return refuse("a state");
  if (!execute(call, plan->numel, false)) return nullptr;
  Py_IncRef(Py_None);
  return Py_None;
}

// One half of a commit: the short-term averages of an index that was used move into its long-term ones.
template <class F> void commit_half(F* lasting, F* recent, int64_t* count, int64_t G, double keep, double take) {
  for (int row = 0; row < 2; row++)
    for (int64_t i = 0; i < G; i++) {
      F moved = (F)(keep * lasting[row * G + i] + take * recent[row * G + i]);
      lasting[row * G + i] = count[i] > 0 ? moved : lasting[row * G + i];
      recent[row * G + i] = 0;
    }
  memset(count, 0, G * sizeof(int64_t));
}
bool commit_state(PyObject* state, const double* kappa, double window) {
  DLTensor t[8];
  if (!PyTuple_Check(state) || PyTuple_Size(state) != 8) return false;
  for (int i = 0; i < 8; i++)
    if (!borrow(PyTuple_GetItem(state, i), t[i]) || !is_contiguous(t[i])) return false;
  int64_t G = size_of(t[4]);
  Type type = type_of(t[0]);
  if (type != Type::f32 && type != Type::f64) return false;
  for (int i = 0; i < 8; i++) {
    if (size_of(t[i]) != (i < 4 ? 2 * G : i < 6 ? G : 1)) return false;
    if (i < 4 ? type_of(t[i]) != type : !is_int64(t[i])) return false;
  }
  for (int grad = 0; grad < 2; grad++) {
    int64_t* samples = (int64_t*)t[6 + grad].data;
    double ratio = window > 0 ? (double)*samples / window : 0;
    double keep = window > 0 ? exp(-ratio) : kappa[2 * grad], take = window > 0 ? -expm1(-ratio) : kappa[2 * grad + 1];
    void *lasting = t[2 * grad].data, *recent = t[2 * grad + 1].data;
    int64_t* count = (int64_t*)t[4 + grad].data;
    if (type == Type::f64) commit_half((double*)lasting, (double*)recent, count, G, keep, take);
    else commit_half((float*)lasting, (float*)recent, count, G, keep, take);
    *samples = 0;
  }
  return true;
}

// commit(state, kappa or None, window or None) -> whether it was done
PyObject* commit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return refuse("a number of arguments");
  double kappa[4] = {}, window = 0;
  if (args[2] != Py_None) {
    window = PyFloat_AsDouble(args[2]);
  } else {
    for (int i = 0; i < 4; i++) {
      PyObject* item = PySequence_GetItem(args[1], i);
      if (!item) return nullptr;
      kappa[i] = PyFloat_AsDouble(item);
      Py_DecRef(item);
    }
  }
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(commit_state(args[0], kappa, window));
}

// setup(Tensor, Parameter, exchange, get_num_threads, library, instructions) -> (instructions, whether there are threads)
PyObject* setup(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *capsule, *threads;
  const char *library, *wanted;
  if (!PyArg_ParseTuple(args, "OOOOsz", &tensor, &parameter, &capsule, &threads, &library, &wanted)) return nullptr;
  auto* api = (const DLPackExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!api) return nullptr;
  if (api->header.version.major != 1 || !api->borrow) {
    PyErr_Format(PyExc_ImportError, "PyTorch speaks DLPack %d, the C++ engine was made for version 1", (int)api->header.version.major);
    return nullptr;
  }
  const Variant* chosen = nullptr;
  for (const Variant& v : variants)
    if (can_run(v.name) && (!wanted || !strcmp(wanted, v.name))) {
      chosen = &v;
      break;
    }
  if (!chosen) {
    PyErr_Format(PyExc_ValueError, "this processor or build has no instruction set %s; it can be baseline, avx2 or avx512", wanted);
    return nullptr;
  }
#ifndef _WIN32
  // Where PyTorch's own library is known its runtime is taken, else whichever one the process has; none is loaded.
  void* handle = *library ? dlopen(library, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  void* found = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
  if (!found) found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  memcpy(&gomp_parallel, &found, sizeof found);
  static bool registered = false;
  if (!registered) pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  registered = true;
#endif
  Py_IncRef(tensor), Py_IncRef(parameter), Py_IncRef(threads);
  tensor_type = tensor, parameter_type = parameter, get_num_threads = threads;
  exchange = api;
  variant = chosen;
  return Py_BuildValue("sO", chosen->name, gomp_parallel ? Py_True : Py_False);
}

template <class Fn> PyCFunction function(Fn fn) { return (PyCFunction)(void (*)(void))fn; }

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"plan", make_plan, METH_VARARGS, nullptr},
    {"accepts", function(accepts), METH_FASTCALL, nullptr},
    {"forward", function(forward), METH_FASTCALL, nullptr},
    {"backward", function(backward), METH_FASTCALL, nullptr},
    {"commit", function(commit), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Training steps on CPU tensors; see native.py.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
