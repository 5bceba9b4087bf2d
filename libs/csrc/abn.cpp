// The schemas of the operators that activated batch norm is made of: z = activation(y + residual),
// y = xhat * (|weight| + eps) + bias, xhat = (x - mean) / sqrt(variance + eps). Autograd, what is shared between processes
// and the checks that users meet are in libs/functional.py, fake kernels in libs/operators.py.
//
// x, z, residual and their gradients are [N, C, ...] of any strides; those of contiguous and channels_last tensors are not
// copied. weight, bias, running statistics and sums are [C] in float32, or float64 for float64.
//
// A normaliser, [4, C] in that dtype, has what forward and backward pass need of the statistics: the mean, what it lost by
// rounding (a deviation that is small beside the mean must not be lost), 1 / sqrt(variance + eps), and 1 / count, which is
// 0 where the statistics are constants.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet, m) {
  // [3, C] in float64: each channel's count of elements, their mean, and the sum of their squared deviations from it
  m.def("abn_statistics(Tensor x) -> Tensor");
  // The normaliser of a batch. The running statistics take in those of the batch by that weight, the variance as
  // n / (n - 1) of the batch's. An empty batch changes nothing.
  m.def(
      "abn_normaliser_of_batch_(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, "
      "float eps) -> Tensor");
  // The same of parts of a batch, [parts, 3, C], each as from abn_statistics
  m.def(
      "abn_normaliser_of_parts_(Tensor parts, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, "
      "float eps) -> Tensor");
  m.def("abn_normaliser_of_running(Tensor running_mean, Tensor running_var, float eps) -> Tensor");
  m.def(
      "abn_forward(Tensor x, Tensor normaliser, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope) -> Tensor");
  m.def(
      "abn_forward_(Tensor(a!) x, Tensor normaliser, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope) -> ()");
  // The backward pass has z, and the residual, if there was one. If the activation cannot be inverted (relu), it has x
  // instead, and z, if there was a residual.
  //
  // The gradients if the statistics are those of this batch. Without residual, its gradient has no elements.
  m.def(
      "abn_backward_of_batch(Tensor? x, Tensor? z, Tensor grad_z, Tensor normaliser, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, str activation, float slope) -> "
      "(Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  // The same in two steps, between which processes add up their sums, [2, C]: those of dy and of dy * deviation
  // (channel.h). No sums are needed where the statistics are constants.
  m.def(
      "abn_backward_sums(Tensor? x, Tensor? z, Tensor grad_z, Tensor normaliser, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, str activation, float slope) -> "
      "(Tensor sums, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "abn_backward(Tensor? x, Tensor? z, Tensor grad_z, Tensor normaliser, Tensor? sums, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, str activation, float slope) -> (Tensor grad_x, Tensor grad_residual)");
}
