// The state of a stream: its two halves, what a use makes of them beforehand, and the commit.

#pragma once

#include "norm/dispatch.h"
#include "norm/plan.h"

namespace {

// Where tuples from Python have what is looked for; setup() finds out, by name.
struct Places {
  int state_size, state[2][all_parts];  // of the forward half and of the gradient half
  int p, kappa, windows[2], limit;      // in a formula
} places = {};

// False with an error set where a name is missing.
bool find_place(PyObject* names, const char* wanted, int& place) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(names); i++)
    if (!PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, i), wanted)) {
      place = (int)i;
      return true;
    }
  if (!PyErr_Occurred()) PyErr_Format(PyExc_ImportError, "the C++ engine looks for %s in %R: build it from these sources", wanted, names);
  return false;
}
bool find_places(PyObject* state_fields, PyObject* formula_fields) {
  const char* const names[2][parts] = {{"long", "short", "count", "samples"}, {"long_grad", "short_grad", "grad_count", "grad_samples"}};
  Places found = {};
  found.state_size = (int)PyTuple_Size(state_fields);
  for (int grad = 0; grad < 2; grad++)
    for (int i = 0; i < parts; i++)
      if (!find_place(state_fields, names[grad][i], found.state[grad][i])) return false;
  if (!find_place(state_fields, "seen", found.state[0][seen_part]) || !find_place(formula_fields, "p", found.p) ||
      !find_place(formula_fields, "kappa", found.kappa) || !find_place(formula_fields, "window", found.windows[0]) ||
      !find_place(formula_fields, "grad_window", found.windows[1]) || !find_place(formula_fields, "limit", found.limit))
    return false;
  places = found;
  return true;
}

// The forward or the gradient half of a state. It owns references: while the GIL is released, another thread may put other tensors
// in the place of these.
struct Half {
  PyObject* tensors[all_parts] = {};
  DLTensor part[all_parts];
  bool gradients = true;

  Half() = default;
  Half(const Half&) = delete;
  ~Half() {
    for (PyObject* tensor : tensors) Py_XDECREF(tensor);
  }

  // state: a tuple in the order of spec.State, or a module's dict of buffers
  bool find(PyObject* state, bool grad) {
    bool tuple = PyTuple_Check(state);
    if (tuple ? PyTuple_Size(state) != places.state_size : !PyDict_Check(state)) return false;
    gradients = grad;
    for (int i = 0; i < (grad ? parts : all_parts); i++) {
      const int place = places.state[grad][i];
      if (!hold(i, tuple ? PyTuple_GetItem(state, place) : PyDict_GetItemWithError(state, PyTuple_GetItem(torch.state_fields, place))))
        return false;
    }
    return true;
  }
  bool hold(int i, PyObject* tensor) {
    Py_XDECREF(tensors[i]);
    Py_XINCREF(tensor);
    tensors[i] = tensor;
    return tensor;
  }
  // known: places of is_whole, one for each part
  bool read(int64_t G, Type wide, const void** known) {
    auto fits = [&](Part i, int axes, int64_t size) {
      return borrow_flat(tensors[i], size, part[i]) && part[i].ndim == axes && is_whole(tensors[i], part[i], known[i]);
    };
    auto average = [&](Part i) { return fits(i, 2, 2 * G) && part[i].shape[0] == 2 && type_of(part[i]) == wide; };
    auto integers = [&](Part i, int axes, int64_t size) { return fits(i, axes, size) && is_int64(part[i]); };
    return average(long_part) && average(short_part) && integers(count_part, 1, G) && integers(samples_part, 0, 1) &&
           (gradients || integers(seen_part, 0, 1));
  }
  int64_t& samples() const { return *(int64_t*)part[samples_part].data; }
  int64_t& seen() const { return *(int64_t*)part[seen_part].data; }
  // The samples that the long-term average stands for, or 0 where there is no window.
  double lasting(const double* windows) const { return gradients || windows[0] == 0 ? windows[gradients] : evidence(windows[0], seen()); }
  // Count the samples of this use, which then mixes with these constants or by the window.
  void use(const Plan& plan, const double* constants, int64_t use_samples, Call& call) {
    call.lasting = part[long_part].data;
    call.recent = part[short_part].data;
    call.count = (int64_t*)part[count_part].data;
    samples() += use_samples;
    const double own = gradients ? (double)use_samples / ((double)use_samples + plan.formula.own) : 0;
    mixing_weights(lasting(plan.formula.windows), constants, (double)samples(), own, call.mix);
  }
};

// What a commit of both halves of a stream sees.
struct Signs {
  double before, after, present;  // as in Seen, of the forward half
  int64_t missed[2];
  bool leapt(double p) const { return after > 10 * before && after > pow(10, p) * before; }
  bool outgrown(double p, double limit) const { return present > limit * before && present > pow(limit, p) * before; }
};
// False, with nothing changed, for a state that is not in plain CPU memory.
bool commit_state(PyObject* state, const double* kappa, const double* windows, Signs& signs) {
  Half halves[2];
  DLTensor lasting, count;
  if (!halves[0].find(state, false) || !halves[1].find(state, true)) return false;
  if (!borrow(halves[0].tensors[long_part], lasting) || !borrow(halves[0].tensors[count_part], count)) return false;
  Type type = type_of(lasting);
  const int64_t G = size_of(count);
  static const void* known[256][2 * all_parts];  // see is_whole; a layer has its place by where its memory is
  const void** whole = known[(uintptr_t)lasting.data / 64 % 256];
  if (type != Type::f32 && type != Type::f64) return false;
  if (!halves[0].read(G, type, whole) || !halves[1].read(G, type, whole + all_parts)) return false;
  for (int grad = 0; grad < 2; grad++) {
    const DLTensor* part = halves[grad].part;
    const Commit weights = commit_weights(halves[grad].lasting(windows), kappa + 2 * grad, (double)halves[grad].samples());
    if (!grad) halves[0].seen() += halves[0].samples();
    const Kernels& loops = *used.usual->kernels(type == Type::f64, 1);
    const Seen seen = loops.commit(part[long_part].data, part[short_part].data, (int64_t*)part[count_part].data, G, weights);
    if (!grad) signs.before = seen.before, signs.after = seen.after, signs.present = seen.present;
    signs.missed[grad] = halves[grad].samples() > 0 ? seen.missed : 0;
    halves[grad].samples() = 0;
  }
  return true;
}

// commit([(state, formula), ...]) -> (those that it does not take, signs of a training that runs away: tuples of the use's number and
// what was seen)
PyObject* commit(PyObject*, PyObject* uses) {
  if (!PyList_Check(uses)) return refuse("uses that are no list");
  Reference rest(PyList_New(0)), signs(PyList_New(0));
  for (Py_ssize_t i = 0; rest && signs && i < PyList_Size(uses); i++) {
    PyObject *use = PyList_GetItem(uses, i), *state_object = PyTuple_GetItem(use, 0), *formula = PyTuple_GetItem(use, 1);
    if (!formula) return nullptr;
    PyObject *order = PyTuple_GetItem(formula, places.p), *constants = PyTuple_GetItem(formula, places.kappa),
             *bound = PyTuple_GetItem(formula, places.limit);
    if (!order || !constants || !bound) return nullptr;
    double p = PyFloat_AsDouble(order), limit = PyFloat_AsDouble(bound), kappa[4] = {}, windows[2] = {};
    for (int half = 0; half < 2; half++) {
      PyObject* window = PyTuple_GetItem(formula, places.windows[half]);
      if (window && window != Py_None) windows[half] = PyFloat_AsDouble(window);
    }
    for (int k = 0; constants != Py_None && k < 4; k++) kappa[k] = PyFloat_AsDouble(PyTuple_GetItem(constants, k));
    if (PyErr_Occurred()) return nullptr;
    Signs found = {};
    if (!commit_state(state_object, kappa, windows, found)) {
      if (PyErr_Occurred() || PyList_Append(rest, use)) return nullptr;
    } else if (found.leapt(p) || found.outgrown(p, limit) || found.missed[0] || found.missed[1]) {
      Reference sign(Py_BuildValue("(ndddOLL)", i, found.before, found.after, found.present, found.outgrown(p, limit) ? Py_True : Py_False,
                                   (long long)found.missed[0], (long long)found.missed[1]));
      if (!sign || PyList_Append(signs, sign)) return nullptr;
    }
  }
  return rest && signs ? Py_BuildValue("(OO)", (PyObject*)rest, (PyObject*)signs) : nullptr;
}

}  // namespace
