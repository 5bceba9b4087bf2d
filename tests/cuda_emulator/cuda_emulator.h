// The functions of libs/csrc/cuda/primitives.cuh, and those of CUDA that kernels use, on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "emulator.h"

// ---- CUDA ----

inline void __syncthreads(EMULATOR_HERE) { emulator::block_barrier(file, line); }

EMULATOR_INTERNAL inline void __syncwarp(unsigned mask = ~0u, EMULATOR_HERE) {
#if defined(__SANITIZE_THREAD__)
  auto& operation = emulator::state.warps[emulator::state.current->warp].operations[__builtin_ctz(mask)];
  void* key = &operation.sync_keys[operation.done & 1];
  __tsan_release(key);
  emulator::warp_operation(mask, nullptr, nullptr, file, line);
  __tsan_acquire(key);
#else
  emulator::warp_operation(mask, nullptr, nullptr, file, line);
#endif
}

namespace emulator {
template <class T>
struct Shuffle {
  T in, out;
  unsigned from;
};
template <class T>
EMULATOR_INTERNAL void shuffle(void* const* arguments, unsigned mask) {
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1) {
      auto& lane = *static_cast<Shuffle<T>*>(arguments[l]);
      if (mask >> lane.from & 1) {
        lane.out = static_cast<Shuffle<T>*>(arguments[lane.from])->in;
      } else {
        std::memset(static_cast<void*>(&lane.out), 0xff, sizeof(T));  // undefined on a GPU
      }
    }
  }
}
}  // namespace emulator
template <class T>
EMULATOR_INTERNAL T __shfl_sync(unsigned mask, T x, int from, EMULATOR_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  emulator::Shuffle<T> lane{x, x, static_cast<unsigned>(from) % 32};
  emulator::warp_operation(mask, emulator::shuffle<T>, &lane, file, line);
  emulator::count_once(emulator::counters.shuffles, sizeof(T) / 4);
  return lane.out;
}
template <class T>
EMULATOR_INTERNAL T __shfl_xor_sync(unsigned mask, T x, int bits, EMULATOR_HERE) {
  return __shfl_sync(mask, x, emulator::state.current->lane ^ bits, file, line);
}

#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "shared memory comes from SharedCarver");

namespace ccnet {

using std::exp;

// ---- memory ----

struct SharedCarver {
  template <class T>
  T* take(int count) {
    T* piece = static_cast<T*>(emulator::carve(used, count * sizeof(T)));
    used += (count * sizeof(T) + 15) / 16 * 16;
    return piece;
  }
  size_t used = 0;
};

inline float exp2_approximate(float x) { return std::exp2(x); }
template <class T>
T unknown(T x) {
  return x;
}

template <class T>
T load_word(const T* p) {
  const auto word = *reinterpret_cast<const typename WordOf<sizeof(T)>::type*>(p);
  T x;
  std::memcpy(static_cast<void*>(&x), &word, sizeof x);
  return x;
}
template <class T>
void store_word(T* p, const T& x) {
  typename WordOf<sizeof(T)>::type word;
  std::memcpy(&word, &x, sizeof x);
  *reinterpret_cast<decltype(word)*>(p) = word;
}

template <class T>
T load_global(const T* p, bool valid, EMULATOR_HERE) {
  emulator::count_access(emulator::Access::load, p, sizeof(T), valid, file, line);
  if (valid) {
    return load_word(p);
  }
  T zero;
  std::memset(static_cast<void*>(&zero), 0, sizeof zero);
  return zero;
}
template <class T>
void store_global(T* p, const T& x, bool valid, EMULATOR_HERE) {
  emulator::count_access(emulator::Access::store, p, sizeof(T), valid, file, line);
  if (valid) {
    store_word(p, x);
  }
}
template <class T>
T load_shared(const T* p, EMULATOR_HERE) {
  emulator::count_access(emulator::Access::shared_access, p, sizeof(T), true, file, line);
  return load_word(p);
}
template <class T>
void store_shared(T* p, const T& x, bool valid = true, EMULATOR_HERE) {
  emulator::count_access(emulator::Access::shared_access, p, sizeof(T), valid, file, line);
  if (valid) {
    store_word(p, x);
  }
}

inline void copy_async(void* shared, const void* global, bool valid, EMULATOR_HERE) {
  emulator::count_access(emulator::Access::load, global, 16, valid, file, line);
  emulator::count_access(emulator::Access::shared_access, shared, 16, true, file, line);
  emulator::count_once(emulator::counters.copies);
  emulator::copy_async(shared, valid ? global : nullptr);
}
inline void copies_wait() { emulator::copies_wait(); }

}  // namespace ccnet

// ---- tensor cores, by the PTX ISA's tables ("Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix")
// ----

namespace emulator {

struct Ldmatrix {
  uint32_t row[4];  // 16 bytes
  uint32_t* out;
  uintptr_t address;
};
template <bool kTransposed>
EMULATOR_INTERNAL void ldmatrix(void* const* arguments, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t pair = 0;
      for (int e = 0; e < 2; ++e) {
        const int i = lane / 4, j = lane % 4 * 2 + e;
        const int row = kTransposed ? j : i, column = kTransposed ? i : j;
        const uint32_t word = static_cast<Ldmatrix*>(arguments[matrix * 8 + row])->row[column / 2];
        pair |= (column % 2 ? word >> 16 : word & 0xffff) << (16 * e);
      }
      static_cast<Ldmatrix*>(arguments[lane])->out[matrix] = pair;
    }
  }
  if (options.counting) {
    ++counters.ldmatrix;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uintptr_t address[8];
      for (int row = 0; row < 8; ++row) {
        address[row] = static_cast<Ldmatrix*>(arguments[matrix * 8 + row])->address;
      }
      ++counters.ldmatrix_passes;
      counters.ldmatrix_conflicts += passes(address, 8, 16) - 1;
    }
  }
}
template <bool kTransposed>
void ldmatrix_x4(uint32_t (&x)[4], const void* row, const char* file, int line) {
  if (!is_shared(row) || reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix: a row is not in shared memory, or not at a multiple of 16 bytes, at " + at(file, line));
  }
  Ldmatrix lane{{}, x, reinterpret_cast<uintptr_t>(row)};
  const uint4 words = *static_cast<const uint4*>(row);  // here, where sanitizers see whose read it is
  lane.row[0] = words.x;
  lane.row[1] = words.y;
  lane.row[2] = words.z;
  lane.row[3] = words.w;
  warp_operation(~0u, ldmatrix<kTransposed>, &lane, file, line);
}

inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
EMULATOR_INTERNAL float element(uint32_t pair, int which) {
  const uint16_t bits = which ? pair >> 16 : pair & 0xffff;
  T x;
  std::memcpy(static_cast<void*>(&x), &bits, sizeof bits);
  return to_float(x);
}
struct Mma {
  float* d[4];
  const uint32_t* a;
  uint32_t b[2];
};
// D += A B, A by row and B by column
EMULATOR_INTERNAL inline void add_products(void* const* arguments, const float* a, const float* b, int depth) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<Mma*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) {
      const float *row = a + (lane / 4 + i / 2 * 8) * depth, *column = b + (lane % 4 * 2 + i % 2) * depth;
      float sum = 0;
      for (int k = 0; k < depth; ++k) {
        sum += row[k] * column[k];
      }
      *part.d[i] += sum;
    }
  }
  counters.mma += options.counting;
}
template <class T>
EMULATOR_INTERNAL void mma(void* const* arguments, unsigned) {
  float a[16][16], b[8][16];  // b by column
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<Mma*>(arguments[lane]);
    const int group = lane / 4, thread = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][thread * 2 + e + i / 2 * 8] = element<T>(part.a[i], e);
      }
      for (int i = 0; i < 2; ++i) {
        b[group][thread * 2 + e + i * 8] = element<T>(part.b[i], e);
      }
    }
  }
  add_products(arguments, &a[0][0], &b[0][0], 16);
}

EMULATOR_INTERNAL inline float tf32(uint32_t bits) {
  bits &= ~0x1fffu;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
EMULATOR_INTERNAL inline void mma_tf32(void* const* arguments, unsigned) {
  float a[16][8], b[8][8];  // b by column
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<Mma*>(arguments[lane]);
    for (int i = 0; i < 4; ++i) {
      a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = tf32(part.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[lane / 4][lane % 4 + i * 4] = tf32(part.b[i]);
    }
  }
  add_products(arguments, &a[0][0], &b[0][0], 8);
}

}  // namespace emulator

namespace ccnet {

struct SharedAddress {
  const char* p;
  SharedAddress() = default;
  SharedAddress(const void* p) : p(static_cast<const char*>(p)) {}
  SharedAddress operator+(int bytes) const { return p + bytes; }
};
inline void ldmatrix_x4(uint32_t (&x)[4], SharedAddress row, EMULATOR_HERE) {
  emulator::ldmatrix_x4<false>(x, row.p, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&x)[4], SharedAddress row, EMULATOR_HERE) {
  emulator::ldmatrix_x4<true>(x, row.p, file, line);
}
template <class T>
void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  EMULATOR_HERE) {
  emulator::Mma lane{{&d0, &d1, &d2, &d3}, a, {b0, b1}};
  emulator::warp_operation(~0u, emulator::mma<T>, &lane, file, line);
}
inline uint32_t rounded_to_tf32(uint32_t bits) {  // but infinities and NaN, the largest exponent
  return (bits & 0x7f800000) == 0x7f800000 ? bits : bits + 0x1000;
}
inline void mma_m16n8k8_tf32(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
                             uint32_t b1, EMULATOR_HERE) {
  emulator::Mma lane{{&d0, &d1, &d2, &d3}, a, {b0, b1}};
  emulator::warp_operation(~0u, emulator::mma_tf32, &lane, file, line);
}

// ---- launching ----

struct Device {
  int shared_bytes, cache_bytes, multiprocessors, architecture;
};
inline cudaError_t device_of_this_thread(Device& device) {
  const auto& options = emulator::options;
  device = {options.shared_bytes, options.cache_bytes, options.multiprocessors, options.architecture};
  return cudaSuccess;
}
inline std::string text_of(cudaError_t) { return emulator::last_error; }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, cudaStream_t,
                   const A&... arguments) {
  try {
    emulator::launch(kernel, blocks, threads, shared_bytes, arguments...);
    return cudaSuccess;
  } catch (const emulator::Error& error) {
    emulator::last_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

}  // namespace ccnet
