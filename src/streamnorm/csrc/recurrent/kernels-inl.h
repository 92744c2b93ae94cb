// Time steps of recurrent networks, forward and backward. module.cpp includes this file once per instruction set, with
// ISA (the namespace) and ISA_BYTES (the width of a register) set; it therefore has no include guard.
//
// A step walks over the hidden units in blocks of one register. For the units of a block it normalizes both paths of
// every gate and then computes the gates, while all of that is in the cache. The formulas of the normalization are
// explained in plain.py, those of the networks in recurrent/steps.py, their derivatives in recurrent/engines/by_hand.py.

namespace ISA {

#define INLINE inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINED __attribute__((always_inline))

// --- vectors -----------------------------------------------------------------------------------------------------------

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

// --- matrix products with the hidden state ------------------------------------------------------------------------------------

// The sums of neighbours: those of a, then those of b.
template <class F> INLINE Vector<F> neighbours(Vector<F> a, Vector<F> b) {
  constexpr int n = Lanes<F>::n;
#ifdef __clang__
  Vector<F> r;
  for (int i = 0; i < n / 2; i++) r[i] = a[2 * i] + a[2 * i + 1], r[n / 2 + i] = b[2 * i] + b[2 * i + 1];
  return r;
#else
  Mask<F> even, odd;
  for (int i = 0; i < n; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}
// From n registers, the register of their totals.
template <class F> INLINE Vector<F> totals(Vector<F>* registers) {
#pragma GCC unroll 4
  for (int left = Lanes<F>::n / 2; left; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; i++) registers[i] = neighbours<F>(registers[2 * i], registers[2 * i + 1]);
  return registers[0];
}

// out[r, g] = Σ h[r, k]·w[g, k] for R rows r, n/R rows g at a time: w as it is, read once. Steps take turns in beginning
// at either end, so that of a large w the cache still holds what comes first.
template <int R, class F> OUTLINE void products_of_few(const F* w, const F* h, F* out, int64_t H, int64_t G, bool from_end, int64_t threads) {
  constexpr int n = Lanes<F>::n, Q = n / R, share = 128 / Q;
  const int64_t blocks = (G + Q - 1) / Q, shares = blocks < share ? 1 : blocks / share;
  parallel(shares, threads, from_end ? Way::back : Way::forth, [&](int64_t s) {
    const int64_t begin = s * share, end = s + 1 < shares ? begin + share : blocks;  // the last one has what is left
    for (int64_t i = begin; i < end; i++) {
      int64_t first = Q * (from_end ? begin + end - 1 - i : i);
      int64_t g = first + Q <= G || G < Q ? first : G - Q;  // the last ones again, rather than too few
      const F* rows[Q];
      for (int q = 0; q < Q; q++) rows[q] = w + (g + q < G ? g + q : 0) * H;
      Vector<F> sums[n] = {};
      each_register<F>(H, [&](int64_t k, auto part) INLINED {
        Vector<F> x[R];
        UNROLL for (int r = 0; r < R; r++) x[r] = part.load(h + r * H + k);
        UNROLL for (int q = 0; q < Q; q++) {
          Vector<F> y = part.load(rows[q] + k);
          UNROLL for (int r = 0; r < R; r++) sums[r * Q + q] += x[r] * y;
        }
      });
      F values[n];
      Whole<F>::store(values, totals<F>(sums));
      for (int r = 0; r < R; r++)
        for (int q = 0; q < Q && g + q < G; q++) out[r * G + g + q] = values[r * Q + q];
    }
  });
}

// sums[r, q] = Σ a[r, k]·b[k, q] over K terms, for R rows and Q registers of columns
template <int R, int Q, class F>
INLINE void tile(const F* a, int64_t a_row, int64_t a_term, const F* b, int64_t b_term, int64_t K, Vector<F> (&sums)[R][Q]) {
  for (int64_t k = 0; k < K; k++) {
    Vector<F> y[Q];
    UNROLL for (int q = 0; q < Q; q++) y[q] = Whole<F>::load(b + k * b_term + q * Lanes<F>::n);
    UNROLL for (int r = 0; r < R; r++) {
      Vector<F> x = all<F>(a[r * a_row + k * a_term]);
      UNROLL for (int q = 0; q < Q; q++) sums[r][q] += x * y[q];
    }
  }
}

// A matrix b of K rows and N columns in panels of two registers of columns, each panel row after row.
template <class F> void pack(const void* from, int64_t b_row, int64_t b_column, int64_t K, int64_t N, void* to) {
  constexpr int64_t width = 2 * Lanes<F>::n;
  const F* b = (const F*)from;
  F* panel = (F*)to;
  for (int64_t c = 0; c < N; c += width, panel += width * K)
    if (b_column == 1 && c + width <= N)
      for (int64_t k = 0; k < K; k++) __builtin_memcpy(panel + k * width, b + k * b_row + c, width * sizeof(F));
    else
      for (int64_t i = 0; i < width; i++)
        for (int64_t k = 0; k < K; k++) panel[k * width + i] = c + i < N ? b[k * b_row + (c + i) * b_column] : 0;
}

// out[r, c] = Σ a[r, k]·b[k, c] for R rows r and the columns c of a panel, of which there are `columns`: the K terms from
// `first` on, added to what is there or in its place.
template <int R, class F>
OUTLINE void panel_products(const F* a, int64_t a_row, int64_t a_term, const F* panel, int64_t first, int64_t K, F* out, int64_t out_row, int64_t columns, bool add) {
  constexpr int n = Lanes<F>::n;
  Vector<F> sums[R][2] = {};
  tile<R, 2>(a + first * a_term, a_row, a_term, panel + first * 2 * n, 2 * n, K, sums);
  for (int r = 0; r < R; r++)
    for (int q = 0; q < 2; q++) {
      F* to = out + r * out_row + q * n;
      if ((q + 1) * n <= columns) {
        Whole<F>::store(to, add ? Whole<F>::load(to) + sums[r][q] : sums[r][q]);
      } else if (q * n < columns) {
        Part<F> part{(int)(columns - q * n)};
        part.store(to, add ? part.load(to) + sums[r][q] : sums[r][q]);
      }
    }
}

// out[r, k] += Σ d[r, g]·w[g, k] for a few rows r: w as it is, from either end as in products_of_few.
template <int R, class F> OUTLINE void add_products(const F* w, const F* d, F* out, int64_t H, int64_t G, bool from_end, int64_t threads) {
  constexpr int n = Lanes<F>::n, Q = R >= 4 ? 4 : 8;
  const int64_t whole = H / (Q * n), rest = whole * Q * n;
  parallel(whole, threads, from_end ? Way::back : Way::forth, [&](int64_t i) {
    const int64_t k = Q * n * i;
    Vector<F> sums[R][Q] = {};
    tile<R, Q>(d, G, 1, w + k, H, G, sums);
    for (int r = 0; r < R; r++)
      for (int q = 0; q < Q; q++) Whole<F>::store(out + r * H + k + q * n, Whole<F>::load(out + r * H + k + q * n) + sums[r][q]);
  });
  each_register<F>(H - rest, [&](int64_t i, auto part) INLINED {
    const int64_t k = rest + i;
    Vector<F> sums[R] = {};
    for (int64_t g = 0; g < G; g++) {
      Vector<F> y = part.load(w + g * H + k);
      UNROLL for (int r = 0; r < R; r++) sums[r] += y * d[r * G + g];
    }
    for (int r = 0; r < R; r++) part.store(out + r * H + k, part.load(out + r * H + k) + sums[r]);
  });
}

// fn(constant R, first row) for all rows, as many at a time as there are registers for
template <class Fn> INLINE void by_rows(int64_t rows, const Fn& fn) {
  constexpr int most = ISA_BYTES == 64 ? 12 : 6;
  int64_t b = 0;
  for (; b + most <= rows; b += most) fn(std::integral_constant<int, most>{}, b);
  for (; b + 4 <= rows; b += 4) fn(std::integral_constant<int, 4>{}, b);
  for (; b + 2 <= rows; b += 2) fn(std::integral_constant<int, 2>{}, b);
  if (b < rows) fn(std::integral_constant<int, 1>{}, b);
}
template <class F, class Fn> INLINE void by_few_rows(int64_t rows, const Fn& fn) {
  int64_t b = 0;
  if constexpr (Lanes<F>::n >= 4)
    for (; b + 4 <= rows; b += 4) fn(std::integral_constant<int, 4>{}, b);
  for (; b + 2 <= rows; b += 2) fn(std::integral_constant<int, 2>{}, b);
  if (b < rows) fn(std::integral_constant<int, 1>{}, b);
}

// out = a·b, or out += a·b, for M rows of a, all of it, with b in panels: blocks of K so long that a few rows of a and a
// panel stay in the cache together. Threads share the rows, or if they are few the panels.
template <class F>
void multiply(const void* a, int64_t a_row, int64_t a_term, const void* panels, void* out, int64_t M, int64_t N, int64_t K, bool add, int64_t threads) {
  constexpr int64_t width = 2 * Lanes<F>::n, block = 256, strip = 240;
  auto part = [&](int64_t m, int64_t rows, int64_t from, int64_t to) INLINED {
    for (int64_t first = 0; first < K; first += block)
      for (int64_t c = from; c < to; c += width)
        by_rows(rows, [&](auto R, int64_t r) INLINED {
          panel_products<R.value>((const F*)a + (m + r) * a_row, a_row, a_term, (const F*)panels + c * K, first, first + block < K ? block : K - first,
                                  (F*)out + (m + r) * N + c, N, N - c, add || first > 0);
        });
  };
  if (M > strip) parallel((M + strip - 1) / strip, threads, [&](int64_t i) { part(i * strip, M - i * strip < strip ? M - i * strip : strip, 0, N); });
  else parallel((N + width - 1) / width, threads, [&](int64_t i) { part(0, M, i * width, (i + 1) * width < N ? (i + 1) * width : N); });
}

// --- one use of a norm -----------------------------------------------------------------------------------------------------

template <class F> struct Use {
  typedef int64_t Counts __attribute__((vector_size(8 * Lanes<F>::n)));

  const Path& path;
  int64_t rows, number, G;
  F* lasting = nullptr;  // the stream: (2, G), (2, G) and (G); or none
  F* recent = nullptr;
  int64_t* count = nullptr;
  F n, per_n, w1 = 0, w2 = 0, w3 = 1;

  Use(const Path& p, int64_t rows_, int64_t number_, int64_t G_, bool backward, bool advances = true)
      : path(p), rows(rows_), number(number_), G(G_), n((F)rows_), per_n(1 / (F)rows_) {
    if (p.kind != features || !p.lasting || !advances) return;
    lasting = (F*)(backward ? p.lasting_grad : p.lasting);
    recent = (F*)(backward ? p.recent_grad : p.recent);
    count = backward ? p.count_grad : p.count;
    weigh(backward ? p.beta : p.alpha, *(backward ? p.samples_grad : p.samples) += rows);
  }
  INLINE void weigh(const double* w, int64_t samples) {
    bool windowed = path.window > 0;
    w1 = (F)(windowed ? path.window / (path.window + (double)samples) : w[0]);
    w2 = (F)(windowed ? (double)samples / (path.window + (double)samples) : w[1]);
    w3 = (F)(windowed ? 0 : w[2]);
  }

  template <class W> INLINE Vector<F> gain(int64_t g, const W& part) const { return path.gain ? part.load((const F*)path.gain + g) : all<F>(1); }
  // By what the values of this step are multiplied: deviations by gain/s, values that are x̂ already by the gain.
  template <class W> INLINE Vector<F> slope(const F* inverse, int64_t g, const W& part) const {
    return path.kind == features ? gain(g, part) * absolute<F>(part.load(inverse + g)) : gain(g, part);
  }
  template <class W> INLINE Vector<F> bias(int64_t g, const W& part) const { return path.bias ? part.load((const F*)path.bias + g) : Vector<F>{}; }

  INLINE Vector<F> counted(int64_t g, const Whole<F>&) const {
    Counts counts;
    __builtin_memcpy(&counts, count + g, sizeof counts);
    return __builtin_convertvector(counts, Vector<F>);
  }
  INLINE Vector<F> counted(int64_t g, const Part<F>& part) const {
    Vector<F> counts = {};
    for (int i = 0; i < part.count; i++) counts[i] = (F)count[g + i];
    return counts;
  }
  // What one use of n elements weighs in the running average.
  template <class W> INLINE Vector<F> share(int64_t g, const W& part) const { return n / (counted(g, part) + n); }
  // A weight of zero keeps a value out altogether.
  INLINE Vector<F> see(Vector<F> old, Vector<F> fresh, Vector<F> present) const {
    Vector<F> v = {};
    if (w1 != 0) v += w1 * old;
    if (w2 != 0) v += w2 * fresh;
    if (w3 != 0) v += w3 * present;
    return v;
  }
  template <class W> INLINE void keep(int64_t g, Vector<F> fresh_mu, Vector<F> fresh_m, Mask<F> ok, const W& part) const {
    part.store(recent + g, ok ? fresh_mu : part.load(recent + g));
    part.store(recent + G + g, ok ? fresh_m : part.load(recent + G + g));
    add_counts(g, ok, part);
  }
  INLINE void add_counts(int64_t g, Mask<F> ok, const Whole<F>&) const {
    Counts counts;
    __builtin_memcpy(&counts, count + g, sizeof counts);
    counts += __builtin_convertvector(ok, Counts) & rows;
    __builtin_memcpy(count + g, &counts, sizeof counts);
  }
  INLINE void add_counts(int64_t g, Mask<F> ok, const Part<F>& part) const {
    for (int i = 0; i < part.count; i++) count[g + i] += ok[i] ? rows : 0;
  }
};

// --- a statistic for each feature --------------------------------------------------------------------------------------------

// Where the marks of a path hold the moments of a block of steps before its first one: those of the running average, and
// how many elements it has seen. The lasting moments come before the first block.
template <class F> INLINE F* marks_of(const Path& path, int64_t block, int64_t G) { return (F*)path.marks + (1 + 2 * block) * G; }

// The inverse of s from the mean power of the deviations.
template <int P, class F> INLINE Vector<F> inverse_of(const Path& path, Vector<F> m) {
  F k2 = (F)(path.k * path.k);
  return 1 / root<F>((P == 1 ? k2 * m * m : k2 * m) + (F)path.eps);
}

// The columns of one register from g on, `rows` rows that are G apart: deviations from mu in the place of x, and the inverse
// of s, which is negative where a statistic is not finite. `block` is the block of steps that begins here, or -1.
template <int P, class F, class W> OUTLINE void normalize_features(const Use<F>& use, int64_t block, F* x, F* inverse, int64_t g, const W& part) {
  const Path& path = use.path;
  x += g;
  Vector<F> sum = {};
  for (int64_t b = 0; b < use.rows; b++) sum += part.load(x + b * use.G);
  Vector<F> b_mu = sum * use.per_n, mu = b_mu, share = {}, fresh_mu = {};
  if (use.lasting) {
    share = use.share(g, part);
    fresh_mu = part.load(use.recent + g);
    fresh_mu += (b_mu - fresh_mu) * share;
    mu = use.see(part.load(use.lasting + g), fresh_mu, b_mu);
  }
  Vector<F> deviation = {};
  for (int64_t b = 0; b < use.rows; b++) {
    Vector<F> d = part.load(x + b * use.G) - mu;
    part.store(x + b * use.G, d);
    deviation += P == 1 ? absolute<F>(d) : d * d;
  }
  Vector<F> b_m = deviation * use.per_n, m = b_m;
  Mask<F> ok = finite<F>(b_mu) & finite<F>(b_m);
  if (use.lasting) {
    Vector<F> fresh_m = part.load(use.recent + use.G + g), old_m = part.load(use.lasting + use.G + g);
    if (path.marks && use.number == 0) part.store((F*)path.marks + g, old_m);
    if (path.marks && block >= 0) {
      part.store(marks_of<F>(path, block, use.G) + g, fresh_m);
      part.store(marks_of<F>(path, block, use.G) + use.G + g, use.counted(g, part));
    }
    fresh_m += (b_m - fresh_m) * share;
    m = use.see(old_m, fresh_m, b_m);
    use.keep(g, fresh_mu, fresh_m, ok, part);
  }
  Vector<F> scale = inverse_of<P, F>(path, m);
  part.store(inverse + g, ok ? scale : -scale);

  if (path.running_mean) {
    int64_t row = use.number < path.running_rows ? use.number : path.running_rows - 1;
    F *mean = (F*)path.running_mean + row * use.G + g, *var = (F*)path.running_var + row * use.G + g;
    F k2 = (F)(path.k * path.k);
    Vector<F> unbiased = (P == 1 ? k2 * m * m : k2 * m) * (use.n / (use.n - 1)), old_mean = part.load(mean), old_var = part.load(var);
    F momentum = (F)path.momentum;
    Mask<F> known = finite<F>(b_mu) & finite<F>(unbiased);
    part.store(mean, known ? old_mean + momentum * (b_mu - old_mean) : old_mean);
    part.store(var, known ? old_var + momentum * (unbiased - old_var) : old_var);
    for (int i = 0; i < part.count; i++)
      if (known[i]) __atomic_store_n(path.tracked + use.number, 1, __ATOMIC_RELAXED);
  }
}

// The inverses of s of a block of steps once more, as normalize_features left them, from the deviations and the marks.
template <int P, class F, class W> OUTLINE void renormalize_features(const Plan& plan, const Path& path, int64_t block, int64_t end, int64_t g, const W& part) {
  int64_t G = plan.gates * plan.hidden, first = block * plan.block;
  Vector<F> old_m = {}, fresh_m = {}, counted = {};
  if (path.lasting) {
    old_m = part.load((F*)path.marks + g);
    fresh_m = part.load(marks_of<F>(path, block, G) + g);
    counted = part.load(marks_of<F>(path, block, G) + G + g);
  }
  for (int64_t t = first; t < end; t++) {
    Use<F> use(path, plan.starts[t + 1] - plan.starts[t], t, G, false, false);
    const F* d = (const F*)path.values + plan.starts[t] * G + g;
    Vector<F> deviation = {};
    for (int64_t b = 0; b < use.rows; b++) {
      Vector<F> value = part.load(d + b * G);
      deviation += P == 1 ? absolute<F>(value) : value * value;
    }
    Vector<F> b_m = deviation * use.per_n, m = b_m;
    Mask<F> ok = finite<F>(b_m);
    if (path.lasting) {
      use.weigh(path.alpha, path.samples_before + plan.starts[t + 1]);
      Vector<F> next_m = fresh_m + (b_m - fresh_m) * (use.n / (counted + use.n));
      m = use.see(old_m, next_m, b_m);
      fresh_m = ok ? next_m : fresh_m;
      counted += ok ? all<F>(use.n) : Vector<F>{};
    }
    Vector<F> scale = inverse_of<P, F>(path, m);
    part.store((F*)path.inverse + (t - first) * G + g, ok ? scale : -scale);
  }
}

// From dy, the gradient behind gain and bias, to dx, which may lie over the deviations. Rows of dy are `stride` apart and in whole
// registers. The gradients of gain and bias grow.
template <int P, class F, class W>
OUTLINE void normalize_features_backward(const Use<F>& use, const F* dy, int64_t stride, const F* deviations, const F* inverse, F* dx, int64_t g, const W& part) {
  const Path& path = use.path;
  deviations += g;
  Vector<F> sum = {}, along = {}, u = {};
  for (int64_t b = 0; b < use.rows; b++) {
    Vector<F> x = part.load(deviations + b * use.G), d = Whole<F>::load(dy + b * stride);
    sum += d;
    along += d * x;
    u += P == 1 ? sign<F>(x) : x;
  }
  Vector<F> stored = part.load(inverse + g), scale = absolute<F>(stored);
  along *= scale;
  part.store((F*)path.d_gain + g, part.load((F*)path.d_gain + g) + along);
  part.store((F*)path.d_bias + g, part.load((F*)path.d_bias + g) + sum);
  if (!dx) return;

  dx += g;
  Vector<F> gain = use.gain(g, part);
  Mask<F> cut = ~(Mask<F>)(stored > 0);
  // sigma²/(p·m·s²): for p = 1 that is k·sigma/s², where sigma/s = √(1 − eps/s²)
  Vector<F> inside = 1 - (F)path.eps * scale * scale;
  inside = inside > 0 ? inside : Vector<F>{};
  Vector<F> slope = P == 1 ? (F)path.k * scale * root<F>(inside) : (F)(path.k * path.k / 2) * scale * scale;
  F weight = -use.per_n / (F)path.grad_scale;
  Vector<F> g_m = gain * along * slope * weight;
  Vector<F> g_mu = gain * sum * scale * weight;
  Vector<F> share = {}, old_m = {}, old_mu = {}, long_m = {}, long_mu = {};
  if (use.lasting) {
    share = use.share(g, part);
    old_mu = part.load(use.recent + g);
    old_m = part.load(use.recent + use.G + g);
    long_mu = part.load(use.lasting + g);
    long_m = part.load(use.lasting + use.G + g);
  }
  Vector<F> fresh_m = old_m + (g_m - old_m) * share, moment = use.see(long_m, fresh_m, g_m);
  moment = cut ? Vector<F>{} : moment * (F)P;
  g_mu -= cut ? Vector<F>{} : moment * (u * use.per_n);
  Vector<F> fresh_mu = old_mu + (g_mu - old_mu) * share, location = use.see(long_mu, fresh_mu, g_mu);
  if (use.lasting) use.keep(g, fresh_mu, fresh_m, finite<F>(g_m) & finite<F>(g_mu) & ~cut, part);
  location *= (F)path.grad_scale;
  moment *= (F)path.grad_scale;
  Vector<F> direct = gain * scale;
  for (int64_t b = 0; b < use.rows; b++) {
    Vector<F> x = part.load(deviations + b * use.G), d = Whole<F>::load(dy + b * stride);
    part.store(dx + b * use.G, d * direct + location + (cut ? Vector<F>{} : moment * (P == 1 ? sign<F>(x) : x)));
  }
}

// --- a statistic for each sequence -------------------------------------------------------------------------------------------

// Rows of G features: x̂ in the place of x, and the inverse of s for each row, negative where it is not finite.
template <int P, class F> OUTLINE void normalize_sequences(const Use<F>& use, F* x, F* inverse) {
  F size = (F)use.G, k2 = (F)(use.path.k * use.path.k);
  for (int64_t b = 0; b < use.rows; b++, x += use.G) {
    Vector<F> sums = {};
    each_register<F>(use.G, [&](int64_t i, auto part) INLINED { sums += part.load(x + i); });
    F mu = total<F>(sums) / size;
    sums = Vector<F>{};
    each_register<F>(use.G, [&](int64_t i, auto part) INLINED {
      Vector<F> d = part.load(x + i) - mu;
      Vector<F> power = P == 1 ? absolute<F>(d) : d * d;
      sums += part.inside(power);
    });
    F m = total<F>(sums) / size;
    F scale = 1 / root_of((P == 1 ? k2 * m * m : k2 * m) + (F)use.path.eps);
    inverse[b] = m - m == 0 ? scale : -scale;
    each_register<F>(use.G, [&](int64_t i, auto part) INLINED { part.store(x + i, (part.load(x + i) - mu) * scale); });
  }
}

// As normalize_features_backward. dy is in gates, whose rows are `stride` apart: dy[gate[k]] + b·stride belongs to the
// features from k·H on.
template <int P, class F>
OUTLINE void normalize_sequences_backward(const Use<F>& use, const F* const* dy, int64_t stride, const F* x_hat, const F* inverse, F* dx, int64_t H) {
  const Path& path = use.path;
  int64_t gates = use.G / H;
  F size = (F)use.G, k = (F)path.k, eps = (F)path.eps;
  for (int64_t b = 0; b < use.rows; b++) {
    Vector<F> sums = {}, along_sums = {}, u_sums = {};
    const F* x_row = x_hat + b * use.G;
    for (int64_t gate = 0; gate < gates; gate++)
      each_register<F>(H, [&](int64_t j, auto part) INLINED {
        int64_t g = gate * H + j;
        Vector<F> x = part.load(x_row + g), d = part.load(dy[gate] + b * stride + j), along = d * x, gain = use.gain(g, part);
        part.store((F*)path.d_gain + g, part.load((F*)path.d_gain + g) + along);
        part.store((F*)path.d_bias + g, part.load((F*)path.d_bias + g) + d);
        sums += gain * d;
        along_sums += gain * along;
        u_sums += P == 1 ? sign<F>(x) : x;
      });
    if (!dx) continue;
    F scale = inverse[b] < 0 ? -inverse[b] : inverse[b], inside = 1 - eps * scale * scale;
    F slope = P == 1 ? k * scale * root_of(inside > 0 ? inside : 0) : k * k / 2 * scale * scale;
    F moment = inverse[b] > 0 ? -total<F>(along_sums) / size * slope * (P == 1 ? 1 : 2 / scale) : 0;
    F location = -total<F>(sums) / size * scale - moment * (total<F>(u_sums) / size);
    for (int64_t gate = 0; gate < gates; gate++)
      each_register<F>(H, [&](int64_t j, auto part) INLINED {
        int64_t g = gate * H + j;
        Vector<F> x = part.load(x_row + g), d = part.load(dy[gate] + b * stride + j);
        part.store(dx + b * use.G + g, d * (use.gain(g, part) * scale) + location + moment * (P == 1 ? sign<F>(x) : x));
      });
  }
}

// --- a path that is not normalized -------------------------------------------------------------------------------------------

template <class F, class W> INLINE void pass_backward(const Use<F>& use, const F* dy, int64_t stride, F* dx, int64_t g, const W& part) {
  Vector<F> sum = {};
  for (int64_t b = 0; b < use.rows; b++) {
    Vector<F> d = part.load(dy + b * stride);
    sum += d;
    if (dx) part.store(dx + b * use.G + g, d);
  }
  part.store((F*)use.path.d_bias + g, part.load((F*)use.path.d_bias + g) + sum);
}

// --- a time step ---------------------------------------------------------------------------------------------------------------

// Where the data of a step are. Rows of `x` and `h`, the paths, hold all gates; those of the others one value a unit.
template <class F> struct Step {
  const Plan& plan;
  int64_t number, first, rows, H, G;
  F *x, *h, *inverse_x, *inverse_h, *output, *cells;
  const F *previous, *previous_cells;

  Step(const Plan& p, int64_t t) : plan(p), number(t), first(p.starts[t]), rows(p.starts[t + 1] - first), H(p.hidden), G(p.gates * p.hidden) {
    int64_t before = t ? p.starts[t - 1] : 0;
    x = (F*)p.x.values + first * G;
    h = (F*)p.h.values + first * G;
    inverse_x = (F*)p.x.inverse + (p.x.kind == features ? t % p.block * G : first);
    inverse_h = (F*)p.h.inverse + (p.h.kind == features ? t % p.block * G : first);
    output = (F*)p.output + first * H;
    cells = (F*)p.cells + first * H;
    previous = t ? (F*)p.output + before * H : (const F*)p.h0;
    previous_cells = t ? (F*)p.cells + before * H : (const F*)p.c0;
  }
};

template <class F, class W> INLINE void normalize(const Use<F>& use, int64_t block, F* x, F* inverse, int64_t g, const W& part) {
  if (use.path.kind != features) return;
  if (use.path.p == 1) normalize_features<1>(use, block, x, inverse, g, part);
  else normalize_features<2>(use, block, x, inverse, g, part);
}
template <class F> INLINE void normalize_whole(const Use<F>& use, F* x, F* inverse) {
  if (use.path.kind != sequences) return;
  if (use.path.p == 1) normalize_sequences<1>(use, x, inverse);
  else normalize_sequences<2>(use, x, inverse);
}

// The gates of the units of one register, from the normalized paths: gain and bias are loaded once, and then a row is
// computed a call. Backward computes them again; to keep them would cost more time than that.
template <class F, class W> struct Gates {
  typedef Vector<F> V;
  const int64_t H, j;
  const W part;
  V gain_x[4] = {}, gain_h[4] = {}, bias_x[4] = {}, bias_h[4] = {};

  INLINE Gates(const Step<F>& s, const Use<F>& x, const Use<F>& h, int64_t j_, const W& part_) : H(s.H), j(j_), part(part_) {
    UNROLL for (int k = 0; k < 4; k++)
      if (k < s.plan.gates) {
        gain_x[k] = x.slope(s.inverse_x, k * H + j, part), bias_x[k] = x.bias(k * H + j, part);
        gain_h[k] = h.slope(s.inverse_h, k * H + j, part), bias_h[k] = h.bias(k * H + j, part);
      }
  }
  INLINE V from_x(int k, const F* x) const { return part.load(x + k * H + j) * gain_x[k] + bias_x[k]; }
  INLINE V from_h(int k, const F* h) const { return part.load(h + k * H + j) * gain_h[k] + bias_h[k]; }
  INLINE V sum(int k, const F* x, const F* h) const { return from_x(k, x) + from_h(k, h); }
};
template <class F> struct GruRow {
  Vector<F> reset, update, past, fresh;
  template <class W> INLINE GruRow(const Gates<F, W>& gates, const F* x, const F* h) {
    reset = sigmoid<F>(gates.sum(0, x, h));
    update = sigmoid<F>(gates.sum(1, x, h));
    past = gates.from_h(2, h);
    fresh = hyperbolic_tangent<F>(gates.from_x(2, x) + reset * past);
  }
};
template <class F> struct LstmRow {
  Vector<F> input, forget, candidate, output;
  template <class W> INLINE LstmRow(const Gates<F, W>& gates, const F* x, const F* h) {
    input = sigmoid<F>(gates.sum(0, x, h));
    forget = sigmoid<F>(gates.sum(1, x, h));
    candidate = hyperbolic_tangent<F>(gates.sum(2, x, h));
    output = sigmoid<F>(gates.sum(3, x, h));
  }
};

template <class F> INLINE void forward_step(const Plan& plan, int64_t number) {
  typedef Vector<F> V;
  Step<F> s(plan, number);
  Use<F> from_x(plan.x, s.rows, number, s.G, false), from_h(plan.h, s.rows, number, s.G, false);
  int64_t H = s.H, G = s.G, block = number % plan.block ? -1 : number / plan.block;
  if (plan.panels)
    multiply<F>(s.previous, H, 1, plan.panels, s.h, s.rows, G, H, false, plan.threads);
  else if (plan.weight)
    by_few_rows<F>(s.rows, [&](auto R, int64_t b) INLINED { products_of_few<R.value>((const F*)plan.weight, s.previous + b * H, s.h + b * G, H, G, number % 2, plan.threads); });
  normalize_whole(from_x, s.x, s.inverse_x);
  normalize_whole(from_h, s.h, s.inverse_h);
  each_register<F>(H, plan.threads, [&](int64_t j, auto part) INLINED {
    for (int64_t g = j; g < G; g += H) {
      normalize(from_x, block, s.x, s.inverse_x, g, part);
      normalize(from_h, block, s.h, s.inverse_h, g, part);
    }
    Gates<F, decltype(part)> gates(s, from_x, from_h, j, part);
    if (plan.cell == gru) {
      for (int64_t b = 0; b < s.rows; b++) {
        GruRow<F> row(gates, s.x + b * G, s.h + b * G);
        part.store(s.output + b * H + j, row.fresh + row.update * (part.load(s.previous + b * H + j) - row.fresh));
      }
    } else if (plan.cell == lstm) {
      for (int64_t b = 0; b < s.rows; b++) {
        LstmRow<F> row(gates, s.x + b * G, s.h + b * G);
        V cell = row.forget * part.load(s.previous_cells + b * H + j) + row.input * row.candidate;
        part.store(s.cells + b * H + j, cell);
        part.store(s.output + b * H + j, row.output * hyperbolic_tangent<F>(cell));
      }
    } else {
      for (int64_t b = 0; b < s.rows; b++) {
        V value = gates.sum(0, s.x + b * G, s.h + b * G);
        part.store(s.output + b * H + j, plan.cell == rnn_tanh ? hyperbolic_tangent<F>(value) : value <= 0 ? V{} : value);
      }
    }
  });
}

// d_hidden comes in as the gradient that the later steps send to this step's hidden state, to which that of the output is
// added, and goes out as what this step sends past the matrix product. dy has room for gates + 1 gradients of all rows.
template <class F> INLINE void backward_step(const Plan& plan, int64_t number) {
  typedef Vector<F> V;
  Step<F> s(plan, number);
  int64_t H = s.H, G = s.G;
  F* dx = plan.x.dx ? (F*)plan.x.dx + s.first * G : nullptr;
  F* dh = number > 0 || plan.first_h_flows ? (F*)plan.h.dx + s.first * G : nullptr;
  Use<F> from_x(plan.x, s.rows, number, G, true, dx != nullptr), from_h(plan.h, s.rows, number, G, true, dh != nullptr);
  F *d_hidden = (F*)plan.d_hidden, *d_cells = (F*)plan.d_cells;
  const F* d_output = plan.d_output ? (const F*)plan.d_output + s.first * H : nullptr;

  // A register of columns at a time, or all columns where the norms' sums go over them.
  constexpr int n = Lanes<F>::n;
  bool apart = plan.x.kind == sequences || plan.h.kind == sequences;
  int64_t stride = apart ? (H + n - 1) / n * n : n, size = s.rows * stride;
  F* dy = (F*)plan.scratch;
  auto finish = [&](const Use<F>& use, const F* gradient, const F* values, const F* inverse, F* to, int64_t g, auto part) INLINED {
    if (use.path.kind == unnormalized) pass_backward(use, gradient, stride, to, g, part);
    else if (use.path.kind == features && use.path.p == 1) normalize_features_backward<1>(use, gradient, stride, values, inverse, to, g, part);
    else if (use.path.kind == features) normalize_features_backward<2>(use, gradient, stride, values, inverse, to, g, part);
  };

  each_register<F>(H, plan.threads, [&](int64_t j, auto part) INLINED {
    F* own = dy + (apart || plan.threads == 1 ? 0 : j / at_a_time<F> * (plan.gates + 1) * size);
    F* at = own + (apart ? j : 0);
    Gates<F, decltype(part)> gates(s, from_x, from_h, j, part);
    if (plan.cell == gru) {
      for (int64_t b = 0; b < s.rows; b++) {
        GruRow<F> row(gates, s.x + b * G, s.h + b * G);
        V d = part.load(d_hidden + b * H + j);
        if (d_output) d += part.load(d_output + b * H + j);
        V d_fresh = d * (1 - row.update) * (1 - row.fresh * row.fresh);
        V d_update = d * (part.load(s.previous + b * H + j) - row.fresh) * row.update * (1 - row.update);
        Whole<F>::store(at + b * stride, d_fresh * row.past * row.reset * (1 - row.reset));
        Whole<F>::store(at + size + b * stride, d_update);
        Whole<F>::store(at + 2 * size + b * stride, d_fresh);
        Whole<F>::store(at + 3 * size + b * stride, d_fresh * row.reset);
        part.store(d_hidden + b * H + j, d * row.update);
      }
    } else if (plan.cell == lstm) {
      for (int64_t b = 0; b < s.rows; b++) {
        LstmRow<F> row(gates, s.x + b * G, s.h + b * G);
        V squashed = hyperbolic_tangent<F>(part.load(s.cells + b * H + j)), d = part.load(d_hidden + b * H + j);
        if (d_output) d += part.load(d_output + b * H + j);
        V d_cell = part.load(d_cells + b * H + j) + d * row.output * (1 - squashed * squashed);
        Whole<F>::store(at + b * stride, d_cell * row.candidate * row.input * (1 - row.input));
        Whole<F>::store(at + size + b * stride, d_cell * part.load(s.previous_cells + b * H + j) * row.forget * (1 - row.forget));
        Whole<F>::store(at + 2 * size + b * stride, d_cell * row.input * (1 - row.candidate * row.candidate));
        Whole<F>::store(at + 3 * size + b * stride, d * squashed * row.output * (1 - row.output));
        part.store(d_cells + b * H + j, d_cell * row.forget);
        part.store(d_hidden + b * H + j, V{});
      }
    } else {
      for (int64_t b = 0; b < s.rows; b++) {
        V d = part.load(d_hidden + b * H + j), h = part.load(s.output + b * H + j);
        if (d_output) d += part.load(d_output + b * H + j);
        Whole<F>::store(at + b * stride, plan.cell == rnn_tanh ? d * (1 - h * h) : h <= 0 ? V{} : d);
        part.store(d_hidden + b * H + j, V{});
      }
    }
    if (apart) return;
    for (int64_t gate = 0; gate < plan.gates; gate++) {
      finish(from_h, own + (plan.cell == gru && gate == 2 ? 3 : gate) * size, s.h, s.inverse_h, dh, gate * H + j, part);
      finish(from_x, own + gate * size, s.x, s.inverse_x, dx, gate * H + j, part);
    }
  });
  auto into_past = [&]() INLINED {
    if (!dh || (number == 0 && !plan.h0_wanted)) return;
    if (plan.panels)
      multiply<F>(dh, G, 1, plan.panels, d_hidden, s.rows, H, G, true, plan.threads);
    else if (plan.weight)
      by_few_rows<F>(s.rows, [&](auto R, int64_t b) INLINED { add_products<R.value>((const F*)plan.weight, dh + b * G, d_hidden + b * H, H, G, number % 2, plan.threads); });
  };
  if (!apart) return into_past();
  const F *dy_x[4], *dy_h[4];
  for (int gate = 0; gate < 4; gate++) {
    dy_x[gate] = dy + gate * size;
    dy_h[gate] = dy + (plan.cell == gru && gate == 2 ? 3 : gate) * size;
  }
  auto finish_whole = [&](const Use<F>& use, const F* const* gradients, const F* x_hat, const F* inverse, F* to) INLINED {
    if (use.path.kind == sequences && use.path.p == 1) return normalize_sequences_backward<1>(use, gradients, stride, x_hat, inverse, to, H);
    if (use.path.kind == sequences) return normalize_sequences_backward<2>(use, gradients, stride, x_hat, inverse, to, H);
    for (int64_t gate = 0; gate < plan.gates; gate++)
      each_register<F>(H, [&](int64_t j, auto part) INLINED { finish(use, gradients[gate] + j, x_hat, inverse, to, gate * H + j, part); });
  };
  finish_whole(from_h, dy_h, s.h, s.inverse_h, dh);
  finish_whole(from_x, dy_x, s.x, s.inverse_x, dx);
  into_past();
}

template <class F, class W> INLINE void renormalize(const Plan& plan, const Path& path, int64_t block, int64_t end, int64_t g, const W& part) {
  if (path.kind != features) return;
  if (path.p == 1) renormalize_features<1, F>(plan, path, block, end, g, part);
  else renormalize_features<2, F>(plan, path, block, end, g, part);
}

// What a block of steps needs before its backward, where its inverses of s were not kept.
template <class F> INLINE void recall(const Plan& plan, int64_t block, int64_t end) {
  each_register<F>(plan.gates * plan.hidden, [&](int64_t g, auto part) INLINED {
    renormalize<F>(plan, plan.x, block, end, g, part);
    renormalize<F>(plan, plan.h, block, end, g, part);
  });
}

}  // namespace ISA
