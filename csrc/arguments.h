// The keyword arguments of one call from Python. An op takes each by its name, which is written
// once; what is missing, of another type or left over raises a TypeError, and what does not fit a
// ValueError, all before memory is touched.
//
// Written against Python's limited API (setup.py defines Py_LIMITED_API), so that one build serves
// every later Python. Only this file, arguments.cpp and module.cpp know Python.
#pragma once

#include <Python.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "views.h"

namespace groundkern {

// Reaches Python as a TypeError; std::invalid_argument, which `fail` throws, as a ValueError.
struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// An error of Python's is set, and reaches it as it is.
struct PythonError {};

// A reference that is ours.
struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// Whether Python's object converts to this type; if not, no Python error is left set. Throws a
// PythonError for a KeyboardInterrupt, and whatever else no refusal may hide.
bool convert(PyObject* from, bool& to);  // True and False alone
bool convert(PyObject* from, int& to);
bool convert(PyObject* from, int64_t& to);
bool convert(PyObject* from, double& to);
bool convert(PyObject* from, View& to);
template <class T>
bool convert(PyObject* from, std::optional<T>& to) {
  if (from == Py_None) return true;
  return convert(from, to.emplace());
}

[[noreturn]] void not_convertible(const std::string& name, PyObject* value);

class Arguments {
 public:
  // As METH_FASTCALL | METH_KEYWORDS hands them over. The references are borrowed, and live until
  // the call returns.
  Arguments(PyObject* const* values, Py_ssize_t positional, PyObject* names);

  template <class T>
  T take(const std::string& name) {
    PyObject* const value = take_object(name);
    T result{};
    if (!convert(value, result)) not_convertible(name, value);
    return result;
  }

  View view(const std::string& name) { return take<View>(name); }
  std::optional<View> optional_view(const std::string& name) {
    return take<std::optional<View>>(name);
  }

  // A tensor that is read, of this dtype and shape.
  template <int Rank>
  Tensor<Rank> tensor(const std::string& name, Dtype dtype, const std::vector<int64_t>& shape) {
    return groundkern::tensor<Rank>(name, view(name), dtype, shape);
  }
  // A tensor that is written.
  template <int Rank>
  Tensor<Rank> output(const std::string& name, Dtype dtype, const std::vector<int64_t>& shape) {
    return groundkern::output<Rank>(name, view(name), dtype, shape);
  }
  // [count], read or written.
  template <class T>
  T* array(const std::string& name, int64_t count) {
    return groundkern::array<T>(name, view(name), count);
  }
  // The same, or null for None.
  template <class T>
  T* optional_array(const std::string& name, int64_t count) {
    const std::optional<View> given = optional_view(name);
    return given ? groundkern::array<T>(name, *given, count) : nullptr;
  }

  // Runs the kernel without Python's lock, once every argument has been taken.
  template <class Kernel>
  void run(const Kernel& kernel) {
    refuse_what_is_left();
    const struct Unlocked {
      PyThreadState* const state = PyEval_SaveThread();
      // It may unwind: before 3.14 Python ends a daemon thread here once the program exits.
      ~Unlocked() noexcept(false) { PyEval_RestoreThread(state); }
    } unlocked;
    kernel();
  }

 private:
  struct Argument {
    std::string name;
    PyObject* value;  // null once it has been taken
  };

  PyObject* take_object(const std::string& name);
  void refuse_what_is_left() const;

  std::vector<Argument> given;
};

}  // namespace groundkern
