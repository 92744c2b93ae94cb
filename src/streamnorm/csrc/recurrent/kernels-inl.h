// Time steps of recurrent networks, forward and backward. module.cpp includes this file once per instruction set, with
// ISA (the namespace) and ISA_BYTES (the width of a register) set; it therefore has no include guard.
//
// A step walks over the hidden units in blocks of one register. For the units of a block it normalizes both paths of
// every gate and then computes the gates, while all of that is in the cache. The formulas of the normalization are
// explained in plain.py, those of the networks in recurrent/steps.py, their derivatives in recurrent/engines/by_hand.py.

#include "recurrent/vectors-inl.h"
#include "recurrent/products-inl.h"
#include "recurrent/norms-inl.h"

namespace ISA {

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
