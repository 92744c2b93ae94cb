// Registers of one vector, parts of them, and the functions of the gates. See kernels-inl.h.

namespace ISA {

#define UNROLL _Pragma("GCC unroll 16")

template <class F> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(ISA_BYTES)));
  typedef int32_t I __attribute__((vector_size(ISA_BYTES)));
  static constexpr int n = ISA_BYTES / 4, exponent_bits = 23, exponent_bias = 127, terms = 8;
  static constexpr int32_t magnitude = 0x7fffffff;
  static constexpr float largest = __FLT_MAX__, rounder = 0x1.8p23f, low = -87, high = 88;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(ISA_BYTES)));
  typedef int64_t I __attribute__((vector_size(ISA_BYTES)));
  static constexpr int n = ISA_BYTES / 8, exponent_bits = 52, exponent_bias = 1023, terms = 14;
  static constexpr int64_t magnitude = 0x7fffffffffffffffLL;
  static constexpr double largest = __DBL_MAX__, rounder = 0x1.8p52, low = -708, high = 709;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b398p-40;
};
template <class F> using Vector = typename Lanes<F>::V;
template <class F> using Mask = typename Lanes<F>::I;

template <class F> INLINE Vector<F> all(F value) { return value - Vector<F>{}; }

// How much of a register lies inside an array: all of it, or its first `count` lanes.
template <class F> struct Whole {
  static constexpr int count = Lanes<F>::n;
  static INLINE Vector<F> load(const F* p) {
    Vector<F> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static INLINE void store(F* p, Vector<F> v) { __builtin_memcpy(p, &v, sizeof v); }
  static INLINE Vector<F> inside(Vector<F> v) { return v; }
};
template <class F> struct Part {
  int count;
  INLINE Vector<F> load(const F* p) const {
    Vector<F> v = {};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
  }
  INLINE void store(F* p, Vector<F> v) const {
    for (int i = 0; i < count; i++) p[i] = v[i];
  }
  INLINE Vector<F> inside(Vector<F> v) const {
    for (int i = count; i < Lanes<F>::n; i++) v[i] = 0;
    return v;
  }
};
template <class F, class Body> INLINE void each_register(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + Lanes<F>::n <= length; i += Lanes<F>::n) body(i, Whole<F>{});
  if (i < length) body(i, Part<F>{(int)(length - i)});
}

// The same on several threads, each of which takes so many elements at a time.
template <class F> constexpr int64_t at_a_time = 2 * Lanes<F>::n;
template <class F, class Body> INLINE void each_register(int64_t length, int64_t threads, const Body& body) {
  parallel((length + at_a_time<F> - 1) / at_a_time<F>, threads, [&](int64_t i) {
    const int64_t first = i * at_a_time<F>, left = length - first;
    each_register<F>(left < at_a_time<F> ? left : at_a_time<F>, [&](int64_t j, auto part) INLINED { body(first + j, part); });
  });
}

template <class F> INLINE Vector<F> absolute(Vector<F> a) { return (Vector<F>)((Mask<F>)a & Lanes<F>::magnitude); }
template <class F> INLINE Mask<F> finite(Vector<F> a) { return (Mask<F>)(absolute<F>(a) <= all<F>(Lanes<F>::largest)); }
// sgn(d), 0 where d is 0
template <class F> INLINE Vector<F> sign(Vector<F> d) {
  return (Vector<F>)(((Mask<F>)all<F>(1) | ((Mask<F>)d & ~Lanes<F>::magnitude)) & (Mask<F>)(d != Vector<F>{}));
}
INLINE float root_of(float a) { return __builtin_sqrtf(a); }
INLINE double root_of(double a) { return __builtin_sqrt(a); }
template <class F> INLINE Vector<F> root(Vector<F> a) {
  F lanes[Lanes<F>::n];
  Whole<F>::store(lanes, a);
  for (int i = 0; i < Lanes<F>::n; i++) lanes[i] = root_of(lanes[i]);
  return Whole<F>::load(lanes);
}
template <class F> INLINE F total(Vector<F> a) {
  F lanes[Lanes<F>::n];
  Whole<F>::store(lanes, a);
  for (int half = Lanes<F>::n / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// e^x − 1, to the last bits also where x is small: x = k·ln 2 + r, e^x − 1 = 2^k·(e^r − 1) + (2^k − 1). Beyond the range of
// the type, x is taken at its end.
template <class F> INLINE Vector<F> expm1(Vector<F> x) {
  typedef Lanes<F> L;
  x = x > L::high ? all<F>(L::high) : x;
  x = x < L::low ? all<F>(L::low) : x;
  Vector<F> shifted = x * (F)0x1.71547652b82fep0 + L::rounder, k = shifted - L::rounder;
  Vector<F> r = (x - k * L::ln2_high) - k * L::ln2_low, q = {};
  F inverse_factorial[L::terms], factorial = 1;
  for (int i = 0; i < L::terms; i++) inverse_factorial[i] = 1 / (factorial *= (F)(i + 1));
#pragma GCC unroll 16
  for (int i = L::terms - 1; i >= 0; i--) q = q * r + inverse_factorial[i];
  Vector<F> power = (Vector<F>)((((Mask<F>)shifted) + L::exponent_bias) << L::exponent_bits);
  return power * (q * r) + (power - 1);
}
template <class F> INLINE Vector<F> sigmoid(Vector<F> x) { return 1 / (2 + expm1<F>(-x)); }
template <class F> INLINE Vector<F> hyperbolic_tangent(Vector<F> x) {
  Vector<F> e = expm1<F>(x + x);
  return e / (e + 2);
}

}  // namespace ISA
