// Images in NCHW from images in channels_last.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cc_attention/csrc/cpu/line.h"

namespace ccnet {

// x [images, pixels, channels] to planes [images, channels, pixels], which it runs at the speed of a copy: what is written
// are runs of whole cache lines, few at a time, as planes may lie a power of two apart.
template <class T>
void to_planes(const T* x, int64_t images, int64_t channels, int64_t pixels, T* planes) {
  constexpr int64_t run = 512, some = 64 / sizeof(T);  // pixels and channels of a part
  const int64_t runs = (pixels + run - 1) / run, parts = (channels + some - 1) / some;
  const auto transpose = line_kernels<T>().transpose;
  torch::stable::parallel_for(0, images * runs * parts, 8, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t image = number / parts / runs, pixel = number / parts % runs * run, channel = number % parts * some;
      transpose(x + (image * pixels + pixel) * channels + channel, channels, std::min(run, pixels - pixel),
                std::min(some, channels - channel), planes + (image * channels + channel) * pixels + pixel, pixels);
    }
  });
}

}  // namespace ccnet
