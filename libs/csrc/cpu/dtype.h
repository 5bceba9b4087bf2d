#pragma once

#include "libs/csrc/cpu/scalar_types.h"
#include "libs/csrc/dtype.h"

namespace ccnet {

// f(T*), T being the type of x's elements
template <class F>
void for_type(const char* name, const torch::stable::Tensor& x, const F& f) {
  for_element_type<Half, BFloat16>(name, x, f);
}

}  // namespace ccnet
