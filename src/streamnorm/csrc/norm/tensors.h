// PyTorch's tensors, read and made without PyTorch's headers: through DLPack's C exchange table, which gives a tensor's pointer,
// shape and strides without a copy or an owner, and a few functions that ops/native.py hands over.

#pragma once

#include "common/limited_api.h"

#include <cstdint>
#include <cstring>

#include "common/dlpack.h"
#include "common/kept_memory.h"
#include "common/threads.h"
#include "norm/call.h"
#include "norm/layout.h"

namespace {

// What the engine works with of PyTorch. setup() takes each object from a dictionary, where it has the name that it has here.
struct Torch {
  PyObject *Tensor, *Parameter;  // the types of tensors that may come here
  PyObject* dtypes;              // a tuple, in the order of Type
  PyObject *empty_strided, *copy_like, *is_neg, *untyped_storage, *storage_offset;
  PyObject *get_num_threads, *is_grad_enabled, *tracing_state, *dispatch_modes, *function_modes;
  PyObject* forward_ad;  // the dictionary of that module
  PyObject *state_fields, *formula_fields;  // tuples of names, see core/spec.py
} torch = {};
const DLPackExchangeAPI* exchange = nullptr;

#define OBJECT(name) {#name, &Torch::name}
const struct {
  const char* name;
  PyObject* Torch::*object;
} torch_objects[] = {OBJECT(Tensor), OBJECT(Parameter), OBJECT(dtypes), OBJECT(empty_strided), OBJECT(copy_like), OBJECT(is_neg),
                     OBJECT(untyped_storage), OBJECT(storage_offset), OBJECT(get_num_threads), OBJECT(is_grad_enabled),
                     OBJECT(tracing_state), OBJECT(dispatch_modes), OBJECT(function_modes), OBJECT(forward_ad), OBJECT(state_fields),
                     OBJECT(formula_fields)};
#undef OBJECT
static_assert(sizeof torch_objects / sizeof *torch_objects == sizeof(Torch) / sizeof(PyObject*), "each object is taken from the dictionary");

// What the extension has of its own: made when it is imported, and `backward` by attach().
struct Own {
  PyObject* unsupported;  // the exception for what C++ does not take
  PyObject* backward;     // the Python function behind a node's `apply`
  PyObject* zero;
  PyObject *kept, *to_save, *saved_tensors, *needs_input_grad, *current_level;  // names of attributes
} own = {};

// Fill `torch`; false with an error set, and nothing changed, where an object is missing.
bool take_from(PyObject* objects) {
  for (const auto& entry : torch_objects)
    if (!PyDict_GetItemString(objects, entry.name)) return PyErr_Format(PyExc_TypeError, "setup() wants %s", entry.name), false;
  for (const auto& entry : torch_objects) {
    PyObject *object = PyDict_GetItemString(objects, entry.name), *before = torch.*entry.object;
    Py_IncRef(object);
    torch.*entry.object = object;
    Py_XDECREF(before);
  }
  return true;
}

// An owned reference, or null with a Python error set.
struct Reference {
  PyObject* object;
  explicit Reference(PyObject* o = nullptr) : object(o) {}
  Reference(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object); }
  operator PyObject*() const { return object; }
  PyObject* release() {
    PyObject* o = object;
    object = nullptr;
    return o;
  }
};

// Questions about the thread that PyTorch's library answers in a nanosecond, where it exports the function under the name of today, and
// its Python functions in forty.
struct Asked {
  int64_t (*dispatch_modes)(), (*function_modes)();  // how many there are
  void* const* (*tracing_state)();                   // a reference to a std::shared_ptr, which begins with the pointer
  bool (*is_grad_enabled)();
} asked = {};
void find_asked(const char* library) {
  find_function(library, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", asked.dispatch_modes);
  find_function(library, "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv", asked.function_modes);
  find_function(library, "_ZN5torch3jit6tracer15getTracingStateEv", asked.tracing_state);
  find_function(library, "_ZN3c108GradMode10is_enabledEv", asked.is_grad_enabled);
}
// Whether a Python function, asked without arguments, answers with something else than `no`: 1 or 0, or -1 with an error set.
int answers_other(PyObject* function, PyObject* no) {
  Reference answer(PyObject_CallFunctionObjArgs(function, nullptr));
  return !answer ? -1 : answer == no ? 0 : PyObject_RichCompareBool(answer, no, Py_NE);
}

PyObject* refuse(const char* what) {
  PyErr_Format(own.unsupported, "the C++ engine does not take %s", what);
  return nullptr;
}

Type type_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return Type::other;
  if (t.dtype.code == 2) return t.dtype.bits == 32 ? Type::f32 : t.dtype.bits == 64 ? Type::f64 : t.dtype.bits == 16 ? Type::f16 : Type::other;
  return t.dtype.code == 4 && t.dtype.bits == 16 ? Type::bf16 : Type::other;
}
bool is_int64(const DLTensor& t) { return t.dtype.code == 0 && t.dtype.bits == 64 && t.dtype.lanes == 1; }
int64_t size_of(const DLTensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; i++) n *= t.shape[i];
  return n;
}

// A plain tensor in CPU memory; false, without a Python error, for any other.
bool borrow(PyObject* object, DLTensor& t) {
  PyObject* type = (PyObject*)Py_TYPE(object);
  if (type != torch.Tensor && type != torch.Parameter) return false;
  if (exchange->borrow(object, &t)) {
    PyErr_Clear();
    return false;
  }
  t.data = (char*)t.data + t.byte_offset;
  return t.device.type == 1 && t.data;
}
bool same_strides(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; i++)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}
bool is_contiguous(const DLTensor& t) {
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; i--) {
    if (t.shape[i] > 1 && t.strides[i] != step) return false;
    step *= t.shape[i];
  }
  return true;
}
// A contiguous tensor of `count` elements, such as a gain or a buffer of the state.
bool borrow_flat(PyObject* object, int64_t count, DLTensor& t) { return borrow(object, t) && size_of(t) == count && is_contiguous(t); }

// Whether the storage behind a tensor is as long as the tensor says: it may have been freed or shrunk. False where it is not,
// without a Python error.
bool fills_storage(PyObject* tensor, const DLTensor& t) {
  int64_t last = 0;
  for (int i = 0; i < t.ndim; i++) {
    if (t.shape[i] == 0) return true;
    last += (t.shape[i] - 1) * t.strides[i];
  }
  PyObject* storage = PyObject_CallFunctionObjArgs(torch.untyped_storage, tensor, nullptr);
  PyObject* offset = storage ? PyObject_CallFunctionObjArgs(torch.storage_offset, tensor, nullptr) : nullptr;
  const int64_t first = offset ? PyLong_AsLongLong(offset) : -1, length = storage ? PyObject_Size(storage) : -1;
  Py_XDECREF(storage);
  Py_XDECREF(offset);
  if (PyErr_Occurred()) PyErr_Clear();
  return first >= 0 && (first + last + 1) * (t.dtype.bits / 8) <= length;
}
// The same for a tensor that a plan meets again and again in the same place: who shrinks a storage moves it, so that memory which
// is where it was when it was looked at last is not looked at again.
bool is_whole(PyObject* tensor, const DLTensor& t, const void*& known) {
  if (t.data == known) return true;
  if (!fills_storage(tensor, t)) return false;
  known = t.data;
  return true;
}

// Whether memory holds the values with the other sign, as it does for the imaginary part of a conjugate.
bool negated(PyObject* tensor) {
  PyObject* answer = PyObject_CallFunctionObjArgs(torch.is_neg, tensor, nullptr);
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer != Py_False;
}

// What the new tensor made last was asked for with: the next one is often like it.
struct Description {
  PyObject* arguments = nullptr;  // (shape, strides, dtype)
  Type type;
  int64_t strides[max_axes];
};

PyObject* tuple_of(int count, const int64_t* values) {
  Reference tuple(PyTuple_New(count));
  for (int i = 0; tuple && i < count; i++) {
    PyObject* value = PyLong_FromLongLong(values[i]);
    if (!value) return nullptr;
    PyTuple_SetItem(tuple, i, value);
  }
  return tuple.release();
}
// An uninitialized tensor with the shape, the strides and the type of t, and where it is. A description serves one shape.
PyObject* new_tensor(const DLTensor& t, Description& d, DLTensor& out) {
  const Type type = type_of(t);
  const size_t strides_size = t.ndim * sizeof(int64_t);
  Reference arguments(d.arguments);
  if (d.arguments && d.type == type && !memcmp(d.strides, t.strides, strides_size)) {
    Py_IncRef(arguments);
  } else {
    Reference shape(tuple_of(t.ndim, t.shape)), strides(tuple_of(t.ndim, t.strides));
    PyObject* dtype = PyTuple_GetItem(torch.dtypes, (Py_ssize_t)type);
    arguments.object = shape && strides && dtype ? PyTuple_Pack(3, shape.object, strides.object, dtype) : nullptr;
    if (!arguments) return nullptr;
    Py_IncRef(arguments);
    Py_XDECREF(d.arguments);
    d.arguments = arguments;
    d.type = type;
    memcpy(d.strides, t.strides, strides_size);
  }
  Reference tensor(PyObject_CallObject(torch.empty_strided, arguments));
  if (!tensor) return nullptr;
  if (!borrow(tensor, out)) return refuse("this memory");
  expect_writes(out.data, size_of(t) * t.dtype.bits / 8);
  return tensor.release();
}

}  // namespace
