#include "cc_attention/csrc/cpu/channels_last.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "cc_attention/csrc/cpu/line.h"
#include "libs/csrc/cpu/dtype.h"
#include "libs/csrc/cpu/memory.h"

namespace ccnet {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

namespace {

MemoryFormat channels_last_format(const Tensor& x) {
  return x.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// Whether memory holds the elements in that order; dimensions of one element may have any stride.
bool is_channels_last(const Tensor& x) {
  int64_t stride = 1;
  const auto in_order = [&](int64_t d) {
    const bool fits = x.size(d) == 1 || x.stride(d) == stride;
    stride *= x.size(d);
    return fits;
  };
  bool fits = in_order(1);
  for (int64_t d = x.dim() - 1; d > 1; --d) {
    fits = in_order(d) && fits;
  }
  return in_order(0) && fits;
}

// A copy. PyTorch's own conversion takes longer where rows lie a power of two apart, and where memory is fresh.
Tensor channels_last(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "channels_last: expected 4 or 5 dimensions, got ", x.dim());
  Tensor out = empty_channels_last(x, {x.sizes().begin(), x.sizes().end()});
  if (!x.is_contiguous() || x.numel() == 0) {
    torch::stable::copy_(out, x);
    return out;
  }
  for_type("channels_last", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t images = x.size(0), channels = x.size(1), pixels = x.numel() / (images * channels);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const auto transpose = line_kernels<T>().transpose;
    constexpr int64_t some = 512;  // pixels at a time
    const int64_t parts = (pixels + some - 1) / some;
    torch::stable::parallel_for(0, images * parts, 1, [=](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part % parts * some, image = part / parts * channels * pixels;
        transpose(from + image + first, pixels, channels, std::min(some, pixels - first),
                  to + image + first * channels, channels);
      }
    });
  });
  return out;
}

}  // namespace

Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& shape) {
  Tensor x = torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                  channels_last_format(like));
  prefer_huge_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  return x;
}

Tensor in_channels_last(const Tensor& x) { return is_channels_last(x) ? x : channels_last(x); }

}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet, CPU, m) { m.impl("channels_last", TORCH_BOX(&ccnet::channels_last)); }
