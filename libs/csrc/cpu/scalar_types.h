// Element types of tensors as the CPU kernels see them.
#pragma once

#include <cstdint>

namespace ccnet {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The type that sums are made in, and that logarithms and statistics are kept in.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

}  // namespace ccnet
