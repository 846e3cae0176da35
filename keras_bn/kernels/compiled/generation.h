/* The passes as they are compiled for one generation of processors. */

#ifndef KERAS_BN_GENERATION_H
#define KERAS_BN_GENERATION_H

#include "job.h"

typedef struct {
    Stage find_pivots, sum_moments, sum_products, sum_mapped_products;
    Stage finish_moments, finish_sums, finish_map, finish_gradients;
    Stage map, combine, normalize_rows, differentiate_rows, normalize_strips, differentiate_strips;
    Stage add_to_merged;
    void (*add_to_columns)(Job *job, int64_t from, int64_t to, int64_t lowest, int64_t highest,
                           int part);
    int takes_bfloat; /* whether it is best taken some at a time */
} Generation;

extern const Generation keras_bn_any, keras_bn_avx2, keras_bn_avx512, keras_bn_avx512_bf16;

#endif
