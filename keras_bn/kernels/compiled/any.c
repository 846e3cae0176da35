/* The passes for any processor. */

#define GENERATION keras_bn_any
#include "all_passes.h"
