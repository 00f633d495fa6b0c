#include "arguments.h"

namespace groundkern {
namespace {

// A conversion by Python failed if it set an error, which is forgotten here: the caller names the
// argument.
bool converted() {
  if (PyErr_Occurred() == nullptr) return true;
  if (PyErr_ExceptionMatches(PyExc_Exception) == 0 ||
      PyErr_ExceptionMatches(PyExc_MemoryError) != 0) {
    throw PythonError();
  }
  PyErr_Clear();
  return false;
}

std::string utf8(PyObject* text) {
  Py_ssize_t size = 0;
  const char* const start = PyUnicode_AsUTF8AndSize(text, &size);
  if (start != nullptr) return std::string(start, static_cast<size_t>(size));
  PyErr_Clear();
  return "?";
}

bool convert(PyObject* from, std::uintptr_t& to) {
  const Owned number(PyNumber_Index(from));
  if (number != nullptr) to = PyLong_AsSize_t(number.get());  // an error if it is negative
  return converted();
}

// A tuple alone: a list could change while an item's __index__ runs.
bool convert(PyObject* from, std::vector<int64_t>& to) {
  if (PyTuple_Check(from) == 0) return false;
  const Py_ssize_t size = PyTuple_Size(from);
  to.resize(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!groundkern::convert(PyTuple_GetItem(from, i), to[static_cast<size_t>(i)])) return false;
  }
  return true;
}

}  // namespace

bool convert(PyObject* from, bool& to) {
  to = from == Py_True;
  return to || from == Py_False;
}

bool convert(PyObject* from, int64_t& to) {
  static_assert(sizeof(long long) == sizeof(int64_t));
  to = PyLong_AsLongLong(from);  // of an integer, or of what has __index__
  return converted();
}

bool convert(PyObject* from, int& to) {
  int64_t wide = 0;
  if (!convert(from, wide)) return false;
  to = static_cast<int>(wide);
  return to == wide;
}

bool convert(PyObject* from, double& to) {
  to = PyFloat_AsDouble(from);
  return converted();
}

bool convert(PyObject* from, View& to) {
  if (PyTuple_Check(from) == 0 || PyTuple_Size(from) != 4) return false;
  auto& [address, dtype, sizes, strides] = to;
  return convert(PyTuple_GetItem(from, 0), address) && convert(PyTuple_GetItem(from, 1), dtype) &&
         convert(PyTuple_GetItem(from, 2), sizes) && convert(PyTuple_GetItem(from, 3), strides);
}

void not_convertible(const std::string& name, PyObject* value) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  const Owned type_name(PyObject_GetAttrString(type, "__name__"));
  const std::string got = type_name == nullptr ? "?" : utf8(type_name.get());
  PyErr_Clear();
  throw TypeError("`" + name + "`: not convertible from " + got);
}

Arguments::Arguments(PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  if (positional != 0) throw TypeError("every argument is a keyword");
  const Py_ssize_t count = names == nullptr ? 0 : PyTuple_Size(names);
  given.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    given.push_back({utf8(PyTuple_GetItem(names, i)), values[i]});
  }
}

PyObject* Arguments::take_object(const std::string& name) {
  for (Argument& one : given) {
    if (one.value == nullptr || one.name != name) continue;
    PyObject* const value = one.value;
    one.value = nullptr;
    return value;
  }
  throw TypeError("`" + name + "`: missing");
}

void Arguments::refuse_what_is_left() const {
  for (const Argument& one : given) {
    if (one.value != nullptr) throw TypeError("`" + one.name + "`: not an argument of this function");
  }
}

}  // namespace groundkern
