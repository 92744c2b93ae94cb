// The loops over a block of memory. See kernels-inl.h.

namespace ISA {

// --- the formula: P is 1, 2, or 0 for any other p -------------------------------------------------------------------------

template <class F> OUTLINE void raise(F* values, F exponent) {
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
      map<F>(block.length, [=](int64_t i) INLINED {
        fetch(x + i + block.next);
        store(copy + i, load(x + i));
      });
    }
}

template <class F> INLINE double sum(const Block& block, const void* x_) {
  const int64_t next = block.next;
  Sum<F> sum;
  const F* x = (const F*)x_;
  for (int64_t r = 0; r < block.rows; r++, x += block.from)
    reduce<1>(block.length, &sum, [=](auto, int64_t i, Pack<F>* q) INLINED {
      fetch(x + i + next);
      q[0] = load(x + i);
    });
  return total(sum);
}

// Σ |x − centre|^p
template <class F, int P> INLINE double powers(const Block& block, const void* x_, double centre, double p) {
  const int64_t next = block.next;
  Sum<F> sum;
  const F* x = (const F*)x_;
  Pack<F> c = all((F)centre);
  for (int64_t r = 0; r < block.rows; r++, x += block.from)
    reduce<1>(block.length, &sum, [=](auto, int64_t i, Pack<F>* q) INLINED {
      fetch(x + i + next);
      q[0] = power<P>(load(x + i) - c, (F)p);
    });
  return total(sum);
}

// y = (x − mu)·scale + shift
template <class F> INLINE void output(const Block& block, const void* x_, void* y_, double mu, double scale, double shift) {
  const F* x = (const F*)x_;
  F* y = (F*)y_;
  Pack<F> m = all((F)mu), a = all((F)scale), b = all((F)shift);
  writing(block, y, [=](auto put) mutable INLINED {
    for (int64_t r = 0; r < block.rows; r++, x += block.from, y += block.to)
      map<F>(block.length, [=](int64_t i) INLINED {
        fetch(x + i + block.next);
        put(y + i, (load(x + i) - m) * a + b);
      });
  });
}

// out = Σ dy, Σ dy·(x − mu), Σ u
template <class F, int P> INLINE void gradients(const Block& block, const void* x_, const void* dy_, double mu, double centre, double p, double* out) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  Pack<F> m = all((F)mu), c = all((F)centre);
  const int64_t next = block.next;
  Sum<F> sums[3];
  for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from)
    reduce<3>(block.length, sums, [=](auto, int64_t i, Pack<F>* q) INLINED {
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
INLINE void input(const Block& block, const void* x_, const void* dy_, void* dx_, double centre, double scale, double constant, double along, double p) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  F* dx = (F*)dx_;
  Pack<F> c = all((F)centre), a = all((F)scale), b = all((F)constant), k = all((F)along);
  writing(block, dx, [=](auto put) mutable INLINED {
    for (int64_t r = 0; r < block.rows; r++, x += block.from, dy += block.from, dx += block.to)
      map<F>(block.length, [=](int64_t i) INLINED {
        fetch(x + i + block.next);
        fetch(dy + i + block.next);
        put(dx + i, load(dy + i) * a + (b + slope_times<P>(k, load(x + i) - c, (F)p)));
      });
  });
}

// --- the same for `count` neighbouring statistics, whose blocks are alike and so far apart: where blocks are small, what one waits for
// is done while others are calculated. Arrays hold a value for each statistic; a null pointer stands for zeros ---------------------

template <class F> INLINE double value_or_0(const F* values, int64_t i) { return values ? values[i] : 0; }

template <class F> void sum_each(const Block& block, int64_t count, int64_t apart, const void* x, double* out) {
  for (int64_t i = 0; i < count; i++) out[i] = sum<F>(block, (const F*)x + i * apart);
}

template <class F, int P>
void powers_each(const Block& block, int64_t count, int64_t apart, const void* x, const void* centre, double p, double* out) {
  for (int64_t i = 0; i < count; i++) out[i] = powers<F, P>(block, (const F*)x + i * apart, value_or_0((const F*)centre, i), p);
}

template <class F>
void output_each(const Block& block, int64_t count, int64_t from_apart, int64_t to_apart, const void* x, void* y, const void* mu,
                 const void* scale, const void* shift) {
  for (int64_t i = 0; i < count; i++)
    output<F>(block, (const F*)x + i * from_apart, (F*)y + i * to_apart, ((const F*)mu)[i], ((const F*)scale)[i], value_or_0((const F*)shift, i));
}

template <class F, int P>
void gradients_each(const Block& block, int64_t count, int64_t apart, const void* x, const void* dy, const void* mu, bool centered, double p,
                    double* of_dy, double* of_from_mu, double* of_u) {
  for (int64_t i = 0; i < count; i++) {
    double sums[3], from = ((const F*)mu)[i];
    gradients<F, P>(block, (const F*)x + i * apart, (const F*)dy + i * apart, from, centered ? from : 0, p, sums);
    of_dy[i] = sums[0], of_from_mu[i] = sums[1], of_u[i] = sums[2];
  }
}

template <class F, int P>
void input_each(const Block& block, int64_t count, int64_t from_apart, int64_t to_apart, const void* x, const void* dy, void* dx,
                const void* centre, const void* scale, const void* constant, const void* along, double p) {
  for (int64_t i = 0; i < count; i++)
    input<F, P>(block, (const F*)x + i * from_apart, (const F*)dy + i * from_apart, (F*)dx + i * to_apart, value_or_0((const F*)centre, i),
                ((const F*)scale)[i], ((const F*)constant)[i], ((const F*)along)[i], p);
}

// --- the same with a gain and a bias for each element of a stretch --------------------------------------------------------

template <class F> void output_elements(const Block& block, const void* x_, void* y_, double mu, double inverse, const void* gain_, const void* bias_) {
  const F* x = (const F*)x_;
  const F *gain = (const F*)gain_, *bias = (const F*)bias_;
  F* y = (F*)y_;
  Pack<F> m = all((F)mu), a = all((F)inverse);
  for (int64_t r = 0; r < block.rows; r++, x += block.from, y += block.to)
    map<F>(block.length, [=](int64_t i) INLINED { store(y + i, (load(x + i) - m) * (a * load(gain + i)) + load(bias + i)); });
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
    reduce<3>(block.length, sums, [=](auto lanes, int64_t i, Pack<F>* q) INLINED {
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
    map<F>(block.length, [=](int64_t i) INLINED {
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
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINED {
    add_rows<1, decltype(count)::packs, F>(block, lanes, c, out + c, 0, [=, &block](int, int64_t i, Pack<F>* q) INLINED {
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
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINED {
    constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
    Pack<F> from[W];
    EACH(w, W, from[w] = load_or(centre, c + w * L, (F)0));
    add_rows<1, W, F>(block, lanes, c, out + c, 0, [&](int w, int64_t i, Pack<F>* q) INLINED {
      fetch(x + i + block.next);
      q[0] = power<P>(load(x + i) - from[w], (F)p);
    });
  });
}

// sums += Σ d, sums[stride…] += Σ d², where d = x − centre
template <class F> void moments_columns(const Block& block, const void* x_, const void* centre_, double* sums, int64_t stride) {
  const F *x = (const F*)x_, *centre = (const F*)centre_;
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINED {
    constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
    Pack<F> from[W];
    EACH(w, W, from[w] = load(centre + c + w * L));
    add_rows<2, W, F>(block, lanes, c, sums + c, stride, [&](int w, int64_t i, Pack<F>* q) INLINED {
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
  writing(block, y, [=, &block](auto put) INLINED {
    tiles<F>(block.length, [=, &block](auto, auto count, int64_t c) INLINED {
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
  tiles<F>(block.length, [=, &block](auto lanes, auto count, int64_t c) INLINED {
    constexpr int W = decltype(count)::packs, L = Pack<F>::lanes;
    Pack<F> m[W], from[W];
    EACH(w, W, {
      m[w] = load(mu + c + w * L);
      from[w] = centered ? m[w] : all((F)0);
    });
    add_rows<3, W, F>(block, lanes, c, out + c, stride, [&](int w, int64_t i, Pack<F>* q) INLINED {
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
  gradients_columns<F, P>(block, x, dy, mu, centered, p, out, stride, [](int64_t, const Pack<F>&) INLINED {});
}

template <class F, int P>
void input_columns(const Block& block, const void* x_, const void* dy_, void* dx_, const void* centre_, const void* scale_,
                   const void* constant_, const void* along_, double p) {
  const F *x = (const F*)x_, *dy = (const F*)dy_;
  F* dx = (F*)dx_;
  const F *centre = (const F*)centre_, *scale = (const F*)scale_, *constant = (const F*)constant_, *along = (const F*)along_;
  writing(block, dx, [=, &block](auto put) INLINED {
    tiles<F>(block.length, [=, &block](auto, auto count, int64_t c) INLINED {
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
                          [=](int64_t pack, const Pack<F>& d) INLINED { signs[pack] = signs_of(d); });
}
template <class F>
void input_signs_columns(const Block& block, const uint32_t* signs, const void* dy_, void* dx_, const void* scale_, const void* constant_, const void* along_) {
  const F* dy = (const F*)dy_;
  F* dx = (F*)dx_;
  const F *scale = (const F*)scale_, *constant = (const F*)constant_, *along = (const F*)along_;
  writing(block, dx, [=, &block](auto put) INLINED {
    tiles<F>(block.length, [=, &block](auto, auto count, int64_t c) INLINED {
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

}  // namespace ISA
