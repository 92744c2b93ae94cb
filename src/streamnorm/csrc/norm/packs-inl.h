// Packs of 64 bytes, whatever the register width: arithmetic, memory, conversions, and sums in a fixed order. See kernels-inl.h.

namespace ISA {

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
  each_register(count, [=](int64_t i, int n) INLINED {
    U16 h = {};
    __builtin_memcpy(&h, (const T*)from + i, n * sizeof(T));
    F32 f = widened(T{}, __builtin_convertvector(h, U32));
    __builtin_memcpy(to + i, &f, n * sizeof(float));
  });
}
template <class T> void narrow(const float* from, void* to, int64_t count) {
  each_register(count, [=](int64_t i, int n) INLINED {
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

}  // namespace ISA
