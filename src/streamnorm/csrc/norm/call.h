// What the kernels are told: types, a formula, a call, and the table of loops.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/stream.h"
#include "norm/layout.h"

namespace {

enum class Type : uint8_t { f32, f64, bf16, f16, other };
int64_t bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
// The type of statistics, and of all arithmetic, for elements of a type.
Type wide_of(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

struct Formula {
  double p, k, eps;
  bool centered;
  double windows[2];  // of statistics and of gradients; 0 under the constants that follow
  double alpha[3], beta[3];
  double own;  // P: a use of S samples has a share of S/(S + P) of its own in the gradients under the window rule
  double floor;  // c^−p, the least share of its own moment that a use sees
};

struct Call {
  const Formula* formula;
  const Layout* layout;
  Type type;
  int threads;
  int64_t n;  // elements behind each statistic; under a mask, those of one statistic or another
  const uint8_t* mask;  // 0 where an element does not count: in the order of memory, of which it leaves the channels out; or null
  const void *x, *dy;
  void *y, *dx;
  const void *weight, *bias;  // weight: in the type of statistics
  Type bias_type;
  void *dw, *db;
  Type dw_type;  // that of db is bias_type
  const void* lasting;  // the stream: long (2, G), short (2, G), count (G); or their gradients'
  void* recent;
  int64_t* count;
  double mix[3];
  double grad_scale;
  void* saved;  // (3, G): mu, 1/s, slope, which is s^p times as large where gradients are streamed in units of the scale
  double* moments;  // (G): m, where it is asked for
};

// A block of memory: `rows` stretches of `length` contiguous elements, `from` elements apart where they are read and `to`
// elements apart where they are written. What will be read next, and is asked for meanwhile, lies `next` elements behind
// what is read now, and what will be written next `write` elements behind what is written now. past_cache: whether the
// output is so large that it would not stay in the cache anyway.
struct Block {
  int64_t rows, length, from, to, next, write;
  bool past_cache;
};

// What a commit of one half of a state sees: the sums of its long-term moments before and after, and of the short-term ones before;
// and how many statistics met nothing finite since the last one.
struct Seen {
  double before, after, present;
  int64_t missed;
};

// The loops of kernels-inl.h for one type of statistics and p. Pointers to void are of that type, float or double.
struct Kernels {
  void (*widen_bfloat16)(const void*, float*, int64_t count);
  void (*widen_float16)(const void*, float*, int64_t count);
  void (*narrow_bfloat16)(const float*, void*, int64_t count);
  void (*narrow_float16)(const float*, void*, int64_t count);

  void (*gather)(const Block&, int64_t count, int64_t from_apart, int64_t to_apart, const void* from, void* to);
  double (*sum)(const Block&, const void* x);
  double (*powers)(const Block&, const void* x, double centre, double p);
  void (*output)(const Block&, const void* x, void* y, double mu, double scale, double shift);
  void (*gradients)(const Block&, const void* x, const void* dy, double mu, double centre, double p, double* out);
  void (*input)(const Block&, const void* x, const void* dy, void* dx, double centre, double scale, double constant, double along, double p);

  void (*sum_each)(const Block&, int64_t count, int64_t apart, const void* x, double* out);
  void (*powers_each)(const Block&, int64_t count, int64_t apart, const void* x, const void* centre, double p, double* out);
  void (*output_each)(const Block&, int64_t count, int64_t from_apart, int64_t to_apart, const void* x, void* y, const void* mu,
                      const void* scale, const void* shift);
  void (*gradients_each)(const Block&, int64_t count, int64_t apart, const void* x, const void* dy, const void* mu, bool centered, double p,
                         double* of_dy, double* of_from_mu, double* of_u);
  void (*input_each)(const Block&, int64_t count, int64_t from_apart, int64_t to_apart, const void* x, const void* dy, void* dx,
                     const void* centre, const void* scale, const void* constant, const void* along, double p);

  void (*output_elements)(const Block&, const void* x, void* y, double mu, double inverse, const void* gain, const void* bias);
  void (*gradients_elements)(const Block&, const void* x, const void* dy, double mu, double centre, double inverse, double p,
                             const void* gain, double* dw, double* db, double* out);
  void (*input_elements)(const Block&, const void* x, const void* dy, void* dx, double centre, double inverse, double constant,
                         double along, double p, const void* gain);

  void (*sum_columns)(const Block&, const void* x, double* out);
  void (*powers_columns)(const Block&, const void* x, const void* centre, double p, double* out);
  void (*moments_columns)(const Block&, const void* x, const void* centre, double* sums, int64_t stride);
  void (*output_columns)(const Block&, const void* x, void* y, const void* mu, const void* scale, const void* shift);
  void (*gradients_columns)(const Block&, const void* x, const void* dy, const void* mu, bool centered, double p, double* out, int64_t stride);
  void (*input_columns)(const Block&, const void* x, const void* dy, void* dx, const void* centre, const void* scale,
                        const void* constant, const void* along, double p);
  // For p = 1, or null where there are no instructions for signs.
  void (*gradients_signs_columns)(const Block&, const void* x, const void* dy, const void* mu, bool centered, double* out, int64_t stride,
                                  uint32_t* signs);
  void (*input_signs_columns)(const Block&, const uint32_t* signs, const void* dy, void* dx, const void* scale, const void* constant,
                              const void* along);

  void (*locations)(const Call&, int64_t from, int64_t to, const double* sums);
  void (*scales)(const Call&, int64_t from, int64_t to, const double* sums, const double* powers, bool use, bool advance);
  void (*stream_gradients)(const Call&, int64_t from, int64_t to, const double* sums, const double* sums_from_mu,
                           const double* sums_of_u, void* constant, void* along, bool use, bool advance);
  void (*parameter_gradients)(const Call&, int64_t from, int64_t to, double* sums, double* sums_from_mu, const void* gain, double* dw,
                              double* db, void* dw_out, void* db_out);
  void (*means)(int64_t columns, double rows, const double* sums, void* out);
  void (*merge_moments)(int64_t columns, double before, double rows, const void* centre, const double* sums, const double* squares,
                        double* mean, double* deviations);
  void (*add_means)(int64_t columns, double rows, const double* mean, double* sums);
  void (*add_squares)(int64_t columns, double rows, const void* mu, const double* mean, const double* deviations, double* powers);
  void (*narrow_sums)(const double*, float*, int64_t count);
  void (*column_scales)(const Call&, int64_t from, int64_t to, const void* gain, void* out);

  Seen (*commit)(void* lasting, void* recent, int64_t* count, int64_t G, Commit weights);
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
uint32_t as_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// One element of a parameter, whatever its type.
double number(const void* p, Type type, int64_t i) {
  uint16_t h = type == Type::bf16 || type == Type::f16 ? ((const uint16_t*)p)[i] : 0;
  switch (type) {
    case Type::f64: return ((const double*)p)[i];
    case Type::bf16: return as_float((uint32_t)h << 16);
    case Type::f16: {
      int exponent = h >> 10 & 31, fraction = h & 1023;
      double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
      return h & 0x8000 ? -magnitude : magnitude;
    }
    default: return ((const float*)p)[i];
  }
}
void set_number(void* p, Type type, int64_t i, double value) {
  switch (type) {
    case Type::f64: ((double*)p)[i] = value; return;
    case Type::bf16: {
      uint32_t u = as_bits((float)value);
      ((uint16_t*)p)[i] = value != value ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
      return;
    }
    case Type::f16: {
      uint16_t sign = std::signbit(value) ? 0x8000 : 0;
      double a = std::fabs(value);
      int exponent;
      uint16_t bits;
      if (value != value) bits = 0x7e00;
      else if (a >= 65520) bits = 0x7c00;
      else if (a < 0x1p-14) bits = (uint16_t)nearbyint(a * 0x1p24);
      else {
        frexp(a, &exponent);
        bits = (uint16_t)(((exponent + 13) << 10) + (int)nearbyint(ldexp(a, 11 - exponent)));
      }
      ((uint16_t*)p)[i] = sign | bits;
      return;
    }
    default: ((float*)p)[i] = (float)value;
  }
}

}  // namespace
