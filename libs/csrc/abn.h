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
  if (name == "relu") {
    return Activation::relu;
  }
  STD_TORCH_CHECK(name == "identity" || name == "none",
                  "activation: expected leaky_relu, elu, relu, identity or none, got ", name);
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
  STD_TORCH_CHECK(numbers.scalar_type() == dtype, name, ": expected float64, or float32 for tensors that are not");
  STD_TORCH_CHECK(numbers.device() == x.device(), name, ": expected on the first tensor's device");
  STD_TORCH_CHECK(numbers.is_contiguous(), name, ": expected to be contiguous");
}

// The dtype of parameters, normalisers and sums
inline ScalarType numbers_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_numbers(const Tensor& x, const Tensor& normaliser, const OptionalTensor& weight,
                          const OptionalTensor& bias) {
  check_per_channel("normaliser", normaliser, x, 4, numbers_type(x));
  if (weight) {
    check_per_channel("weight", *weight, x, 0, numbers_type(x));
  }
  if (bias) {
    check_per_channel("bias", *bias, x, 0, numbers_type(x));
  }
}

inline void check_running(const Tensor& running_mean, const Tensor& running_var) {
  STD_TORCH_CHECK(running_mean.dim() == 1 && running_mean.is_contiguous() && running_var.is_contiguous(),
                  "running statistics: expected [C], contiguous");
  STD_TORCH_CHECK(running_mean.scalar_type() == ScalarType::Float || running_mean.scalar_type() == ScalarType::Double,
                  "running statistics: expected float32 or float64");
  check_like("running_var", running_var, running_mean);
}

inline void check_parts(const Tensor& parts, const Tensor& running_mean) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(1) == 3 && parts.size(2) == running_mean.numel() &&
                      parts.scalar_type() == ScalarType::Double && parts.is_contiguous() &&
                      parts.device() == running_mean.device(),
                  "parts: expected [parts, 3, C] in float64, on the running statistics' device");
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
inline OptionalTensor in_layout_of(const char* name, const Tensor& like, const OptionalTensor& x) {
  if (!x) {
    return std::nullopt;
  }
  check_like(name, *x, like);
  return in_layout_of(like, *x);
}

// What the backward pass has of the forward pass, in one layout: z, and the residual, if there was one; or, if the
// activation cannot be inverted, x, and z, if there was a residual.
struct __attribute__((visibility("hidden"))) KeptTensors {
  OptionalTensor x, z, residual;
  Tensor grad_z;
  ActivationOf activation;

  KeptTensors(const OptionalTensor& x_, const OptionalTensor& z_, const Tensor& grad_z_, const OptionalTensor& residual_,
              const std::string& activation_, double slope)
      : grad_z(grad_z_), activation{activation_of(activation_), slope} {
    const bool from_z = activation.is_invertible();
    STD_TORCH_CHECK(from_z ? z_ && !x_ : x_ && !residual_, from_z ? "expected z without x" : "expected x without residual",
                    " for the activation ", activation_);
    const Tensor& first = from_z ? *z_ : *x_;
    check_images(from_z ? "z" : "x", first);
    const Tensor like = in_some_layout(first);
    x = from_z ? std::nullopt : OptionalTensor(like);
    z = from_z ? OptionalTensor(like) : in_layout_of("z", like, z_);
    residual = in_layout_of("residual", like, residual_);
    check_like("grad_z", grad_z_, like);
    grad_z = in_layout_of(like, grad_z_);
  }
  // A tensor of the shape, dtype and layout of all
  const Tensor& like() const { return grad_z; }
  bool had_residual() const { return x ? z.has_value() : residual.has_value(); }
};

}  // namespace ccnet
