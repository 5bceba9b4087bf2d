// Ends what target_begin.h began.

#if defined(CCNET_TARGET_NAMES) && defined(__clang__)
#pragma clang attribute pop
#elif defined(CCNET_TARGET_NAMES)
#pragma GCC pop_options
#endif

#undef CCNET_TARGET
#undef CCNET_CAPABILITY
#undef CCNET_VECTOR_BYTES
#undef CCNET_TARGET_NAMES
