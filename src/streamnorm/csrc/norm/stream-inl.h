// The formulas of a statistic, over a range [from, to) of statistics: what a use makes of the stream and then sees of it, scales,
// gradients. See kernels-inl.h.

namespace ISA {

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

// What a use does to the stream of an index, and what it then sees (docs/mathematics.md). Usual: it sees both averages, and all
// indices have counted as much (until a value is not finite). To know so saves half the time.
template <class F, bool usual> struct Stream {
  static constexpr bool is_usual = usual;
  const F* lasting;
  F* recent;
  int64_t *count, G, elements;
  double n, some, per_n, w1, w2, w3, common_share;  // some: n, and 1 where a mask leaves nothing: to be divided by

  INLINE Stream(const Call& call, int64_t from)
      : lasting((const F*)call.lasting), recent((F*)call.recent), count(call.count), G(call.layout->G), elements(call.n),
        n((double)call.n), some((double)larger(1, call.n)), per_n(1 / some), w1(call.mix[0]), w2(call.mix[1]), w3(call.mix[2]),
        common_share(usual ? n / ((double)count[from] + some) : 0) {}

  INLINE bool on() const { return usual || lasting; }
  // This call's share in the short-term average.
  template <class D> INLINE D share(int64_t i) const {
    if (usual) return D{} + common_share;
    return on() ? n / (get<D>(count + i) + some) : D{};
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
    D seen = w3 != 0 ? w3 * value : D{};
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
  bool sees_averages = call.lasting && call.mix[0] != 0 && call.mix[1] != 0;
  if (sees_averages && from < to && counts_alike(call.count, from, to)) fn(Stream<F, true>(call, from));
  else fn(Stream<F, false>(call, from));
}

// What holds for a call, as a type or as a value. The loop over registers, each of which takes a few nanoseconds, is made for the types.
template <bool value_> struct Constant {
  static constexpr bool value = value_;
};
struct Flag {
  bool value;
};
// fn(use, advance, in_units): as types where they are `fixed`.
template <bool fixed, class Fn> INLINE void with_flags(bool use, bool advance, bool in_units, const Fn& fn) {
  if constexpr (fixed) {
    auto in = [&](auto units) INLINED {
      if (use && advance) fn(Constant<true>{}, Constant<true>{}, units);
      else if (use) fn(Constant<true>{}, Constant<false>{}, units);
      else if (advance) fn(Constant<false>{}, Constant<true>{}, units);
    };
    if (in_units) in(Constant<true>{});
    else in(Constant<false>{});
  } else {
    fn(Flag{use}, Flag{advance}, Flag{in_units});
  }
}

// Whether the streamed gradients are in units of 1/s (the location's) and 1/s^p (the moment's): under a window.
INLINE bool gradients_in_units(const Call& call) { return call.lasting && call.formula->windows[1] > 0; }

// mu, from sums over x
template <class F> void locations(const Call& call, int64_t from, int64_t to, const double* sums) {
  F* mu = (F*)call.saved;
  with_stream<F>(call, from, to, [=](auto stream) INLINED {
    each_statistic(from, to, [=](int64_t i, auto kind) INLINED {
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
  double floor = call.lasting ? call.formula->floor : 0;
  bool units = gradients_in_units(call);
  with_stream<F>(call, from, to, [=](auto stream) INLINED {
    with_flags<decltype(stream)::is_usual && P != 0>(use, advance, units, [=](auto use, auto advance, auto in_units) INLINED {
      each_statistic(from, to, [=](int64_t i, auto kind) INLINED {
        typedef decltype(kind) D;
        D share = stream.template share<D>(i), b_m = get<D>(powers + i - from) * stream.per_n;
        auto average_m = stream.average(1, i, share, b_m);
        if (use.value) {
          D m = stream.see(1, i, average_m, b_m), low = floor * b_m;
          if (floor > 0) m = choose(below(m, low), low, m);
          D sigma2 = P == 1 ? k2 * m * m : P == 2 ? k2 * m : k2 * each(m, [=](double v) INLINED { return pow(v, 2 / p); });
          D lift = P == 1 ? m : P == 2 ? D{} + 1 : each(m, [=](double v) INLINED { return v > 0 ? pow(v, 2 / p - 1) : 0; });
          D r = 1 / each(sigma2 + eps, [](double v) INLINED { return __builtin_sqrt(v); });
          D r_3 = r * r * r;  // over 1/s^p in units of it: here no division is needed
          if (in_units.value) r_3 = P == 1 ? r * r : P == 2 ? r : each(r, [=](double v) INLINED { return pow(v, 3 - p); });
          put(inverse + i, r);
          put(slope + i, k2 / p * lift * r_3);
          if (moments) put(moments + i, m);
        }
        if (advance.value) {
          D b_mu = get<D>(sums + i - from) * stream.per_n;
          auto keep = finite<F>(b_mu) & finite<F>(b_m);
          put(slope + i, choose(keep, get<D>(slope + i), D{} + __builtin_nan("")));
          stream.advance(i, stream.average(0, i, share, b_mu), average_m, keep);
        }
      });
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
  auto power = [](const auto& r, double p) INLINED {
    return p == 0 ? r * 0 + 1 : p == 1 ? r : p == 2 ? r * r : each(r, [=](double v) INLINED { return pow(v, p); });
  };
  bool units = gradients_in_units(call);
  with_stream<F>(call, from, to, [=](auto stream) INLINED {
    with_flags<decltype(stream)::is_usual>(use, advance, units, [=](auto use, auto advance, auto in_units) INLINED {
      double per_element = stream.per_n / scale;
      each_statistic(from, to, [=](int64_t i, auto kind) INLINED {
        typedef decltype(kind) D;
        int64_t j = i - from;
        D share = stream.template share<D>(i), lift = get<D>(slope + i), r = get<D>(inverse + i), one = D{} + 1;
        // The stream is in units of r_mu for the location and of r_m for the moment. Without a finite s there are no units.
        D r_mu = in_units.value ? r : one, r_m = in_units.value ? power(r, p) : one, r_m_per_r_mu = in_units.value ? power(r, p - 1) : one;
        D g_m = -(get<D>(sums_from_mu + j) * per_element) * lift;
        auto average_m = stream.average(1, i, share, g_m);
        D seen_m = choose(below(lift, D{} + __builtin_inf()), stream.see(1, i, average_m, g_m), D{});  // 0 where the slope is NaN
        D g_mu = -(get<D>(sums + j) * per_element) * (in_units.value ? one : r), through_m = seen_m * r_m_per_r_mu;
        if (centered) g_mu -= choose(through_m == D{}, D{}, through_m * p * (get<D>(sums_of_u + j) * stream.per_n));
        if (in_units.value) g_mu *= choose(below(D{}, r), one, D{});
        auto average_mu = stream.average(0, i, share, g_mu);
        if (use.value) {
          put(constant + i, stream.see(0, i, average_mu, g_mu) * r_mu * scale);
          put(along + i, p * seen_m * r_m * scale);
        }
        if (advance.value) stream.advance(i, average_mu, average_m, finite<F>(g_m) & finite<F>(g_mu));
      });
    });
  });
}

// Add to the gradients of gain and bias, whose sums over outer indices are dw and db, or null where there is but one; put them where
// they go, if that is no null either; then turn sums over dy into sums over dx̂ = dy·gain.
template <class F>
void parameter_gradients(const Call& call, int64_t from, int64_t to, double* sums, double* sums_from_mu, const void* gain_, double* dw, double* db,
                         void* dw_out, void* db_out) {
  const F *inverse = (const F*)call.saved + call.layout->G, *gain = (const F*)gain_;
  each_statistic(from, to, [=](int64_t i, auto kind) INLINED {
    typedef decltype(kind) D;
    int64_t c = i - from;
    D sum = get<D>(sums + c), sum_from_mu = get<D>(sums_from_mu + c), of_gain = sum_from_mu * get<D>(inverse + i), of_bias = sum;
    if (dw) {
      put(dw + c, of_gain += get<D>(dw + c));
      put(db + c, of_bias += get<D>(db + c));
    }
    if (dw_out) put((F*)dw_out + c, of_gain);
    if (db_out) put((F*)db_out + c, of_bias);
    if (!gain) return;
    put(sums + c, sum * get<D>(gain + c));
    put(sums_from_mu + c, sum_from_mu * get<D>(gain + c));
  });
}

// out = sums / rows
template <class F> void means(int64_t columns, double rows, const double* sums, void* out_) {
  F* out = (F*)out_;
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINED { put(out + i, get<decltype(kind)>(sums + i) / rows); });
}
// Mean and sum of squared deviations from it, over `before` rows, made to cover `rows` further ones, of which Σ d and Σ d² are
// given, d counted from their centre (Chan, Golub and LeVeque 1979).
template <class F>
void merge_moments(int64_t columns, double before, double rows, const void* centre_, const double* sums, const double* squares, double* mean,
                   double* deviations) {
  const F* centre = (const F*)centre_;
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINED {
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
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINED {
    typedef decltype(kind) D;
    put(sums + i, get<D>(sums + i) + get<D>(mean + i) * rows);
  });
}
// powers += Σ (x − mu)²
template <class F> void add_squares(int64_t columns, double rows, const void* mu_, const double* mean, const double* deviations, double* powers) {
  const F* mu = (const F*)mu_;
  each_statistic(0, columns, [=](int64_t i, auto kind) INLINED {
    typedef decltype(kind) D;
    D apart = get<D>(mean + i) - get<D>(mu + i);
    put(powers + i, get<D>(powers + i) + get<D>(deviations + i) + apart * apart * rows);
  });
}

void narrow_sums(const double* from, float* to, int64_t count) {
  each_statistic(0, count, [=](int64_t i, auto kind) INLINED { put(to + i, get<decltype(kind)>(from + i)); });
}

// out = (1/s)·gain, for columns
template <class F> void column_scales(const Call& call, int64_t from, int64_t to, const void* gain_, void* out_) {
  const F *inverse = (const F*)call.saved + call.layout->G + from, *gain = (const F*)gain_;
  F* out = (F*)out_;
  each_statistic(0, to - from, [=](int64_t i, auto kind) INLINED {
    typedef decltype(kind) D;
    put(out + i, gain ? get<D>(inverse + i) * get<D>(gain + i) : get<D>(inverse + i));
  });
}

// A sum over statistics, a register at a time.
struct SumOfRegisters {
  Doubles lanes = {};
  double rest = 0;
  INLINE void add(const Doubles& v) { lanes += v; }
  INLINE void add(double v) { rest += v; }
  INLINE double total() const {
    double sum = rest;
    for (size_t l = 0; l < sizeof lanes / sizeof(double); l++) sum += lanes[l];
    return sum;
  }
};

// A commit of one half of a state: the short-term averages of an index that was used move into its long-term ones.
template <class F> Seen commit(void* lasting_, void* recent_, int64_t* count, int64_t G, Commit weights) {
  F *lasting = (F*)lasting_, *recent = (F*)recent_;
  SumOfRegisters before, after, present, moving;
  each_statistic(0, G, [&](int64_t i, auto kind) INLINED {
    typedef decltype(kind) D;
    auto moves = below(D{}, get<D>(count + i));
    D old, now, moved;
    for (int row = 0; row < 2; row++) {  // the location, and then the moment
      const int64_t at = row * G + i;
      old = get<D>(lasting + at), now = get<D>(recent + at);
      moved = choose(moves, weights.keep * old + weights.take * now, old);
      put(lasting + at, moved);
      put(recent + at, D{});
    }
    before.add(old), after.add(moved), present.add(now);
    moving.add(choose(moves, D{} + 1, D{}));
  });
  memset(count, 0, G * sizeof *count);
  return {before.total(), after.total(), present.total(), G - (int64_t)moving.total()};
}

}  // namespace ISA
