/* What a call does, and the memory that it does it with.

   A cell is what is summed by itself; one or several neighbouring cells make a set, which is
   normalized together. */

#ifndef KERAS_BN_JOB_H
#define KERAS_BN_JOB_H

#include <math.h>

#include "lines.h"
#include "nest.h"

typedef enum { MOMENTS, PRODUCTS, MAPPED_PRODUCTS, MAP, COMBINED } Pass;

/* Two sums for each of a number of cells or columns, from `first` on. Each part has its own, `copy`
   apart; 0 where no two parts have a sum in common. */
typedef struct {
    double *sums;
    int64_t first, number, copy;
} Sums;

/* Moments of cells that are merged: cells i and i + columns, and so on. Three sums for each column,
   about its pivot; each part has its own. */
typedef struct {
    float *pivots;
    double *sums;
    int64_t columns;
} Merged;

/* What there is for each of a number of cells between two stages; each part has its own, as long as
   it needs it. */
enum { WORKS = 5 };
typedef struct {
    float *room;
    int64_t number;
} Work;

typedef struct Job Job;

/* Go through turns of the outermost loop, or through cells; `part` says whose sums are added to. */
typedef void (*Stage)(Job *job, int64_t from, int64_t to, int part);

/* What a call does: stages, of which some may be missing, and what they work on. */
struct Job {
    Stage sum, finish, map;
    Stage rows, strips; /* all of them, for sets that are lines, or a few rows of columns */
    Stage whole;        /* which of these is taken; else NULL */
    Nest nest;
    int64_t many; /* turns of the outermost loop that stay in the cache */
    int threads, parts, types[Y + 1];
    char *big[Y + 1];
    const float *weights, *gamma, *beta;
    float *center, *scale, *shift, *factor, *slope, *level, *offset, *m2;
    const float *kept_mean, *kept_variance; /* to correct towards, or NULL */
    const double *limits;
    float *r, *d; /* of cells that are corrected */
    int64_t kept_columns;
    Sums cells, columns;
    Merged merged;
    Work work; /* for slopes, levels and factors, and moments that are merged, unless results */
    const float *counts;
    double count, epsilon;
    int64_t all;      /* how many cells there are */
    int64_t together; /* how many neighbouring cells make a set */
    int varies;       /* whether gamma varies within a set */
    int is_first;     /* whether the first element of a line is its pivot */
    int is_centered, is_training, is_far;
    Way way; /* of the map */
};

static int along_line(const Job *job, int operand, const void *data) {
    if (!data) return ABSENT;
    return job->nest.stride[operand][job->nest.rank - 1] ? MANY : ONE;
}

/* Say whether each turn of the outermost loop has sets of its own, side by side among all. */
static int are_apart(const Job *job) {
    int64_t stride = job->nest.stride[CELL][0];
    return stride * job->nest.size[0] == job->all && stride % job->together == 0;
}

/* Say whether gamma and beta belong to cells. */
static int is_composed(const Job *job) { return job->gamma && !job->varies; }

/* Return how many cells there are until so many columns begin again. */
static int64_t cells_to_wrap(int64_t columns, int64_t i, int64_t to) {
    int64_t ahead = columns - i % columns;
    return ahead < to - i ? ahead : to - i;
}

/* Return the pivot of a sum whose first element is x. */
INLINED float pivot_of(float x, int is_centered) {
    return is_centered && isfinite(x) ? x : 0;
}

/* Let slopes, levels and factors of a number of cells lie in a room, and moments to be merged. */
static void place(Job *job, float *room, int64_t first, int64_t number) {
    job->slope = room - first;
    job->level = room + number - first;
    job->factor = room + 2 * number - first;
    if (!job->merged.columns) return;
    job->offset = room + 3 * number - first;
    job->m2 = room + 4 * number - first;
}

#endif
