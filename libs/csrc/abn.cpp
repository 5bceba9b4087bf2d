// The schemas of the operators that activated batch norm is made of: z = activation(y + residual),
// y = xhat * (|weight| + eps) + bias, xhat = (x - mean) / sqrt(variance + eps). Autograd, what is shared between processes and the checks that users meet are in
// libs/functional.py, fake kernels in libs/operators.py.
//
// x, z, residual and their gradients are [N, C, ...] of any strides; those of contiguous and channels_last tensors are not copied.
// weight and bias are [C] in float32, or float64 for float64. Statistics and sums are in float64 always, since a
// deviation that is small beside the mean must not be lost.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet, m) {
  // [3, C]: each channel's count of elements, their mean, and the sum of their squared deviations from it
  m.def("abn_statistics(Tensor x) -> Tensor");
  // The running statistics take in those of a batch by that weight, the variance as n / (n - 1) of the batch's. An
  // empty batch changes nothing.
  m.def(
      "abn_update_running_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor statistics, float momentum) -> ()");
  m.def(
      "abn_forward(Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope) -> Tensor");
  m.def(
      "abn_forward_(Tensor(a!) x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope) -> ()");
  // [2, C]: the sums over each channel of dy and dy * xhat
  m.def(
      "abn_backward_sums(Tensor z, Tensor grad_z, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "str activation, float slope) -> Tensor");
  // sums: of the batch that the statistics are of; none if the statistics are constants. Without residual, its gradient
  // has no elements.
  m.def(
      "abn_backward(Tensor z, Tensor grad_z, Tensor statistics, Tensor? sums, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, str activation, float slope) -> (Tensor grad_x, Tensor grad_residual)");
}
