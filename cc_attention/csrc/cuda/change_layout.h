// Copies of maps between layouts: the kernels want channels_last with whole packs of channels.
#pragma once

#include <cstdint>

#include "libs/csrc/cuda/primitives.cuh"

namespace ccnet {

// Strides, in elements. Channels or pixels lie side by side.
struct Layout {
  int64_t channels, channel, pixel;
  int64_t image(int64_t pixels) const { return channels * pixels; }
};
inline Layout channels_last_layout(int64_t channels) { return {channels, 1, channels}; }
inline Layout planes_layout(int64_t channels, int64_t pixels) { return {channels, pixels, 1}; }

// Channels that only `to` has become 0, those that only `from` has are left out.
cudaError_t change_layout(int element_bytes, int64_t images, int64_t pixels, const void* from, const Layout& from_layout,
                          void* to, const Layout& to_layout, cudaStream_t);

}  // namespace ccnet
