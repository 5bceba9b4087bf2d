// Compiles what follows, up to target_end.h, for the instruction set that CCNET_TARGET names: one of
//   CCNET_TARGET_BASELINE, CCNET_TARGET_AVX2, CCNET_TARGET_AVX512, CCNET_TARGET_AVX512_BF16
// and defines CCNET_CAPABILITY, the namespace of its code, and CCNET_VECTOR_BYTES.
//
// Include every system header before this one. An inline function of theirs compiled in between could be the copy that
// the linker keeps for the whole library, and stop older CPUs at an illegal instruction.

#define CCNET_TARGET_BASELINE 0
#define CCNET_TARGET_AVX2 1
#define CCNET_TARGET_AVX512 2
#define CCNET_TARGET_AVX512_BF16 3

#if CCNET_TARGET == CCNET_TARGET_AVX512_BF16
#define CCNET_CAPABILITY avx512_bf16
#define CCNET_VECTOR_BYTES 64
#define CCNET_TARGET_NAMES "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"
#elif CCNET_TARGET == CCNET_TARGET_AVX512
#define CCNET_CAPABILITY avx512
#define CCNET_VECTOR_BYTES 64
#define CCNET_TARGET_NAMES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#elif CCNET_TARGET == CCNET_TARGET_AVX2
#define CCNET_CAPABILITY avx2
#define CCNET_VECTOR_BYTES 32
#define CCNET_TARGET_NAMES "avx2,fma,f16c"
#else
#define CCNET_CAPABILITY baseline
#define CCNET_VECTOR_BYTES 16
#endif

#define CCNET_PRAGMA(text) _Pragma(#text)
#if defined(CCNET_TARGET_NAMES) && defined(__clang__)
#define CCNET_ATTRIBUTE(names) CCNET_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
CCNET_ATTRIBUTE(CCNET_TARGET_NAMES)
#elif defined(CCNET_TARGET_NAMES)
#pragma GCC push_options
#define CCNET_GCC_TARGET(names) CCNET_PRAGMA(GCC target(names))
CCNET_GCC_TARGET(CCNET_TARGET_NAMES)
#endif
