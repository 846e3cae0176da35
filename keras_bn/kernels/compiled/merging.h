/* The moments of cells that are merged, all of one size, as core/moments.py merges them. */

#ifndef KERAS_BN_MERGING_H
#define KERAS_BN_MERGING_H

#include "cell.h"
#include "job.h"

/* Add means, about the pivots of the columns, their squares, and m2. */
INLINED void add_moments_of(int64_t n, const float *restrict center, const float *restrict offset,
                            const float *restrict m2, const float *restrict pivot,
                            double *restrict first, double *restrict second,
                            double *restrict within) {
    for (int64_t j = 0; j < n; j++) {
        double distance = deviation_of(center[j], offset[j], pivot[j]);
        first[j] += distance, second[j] += distance * distance, within[j] += m2[j];
    }
}

/* Add the moments of some cells to those of their columns. */
static void add_to_merged(Job *job, int64_t from, int64_t to, int part) {
    int64_t columns = job->merged.columns;
    for (int64_t i = from, n; i < to; i += n) {
        int64_t column = i % columns;
        double *sums = job->merged.sums + 3 * columns * part + column;
        n = cells_to_wrap(columns, i, to);
        add_moments_of(n, job->center + i, job->offset + i, job->m2 + i,
                       job->merged.pivots + column, sums, sums + columns, sums + 2 * columns);
    }
}

/* Turn the sums of all parts into pivots, offsets and m2. */
static void write_merged(const Job *job, float *out) {
    int64_t n = job->merged.columns, number = job->all / n;
    double *sums = job->merged.sums, count = job->count * (double)job->together;
    for (int part = 1; part < job->parts; part++)
        for (int64_t j = 0; j < 3 * n; j++) sums[j] += sums[part * 3 * n + j];
    for (int64_t j = 0; j < n; j++) {
        double first = sums[j], distance = first / (double)number;
        double mean = job->merged.pivots[j] + distance, between = sums[n + j] - first * distance;
        between = between < 0 ? 0 : between; /* a NaN stays one */
        out[j] = (float)mean, out[n + j] = (float)(mean - (float)mean);
        out[2 * n + j] = (float)(sums[2 * n + j] + count * between);
    }
}

#endif
