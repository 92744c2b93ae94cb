// What is kept from call to call of inputs of one shape under one formula.

#pragma once

#include "norm/tensors.h"

namespace {

// The tensors of one half of a state: the averages (2, G), the elements counted (G) and the samples of uses; and of the forward half
// the samples seen before.
enum Part { long_part, short_part, count_part, samples_part, parts, seen_part = parts, all_parts };

// What is known of a (view, formula) before any tensor is seen, and the layout of the tensor seen last.
struct Plan : View {
  Formula formula;
  bool known = false;
  int64_t strides[max_axes];
  Layout layout;
  static constexpr int spares = 4, largest_spare = 1 << 16;
  PyObject* spare[spares] = {};  // see make_saved
  int last = 0;
  Description like_input, like_parameter;
  // The gain and the bias that were looked at last, as by is_whole, and found to be no negated views of their memory.
  struct Parameter {
    const PyObject* object;
    const void* data;
  } weight = {}, bias = {};
  // The tensors that were found whole last, see is_whole.
  enum { whole_x, whole_dy, whole_state, whole_grad_state = whole_state + all_parts, whole_end = whole_grad_state + parts };
  const void* whole[whole_end] = {};
};

// The layout of a tensor with these strides, or null where these kernels cannot walk it.
const Layout* find_layout(Plan& plan, const DLTensor& x) {
  if (plan.known && !memcmp(plan.strides, x.strides, plan.dims * sizeof(int64_t))) return &plan.layout;
  if (!make_layout(plan, x.strides, plan.layout)) {
    plan.known = false;
    return nullptr;
  }
  memcpy(plan.strides, x.strides, plan.dims * sizeof(int64_t));
  plan.known = true;
  return &plan.layout;
}

const char* const plan_name = "streamnorm.plan";
void free_plan(PyObject* capsule) {
  Plan* plan = (Plan*)PyCapsule_GetPointer(capsule, plan_name);
  for (PyObject* spare : plan->spare) Py_XDECREF(spare);
  Py_XDECREF(plan->like_input.arguments);
  Py_XDECREF(plan->like_parameter.arguments);
  delete plan;
}
// A plan is a tuple whose first item is the capsule that make_plan returns.
Plan* get_plan(PyObject* plan) {
  PyObject* capsule = PyTuple_GetItem(plan, 0);
  return capsule ? (Plan*)PyCapsule_GetPointer(capsule, plan_name) : nullptr;
}

// plan(split, kept, axes, p, centered, k, eps, window or 0, grad_window or 0, own, floor, alpha, beta) -> capsule
PyObject* make_plan(PyObject*, PyObject* args) {
  PyObject *split, *kept, *origin;
  Formula f = {};
  int centered;
  if (!PyArg_ParseTuple(args, "O!O!O!dpdddddd(ddd)(ddd)", &PyTuple_Type, &split, &PyTuple_Type, &kept, &PyTuple_Type, &origin, &f.p,
                        &centered, &f.k, &f.eps, &f.windows[0], &f.windows[1], &f.own, &f.floor, &f.alpha[0], &f.alpha[1], &f.alpha[2], &f.beta[0], &f.beta[1],
                        &f.beta[2]))
    return nullptr;
  f.centered = centered;
  int axes = (int)PyTuple_Size(split);
  if (axes > max_axes || PyTuple_Size(origin) != axes) return refuse("a view of so many axes");
  Plan plan = {};
  plan.axes = axes;
  plan.formula = f;
  plan.numel = plan.samples = plan.channels = plan.G = 1;
  bool in_order = axes > 0;
  for (int i = 0; i < axes; i++) {
    plan.size[i] = PyLong_AsLongLong(PyTuple_GetItem(split, i));
    plan.origin[i] = (int)PyLong_AsLong(PyTuple_GetItem(origin, i));
    if (PyErr_Occurred()) return nullptr;
    if (plan.size[i] < 1) return refuse("an empty view");
    if (plan.numel > INT64_MAX / 16 / plan.size[i]) return refuse("a view of so many elements");
    in_order = in_order && plan.origin[i] >= 0 && plan.origin[i] >= plan.dims - 1 && plan.origin[i] <= plan.dims;
    plan.dims = plan.origin[i] + 1;
    plan.numel *= plan.size[i];
    if (plan.origin[i] == 0) plan.samples *= plan.size[i];
    if (plan.origin[i] == 1) plan.channels *= plan.size[i];
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(kept); i++) {
    long k = PyLong_AsLong(PyTuple_GetItem(kept, i));
    if (k < 0 || k >= axes || plan.kept[k]) return refuse("a view that keeps an axis it does not have, or keeps it twice");
    plan.kept[k] = true;
    plan.G *= plan.size[k];
  }
  if (PyErr_Occurred()) return nullptr;
  if (!in_order) plan.dims = -1;  // no tensor has so many
  plan.n = plan.numel / plan.G;
  return PyCapsule_New(new Plan(plan), plan_name, free_plan);
}

// x, if it is of the plan's shape and of a type that the kernels take.
bool has_shape(const Plan& plan, PyObject* object, DLTensor& x) {
  if (!borrow(object, x) || type_of(x) == Type::other || x.ndim != plan.dims || negated(object)) return false;
  for (int i = 0, a = 0; i < x.ndim; i++) {
    int64_t size = 1;
    for (; a < plan.axes && plan.origin[a] == i; a++) size *= plan.size[a];
    if (size != x.shape[i]) return false;
  }
  return true;
}
// And if it lies so that they can walk it.
bool read_input(Plan& plan, PyObject* object, DLTensor& x, Call& call, Layout& layout) {
  if (!has_shape(plan, object, x)) return false;
  const Layout* found = find_layout(plan, x);
  if (!found) return false;
  layout = *found;
  call.formula = &plan.formula;
  call.layout = &layout;
  call.type = type_of(x);
  call.n = plan.n;
  call.x = x.data;
  call.grad_scale = 1;
  return true;
}

// (3, G), then a copy of the gain, and room to read the last values as a whole pack. The last byte tells whether a gradient
// has reached the stream: what another pass through the same graph adds was counted with the first.
Py_ssize_t saved_size(const Plan& plan, Type wide) { return (3 * plan.G + plan.channels) * bytes(wide) + 64; }
char& was_passed(PyObject* saved) { return PyBytes_AsString(saved)[PyBytes_Size(saved) - 1]; }
char* saved_gain(const Plan& plan, Type wide, void* saved) { return (char*)saved + 3 * plan.G * bytes(wide); }
// A bytes object for it: one of the last calls' that nobody holds any more, since to allocate a few kilobytes takes as
// long as to normalize them.
PyObject* make_saved(Plan& plan, Type wide) {
  Py_ssize_t size = saved_size(plan, wide);
  PyObject** vacant = &plan.spare[plan.last = (plan.last + 1) % Plan::spares];
  for (PyObject*& spare : plan.spare) {
    if (!spare) vacant = &spare;
    else if (Py_REFCNT(spare) == 1 && PyBytes_Size(spare) == size) {
      Py_IncRef(spare);
      return spare;
    }
  }
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, size);
  if (!bytes || size > Plan::largest_spare) return bytes;
  Py_XDECREF(*vacant);
  Py_IncRef(bytes);
  return *vacant = bytes;
}

// An uninitialized tensor like an input; large ones get kept memory.
PyObject* new_like_input(Plan& plan, const DLTensor& x, DLTensor& out) {
  const size_t size = plan.numel * x.dtype.bits / 8;
  KeptMemory& memory = KeptMemory::get();
  if (!memory.serves(size)) return new_tensor(x, plan.like_input, out);
  DLManagedTensorVersioned* managed = memory.take(x, size);
  if (!managed) return PyErr_NoMemory();
  out = managed->tensor;
  void* tensor = nullptr;
  if (exchange->to_object(managed, &tensor)) return nullptr;  // whose the memory is then, is not known: it is not given back
  return (PyObject*)tensor;
}
// And one for the gradient of a gain or bias.
PyObject* new_like_parameter(Plan& plan, PyObject* parameter, DLTensor& out) {
  DLTensor t;
  if (!borrow_flat(parameter, plan.channels, t) || type_of(t) == Type::other || t.ndim != 1) return refuse("this gain or bias");
  return new_tensor(t, plan.like_parameter, out);
}

}  // namespace
