// What Python hands over for a tensor, and the checks that it fits. They throw
// std::invalid_argument, which reaches Python as a ValueError.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace groundkern {

// Address, dtype code, sizes, strides in elements.
using View = std::tuple<std::uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>;

constexpr int64_t MAX_SIZE = (int64_t{1} << 31) - 1;
constexpr int64_t MAX_ELEMENTS = int64_t{1} << 56;
constexpr int64_t ANY = -1;

[[noreturn]] inline void fail(const std::string& name, const std::string& wanted,
                              const std::string& got) {
  throw std::invalid_argument("`" + name + "`: expected " + wanted + ", got " + got);
}

inline std::string text(const std::vector<int64_t>& numbers) {
  std::string list;
  for (int64_t number : numbers) {
    list += list.empty() ? "" : ", ";
    list += number == ANY ? "any" : std::to_string(number);
  }
  return "[" + list + "]";
}

inline const char* text(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return "float32 (0)";
    case Dtype::bfloat16:
      return "bfloat16 (1)";
    case Dtype::float16:
      return "float16 (2)";
    case Dtype::int32:
      return "int32 (3)";
    case Dtype::int64:
      return "int64 (4)";
  }
  return "another dtype";
}

inline int64_t bytes(Dtype dtype) {
  if (dtype == Dtype::int64) return 8;
  return dtype == Dtype::float32 || dtype == Dtype::int32 ? 4 : 2;
}

// The view as a tensor of this dtype and shape; a size of ANY may be any. Its address is never null,
// which means absent: torch gives a tensor without elements no memory.
template <int Rank>
Tensor<Rank> tensor(const std::string& name, const View& view, Dtype dtype,
                    const std::vector<int64_t>& shape) {
  const auto& [address, code, sizes, strides] = view;
  if (code != static_cast<int>(dtype)) {
    fail(name, text(dtype), "dtype code " + std::to_string(code));
  }
  bool same = sizes.size() == Rank && strides.size() == Rank;
  for (int i = 0; same && i < Rank; ++i) {
    same = sizes[i] >= 0 && sizes[i] <= MAX_SIZE && (shape[i] == ANY || sizes[i] == shape[i]);
  }
  if (!same) fail(name, "sizes " + text(shape) + " and as many strides", text(sizes));

  Tensor<Rank> result{};
  result.data = reinterpret_cast<void*>(address != 0 ? address : bytes(dtype));
  const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  for (int i = 0; i < Rank; ++i) {
    const bool strided = sizes[i] > 1 && !empty;  // else the stride is never used
    if (strided && (strides[i] < 0 || strides[i] > MAX_ELEMENTS / sizes[i])) {
      fail(name, "strides from 0 to a span of 2^56 elements", text(strides));
    }
    if (strided && i == Rank - 1 && strides[i] != 1) {
      fail(name, "a contiguous last dimension", "stride " + std::to_string(strides[i]));
    }
    result.size[i] = sizes[i];
    result.stride[i] = strided ? strides[i] : 0;
  }
  if (!empty && (address == 0 || address % bytes(dtype) != 0)) {
    fail(name, "an aligned address", std::to_string(address));
  }
  return result;
}

// The same for memory that is written. It must be contiguous, so that no two elements share an
// address.
template <int Rank>
Tensor<Rank> output(const std::string& name, const View& view, Dtype dtype,
                    const std::vector<int64_t>& shape) {
  const Tensor<Rank> result = tensor<Rank>(name, view, dtype, shape);
  if (std::find(result.size, result.size + Rank, 0) != result.size + Rank) return result;
  int64_t stride = 1;
  for (int i = Rank - 1; i >= 0; --i) {
    if (result.size[i] > 1 && result.stride[i] != stride) {
      fail(name, "a contiguous tensor", "strides " + text(std::get<3>(view)));
    }
    stride *= result.size[i];
  }
  return result;
}

template <class T>
inline constexpr Dtype dtype_of = Dtype::float32;
template <>
inline constexpr Dtype dtype_of<int32_t> = Dtype::int32;
template <>
inline constexpr Dtype dtype_of<int64_t> = Dtype::int64;

// A contiguous view [count]; ANY: of any length.
template <class T>
T* array(const std::string& name, const View& view, int64_t count) {
  using Element = std::remove_const_t<T>;
  static_assert(std::is_same_v<Element, float> || dtype_of<Element> != Dtype::float32);
  return static_cast<T*>(tensor<1>(name, view, dtype_of<Element>, {count}).data);
}

inline void check_range(const std::string& name, int64_t row, int64_t value, int64_t low,
                        int64_t high) {
  if (value >= low && value <= high) return;
  fail(name, "values from " + std::to_string(low) + " to " + std::to_string(high),
       std::to_string(value) + " at row " + std::to_string(row));
}

}  // namespace groundkern
