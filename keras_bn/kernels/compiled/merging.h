/* The moments of many sets of one size, all together, as core/moments.py merges them. */

#ifndef KERAS_BN_MERGING_H
#define KERAS_BN_MERGING_H

#include "nest.h"

/* Rows, one for each of a number of sets, of the parts of their moments in columns. */
typedef struct {
    const float *center, *offset, *m2;
    int64_t number, columns;
    double *sums; /* three for each column; each part has its own */
    int parts;
} Sets;

/* Add a row: means, about the pivots of the columns, their squares, and m2. */
INLINED void add_set(int64_t n, const float *restrict center, const float *restrict offset,
                     const float *restrict m2, const float *restrict pivot,
                     double *restrict first, double *restrict second, double *restrict within) {
    for (int64_t j = 0; j < n; j++) {
        double distance = center[j] - (double)pivot[j] + offset[j];
        first[j] += distance, second[j] += distance * distance, within[j] += m2[j];
    }
}

static void add_sets(void *given, int part) {
    const Sets *sets = given;
    int64_t n = sets->columns, last = sets->number * (part + 1) / sets->parts;
    double *sums = sets->sums + part * 3 * n;
    for (int64_t i = sets->number * part / sets->parts; i < last; i++)
        add_set(n, sets->center + i * n, sets->offset + i * n, sets->m2 + i * n, sets->center, sums,
                sums + n, sums + 2 * n);
}

/* Turn the sums into pivots, offsets and m2 of sets of so many elements. */
static void write_merged(const Sets *sets, double count, float *out) {
    int64_t n = sets->columns;
    for (int part = 1; part < sets->parts; part++)
        for (int64_t j = 0; j < 3 * n; j++) sets->sums[j] += sets->sums[part * 3 * n + j];
    for (int64_t j = 0; j < n; j++) {
        double first = sets->sums[j], distance = first / sets->number;
        double mean = sets->center[j] + distance, between = sets->sums[n + j] - first * distance;
        between = between < 0 ? 0 : between; /* a NaN stays one */
        out[j] = (float)mean, out[n + j] = (float)(mean - (float)mean);
        out[2 * n + j] = (float)(sets->sums[2 * n + j] + count * between);
    }
}

#endif
