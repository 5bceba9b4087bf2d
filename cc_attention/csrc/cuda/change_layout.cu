#include "cc_attention/csrc/cuda/change_layout.h"

#include <algorithm>

#include "libs/csrc/cuda/primitives.cuh"

namespace ccnet {

static constexpr int kSide = 64, kThreads = 256, kEach = kSide * kSide / kThreads;

// The element of a square [channels, pixels] that a thread moves as number i, so that a warp's lie side by side
struct PlaceInSquare {
  int channel, pixel;
  __device__ __forceinline__ PlaceInSquare(const Layout& layout, int i) {
    const int number = i * kThreads + threadIdx.x, slow = number / kSide, fast = number % kSide;
    channel = layout.pixel == 1 ? slow : fast;
    pixel = layout.pixel == 1 ? fast : slow;
  }
};

template <class Word>
__global__ void __launch_bounds__(kThreads)
    change_layout_kernel(const int64_t pixels, const Word* from, const Layout from_layout, Word* to,
                         const Layout to_layout, const int channel_squares, const int pixel_squares) {
  // A row more than 32 banks, or than half of them, so that columns do not meet in a bank
  constexpr int kRow = kSide + (sizeof(Word) < 4 ? 4 / sizeof(Word) : 1);
  SharedCarver carver;
  Word* const square = carver.take<Word>(kSide * kRow);
  const int64_t image = blockIdx.x / pixel_squares / channel_squares;
  const int64_t first_channel = blockIdx.x % channel_squares * kSide;
  const int64_t first_pixel = blockIdx.x / channel_squares % pixel_squares * kSide;
  const auto at = [&](const Layout& layout, const PlaceInSquare& place, bool valid) {
    return valid ? image * layout.channels * pixels + (first_channel + place.channel) * layout.channel +
                       (first_pixel + place.pixel) * layout.pixel
                 : 0;
  };
  Word words[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const PlaceInSquare place(from_layout, i);
    const bool valid = first_channel + place.channel < from_layout.channels && first_pixel + place.pixel < pixels;
    words[i] = load_global(from + at(from_layout, place, valid), valid);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const PlaceInSquare place(from_layout, i);
    store_shared(square + place.channel * kRow + place.pixel, words[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const PlaceInSquare place(to_layout, i);
    const bool valid = first_channel + place.channel < to_layout.channels && first_pixel + place.pixel < pixels;
    store_global(to + at(to_layout, place, valid), load_shared(square + place.channel * kRow + place.pixel), valid);
  }
}

template <class Word>
static cudaError_t run(int64_t images, int64_t pixels, const void* from, const Layout& from_layout, void* to,
                const Layout& to_layout, cudaStream_t stream) {
  const int64_t channels = std::max(from_layout.channels, to_layout.channels);
  const int64_t channel_squares = (channels + kSide - 1) / kSide, pixel_squares = (pixels + kSide - 1) / kSide;
  const int64_t blocks = images * channel_squares * pixel_squares;
  if (blocks == 0) {
    return cudaSuccess;
  }
  return launch(change_layout_kernel<Word>, blocks, kThreads, kSide * (kSide + 2) * static_cast<int>(sizeof(Word)),
                stream, pixels, static_cast<const Word*>(from), from_layout, static_cast<Word*>(to), to_layout,
                static_cast<int>(channel_squares), static_cast<int>(pixel_squares));
}

cudaError_t change_layout(int element_bytes, int64_t images, int64_t pixels, const void* from, const Layout& from_layout,
                          void* to, const Layout& to_layout, cudaStream_t stream) {
  return element_bytes == 2   ? run<uint16_t>(images, pixels, from, from_layout, to, to_layout, stream)
         : element_bytes == 4 ? run<uint32_t>(images, pixels, from, from_layout, to, to_layout, stream)
                              : run<uint64_t>(images, pixels, from, from_layout, to, to_layout, stream);
}

}  // namespace ccnet
