/* The passes for processors with AVX-512. */

#include "several.h"

#ifdef SEVERAL_GENERATIONS
#pragma GCC target("arch=x86-64-v4")
#define GENERATION keras_bn_avx512
#include "all_passes.h"
#endif
