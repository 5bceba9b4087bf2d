// The operators of activated batch norm on the GPU. No two blocks write to the same place, and sums are added up in an
// order that depends on shapes only, so results are the same in every run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "libs/csrc/abn.h"
#include "libs/csrc/cuda/abn_launchers.h"
#include "libs/csrc/cuda/operators.h"

namespace ccnet {
namespace {

template <class T>
using Abn = AbnLaunchers<T, Accumulate<T>>;

// Of x, which has one of the layouts, and of others that are laid out as x is
Pieces pieces_of(const Tensor& x, std::initializer_list<const void*> data) {
  const Layout layout = *layout_of(x);
  const int bytes = static_cast<int>(x.element_size());
  return layout.planes
             ? Pieces::cut(true, layout.channels, layout.images * layout.channels, layout.positions, bytes, data)
             : Pieces::cut(false, layout.channels, layout.images * layout.positions, layout.channels, bytes, data);
}

Tensor empty_doubles(const Tensor& x, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(x, shape, ScalarType::Double);
}
Tensor empty_numbers(const Tensor& x) {
  const auto dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(x, {Abn<float>::kNumbers, x.size(1)}, dtype);
}

template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
const T* read(const OptionalTensor& x) {
  return x ? read<T>(*x) : nullptr;
}
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
typename Abn<T>::Affine affine_of(const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                  const std::string& activation, double slope) {
  using Real = Accumulate<T>;
  return {read<Real>(weight), read<Real>(bias), eps, {activation_of(activation), slope}};
}

// ---- the operators ----

Tensor abn_statistics(const Tensor& x_) {
  check_images("x", x_);
  const OnDeviceOf device(x_);
  const Tensor x = in_some_layout(x_);
  Tensor statistics = empty_doubles(x, {3, x.size(1)});
  if (x.size(1) > 0) {
    const Pieces pieces = pieces_of(x, {x.const_data_ptr()});
    Tensor partial = empty_doubles(x, {pieces.slots(), 3, x.size(1)});
    run_for_type("abn_statistics", x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return Abn<T>::statistics(pieces, read<T>(x), write<double>(partial), write<double>(statistics), device.stream());
    });
  }
  return statistics;
}

void abn_update_running_(Tensor running_mean, Tensor running_var, const Tensor& statistics, double momentum) {
  check_running(running_mean, running_var, statistics);
  const OnDeviceOf device(running_mean);
  const int64_t channels = running_mean.numel();
  if (channels == 0) {
    return;
  }
  const auto update = [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    return update_running_statistics<Real>(read<double>(statistics), momentum, channels, write<Real>(running_mean),
                                           write<Real>(running_var), device.stream());
  };
  const cudaError_t error = running_mean.scalar_type() == ScalarType::Double ? update(static_cast<double*>(nullptr))
                                                                             : update(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(error == cudaSuccess, "abn_update_running_: ", text_of(error));
}

// z of x, both of one of the layouts, maybe the same
void forward(const Tensor& x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual_, double eps, const std::string& activation, double slope, const Tensor& z,
             cudaStream_t stream) {
  check_parameters(x, weight, bias);
  const OptionalTensor residual = residual_as(x, residual_);
  check_statistics(x, statistics);
  if (x.numel() == 0) {
    return;
  }
  const Tensor numbers = empty_numbers(x);
  run_for_type("abn_forward", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const rest = read<T>(residual);
    return Abn<T>::forward(pieces_of(x, {x.const_data_ptr(), z.const_data_ptr(), rest}), read<T>(x),
                           read<double>(statistics), affine_of<T>(weight, bias, eps, activation, slope), rest,
                           write<Accumulate<T>>(numbers), write<T>(z), stream);
  });
}

Tensor abn_forward(const Tensor& x_, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, double eps, const std::string& activation, double slope) {
  check_images("x", x_);
  const OnDeviceOf device(x_);
  const Tensor x = in_some_layout(x_);
  Tensor z = torch::stable::empty_like(x);
  forward(x, statistics, weight, bias, residual, eps, activation, slope, z, device.stream());
  return z;
}

void abn_forward_(Tensor x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, double eps, const std::string& activation, double slope) {
  check_images("x", x);
  const OnDeviceOf device(x);
  const Tensor z = in_some_layout(x);
  forward(z, statistics, weight, bias, residual, eps, activation, slope, z, device.stream());
  if (!layout_of(x)) {
    torch::stable::copy_(x, z);
  }
}

Tensor abn_backward_sums(const Tensor& z_, const Tensor& grad_z_, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& residual_, double eps,
                         const std::string& activation, double slope) {
  check_images("z", z_);
  check_like("grad_z", grad_z_, z_);
  check_parameters(z_, weight, bias);
  const OnDeviceOf device(z_);
  const Tensor z = in_some_layout(z_), grad_z = in_layout_of(z, grad_z_);
  const OptionalTensor residual = residual_as(z, residual_);
  Tensor sums = empty_doubles(z, {2, z.size(1)});
  if (z.size(1) > 0) {
    const Pieces pieces = pieces_of(z, {z.const_data_ptr(), grad_z.const_data_ptr(), read<void>(residual)});
    Tensor partial = empty_doubles(z, {pieces.slots(), 2, z.size(1)});
    run_for_type("abn_backward_sums", z, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return Abn<T>::backward_sums(pieces, read<T>(z), read<T>(grad_z),
                                   affine_of<T>(weight, bias, eps, activation, slope), read<T>(residual),
                                   write<double>(partial), write<double>(sums), device.stream());
    });
  }
  return sums;
}

std::tuple<Tensor, Tensor> abn_backward(const Tensor& z_, const Tensor& grad_z_, const Tensor& statistics,
                                        const OptionalTensor& sums, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& residual_, double eps,
                                        const std::string& activation, double slope) {
  check_images("z", z_);
  check_like("grad_z", grad_z_, z_);
  check_parameters(z_, weight, bias);
  check_statistics(z_, statistics);
  if (sums) {
    check_per_channel("sums", *sums, z_, 2, ScalarType::Double);
  }
  const OnDeviceOf device(z_);
  const Tensor z = in_some_layout(z_), grad_z = in_layout_of(z, grad_z_);
  const OptionalTensor residual = residual_as(z, residual_);
  Tensor grad_x = torch::stable::empty_like(z);
  Tensor grad_residual = residual ? torch::stable::empty_like(z) : torch::stable::new_empty(z, {0});
  if (z.numel() > 0) {
    const Tensor numbers = empty_numbers(z);
    const Pieces pieces = pieces_of(z, {z.const_data_ptr(), grad_z.const_data_ptr(), grad_x.const_data_ptr(),
                                        read<void>(residual), grad_residual.const_data_ptr()});
    run_for_type("abn_backward", z, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return Abn<T>::backward(pieces, read<T>(z), read<T>(grad_z), read<double>(statistics), read<double>(sums),
                              affine_of<T>(weight, bias, eps, activation, slope), read<T>(residual),
                              write<Accumulate<T>>(numbers), write<T>(grad_x),
                              residual ? write<T>(grad_residual) : nullptr, device.stream());
    });
  }
  return {grad_x, grad_residual};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(CCNET_CUDA_LIBRARY, CCNET_CUDA_KEY, m) {
  m.impl("abn_statistics", TORCH_BOX(&ccnet::abn_statistics));
  m.impl("abn_update_running_", TORCH_BOX(&ccnet::abn_update_running_));
  m.impl("abn_forward", TORCH_BOX(&ccnet::abn_forward));
  m.impl("abn_forward_", TORCH_BOX(&ccnet::abn_forward_));
  m.impl("abn_backward_sums", TORCH_BOX(&ccnet::abn_backward_sums));
  m.impl("abn_backward", TORCH_BOX(&ccnet::abn_backward));
}
