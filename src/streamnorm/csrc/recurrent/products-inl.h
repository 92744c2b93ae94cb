// Matrix products with the hidden state. See kernels-inl.h.

namespace ISA {

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

}  // namespace ISA
