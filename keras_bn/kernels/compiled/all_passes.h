/* The passes, for the processors that the compiler has been told, under the name GENERATION. */

#include "generation.h"
#include "merging.h"
#include "rows.h"
#include "strips.h"

const Generation GENERATION = {
    .find_pivots = find_pivots,
    .sum_moments = sum_moments,
    .sum_products = sum_products,
    .sum_mapped_products = sum_mapped_products,
    .finish_moments = finish_moments,
    .finish_sums = finish_sums,
    .finish_map = finish_map,
    .finish_gradients = finish_gradients,
    .map = map,
    .combine = combine,
    .normalize_rows = normalize_rows,
    .differentiate_rows = differentiate_rows,
    .normalize_strips = normalize_strips,
    .differentiate_strips = differentiate_strips,
    .add_to_columns = add_to_columns,
    .add_to_merged = add_to_merged,
    .takes_bfloat = TAKES_BFLOAT,
};
