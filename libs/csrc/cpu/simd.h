// Vectors of the instruction set being compiled for (target_begin.h): loads and stores that convert, exp, transposes,
// and sums and maxima of several vectors at a time.
//
// Included once per instruction set, between target_begin.h and target_end.h, after <cstdint>, <cstring>, <utility> and,
// on x86, <immintrin.h>.

#include "libs/csrc/cpu/scalar_types.h"

#define CCNET_INLINE static inline __attribute__((always_inline))

namespace ccnet {
namespace CCNET_CAPABILITY {

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(CCNET_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(CCNET_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(CCNET_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(CCNET_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(CCNET_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(CCNET_VECTOR_BYTES)));
};
template <class Real>
using Vector = typename VectorOf<Real>::type;
typedef uint32_t Bits __attribute__((vector_size(CCNET_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(CCNET_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class Real>
constexpr int kLanes = CCNET_VECTOR_BYTES / sizeof(Real);

// n rounded up to whole vectors
template <class Real>
CCNET_INLINE int64_t whole(int64_t n) {
  return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

template <class Real>
CCNET_INLINE Vector<Real> splat(Real x) {
  return x - Vector<Real>{};
}

// ---- loads and stores, in the type that sums are made in ----

CCNET_INLINE Vector<float> load(const float* p) { return *reinterpret_cast<const VectorOf<float>::unaligned*>(p); }
CCNET_INLINE void store(float* p, Vector<float> x) { *reinterpret_cast<VectorOf<float>::unaligned*>(p) = x; }
CCNET_INLINE Vector<double> load(const double* p) { return *reinterpret_cast<const VectorOf<double>::unaligned*>(p); }
CCNET_INLINE void store(double* p, Vector<double> x) { *reinterpret_cast<VectorOf<double>::unaligned*>(p) = x; }

// The bits of elements of 2 bytes, each in the lower half of a lane. (GCC converts wide vectors in halves and pieces.)
#if CCNET_VECTOR_BYTES == 64
CCNET_INLINE Bits load_halves(const void* p) {
  return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
CCNET_INLINE void store_halves(void* p, Bits x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x));
}
#elif CCNET_VECTOR_BYTES == 32
CCNET_INLINE Bits load_halves(const void* p) {
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
CCNET_INLINE void store_halves(void* p, Bits x) {
  const __m256i halves = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // each twice, in lanes of 16 bytes
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
}
#else
CCNET_INLINE Bits load_halves(const void* p) { return __builtin_convertvector(*static_cast<const HalfBits*>(p), Bits); }
CCNET_INLINE void store_halves(void* p, Bits x) { *static_cast<HalfBits*>(p) = __builtin_convertvector(x, HalfBits); }
#endif

// The nearest bfloat16, ties to even, in the lower half of each lane.
CCNET_INLINE Bits round_to_bfloat16(Vector<float> x) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? (bits >> 16) | 0x40 : rounded;
}
CCNET_INLINE Vector<float> load(const BFloat16* p) { return (Vector<float>)(load_halves(p) << 16); }
CCNET_INLINE void store(BFloat16* p, Vector<float> x) {
#if CCNET_TARGET == CCNET_TARGET_AVX512_BF16
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &rounded, sizeof rounded);
#else
  store_halves(p, round_to_bfloat16(x));
#endif
}

#if CCNET_VECTOR_BYTES == 64
CCNET_INLINE Vector<float> load(const Half* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, half);
}
CCNET_INLINE void store(Half* p, Vector<float> x) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
#elif CCNET_VECTOR_BYTES == 32
CCNET_INLINE Vector<float> load(const Half* p) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CCNET_INLINE void store(Half* p, Vector<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Multiplying by 2^112 moves the exponent from half's bias to float's, subnormal numbers included.
CCNET_INLINE Vector<float> load(const Half* p) {
  const Bits half = load_halves(p);
  const Bits magnitude = (half & 0x7fff) << 13;
  const Bits number = (Bits)((Vector<float>)magnitude * 0x1p112f);
  const Bits special = magnitude | 0x7f800000;  // infinity or NaN
  return (Vector<float>)(((half & 0x7c00) == 0x7c00 ? special : number) | (half & 0x8000) << 16);
}
// The nearest, ties to even. A subnormal result is rounded by adding the number whose last bit is worth 2^-24.
CCNET_INLINE void store(Half* p, Vector<float> x) {
  const Bits bits = (Bits)x, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const Bits subnormal = (Bits)((Vector<float>)magnitude + 0.5f) - 0x3f000000;
  const Bits normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  Bits half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;
  store_halves(p, half | sign);
}
#endif

// The first n elements; the other lanes are 0, or left alone in memory.
template <class T>
CCNET_INLINE auto load_part(const T* p, int64_t n) {
  T part[kLanes<Accumulate<T>>] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
CCNET_INLINE void store_part(T* p, Vector<Accumulate<T>> x, int64_t n) {
  T part[kLanes<Accumulate<T>>];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}
template <class T>
CCNET_INLINE auto load_up_to(const T* p, int64_t n) {
  return n >= kLanes<Accumulate<T>> ? load(p) : load_part(p, n);
}

// Stores a vector past the caches, which saves reading the line that is written; p is aligned to the vector. Before
// other threads may see it there has to be a streamed().
template <class T>
CCNET_INLINE void stream(T* p, Vector<Accumulate<T>> x) {
#if defined(__x86_64__)
  alignas(64) T part[kLanes<Accumulate<T>>];
  store(part, x);
  if constexpr (sizeof part == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(part));
  } else if constexpr (sizeof part == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
  } else if constexpr (sizeof part == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(part)));
  } else {
    long long word;
    std::memcpy(&word, part, sizeof word);
    _mm_stream_si64(reinterpret_cast<long long*>(p), word);
  }
#else
  store(p, x);
#endif
}
CCNET_INLINE void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- exp and log ----

// e^x is (fraction + 1) * power, power being a power of two.
struct Exponential {
  Vector<float> fraction, power;
};
CCNET_INLINE Exponential exp_in_parts(Vector<float> x) {
  // Adding 1.5 * 2^23 leaves the nearest integer to x / ln 2 in the lowest bits.
  const Vector<float> shifted = x * 1.44269504f + 12582912.f;
  const Vector<float> n = shifted - 12582912.f;
  const Vector<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * r * r + r, (Vector<float>)(((Bits)shifted + 127) << 23)};
}

// Relative error about 1e-7 up to x = 88; 0 where the result would be subnormal; NaN for NaN.
CCNET_INLINE Vector<float> exp(Vector<float> x) {
  const Exponential e = exp_in_parts(x);
  return x < -87.33654f ? Vector<float>{} : (e.fraction + 1.f) * e.power;
}
CCNET_INLINE Vector<double> exp(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = __builtin_exp(x[i]);
  }
  return x;
}

// e^x - 1 for x <= 0, with a relative error about 1e-7 also near 0; NaN for NaN.
CCNET_INLINE Vector<float> expm1(Vector<float> x) {
  const Exponential e = exp_in_parts(x);
  return x < -87.33654f ? splat(-1.f) : e.fraction * e.power + (e.power - 1.f);
}
CCNET_INLINE Vector<double> expm1(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = __builtin_expm1(x[i]);
  }
  return x;
}

// log(1 + x) for -1 < x <= 0, with a relative error about 1e-7 also near 0; NaN for NaN.
CCNET_INLINE Vector<float> log1p(Vector<float> x) {
  const Vector<float> u = x + 1.f;
  // u = 2^n * (1 + m), m from sqrt(1/2) - 1 to sqrt(2) - 1
  const Bits above = (Bits)u - 0x3f3504f3;
  const Vector<float> n = __builtin_convertvector((typename VectorOf<float>::integer)above >> 23, Vector<float>);
  const Vector<float> m = (Vector<float>)((above & 0x7fffff) + 0x3f3504f3) - 1.f;
  Vector<float> p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vector<float> log_u = p * m * m * m - n * 2.12194440e-4f - 0.5f * m * m + m + n * 0.693359375f;
  // What u lost of x by rounding
  const Vector<float> rounded = u - 1.f;
  const Vector<float> near_zero = rounded == 0.f ? x : log_u * (x / (rounded == 0.f ? u : rounded));
  return x != x ? x : near_zero;
}
CCNET_INLINE Vector<double> log1p(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = __builtin_log1p(x[i]);
  }
  return x;
}

// ---- several vectors at a time ----

// Elements of a and b in turns, from their lower (half 0) or upper half (half 1).
template <class Real, int half, int... I>
CCNET_INLINE Vector<Real> interleave(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, I...>) {
  constexpr int lanes = kLanes<Real>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I & 1 ? lanes : 0) + half * lanes / 2 + I / 2)...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<Real>::integer{(I & 1 ? lanes : 0) + half * lanes / 2 + I / 2 ...});
#endif
}

// rows[i][k] and rows[k][i] change places.
template <class Real>
CCNET_INLINE void transpose(Vector<Real>* rows) {
  constexpr int lanes = kLanes<Real>;
  const auto all = std::make_integer_sequence<int, lanes>();
#pragma GCC unroll 8
  for (int step = 1; step < lanes; step *= 2) {
    Vector<Real> next[lanes];
#pragma GCC unroll 16
    for (int k = 0; k < lanes / 2; ++k) {
      next[2 * k] = interleave<Real, 0>(rows[k], rows[k + lanes / 2], all);
      next[2 * k + 1] = interleave<Real, 1>(rows[k], rows[k + lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int k = 0; k < lanes; ++k) {
      rows[k] = next[k];
    }
  }
}

// Lane k: the sum of rows[k], as many rows as lanes. Overwrites rows.
template <class Real>
CCNET_INLINE Vector<Real> sum_of_each(Vector<Real>* rows) {
  transpose<Real>(rows);
#pragma GCC unroll 16
  for (int k = 1; k < kLanes<Real>; ++k) {
    rows[0] += rows[k];
  }
  return rows[0];
}

// Lane k: the largest of rows[k]; what a NaN does to it is undefined. Overwrites rows.
template <class Real>
CCNET_INLINE Vector<Real> max_of_each(Vector<Real>* rows) {
  transpose<Real>(rows);
#pragma GCC unroll 16
  for (int k = 1; k < kLanes<Real>; ++k) {
    rows[0] = rows[k] > rows[0] ? rows[k] : rows[0];
  }
  return rows[0];
}

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
