// The scheme of CCNet's first CUDA operators (2018), to count what it asks of memory: float32, NCHW, a thread for every
// element of the result, which adds into that element in global memory at every step of its loop.
//
// Six kernels of the original are these three: affinity is the forward of ca_weight and the gradient of the weights,
// aggregation the forward of ca_map and the gradient of the query, transposed_aggregation the gradients of the key and
// of the value. A map is [images, height + width - 1, height, width] in the order of cc_attention/reference.py.
//
// A block is one warp: 32 pixels of a row, as a warp of the original's blocks of 32 x 32. Counts are made by warp.
// It is here to be emulated and tested, by benchmarks/cuda_roofline.py, and is part of nothing that is installed.
#include "libs/csrc/cuda/primitives.cuh"

namespace {

using namespace ccnet;

constexpr int kWarp = 32;

struct Images {
  int count, channels, height, width;
  __host__ __device__ int path() const { return height + width - 1; }
  __host__ __device__ int pieces() const { return (width + kWarp - 1) / kWarp; }  // of a row, each for a warp
};

// The thread's element of a result that has `planes` planes an image. Lanes beyond the row's end have nothing to do.
struct Element {
  int64_t image;
  int plane, y, x;
  bool valid;
};
__device__ __forceinline__ Element element(const Images& images, int planes) {
  const int row = blockIdx.x / images.pieces(), x = blockIdx.x % images.pieces() * kWarp + threadIdx.x;
  const int plane = row / images.height;
  return {plane / planes, plane % planes, row % images.height, x, x < images.width};
}

// Where (plane, y, x) of an image lies in a tensor that has `planes` planes an image
__device__ __forceinline__ int64_t place(const Images& images, int planes, const Element& at, int plane, int y, int x) {
  return ((at.image * planes + plane) * images.height + y) * images.width + x;
}

__device__ __forceinline__ void multiply_add(float* out, const float* a, const float* b, bool valid) {
  const float product = load_global(a, valid) * load_global(b, valid);
  store_global(out, load_global(out, valid) + product, valid);
}

// map += products over the channels of a at the pixel and of b at the position on its path
__global__ void affinity(const Images images, const float* a, const float* b, float* map) {
  const Element own = element(images, images.path());
  const int below = own.plane - images.width;  // of the column's other pixels, if not negative
  const int y = below < 0 ? own.y : below + (below >= own.y), x = below < 0 ? own.plane : own.x;
  float* out = map + place(images, images.path(), own, own.plane, own.y, own.x);
  for (int c = 0; c < images.channels; ++c) {
    multiply_add(out, a + place(images, images.channels, own, c, own.y, own.x),
                 b + place(images, images.channels, own, c, y, x), own.valid);
  }
}

// out += sum over the pixel's path of map times b there
__global__ void aggregation(const Images images, const float* map, const float* b, float* out) {
  const Element own = element(images, images.channels);
  out += place(images, images.channels, own, own.plane, own.y, own.x);
  for (int x = 0; x < images.width; ++x) {
    multiply_add(out, map + place(images, images.path(), own, x, own.y, own.x),
                 b + place(images, images.channels, own, own.plane, own.y, x), own.valid);
  }
  for (int k = 0; k < images.height - 1; ++k) {
    multiply_add(out, map + place(images, images.path(), own, images.width + k, own.y, own.x),
                 b + place(images, images.channels, own, own.plane, k + (k >= own.y), own.x), own.valid);
  }
}

// out += sum over the pixels that have this one on their path, of map there at this one's place on it times b there
__global__ void transposed_aggregation(const Images images, const float* map, const float* b, float* out) {
  const Element own = element(images, images.channels);
  out += place(images, images.channels, own, own.plane, own.y, own.x);
  for (int x = 0; x < images.width; ++x) {
    multiply_add(out, map + place(images, images.path(), own, own.x, own.y, x),
                 b + place(images, images.channels, own, own.plane, own.y, x), own.valid);
  }
  for (int k = 0; k < images.height - 1; ++k) {
    const int y = k + (k >= own.y), in_its_column = images.width + own.y - (own.y > y);
    multiply_add(out, map + place(images, images.path(), own, in_its_column, y, own.x),
                 b + place(images, images.channels, own, own.plane, y, own.x), own.valid);
  }
}

}  // namespace

// Runs kernel 0, 1 or 2 in the order above, with the file's own counters.
extern "C" __attribute__((visibility("default"))) int run_original_kernel(int number, int count, int channels,
                                                                          int height, int width, const float* a,
                                                                          const float* b, float* out,
                                                                          emulator::Counters* counters) {
  void (*const kernels[])(Images, const float*, const float*, float*) = {affinity, aggregation, transposed_aggregation};
  const Images images{count, channels, height, width};
  const int64_t rows = int64_t{count} * (number == 0 ? images.path() : channels) * height;
  emulator::options.counting = true;
  emulator::counters = {};
  const cudaError_t error = launch(kernels[number], rows * images.pieces(), kWarp, 0, nullptr, images, a, b, out);
  *counters = emulator::counters;
  return error;
}
