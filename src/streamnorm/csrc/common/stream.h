// The numbers of a stream that hold for all of its statistics (docs/mathematics.md, section 2.4): how a use mixes them, and what a
// commit keeps and takes. Both extensions take them from here.

#pragma once

#include <cmath>
#include <cstring>

namespace {

// The weights of long-term, short-term and present statistic: constants, or with a window (> 0) what follows from the samples since
// the last commit, those of this use included.
inline void mixing_weights(double window, const double* constants, double samples, double* weights) {
  if (!(window > 0)) {
    memcpy(weights, constants, 3 * sizeof(double));
    return;
  }
  weights[0] = window / (window + samples);
  weights[1] = samples / (window + samples);
  weights[2] = 0;
}

// What a commit keeps of the long-term average and takes of the short-term one.
struct Commit {
  double keep, take;
};
inline Commit commit_weights(double window, const double* constants, double samples) {
  if (!(window > 0)) return {constants[0], constants[1]};
  return {std::exp(-samples / window), -std::expm1(-samples / window)};
}

}  // namespace
