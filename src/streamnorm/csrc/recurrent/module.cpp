// The C++ engine of recurrent networks: time steps on CPU memory.
//
// It knows nothing of PyTorch. recurrent/engines/cpu.py describes a layer's memory once in a Plan, and asks for one time step a
// call; between the calls PyTorch multiplies matrices. The formulas are in kernels-inl.h.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/threads.h"

namespace {

enum Kind : int64_t { unnormalized, features, sequences };
enum Cell : int64_t { rnn_tanh, rnn_relu, gru, lstm };

// One path of a layer, from its matrix product to the gates. All members are 8 bytes wide, in the order of native.py.
struct Path {
  int64_t kind, p;
  // The products, later their deviations from mu (with a statistic for each sequence: x̂), for the rows of all steps; and
  // 1/s, (steps of a block, G) or (rows of all steps).
  void *values, *inverse;
  const void *gain, *bias;
  void *lasting, *recent;
  int64_t *count, *samples;
  void *lasting_grad, *recent_grad;
  int64_t *count_grad, *samples_grad;
  void *running_mean, *running_var;
  int64_t running_rows;
  int64_t* tracked;  // of each step, 1 where the running statistics of a feature moved
  void* marks;  // of streams, where 1/s is not kept: (1 + 2·blocks, G), see marks_of; or none
  int64_t samples_before;  // what *samples was before the first step
  void *dx, *d_gain, *d_bias;
  double k, eps, window, alpha[3], beta[3], momentum, grad_scale;
};

// One layer in one direction.
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

// --- the kernels, once per instruction set ---------------------------------------------------------------------------------

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86_VARIANTS 1
#else
#define HAS_X86_VARIANTS 0
#endif

#define ISA baseline
#define ISA_BYTES 16
#include "recurrent/kernels-inl.h"
#undef ISA
#undef ISA_BYTES

#if HAS_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ISA avx2
#define ISA_BYTES 32
#include "recurrent/kernels-inl.h"
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define ISA avx512
#define ISA_BYTES 64
#include "recurrent/kernels-inl.h"
#undef ISA
#undef ISA_BYTES
#pragma GCC pop_options
#endif

typedef void (*Kernel)(const Plan&, int64_t);
struct Variant {
  const char* name;
  Kernel forward[2], backward[2];  // of float and double
  void (*recall[2])(const Plan&, int64_t block, int64_t end);
  void (*pack[2])(const void* b, int64_t row, int64_t column, int64_t K, int64_t N, void* panels);
  void (*multiply[2])(const void* a, int64_t row, int64_t term, const void* panels, void* out, int64_t M, int64_t N, int64_t K, bool add, int64_t threads);
};
#define VARIANT(isa) \
  { #isa, {isa::forward_step<float>, isa::forward_step<double>}, {isa::backward_step<float>, isa::backward_step<double>}, \
    {isa::recall<float>, isa::recall<double>}, \
    {isa::pack<float>, isa::pack<double>}, {isa::multiply<float>, isa::multiply<double>} }
const Variant variants[] = {
#if HAS_X86_VARIANTS
    VARIANT(avx512),
    VARIANT(avx2),
#endif
    VARIANT(baseline),
};
const Variant* variant = nullptr;

bool can_run(const char* name) {
#if HAS_X86_VARIANTS
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !strcmp(name, "baseline");
}

// --- what Python calls -------------------------------------------------------------------------------------------------------

// The plan and a number; null with an error set where they are not.
const Plan* arguments(PyObject* const* args, Py_ssize_t nargs, int64_t* number) {
  char* bytes = nullptr;
  Py_ssize_t length = 0;
  if (nargs != 2 || PyBytes_AsStringAndSize(args[0], &bytes, &length) < 0 || length != sizeof(Plan)) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "expected a plan of %zd bytes and the number of a step", (Py_ssize_t)sizeof(Plan));
    return nullptr;
  }
  *number = PyLong_AsLongLong(args[1]);
  if (*number == -1 && PyErr_Occurred()) return nullptr;
  return (const Plan*)bytes;
}

// forward(plan, number): one step, whose matrix product has been made
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  int64_t number;
  const Plan* plan = arguments(args, nargs, &number);
  if (!plan) return nullptr;
  variant->forward[plan->is_double](*plan, number);
  Py_RETURN_NONE;
}
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  int64_t number;
  const Plan* plan = arguments(args, nargs, &number);
  if (!plan) return nullptr;
  variant->backward[plan->is_double](*plan, number);
  Py_RETURN_NONE;
}

// All arguments as integers; false with an error set where they are not that many.
bool integers(PyObject* const* args, Py_ssize_t nargs, int64_t* values, Py_ssize_t wanted) {
  if (nargs != wanted) return PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", wanted, nargs), false;
  for (Py_ssize_t i = 0; i < wanted; i++) {
    values[i] = PyLong_AsLongLong(args[i]);
    if (values[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

// pack(double?, b, row stride, column stride, K, N, panels)
PyObject* pack(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  int64_t v[7];
  if (!integers(args, nargs, v, 7)) return nullptr;
  variant->pack[v[0] != 0]((void*)v[1], v[2], v[3], v[4], v[5], (void*)v[6]);
  Py_RETURN_NONE;
}

// multiply(double?, a, row stride, term stride, panels of b, out, M, N, K, threads)
PyObject* multiply(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  int64_t v[10];
  if (!integers(args, nargs, v, 10)) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  variant->multiply[v[0] != 0]((void*)v[1], v[2], v[3], (void*)v[4], (void*)v[5], v[6], v[7], v[8], false, v[9]);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// forward_all(plan, steps): all of them, matrix products included
PyObject* forward_all(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  int64_t steps;
  const Plan* plan = arguments(args, nargs, &steps);
  if (!plan) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  for (int64_t number = 0; number < steps; number++) variant->forward[plan->is_double](*plan, number);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}
PyObject* backward_all(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  int64_t steps;
  const Plan* plan = arguments(args, nargs, &steps);
  if (!plan) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  for (int64_t end = steps; end > 0;) {
    int64_t block = (end - 1) / plan->block, first = block * plan->block;
    if (plan->block < steps) variant->recall[plan->is_double](*plan, block, end);
    while (end > first) variant->backward[plan->is_double](*plan, --end);
  }
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// setup(wanted instruction set or None, PyTorch's library) -> (its name, whether multiply is likely to outrun PyTorch's BLAS)
PyObject* setup(PyObject*, PyObject* args) {
  const char *name, *library;
  if (!PyArg_ParseTuple(args, "zs", &name, &library)) return nullptr;
  find_threads(library);
  for (const Variant& v : variants)
    if (can_run(v.name) && (!name || !strcmp(name, v.name))) {
      variant = &v;
      bool outruns = false;
#if HAS_X86_VARIANTS
      // MKL leaves AVX-512 alone on AMD's processors.
      outruns = !strcmp(v.name, "avx512") && __builtin_cpu_is("amd");
#endif
      return Py_BuildValue("sO", v.name, outruns ? Py_True : Py_False);
    }
  return PyErr_Format(PyExc_ImportError, "STREAMNORM_ISA=%s cannot run here", name ? name : "");
}

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"forward", (PyCFunction)(void*)forward, METH_FASTCALL, nullptr},
    {"backward", (PyCFunction)(void*)backward, METH_FASTCALL, nullptr},
    {"pack", (PyCFunction)(void*)pack, METH_FASTCALL, nullptr},
    {"multiply", (PyCFunction)(void*)multiply, METH_FASTCALL, nullptr},
    {"forward_all", (PyCFunction)(void*)forward_all, METH_FASTCALL, nullptr},
    {"backward_all", (PyCFunction)(void*)backward_all, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_recurrent", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__recurrent() { return PyModule_Create(&module); }
