// The keyword arguments of one call from Python. An op takes each by its name, which is written
// once; what is missing, of another type or left over raises a TypeError, and what does not fit a
// ValueError, all before memory is touched.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "views.h"

namespace groundkern {

namespace py = pybind11;

class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) {
    for (const auto& [name, value] : given) left[name.cast<std::string>()] = value;
  }

  // An argument of a type that pybind11 converts to.
  template <class T>
  T take(const std::string& name) {
    const auto found = left.find(name);
    if (found == left.end()) throw py::type_error("`" + name + "`: missing");
    const py::handle value = found->second;
    left.erase(found);
    try {
      return value.cast<T>();
    } catch (const py::cast_error&) {
      const std::string type = py::str(py::type::handle_of(value).attr("__name__"));
      throw py::type_error("`" + name + "`: not convertible from " + type);
    }
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
    if (!left.empty()) {
      throw py::type_error("`" + left.begin()->first + "`: not an argument of this function");
    }
    const py::gil_scoped_release release;
    kernel();
  }

 private:
  std::map<std::string, py::handle> left;
};

}  // namespace groundkern
