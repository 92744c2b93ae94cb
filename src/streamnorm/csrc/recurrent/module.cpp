// The C++ engine of recurrent networks: time steps on CPU memory. These are the functions that Python calls.
//
// It knows nothing of PyTorch. recurrent/engines/cpu.py describes a layer's memory once in a Plan, and asks for one time step a
// call; between the calls PyTorch multiplies matrices. The formulas are in the kernels (…-inl.h).

#include "common/limited_api.h"

#include <cstdint>
#include <type_traits>

#include "common/stream.h"
#include "common/threads.h"
#include "recurrent/plan.h"

#define KERNELS "recurrent/kernels-inl.h"
#include "common/targets.h"

namespace {

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
const Variant variants[] = {TARGETS(VARIANT)};
#undef VARIANT
const Variant* variant = nullptr;

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
  variant = choose(variants, name);
  if (!variant) return PyErr_Format(PyExc_ImportError, "STREAMNORM_ISA=%s cannot run here", name ? name : "");
  bool outruns = false;
#if HAS_X86_VARIANTS
  // MKL leaves AVX-512 alone on AMD's processors.
  outruns = !strcmp(variant->name, "avx512") && __builtin_cpu_is("amd");
#endif
  return Py_BuildValue("sO", variant->name, outruns ? Py_True : Py_False);
}

// layouts() -> (fields of a plan, fields of a path), each a tuple of names and struct's letters
PyObject* tuple_of(const Field* fields, size_t count) {
  PyObject* tuple = PyTuple_New((Py_ssize_t)count);
  for (size_t i = 0; tuple && i < count; i++) {
    PyObject* field = Py_BuildValue("(sC)", fields[i].name, fields[i].kind);
    if (!field || PyTuple_SetItem(tuple, (Py_ssize_t)i, field)) {
      Py_DECREF(tuple);
      return nullptr;
    }
  }
  return tuple;
}
PyObject* layouts(PyObject*, PyObject*) {
  return Py_BuildValue("(NN)", tuple_of(plan_fields, sizeof plan_fields / sizeof *plan_fields), tuple_of(path_fields, sizeof path_fields / sizeof *path_fields));
}

PyMethodDef methods[] = {
    {"layouts", layouts, METH_NOARGS, nullptr},
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
