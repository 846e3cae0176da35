/* What becomes of the sums of cells: moments, maps and gradients of cells and sets. */

#ifndef KERAS_BN_CELLS_H
#define KERAS_BN_CELLS_H

#include "passes.h"

/* Say whether a count in float32 is what was counted, as that of a mask is. */
INLINED int is_exact(float count) { return count < 1 << 24 && count == (float)(int32_t)count; }

/* Moments; whether the pivot of the sums was so far off that digits are lost. */
typedef struct {
    float center, offset, m2;
    int is_far;
} Found;

/* 12 of 53 bits may go; but what is lost of a count in float32 is lost here, too. */
enum { EXACT = 1 << 12, INEXACT = 4 };

/* Return the moments of a cell from its sums about a pivot. */
INLINED Found found_of(double first, double second, double share, double pivot, double most,
                       int is_centered) {
    double distance = is_centered ? first * share : 0, lost = first * distance;
    double rest = second - lost, mean = pivot + distance;
    float m2 = (float)rest;
    m2 = m2 < 0 ? 0 : m2; /* a NaN stays one; first narrowed, or it would be a branch */
    return (Found){(float)mean, (float)(mean - (float)mean), m2, lost > most * rest};
}

INLINED float scale_of(float m2, double share, double epsilon) {
    return (float)(1 / sqrt(m2 * share + epsilon));
}

INLINED void moments_of(Job *job, int64_t from, int64_t to, int is_counted, int is_centered) {
    const double *restrict first = job->cells.sums - job->cells.first;
    const double *restrict second = first + job->cells.number;
    const float *restrict counts = job->counts;
    float *restrict center = job->center, *restrict offset = job->offset, *restrict m2 = job->m2;
    double same = 1 / (job->count > 0 ? job->count : 1);
    int64_t far = 0;
    for (int64_t i = from; i < to; i++) {
        double share = !is_counted ? same : 1 / (double)(counts[i] > 0 ? counts[i] : 1);
        double most = is_counted && !is_exact(counts[i]) ? INEXACT : EXACT;
        Found found = found_of(first[i], second[i], share, center[i], most, is_centered);
        center[i] = found.center, offset[i] = found.offset, m2[i] = found.m2;
        far += found.is_far;
    }
    if (far) job->is_far = 1;
}

/* Turn the sums of cells into moments. */
static void finish_moments(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    if (!job->is_centered) moments_of(job, from, to, 0, 0);
    else if (job->counts) moments_of(job, from, to, 1, 1);
    else moments_of(job, from, to, 0, 1);
}

/* Give each cell the moments of its set, as core/moments.py merges them. */
static void merge(Job *job, int64_t from, int64_t to) {
    int64_t number = job->together;
    for (int64_t set = from; set < to; set += number) {
        double distance = 0, m2 = 0, pivot = job->center[set];
        for (int64_t i = set; i < set + number; i++)
            distance += (job->center[i] - pivot + job->offset[i]) / number;
        for (int64_t i = set; i < set + number; i++) {
            double own = job->center[i] - pivot + job->offset[i] - distance;
            m2 += job->m2[i] + job->count * own * own;
        }
        float center = (float)(pivot + distance), offset = (float)(pivot + distance - center);
        for (int64_t i = set; i < set + number; i++)
            job->center[i] = center, job->offset[i] = offset, job->m2[i] = (float)m2;
    }
}

/* Say whether gamma and beta belong to cells. */
static int is_composed(const Job *job) { return job->gamma && !job->varies; }

/* Return how many cells there are until so many columns begin again. */
static int64_t cells_to_wrap(int64_t columns, int64_t i, int64_t to) {
    int64_t ahead = columns - i % columns;
    return ahead < to - i ? ahead : to - i;
}

/* Correct maps, each towards a mean and a variance, r and d within their limits; a NaN stays one. */
INLINED void correct_line(float *restrict slope, float *restrict level, float *restrict all_r,
                          float *restrict all_d, int64_t n, const float *restrict center,
                          const float *restrict offset, const float *restrict m2,
                          const float *restrict mean, const float *restrict variance,
                          const double *restrict limits, double share, double epsilon) {
    double least = limits[0], most = limits[1], farthest = limits[2];
    for (int64_t j = 0; j < n; j++) {
        double stddev = sqrt(variance[j] + epsilon);
        double r = sqrt(m2[j] * share + epsilon) / stddev;
        double d = (center[j] - (double)mean[j] + offset[j]) / stddev;
        r = r < least ? least : r > most ? most : r;
        d = d < -farthest ? -farthest : d > farthest ? farthest : d;
        all_r[j] = (float)r, all_d[j] = (float)d;
        slope[j] *= (float)r, level[j] = level[j] * (float)r + (float)d;
    }
}

INLINED void correct(Job *job, int64_t from, int64_t to) {
    double share = 1 / (job->count * job->together);
    for (int64_t i = from, n; i < to; i += n) {
        int64_t column = i % job->kept_columns;
        n = cells_to_wrap(job->kept_columns, i, to);
        correct_line(job->slope + i, job->level + i, job->r + i, job->d + i, n, job->center + i,
                     job->offset + i, job->m2 + i, job->kept_mean + column,
                     job->kept_variance + column, job->limits, share, job->epsilon);
    }
}

/* Turn the sums of cells into the map of each. */
static void finish_map(Job *job, int64_t from, int64_t to, int part) {
    finish_moments(job, from, to, part);
    if (job->together > 1) merge(job, from, to);
    const float *restrict m2 = job->m2, *restrict offset = job->offset;
    float *restrict scale = job->scale, *restrict shift = job->shift;
    double share = 1 / (job->count * job->together), epsilon = job->epsilon;
    for (int64_t i = from; i < to; i++) {
        scale[i] = scale_of(m2[i], share, epsilon);
        shift[i] = -offset[i] * scale[i];
    }
    memcpy(job->slope + from, scale + from, (size_t)(to - from) * sizeof(float));
    memcpy(job->level + from, shift + from, (size_t)(to - from) * sizeof(float));
    if (job->kept_mean) correct(job, from, to);
    for (int64_t i = from, n; is_composed(job) && i < to; i += n) {
        const float *gamma = job->gamma + i % job->columns.number;
        const float *beta = job->beta + i % job->columns.number;
        n = cells_to_wrap(job->columns.number, i, to);
        for (int64_t j = 0; j < n; j++) {
            job->slope[i + j] *= gamma[j];
            job->level[i + j] = job->level[i + j] * gamma[j] + beta[j];
        }
    }
}

/* Keep the sums of cells as levels and slopes. */
static void finish_sums(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    const double *first = job->cells.sums - job->cells.first, *second = first + job->cells.number;
    for (int64_t i = from; i < to; i++)
        job->level[i] = (float)first[i], job->slope[i] = (float)second[i];
}

/* Turn Σ dy and Σ dy·(x - center) into Σ dy·z, and both into Σ g·dy and Σ g·dy·z, where g is
   gamma·r. */
static void weigh(Job *job, int64_t from, int64_t to) {
    const float *restrict scale = job->scale, *restrict shift = job->shift;
    float *restrict slope = job->slope, *restrict level = job->level;
    float *restrict factor = job->factor;
    memcpy(factor + from, scale + from, (size_t)(to - from) * sizeof(float));
    for (int64_t i = from; !job->varies && i < to; i++)
        slope[i] = slope[i] * scale[i] + level[i] * shift[i];
    for (int64_t i = from; job->r && i < to; i++)
        level[i] *= job->r[i], slope[i] *= job->r[i], factor[i] *= job->r[i];
    for (int64_t i = from, n; is_composed(job) && i < to; i += n) {
        const float *gamma = job->gamma + i % job->columns.number;
        n = cells_to_wrap(job->columns.number, i, to);
        for (int64_t j = 0; j < n; j++)
            level[i + j] *= gamma[j], slope[i + j] *= gamma[j], factor[i + j] *= gamma[j];
    }
}

/* Give each cell the sums of its set. */
static void share(Job *job, int64_t from, int64_t to) {
    for (int64_t set = from; set < to; set += job->together) {
        double first = 0, second = 0;
        for (int64_t i = set; i < set + job->together; i++)
            first += job->level[i], second += job->slope[i];
        for (int64_t i = set; i < set + job->together; i++)
            job->level[i] = (float)first, job->slope[i] = (float)second;
    }
}

/* Over a set of n, dx = scale·(g·dy - Σ g·dy / n - z·Σ g·dy·z / n): with
   z = (x - center)·scale + shift that is scale·g·dy + (x - center)·slope + level. */
static void finish_gradients(Job *job, int64_t from, int64_t to, int part) {
    finish_sums(job, from, to, part);
    weigh(job, from, to);
    if (job->together > 1) share(job, from, to);
    double count = job->count * job->together;
    double share = 1 / count, centered = job->is_centered ? share : 0;
    const float *restrict scale = job->scale, *restrict shift = job->shift;
    float *restrict slope = job->slope, *restrict level = job->level;
    for (int64_t i = from; i < to; i++) {
        float by_slope = (float)(-slope[i] * share * scale[i]);
        level[i] = (float)(-level[i] * centered * scale[i]) + by_slope * shift[i];
        slope[i] = by_slope * scale[i];
    }
}

/* Add the sums of some cells, Σ dy and Σ dy·(r·z + d), to those of some columns. */
static void add_to_columns(Job *job, int64_t from, int64_t to, int64_t lowest, int64_t highest,
                           int part) {
    const double *first = job->cells.sums - job->cells.first, *second = first + job->cells.number;
    double *firsts = job->columns.sums + part * job->columns.copy;
    double *seconds = firsts + job->columns.number;
    for (int64_t i = from, n; i < to; i += n) {
        int64_t column = i % job->columns.number;
        n = cells_to_wrap(job->columns.number, i, to);
        int64_t low = lowest > column ? lowest - column : 0;
        int64_t high = highest - column < n ? highest - column : n;
        for (int64_t j = low; j < high; j++) {
            double a = first[i + j];
            double b = second[i + j] * job->scale[i + j] + a * job->shift[i + j];
            firsts[column + j] += a;
            seconds[column + j] += job->r ? b * job->r[i + j] + a * job->d[i + j] : b;
        }
    }
}

#endif
