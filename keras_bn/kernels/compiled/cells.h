/* What becomes of the sums of cells: moments, maps and gradients of cells and sets. */

#ifndef KERAS_BN_CELLS_H
#define KERAS_BN_CELLS_H

#include "cell.h"
#include "passes.h"

/* Say whether a count in float32 is what was counted, as that of a mask is. */
INLINED int is_exact(float count) { return count < 1 << 24 && count == (float)(int32_t)count; }

/* 12 of 53 bits may go; but what is lost of a count in float32 is lost here, too. */
enum { EXACT = 1 << 12, INEXACT = 4 };

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

/* Find what corrects sets, each towards a mean and a variance: r and d, within their limits; a NaN
   stays one. */
INLINED void correct_line(float *restrict all_r, float *restrict all_d, int64_t n,
                          const float *restrict center, const float *restrict offset,
                          const float *restrict m2, const float *restrict mean,
                          const float *restrict variance, const double *restrict limits,
                          double share, double epsilon) {
    double least = limits[0], most = limits[1], farthest = limits[2];
    for (int64_t j = 0; j < n; j++) {
        double stddev = sqrt(variance[j] + epsilon);
        double r = sqrt(m2[j] * share + epsilon) / stddev;
        double d = (center[j] - (double)mean[j] + offset[j]) / stddev;
        r = r < least ? least : r > most ? most : r;
        d = d < -farthest ? -farthest : d > farthest ? farthest : d;
        all_r[j] = (float)r, all_d[j] = (float)d;
    }
}

static void correct(Job *job, int64_t from, int64_t to) {
    double share = 1 / (job->count * job->together);
    for (int64_t i = from, n; i < to; i += n) {
        int64_t column = i % job->kept_columns;
        n = cells_to_wrap(job->kept_columns, i, to);
        correct_line(job->r + i, job->d + i, n, job->center + i, job->offset + i, job->m2 + i,
                     job->kept_mean + column, job->kept_variance + column, job->limits, share,
                     job->epsilon);
    }
}

/* Find the maps of n cells. */
INLINED void maps_line(float *restrict scale, float *restrict shift, float *restrict slope,
                       float *restrict level, int64_t n, const float *restrict m2,
                       const float *restrict offset, const float *restrict r,
                       const float *restrict d, const float *restrict gamma,
                       const float *restrict beta, double share, double epsilon) {
    for (int64_t j = 0; j < n; j++) {
        Map map = map_of(m2[j], offset[j], share, epsilon, r ? r + j : 0, r ? d + j : 0,
                         gamma ? gamma + j : 0, gamma ? beta + j : 0);
        scale[j] = map.scale, shift[j] = map.shift, slope[j] = map.slope, level[j] = map.level;
    }
}

INLINED void maps_of(Job *job, int64_t from, int64_t to, int is_corrected, int is_composed) {
    int64_t columns = is_composed ? job->columns.number : to;
    double share = 1 / (job->count * job->together);
    for (int64_t i = from, n; i < to; i += n) {
        int64_t column = i % columns;
        n = cells_to_wrap(columns, i, to);
        maps_line(job->scale + i, job->shift + i, job->slope + i, job->level + i, n, job->m2 + i,
                  job->offset + i, is_corrected ? job->r + i : 0, is_corrected ? job->d + i : 0,
                  is_composed ? job->gamma + column : 0, is_composed ? job->beta + column : 0,
                  share, job->epsilon);
    }
}

/* Turn the sums of cells into the map of each. */
static void finish_map(Job *job, int64_t from, int64_t to, int part) {
    finish_moments(job, from, to, part);
    if (job->together > 1) merge(job, from, to);
    if (job->kept_mean) correct(job, from, to);
    if (job->kept_mean && is_composed(job)) maps_of(job, from, to, 1, 1);
    else if (job->kept_mean) maps_of(job, from, to, 1, 0);
    else if (is_composed(job)) maps_of(job, from, to, 0, 1);
    else maps_of(job, from, to, 0, 0);
}

/* Keep the sums of cells as levels and slopes. */
static void finish_sums(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    const double *first = job->cells.sums - job->cells.first, *second = first + job->cells.number;
    for (int64_t i = from; i < to; i++)
        job->level[i] = (float)first[i], job->slope[i] = (float)second[i];
}

/* Turn Σ dy and Σ dy·(x - center) of n cells into Σ g·dy and Σ g·dy·z, which they are already where
   gamma varies within a set; and these into slopes and levels, where cells are sets. */
INLINED void weigh_line(float *restrict factor, float *restrict slope, float *restrict level,
                        int64_t n, const double *restrict first, const double *restrict second,
                        const float *restrict scale, const float *restrict shift,
                        const float *restrict r, const float *restrict gamma, int varies,
                        int are_sets, double share, double centered) {
    for (int64_t j = 0; j < n; j++) {
        double a = first[j], b = varies ? second[j] : mapped(a, second[j], scale[j], shift[j]);
        float g = r ? r[j] : 1;
        if (gamma) g *= gamma[j];
        Combination own = {scale[j] * g, (float)(b * g), (float)(a * g)};
        if (are_sets)
            own = combination_of(own.factor, a * g, b * g, scale[j], shift[j], share, centered);
        factor[j] = own.factor, slope[j] = own.slope, level[j] = own.level;
    }
}

INLINED void weigh(Job *job, int64_t from, int64_t to, int varies, int is_corrected,
                   int is_composed, int are_sets) {
    int64_t columns = is_composed ? job->columns.number : to;
    double share = 1 / job->count, centered = job->is_centered ? share : 0;
    for (int64_t i = from, n; i < to; i += n) {
        const double *first = job->cells.sums - job->cells.first + i;
        n = cells_to_wrap(columns, i, to);
        weigh_line(job->factor + i, job->slope + i, job->level + i, n, first,
                   first + job->cells.number, job->scale + i, job->shift + i,
                   is_corrected ? job->r + i : 0, is_composed ? job->gamma + i % columns : 0,
                   varies, are_sets, share, centered);
    }
}

INLINED void weigh_all(Job *job, int64_t from, int64_t to, int are_sets) {
    if (job->varies) weigh(job, from, to, 1, 0, 0, are_sets);
    else if (job->r && is_composed(job)) weigh(job, from, to, 0, 1, 1, are_sets);
    else if (job->r) weigh(job, from, to, 0, 1, 0, are_sets);
    else if (is_composed(job)) weigh(job, from, to, 0, 0, 1, are_sets);
    else weigh(job, from, to, 0, 0, 0, are_sets);
}

/* Turn the sums of cells into slopes and levels by the sums of their sets. */
static void share_sums(Job *job, int64_t from, int64_t to) {
    double share = 1 / (job->count * job->together), centered = job->is_centered ? share : 0;
    for (int64_t set = from; set < to; set += job->together) {
        double first = 0, second = 0;
        for (int64_t i = set; i < set + job->together; i++)
            first += job->level[i], second += job->slope[i];
        for (int64_t i = set; i < set + job->together; i++) {
            Combination own = combination_of(job->factor[i], first, second, job->scale[i],
                                             job->shift[i], share, centered);
            job->slope[i] = own.slope, job->level[i] = own.level;
        }
    }
}

static void finish_gradients(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    if (job->together == 1) {
        weigh_all(job, from, to, 1);
        return;
    }
    weigh_all(job, from, to, 0);
    share_sums(job, from, to);
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
            double b = mapped(a, second[i + j], job->scale[i + j], job->shift[i + j]);
            firsts[column + j] += a;
            seconds[column + j] += job->r ? mapped(a, b, job->r[i + j], job->d[i + j]) : b;
        }
    }
}

#endif
