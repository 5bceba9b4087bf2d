// The schemas of the criss-cross attention operators. What they compute, and their inputs' shapes, is told in
// cc_attention/functional.py; results and gradients have the memory format of the tensor that they belong to. Autograd,
// fake kernels and autocast are registered in cc_attention/operators.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet, m) {
  // Over each pixel's path: the largest energy, and the sum of exp(energy - largest). [N, H, W], in float32, or float64
  // for float64.
  // With a residual: out = residual + gamma * attention. gamma [1] has the dtype of largest and sum. delta [N, H, W] is,
  // of each pixel, the product of grad_out and the attention: its sum is the gradient of gamma.
  // allow_tf32: on GPUs products of float32 may be made of TF32.
  m.def(
      "criss_cross_attention(Tensor query, Tensor key, Tensor value, Tensor? residual=None, Tensor? gamma=None, "
      "bool allow_tf32=False) -> (Tensor out, Tensor largest, Tensor sum)");
  m.def(
      "criss_cross_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor largest, "
      "Tensor sum, Tensor? gamma=None, bool allow_tf32=False) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value, Tensor delta)");
  m.def("ca_weight(Tensor query, Tensor key, bool allow_tf32=False) -> Tensor");
  m.def(
      "ca_weight_backward(Tensor grad_energy, Tensor query, Tensor key, bool allow_tf32=False) -> "
      "(Tensor grad_query, Tensor grad_key)");
  m.def("ca_map(Tensor weight, Tensor value, bool allow_tf32=False) -> Tensor");
  m.def(
      "ca_map_backward(Tensor grad_out, Tensor weight, Tensor value, bool allow_tf32=False) -> "
      "(Tensor grad_weight, Tensor grad_value)");
}
