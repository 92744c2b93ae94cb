// The loops of the C++ engine, each over a block of memory or a range of statistics; module.cpp puts them together.
// It includes this file once per instruction set, with ISA (the namespace) and ISA_BYTES (the width of a register) set;
// there is therefore no include guard.
//
// Every loop works on packs of 64 bytes, whatever the register width, and every sum is folded in the same order
// (packs in fours or eights, then in double precision, then over chunks of fixed size). So neither the instruction set nor the
// number of threads changes a single bit of a result.
//
// A stretch that is no whole number of packs ends with a pack that overlaps the one before: sums mask out what was
// counted, writes repeat it. A stretch shorter than one pack is read and written as a whole pack: the caller pads it.

namespace ISA {

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// --- packs -----------------------------------------------------------------------------------------------------------

template <class F> struct Register;
template <> struct Register<float> {
  typedef float V __attribute__((vector_size(ISA_BYTES)));
  typedef int32_t I __attribute__((vector_size(ISA_BYTES)));
  typedef int32_t Bits;
  static constexpr int32_t magnitude = 0x7fffffff;
};
template <> struct Register<double> {
  typedef double V __attribute__((vector_size(ISA_BYTES)));
  typedef int64_t I __attribute__((vector_size(ISA_BYTES)));
  typedef int64_t Bits;
  static constexpr int64_t magnitude = 0x7fffffffffffffffLL;
};

template <class F> struct Pack {
  typedef typename Register<F>::V V;
  typedef typename Register<F>::I I;
  static constexpr int lanes = 64 / sizeof(F), parts = 64 / ISA_BYTES, per_part = ISA_BYTES / sizeof(F);
  V v[parts];
};

// EACH(i, n, statement): the statement for i = 0 to n - 1, n <= 8, written out. Arrays become registers only if the compiler
// sees them indexed by constants from the start.
#define EACH_AT(i, at, n, ...) if constexpr (n > at) { constexpr int i = at; __VA_ARGS__; }
#define EACH(i, n, ...) \
  { \
    EACH_AT(i, 0, n, __VA_ARGS__) EACH_AT(i, 1, n, __VA_ARGS__) EACH_AT(i, 2, n, __VA_ARGS__) EACH_AT(i, 3, n, __VA_ARGS__) \
    EACH_AT(i, 4, n, __VA_ARGS__) EACH_AT(i, 5, n, __VA_ARGS__) EACH_AT(i, 6, n, __VA_ARGS__) EACH_AT(i, 7, n, __VA_ARGS__) \
  }
#define EACH_PART(...) EACH(i, Pack<F>::parts, __VA_ARGS__)

template <class F> INLINE Pack<F> operator+(Pack<F> a, const Pack<F>& b) { EACH_PART(a.v[i] += b.v[i]); return a; }
template <class F> INLINE Pack<F> operator-(Pack<F> a, const Pack<F>& b) { EACH_PART(a.v[i] -= b.v[i]); return a; }
template <class F> INLINE Pack<F> operator*(Pack<F> a, const Pack<F>& b) { EACH_PART(a.v[i] *= b.v[i]); return a; }

template <class F> INLINE Pack<F> all(F value) {
  Pack<F> r;
  EACH_PART(r.v[i] = value - typename Pack<F>::V{});
  return r;
}
template <class F> INLINE Pack<F> absolute(Pack<F> a) {
  EACH_PART(a.v[i] = (typename Pack<F>::V)((typename Pack<F>::I)a.v[i] & Register<F>::magnitude));
  return a;
}
// k·sgn(d), 0 where d is 0
template <class F> INLINE Pack<F> signed_as(const Pack<F>& k, const Pack<F>& d) {
  typedef typename Pack<F>::I I;
  Pack<F> r;
  EACH_PART({
    I sign = (I)d.v[i] & ~Register<F>::magnitude;
    r.v[i] = (typename Pack<F>::V)(((I)k.v[i] ^ sign) & (I)(d.v[i] != typename Pack<F>::V{}));
  });
  return r;
}

#if ISA_BYTES == 64
// The signs of a pack: of the lower half of the bits one for each lane below 0, of the upper half for each that is not 0.
INLINE uint32_t signs_of(const Pack<float>& d) {
  auto v = (__m512)d.v[0];
  return (uint32_t)_mm512_movepi32_mask((__m512i)v) | (uint32_t)_mm512_cmp_ps_mask(v, __m512{}, _CMP_NEQ_UQ) << 16;
}
INLINE uint32_t signs_of(const Pack<double>& d) {
  auto v = (__m512d)d.v[0];
  return (uint32_t)_mm512_movepi64_mask((__m512i)v) | (uint32_t)_mm512_cmp_pd_mask(v, __m512d{}, _CMP_NEQ_UQ) << 16;
}
// As signed_as of the pack that had these signs.
INLINE Pack<float> signed_by(Pack<float> k, uint32_t signs) {
  auto v = (__m512i)k.v[0];
  v = _mm512_mask_xor_epi32(v, (__mmask16)signs, v, _mm512_set1_epi32(INT32_MIN));
  k.v[0] = (Pack<float>::V)_mm512_maskz_mov_epi32((__mmask16)(signs >> 16), v);
  return k;
}
INLINE Pack<double> signed_by(Pack<double> k, uint32_t signs) {
  auto v = (__m512i)k.v[0];
  v = _mm512_mask_xor_epi64(v, (__mmask8)signs, v, _mm512_set1_epi64(INT64_MIN));
  k.v[0] = (Pack<double>::V)_mm512_maskz_mov_epi64((__mmask8)(signs >> 16), v);
  return k;
}
#endif

// Which lanes of a pack count: all, or those in [first, end).
struct All {
  template <class F> INLINE Pack<F> operator()(const Pack<F>& a) const { return a; }
};
template <class F> struct Lanes {
  typename Pack<F>::I keep[Pack<F>::parts];
  INLINE Lanes(int64_t first, int64_t end) {
    typedef typename Register<F>::Bits Bits;
    typename Pack<F>::I lane;
    for (int i = 0; i < Pack<F>::per_part; i++) lane[i] = i;
    EACH_PART(keep[i] = (lane + Bits(i * Pack<F>::per_part) >= Bits(first)) & (lane + Bits(i * Pack<F>::per_part) < Bits(end)));
  }
  INLINE Pack<F> operator()(Pack<F> a) const {
    EACH_PART(a.v[i] = (typename Pack<F>::V)((typename Pack<F>::I)a.v[i] & keep[i]));
    return a;
  }
};

// --- memory ------------------------------------------------------------------------------------------------------------

// Register by register: what GCC makes of one copy of 64 bytes goes through memory where a register holds fewer.
template <class F> INLINE Pack<F> load(const F* p) {
  Pack<F> r;
  EACH_PART(__builtin_memcpy(&r.v[i], p + i * Pack<F>::per_part, ISA_BYTES));
  return r;
}
template <class F> INLINE void store(F* p, const Pack<F>& a) { EACH_PART(__builtin_memcpy(p + i * Pack<F>::per_part, &a.v[i], ISA_BYTES)); }
// Ask for the cache line of what is read later; p need not lie in the tensor.
template <class F> INLINE void fetch(const F* p) { __builtin_prefetch(p); }

// Two ways to write. Memory that is not in the cache is read before it is overwritten, and is therefore asked for in time;
// or it is written past the cache and not read at all, for whole and aligned packs only.
struct Plainly {
  int64_t ahead;
  template <class F> INLINE void operator()(F* p, const Pack<F>& a) const {
    fetch(p + ahead);
    store(p, a);
  }
};
struct PastCache {
  template <class F> INLINE void operator()(F* p, const Pack<F>& a) const {
#if ISA_BYTES == 64
    EACH_PART(_mm512_stream_si512((__m512i*)p + i, (__m512i)a.v[i]));
#elif ISA_BYTES == 32
    EACH_PART(_mm256_stream_si256((__m256i*)p + i, (__m256i)a.v[i]));
#else
    store(p, a);
#endif
  }
};
// fn(one of these)
template <class F, class Fn> INLINE void writing(const Block& block, const F* to, Fn fn) {
#if ISA_BYTES > 16
  constexpr int L = Pack<F>::lanes;
  if (block.past_cache && (uintptr_t)to % 64 == 0 && block.length % L == 0 && (block.rows == 1 || block.to % L == 0)) {
    fn(PastCache{});
    return _mm_sfence();
  }
#endif
  fn(Plainly{block.write});
}

typedef Register<float>::V F32;
typedef uint32_t U32 __attribute__((vector_size(ISA_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(ISA_BYTES / 2)));

template <class M> INLINE U32 select(M mask, U32 yes, U32 no) { return (yes & (U32)mask) | (no & ~(U32)mask); }

INLINE F32 widened(BFloat16, U32 h) { return (F32)(h << 16); }
INLINE U32 narrowed(BFloat16, F32 f) {
  U32 u = (U32)f;
  U32 nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return select(f != f, U32{} + 0x7fc0, nearest);
}
INLINE F32 widened(Float16, U32 h) {
  U32 shifted = (h & 0x7fff) << 13;
  U32 finite = (U32)((F32)shifted * 0x1p112f);
  return (F32)(select(shifted >= 0x0f800000, shifted | 0x7f800000, finite) | (h & 0x8000) << 16);
}
INLINE U32 narrowed(Float16, F32 f) {
  U32 u = (U32)f, a = u & 0x7fffffff;
  U32 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  U32 small = (U32)((F32)a + 0.5f) - 0x3f000000;  // below 2^-14: the addition rounds to a multiple of 2^-24
  U32 r = select(a < 0x38800000, small, normal);
  r = select(a >= 0x477ff000, U32{} + 0x7c00, r);
  r = select(a > 0x7f800000, U32{} + 0x7e00, r);
  return r | ((u >> 16) & 0x8000);
}

// fn(i, n) for n elements from i on, a register's worth at a time
template <class Fn> INLINE void each_register(int64_t count, const Fn& fn) {
  constexpr int n = ISA_BYTES / 4;
  int64_t i = 0;
  for (; i + n <= count; i += n) fn(i, n);
  if (i < count) fn(i, (int)(count - i));
}
template <class T> void widen(const void* from, float* to, int64_t count) {
  each_register(count, [=](int64_t i, int n) INLINE_LAMBDA {
    U16 h = {};
    __builtin_memcpy(&h, (const T*)from + i, n * sizeof(T));
    F32 f = widened(T{}, __builtin_convertvector(h, U32));
    __builtin_memcpy(to + i, &f, n * sizeof(float));
  });
}
template <class T> void narrow(const float* from, void* to, int64_t count) {
  each_register(count, [=](int64_t i, int n) INLINE_LAMBDA {
    F32 f = {};
    __builtin_memcpy(&f, from + i, n * sizeof(float));
    U16 h = __builtin_convertvector(narrowed(T{}, f), U16);
    __builtin_memcpy((T*)to + i, &h, n * sizeof(T));
  });
}

// --- sums ------------------------------------------------------------------------------------------------------------

typedef Register<double>::V F64;

// The halves of a register of floats in double precision. What GCC makes of the plain expression for wide registers is slow.
INLINE void widen(F32 x, F64& low, F64& high) {
#if ISA_BYTES == 64
  low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
#elif ISA_BYTES == 32
  low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  typedef float Half __attribute__((vector_size(ISA_BYTES / 2)));
  Half a, b;
  __builtin_memcpy(&a, &x, sizeof a);
  __builtin_memcpy(&b, (const char*)&x + sizeof a, sizeof b);
  low = __builtin_convertvector(a, F64);
  high = __builtin_convertvector(b, F64);
#endif
}

// In double precision, one per lane of a pack.
template <class F> struct Sum {
  static constexpr int parts = Pack<F>::parts * 8 / sizeof(F);
  F64 v[parts] = {};
  INLINE void add(const Pack<double>& a) { EACH(i, Pack<double>::parts, v[i] += a.v[i]); }
  INLINE void add(const Pack<float>& a) {
    EACH(i, Pack<float>::parts, {
      F64 low, high;
      widen(a.v[i], low, high);
      v[2 * i] += low;
      v[2 * i + 1] += high;
    });
  }
  INLINE void add_to(double* p) const {
    EACH(i, parts, {
      F64 old;
      __builtin_memcpy(&old, p + i * ISA_BYTES / 8, sizeof old);
      old += v[i];
      __builtin_memcpy(p + i * ISA_BYTES / 8, &old, sizeof old);
    });
  }
};
// The upper half of the lanes added to the lower half, and so on until one value is left.
typedef int64_t Places __attribute__((vector_size(ISA_BYTES)));
INLINE double total(F64 v) {
#if ISA_BYTES == 64
  v += __builtin_shuffle(v, Places{4, 5, 6, 7, 0, 1, 2, 3});
  v += __builtin_shuffle(v, Places{2, 3, 0, 1, 6, 7, 4, 5});
#elif ISA_BYTES == 32
  v += __builtin_shuffle(v, Places{2, 3, 0, 1});
#endif
  return v[0] + v[1];
}
template <class F> INLINE double total(const Sum<F>& sum) {
  constexpr int parts = Sum<F>::parts;
  F64 v[parts];
  EACH(i, parts, v[i] = sum.v[i]);
  if constexpr (parts >= 8) EACH(i, 4, v[i] += v[i + 4]);
  if constexpr (parts >= 4) EACH(i, 2, v[i] += v[i + 2]);
  if constexpr (parts >= 2) v[0] += v[1];
  return total(v[0]);
}

// Sum K values over a stretch of n elements; body(lanes, i, q) puts those of the pack at i into q[0..K).
template <int K, class F, class Body> INLINE void reduce(int64_t n, Sum<F>* sums, const Body& body) {
  constexpr int L = Pack<F>::lanes;
  int64_t i = 0;
  while (i + 4 * L <= n) {
    const int64_t end = i + (i + 8 * L <= n ? 8 : 4) * L;
    Pack<F> few[K] = {};
    _Pragma("GCC unroll 1") for (; i < end; i += L) {
      Pack<F> q[K];
      body(All{}, i, q);
      EACH(k, K, few[k] = few[k] + q[k]);
    }
    EACH(k, K, sums[k].add(few[k]));
  }
  if (i == n) return;
  Pack<F> few[K] = {}, q[K];
  _Pragma("GCC unroll 1") for (; i + L <= n; i += L) {
    body(All{}, i, q);
    EACH(k, K, few[k] = few[k] + q[k]);
  }
  if (i < n) {
    int64_t at = larger(0, n - L);
    Lanes<F> lanes(i - at, n - at);
    body(lanes, at, q);
    EACH(k, K, few[k] = few[k] + lanes(q[k]));
  }
  EACH(k, K, sums[k].add(few[k]));
}
// Write a stretch of n elements; body must not read what it writes.
template <class F, class Body> INLINE void map(int64_t n, const Body& body) {
  constexpr int L = Pack<F>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i);
  if (i < n) body(larger(0, n - L));
}

// --- the formula: P is 1, 2, or 0 for any other p -------------------------------------------------------------------------

template <class F> NOINLINE void raise(F* values, F exponent) {
  for (int i = 0; i < Pack<F>::lanes; i++) values[i] = sizeof(F) == 4 ? powf((float)values[i], (float)exponent) : pow(values[i], exponent);
}
template <class F> INLINE Pack<F> raised(const Pack<F>& a, F exponent) {
  constexpr int most_factors = 8;
  const int factors = exponent <= most_factors ? (int)exponent : 0;
  if (factors >= 1 && factors == exponent) {  // a tenth of the time of the power function
    Pack<F> product = a;
    _Pragma("GCC unroll 1") for (int i = 1; i < factors; i++) product = product * a;
    return product;
  }
  alignas(64) F values[Pack<F>::lanes];
  store(values, a);
  raise(values, exponent);
  return load(values);
}
// |d|^p
template <int P, class F> INLINE Pack<F> power(const Pack<F>& d, F p) {
  return P == 1 ? absolute(d) : P == 2 ? d * d : raised(absolute(d), p);
}
// u = |d|^(p-1)·sgn d
template <int P, class F> INLINE Pack<F> slope(const Pack<F>& d, F p) {
  return P == 1 ? signed_as(all((F)1), d) : P == 2 ? d : signed_as(raised(absolute(d), p - 1), d);
}
// k·u. Where k is 0 it is 0, even if u is not finite.
template <class F> INLINE Pack<F> times_slope(const Pack<F>& k, const Pack<F>& u) {
  Pack<F> r = k * u;
  typedef typename Pack<F>::I I;
  EACH_PART(r.v[i] = (typename Pack<F>::V)((I)r.v[i] & (I)(k.v[i] != typename Pack<F>::V{})));
  return r;
}
template <int P, class F> INLINE Pack<F> slope_times(const Pack<F>& k, const Pack<F>& d, F p) {
  return P == 1 ? signed_as(k, d) : times_slope(k, slope<P>(d, p));
}

// --- loops over a block: `rows` stretches of `length` contiguous elements -------------------------------------------------

// From `count` neighbours, so far apart, of each stretch: theirs together.
template <class F> void gather(const Block& block, int64_t count, int64_t from_apart, int64_t to_apart, const void* from_, void* to_) {
  const F* from = (const F*)from_;
  F* to = (F*)to_;
  for (int64_t r = 0; r < block.rows; r++, from += block.from, to += block.to)
    for (int64_t k = 0; k < count; k++) {
      const F* x = from + k * from_apart;
      F* copy = to + k * to_apart;
      map<F>(block.length, [=](int64_t i) INLINE_LAMBDA {
        fetch(x + i + block.next);
        store(copy + i, load(x + i));
      });
    }
}

template <class F> double sum(const Block& block, const void* x_) {
  const int64_t next = block.next;
  Sum<F> sum;
  const F* x = (const F*)x_;
  for (int64_t r = 0; r < block.rows; r++, x += block.from)
    reduce<1>(block.length, &sum, [=](auto, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + next);
      q[0] = load(x + i);
    });
  return total(sum);
}

// Σ |x − centre|^p
template <class F, int P> double powers(const Block& block, const void* x_, double centre, double p) {
  const int64_t next = block.next;
  Sum<F> sum;
  const F* x = (const F*)x_;
  Pack<F> c = all((F)centre);
  for (int64_t r = 0; r < block.rows; r++, x += block.from)
    reduce<1>(block.length, &sum, [=](auto, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + next);
      q[0] = power<P>(load(x + i) - c, (F)p);
    });
  return total(sum);
}

// y = (x − mu)·scale + shift
template <class F> void output(const Block& block, const void* x_, void* y_, double mu, double scale, double shift) {
  const F* x = (const F*)x_;
  F* y = (F*)y_;
  Pack<F> m = all((F)mu), a = all((F)scale), b = all((F)shift);
  writing(block, y, [=](auto put) mutable INLINE_LAMBDA {
    for (int64_t r = 0; r < block.rows; r++, x += block.from, y += block.to)
      map<F>(block.length, [=](int64_t i) INLINE_LAMBDA {
        fetch(x + i + block.next);
        put(y + i, (load(x + i) - m) * a + b);
      });
  });
}

// out = Σ dy, Σ dy·(x − mu), Σ u
template <class F, int P> void gradients(const Block& block, const void* x_, const void* dy_, double mu, double centre, double p, double* out) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  Pack<F> m = all((F)mu), c = all((F)centre);
  const int64_t next = block.next;
  Sum<F> sums[3];
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from)
    reduce<3>(block.length, sums, [=](auto, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + next);
      fetch(dy + i + next);
      Pack<F> value = load(x + i);
      q[0] = load(dy + i);
      q[1] = q[0] * (value - m);
      q[2] = slope<P>(value - c, (F)p);
    });
  EACH(k, 3, out[k] = total(sums[k]));
}

// dx = dy·scale + constant + along·u
template <class F, int P>
void input(const Block& block, const void* x_, const void* dy_, void* dx_, double centre, double scale, double constant, double along, double p) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  F* dx = (F*)dx_;
  Pack<F> c = all((F)centre), a = all((F)scale), b = all((F)constant), k = all((F)along);
  writing(block, dx, [=](auto put) mutable INLINE_LAMBDA {
    for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from, dx += block.to)
      map<F>(block.length, [=](int64_t i) INLINE_LAMBDA {
        fetch(x + i + block.next);
        fetch(dy + i + block.next);
        put(dx + i, load(dy + i) * a + (b + slope_times<P>(k, load(x + i) - c, (F)p)));
      });
  });
}

// --- the same with a gain and a bias for each element of a stretch --------------------------------------------------------

template <class F> void output_elements(const Block& block, const void* x_, void* y_, double mu, double inverse, const void* gain_, const void* bias_) {
  const F* x = (const F*)x_;
  const F *gain = (const F*)gain_, *bias = (const F*)bias_;
  F* y = (F*)y_;
  Pack<F> m = all((F)mu), a = all((F)inverse);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, y += block.to)
    map<F>(block.length, [=](int64_t i) INLINE_LAMBDA { store(y + i, (load(x + i) - m) * (a * load(gain + i)) + load(bias + i)); });
}

// Sums over dx̂ = dy·gain; dw and db, of double precision, receive the gradients of gain and bias.
template <class F, int P>
void gradients_elements(const Block& block, const void* x_, const void* dy_, double mu, double centre, double inverse, double p,
                        const void* gain_, double* dw, double* db, double* out) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  const F* gain = (const F*)gain_;
  Pack<F> m = all((F)mu), c = all((F)centre), a = all((F)inverse);
  Sum<F> sums[3];
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from)
    reduce<3>(block.length, sums, [=](auto lanes, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      Pack<F> g = load(dy + i), value = load(x + i), from_mu = value - m;
      Sum<F> of_gain, of_bias;
      of_gain.add(lanes(g * from_mu * a));
      of_gain.add_to(dw + i);
      of_bias.add(lanes(g));
      of_bias.add_to(db + i);
      q[0] = g * load(gain + i);
      q[1] = q[0] * from_mu;
      q[2] = slope<P>(value - c, (F)p);
    });
  EACH(k, 3, out[k] = total(sums[k]));
}

template <class F, int P>
void input_elements(const Block& block, const void* x_, const void* dy_, void* dx_, double centre, double inverse, double constant,
                    double along, double p, const void* gain_) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  const F* gain = (const F*)gain_;
  F* dx = (F*)dx_;
  Pack<F> c = all((F)centre), a = all((F)inverse), b = all((F)constant), k = all((F)along);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from, dx += block.to)
    map<F>(block.length, [=](int64_t i) INLINE_LAMBDA {
      store(dx + i, load(dy + i) * (a * load(gain + i)) + (b + slope_times<P>(k, load(x + i) - c, (F)p)));
    });
}

// --- columns: every column of a block is a statistic; sums and coefficients are arrays of whole packs -----------------------

template <int N> struct Count {
  static constexpr int packs = N;
};
// fn(lanes, Count<W>, column) for tiles of W packs of columns
template <class F, class Fn> INLINE void tiles(int64_t columns, const Fn& fn) {
  constexpr int L = Pack<F>::lanes;
  int64_t c = 0;
  constexpr int most = 4 / Pack<F>::parts;  // their sums, of up to three values, are to stay in registers
  for (; c + most * L <= columns; c += most * L) fn(All{}, Count<most>{}, c);
  if constexpr (most == 4)
    for (; c + 2 * L <= columns; c += 2 * L) fn(All{}, Count<2>{}, c);
  for (; c < columns; c += L) {
    int64_t at = larger(0, smaller(c, columns - L));
    fn(Lanes<F>(c - at, columns - at), Count<1>{}, at);
  }
}

// sums[k·stride + column] += K values of each element; body(w, offset, q) gives those of the w-th pack of a tile
template <int K, int W, class F, class M, class Body>
INLINE void add_rows(const Block& block, const M& lanes, int64_t offset, double* sums, int64_t stride, const Body& body) {
  constexpr int L = Pack<F>::lanes;
  for (int64_t r = 0; r < block.rows; r += 8) {
    Pack<F> few[W][K] = {};
    int64_t end = smaller(8, block.rows - r);
    _Pragma("GCC unroll 1") for (int64_t j = 0; j < end; j++, offset += block.from)
      EACH(w, W, {
        Pack<F> q[K];
        body(w, offset + w * L, q);
        EACH(k, K, few[w][k] = few[w][k] + q[k]);
      });
    EACH(w, W, EACH(k, K, {
      Sum<F> sum;
      sum.add(lanes(few[w][k]));
      sum.add_to(sums + k * stride + w * L);
    }));
  }
}

template <class F> void sum_columns(const Block& block, const void* x_, double* out) {
  const F* x = (const F*)x_;
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINE_LAMBDA {
    add_rows<1, decltype(count)::packs, F>(block, lanes, c, out + c, 0, [=, &block](int, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + block.next);
      q[0] = load(x + i);
    });
  });
}

// centre may be null, for 0
template <class F> INLINE Pack<F> load_or(const F* p, int64_t i, F otherwise) { return p ? load(p + i) : all(otherwise); }

template <class F, int P> void powers_columns(const Block& block, const void* x_, const void* centre_, double p, double* out) {
  const F* x = (const F*)x_;
  const F* centre = (const F*)centre_;
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
    Pack<F> from[W];
    EACH(w, W, from[w] = load_or(centre, c + w * L, (F)0));
    add_rows<1, W, F>(block, lanes, c, out + c, 0, [&](int w, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + block.next);
      q[0] = power<P>(load(x + i) - from[w], (F)p);
    });
  });
}

// sums += Σ d, sums[stride…] += Σ d², where d = x − centre
template <class F> void moments_columns(const Block& block, const void* x_, const void* centre_, double* sums, int64_t stride) {
  const F *x = (const F*)x_, *centre = (const F*)centre_;
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
    Pack<F> from[W];
    EACH(w, W, from[w] = load(centre + c + w * L));
    add_rows<2, W, F>(block, lanes, c, sums + c, stride, [&](int w, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + block.next);
      q[0] = load(x + i) - from[w];
      q[1] = q[0] * q[0];
    });
  });
}

template <class F> void output_columns(const Block& block, const void* x_, void* y_, const void* mu_, const void* scale_, const void* shift_) {
  const F* x = (const F*)x_;
  F* y = (F*)y_;
  const F *mu = (const F*)mu_, *scale = (const F*)scale_, *shift = (const F*)shift_;
  writing(block, y, [=, &block](auto put) INLINE_LAMBDA {
    tiles<F>(block.length, [=, &block](auto, auto count, int64_t c) INLINE_LAMBDA {
      constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
      Pack<F> m[W], a[W], b[W];
      EACH(w, W, {
        m[w] = load(mu + c + w * L);
        a[w] = load(scale + c + w * L);
        b[w] = load_or(shift, c + w * L, (F)0);
      });
      int64_t i = c, o = c;
      for (int64_t r = 0; r < block.rows; r++, i += block.from, o += block.to)
        EACH(w, W, {
          fetch(x + i + w * L + block.next);
          put(y + o + w * L, (load(x + i + w * L) - m[w]) * a[w] + b[w]);
        });
    });
  });
}

// keep(number of a pack, x − centre) sees each pack, too.
template <class F, int P, class Keep>
INLINE void gradients_columns(const Block& block, const void* x_, const void* dy_, const void* mu_, bool centered, double p, double* out, int64_t stride,
                              const Keep& keep) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  const F* mu = (const F*)mu_;
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
    Pack<F> m[W], from[W];
    EACH(w, W, {
      m[w] = load(mu + c + w * L);
      from[w] = centered ? m[w] : all((F)0);
    });
    add_rows<3, W, F>(block, lanes, c, out + c, stride, [&](int w, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      fetch(x + i + block.next);
      fetch(dy + i + block.next);
      Pack<F> value = load(x + i), d = value - from[w];
      q[0] = load(dy + i);
      q[1] = q[0] * (value - m[w]);
      q[2] = slope<P>(d, (F)p);
      keep(i / L, d);
    });
  });
}
template <class F, int P>
void gradients_columns(const Block& block, const void* x, const void* dy, const void* mu, bool centered, double p, double* out, int64_t stride) {
  gradients_columns<F, P>(block, x, dy, mu, centered, p, out, stride, [](int64_t, const Pack<F>&) INLINE_LAMBDA {});
}

template <class F, int P>
void input_columns(const Block& block, const void* x_, const void* dy_, void* dx_, const void* centre_, const void* scale_,
                   const void* constant_, const void* along_, double p) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  F* dx = (F*)dx_;
  const F *centre = (const F*)centre_, *scale = (const F*)scale_, *constant = (const F*)constant_, *along = (const F*)along_;
  writing(block, dx, [=, &block](auto put) INLINE_LAMBDA {
    tiles<F>(block.length, [=, &block](auto, auto count, int64_t c) INLINE_LAMBDA {
      constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
      Pack<F> from[W], a[W], b[W], k[W];
      EACH(w, W, {
        from[w] = load_or(centre, c + w * L, (F)0);
        a[w] = load(scale + c + w * L);
        b[w] = load(constant + c + w * L);
        k[w] = load(along + c + w * L);
      });
      int64_t i = c;
      for (int64_t r = 0; r < block.rows; r++, i += block.from)
        EACH(w, W, {
          Pack<F> d = load(x + i + w * L) - from[w];
          fetch(x + i + w * L + block.next);
          fetch(dy + i + w * L + block.next);
          put(dx + i + w * L, load(dy + i + w * L) * a[w] + (b[w] + slope_times<P>(k[w], d, (F)p)));
        });
    });
  });
}

// For p = 1 the input's gradient needs no more of x than the signs of x − centre: the first function leaves them, a word for each
// pack, and the second takes them. Columns are whole packs, side by side. With AVX-512 alone signs come for less than x itself.
#if ISA_BYTES == 64
template <class F>
void gradients_signs_columns(const Block& block, const void* x, const void* dy, const void* mu, bool centered, double* out, int64_t stride, uint32_t* signs) {
  gradients_columns<F, 1>(block, x, dy, mu, centered, 1, out, stride,
                          [=](int64_t pack, const Pack<F>& d) INLINE_LAMBDA { signs[pack] = signs_of(d); });
}
template <class F>
void input_signs_columns(const Block& block, const uint32_t* signs, const void* dy_, void* dx_, const void* scale_, const void* constant_, const void* along_) {
  const F* dy = (const F*)dy_;
  F* dx = (F*)dx_;
  const F *scale = (const F*)scale_, *constant = (const F*)constant_, *along = (const F*)along_;
  writing(block, dx, [=, &block](auto put) INLINE_LAMBDA {
    tiles<F>(block.length, [=, &block](auto, auto count, int64_t c) INLINE_LAMBDA {
      constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
      Pack<F> a[W], b[W], k[W];
      EACH(w, W, {
        a[w] = load(scale + c + w * L);
        b[w] = load(constant + c + w * L);
        k[w] = load(along + c + w * L);
      });
      int64_t i = c;
      for (int64_t r = 0; r < block.rows; r++, i += block.from)
        EACH(w, W, {
          fetch(dy + i + w * L + block.next);
          put(dx + i + w * L, load(dy + i + w * L) * a[w] + (b[w] + signed_by(k[w], signs[i / L + w])));
        });
    });
  });
}
#endif

// --- the stream, over a range [from, to) of statistics ------------------------------------------------------------------------

// The formulas below serve a register of statistics at a time (Doubles) and one (double). What GCC makes of vectors wider than a
// register takes three times as long.
typedef double Doubles __attribute__((vector_size(ISA_BYTES)));
typedef int64_t Longs __attribute__((vector_size(ISA_BYTES)));
typedef float Floats __attribute__((vector_size(ISA_BYTES / 2)));
template <class D> struct Like {
  typedef Longs Mask;
  typedef Floats Float;
#if ISA_BYTES == 64
  static INLINE Doubles wide(const Floats& v) { return (Doubles)_mm512_cvtps_pd((__m256)v); }
  static INLINE Floats narrow(const Doubles& v) { return (Floats)_mm512_cvtpd_ps((__m512d)v); }
  static INLINE Doubles wide(const Longs& v) { return __builtin_convertvector(v, Doubles); }
#else
#if ISA_BYTES == 32
  static INLINE Doubles wide(const Floats& v) { return (Doubles)_mm256_cvtps_pd((__m128)v); }  // GCC widens by halves
#else
  static INLINE Doubles wide(const Floats& v) { return __builtin_convertvector(v, Doubles); }
#endif
  static INLINE Floats narrow(const Doubles& v) { return __builtin_convertvector(v, Floats); }
  // Of counts, which are less than 2^52: they are the last bits of 2^52 and them. There is no instruction for it.
  static INLINE Doubles wide(const Longs& v) { return (Doubles)(v | (Longs)(Doubles{} + 0x1p52)) - 0x1p52; }
#endif
};
template <> struct Like<double> {
  typedef int64_t Mask;
  typedef float Float;
  static INLINE double wide(float v) { return v; }
  static INLINE double wide(int64_t v) { return (double)v; }
  static INLINE float narrow(double v) { return (float)v; }
};

template <class D> INLINE D get(const double* p) {
  D r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
template <class D> INLINE D get(const float* p) {
  typename Like<D>::Float r;
  __builtin_memcpy(&r, p, sizeof r);
  return Like<D>::wide(r);
}
template <class D> INLINE D get(const int64_t* p) {
  typename Like<D>::Mask r;
  __builtin_memcpy(&r, p, sizeof r);
  return Like<D>::wide(r);
}
template <class D> INLINE void put(double* p, const D& v) { __builtin_memcpy(p, &v, sizeof v); }
template <class D> INLINE void put(float* p, const D& v) {
  typename Like<D>::Float r = Like<D>::narrow(v);
  __builtin_memcpy(p, &r, sizeof r);
}
template <class D, class Fn> INLINE D each(const D& v, const Fn& fn) {
  constexpr int n = sizeof(D) / 8;
  double values[n];
  put(values, v);
  for (int i = 0; i < n; i++) values[i] = fn(values[i]);
  return get<D>(values);
}
INLINE int64_t below(double a, double b) { return a < b ? -1 : 0; }
INLINE Longs below(const Doubles& a, const Doubles& b) { return a < b; }
INLINE double choose(int64_t mask, double yes, double no) { return mask ? yes : no; }
INLINE Doubles choose(const Longs& mask, const Doubles& yes, const Doubles& no) { return (Doubles)(((Longs)yes & mask) | ((Longs)no & ~mask)); }
// Whether v is finite, also once it is rounded to F.
template <class F, class D> INLINE typename Like<D>::Mask finite(const D& v) {
  D limit = D{} + (sizeof(F) == 4 ? 0x1.ffffffp127 : __builtin_inf());
  return below(v, limit) & below(-limit, v);
}

// fn(i, a value of the type to calculate with) for i in [from, to), a register at a time where there are as many
template <class Fn> INLINE void each_statistic(int64_t from, int64_t to, const Fn& fn) {
  constexpr int64_t lanes = sizeof(Doubles) / sizeof(double);
  int64_t i = from;
  for (; i + lanes <= to; i += lanes) fn(i, Doubles{});
  for (; i < to; i++) fn(i, 0.0);
}

// What a use does to the stream of an index, and what it then sees (docs/mathematics.md). Usual: it sees both averages
// and not the present, and all indices have counted as much (until a value is not finite). To know so saves half the time.
template <class F, bool usual> struct Stream {
  const F* lasting;
  F* recent;
  int64_t *count, G, elements;
  double n, per_n, w1, w2, w3, common_share;

  INLINE Stream(const Call& call, int64_t from)
      : lasting((const F*)call.lasting), recent((F*)call.recent), count(call.count), G(call.layout->G), elements(call.n),
        n((double)call.n), per_n(1 / n), w1(call.mix[0]), w2(call.mix[1]), w3(call.mix[2]),
        common_share(usual ? n / ((double)count[from] + n) : 0) {}

  INLINE bool on() const { return usual || lasting; }
  // This call's share in the short-term average.
  template <class D> INLINE D share(int64_t i) const {
    if (usual) return D{} + common_share;
    return on() ? n / (get<D>(count + i) + n) : D{};
  }
  // The short-term average, and what this call makes of it.
  template <class D> struct Recent {
    D before, after;
  };
  template <class D> INLINE Recent<D> average(int row, int64_t i, const D& share, const D& value) const {
    if (!on()) return {D{}, D{}};
    D before = get<D>(recent + row * G + i);
    return {before, before + (value - before) * share};
  }
  // A weight of zero keeps a value out altogether.
  template <class D> INLINE D see(int row, int64_t i, const Recent<D>& average, const D& value) const {
    D seen = !usual && w3 != 0 ? w3 * value : D{};
    if (!on()) return seen;
    if (usual || w2 != 0) seen = w2 * average.after + seen;
    if (usual || w1 != 0) seen = w1 * get<D>(lasting + row * G + i) + seen;
    return seen;
  }
  template <class D>
  INLINE void advance(int64_t i, const Recent<D>& mu, const Recent<D>& m, const typename Like<D>::Mask& keep) const {
    if (!on()) return;
    typename Like<D>::Mask counted;
    __builtin_memcpy(&counted, count + i, sizeof counted);
    counted += keep & elements;
    put(recent + i, choose(keep, mu.after, mu.before));
    put(recent + G + i, choose(keep, m.after, m.before));
    __builtin_memcpy(count + i, &counted, sizeof counted);
  }
};

INLINE bool counts_alike(const int64_t* count, int64_t from, int64_t to) {
  Longs differences = {};
  int64_t i = from;
  for (constexpr int64_t lanes = sizeof(Longs) / sizeof(int64_t); i + lanes <= to; i += lanes) {
    Longs counts;
    __builtin_memcpy(&counts, count + i, sizeof counts);
    differences |= counts ^ count[from];
  }
  int64_t difference = 0;
  for (; i < to; i++) difference |= count[i] ^ count[from];
  for (int64_t l = 0; l < (int64_t)(sizeof(Longs) / sizeof(int64_t)); l++) difference |= differences[l];
  return difference == 0;
}
// fn(the stream), for the statistics in [from, to)
template <class F, class Fn> INLINE void with_stream(const Call& call, int64_t from, int64_t to, const Fn& fn) {
  bool sees_averages = call.lasting && call.mix[0] != 0 && call.mix[1] != 0 && call.mix[2] == 0;
  if (sees_averages && from < to && counts_alike(call.count, from, to)) fn(Stream<F, true>(call, from));
  else fn(Stream<F, false>(call, from));
}

// mu, from sums over x
template <class F> void locations(const Call& call, int64_t from, int64_t to, const double* sums) {
  F* mu = (F*)call.saved;
  with_stream<F>(call, from, to, [=](auto stream) INLINE_LAMBDA {
    each_statistic(from, to, [=](int64_t i, auto kind) INLINE_LAMBDA {
      typedef decltype(kind) D;
      D share = stream.template share<D>(i), b_mu = get<D>(sums + i - from) * stream.per_n;
      put(mu + i, stream.see(0, i, stream.average(0, i, share, b_mu), b_mu));
    });
  });
}

// To use: 1/s and the slope sigma²/(p·m·s³) of the normalized value in m; m too where it is asked for.
// To advance: the state; and the slope becomes NaN where a statistic is not finite.
template <class F, int P> void scales(const Call& call, int64_t from, int64_t to, const double* sums, const double* powers, bool use, bool advance) {
  F *inverse = (F*)call.saved + call.layout->G, *slope = inverse + call.layout->G;
  double *moments = call.moments, k2 = call.formula->k * call.formula->k, p = call.formula->p, eps = call.formula->eps;
  with_stream<F>(call, from, to, [=](auto stream) INLINE_LAMBDA {
    each_statistic(from, to, [=](int64_t i, auto kind) INLINE_LAMBDA {
      typedef decltype(kind) D;
      D share = stream.template share<D>(i), b_m = get<D>(powers + i - from) * stream.per_n;
      auto average_m = stream.average(1, i, share, b_m);
      if (use) {
        D m = stream.see(1, i, average_m, b_m);
        D sigma2 = P == 1 ? k2 * m * m : P == 2 ? k2 * m : k2 * each(m, [=](double v) INLINE_LAMBDA { return pow(v, 2 / p); });
        D lift = P == 1 ? m : P == 2 ? D{} + 1 : each(m, [=](double v) INLINE_LAMBDA { return v > 0 ? pow(v, 2 / p - 1) : 0; });
        D r = 1 / each(sigma2 + eps, [](double v) INLINE_LAMBDA { return __builtin_sqrt(v); });
        put(inverse + i, r);
        put(slope + i, k2 / p * lift * r * r * r);
        if (moments) put(moments + i, m);
      }
      if (advance) {
        D b_mu = get<D>(sums + i - from) * stream.per_n;
        auto keep = finite<F>(b_mu) & finite<F>(b_m);
        put(slope + i, choose(keep, get<D>(slope + i), D{} + __builtin_nan("")));
        stream.advance(i, stream.average(0, i, share, b_mu), average_m, keep);
      }
    });
  });
}

// From the sums of dx̂, dx̂·(x − mu) and u. To use: dx = dx̂/s + constant + along·u. To advance: the state.
template <class F>
void stream_gradients(const Call& call, int64_t from, int64_t to, const double* sums, const double* sums_from_mu, const double* sums_of_u,
                      void* constant_, void* along_, bool use, bool advance) {
  const F *inverse = (const F*)call.saved + call.layout->G, *slope = inverse + call.layout->G;
  F *constant = (F*)constant_ - from, *along = (F*)along_ - from;
  double p = call.formula->p, scale = call.grad_scale;
  bool centered = call.formula->centered;
  with_stream<F>(call, from, to, [=](auto stream) INLINE_LAMBDA {
    double per_element = stream.per_n / scale;
    each_statistic(from, to, [=](int64_t i, auto kind) INLINE_LAMBDA {
      typedef decltype(kind) D;
      int64_t j = i - from;
      D share = stream.template share<D>(i), lift = get<D>(slope + i);
      D g_m = -(get<D>(sums_from_mu + j) * per_element) * lift;
      auto average_m = stream.average(1, i, share, g_m);
      D moment = choose(below(lift, D{} + __builtin_inf()), stream.see(1, i, average_m, g_m), D{});  // 0 where the slope is NaN
      D g_mu = -(get<D>(sums + j) * per_element) * get<D>(inverse + i);
      if (centered) g_mu -= choose(moment == D{}, D{}, moment * p * (get<D>(sums_of_u + j) * stream.per_n));
      auto average_mu = stream.average(0, i, share, g_mu);
      if (use) {
        put(constant + i, stream.see(0, i, average_mu, g_mu) * scale);
        put(along + i, p * moment * scale);
      }
      if (advance) stream.advance(i, average_mu, average_m, finite<F>(g_m) & finite<F>(g_mu));
    });
  });
}

// Add to the gradients of gain and bias, then turn sums over dy into sums over dx̂ = dy·gain.
template <class F>
void parameter_gradients(const Call& call, int64_t from, int64_t to, double* sums, double* sums_from_mu, const void* gain_, double* dw, double* db) {
  const F *inverse = (const F*)call.saved + call.layout->G, *gain = (const F*)gain_;
  each_statistic(from, to, [=](int64_t i, auto kind) INLINE_LAMBDA {
    typedef decltype(kind) D;
    int64_t c = i - from;
    D sum = get<D>(sums + c), sum_from_mu = get<D>(sums_from_mu + c);
    put(dw + c, get<D>(dw + c) + sum_from_mu * get<D>(inverse + i));
    put(db + c, get<D>(db + c) + sum);
    if (!gain) return;
    put(sums + c, sum * get<D>(gain + c));
    put(sums_from_mu + c, sum_from_mu * get<D>(gain + c));
  });
}

// out = sums / rows
template <class F> void means(int64_t columns, double rows, const double* sums, void* out_) {
  F* out = (F*)out_;
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINE_LAMBDA { put(out + i, get<decltype(kind)>(sums + i) / rows); });
}
// Mean and sum of squared deviations from it, over `before` rows, made to cover `rows` further ones, of which Σ d and Σ d² are
// given, d counted from their centre (Chan, Golub and LeVeque 1979).
template <class F>
void merge_moments(int64_t columns, double before, double rows, const void* centre_, const double* sums, const double* squares, double* mean,
                   double* deviations) {
  const F* centre = (const F*)centre_;
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINE_LAMBDA {
    typedef decltype(kind) D;
    D rest = get<D>(sums + i) / rows, old = get<D>(mean + i), apart = get<D>(centre + i) + rest - old, all = get<D>(squares + i);
    put(mean + i, old + apart * (rows / (before + rows)));
    D within = all - rest * rest * rows;
    within = choose(below(within, D{}), D{}, within);                    // rounding may take it below 0
    within = choose(below(all, D{} + __builtin_inf()), within, all);     // inf − inf is NaN
    D between = before == 0 ? D{} : apart * apart * (before * rows / (before + rows));  // and so is 0·inf
    put(deviations + i, get<D>(deviations + i) + within + between);
  });
}
// sums += rows·mean
void add_means(int64_t columns, double rows, const double* mean, double* sums) {
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINE_LAMBDA {
    typedef decltype(kind) D;
    put(sums + i, get<D>(sums + i) + get<D>(mean + i) * rows);
  });
}
// powers += Σ (x − mu)²
template <class F> void add_squares(int64_t columns, double rows, const void* mu_, const double* mean, const double* deviations, double* powers) {
  const F* mu = (const F*)mu_;
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINE_LAMBDA {
    typedef decltype(kind) D;
    D apart = get<D>(mean + i) - get<D>(mu + i);
    put(powers + i, get<D>(powers + i) + get<D>(deviations + i) + apart * apart * rows);
  });
}

void narrow_sums(const double* from, float* to, int64_t count) {
  each_statistic(0, count, [=](int64_t i, auto kind) INLINE_LAMBDA { put(to + i, get<decltype(kind)>(from + i)); });
}

// out = (1/s)·gain, for columns
template <class F> void column_scales(const Call& call, int64_t from, int64_t to, const void* gain_, void* out_) {
  const F *inverse = (const F*)call.saved + call.layout->G + from, *gain = (const F*)gain_;
  F* out = (F*)out_;
  each_statistic(0, to - from, [=](int64_t i, auto kind) INLINE_LAMBDA {
    typedef decltype(kind) D;
    put(out + i, gain ? get<D>(inverse + i) * get<D>(gain + i) : get<D>(inverse + i));
  });
}

// --- one table of loops for each type of statistics and p ----------------------------------------------------------------------

template <class F, int P> const Kernels* table() {
  static const Kernels kernels = {
      widen<BFloat16>,
      widen<Float16>,
      narrow<BFloat16>,
      narrow<Float16>,
      gather<F>,
      sum<F>,
      powers<F, P>,
      output<F>,
      gradients<F, P>,
      input<F, P>,
      output_elements<F>,
      gradients_elements<F, P>,
      input_elements<F, P>,
      sum_columns<F>,
      powers_columns<F, P>,
      moments_columns<F>,
      output_columns<F>,
      gradients_columns<F, P>,
      input_columns<F, P>,
#if ISA_BYTES == 64
      gradients_signs_columns<F>,
      input_signs_columns<F>,
#else
      nullptr,
      nullptr,
#endif
      locations<F>,
      scales<F, P>,
      stream_gradients<F>,
      parameter_gradients<F>,
      means<F>,
      merge_moments<F>,
      add_means,
      add_squares<F>,
      narrow_sums,
      column_scales<F>,
  };
  return &kernels;
}
template <class F> const Kernels* table(double p) { return p == 1 ? table<F, 1>() : p == 2 ? table<F, 2>() : table<F, 0>(); }
const Kernels* kernels(bool wide, double p) { return wide ? table<double>(p) : table<float>(p); }

}  // namespace ISA

#undef INLINE
#undef INLINE_LAMBDA
#undef NOINLINE
#undef EACH
#undef EACH_AT
#undef EACH_PART
