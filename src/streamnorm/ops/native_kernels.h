// The loops of the C++ engine, each over a block of memory or a range of statistics; native.cpp puts them together.
// It includes this file once per instruction set, with ISA (the namespace) and ISA_BYTES (the width of a register) set;
// there is therefore no include guard.
//
// Every loop works on packs of 64 bytes, whatever the register width, and every sum is folded in the same order
// (packs in fours, then in double precision, then over chunks of fixed size). So neither the instruction set nor the
// number of threads changes a single bit of a result.

namespace ISA {

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// --- packs ---------------------------------------------------------------------------------------------------------

template <class F> struct Register;
template <> struct Register<float> {
  typedef float V __attribute__((vector_size(ISA_BYTES)));
  typedef int32_t I __attribute__((vector_size(ISA_BYTES)));
  typedef uint32_t U __attribute__((vector_size(ISA_BYTES)));
  typedef float Half __attribute__((vector_size(ISA_BYTES / 2)));
  typedef uint16_t Narrow __attribute__((vector_size(ISA_BYTES / 2)));
  static constexpr int32_t magnitude = 0x7fffffff, one = 0x3f800000;
};
template <> struct Register<double> {
  typedef double V __attribute__((vector_size(ISA_BYTES)));
  typedef int64_t I __attribute__((vector_size(ISA_BYTES)));
  static constexpr int64_t magnitude = 0x7fffffffffffffffLL, one = 0x3ff0000000000000LL;
};

template <class F> struct Pack {
  typedef typename Register<F>::V V;
  typedef typename Register<F>::I I;
  static constexpr int lanes = 64 / sizeof(F), parts = 64 / ISA_BYTES, per_part = ISA_BYTES / sizeof(F);
  V v[parts];
};

#define EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < Pack<F>::parts; i++)

template <class F> INLINE Pack<F> operator+(Pack<F> a, const Pack<F>& b) { EACH_PART a.v[i] += b.v[i]; return a; }
template <class F> INLINE Pack<F> operator-(Pack<F> a, const Pack<F>& b) { EACH_PART a.v[i] -= b.v[i]; return a; }
template <class F> INLINE Pack<F> operator*(Pack<F> a, const Pack<F>& b) { EACH_PART a.v[i] *= b.v[i]; return a; }

template <class F> INLINE Pack<F> all(F value) {
  Pack<F> r;
  EACH_PART r.v[i] = value - typename Pack<F>::V{};
  return r;
}

template <class F> INLINE Pack<F> absolute(Pack<F> a) {
  EACH_PART a.v[i] = (typename Pack<F>::V)((typename Pack<F>::I)a.v[i] & Register<F>::magnitude);
  return a;
}

// k·sgn(d), 0 where d is 0.
template <class F> INLINE Pack<F> signed_as(const Pack<F>& k, const Pack<F>& d) {
  typedef typename Pack<F>::I I;
  Pack<F> r;
  EACH_PART {
    I nonzero = (I)(d.v[i] != typename Pack<F>::V{});
    I sign = (I)d.v[i] & ~Register<F>::magnitude;
    r.v[i] = (typename Pack<F>::V)(((I)k.v[i] ^ sign) & nonzero);
  }
  return r;
}

// --- memory: storage type T, arithmetic in F = Wide<T> ----------------------------------------------------------------

template <class T> struct Wide { typedef float F; };
template <> struct Wide<double> { typedef double F; };

typedef Register<float>::U U32;
typedef Register<float>::I I32;
typedef Register<float>::V F32;
typedef Register<float>::Narrow U16;

INLINE U32 select(I32 mask, U32 yes, U32 no) { return (yes & (U32)mask) | (no & ~(U32)mask); }

INLINE F32 bfloat_widen(U32 h) { return (F32)(h << 16); }
INLINE U32 bfloat_narrow(F32 f) {
  U32 u = (U32)f;
  U32 nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return select((I32)(f != f), U32{} + 0x7fc0, nearest);
}
INLINE F32 half_widen(U32 h) {
  U32 shifted = (h & 0x7fff) << 13;
  U32 finite = (U32)((F32)shifted * 0x1p112f);
  U32 bits = select((I32)(shifted >= 0x0f800000), shifted | 0x7f800000, finite);
  return (F32)(bits | (h & 0x8000) << 16);
}
INLINE U32 half_narrow(F32 f) {
  U32 u = (U32)f, sign = (u >> 16) & 0x8000;
  U32 a = u & 0x7fffffff;
  U32 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  U32 small = (U32)((F32)a + 0.5f) - 0x3f000000;  // below 2^-14: the addition rounds to multiples of 2^-24
  U32 r = select((I32)(a < 0x38800000), small, normal);
  r = select((I32)(a >= 0x477ff000), U32{} + 0x7c00, r);
  r = select((I32)(a > 0x7f800000), U32{} + 0x7e00, r);
  return r | sign;
}

INLINE F32 widen_as(BFloat16, U32 h) { return bfloat_widen(h); }
INLINE F32 widen_as(Float16, U32 h) { return half_widen(h); }
INLINE U32 narrow_as(BFloat16, F32 f) { return bfloat_narrow(f); }
INLINE U32 narrow_as(Float16, F32 f) { return half_narrow(f); }

template <class T> INLINE void read(const T* p, Pack<float>& r) {
  typedef float F;
  EACH_PART {
    U16 h;
    __builtin_memcpy(&h, p + i * Pack<F>::per_part, sizeof h);
    r.v[i] = widen_as(T{}, __builtin_convertvector(h, U32));
  }
}
template <class T> INLINE void write(T* p, const Pack<float>& r) {
  typedef float F;
  EACH_PART {
    U16 h = __builtin_convertvector(narrow_as(T{}, r.v[i]), U16);
    __builtin_memcpy(p + i * Pack<F>::per_part, &h, sizeof h);
  }
}
INLINE void read(const float* p, Pack<float>& r) { __builtin_memcpy(r.v, p, 64); }
INLINE void write(float* p, const Pack<float>& r) { __builtin_memcpy(p, r.v, 64); }
INLINE void read(const double* p, Pack<double>& r) { __builtin_memcpy(r.v, p, 64); }
INLINE void write(double* p, const Pack<double>& r) { __builtin_memcpy(p, r.v, 64); }

// How much of a pack lies inside the array: all of it, or its first `count` lanes. Lanes outside read as `fill`.
struct Full {
  template <class T, class F> INLINE Pack<F> load(const T* p, F) const {
    Pack<F> r;
    read(p, r);
    return r;
  }
  template <class T, class F> INLINE void store(T* p, const Pack<F>& r) const { write(p, r); }
};
template <class T, class F> NOINLINE void copy_in(const T* p, int count, F fill, F* wide) {
  alignas(64) T buffer[Pack<F>::lanes] = {};
  for (int i = 0; i < count; i++) buffer[i] = p[i];
  Pack<F> r;
  read(buffer, r);
  write(wide, r);
  for (int i = count; i < Pack<F>::lanes; i++) wide[i] = fill;
}
template <class T, class F> NOINLINE void copy_out(T* p, int count, const F* wide) {
  alignas(64) T buffer[Pack<F>::lanes];
  Pack<F> r;
  read(wide, r);
  write(buffer, r);
  for (int i = 0; i < count; i++) p[i] = buffer[i];
}
struct Some {
  int count;
  template <class T, class F> INLINE Pack<F> load(const T* p, F fill) const {
    alignas(64) F wide[Pack<F>::lanes];
    Pack<F> r;
    copy_in(p, count, fill, wide);
    read(wide, r);
    return r;
  }
  template <class T, class F> INLINE void store(T* p, const Pack<F>& r) const {
    alignas(64) F wide[Pack<F>::lanes];
    write(wide, r);
    copy_out(p, count, wide);
  }
};

// --- sums ------------------------------------------------------------------------------------------------------------

typedef Register<double>::V F64;

INLINE void widen(F32 x, F64& low, F64& high) {
  Register<float>::Half a, b;
  __builtin_memcpy(&a, &x, sizeof a);
  __builtin_memcpy(&b, (const char*)&x + sizeof a, sizeof b);
  low = __builtin_convertvector(a, F64);
  high = __builtin_convertvector(b, F64);
}

// A sum in double precision, one per lane of a pack.
template <class F> struct Sum;
template <> struct Sum<float> {
  F64 v[2 * Pack<float>::parts] = {};
  INLINE void add(const Pack<float>& a) {
    typedef float F;
    EACH_PART {
      F64 low, high;
      widen(a.v[i], low, high);
      v[2 * i] += low;
      v[2 * i + 1] += high;
    }
  }
  INLINE void add_to(double* p) const {
    F64 old[2 * Pack<float>::parts];
    __builtin_memcpy(old, p, sizeof old);
    for (int i = 0; i < 2 * Pack<float>::parts; i++) old[i] += v[i];
    __builtin_memcpy(p, old, sizeof old);
  }
};
template <> struct Sum<double> {
  F64 v[Pack<double>::parts] = {};
  INLINE void add(const Pack<double>& a) {
    typedef double F;
    EACH_PART v[i] += a.v[i];
  }
  INLINE void add_to(double* p) const {
    F64 old[Pack<double>::parts];
    __builtin_memcpy(old, p, sizeof old);
    for (int i = 0; i < Pack<double>::parts; i++) old[i] += v[i];
    __builtin_memcpy(p, old, sizeof old);
  }
};
template <class F> INLINE double total(const Sum<F>& s) {
  constexpr int n = Pack<F>::lanes;
  alignas(64) double lane[n];
  __builtin_memcpy(lane, s.v, sizeof lane);
  for (int half = n / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// Sum K values over n elements. body(part, i, q) puts the values of the pack at i into q[0..K).
template <int K, class F, class Body> INLINE void reduce(int64_t n, Sum<F>* sums, const Body& body) {
  constexpr int L = Pack<F>::lanes;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    Pack<F> a[K], b[K], c[K], d[K];
    body(Full{}, i, a);
    body(Full{}, i + L, b);
    body(Full{}, i + 2 * L, c);
    body(Full{}, i + 3 * L, d);
    for (int k = 0; k < K; k++) sums[k].add((a[k] + b[k]) + (c[k] + d[k]));
  }
  for (; i + L <= n; i += L) {
    Pack<F> a[K];
    body(Full{}, i, a);
    for (int k = 0; k < K; k++) sums[k].add(a[k]);
  }
  if (i < n) {
    Pack<F> a[K];
    body(Some{(int)(n - i)}, i, a);
    for (int k = 0; k < K; k++) sums[k].add(a[k]);
  }
}

// Write n elements. The last pack overlaps the one before, so body must not read what it writes.
template <class F, class Body> INLINE void map(int64_t n, const Body& body) {
  constexpr int L = Pack<F>::lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) body(Full{}, i);
  if (i == n) return;
  if (n >= L) body(Full{}, n - L);
  else body(Some{(int)(n - i)}, i);
}

// --- the formula: P is 1, 2, or 0 for any other p -------------------------------------------------------------------------

template <class F> INLINE F raise(F base, F exponent) { return sizeof(F) == 4 ? powf((float)base, (float)exponent) : pow(base, exponent); }

template <class F, class Fn> INLINE Pack<F> each_lane(const Pack<F>& a, const Fn& fn) {
  alignas(64) F lane[Pack<F>::lanes];
  write(lane, a);
  for (int i = 0; i < Pack<F>::lanes; i++) lane[i] = fn(lane[i]);
  Pack<F> r;
  read(lane, r);
  return r;
}

// |d|^p
template <int P, class F> INLINE Pack<F> power(const Pack<F>& d, F p) {
  if (P == 1) return absolute(d);
  if (P == 2) return d * d;
  return each_lane(d, [p](F x) INLINE_LAMBDA { return raise<F>(x < 0 ? -x : x, p); });
}

// k·u,  u = |d|^(p-1)·sgn d.  With k = 0 it is 0 even where u overflowed.
template <int P, class F> INLINE Pack<F> slope_times(const Pack<F>& k, const Pack<F>& d, F p) {
  if (P == 1) return signed_as(k, d);
  if (P == 2) return k * d;
  F less = p - 1;
  Pack<F> u = each_lane(d, [less](F x) INLINE_LAMBDA {
    return x == 0 ? 0 : x < 0 ? -raise<F>(-x, less) : raise<F>(x, less);
  });
  Pack<F> r = k * u;
  typedef typename Pack<F>::I I;
  EACH_PART r.v[i] = (typename Pack<F>::V)((I)r.v[i] & (I)(k.v[i] != typename Pack<F>::V{}));
  return r;
}

template <class F> INLINE bool finite(F x) { return (x < 0 ? -x : x) <= (sizeof(F) == 4 ? (F)__FLT_MAX__ : (F)__DBL_MAX__); }

// --- loops over a block: `rows` stretches of `length` contiguous elements -------------------------------------------------

template <class T> double sum(const Block& block, const void* x_) {
  typedef typename Wide<T>::F F;
  Sum<F> sum;
  const T* x = (const T*)x_;
  for (int64_t r = 0; r < block.rows; r++, x += block.from)
    reduce<1>(block.length, &sum, [=](auto part, int64_t i, Pack<F>* q) INLINE_LAMBDA { q[0] = part.load(x + i, (F)0); });
  return total(sum);
}

// Σ |x − centre|^p
template <class T, int P> double powers(const Block& block, const void* x_, double centre, double p) {
  typedef typename Wide<T>::F F;
  Sum<F> sum;
  const T* x = (const T*)x_;
  Pack<F> c = all((F)centre);
  for (int64_t r = 0; r < block.rows; r++, x += block.from)
    reduce<1>(block.length, &sum, [=](auto part, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      q[0] = power<P>(part.load(x + i, (F)centre) - c, (F)p);
    });
  return total(sum);
}

// y = (x − mu)·scale + shift
template <class T> void output(const Block& block, const void* x_, void* y_, double mu, double scale, double shift) {
  typedef typename Wide<T>::F F;
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  Pack<F> m = all((F)mu), a = all((F)scale), b = all((F)shift);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, y += block.to)
    map<F>(block.length, [=](auto part, int64_t i) INLINE_LAMBDA { part.store(y + i, (part.load(x + i, (F)0) - m) * a + b); });
}

// Σ dy, Σ dy·(x − mu) and, where K = 3, Σ u
template <class T, int P, int K>
void gradients(const Block& block, const void* x_, const void* dy_, double mu, double centre, double p, double* out) {
  typedef typename Wide<T>::F F;
  const T *x = (const T*)x_, *dy = (const T*)dy_;
  Pack<F> m = all((F)mu), c = all((F)centre), one = all((F)1);
  Sum<F> sums[K];
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from)
    reduce<K>(block.length, sums, [=](auto part, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      Pack<F> g = part.load(dy + i, (F)0), value = part.load(x + i, (F)centre);
      q[0] = g;
      q[1] = g * (value - m);
      if (K == 3) q[2] = slope_times<P>(one, value - c, (F)p);
    });
  for (int k = 0; k < 3; k++) out[k] = k < K ? total(sums[k < K ? k : 0]) : 0;
}

// dx = dy·scale + constant + along·u
template <class T, int P>
void input(const Block& block, const void* x_, const void* dy_, void* dx_, double centre, double scale, double constant, double along, double p) {
  typedef typename Wide<T>::F F;
  const T *x = (const T*)x_, *dy = (const T*)dy_;
  T* dx = (T*)dx_;
  Pack<F> c = all((F)centre), a = all((F)scale), b = all((F)constant), k = all((F)along);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from, dx += block.to)
    map<F>(block.length, [=](auto part, int64_t i) INLINE_LAMBDA {
      part.store(dx + i, part.load(dy + i, (F)0) * a + (b + slope_times<P>(k, part.load(x + i, (F)centre) - c, (F)p)));
    });
}

// --- the same with a gain and a bias for each element of a stretch --------------------------------------------------------

template <class T> void output_elements(const Block& block, const void* x_, void* y_, double mu, double inverse, const void* gain_, const void* bias_) {
  typedef typename Wide<T>::F F;
  const T* x = (const T*)x_;
  const F *gain = (const F*)gain_, *bias = (const F*)bias_;
  T* y = (T*)y_;
  Pack<F> m = all((F)mu), a = all((F)inverse);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, y += block.to)
    map<F>(block.length, [=](auto part, int64_t i) INLINE_LAMBDA {
      part.store(y + i, (part.load(x + i, (F)0) - m) * (a * part.load(gain + i, (F)0)) + part.load(bias + i, (F)0));
    });
}

// Sums over dx̂ = dy·gain; dw and db, of double precision and padded to whole packs, receive the parameters' gradients.
template <class T, int P>
void gradients_elements(const Block& block, const void* x_, const void* dy_, double mu, double centre, double inverse, double p,
                        const void* gain_, double* dw, double* db, double* out) {
  typedef typename Wide<T>::F F;
  const T *x = (const T*)x_, *dy = (const T*)dy_;
  const F* gain = (const F*)gain_;
  Pack<F> m = all((F)mu), c = all((F)centre), a = all((F)inverse), one = all((F)1);
  Sum<F> sums[3];
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from)
    reduce<3>(block.length, sums, [=](auto part, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      Pack<F> g = part.load(dy + i, (F)0), value = part.load(x + i, (F)centre), from_mu = value - m;
      Sum<F> of_gain, of_bias;
      of_gain.add(g * from_mu * a);
      of_gain.add_to(dw + i);
      of_bias.add(g);
      of_bias.add_to(db + i);
      q[0] = g * part.load(gain + i, (F)0);
      q[1] = q[0] * from_mu;
      q[2] = slope_times<P>(one, value - c, (F)p);
    });
  for (int k = 0; k < 3; k++) out[k] = total(sums[k]);
}

template <class T, int P>
void input_elements(const Block& block, const void* x_, const void* dy_, void* dx_, double centre, double inverse, double constant,
                    double along, double p, const void* gain_) {
  typedef typename Wide<T>::F F;
  const T *x = (const T*)x_, *dy = (const T*)dy_;
  const F* gain = (const F*)gain_;
  T* dx = (T*)dx_;
  Pack<F> c = all((F)centre), a = all((F)inverse), b = all((F)constant), k = all((F)along);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from, dx += block.to)
    map<F>(block.length, [=](auto part, int64_t i) INLINE_LAMBDA {
      Pack<F> scaled = part.load(dy + i, (F)0) * (a * part.load(gain + i, (F)0));
      part.store(dx + i, scaled + (b + slope_times<P>(k, part.load(x + i, (F)centre) - c, (F)p)));
    });
}

// --- columns: every column of a block is a statistic; sums and coefficients are arrays, sums padded to whole packs ------------

template <int N> struct Packs {
  static constexpr int count = N;
};
// fn(part, Packs<W>, column), W packs of columns at a time
template <class F, class Fn> INLINE void tiles(int64_t columns, const Fn& fn) {
  constexpr int L = Pack<F>::lanes;
  int64_t c = 0;
  for (; c + 2 * L <= columns; c += 2 * L) fn(Full{}, Packs<2>{}, c);
  for (; c + L <= columns; c += L) fn(Full{}, Packs<1>{}, c);
  if (c < columns) fn(Some{(int)(columns - c)}, Packs<1>{}, c);
}

// sums[k·stride + column] += K values of each element; body(w, offset, q) gives those of the w-th pack of a tile
template <int K, int W, class F, class Body>
INLINE void add_rows(const Block& block, int64_t offset, double* sums, int64_t stride, const Body& body) {
  constexpr int L = Pack<F>::lanes;
  Sum<F> sum[W][K];
  int64_t r = 0, step = block.from;
  for (; r + 4 <= block.rows; r += 4, offset += 4 * step)
    for (int w = 0; w < W; w++) {
      Pack<F> a[K], b[K], c[K], d[K];
      body(w, offset + w * L, a);
      body(w, offset + w * L + step, b);
      body(w, offset + w * L + 2 * step, c);
      body(w, offset + w * L + 3 * step, d);
      for (int k = 0; k < K; k++) sum[w][k].add((a[k] + b[k]) + (c[k] + d[k]));
    }
  for (; r < block.rows; r++, offset += step)
    for (int w = 0; w < W; w++) {
      Pack<F> a[K];
      body(w, offset + w * L, a);
      for (int k = 0; k < K; k++) sum[w][k].add(a[k]);
    }
  for (int w = 0; w < W; w++)
    for (int k = 0; k < K; k++) sum[w][k].add_to(sums + k * stride + w * L);
}

template <class T> void sum_columns(const Block& block, const void* x_, double* out) {
  typedef typename Wide<T>::F F;
  const T* x = (const T*)x_;
  tiles<F>(block.length, [=](auto part, auto packs, int64_t c) INLINE_LAMBDA {
    add_rows<1, decltype(packs)::count, F>(block, c, out + c, 0, [=](int, int64_t i, Pack<F>* q) INLINE_LAMBDA { q[0] = part.load(x + i, (F)0); });
  });
}

// centre may be null, for 0
template <class T, int P> void powers_columns(const Block& block, const void* x_, const void* centre_, double p, double* out) {
  typedef typename Wide<T>::F F;
  const T* x = (const T*)x_;
  const F* centre = (const F*)centre_;
  tiles<F>(block.length, [=](auto part, auto packs, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(packs)::count, L = Pack<F>::lanes;
    Pack<F> from[W];
    for (int w = 0; w < W; w++) from[w] = centre ? part.load(centre + c + w * L, (F)0) : all((F)0);
    add_rows<1, W, F>(block, c, out + c, 0, [&](int w, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      q[0] = power<P>(part.load(x + i, (F)0) - from[w], (F)p);
    });
  });
}

template <class T> void output_columns(const Block& block, const void* x_, void* y_, const void* mu_, const void* scale_, const void* shift_) {
  typedef typename Wide<T>::F F;
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  const F *mu = (const F*)mu_, *scale = (const F*)scale_, *shift = (const F*)shift_;
  tiles<F>(block.length, [=](auto part, auto packs, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(packs)::count, L = Pack<F>::lanes;
    Pack<F> m[W], a[W], b[W];
    for (int w = 0; w < W; w++) {
      m[w] = part.load(mu + c + w * L, (F)0);
      a[w] = part.load(scale + c + w * L, (F)0);
      b[w] = shift ? part.load(shift + c + w * L, (F)0) : all((F)0);
    }
    int64_t i = c;
    for (int64_t r = 0; r < block.rows; r++, i += block.from)
      for (int w = 0; w < W; w++) part.store(y + i + w * L, (part.load(x + i + w * L, (F)0) - m[w]) * a[w] + b[w]);
  });
}

template <class T, int P, int K>
void gradients_columns(const Block& block, const void* x_, const void* dy_, const void* mu_, bool centered, double p, double* out, int64_t stride) {
  typedef typename Wide<T>::F F;
  const T *x = (const T*)x_, *dy = (const T*)dy_;
  const F* mu = (const F*)mu_;
  tiles<F>(block.length, [=](auto part, auto packs, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(packs)::count, L = Pack<F>::lanes;
    Pack<F> m[W], from[W], one = all((F)1);
    for (int w = 0; w < W; w++) {
      m[w] = part.load(mu + c + w * L, (F)0);
      from[w] = centered ? m[w] : all((F)0);
    }
    add_rows<K, W, F>(block, c, out + c, stride, [&](int w, int64_t i, Pack<F>* q) INLINE_LAMBDA {
      Pack<F> g = part.load(dy + i, (F)0), value = part.load(x + i, (F)0);
      q[0] = g;
      q[1] = g * (value - m[w]);
      if (K == 3) q[2] = slope_times<P>(one, value - from[w], (F)p);
    });
  });
}

template <class T, int P>
void input_columns(const Block& block, const void* x_, const void* dy_, void* dx_, const void* centre_, const void* scale_,
                   const void* constant_, const void* along_, double p) {
  typedef typename Wide<T>::F F;
  const T *x = (const T*)x_, *dy = (const T*)dy_;
  T* dx = (T*)dx_;
  const F *centre = (const F*)centre_, *scale = (const F*)scale_, *constant = (const F*)constant_, *along = (const F*)along_;
  tiles<F>(block.length, [=](auto part, auto packs, int64_t c) INLINE_LAMBDA {
    constexpr int W = decltype(packs)::count, L = Pack<F>::lanes;
    Pack<F> from[W], a[W], b[W], k[W];
    for (int w = 0; w < W; w++) {
      from[w] = centre ? part.load(centre + c + w * L, (F)0) : all((F)0);
      a[w] = part.load(scale + c + w * L, (F)0);
      b[w] = part.load(constant + c + w * L, (F)0);
      k[w] = part.load(along + c + w * L, (F)0);
    }
    int64_t i = c;
    for (int64_t r = 0; r < block.rows; r++, i += block.from)
      for (int w = 0; w < W; w++) {
        Pack<F> d = part.load(x + i + w * L, (F)0) - from[w];
        part.store(dx + i + w * L, part.load(dy + i + w * L, (F)0) * a[w] + (b[w] + slope_times<P>(k[w], d, (F)p)));
      }
  });
}

// --- the stream, over a range [from, to) of statistics ------------------------------------------------------------------------

// What a use does to the stream of an index, and what it then sees (design, sections 2.2 to 2.4).
template <class F> struct Stream {
  const F* lasting;
  F* recent;
  int64_t *count, G;
  bool on;
  double n, w1, w2, w3;

  explicit Stream(const Call& call)
      : lasting((const F*)call.lasting), recent((F*)call.recent), count(call.count), G(call.layout->G), on(call.lasting != nullptr),
        n((double)call.n), w1(call.mix[0]), w2(call.mix[1]), w3(call.mix[2]) {}

  INLINE double fresh(int row, int64_t i, double value) const {
    double average = recent[row * G + i];
    return average + (value - average) * (n / ((double)count[i] + n));
  }
  // A weight of zero keeps a value out altogether.
  INLINE double see(int row, int64_t i, double value) const {
    double present = w3 != 0 ? w3 * value : 0;
    if (!on) return present;
    return (w1 != 0 ? w1 * lasting[row * G + i] : 0) + (w2 != 0 ? w2 * fresh(row, i, value) : 0) + present;
  }
  INLINE void advance(int64_t i, double mu, double m, bool keep) const {
    if (!on) return;
    F fresh_mu = (F)fresh(0, i, mu), fresh_m = (F)fresh(1, i, m);
    recent[i] = keep ? fresh_mu : recent[i];
    recent[G + i] = keep ? fresh_m : recent[G + i];
    count[i] += keep ? (int64_t)n : 0;
  }
};

template <class F> void locations(const Call& call, int64_t from, int64_t to, const double* sums) {
  Stream<F> stream(call);
  F* mu = (F*)call.saved;
  for (int64_t i = from; i < to; i++) mu[i] = (F)stream.see(0, i, sums[i - from] / stream.n);
}

// From sums and sums of powers to 1/s, the slope sigma²/(p·m·s³), NaN where a statistic is not finite, and the new state.
template <class F, int P> void scales(const Call& call, int64_t from, int64_t to, const double* sums, const double* sums_of_powers) {
  Stream<F> stream(call);
  F *inverse = (F*)call.saved + stream.G, *slope = inverse + stream.G;
  double *seen = call.moments;
  double k2 = call.formula->k * call.formula->k, p = call.formula->p, eps = call.formula->eps;
  for (int64_t i = from; i < to; i++) {
    double b_mu = sums[i - from] / stream.n, b_m = sums_of_powers[i - from] / stream.n;
    bool keep = finite((F)b_mu) && finite((F)b_m);
    double m = stream.see(1, i, b_m);
    double sigma2 = P == 1 ? k2 * m * m : P == 2 ? k2 * m : k2 * pow(m, 2 / p);
    double r = 1 / __builtin_sqrt(sigma2 + eps);
    double lift = P == 1 ? m : P == 2 ? 1 : m > 0 ? pow(m, 2 / p - 1) : 0;
    inverse[i] = (F)r;
    slope[i] = keep ? (F)(k2 / p * lift * r * r * r) : (F)__builtin_nan("");
    stream.advance(i, b_mu, b_m, keep);
    if (seen) seen[i] = m;
  }
}

// From the sums of dx̂, dx̂·(x − mu) and u to the streamed gradients: dx = dx̂/s + constant + along·u.
template <class F>
void stream_gradients(const Call& call, int64_t from, int64_t to, const double* sums, const double* sums_from_mu, const double* sums_of_u,
                      void* constant_, void* along_) {
  Stream<F> stream(call);
  const F *inverse = (const F*)call.saved + stream.G, *slope = inverse + stream.G;
  F *constant = (F*)constant_, *along = (F*)along_;
  double n = stream.n, p = call.formula->p, unscale = call.grad_scale;
  bool centered = call.formula->centered;
  for (int64_t i = from, j = 0; i < to; i++, j++) {
    bool cut = !(slope[i] == slope[i]);
    double g_m = -(sums_from_mu[j] / n) * slope[i] / unscale;
    double g_mu = -(sums[j] / n) * inverse[i] / unscale;
    double moment = cut ? 0 : stream.see(1, i, g_m);
    g_mu -= centered && !cut ? moment * p * (sums_of_u[j] / n) : 0;
    double location = stream.see(0, i, g_mu);
    stream.advance(i, g_mu, g_m, finite((F)g_m) && finite((F)g_mu));
    constant[j] = (F)(location * unscale);
    along[j] = (F)(p * moment * unscale);
  }
}

// --- one table of loops for each storage type and p -------------------------------------------------------------------------------

template <class T, int P> const Kernels* table() {
  typedef typename Wide<T>::F F;
  static const Kernels kernels = {
      sum<T>,
      powers<T, P>,
      output<T>,
      {gradients<T, P, 2>, gradients<T, P, 3>},
      input<T, P>,
      output_elements<T>,
      gradients_elements<T, P>,
      input_elements<T, P>,
      sum_columns<T>,
      powers_columns<T, P>,
      output_columns<T>,
      {gradients_columns<T, P, 2>, gradients_columns<T, P, 3>},
      input_columns<T, P>,
      locations<F>,
      scales<F, P>,
      stream_gradients<F>,
  };
  return &kernels;
}
template <class T> const Kernels* table(double p) { return p == 1 ? table<T, 1>() : p == 2 ? table<T, 2>() : table<T, 0>(); }
const Kernels* kernels(Type type, double p) {
  switch (type) {
    case Type::f64: return table<double>(p);
    case Type::bf16: return table<BFloat16>(p);
    case Type::f16: return table<Float16>(p);
    default: return table<float>(p);
  }
}

}  // namespace ISA

#undef INLINE
#undef INLINE_LAMBDA
#undef NOINLINE
#undef EACH_PART
