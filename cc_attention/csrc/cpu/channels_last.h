// Tensors in channels_last memory format: [N, C, H, W] and [N, C, D, H, W] with a pixel's channels side by side.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <cstdint>
#include <vector>

namespace ccnet {

// Uninitialised, of that shape and otherwise as `like`
torch::stable::Tensor empty_channels_last(const torch::stable::Tensor& like, const std::vector<int64_t>& shape);

// x itself if it is so already
torch::stable::Tensor in_channels_last(const torch::stable::Tensor& x);

}  // namespace ccnet
