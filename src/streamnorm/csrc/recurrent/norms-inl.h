// One use of a norm in a time step, forward and backward. See kernels-inl.h.

namespace ISA {

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
    if (p.kind != features || !p.long_ || !advances) return;
    lasting = (F*)(backward ? p.long_grad : p.long_);
    recent = (F*)(backward ? p.short_grad : p.short_);
    count = backward ? p.grad_count : p.count;
    weigh(backward, *(backward ? p.grad_samples : p.samples) += rows);
  }
  INLINE void weigh(bool backward, int64_t samples) {
    double weights[3];
    mixing_weights(backward ? path.grad_window : path.evidence, backward ? path.beta : path.alpha, (double)samples, 0, weights);
    w1 = (F)weights[0];
    w2 = (F)weights[1];
    w3 = (F)weights[2];
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
  // The moment in use is at least this share of the step's own.
  INLINE Vector<F> bounded(Vector<F> m, Vector<F> b_m) const {
    if (!(path.floor > 0)) return m;
    Vector<F> low = (F)path.floor * b_m;
    return low > m ? low : m;
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
    m = use.bounded(use.see(old_m, fresh_m, b_m), b_m);
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
  if (path.long_) {
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
    if (path.long_) {
      use.weigh(false, path.samples_before + plan.starts[t + 1]);
      Vector<F> next_m = fresh_m + (b_m - fresh_m) * (use.n / (counted + use.n));
      m = use.bounded(use.see(old_m, next_m, b_m), b_m);
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
  // What the stream is in units of: 1/s for the location and 1/s^p for the moment, or 1.
  bool in_units = use.lasting && path.grad_window > 0;
  Vector<F> r = in_units ? scale : all<F>(1), s = r > 0 ? 1 / r : Vector<F>{}, r_p = P == 1 ? r : r * r, s_p = P == 1 ? s : s * s;
  Vector<F> g_m = gain * along * slope * weight * s_p;
  Vector<F> g_mu = gain * sum * scale * weight;
  Vector<F> share = {}, old_m = {}, old_mu = {}, long_m = {}, long_mu = {};
  if (use.lasting) {
    share = use.share(g, part);
    old_mu = part.load(use.recent + g);
    old_m = part.load(use.recent + use.G + g);
    long_mu = part.load(use.lasting + g);
    long_m = part.load(use.lasting + use.G + g);
  }
  Vector<F> fresh_m = old_m + (g_m - old_m) * share, moment = use.see(long_m, fresh_m, g_m) * r_p;
  moment = cut ? Vector<F>{} : moment * (F)P;
  g_mu -= moment * ((cut ? Vector<F>{} : u) * use.per_n);  // where m is cut, moment is 0 and u may be infinite
  g_mu *= s;
  Vector<F> fresh_mu = old_mu + (g_mu - old_mu) * share, location = use.see(long_mu, fresh_mu, g_mu) * r;
  if (use.lasting) use.keep(g, fresh_mu, fresh_m, finite<F>(g_m) & finite<F>(g_mu) & ~cut, part);
  location *= (F)path.grad_scale;
  moment *= (F)path.grad_scale;
  Vector<F> direct = gain * scale;
  for (int64_t b = 0; b < use.rows; b++) {
    Vector<F> x = part.load(deviations + b * use.G), d = Whole<F>::load(dy + b * stride);
    part.store(dx + b * use.G, d * direct + location + moment * (cut ? Vector<F>{} : P == 1 ? sign<F>(x) : x));
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

}  // namespace ISA
