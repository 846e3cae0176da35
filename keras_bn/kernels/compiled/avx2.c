/* The passes for processors with AVX2. */

#include "several.h"

#ifdef SEVERAL_GENERATIONS
#pragma GCC target("arch=x86-64-v3")
#define GENERATION keras_bn_avx2
#include "all_passes.h"
#endif
