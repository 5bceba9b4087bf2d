// Images in NCHW from images in channels_last.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cc_attention/csrc/cpu/line.h"

namespace ccnet {

// x [images, pixels, channels] to planes [images, channels, pixels]. A part of the work is a run of pixels with all
// channels, which reads one stretch of memory; or with few, where planes lie whole pages apart and, of many, would drive
// each other out of the cache.
template <class T>
void to_planes(const T* x, int64_t images, int64_t channels, int64_t pixels, T* planes) {
  constexpr int64_t run = 256, page = 4096 / sizeof(T), cache_line = 64 / sizeof(T);
  const int64_t some = pixels % page == 0 ? cache_line : channels;
  const int64_t runs = (pixels + run - 1) / run, parts = (channels + some - 1) / some;
  constexpr int64_t worth_a_thread = 1 << 16;  // numbers
  const int64_t grain = 1 + worth_a_thread / (run * some);
  const auto transpose = line_kernels<T>().transpose;
  torch::stable::parallel_for(0, images * runs * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t image = number / parts / runs, pixel = number / parts % runs * run, channel = number % parts * some;
      transpose(x + (image * pixels + pixel) * channels + channel, channels, std::min(run, pixels - pixel),
                std::min(some, channels - channel), planes + (image * channels + channel) * pixels + pixel, pixels);
    }
  });
}

}  // namespace ccnet
