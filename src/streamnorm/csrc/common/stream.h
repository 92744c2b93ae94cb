// The numbers of a stream that hold for all of its statistics (docs/mathematics.md, "The window rule"): how a use mixes them, and
// what a commit keeps and takes. Both extensions take them from here.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr double prior_samples = 16;  // spec.PRIOR_SAMPLES

// The samples that a long-term average stands for under the window rule, where it has taken in so many.
inline double evidence(double window, int64_t seen) {
  double all = prior_samples + (double)seen;
  return window < all ? window : all;
}

// The weights of long-term, short-term and present statistic: constants, or under the window rule, where the long-term average
// stands for some samples (> 0), what follows from those since the last commit, this use's included; the present statistic then has
// a share of its own.
inline void mixing_weights(double lasting, const double* constants, double samples, double own, double* weights) {
  if (!(lasting > 0)) {
    memcpy(weights, constants, 3 * sizeof(double));
    return;
  }
  weights[0] = (1 - own) * (lasting / (lasting + samples));
  weights[1] = (1 - own) * (samples / (lasting + samples));
  weights[2] = own;
}

// What a commit keeps of the long-term average and takes of the short-term one.
struct Commit {
  double keep, take;
};
inline Commit commit_weights(double lasting, const double* constants, double samples) {
  if (!(lasting > 0)) return {constants[0], constants[1]};
  return {lasting / (lasting + samples), samples / (lasting + samples)};
}

}  // namespace
