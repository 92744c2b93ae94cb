// What recurrent/engines/cpu.py tells of a layer's memory.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace {

enum Kind : int64_t { unnormalized, features, sequences };
enum Cell : int64_t { rnn_tanh, rnn_relu, gru, lstm };

// One path of a layer, from its matrix product to the gates. All members are 8 bytes wide, and have the
// names of `_Path` in recurrent/engines/cpu.py, in its order.
struct Path {
  int64_t kind, p;
  // The products, later their deviations from mu (with a statistic for each sequence: x̂), for the rows of all steps; and
  // 1/s, (steps of a block, G) or (rows of all steps).
  void *values, *inverse;
  const void *gain, *bias;
  void *long_, *short_;
  int64_t *count, *samples;
  void *long_grad, *short_grad;
  int64_t *grad_count, *grad_samples;
  void *running_mean, *running_var;
  int64_t running_rows;
  int64_t* tracked;  // of each step, 1 where the running statistics of a feature moved
  void* marks;  // of streams, where 1/s is not kept: (1 + 2·blocks, G), see marks_of; or none
  int64_t samples_before;  // what *samples was before the first step
  void *dx, *d_gain, *d_bias;
  double k, eps;
  double evidence, grad_window;  // the samples that the long-term averages stand for under the window rule, else 0
  double floor;  // the least share of its own moment that a use sees
  double alpha[3], beta[3], momentum, grad_scale;
};

// One layer in one direction: the members of `_Plan`, then its paths.
struct Plan {
  int64_t cell, gates, hidden, is_double;
  int64_t block;  // of how many steps 1/s is kept at a time: all, or a block, which backward begins by finding it again
  const int64_t* starts;  // where the rows of each step begin, and where the last ones end
  void *output, *cells;
  const void *h0, *c0;
  const void* weight;  // (G, H), where the products with the hidden state are made here too
  const void* panels;  // where there are more than a few rows: it, forward its transpose, as `pack` leaves it
  const void* d_output;
  void *d_hidden, *d_cells, *scratch;
  int64_t first_h_flows, h0_wanted;
  int64_t threads;
  Path x, h;
};

// What Python compares its own fields with, one by one, before it hands over the first plan.
struct Field {
  const char* name;
  char kind;  // 'd' for double, 'q' for what else has 8 bytes
  size_t offset;
};
#define FIELD(Struct, member) Field{#member, std::is_same_v<decltype(Struct::member), double> ? 'd' : 'q', offsetof(Struct, member)}
constexpr Field path_fields[] = {
    FIELD(Path, kind), FIELD(Path, p), FIELD(Path, values), FIELD(Path, inverse), FIELD(Path, gain), FIELD(Path, bias),
    {"long", 'q', offsetof(Path, long_)}, {"short", 'q', offsetof(Path, short_)}, FIELD(Path, count), FIELD(Path, samples),
    FIELD(Path, long_grad), FIELD(Path, short_grad), FIELD(Path, grad_count), FIELD(Path, grad_samples), FIELD(Path, running_mean),
    FIELD(Path, running_var), FIELD(Path, running_rows), FIELD(Path, tracked), FIELD(Path, marks), FIELD(Path, samples_before),
    FIELD(Path, dx), FIELD(Path, d_gain), FIELD(Path, d_bias), FIELD(Path, k), FIELD(Path, eps), FIELD(Path, evidence),
    FIELD(Path, grad_window), FIELD(Path, floor),
    {"alpha1", 'd', offsetof(Path, alpha[0])}, {"alpha2", 'd', offsetof(Path, alpha[1])}, {"alpha3", 'd', offsetof(Path, alpha[2])},
    {"beta1", 'd', offsetof(Path, beta[0])}, {"beta2", 'd', offsetof(Path, beta[1])}, {"beta3", 'd', offsetof(Path, beta[2])},
    FIELD(Path, momentum), FIELD(Path, grad_scale)};
constexpr Field plan_fields[] = {
    FIELD(Plan, cell), FIELD(Plan, gates), FIELD(Plan, hidden), FIELD(Plan, is_double), FIELD(Plan, block), FIELD(Plan, starts),
    FIELD(Plan, output), FIELD(Plan, cells), FIELD(Plan, h0), FIELD(Plan, c0), FIELD(Plan, weight), FIELD(Plan, panels),
    FIELD(Plan, d_output), FIELD(Plan, d_hidden), FIELD(Plan, d_cells), FIELD(Plan, scratch), FIELD(Plan, first_h_flows),
    FIELD(Plan, h0_wanted), FIELD(Plan, threads)};
#undef FIELD

// Whether these are all fields up to a size, in their order.
template <size_t count> constexpr bool cover(const Field (&fields)[count], size_t size) {
  for (size_t i = 0; i < count; i++)
    if (fields[i].offset != 8 * i) return false;
  return size == 8 * count;
}
static_assert(cover(path_fields, sizeof(Path)) && cover(plan_fields, offsetof(Plan, x)));
static_assert(offsetof(Plan, h) == offsetof(Plan, x) + sizeof(Path) && sizeof(Plan) == offsetof(Plan, h) + sizeof(Path));

}  // namespace
