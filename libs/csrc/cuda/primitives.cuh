// What kernels use of the GPU. This is the only header with PTX or with a branch on the architecture; compiled by
// anything but nvcc, the same functions come from tests/cuda_emulator, which runs the kernels on the CPU.
//
// Rules for the kernels that follow from it: shared memory comes from SharedCarver, launches go through launch(),
// global and shared memory are read and written through the functions below, by every lane of a warp in the same order
// (those with nothing to do pass valid = false), and a line has at most one barrier or operation of a warp.
#pragma once

#include <vector_types.h>

namespace ccnet {

// What that many bytes are moved as
template <int kBytes>
struct WordOf {
  static_assert(kBytes == 16, "2, 4, 8 or 16 bytes are moved at once");
  using type = uint4;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};

}  // namespace ccnet

#ifndef __CUDACC__
#include <cuda_emulator.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ccnet {

// Hands out dynamic shared memory; every piece begins at a multiple of 16 bytes.
struct SharedCarver {
  template <class T>
  __device__ __forceinline__ T* take(int count) {
    extern __shared__ __align__(128) char ccnet_dynamic_shared[];
    T* piece = reinterpret_cast<T*>(ccnet_dynamic_shared + used);
    used += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  int used = 0;
};

// 2 to the x, with an error of 2 units in the last place; denormal results are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler knows no more: what depends on it is computed where it is used, and not ahead of a loop in
// registers that the loop needs.
template <class T>
__device__ __forceinline__ T unknown(T x) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(x));
  } else {
    asm volatile("" : "+l"(x));
  }
  return x;
}

// What p points to, or zeros. Moved as one word: the compiler would take a struct apart.
template <class T>
__device__ __forceinline__ T load_global(const T* p, bool valid) {
  using Word = typename WordOf<sizeof(T)>::type;
  Word word = {};
  if (valid) {
    word = *reinterpret_cast<const Word*>(p);
  }
  T x;
  memcpy(&x, &word, sizeof x);
  return x;
}
template <class Word>
__device__ __forceinline__ void store_word(Word* p, const Word& word) {
  *p = word;
}
__device__ __forceinline__ void store_word(uint4* p, const uint4& word) {  // which it would take apart all the same
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
template <class T>
__device__ __forceinline__ void store_global(T* p, const T& x, bool valid) {
  using Word = typename WordOf<sizeof(T)>::type;
  Word word;
  memcpy(&word, &x, sizeof x);
  if (valid) {
    store_word(reinterpret_cast<Word*>(p), word);
  }
}
template <class T>
__device__ __forceinline__ T load_shared(const T* p) {
  using Word = typename WordOf<sizeof(T)>::type;
  const Word word = *reinterpret_cast<const Word*>(p);
  T x;
  memcpy(&x, &word, sizeof x);
  return x;
}
template <class T>
__device__ __forceinline__ void store_shared(T* p, const T& x, bool valid = true) {
  using Word = typename WordOf<sizeof(T)>::type;
  Word word;
  memcpy(&word, &x, sizeof x);
  if (valid) {
    *reinterpret_cast<Word*>(p) = word;
  }
}

// 16 bytes from global to shared memory, there after copies_wait(), or zeros. On sm_75 an ordinary copy.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}
// Copies that one loop may have under way; on sm_75 each takes registers.
#if __CUDA_ARCH__ >= 800
constexpr int kCopiesAtOnce = 8;
#else
constexpr int kCopiesAtOnce = 1;
#endif
// This thread's copies so far are complete. Other threads see them after a barrier.
__device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// A place in shared memory. If it is unknown, those that differ from it by a constant cost no instruction.
struct SharedAddress {
  unsigned x;
  SharedAddress() = default;
  __device__ __forceinline__ SharedAddress(const void* p) : x(static_cast<unsigned>(__cvta_generic_to_shared(p))) {}
  __device__ __forceinline__ SharedAddress operator+(int bytes) const {
    SharedAddress sum = *this;
    sum.x += bytes;
    return sum;
  }
};
__device__ __forceinline__ SharedAddress unknown(SharedAddress p) {
  p.x = unknown(p.x);
  return p;
}

// Four matrices of 8x8 elements of 2 bytes: lane l gives the address of row l % 8 of matrix l / 8, and gets of each
// matrix elements (l / 4, l % 4 * 2) and the one beside it, or those of the transposed matrix. Not transposed, that is
// also element (l / 4, l % 4) of 8x4 elements of 4 bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row.x)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row.x)
               : "memory");
}

// D += A B, A [16, 16], B [16, 8], D in float32. With g = lane / 4 and t = lane % 4 a lane has, in pairs of elements,
// of A rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8; of B column g at rows 2t, 2t + 8; of D rows g, g + 8
// at columns 2t, 2t + 1.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else  // sm_75 has half of it, and no bfloat16: launchers take the kernels without tensor cores there
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
  } else {
    __trap();
  }
#endif
}

// The bits of a float32 that is rounded to TF32, 10 bits of mantissa, ties away from 0. mma ignores the rest of the bits,
// so that without this it would round towards 0.
__device__ __forceinline__ uint32_t rounded_to_tf32(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(bits)));
#endif
  return bits;
}
// D += A B, A [16, 8] and B [8, 8] in TF32, D as above. A lane has of A rows g, g + 8, g, g + 8 at columns t, t, t + 4,
// t + 4; of B column g at rows t, t + 4.
__device__ __forceinline__ void mma_m16n8k8_tf32(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                                                 uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // launchers take the kernels without tensor cores there
  __trap();
#endif
}

// CUDA also keeps an error until somebody asks for it, who would take it for his own: here it is forgotten.
inline cudaError_t forget(cudaError_t error) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
  }
  return error;
}

// The architecture whose instructions the code has that runs on the current device, 75 for sm_75. It may be older than
// the device: code for another device of the same family, or PTX that the driver has compiled. An error if the library
// has no code for the device.
cudaError_t architecture_of_code(int& architecture);  // image.cu

struct Device {
  int shared_bytes;  // that a block can have
  int cache_bytes;   // of L2
  int multiprocessors;
  int architecture;  // of the code that runs there
};
inline cudaError_t device_of_this_thread(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](int& number, cudaDeviceAttr attribute) {
    error = error != cudaSuccess ? error : cudaDeviceGetAttribute(&number, attribute, index);
  };
  ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(device.cache_bytes, cudaDevAttrL2CacheSize);
  ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) {
    error = architecture_of_code(device.architecture);
  }
  return forget(error);
}

inline const char* text_of(cudaError_t error) { return cudaGetErrorString(error); }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const A&... arguments) {
  if (blocks > 0x7fffffff) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      return forget(error);
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace ccnet
#endif
