// From a tensor's dtype to the type of its elements.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace ccnet {

// f(T*), T being the type of x's elements, which for 16 bits is what the device's kernels call it
template <class Half, class BFloat16, class F>
auto for_element_type(const char* name, const torch::stable::Tensor& x, const F& f) {
  using torch::headeronly::ScalarType;
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  name, ": expected float32, float64, float16 or bfloat16");
  switch (dtype) {
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace ccnet
