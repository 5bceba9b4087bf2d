// The schemas of the criss-cross attention operators. What they compute, and their inputs' shapes, is told in
// cc_attention/functional.py; results and gradients have the memory format of the tensor that they belong to. Autograd,
// fake kernels and autocast are registered in cc_attention/operators.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet, m) {
  // Over each pixel's path: the largest energy, and the sum of exp(energy - largest). [N, H, W], in float32, or float64
  // for float64.
  m.def("criss_cross_attention(Tensor query, Tensor key, Tensor value) -> (Tensor out, Tensor largest, Tensor sum)");
  m.def(
      "criss_cross_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor largest, Tensor sum) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def("ca_weight(Tensor query, Tensor key) -> Tensor");
  m.def("ca_weight_backward(Tensor grad_energy, Tensor query, Tensor key) -> (Tensor grad_query, Tensor grad_key)");
  m.def("ca_map(Tensor weight, Tensor value) -> Tensor");
  m.def("ca_map_backward(Tensor grad_out, Tensor weight, Tensor value) -> (Tensor grad_weight, Tensor grad_value)");
}
