// The loops of the C++ engine, each over a block of memory or a range of statistics; module.cpp puts them together.
// It includes this file once per instruction set, with ISA (the namespace) and ISA_BYTES (the width of a register) set;
// there is therefore no include guard.
//
// Every loop works on packs of 64 bytes, whatever the register width, and every sum is folded in the same order
// (packs in fours or eights, then in double precision, then over chunks of fixed size). So neither the instruction set nor the
// number of threads changes a single bit of a result.
//
// A stretch that is no whole number of packs ends with a pack that overlaps the one before: sums mask out what was
// counted, writes repeat it. A stretch shorter than one pack is read and written as a whole pack: the caller pads it.

#include "norm/packs-inl.h"
#include "norm/blocks-inl.h"
#include "norm/stream-inl.h"

namespace ISA {

template <class F, int P> const Kernels* table() {
  static const Kernels kernels = {
      widen<BFloat16>,
      widen<Float16>,
      narrow<BFloat16>,
      narrow<Float16>,
      gather<F>,
      sum<F>,
      powers<F, P>,
      output<F>,
      gradients<F, P>,
      input<F, P>,
      sum_each<F>,
      powers_each<F, P>,
      output_each<F>,
      gradients_each<F, P>,
      input_each<F, P>,
      output_elements<F>,
      gradients_elements<F, P>,
      input_elements<F, P>,
      sum_columns<F>,
      powers_columns<F, P>,
      moments_columns<F>,
      output_columns<F>,
      gradients_columns<F, P>,
      input_columns<F, P>,
#if ISA_BYTES == 64
      gradients_signs_columns<F>,
      input_signs_columns<F>,
#else
      nullptr,
      nullptr,
#endif
      locations<F>,
      scales<F, P>,
      stream_gradients<F>,
      parameter_gradients<F>,
      means<F>,
      merge_moments<F>,
      add_means,
      add_squares<F>,
      narrow_sums,
      column_scales<F>,
      commit<F>,
  };
  return &kernels;
}
template <class F> const Kernels* table(double p) { return p == 1 ? table<F, 1>() : p == 2 ? table<F, 2>() : table<F, 0>(); }
const Kernels* kernels(bool wide, double p) { return wide ? table<double>(p) : table<float>(p); }

}  // namespace ISA
