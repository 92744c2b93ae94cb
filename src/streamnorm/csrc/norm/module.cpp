// The C++ engine of streamnorm: training steps on CPU tensors. These are the functions that Python calls.
//
// It knows nothing of PyTorch but what tensors.h says, and the OpenMP runtime that PyTorch has loaded. ops/native.py decides what
// comes here; the formulas are in the kernels (…-inl.h), and are explained in ops/plain.py.

#include "common/limited_api.h"

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>

#include "common/kept_memory.h"
#include "common/threads.h"
#include "norm/dispatch.h"
#include "norm/plan.h"
#include "norm/state.h"
#include "norm/tensors.h"

namespace {

constexpr int64_t alone = 12288;  // elements below which neither other threads nor giving up the GIL pays
constexpr int64_t grain = 8192;   // elements of a thread: a few microseconds, as long as to call it

// accepts(plan, x) -> 0: never, 1: as it lies, 2: made contiguous
PyObject* accepts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return refuse("this number of arguments");
  Plan* plan = get_plan(args[0]);
  if (!plan) return nullptr;
  DLTensor x;
  Call call = {};
  Layout layout;
  if (read_input(*plan, args[1], x, call, layout)) return PyLong_FromLong(1);
  if (!has_shape(*plan, args[1], x)) return PyLong_FromLong(0);
  int64_t strides[max_axes], step = 1;
  for (int i = plan->dims - 1; i >= 0; i--) strides[i] = step, step *= x.shape[i];
  return PyLong_FromLong(make_layout(*plan, strides, layout) ? 2 : 0);
}

bool read_parameter(PyObject* object, int64_t channels, const void*& data, Type& type, Plan::Parameter& known) {
  if (object == Py_None) return true;
  DLTensor t;
  if (!borrow_flat(object, channels, t) || t.ndim != 1) return false;
  if (known.object != object || known.data != t.data) {
    if (negated(object) || !fills_storage(object, t)) return false;
    known = {object, t.data};
  }
  data = t.data;
  type = type_of(t);
  return type != Type::other;
}

// A mask over (samples, places), one byte for each, into the call, whose x has been read; and how many samples it leaves. False, with a
// Python error or without, for one that does not lie as x does without its channels.
bool read_mask(const Plan& plan, PyObject* object, const DLTensor& x, Call& call, int64_t& samples) {
  DLTensor t;
  if (!borrow(object, t) || t.dtype.code != 6 || t.dtype.bits != 8 || t.ndim != x.ndim - 1 || !is_contiguous(t) || !fills_storage(object, t)) return false;
  int64_t places = 1, last_stride = INT64_MAX;
  for (int i = 0; i < t.ndim; i++) {
    const int axis = i ? i + 1 : 0;
    if (t.shape[i] != x.shape[axis]) return false;
    if (i) places *= t.shape[i];
    if (t.shape[i] == 1) continue;
    if (x.strides[axis] > last_stride) return false;
    last_stride = x.strides[axis];
  }
  call.mask = (const uint8_t*)t.data;
  samples = 0;
  for (int64_t i = 0; i < plan.samples; i++) samples += count_kept(call.mask + i * places, places) > 0;
  return true;
}

// Whether tensors may have tangents: a level of forward-mode differentiation was entered, the first of which is 0. Or -1.
int has_tangents() {
  PyObject* level = PyDict_GetItemWithError(torch.forward_ad, own.current_level);
  long number = level ? PyLong_AsLong(level) : -1;
  return PyErr_Occurred() ? -1 : number >= 0;
}
// Whether something wants to see every PyTorch operation: a mode, a tracer, tangents. 1, 0, or -1 for an error.
int watched() {
  int found = has_tangents();
  if (!found) found = asked.dispatch_modes ? asked.dispatch_modes() > 0 : answers_other(torch.dispatch_modes, own.zero);
  if (!found) found = asked.function_modes ? asked.function_modes() > 0 : answers_other(torch.function_modes, own.zero);
  if (!found) found = asked.tracing_state ? *asked.tracing_state() != nullptr : answers_other(torch.tracing_state, Py_None);
  return found;
}

bool execute(Call& call, int64_t numel, bool forward) {
  bool enough = true;
  auto guarded = [&] {
    try {
      run(call, forward);
    } catch (const std::bad_alloc&) {
      enough = false;
    }
  };
  call.threads = 1;
  if (numel < alone) {
    guarded();
  } else {
    Reference threads(PyObject_CallFunctionObjArgs(torch.get_num_threads, nullptr));
    if (!threads) return false;
    call.threads = (int)smaller(larger(1, PyLong_AsLong(threads)), (numel + grain - 1) / grain);
    Py_BEGIN_ALLOW_THREADS
    guarded();
    Py_END_ALLOW_THREADS
  }
  if (!enough) PyErr_NoMemory();
  return enough;
}

// What forward leaves for backward, besides x: (plan, saved, grad_scale, weight, bias), and with a stream the gradient half
// of its state. Of weight and bias only the kind is needed, the gain's values are saved.
enum Kept { kept_plan, kept_saved, kept_grad_scale, kept_weight, kept_bias, kept_half };

// forward(ctx, x, weight, bias, (plan, state, grad_scale, stats, mask)) -> y
// Refuses, before anything has changed, whatever it does not take.
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(args[4]) || PyTuple_Size(args[4]) != 5) return refuse("these arguments");
  PyObject *ctx = args[0], *x_object = args[1], *weight = args[2], *bias = args[3];
  PyObject *plan_object = PyTuple_GetItem(args[4], 0), *state = PyTuple_GetItem(args[4], 1), *grad_scale = PyTuple_GetItem(args[4], 2),
           *stats_object = PyTuple_GetItem(args[4], 3), *mask = PyTuple_GetItem(args[4], 4);
  Plan* plan = get_plan(plan_object);
  if (!plan) return nullptr;
  const int watching = watched();
  if (watching) return watching < 0 ? nullptr : refuse("part in what is traced or watched");
  DLTensor x, y, stats = {};
  Call call = {};
  Layout layout;
  if (!read_input(*plan, x_object, x, call, layout) || !fills_storage(x_object, x)) return refuse("this input");
  plan->whole[Plan::whole_x] = x.data;
  int64_t samples = plan->samples;
  if (mask != Py_None && !read_mask(*plan, mask, x, call, samples)) return refuse("this mask");
  Type wide = wide_of(call.type);
  Reference output(new_like_input(*plan, x, y));
  if (!output) return nullptr;
  Reference saved(make_saved(*plan, wide));
  if (!saved) return nullptr;

  // No Python code runs from here on, which could move what is looked at.
  Type weight_type;
  if (!read_parameter(weight, plan->channels, call.weight, weight_type, plan->weight)) return refuse("this gain");
  if (!read_parameter(bias, plan->channels, call.bias, call.bias_type, plan->bias)) return refuse("this bias");
  const bool streams = state != Py_None;
  Half half, grad_half;
  if (streams && !(half.find(state, false) && half.read(plan->G, wide, plan->whole + Plan::whole_state) && grad_half.find(state, true) &&
                   grad_half.read(plan->G, wide, plan->whole + Plan::whole_grad_state)))
    return refuse("this state");
  Buffer moments, own_bias;
  if (stats_object != Py_None) {
    if (!borrow_flat(stats_object, 2 * plan->G, stats) || type_of(stats) == Type::other || !fills_storage(stats_object, stats))
      return refuse("this tensor for statistics");
    call.moments = (double*)moments.zeroed(plan->G * sizeof(double));
  }
  if (call.bias && plan->numel >= alone) {  // as with the gain below: another thread may give a parameter other memory
    const size_t size = plan->channels * bytes(call.bias_type);
    call.bias = memcpy(own_bias.allocate(size), call.bias, size);
  }

  call.y = y.data;
  call.saved = PyBytes_AsString(saved);
  was_passed(saved) = 0;
  if (call.weight) {
    char* gain = saved_gain(*plan, wide, call.saved);
    if (weight_type == wide) memcpy(gain, call.weight, plan->channels * bytes(wide));
    else
      for (int64_t i = 0; i < plan->channels; i++) set_number(gain, wide, i, number(call.weight, weight_type, i));
    call.weight = gain;
  }
  if (streams) {
    half.use(*plan, plan->formula.alpha, samples, call);
  } else {
    call.mix[2] = 1;
  }
  if (!execute(call, plan->numel, true)) return nullptr;
  for (int64_t i = 0; call.moments && i < plan->G; i++) {
    set_number(stats.data, type_of(stats), i, number(call.saved, wide, i));
    set_number(stats.data, type_of(stats), plan->G + i, call.moments[i]);
  }
  PyObject* const* grad = grad_half.tensors;
  Reference kept(streams ? PyTuple_Pack(kept_half + parts, plan_object, saved.object, grad_scale, weight, bias, grad[long_part],
                                        grad[short_part], grad[count_part], grad[samples_part])
                         : PyTuple_Pack(kept_half, plan_object, saved.object, grad_scale, weight, bias));
  if (!kept || PyObject_SetAttr(ctx, own.kept, kept)) return nullptr;
  Reference inputs(mask == Py_None ? PyTuple_Pack(1, x_object) : PyTuple_Pack(2, x_object, mask));
  return inputs && !PyObject_SetAttr(ctx, own.to_save, inputs) ? output.release() : nullptr;
}

// The gradients for (x, weight, bias, call), or null: with Unsupported where dy, or a pass that is not the first, is not for
// C++, and nothing has changed.
PyObject* gradients(PyObject* ctx, PyObject* dy_object, bool first_only) {
  Reference kept(PyObject_GetAttr(ctx, own.kept)), needs(PyObject_GetAttr(ctx, own.needs_input_grad));
  if (!kept || !needs) return nullptr;
  PyObject *saved = PyTuple_GetItem(kept, kept_saved), *grad_scale = PyTuple_GetItem(kept, kept_grad_scale),
           *weight = PyTuple_GetItem(kept, kept_weight), *bias = PyTuple_GetItem(kept, kept_bias);
  const bool streams = PyTuple_Size(kept) > kept_half;
  if (streams && first_only && was_passed(saved)) return refuse("another pass through one graph");
  Reference inputs(PyObject_GetAttr(ctx, own.saved_tensors));  // once: activation checkpointing may have something to say
  if (!inputs) return nullptr;
  PyObject* x_object = PyTuple_GetItem(inputs, 0);
  Plan* plan = get_plan(PyTuple_GetItem(kept, kept_plan));
  if (!plan || !bias || !x_object) return nullptr;
  DLTensor x, dy, t;
  Call call = {};
  Layout layout;
  if (!read_input(*plan, x_object, x, call, layout) || !is_whole(x_object, x, plan->whole[Plan::whole_x])) return refuse("this input");
  int64_t samples = plan->samples;
  if (PyTuple_Size(inputs) > 1 && !read_mask(*plan, PyTuple_GetItem(inputs, 1), x, call, samples)) return refuse("this mask");
  Type wide = wide_of(call.type);
  call.saved = PyBytes_AsString(saved);
  if (!call.saved) return nullptr;
  if (PyBytes_Size(saved) != saved_size(*plan, wide)) return refuse("an input of another type than before");
  if (!borrow(dy_object, dy) || type_of(dy) != call.type || size_of(dy) != plan->numel) return refuse("this output gradient");
  Reference copy;
  if (!same_strides(x, dy) || negated(dy_object)) {
    copy.object = PyObject_CallFunctionObjArgs(torch.copy_like, x_object, dy_object, nullptr);
    if (!copy) return nullptr;
    if (!borrow(copy, dy) || type_of(dy) != call.type || !same_strides(x, dy)) return refuse("this output gradient");
  } else if (!is_whole(dy_object, dy, plan->whole[Plan::whole_dy])) {
    return refuse("this output gradient");
  }
  call.dy = dy.data;
  if (weight != Py_None) call.weight = saved_gain(*plan, wide, call.saved);

  PyObject* of[3] = {x_object, weight, bias};
  void** data[3] = {&call.dx, &call.dw, &call.db};
  Type* types[3] = {&call.type, &call.dw_type, &call.bias_type};
  Reference result(PyTuple_New(4));
  if (!result) return nullptr;
  for (int i = 0; i < 4; i++) {
    PyObject* grad = Py_None;
    if (i < 3 && of[i] != Py_None && PyTuple_GetItem(needs, i) == Py_True) {
      grad = i == 0 ? new_like_input(*plan, x, t) : new_like_parameter(*plan, of[i], t);
      if (!grad) return nullptr;
      *data[i] = t.data;
      *types[i] = type_of(t);
    } else {
      Py_IncRef(grad);
    }
    PyTuple_SetItem(result, i, grad);
  }
  // No Python code runs from here on, which could move what is looked at.
  if (grad_scale != Py_None) {
    if (!borrow_flat(grad_scale, 1, t) || type_of(t) == Type::other || !fills_storage(grad_scale, t)) return refuse("this gradient scale");
    call.grad_scale = number(t.data, type_of(t), 0);
  }
  Half half;
  for (int i = 0; streams && i < parts; i++) half.hold(i, PyTuple_GetItem(kept, kept_half + i));
  if (streams && !half.read(plan->G, wide, plan->whole + Plan::whole_grad_state)) return refuse("this state");
  if (call.dx) {
    call.mix[2] = 1;
    if (streams) {
      half.use(*plan, plan->formula.beta, samples, call);
      was_passed(saved) = 1;
    }
  }
  return execute(call, plan->numel, false) ? result.release() : nullptr;
}

// What autograd calls of a node: (self = ctx, dy). Second derivatives, tangents and what C++ does not take are Python's.
PyObject* apply(PyObject* ctx, PyObject* const* args, Py_ssize_t count) {
  if (count != 1) return refuse("these arguments");
  int more = has_tangents();
  if (!more) more = asked.is_grad_enabled ? asked.is_grad_enabled() : answers_other(torch.is_grad_enabled, Py_False);
  if (more < 0) return nullptr;
  if (!more) {
    PyObject* result = gradients(ctx, args[0], true);
    if (result || !PyErr_ExceptionMatches(own.unsupported)) return result;
    PyErr_Clear();
  }
  return PyObject_CallFunctionObjArgs(own.backward, ctx, args[0], nullptr);
}
// backward(ctx, dy) -> gradients; raises Unsupported where dy is not for C++
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return count == 2 ? gradients(args[0], args[1], false) : refuse("these arguments");
}
PyMethodDef apply_method = {"apply", (PyCFunction)(void (*)(void))apply, METH_FASTCALL, nullptr};

// attach(type of the nodes, the Python function behind it): let autograd call apply above
PyObject* attach(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyType_Check(args[0])) return refuse("these arguments");
  Py_IncRef(args[1]);
  own.backward = args[1];
  Reference method(PyDescr_NewMethod((PyTypeObject*)args[0], &apply_method));
  if (!method || PyObject_SetAttrString(args[0], "apply", method)) return nullptr;
  Py_IncRef(Py_None);
  return Py_None;
}

// setup(dictionary of the objects that `torch` keeps, and "exchange", the capsule of DLPack's table; PyTorch's library, instruction
// set or None) -> (instruction set, whether there are threads)
PyObject* setup(PyObject*, PyObject* args) {
  PyObject* objects;
  const char *library, *wanted;
  if (!PyArg_ParseTuple(args, "O!sz", &PyDict_Type, &objects, &library, &wanted)) return nullptr;
  PyObject* capsule = PyDict_GetItemString(objects, "exchange");
  auto* api = capsule ? (const DLPackExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  if (!api) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_TypeError, "setup() wants exchange");
  if (api->header.version.major != 1 || !api->borrow || !api->to_object) {
    PyErr_Format(PyExc_ImportError, "PyTorch speaks DLPack %d, the C++ engine was made for version 1", (int)api->header.version.major);
    return nullptr;
  }
  if (!choose_variants(wanted)) {
    PyErr_Format(PyExc_ValueError, "this processor or build has no instruction set %s; STREAMNORM_ISA can be baseline, avx2 or avx512", wanted);
    return nullptr;
  }
  if (!take_from(objects) || !find_places(torch.state_fields, torch.formula_fields)) return nullptr;
  exchange = api;
  const bool threads = find_threads(library);
  find_asked(library);
  return Py_BuildValue("sO", used.widest->name, threads ? Py_True : Py_False);
}

// lend(double?, tensors, shapes, counts) -> where tensors lie, 0 for None, if each is a contiguous one in plain CPU memory, has its
// shape, and is float or double, the last `counts` of them int64; else None
PyObject* lend(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) return refuse("these arguments");
  const Type wide = PyObject_IsTrue(args[0]) == 1 ? Type::f64 : Type::f32;
  const Py_ssize_t tensors = PyTuple_Size(args[1]), floats = tensors - PyLong_AsLong(args[3]);
  if (PyErr_Occurred() || PyTuple_Size(args[2]) != tensors) return PyErr_Occurred() ? nullptr : refuse("as many shapes as these");
  Reference addresses(PyTuple_New(tensors));
  for (Py_ssize_t i = 0; addresses && i < tensors; i++) {
    PyObject *tensor = PyTuple_GetItem(args[1], i), *shape = PyTuple_GetItem(args[2], i);
    DLTensor t = {};
    if (tensor != Py_None) {
      bool fits = borrow(tensor, t) && PyTuple_Check(shape) && t.ndim == PyTuple_Size(shape) && is_contiguous(t) && fills_storage(tensor, t);
      for (int k = 0; fits && k < t.ndim; k++) fits = t.shape[k] == PyLong_AsLongLong(PyTuple_GetItem(shape, k));
      if (PyErr_Occurred()) return nullptr;
      if (!fits || !(i < floats ? type_of(t) == wide && !negated(tensor) : is_int64(t))) {
        Py_IncRef(Py_None);
        return Py_None;
      }
    }
    PyObject* address = PyLong_FromVoidPtr(t.data);
    if (!address) return nullptr;
    PyTuple_SetItem(addresses, i, address);
  }
  return addresses.release();
}
// are_whole(tensors…): whether each is None, or a tensor in plain CPU memory whose storage holds all of it
PyObject* are_whole(PyObject*, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; i++) {
    DLTensor t;
    if (args[i] != Py_None && !(borrow(args[i], t) && fills_storage(args[i], t))) return PyBool_FromLong(0);
  }
  return PyBool_FromLong(1);
}

// keep_memory(bytes) -> the setting before: at most so many bytes wait for the next outputs
PyObject* keep_memory(PyObject*, PyObject* bytes) {
  const size_t most = PyLong_AsSize_t(bytes);
  return PyErr_Occurred() ? nullptr : PyLong_FromSize_t(KeptMemory::get().keep_at_most(most));
}
// waiting_memory() -> bytes that wait
PyObject* waiting_memory(PyObject*, PyObject*) { return PyLong_FromSize_t(KeptMemory::get().waiting_now()); }

template <class Fn> PyCFunction function(Fn fn) { return (PyCFunction)(void (*)(void))fn; }

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"plan", make_plan, METH_VARARGS, nullptr},
    {"accepts", function(accepts), METH_FASTCALL, nullptr},
    {"forward", function(forward), METH_FASTCALL, nullptr},
    {"backward", function(backward), METH_FASTCALL, nullptr},
    {"attach", function(attach), METH_FASTCALL, nullptr},
    {"commit", commit, METH_O, nullptr},
    {"lend", function(lend), METH_FASTCALL, nullptr},
    {"are_whole", function(are_whole), METH_FASTCALL, nullptr},
    {"keep_memory", keep_memory, METH_O, nullptr},
    {"waiting_memory", waiting_memory, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Training steps on CPU tensors; see ops/native.py.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject* m = PyModule_Create(&module);
  own.unsupported = PyErr_NewException("streamnorm.ops._native.Unsupported", PyExc_ValueError, nullptr);
  const struct {
    const char* name;
    PyObject** place;
  } names[] = {{"kept", &own.kept},
               {"to_save", &own.to_save},
               {"saved_tensors", &own.saved_tensors},
               {"needs_input_grad", &own.needs_input_grad},
               {"_current_level", &own.current_level}};
  if (!(own.zero = PyLong_FromLong(0))) return nullptr;
  for (const auto& entry : names)
    if (!(*entry.place = PyUnicode_InternFromString(entry.name))) return nullptr;
  if (!m || !own.unsupported || PyModule_AddObjectRef(m, "Unsupported", own.unsupported)) return nullptr;
  return m;
}
