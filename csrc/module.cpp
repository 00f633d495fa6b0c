// groundkern._C: the module, in Python's limited API of 3.10.
//
// It exposes raw memory to Python: call it through groundkern's native launchers.
#include <new>
#include <stdexcept>

#include "bindings.h"
#include "cpu/isa.h"

namespace groundkern {
namespace {

// What `body` returns; an exception of C++ becomes one of Python.
template <class Body>
PyObject* answer(const Body& body) {
  try {
    return body();
  } catch (const TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const PythonError&) {  // is set
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <void (*call)(Arguments&)>
PyObject* entry(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  return answer([&] {
    Arguments given(values, positional, names);
    call(given);
    Py_INCREF(Py_None);
    return Py_None;
  });
}

template <void (*call)(Arguments&)>
PyMethodDef method(const char* name) {
  const auto untyped = reinterpret_cast<void (*)()>(&entry<call>);  // as PyMethodDef wants it
  return {name, reinterpret_cast<PyCFunction>(untyped), METH_FASTCALL | METH_KEYWORDS, nullptr};
}

PyObject* cpu_isas(PyObject*, PyObject*) {
  return answer([] {
    Owned names(PyList_New(0));
    if (names == nullptr) throw PythonError();
    for (const char* name : isa_names()) {
      const Owned text(PyUnicode_FromString(name));
      if (text == nullptr || PyList_Append(names.get(), text.get()) != 0) throw PythonError();
    }
    return names.release();
  });
}

PyObject* cpu_isa(PyObject*, PyObject*) {
  return answer([] { return PyUnicode_FromString(chosen_isa().name); });
}

PyObject* multiplies(PyObject*, PyObject* dtype) {
  return answer([&] {
    int code = 0;
    if (!convert(dtype, code)) not_convertible("dtype", dtype);
    return PyBool_FromLong(has_matrix_product(static_cast<Dtype>(code)) ? 1 : 0);
  });
}

PyMethodDef METHODS[] = {method<forward_attention_map>("attention_map_forward"),
                         method<backward_attention_map>("attention_map_backward"),
                         method<forward_linear_cross_entropy>("linear_cross_entropy_forward"),
                         method<backward_linear_cross_entropy>("linear_cross_entropy_backward"),
                         method<forward_side_attention>("side_attention_forward"),
                         method<backward_side_attention>("side_attention_backward"),
                         {"cpu_isas", cpu_isas, METH_NOARGS, nullptr},
                         {"cpu_isa", cpu_isa, METH_NOARGS, nullptr},
                         {"has_matrix_product", multiplies, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

#ifdef _OPENMP
constexpr int64_t OPENMP = _OPENMP;  // the year and month of the standard
#else
constexpr int64_t OPENMP = 0;
#endif
#ifdef __clang__
const char COMPILER[] = __VERSION__;  // names itself
#else
const char COMPILER[] = "GCC " __VERSION__;
#endif

struct Constant {
  const char* name;
  int64_t value;
};

const Constant CONSTANTS[] = {{"float32", static_cast<int64_t>(Dtype::float32)},
                              {"bfloat16", static_cast<int64_t>(Dtype::bfloat16)},
                              {"float16", static_cast<int64_t>(Dtype::float16)},
                              {"int32", static_cast<int64_t>(Dtype::int32)},
                              {"int64", static_cast<int64_t>(Dtype::int64)},
                              {"lanes", LANES},
                              {"entries", ENTRIES},
                              {"terms", static_cast<int64_t>(ROW_TERMS)},
                              {"openmp", OPENMP}};

#ifdef __SANITIZE_ADDRESS__
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif

// Fills the module; -1 with an error set if that failed.
int fill(PyObject* module) {
  for (const Constant& one : CONSTANTS) {
    if (PyModule_AddIntConstant(module, one.name, static_cast<long>(one.value)) != 0) return -1;
  }
  if (PyModule_AddStringConstant(module, "compiler", COMPILER) != 0) return -1;
  return PyModule_AddObjectRef(module, "sanitized", SANITIZED ? Py_True : Py_False);
}

// No state, so each sub-interpreter may have the module. The limited API of 3.10 has no slots to
// promise more: one with a lock of its own refuses the import, and a free-threaded Python takes its
// lock back, with a warning.
PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, reinterpret_cast<void*>(&fill)}, {0, nullptr}};

PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "groundkern's C++ kernels. Every argument is a keyword, named as in csrc/ops.h; a tensor is "
    "(address, dtype code, sizes, strides in elements).",
    0,
    METHODS,
    SLOTS,
    nullptr,
    nullptr,
    nullptr};

}  // namespace
}  // namespace groundkern

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&groundkern::MODULE); }
