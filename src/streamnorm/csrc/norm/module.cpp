// The C++ engine of streamnorm: training steps on CPU tensors.
//
// It knows nothing of PyTorch but DLPack's C exchange table (through which a tensor's pointer, shape and strides are read
// without a copy or an owner, and large outputs are made), the OpenMP runtime that PyTorch has loaded, and a few functions
// that native.py hands over. native.py
// decides what comes here; the formulas are in kernels-inl.h, and are explained in plain.py.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dlpack.h"
#include "common/kept_memory.h"
#include "common/threads.h"

// --- what the kernels are told -----------------------------------------------------------------------------------------

namespace {

enum class Type : uint8_t { f32, f64, bf16, f16, other };
int64_t bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
// The type of statistics, and of all arithmetic, for elements of a type.
Type wide_of(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }
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
  const void *weight, *bias;  // weight: in the type of statistics
  Type bias_type;
  void *dw, *db;
  Type dw_type;  // that of db is bias_type
  const void* lasting;  // the stream: long (2, G), short (2, G), count (G); or their gradients'
  void* recent;
  int64_t* count;
  double mix[3];
  double grad_scale;
  void* saved;  // (3, G): mu, 1/s, slope
  double* moments;  // (G): m, where it is asked for
};

// A block of memory: `rows` stretches of `length` contiguous elements, `from` elements apart where they are read and `to`
// elements apart where they are written. What will be read next, and is asked for meanwhile, lies `next` elements behind
// what is read now, and what will be written next `write` elements behind what is written now. past_cache: whether the
// output is so large that it would not stay in the cache anyway.
struct Block {
  int64_t rows, length, from, to, next, write;
  bool past_cache;
};

// The loops of kernels-inl.h for one type of statistics and p. Pointers to void are of that type, float or double.
struct Kernels {
  void (*widen_bfloat16)(const void*, float*, int64_t count);
  void (*widen_float16)(const void*, float*, int64_t count);
  void (*narrow_bfloat16)(const float*, void*, int64_t count);
  void (*narrow_float16)(const float*, void*, int64_t count);

  void (*gather)(const Block&, int64_t count, int64_t from_apart, int64_t to_apart, const void* from, void* to);
  double (*sum)(const Block&, const void* x);
  double (*powers)(const Block&, const void* x, double centre, double p);
  void (*output)(const Block&, const void* x, void* y, double mu, double scale, double shift);
  void (*gradients)(const Block&, const void* x, const void* dy, double mu, double centre, double p, double* out);
  void (*input)(const Block&, const void* x, const void* dy, void* dx, double centre, double scale, double constant, double along, double p);

  void (*output_elements)(const Block&, const void* x, void* y, double mu, double inverse, const void* gain, const void* bias);
  void (*gradients_elements)(const Block&, const void* x, const void* dy, double mu, double centre, double inverse, double p,
                             const void* gain, double* dw, double* db, double* out);
  void (*input_elements)(const Block&, const void* x, const void* dy, void* dx, double centre, double inverse, double constant,
                         double along, double p, const void* gain);

  void (*sum_columns)(const Block&, const void* x, double* out);
  void (*powers_columns)(const Block&, const void* x, const void* centre, double p, double* out);
  void (*moments_columns)(const Block&, const void* x, const void* centre, double* sums, int64_t stride);
  void (*output_columns)(const Block&, const void* x, void* y, const void* mu, const void* scale, const void* shift);
  void (*gradients_columns)(const Block&, const void* x, const void* dy, const void* mu, bool centered, double p, double* out, int64_t stride);
  void (*input_columns)(const Block&, const void* x, const void* dy, void* dx, const void* centre, const void* scale,
                        const void* constant, const void* along, double p);
  // For p = 1, or null where there are no instructions for signs.
  void (*gradients_signs_columns)(const Block&, const void* x, const void* dy, const void* mu, bool centered, double* out, int64_t stride,
                                  uint32_t* signs);
  void (*input_signs_columns)(const Block&, const uint32_t* signs, const void* dy, void* dx, const void* scale, const void* constant,
                              const void* along);

  void (*locations)(const Call&, int64_t from, int64_t to, const double* sums);
  void (*scales)(const Call&, int64_t from, int64_t to, const double* sums, const double* powers, bool use, bool advance);
  void (*stream_gradients)(const Call&, int64_t from, int64_t to, const double* sums, const double* sums_from_mu,
                           const double* sums_of_u, void* constant, void* along, bool use, bool advance);
  void (*parameter_gradients)(const Call&, int64_t from, int64_t to, double* sums, double* sums_from_mu, const void* gain, double* dw, double* db);
  void (*means)(int64_t columns, double rows, const double* sums, void* out);
  void (*merge_moments)(int64_t columns, double before, double rows, const void* centre, const double* sums, const double* squares,
                        double* mean, double* deviations);
  void (*add_means)(int64_t columns, double rows, const double* mean, double* sums);
  void (*add_squares)(int64_t columns, double rows, const void* mu, const double* mean, const double* deviations, double* powers);
  void (*narrow_sums)(const double*, float*, int64_t count);
  void (*column_scales)(const Call&, int64_t from, int64_t to, const void* gain, void* out);
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
#include "norm/kernels-inl.h"
#undef ISA
#undef ISA_BYTES

#if HAS_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2")
#define ISA avx2
#define ISA_BYTES 32
#include "norm/kernels-inl.h"
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define ISA avx512
#define ISA_BYTES 64
#include "norm/kernels-inl.h"
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options
#endif

struct Variant {
  const char* name;
  const Kernels* (*kernels)(bool wide, double p);
} const variants[] = {
#if HAS_X86_VARIANTS
    {"avx512", avx512::kernels},
    {"avx2", avx2::kernels},
#endif
    {"baseline", baseline::kernels},
};
const Variant *variant = nullptr, *usual_variant = nullptr;  // results do not depend on which is used

// After 512-bit work an Intel processor lowers its clock for a while, which slows all that follows: Python and the rest of
// PyTorch, too. It makes up for that only in large work on columns, whose sums need more registers than AVX2 has.
constexpr int64_t small_work = 1 << 14;  // elements

bool can_run(const char* name) {
#if HAS_X86_VARIANTS
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2");
#endif
  return !strcmp(name, "baseline");
}
bool slowed_by_wide_registers() {
#if HAS_X86_VARIANTS
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// --- walks over a tensor ----------------------------------------------------------------------------------------------

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

// One pass: with weights (1, 0, 0) what this call uses is known before it starts.
bool is_one_pass(const Call& c) { return c.lasting && c.mix[0] == 1 && c.mix[1] == 0 && c.mix[2] == 0; }

// What both walks need of a call.
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
  static constexpr int64_t chunk_size = 16384, gather_bytes = 131072, most_in_panel = 8192, short_run = 64, longest_gathered = 256, shortest_segment = 16, most_blocks = 64, cached_bytes = 1 << 18;

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
  const int64_t panel_step, panel;  // bytes from a statistic of a panel to the next, and statistics
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
        panel_step(gathered ? (c.n + lanes) * wide_width : at.sg2 * width),
        panel(larger(1, smaller(smaller(8, at.G / (2 * c.threads)), (gathered ? 2 : 1) * most_in_panel / (c.n * wide_width)))),
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
    if (!copied) loops.gather({at.A, at.B, at.sa, at.B, 2 * at.sa, false}, to - from, at.sg2, panel_step / wide_width, first, out);
    else
      for (int64_t i = 0; i < to - from; i++) copy_in(move(first, i * at.sg2), at.sa, out + i * panel_step, at.B, at.A, at.B);
    return out;
  }
  size_t panel_bytes(int64_t tensors) const { return gathered ? tensors * panel_step : 0; }

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
        Scratch scratch(panel_bytes(to - from + 1));
        char* y = scratch.data + panel_bytes(to - from);
        Block together = {1, call.n, 0, 0, 0, 0, false};
        const char* x = gather(call.x, from, to, scratch.data);
        for (int64_t g = from; g < to; g++) sums[g] = loops.sum(together, x + (g - from) * panel_step);
        loops.locations(call, from, to, sums + from);
        for (int64_t g = from; g < to; g++)
          powers[g] = loops.powers(together, x + (g - from) * panel_step, centered ? saved(0, g) : 0, p);
        loops.scales(call, from, to, sums + from, powers + from, true, true);
        for (int64_t g = from; g < to; g++, x += panel_step) {
          int64_t c = group(g) * at.Bc;
          double mu = saved(0, g), scale = saved(1, g) * gain(c), shift = bias(c);
          void* out = move(call.y, start(g));
          if (!copied) {
            loops.output({at.A, at.B, at.B, at.sa, next_panel, next_write, past_cache}, x, out, mu, scale, shift);
            continue;
          }
          loops.output(together, x, y, mu, scale, shift);
          copy_out(y, at.B, out, at.sa, at.A, at.B);
        }
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
    // From the sums of statistics to dw, db, what dx needs, and the state.
    auto finish = [&](int64_t from, int64_t to) {
      for (int64_t g = from; affine == Affine::uniform && g < to; g++) {
        double w = gain(group(g) * at.Bc);
        dw[g] = of_from_mu[g] * saved(1, g);
        db[g] = of_dy[g];
        of_dy[g] *= w;
        of_from_mu[g] *= w;
      }
      if (call.dx)
        loops.stream_gradients(call, from, to, of_dy + from, of_from_mu + from, of_u + from, move_wide(constant, from), move_wide(along, from), true, true);
    };
    auto set_sums = [&](int64_t g, const Totals& t) { of_dy[g] = t.dy, of_from_mu[g] = t.from_mu, of_u[g] = t.u; };
    auto fold = [&](int64_t g) {
      Totals sum = {0, 0, 0};
      for (int64_t k = 0; k < chunks; k++) sum.add(&partial[g * chunks + k].dy);
      set_sums(g, sum);
      finish(g, g + 1);
    };

    if (paneled) {
      each_panel([&](int64_t from, int64_t to) {
        Scratch scratch(panel_bytes(2 * (to - from) + 1));
        char* dx = scratch.data + panel_bytes(2 * (to - from));
        Block together = {1, call.n, 0, 0, 0, 0, false};
        const char *x = gather(call.x, from, to, scratch.data), *dy = gather(call.dy, from, to, scratch.data + panel_bytes(to - from));
        for (int64_t g = from; g < to; g++) {
          double mu = saved(0, g);
          int64_t offset = (g - from) * panel_step;
          Totals t;
          loops.gradients(together, x + offset, dy + offset, mu, centered ? mu : 0, p, &t.dy);
          set_sums(g, t);
        }
        finish(from, to);
        if (!call.dx) return;
        for (int64_t g = from; g < to; g++, x += panel_step, dy += panel_step) {
          double centre = centered ? saved(0, g) : 0, scale = saved(1, g) * gain(group(g) * at.Bc);
          double b = wide_number(constant, g), u = wide_number(along, g);
          void* out = move(call.dx, start(g));
          if (!copied) {
            loops.input({at.A, at.B, at.B, at.sa, next_panel, next_write, past_cache}, x, dy, out, centre, scale, b, u, p);
            continue;
          }
          loops.input(together, x, dy, dx, centre, scale, b, u, p);
          copy_out(dx, at.B, out, at.sa, at.A, at.B);
        }
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

// Rows: a statistic is a column of a matrix whose rows are contiguous.
struct Rows : Walk {
  static constexpr int64_t task_size = 65536, strip_size = 4096, most_narrow = 256;

  const int64_t columns, stride;  // stride: columns, in whole packs
  const bool copied;              // as in Runs
  const int64_t copied_stride;
  const int64_t rows_per_task, rows_per_strip, rows_ahead, write_rows, tasks_per_block, tasks_per_outer, tasks;
  // Squares need no look of their own at x: those of a strip, from its own mean while it is in the cache, give them from any.
  const bool merged;
  // The gradient of x looks at x but once, and leaves signs to itself, where they have room in the stretch of dx of their strip.
  const bool by_signs;

  Rows(const Call& c, const Kernels& k)
      : Walk(c, k), columns(at.C), stride((columns + 15) / 16 * 16), copied(narrow || columns < lanes), copied_stride(larger(columns, lanes)),
        rows_per_task(larger(4, task_size / columns / 4 * 4)), rows_per_strip(columns > most_narrow ? 2 : larger(16, strip_size / copied_stride / 4 * 4)),
        rows_ahead(columns > most_narrow ? 2 : rows_per_strip / 2),
        write_rows(columns > most_narrow ? 2 : write_ahead / (columns * width)),
        tasks_per_block((at.B + rows_per_task - 1) / rows_per_task), tasks_per_outer(at.A * tasks_per_block), tasks(at.G1 * tasks_per_outer),
        merged(!known && p == 2 && centered && columns <= most_narrow),
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
    char* scale = (char*)coefficients.zeroed(at.G * wide_width + 64);

    auto locate = [&](int64_t o, int64_t from, int64_t to) { loops.locations(call, from, to, sums + o * size); };
    auto scales = [&](int64_t o, int64_t from, int64_t to) {
      loops.scales(call, from, to, sums + o * size, sums + o * size + stride, true, !known);
      loops.column_scales(call, from, to, call.weight, from_outer(scale, o));
    };
    auto advance = [&](int64_t o, int64_t from, int64_t to) {
      loops.scales(call, from, to, sums + o * size, sums + o * size + stride, false, true);
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
    char* scale = (char*)coefficients.zeroed(3 * at.G * wide_width + 64);
    char *constant = scale + at.G * wide_width, *along = constant + at.G * wide_width;
    double* dw = (double*)parameters.zeroed(2 * columns * sizeof(double));
    double* db = dw + columns;

    auto stream = [&](int64_t o, int64_t from, int64_t to, bool use, bool advance) {
      double* t = sums + o * size;
      if (use) loops.column_scales(call, from, to, call.weight, from_outer(scale, o));
      loops.stream_gradients(call, from, to, t, t + stride, t + 2 * stride, from_outer(constant, o), from_outer(along, o), use, advance);
    };
    auto add_parameters = [&](int64_t o, int64_t from, int64_t to) {
      double* t = sums + o * size;
      loops.parameter_gradients(call, from, to, t, t + stride, call.weight, dw, db);
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
    if (call.dw) set_parameter(call.dw, call.dw_type, columns, dw);
    if (call.db) set_parameter(call.db, call.bias_type, columns, db);
  }
};

template <class W> void walk(const Call& call, bool forward) {
  const bool hard = call.layout->rows && call.layout->G * call.n > small_work;
  const Variant& used = hard ? *variant : *usual_variant;
  W kernel(call, *used.kernels(call.type == Type::f64, call.formula->p));
  if (forward) kernel.forward();
  else kernel.backward();
}

void run(const Call& call, bool forward) { call.layout->rows ? walk<Rows>(call, forward) : walk<Runs>(call, forward); }

// --- from a view and a tensor's strides to a layout ----------------------------------------------------------------------

constexpr int max_axes = DLTensor::most_axes;

// What the new tensor made last was asked for with: the next one is often like it.
struct Description {
  PyObject* arguments = nullptr;  // (shape, strides, dtype)
  Type type;
  int64_t strides[max_axes];
};

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
  static constexpr int spares = 4, largest_spare = 1 << 16;
  PyObject* spare[spares] = {};  // see make_saved
  int last = 0;
  Description like_input, like_parameter;
  // The tensors that were found whole last, see is_whole.
  enum { whole_x, whole_dy, whole_weight, whole_bias, whole_state, whole_grad_state = whole_state + 4, whole_end = whole_grad_state + 4 };
  const void* whole[whole_end] = {};
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
  for (int i = 0; i < count; i++) {
    if (block[i].stride <= 0) return false;
    // An output has no gaps between its elements, and the input's strides: so the input has none either.
    if (i + 1 < count && block[i].stride != block[i + 1].stride * block[i + 1].size) return false;
  }

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

// What is kept of PyTorch, by setup().
const DLPackExchangeAPI* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject *empty_strided = nullptr, *dtypes = nullptr, *copy_like = nullptr, *get_num_threads = nullptr;
PyObject *dispatch_modes = nullptr, *function_modes = nullptr, *tracing = nullptr, *is_grad_enabled = nullptr, *is_neg = nullptr;
PyObject* forward_mode = nullptr;  // the dictionary of torch.autograd.forward_ad
PyObject *untyped_storage = nullptr, *storage_offset = nullptr;
PyObject* names[8] = {};  // of the state's buffers
PyObject *unsupported = nullptr, *backward_in_python = nullptr;
PyObject *name_kept, *name_to_save, *name_saved_tensors, *name_needs, *name_level;

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

// Whether the storage behind a tensor is as long as the tensor says: it may have been freed or shrunk. False where it is not,
// without a Python error.
bool fills_storage(PyObject* tensor, const DLTensor& t) {
  int64_t last = 0;
  for (int i = 0; i < t.ndim; i++) {
    if (t.shape[i] == 0) return true;
    last += (t.shape[i] - 1) * t.strides[i];
  }
  PyObject* storage = PyObject_CallFunctionObjArgs(untyped_storage, tensor, nullptr);
  PyObject* offset = storage ? PyObject_CallFunctionObjArgs(storage_offset, tensor, nullptr) : nullptr;
  const int64_t first = offset ? PyLong_AsLongLong(offset) : -1, length = storage ? PyObject_Size(storage) : -1;
  Py_XDECREF(storage);
  Py_XDECREF(offset);
  if (PyErr_Occurred()) PyErr_Clear();
  return first >= 0 && (first + last + 1) * (t.dtype.bits / 8) <= length;
}
// The same for a tensor that a plan meets again and again in the same place: who shrinks a storage moves it, so that memory which
// is where it was when it was looked at last is not looked at again.
bool is_whole(PyObject* tensor, const DLTensor& t, const void*& seen) {
  if (t.data == seen) return true;
  if (!fills_storage(tensor, t)) return false;
  seen = t.data;
  return true;
}

// Whether memory holds the values with the other sign, as it does for the imaginary part of a conjugate.
bool negated(PyObject* tensor) {
  PyObject* answer = PyObject_CallFunctionObjArgs(is_neg, tensor, nullptr);
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer != Py_False;
}

// --- the Python functions --------------------------------------------------------------------------------------------------

constexpr int64_t alone = 12288;  // elements below which neither other threads nor giving up the GIL pays
constexpr int64_t grain = 8192;   // elements of a thread: a few microseconds, as long as to call it

// An owned reference, or null with a Python error set.
struct Reference {
  PyObject* object;
  explicit Reference(PyObject* o = nullptr) : object(o) {}
  Reference(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object); }
  operator PyObject*() const { return object; }
  PyObject* release() {
    PyObject* o = object;
    object = nullptr;
    return o;
  }
};

PyObject* refuse(const char* what) {
  PyErr_Format(unsupported, "the C++ engine does not take %s", what);
  return nullptr;
}
const char* const plan_name = "streamnorm.plan";
void free_plan(PyObject* capsule) {
  Plan* plan = (Plan*)PyCapsule_GetPointer(capsule, plan_name);
  for (PyObject* spare : plan->spare) Py_XDECREF(spare);
  Py_XDECREF(plan->like_input.arguments);
  Py_XDECREF(plan->like_parameter.arguments);
  delete plan;
}
// A plan is a tuple whose first item is the capsule that make_plan returns.
Plan* get_plan(PyObject* plan) {
  PyObject* capsule = PyTuple_GetItem(plan, 0);
  return capsule ? (Plan*)PyCapsule_GetPointer(capsule, plan_name) : nullptr;
}

// plan(split, kept, axes, p, centered, k, eps, window or 0, alpha, beta) -> capsule
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
  if (axes > max_axes || PyTuple_Size(origin) != axes) return refuse("a view of so many axes");
  Plan plan = {};
  plan.axes = axes;
  plan.formula = f;
  plan.numel = plan.samples = plan.channels = plan.G = 1;
  bool in_order = axes > 0;
  for (int i = 0; i < axes; i++) {
    plan.size[i] = PyLong_AsLongLong(PyTuple_GetItem(split, i));
    plan.origin[i] = (int)PyLong_AsLong(PyTuple_GetItem(origin, i));
    if (PyErr_Occurred()) return nullptr;
    if (plan.size[i] < 1) return refuse("an empty view");
    if (plan.numel > INT64_MAX / 16 / plan.size[i]) return refuse("a view of so many elements");
    in_order = in_order && plan.origin[i] >= 0 && plan.origin[i] >= plan.dims - 1 && plan.origin[i] <= plan.dims;
    plan.dims = plan.origin[i] + 1;
    plan.numel *= plan.size[i];
    if (plan.origin[i] == 0) plan.samples *= plan.size[i];
    if (plan.origin[i] == 1) plan.channels *= plan.size[i];
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(kept); i++) {
    long k = PyLong_AsLong(PyTuple_GetItem(kept, i));
    if (k < 0 || k >= axes || plan.kept[k]) return refuse("a view that keeps an axis it does not have, or keeps it twice");
    plan.kept[k] = true;
    plan.G *= plan.size[k];
  }
  if (PyErr_Occurred()) return nullptr;
  if (!in_order) plan.dims = -1;  // no tensor has so many
  plan.n = plan.numel / plan.G;
  return PyCapsule_New(new Plan(plan), plan_name, free_plan);
}

// x, if it is of the plan's shape and of a type that the kernels take.
bool has_shape(const Plan& plan, PyObject* object, DLTensor& x) {
  if (!borrow(object, x) || type_of(x) == Type::other || x.ndim != plan.dims || negated(object)) return false;
  for (int i = 0, a = 0; i < x.ndim; i++) {
    int64_t size = 1;
    for (; a < plan.axes && plan.origin[a] == i; a++) size *= plan.size[a];
    if (size != x.shape[i]) return false;
  }
  return true;
}
// And if it lies so that they can walk it.
bool read_input(Plan& plan, PyObject* object, DLTensor& x, Call& call, Layout& layout) {
  if (!has_shape(plan, object, x)) return false;
  const Layout* found = find_layout(plan, x);
  if (!found) return false;
  layout = *found;
  call.formula = &plan.formula;
  call.layout = &layout;
  call.type = type_of(x);
  call.n = plan.n;
  call.x = x.data;
  call.grad_scale = 1;
  return true;
}

// accepts(plan, x) -> 0: never, 1: as it lies, 2: made contiguous
PyObject* accepts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return refuse("this number of arguments");
  Plan* plan = get_plan(args[0]);
  if (!plan) return nullptr;
  DLTensor x;
  Call call = {};
  Layout layout;
  if (read_input(*plan, args[1], x, call, layout)) return PyLong_FromLong(1);
  if (!has_shape(*plan, args[1], x)) return PyLong_FromLong(0);
  int64_t strides[max_axes], step = 1;
  for (int i = plan->dims - 1; i >= 0; i--) strides[i] = step, step *= x.shape[i];
  return PyLong_FromLong(make_layout(*plan, strides, layout) ? 2 : 0);
}

bool read_parameter(PyObject* object, int64_t channels, const void*& data, Type& type, const void*& seen) {
  if (object == Py_None) return true;
  DLTensor t;
  if (!borrow_flat(object, channels, t) || t.ndim != 1 || negated(object) || !is_whole(object, t, seen)) return false;
  data = t.data;
  type = type_of(t);
  return type != Type::other;
}

// The forward or the gradient half of a state, in the order (long, short, count, samples). It owns references: while the GIL is
// released, another thread may put other tensors in the place of these.
struct Half {
  PyObject* tensors[4] = {};
  DLTensor part[4];

  Half() = default;
  Half(const Half&) = delete;
  ~Half() {
    for (PyObject* tensor : tensors) Py_XDECREF(tensor);
  }

  // state: a tuple in the order of spec.State, or a module's dict of buffers
  bool find(PyObject* state, bool grad) {
    const int places[4] = {grad ? 2 : 0, grad ? 3 : 1, grad ? 5 : 4, grad ? 7 : 6};
    bool tuple = PyTuple_Check(state);
    if (tuple ? PyTuple_Size(state) != 8 : !PyDict_Check(state)) return false;
    for (int i = 0; i < 4; i++) {
      if (!hold(i, tuple ? PyTuple_GetItem(state, places[i]) : PyDict_GetItemWithError(state, names[places[i]]))) return false;
    }
    return true;
  }
  bool hold(int i, PyObject* tensor) {
    Py_XDECREF(tensors[i]);
    Py_XINCREF(tensor);
    tensors[i] = tensor;
    return tensor;
  }
  // seen: four places of is_whole
  bool read(int64_t G, Type wide, const void** seen) {
    for (int i = 0; i < 4; i++) {
      DLTensor& t = part[i];
      if (!borrow_flat(tensors[i], i < 2 ? 2 * G : i == 2 ? G : 1, t) || !is_whole(tensors[i], t, seen[i])) return false;
      if (i < 2 ? type_of(t) != wide || t.ndim != 2 || t.shape[0] != 2 : !is_int64(t) || t.ndim != 3 - i) return false;
    }
    return true;
  }
  // Count the samples of this use; the mixing weights follow.
  void use(const Plan& plan, Call& call) {
    call.lasting = part[0].data;
    call.recent = part[1].data;
    call.count = (int64_t*)part[2].data;
    double seen = (double)(*(int64_t*)part[3].data += plan.samples);
    if (!plan.formula.windowed) return;
    call.mix[0] = plan.formula.window / (plan.formula.window + seen);
    call.mix[1] = seen / (plan.formula.window + seen);
    call.mix[2] = 0;
  }
};

// Whether tensors may have tangents: a level of forward-mode differentiation was entered, the first of which is 0. Or -1.
int has_tangents() {
  PyObject* level = PyDict_GetItemWithError(forward_mode, name_level);
  long number = level ? PyLong_AsLong(level) : -1;
  return PyErr_Occurred() ? -1 : number >= 0;
}
// Whether something wants to see every PyTorch operation: a mode, a tracer, tangents. 1, 0, or -1 for an error.
int watched() {
  int tangents = has_tangents();
  if (tangents) return tangents;
  for (PyObject* modes : {dispatch_modes, function_modes}) {
    Reference count(PyObject_CallFunctionObjArgs(modes, nullptr));
    if (!count) return -1;
    if (PyLong_AsLong(count) != 0) return 1;
  }
  Reference state(PyObject_CallFunctionObjArgs(tracing, nullptr));
  return !state ? -1 : state != Py_None;
}

bool execute(Call& call, int64_t numel, bool forward) {
  bool enough = true;
  auto guarded = [&] {
    try {
      run(call, forward);
    } catch (const std::bad_alloc&) {
      enough = false;
    }
  };
  call.threads = 1;
  if (numel < alone) {
    guarded();
  } else {
    Reference threads(PyObject_CallFunctionObjArgs(get_num_threads, nullptr));
    if (!threads) return false;
    call.threads = (int)smaller(larger(1, PyLong_AsLong(threads)), (numel + grain - 1) / grain);
    Py_BEGIN_ALLOW_THREADS
    guarded();
    Py_END_ALLOW_THREADS
  }
  if (!enough) PyErr_NoMemory();
  return enough;
}

// (3, G), then a copy of the gain, and room to read the last values as a whole pack. The last byte tells whether a gradient
// has reached the stream: what another pass through the same graph adds was counted with the first.
Py_ssize_t saved_size(const Plan& plan, Type wide) { return (3 * plan.G + plan.channels) * bytes(wide) + 64; }
char& was_passed(PyObject* saved) { return PyBytes_AsString(saved)[PyBytes_Size(saved) - 1]; }
char* saved_gain(const Plan& plan, Type wide, void* saved) { return (char*)saved + 3 * plan.G * bytes(wide); }
// A bytes object for it: one of the last calls' that nobody holds any more, since to allocate a few kilobytes takes as
// long as to normalize them.
PyObject* make_saved(Plan& plan, Type wide) {
  Py_ssize_t size = saved_size(plan, wide);
  PyObject** vacant = &plan.spare[plan.last = (plan.last + 1) % Plan::spares];
  for (PyObject*& spare : plan.spare) {
    if (!spare) vacant = &spare;
    else if (Py_REFCNT(spare) == 1 && PyBytes_Size(spare) == size) {
      Py_IncRef(spare);
      return spare;
    }
  }
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, size);
  if (!bytes || size > Plan::largest_spare) return bytes;
  Py_XDECREF(*vacant);
  Py_IncRef(bytes);
  return *vacant = bytes;
}

PyObject* tuple_of(int count, const int64_t* values) {
  Reference tuple(PyTuple_New(count));
  for (int i = 0; tuple && i < count; i++) {
    PyObject* value = PyLong_FromLongLong(values[i]);
    if (!value) return nullptr;
    PyTuple_SetItem(tuple, i, value);
  }
  return tuple.release();
}
// An uninitialized tensor with the shape, the strides and the type of t, and where it is. A description serves one shape.
PyObject* new_tensor(const DLTensor& t, Description& d, DLTensor& out) {
  const Type type = type_of(t);
  const size_t strides_size = t.ndim * sizeof(int64_t);
  Reference arguments(d.arguments);
  if (d.arguments && d.type == type && !memcmp(d.strides, t.strides, strides_size)) {
    Py_IncRef(arguments);
  } else {
    Reference shape(tuple_of(t.ndim, t.shape)), strides(tuple_of(t.ndim, t.strides));
    PyObject* dtype = PyTuple_GetItem(dtypes, (Py_ssize_t)type);
    arguments.object = shape && strides && dtype ? PyTuple_Pack(3, shape.object, strides.object, dtype) : nullptr;
    if (!arguments) return nullptr;
    Py_IncRef(arguments);
    Py_XDECREF(d.arguments);
    d.arguments = arguments;
    d.type = type;
    memcpy(d.strides, t.strides, strides_size);
  }
  Reference tensor(PyObject_CallObject(empty_strided, arguments));
  if (!tensor) return nullptr;
  if (!borrow(tensor, out)) return refuse("this memory");
  expect_writes(out.data, size_of(t) * t.dtype.bits / 8);
  return tensor.release();
}
// The same for an input; large ones get kept memory.
PyObject* new_like_input(Plan& plan, const DLTensor& x, DLTensor& out) {
  const size_t size = plan.numel * x.dtype.bits / 8;
  KeptMemory& memory = KeptMemory::get();
  if (!memory.serves(size)) return new_tensor(x, plan.like_input, out);
  DLManagedTensorVersioned* managed = memory.take(x, size);
  if (!managed) return PyErr_NoMemory();
  out = managed->tensor;
  void* tensor = nullptr;
  if (exchange->to_object(managed, &tensor)) return nullptr;  // whose the memory is then, is not known: it is not given back
  return (PyObject*)tensor;
}
// And for the gradient of a gain or bias.
PyObject* new_like_parameter(Plan& plan, PyObject* parameter, DLTensor& out) {
  DLTensor t;
  if (!borrow_flat(parameter, plan.channels, t) || type_of(t) == Type::other || t.ndim != 1) return refuse("this gain or bias");
  return new_tensor(t, plan.like_parameter, out);
}

// What forward leaves for backward, besides x: (plan, saved, grad_scale, weight, bias), and with a stream the gradient half
// of its state. Of weight and bias only the kind is needed, the gain's values are saved.
enum Kept { kept_plan, kept_saved, kept_grad_scale, kept_weight, kept_bias, kept_half };

// forward(ctx, x, weight, bias, (plan, state, grad_scale, stats)) -> y
// Refuses, before anything has changed, whatever it does not take.
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(args[4]) || PyTuple_Size(args[4]) != 4) return refuse("these arguments");
  PyObject *ctx = args[0], *x_object = args[1], *weight = args[2], *bias = args[3];
  PyObject *plan_object = PyTuple_GetItem(args[4], 0), *state = PyTuple_GetItem(args[4], 1), *grad_scale = PyTuple_GetItem(args[4], 2),
           *stats_object = PyTuple_GetItem(args[4], 3);
  Plan* plan = get_plan(plan_object);
  if (!plan) return nullptr;
  int seen = watched();
  if (seen) return seen < 0 ? nullptr : refuse("part in what is traced or watched");
  DLTensor x, y, stats = {};
  Call call = {};
  Layout layout;
  if (!read_input(*plan, x_object, x, call, layout) || !fills_storage(x_object, x)) return refuse("this input");
  plan->whole[Plan::whole_x] = x.data;
  Type wide = wide_of(call.type);
  Reference output(new_like_input(*plan, x, y));
  if (!output) return nullptr;
  Reference saved(make_saved(*plan, wide));
  if (!saved) return nullptr;

  // No Python code runs from here on, which could move what is looked at.
  Type weight_type;
  if (!read_parameter(weight, plan->channels, call.weight, weight_type, plan->whole[Plan::whole_weight])) return refuse("this gain");
  if (!read_parameter(bias, plan->channels, call.bias, call.bias_type, plan->whole[Plan::whole_bias])) return refuse("this bias");
  const bool streams = state != Py_None;
  Half half, grad_half;
  if (streams && !(half.find(state, false) && half.read(plan->G, wide, plan->whole + Plan::whole_state) && grad_half.find(state, true) &&
                   grad_half.read(plan->G, wide, plan->whole + Plan::whole_grad_state)))
    return refuse("this state");
  Buffer moments, own_bias;
  if (stats_object != Py_None) {
    if (!borrow_flat(stats_object, 2 * plan->G, stats) || type_of(stats) == Type::other || !fills_storage(stats_object, stats))
      return refuse("this tensor for statistics");
    call.moments = (double*)moments.zeroed(plan->G * sizeof(double));
  }
  if (call.bias && plan->numel >= alone) {  // as with the gain below: another thread may give a parameter other memory
    const size_t size = plan->channels * bytes(call.bias_type);
    call.bias = memcpy(own_bias.allocate(size), call.bias, size);
  }

  call.y = y.data;
  call.saved = PyBytes_AsString(saved);
  was_passed(saved) = 0;
  if (call.weight) {
    char* gain = saved_gain(*plan, wide, call.saved);
    if (weight_type == wide) memcpy(gain, call.weight, plan->channels * bytes(wide));
    else
      for (int64_t i = 0; i < plan->channels; i++) set_number(gain, wide, i, number(call.weight, weight_type, i));
    call.weight = gain;
  }
  if (streams) {
    memcpy(call.mix, plan->formula.alpha, sizeof call.mix);
    half.use(*plan, call);
  } else {
    call.mix[2] = 1;
  }
  if (!execute(call, plan->numel, true)) return nullptr;
  for (int64_t i = 0; call.moments && i < plan->G; i++) {
    set_number(stats.data, type_of(stats), i, number(call.saved, wide, i));
    set_number(stats.data, type_of(stats), plan->G + i, call.moments[i]);
  }
  Reference kept(streams ? PyTuple_Pack(9, plan_object, saved.object, grad_scale, weight, bias, grad_half.tensors[0], grad_half.tensors[1],
                                        grad_half.tensors[2], grad_half.tensors[3])
                         : PyTuple_Pack(5, plan_object, saved.object, grad_scale, weight, bias));
  if (!kept || PyObject_SetAttr(ctx, name_kept, kept)) return nullptr;
  Reference inputs(PyTuple_Pack(1, x_object));
  return inputs && !PyObject_SetAttr(ctx, name_to_save, inputs) ? output.release() : nullptr;
}

// The gradients for (x, weight, bias, call), or null: with Unsupported where dy, or a pass that is not the first, is not for
// C++, and nothing has changed.
PyObject* gradients(PyObject* ctx, PyObject* dy_object, bool first_only) {
  Reference kept(PyObject_GetAttr(ctx, name_kept)), needs(PyObject_GetAttr(ctx, name_needs));
  if (!kept || !needs) return nullptr;
  PyObject *saved = PyTuple_GetItem(kept, kept_saved), *grad_scale = PyTuple_GetItem(kept, kept_grad_scale),
           *weight = PyTuple_GetItem(kept, kept_weight), *bias = PyTuple_GetItem(kept, kept_bias);
  const bool streams = PyTuple_Size(kept) > kept_half;
  if (streams && first_only && was_passed(saved)) return refuse("another pass through one graph");
  Reference inputs(PyObject_GetAttr(ctx, name_saved_tensors));  // once: activation checkpointing may have something to say
  if (!inputs) return nullptr;
  PyObject* x_object = PyTuple_GetItem(inputs, 0);
  Plan* plan = get_plan(PyTuple_GetItem(kept, kept_plan));
  if (!plan || !bias || !x_object) return nullptr;
  DLTensor x, dy, t;
  Call call = {};
  Layout layout;
  if (!read_input(*plan, x_object, x, call, layout) || !is_whole(x_object, x, plan->whole[Plan::whole_x])) return refuse("this input");
  Type wide = wide_of(call.type);
  call.saved = PyBytes_AsString(saved);
  if (!call.saved) return nullptr;
  if (PyBytes_Size(saved) != saved_size(*plan, wide)) return refuse("an input of another type than before");
  if (!borrow(dy_object, dy) || type_of(dy) != call.type || size_of(dy) != plan->numel) return refuse("this output gradient");
  Reference copy;
  if (!same_strides(x, dy) || negated(dy_object)) {
    copy.object = PyObject_CallFunctionObjArgs(copy_like, x_object, dy_object, nullptr);
    if (!copy) return nullptr;
    if (!borrow(copy, dy) || type_of(dy) != call.type || !same_strides(x, dy)) return refuse("this output gradient");
  } else if (!is_whole(dy_object, dy, plan->whole[Plan::whole_dy])) {
    return refuse("this output gradient");
  }
  call.dy = dy.data;
  if (weight != Py_None) call.weight = saved_gain(*plan, wide, call.saved);

  PyObject* of[3] = {x_object, weight, bias};
  void** data[3] = {&call.dx, &call.dw, &call.db};
  Type* types[3] = {&call.type, &call.dw_type, &call.bias_type};
  Reference result(PyTuple_New(4));
  if (!result) return nullptr;
  for (int i = 0; i < 4; i++) {
    PyObject* grad = Py_None;
    if (i < 3 && of[i] != Py_None && PyTuple_GetItem(needs, i) == Py_True) {
      grad = i == 0 ? new_like_input(*plan, x, t) : new_like_parameter(*plan, of[i], t);
      if (!grad) return nullptr;
      *data[i] = t.data;
      *types[i] = type_of(t);
    } else {
      Py_IncRef(grad);
    }
    PyTuple_SetItem(result, i, grad);
  }
  // No Python code runs from here on, which could move what is looked at.
  if (grad_scale != Py_None) {
    if (!borrow_flat(grad_scale, 1, t) || type_of(t) == Type::other || !fills_storage(grad_scale, t)) return refuse("this gradient scale");
    call.grad_scale = number(t.data, type_of(t), 0);
  }
  Half half;
  for (int i = 0; streams && i < 4; i++) half.hold(i, PyTuple_GetItem(kept, kept_half + i));
  if (streams && !half.read(plan->G, wide, plan->whole + Plan::whole_grad_state)) return refuse("this state");
  if (call.dx) {
    memcpy(call.mix, plan->formula.beta, sizeof call.mix);
    if (streams) {
      half.use(*plan, call);
      was_passed(saved) = 1;
    }
  }
  return execute(call, plan->numel, false) ? result.release() : nullptr;
}

// What autograd calls of a node: (self = ctx, dy). Second derivatives, tangents and what C++ does not take are Python's.
PyObject* apply(PyObject* ctx, PyObject* const* args, Py_ssize_t count) {
  Reference recording(PyObject_CallFunctionObjArgs(is_grad_enabled, nullptr));
  if (!recording || count != 1) return recording ? refuse("these arguments") : nullptr;
  int tangents = has_tangents();
  if (tangents < 0) return nullptr;
  if (recording == Py_False && !tangents) {
    PyObject* result = gradients(ctx, args[0], true);
    if (result || !PyErr_ExceptionMatches(unsupported)) return result;
    PyErr_Clear();
  }
  return PyObject_CallFunctionObjArgs(backward_in_python, ctx, args[0], nullptr);
}
// backward(ctx, dy) -> gradients; raises Unsupported where dy is not for C++
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return count == 2 ? gradients(args[0], args[1], false) : refuse("these arguments");
}
PyMethodDef apply_method = {"apply", (PyCFunction)(void (*)(void))apply, METH_FASTCALL, nullptr};

// attach(type of the nodes, the Python function behind it): let autograd call apply above
PyObject* attach(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyType_Check(args[0])) return refuse("these arguments");
  Py_IncRef(args[1]);
  backward_in_python = args[1];
  Reference method(PyDescr_NewMethod((PyTypeObject*)args[0], &apply_method));
  if (!method || PyObject_SetAttrString(args[0], "apply", method)) return nullptr;
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
// What a commit sees of a stream: the sum of its moments before and after, and how many statistics, and gradients of statistics,
// met nothing finite since the last one.
struct Seen {
  double before, after;
  int64_t missed[2];
  bool leapt(double p) const { return after > 10 * before && after > pow(10, p) * before; }
};
template <class F> double sum(const F* values, int64_t n) {
  F a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;  // one sum would wait for itself at every addition
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const F* v = values + i;
    a += v[0], b += v[1], c += v[2], d += v[3], e += v[4], f += v[5], g += v[6], h += v[7];
  }
  for (; i < n; i++) a += values[i];
  return (double)((a + b) + (c + d)) + ((e + f) + (g + h));
}
int64_t zeros(const int64_t* counts, int64_t n) {
  int64_t a = 0, b = 0, c = 0, d = 0, i = 0;  // none is below 0: less one, only 0 has the sign
  for (; i + 4 <= n; i += 4) a |= counts[i] - 1, b |= counts[i + 1] - 1, c |= counts[i + 2] - 1, d |= counts[i + 3] - 1;
  for (; i < n; i++) a |= counts[i] - 1;
  if ((a | b | c | d) >= 0) return 0;
  int64_t found = 0;
  for (i = 0; i < n; i++) found += counts[i] == 0;
  return found;
}
template <class F> void commit_stream(const DLTensor* part, int64_t G, double keep, double take, bool grad, Seen& seen) {
  F *lasting = (F*)part[0].data, *recent = (F*)part[1].data;
  int64_t *count = (int64_t*)part[2].data, *samples = (int64_t*)part[3].data;
  seen.missed[grad] = *samples > 0 ? zeros(count, G) : 0;
  if (!grad) seen.before = sum(lasting + G, G);
  commit_half(lasting, recent, count, G, keep, take);
  if (!grad) seen.after = sum(lasting + G, G);
  *samples = 0;
}
// False, with nothing changed, for a state that is not in plain CPU memory.
bool commit_state(PyObject* state, const double* kappa, double window, Seen& seen) {
  Half halves[2];
  DLTensor lasting, count;
  if (!halves[0].find(state, false) || !halves[1].find(state, true)) return false;
  if (!borrow(halves[0].tensors[0], lasting) || !borrow(halves[0].tensors[2], count)) return false;
  Type type = type_of(lasting);
  const int64_t G = size_of(count);
  static const void* known[256][8];  // see is_whole; a layer has its place by where its memory is
  const void** whole = known[(uintptr_t)lasting.data / 64 % 256];
  if (type != Type::f32 && type != Type::f64) return false;
  if (!halves[0].read(G, type, whole) || !halves[1].read(G, type, whole + 4)) return false;
  for (int grad = 0; grad < 2; grad++) {
    const DLTensor* part = halves[grad].part;
    double ratio = window > 0 ? (double)*(int64_t*)part[3].data / window : 0;
    double keep = window > 0 ? exp(-ratio) : kappa[2 * grad], take = window > 0 ? -expm1(-ratio) : kappa[2 * grad + 1];
    if (type == Type::f64) commit_stream<double>(part, G, keep, take, grad, seen);
    else commit_stream<float>(part, G, keep, take, grad, seen);
  }
  return true;
}

// commit([(state, (p, ..., kappa, window)), ...]) -> (those that it does not take, signs of a training that runs away: tuples of the
// use's number and what was seen). The first and the last two items of a formula count.
PyObject* commit(PyObject*, PyObject* uses) {
  if (!PyList_Check(uses)) return refuse("uses that are no list");
  Reference rest(PyList_New(0)), signs(PyList_New(0));
  for (Py_ssize_t i = 0; rest && signs && i < PyList_Size(uses); i++) {
    PyObject *use = PyList_GetItem(uses, i), *state_object = PyTuple_GetItem(use, 0), *formula = PyTuple_GetItem(use, 1);
    if (!formula) return nullptr;
    Py_ssize_t size = PyTuple_Size(formula);
    PyObject *order = PyTuple_GetItem(formula, 0), *constants = PyTuple_GetItem(formula, size - 2), *span = PyTuple_GetItem(formula, size - 1);
    if (!order || !constants || !span) return nullptr;
    double p = PyFloat_AsDouble(order), kappa[4] = {}, window = span == Py_None ? 0 : PyFloat_AsDouble(span);
    for (int k = 0; span == Py_None && k < 4; k++) kappa[k] = PyFloat_AsDouble(PyTuple_GetItem(constants, k));
    if (PyErr_Occurred()) return nullptr;
    Seen seen = {};
    if (!commit_state(state_object, kappa, window, seen)) {
      if (PyErr_Occurred() || PyList_Append(rest, use)) return nullptr;
    } else if (seen.leapt(p) || seen.missed[0] || seen.missed[1]) {
      Reference sign(Py_BuildValue("(nddLL)", i, seen.before, seen.after, (long long)seen.missed[0], (long long)seen.missed[1]));
      if (!sign || PyList_Append(signs, sign)) return nullptr;
    }
  }
  return rest && signs ? Py_BuildValue("(OO)", (PyObject*)rest, (PyObject*)signs) : nullptr;
}

// setup(Tensor, Parameter, exchange, (empty_strided, dtypes, copy_like, get_num_threads, dispatch_modes, function_modes, tracing,
//       is_grad_enabled, is_neg, variables of forward_ad, untyped_storage, storage_offset), names, library, instructions or None)
//   -> (instructions, whether there are threads)
PyObject* setup(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *capsule, *functions[12], *buffers;
  const char *library, *wanted;
  if (!PyArg_ParseTuple(args, "OOO(OOOOOOOOOOOO)O!sz", &tensor, &parameter, &capsule, &functions[0], &functions[1], &functions[2], &functions[3],
                        &functions[4], &functions[5], &functions[6], &functions[7], &functions[8], &functions[9], &functions[10], &functions[11],
                        &PyTuple_Type, &buffers, &library, &wanted))
    return nullptr;
  auto* api = (const DLPackExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!api) return nullptr;
  if (api->header.version.major != 1 || !api->borrow || !api->to_object) {
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
    PyErr_Format(PyExc_ValueError, "this processor or build has no instruction set %s; STREAMNORM_ISA can be baseline, avx2 or avx512", wanted);
    return nullptr;
  }
  const bool threads = find_threads(library);
  PyObject** places[] = {&tensor_type, &parameter_type, &empty_strided, &dtypes, &copy_like, &get_num_threads, &dispatch_modes, &function_modes,
                         &tracing, &is_grad_enabled, &is_neg, &forward_mode, &untyped_storage, &storage_offset};
  PyObject* values[] = {tensor, parameter, functions[0], functions[1], functions[2], functions[3], functions[4], functions[5], functions[6],
                        functions[7], functions[8], functions[9], functions[10], functions[11]};
  for (int i = 0; i < 14; i++) {
    Py_IncRef(values[i]);
    Py_XDECREF(*places[i]);
    *places[i] = values[i];
  }
  for (int i = 0; i < 8; i++) {
    PyObject* name = PyTuple_GetItem(buffers, i);
    if (!name) return nullptr;
    Py_IncRef(name);
    Py_XDECREF(names[i]);
    names[i] = name;
  }
  exchange = api;
  variant = usual_variant = chosen;
  if (!wanted && !strcmp(chosen->name, "avx512") && slowed_by_wide_registers()) usual_variant = chosen + 1;
  return Py_BuildValue("sO", chosen->name, threads ? Py_True : Py_False);
}

// lend(double?, tensors, shapes, counts) -> where tensors lie, 0 for None, if each is a contiguous one in plain CPU memory, has its
// shape, and is float or double, the last `counts` of them int64; else None
PyObject* lend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) return refuse("these arguments");
  const Type wide = PyObject_IsTrue(args[0]) == 1 ? Type::f64 : Type::f32;
  const Py_ssize_t tensors = PyTuple_Size(args[1]), floats = tensors - PyLong_AsLong(args[3]);
  if (PyErr_Occurred() || PyTuple_Size(args[2]) != tensors) return PyErr_Occurred() ? nullptr : refuse("as many shapes as these");
  Reference addresses(PyTuple_New(tensors));
  for (Py_ssize_t i = 0; addresses && i < tensors; i++) {
    PyObject *tensor = PyTuple_GetItem(args[1], i), *shape = PyTuple_GetItem(args[2], i);
    DLTensor t = {};
    if (tensor != Py_None) {
      bool fits = borrow(tensor, t) && PyTuple_Check(shape) && t.ndim == PyTuple_Size(shape) && is_contiguous(t) && fills_storage(tensor, t);
      for (int k = 0; fits && k < t.ndim; k++) fits = t.shape[k] == PyLong_AsLongLong(PyTuple_GetItem(shape, k));
      if (PyErr_Occurred()) return nullptr;
      if (!fits || !(i < floats ? type_of(t) == wide && !negated(tensor) : is_int64(t))) {
        Py_IncRef(Py_None);
        return Py_None;
      }
    }
    PyObject* address = PyLong_FromVoidPtr(t.data);
    if (!address) return nullptr;
    PyTuple_SetItem(addresses, i, address);
  }
  return addresses.release();
}
// are_whole(tensors…): whether each is None, or a tensor in plain CPU memory whose storage holds all of it
PyObject* are_whole(PyObject*, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; i++) {
    DLTensor t;
    if (args[i] != Py_None && !(borrow(args[i], t) && fills_storage(args[i], t))) return PyBool_FromLong(0);
  }
  return PyBool_FromLong(1);
}

// keep_memory(bytes) -> the setting before: at most so many bytes wait for the next outputs
PyObject* keep_memory(PyObject*, PyObject* bytes) {
  const size_t most = PyLong_AsSize_t(bytes);
  return PyErr_Occurred() ? nullptr : PyLong_FromSize_t(KeptMemory::get().keep_at_most(most));
}
// waiting_memory() -> bytes that wait
PyObject* waiting_memory(PyObject*, PyObject*) { return PyLong_FromSize_t(KeptMemory::get().waiting_now()); }

template <class Fn> PyCFunction function(Fn fn) { return (PyCFunction)(void (*)(void))fn; }

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"plan", make_plan, METH_VARARGS, nullptr},
    {"accepts", function(accepts), METH_FASTCALL, nullptr},
    {"forward", function(forward), METH_FASTCALL, nullptr},
    {"backward", function(backward), METH_FASTCALL, nullptr},
    {"attach", function(attach), METH_FASTCALL, nullptr},
    {"commit", commit, METH_O, nullptr},
    {"lend", function(lend), METH_FASTCALL, nullptr},
    {"are_whole", function(are_whole), METH_FASTCALL, nullptr},
    {"keep_memory", keep_memory, METH_O, nullptr},
    {"waiting_memory", waiting_memory, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Training steps on CPU tensors; see native.py.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject* m = PyModule_Create(&module);
  unsupported = PyErr_NewException("streamnorm.ops._native.Unsupported", PyExc_ValueError, nullptr);
  name_kept = PyUnicode_InternFromString("kept");
  name_to_save = PyUnicode_InternFromString("to_save");
  name_saved_tensors = PyUnicode_InternFromString("saved_tensors");
  name_needs = PyUnicode_InternFromString("needs_input_grad");
  name_level = PyUnicode_InternFromString("_current_level");
  if (!m || !unsupported || PyModule_AddObjectRef(m, "Unsupported", unsupported)) return nullptr;
  return m;
}
