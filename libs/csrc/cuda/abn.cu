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

// Of x, which has one of the layouts, and of others that are laid out as x is
Pieces pieces_of(const Tensor& x, std::initializer_list<const void*> data) {
  const Layout layout = *layout_of(x);
  const int bytes = static_cast<int>(x.element_size());
  return layout.planes
             ? Pieces::cut(true, layout.channels, layout.images * layout.channels, layout.positions, bytes, data)
             : Pieces::cut(false, layout.channels, layout.images * layout.positions, layout.channels, bytes, data);
}

Tensor empty_numbers(const Tensor& x, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(x, shape, numbers_type(x));
}

template <class Real>
ChannelSources<Real> sources_of(const Tensor& x, const Tensor& normaliser, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps) {
  check_numbers(x, normaliser, weight, bias);
  return {read<Real>(normaliser), read<Real>(weight), read<Real>(bias), static_cast<Real>(eps)};
}

template <class Real>
RunningStatistics<Real> running_of(const Tensor& mean, const Tensor& var, double momentum) {
  return {write<Real>(mean), write<Real>(var), momentum};
}

// f(Real*), Real being the type of numbers of channels
template <class F>
void run_for_numbers(const char* name, const Tensor& numbers, const F& f) {
  const bool is_double = numbers.scalar_type() == ScalarType::Double;
  const cudaError_t error = is_double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", text_of(error));
}

// ---- statistics ----

// f(pieces of x, the moments that their blocks left), for the type of the latter
template <class F>
void with_moments(const char* name, const Tensor& x_, cudaStream_t stream, const F& f) {
  const Tensor x = in_some_layout(x_);
  const Pieces pieces = pieces_of(x, {x.const_data_ptr()});
  const Tensor partial = empty_numbers(x, {pieces.parts, 3, x.size(1)});
  run_for_type(name, x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Abn<T>::moments(pieces, read<T>(x), write<Accumulate<T>>(partial), stream);
  });
  run_for_numbers(name, partial, [&](auto* type) {
    using Real = std::remove_pointer_t<decltype(type)>;
    return f(pieces, read<Real>(partial));
  });
}

Tensor abn_statistics(const Tensor& x) {
  check_images("x", x);
  const OnDeviceOf device(x);
  Tensor statistics = torch::stable::new_empty(x, {3, x.size(1)}, ScalarType::Double);
  if (x.size(1) > 0) {
    with_moments("abn_statistics", x, device.stream(), [&](const Pieces& pieces, auto* partial) {
      using Real = std::remove_const_t<std::remove_pointer_t<decltype(partial)>>;
      return AbnChannels<Real>::statistics(pieces, partial, write<double>(statistics), device.stream());
    });
  }
  return statistics;
}

Tensor abn_normaliser_of_batch_(const Tensor& x, Tensor running_mean, Tensor running_var, double momentum, double eps) {
  check_images("x", x);
  check_running(running_mean, running_var);
  check_per_channel("running_mean", running_mean, x, 0, numbers_type(x));
  const OnDeviceOf device(x);
  Tensor normaliser = empty_numbers(x, {4, x.size(1)});
  if (x.size(1) > 0) {
    with_moments("abn_normaliser_of_batch_", x, device.stream(), [&](const Pieces& pieces, auto* partial) {
      using Real = std::remove_const_t<std::remove_pointer_t<decltype(partial)>>;
      return AbnChannels<Real>::normaliser(pieces, partial, running_of<Real>(running_mean, running_var, momentum), eps,
                                           write<Real>(normaliser), device.stream());
    });
  }
  return normaliser;
}

Tensor abn_normaliser_of_parts_(const Tensor& parts, Tensor running_mean, Tensor running_var, double momentum,
                                double eps) {
  check_running(running_mean, running_var);
  check_parts(parts, running_mean);
  const OnDeviceOf device(parts);
  const int64_t channels = running_mean.numel();
  Tensor normaliser = torch::stable::new_empty(running_mean, {4, channels});
  if (channels > 0) {
    run_for_numbers("abn_normaliser_of_parts_", normaliser, [&](auto* type) {
      using Real = std::remove_pointer_t<decltype(type)>;
      return AbnChannels<Real>::normaliser(read<double>(parts), parts.size(0), channels,
                                           running_of<Real>(running_mean, running_var, momentum), eps,
                                           write<Real>(normaliser), device.stream());
    });
  }
  return normaliser;
}

Tensor abn_normaliser_of_running(const Tensor& running_mean, const Tensor& running_var, double eps) {
  check_running(running_mean, running_var);
  const OnDeviceOf device(running_mean);
  const int64_t channels = running_mean.numel();
  Tensor normaliser = torch::stable::new_empty(running_mean, {4, channels});
  if (channels > 0) {
    run_for_numbers("abn_normaliser_of_running", normaliser, [&](auto* type) {
      using Real = std::remove_pointer_t<decltype(type)>;
      return AbnChannels<Real>::normaliser(channels, read<Real>(running_mean), read<Real>(running_var), eps,
                                           write<Real>(normaliser), device.stream());
    });
  }
  return normaliser;
}

// ---- forward ----

// z of x, both of one of the layouts, maybe the same
void forward(const Tensor& x, const Tensor& normaliser, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual_, double eps, const std::string& activation, double slope, const Tensor& z,
             cudaStream_t stream) {
  const ActivationOf activate{activation_of(activation), slope};
  const OptionalTensor residual = in_layout_of("residual", x, residual_);
  run_for_type("abn_forward", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto sources = sources_of<Accumulate<T>>(x, normaliser, weight, bias, eps);
    const Pieces pieces = pieces_of(x, {x.const_data_ptr(), z.const_data_ptr(), read<T>(residual)});
    return Abn<T>::forward(pieces, read<T>(x), sources, activate, read<T>(residual), write<T>(z), stream);
  });
}

Tensor abn_forward(const Tensor& x_, const Tensor& normaliser, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, double eps, const std::string& activation, double slope) {
  check_images("x", x_);
  const OnDeviceOf device(x_);
  const Tensor x = in_some_layout(x_);
  Tensor z = torch::stable::empty_like(x);
  forward(x, normaliser, weight, bias, residual, eps, activation, slope, z, device.stream());
  return z;
}

void abn_forward_(Tensor x, const Tensor& normaliser, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, double eps, const std::string& activation, double slope) {
  check_images("x", x);
  const OnDeviceOf device(x);
  const Tensor z = in_some_layout(x);
  forward(z, normaliser, weight, bias, residual, eps, activation, slope, z, device.stream());
  if (!layout_of(x)) {
    torch::stable::copy_(x, z);
  }
}

// ---- backward ----

template <class T>
KeptData<T> data_of(const KeptTensors& kept) {
  const bool has_x = kept.x.has_value();
  return {read<T>(has_x ? kept.x : kept.z), read<T>(has_x ? kept.z : kept.residual), read<T>(kept.grad_z)};
}

// The sums that blocks leave, [parts, 2, C]
Tensor partial_sums(const KeptTensors& kept, const Tensor& normaliser, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, cudaStream_t stream) {
  const Tensor& like = kept.like();
  Tensor partial;
  run_for_type("abn_backward_sums", like, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Accumulate<T>;
    const KeptData<T> data = data_of<T>(kept);
    const Pieces pieces = pieces_of(like, {data.first, data.second, data.grad_z});
    partial = empty_numbers(like, {pieces.parts, 2, like.size(1)});
    return Abn<T>::backward_sums(pieces, data, sources_of<Real>(like, normaliser, weight, bias, eps), kept.activation,
                                 write<Real>(partial), stream);
  });
  return partial;
}

std::tuple<Tensor, Tensor, Tensor> abn_backward_sums(
    const OptionalTensor& x, const OptionalTensor& z, const Tensor& grad_z, const Tensor& normaliser,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    const std::string& activation, double slope) {
  const OnDeviceOf device(grad_z);
  const KeptTensors kept(x, z, grad_z, residual, activation, slope);
  const Tensor& like = kept.like();
  const int64_t channels = like.size(1);
  Tensor sums = empty_numbers(like, {2, channels});
  Tensor grad_weight = empty_numbers(like, {channels}), grad_bias = empty_numbers(like, {channels});
  if (channels > 0) {
    const Tensor partial = partial_sums(kept, normaliser, weight, bias, eps, device.stream());
    run_for_numbers("abn_backward_sums", sums, [&](auto* type) {
      using Real = std::remove_pointer_t<decltype(type)>;
      return AbnChannels<Real>::gradient_sums({read<Real>(partial), partial.size(0)}, channels,
                                              sources_of<Real>(like, normaliser, weight, bias, eps), kept.x.has_value(),
                                              write<Real>(sums), write<Real>(grad_weight), write<Real>(grad_bias),
                                              device.stream());
    });
  }
  return {sums, grad_weight, grad_bias};
}

// Sums: [parts, 2, C]; none if they are 0. The gradients of the parameters are written if there is where to.
std::tuple<Tensor, Tensor> backward(const KeptTensors& kept, const Tensor& normaliser, const OptionalTensor& sums,
                                    int64_t parts, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                    const OptionalTensor& grad_weight, const OptionalTensor& grad_bias,
                                    cudaStream_t stream) {
  const Tensor& like = kept.like();
  const bool had_residual = kept.had_residual();
  Tensor grad_x = torch::stable::empty_like(like);
  Tensor grad_residual = had_residual ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
  run_for_type("abn_backward", like, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Accumulate<T>;
    const KeptData<T> data = data_of<T>(kept);
    T* const to_residual = had_residual ? write<T>(grad_residual) : nullptr;
    const Pieces pieces =
        pieces_of(like, {data.first, data.second, data.grad_z, grad_x.const_data_ptr(), to_residual});
    const GradientSums<Real> of_parts{read<Real>(sums), sums ? parts : 0};
    return Abn<T>::backward(pieces, data, sources_of<Real>(like, normaliser, weight, bias, eps), kept.activation,
                            of_parts, write<T>(grad_x), to_residual, grad_weight ? write<Real>(*grad_weight) : nullptr,
                            grad_bias ? write<Real>(*grad_bias) : nullptr, stream);
  });
  return {grad_x, grad_residual};
}

std::tuple<Tensor, Tensor> abn_backward(const OptionalTensor& x, const OptionalTensor& z, const Tensor& grad_z,
                                        const Tensor& normaliser, const OptionalTensor& sums,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& residual, double eps, const std::string& activation,
                                        double slope) {
  const OnDeviceOf device(grad_z);
  const KeptTensors kept(x, z, grad_z, residual, activation, slope);
  if (sums) {
    check_per_channel("sums", *sums, kept.like(), 2, numbers_type(kept.like()));
  }
  return backward(kept, normaliser, sums, 1, weight, bias, eps, std::nullopt, std::nullopt, device.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> abn_backward_of_batch(
    const OptionalTensor& x, const OptionalTensor& z, const Tensor& grad_z, const Tensor& normaliser,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    const std::string& activation, double slope) {
  if (grad_z.numel() == 0) {  // no block would write the gradients of the parameters
    const auto [sums, grad_weight, grad_bias] =
        abn_backward_sums(x, z, grad_z, normaliser, weight, bias, residual, eps, activation, slope);
    const auto [grad_x, grad_residual] =
        abn_backward(x, z, grad_z, normaliser, sums, weight, bias, residual, eps, activation, slope);
    return {grad_x, grad_residual, grad_weight, grad_bias};
  }
  const OnDeviceOf device(grad_z);
  const KeptTensors kept(x, z, grad_z, residual, activation, slope);
  const Tensor partial = partial_sums(kept, normaliser, weight, bias, eps, device.stream());
  Tensor grad_weight = empty_numbers(grad_z, {grad_z.size(1)}), grad_bias = empty_numbers(grad_z, {grad_z.size(1)});
  const auto [grad_x, grad_residual] = backward(kept, normaliser, partial, partial.size(0), weight, bias, eps,
                                                grad_weight, grad_bias, device.stream());
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(CCNET_CUDA_LIBRARY, CCNET_CUDA_KEY, m) {
  m.impl("abn_statistics", TORCH_BOX(&ccnet::abn_statistics));
  m.impl("abn_normaliser_of_batch_", TORCH_BOX(&ccnet::abn_normaliser_of_batch_));
  m.impl("abn_normaliser_of_parts_", TORCH_BOX(&ccnet::abn_normaliser_of_parts_));
  m.impl("abn_normaliser_of_running", TORCH_BOX(&ccnet::abn_normaliser_of_running));
  m.impl("abn_forward", TORCH_BOX(&ccnet::abn_forward));
  m.impl("abn_forward_", TORCH_BOX(&ccnet::abn_forward_));
  m.impl("abn_backward_sums", TORCH_BOX(&ccnet::abn_backward_sums));
  m.impl("abn_backward", TORCH_BOX(&ccnet::abn_backward));
  m.impl("abn_backward_of_batch", TORCH_BOX(&ccnet::abn_backward_of_batch));
}
