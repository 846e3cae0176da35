/* The passes for processors with AVX-512 that round to bfloat16 themselves. */

#include "several.h"

#ifdef SEVERAL_GENERATIONS
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define GENERATION keras_bn_avx512_bf16
#include "all_passes.h"
#endif
