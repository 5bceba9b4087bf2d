// What the operators of activated batch norm have in common on every device: checks of inputs, and memory layouts.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

#include "libs/csrc/activation.h"

namespace ccnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Activation activation_of(const std::string& name) {
  if (name == "leaky_relu") {
    return Activation::leaky_relu;
  }
  if (name == "elu") {
    return Activation::elu;
  }
  STD_TORCH_CHECK(name == "identity" || name == "none", "activation: expected leaky_relu, elu, identity or none, got ",
                  name);
  return Activation::identity;
}

// ---- checks: those that users meet are in libs/functional.py ----

inline void check_images(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, name, ": expected [N, C, ...], got ", x.dim(), " dimensions");
}

inline void check_like(const char* name, const Tensor& x, const Tensor& like) {
  bool same = x.dim() == like.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = x.size(d) == like.size(d);
  }
  STD_TORCH_CHECK(same, name, ": expected the shape of the first tensor");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected the first tensor's dtype");
  STD_TORCH_CHECK(x.device() == like.device(), name, ": expected on the first tensor's device");
}

// Contiguous [rows, C] of that dtype, or [C] where rows is 0
inline void check_per_channel(const char* name, const Tensor& numbers, const Tensor& x, int64_t rows,
                              ScalarType dtype) {
  const int64_t channels = x.size(1);
  const bool fits = rows == 0 ? numbers.dim() == 1 && numbers.size(0) == channels
                              : numbers.dim() == 2 && numbers.size(0) == rows && numbers.size(1) == channels;
  STD_TORCH_CHECK(fits, name, ": expected a number for each of ", channels, " channels");
  STD_TORCH_CHECK(numbers.scalar_type() == dtype, name,
                  ": expected float64, or for weight and bias of tensors that are not, float32");
  STD_TORCH_CHECK(numbers.device() == x.device(), name, ": expected on the first tensor's device");
  STD_TORCH_CHECK(numbers.is_contiguous(), name, ": expected to be contiguous");
}

inline void check_parameters(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (weight) {
    check_per_channel("weight", *weight, x, 0, dtype);
  }
  if (bias) {
    check_per_channel("bias", *bias, x, 0, dtype);
  }
}

inline void check_statistics(const Tensor& x, const Tensor& statistics) {
  check_per_channel("statistics", statistics, x, 3, ScalarType::Double);
}

inline void check_running(const Tensor& running_mean, const Tensor& running_var, const Tensor& statistics) {
  STD_TORCH_CHECK(running_mean.dim() == 1 && running_mean.is_contiguous() && running_var.is_contiguous(),
                  "running statistics: expected [C], contiguous");
  STD_TORCH_CHECK(running_mean.scalar_type() == ScalarType::Float || running_mean.scalar_type() == ScalarType::Double,
                  "running statistics: expected float32 or float64");
  check_like("running_var", running_var, running_mean);
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 3 && statistics.size(1) == running_mean.numel() &&
                      statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous() &&
                      statistics.device() == running_mean.device(),
                  "statistics: expected [3, C] in float64, on the running statistics' device");
}

// ---- memory ----

// Whether memory holds the elements without gaps in the order of the dimensions, or with channels last; dimensions of
// one element may have any stride.
inline bool is_in_order(const Tensor& x, bool channels_last) {
  if (x.numel() == 0) {
    return true;
  }
  int64_t stride = 1;
  const auto fits = [&](int64_t d) {
    const bool fit = x.size(d) == 1 || x.stride(d) == stride;
    stride *= x.size(d);
    return fit;
  };
  bool all = !channels_last || fits(1);
  for (int64_t d = x.dim() - 1; d > 1; --d) {
    all = fits(d) && all;
  }
  all = (channels_last || fits(1)) && all;
  return fits(0) && all;
}

// How memory holds [N, C, ...]: as planes [N * C, positions], each of one channel, or as rows [N * positions, C].
struct Layout {
  bool planes;
  int64_t images, channels, positions;
};

inline std::optional<Layout> layout_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    positions *= x.size(d);
  }
  const bool contiguous = is_in_order(x, false);
  if (!contiguous && !is_in_order(x, true)) {
    return std::nullopt;
  }
  return Layout{contiguous && positions > 1, x.size(0), x.size(1), positions};
}

// x, or a copy of one of these layouts
inline Tensor in_some_layout(const Tensor& x) { return layout_of(x) ? x : torch::stable::contiguous(x); }

// x, or a copy with the strides of like, which has one of these layouts
inline Tensor in_layout_of(const Tensor& like, const Tensor& x) {
  bool same = true;
  for (int64_t d = 0; d < x.dim(); ++d) {
    same = same && (x.size(d) == 1 || x.stride(d) == like.stride(d));
  }
  if (same) {
    return x;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

// With the strides of like
inline OptionalTensor residual_as(const Tensor& like, const OptionalTensor& residual) {
  if (!residual) {
    return std::nullopt;
  }
  check_like("residual", *residual, like);
  return in_layout_of(like, *residual);
}

}  // namespace ccnet
