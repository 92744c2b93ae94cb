// The kernels of an extension, compiled once for each instruction set:
//
//     #define KERNELS "norm/kernels-inl.h"
//     #include "common/targets.h"
//
// includes that file for each, with ISA (the namespace) and ISA_BYTES (the width of a register) set. It therefore has no include
// guard, includes nothing but other files of the kind, and stands in the namespace of an extension. What it refers to is included
// before. TARGETS(VARIANT) lists VARIANT(name) for each, the widest first; `choose` takes one of a table of such.

#pragma once

#include <cstddef>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of lambdas
#define OUTLINE __attribute__((noinline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_VARIANTS 1
#define TARGETS(VARIANT) VARIANT(avx512), VARIANT(avx2), VARIANT(baseline)
#else
#define HAS_X86_VARIANTS 0
#define TARGETS(VARIANT) VARIANT(baseline)
#endif

namespace {

#define ISA baseline
#define ISA_BYTES 16
#include KERNELS
#undef ISA
#undef ISA_BYTES

#if HAS_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ISA avx2
#define ISA_BYTES 32
#include KERNELS
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define ISA avx512
#define ISA_BYTES 64
#include KERNELS
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options
#endif

bool can_run(const char* name) {
#if HAS_X86_VARIANTS
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !strcmp(name, "baseline");
}
// The first variant that this processor can run, or the wanted one; null where there is none.
template <class Variant, size_t count> const Variant* choose(const Variant (&variants)[count], const char* wanted) {
  for (const Variant& v : variants)
    if (can_run(v.name) && (!wanted || !strcmp(wanted, v.name))) return &v;
  return nullptr;
}

}  // namespace
