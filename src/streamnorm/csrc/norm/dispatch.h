// The kernels for this processor, and the walk for a call.

#pragma once

#include "norm/call.h"
#include "norm/masked_runs.h"
#include "norm/rows.h"
#include "norm/runs.h"

#define KERNELS "norm/kernels-inl.h"
#include "common/targets.h"

namespace {

struct Variant {
  const char* name;
  const Kernels* (*kernels)(bool wide, double p);
};
#define VARIANT(isa) {#isa, isa::kernels}
const Variant variants[] = {TARGETS(VARIANT)};
#undef VARIANT
// Results do not depend on which is used.
struct {
  const Variant *widest, *usual;
} used = {};

// After 512-bit work an Intel processor lowers its clock for a while, which slows all that follows: Python and the rest of
// PyTorch, too. It makes up for that only in large work on columns, whose sums need more registers than AVX2 has.
constexpr int64_t small_work = 1 << 14;  // elements

bool slowed_by_wide_registers() {
#if HAS_X86_VARIANTS
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// False where the wanted instruction set is not one of this build and processor.
bool choose_variants(const char* wanted) {
  const Variant* chosen = choose(variants, wanted);
  if (!chosen) return false;
  used.widest = used.usual = chosen;
  if (!wanted && !strcmp(chosen->name, "avx512") && slowed_by_wide_registers()) used.usual = chosen + 1;
  return true;
}

template <class W> void walk(const Call& call, bool forward) {
  const bool hard = call.layout->rows && call.layout->G * call.n > small_work;
  const Variant& variant = hard ? *used.widest : *used.usual;
  W kernel(call, *variant.kernels(call.type == Type::f64, call.formula->p));
  if (forward) kernel.forward();
  else kernel.backward();
}

void run(const Call& call, bool forward) {
  if (call.layout->rows) walk<Rows>(call, forward);
  else if (call.mask) walk<MaskedRuns>(call, forward);
  else walk<Runs>(call, forward);
}

}  // namespace
