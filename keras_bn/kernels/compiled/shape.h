/* The shape of a dense tensor, and what the passes want to know of it. */

#ifndef KERAS_BN_SHAPE_H
#define KERAS_BN_SHAPE_H

#include <string.h>

#include "calls.h"

/* What there is for each cell and for each column has sizes with room for one more in front. */
typedef struct {
    int rank;
    int64_t size[RANK], sums[RANK + 1], columns[RANK + 1], elements, cells, number;
    int64_t dims[(OPERANDS + 1) * RANK];
} Shape;

static void write_strides(int64_t *strides, const int64_t *size, int rank) {
    int64_t step = 1;
    for (int i = rank - 1; i >= 0; step *= size[i--]) strides[i] = size[i] == 1 ? 0 : step;
}

/* Sizes of the tensor, of what there is for each cell, of gamma and of the weights are given; NULL
   for those of the tensor, and for 1. The axes in a mask are summed over. */
static Shape shape_of(int rank, const int64_t *size, const int64_t *cell, const int64_t *column,
                      const int64_t *weight, int64_t mask) {
    Shape shape = {.rank = rank, .elements = 1, .cells = 1, .number = 1};
    int64_t counted[RANK];
    for (int i = 0; i < rank; i++) {
        shape.size[i] = size[i];
        shape.sums[i + 1] = mask >> i & 1 ? 1 : cell ? cell[i] : size[i];
        shape.columns[i + 1] = column ? column[i] : 1;
        counted[i] = weight ? weight[i] : 1;
        shape.elements *= size[i];
        shape.cells *= shape.sums[i + 1], shape.number *= shape.columns[i + 1];
    }
    memcpy(shape.dims, shape.size, rank * sizeof(int64_t));
    for (int o = X; o <= Y; o++) write_strides(shape.dims + (o + 1) * rank, size, rank);
    write_strides(shape.dims + (WEIGHT + 1) * rank, counted, rank);
    write_strides(shape.dims + (CELL + 1) * rank, shape.sums + 1, rank);
    write_strides(shape.dims + (COLUMN + 1) * rank, shape.columns + 1, rank);
    return shape;
}

/* Leave out of the sums the second axis, along which sets are merged; return how many are left. */
static int64_t merge_sets(Shape *shape) {
    int64_t sets = shape->sums[2];
    shape->sums[2] = 1;
    return shape->cells / sets;
}

#endif
