/* What a call does, and the memory that it does it with.

   A cell is what is summed by itself; one or several neighbouring cells make a set, which is
   normalized together. */

#ifndef KERAS_BN_JOB_H
#define KERAS_BN_JOB_H

#include <stdlib.h>
#include <string.h>

#include "lines.h"
#include "nest.h"
#include "team.h"

typedef enum { MOMENTS, PRODUCTS, MAPPED_PRODUCTS, MAP, COMBINED } Pass;

/* Two sums for each of a number of cells or columns, from `first` on. Each part has its own, `copy`
   apart; 0 where no two parts have a sum in common. */
typedef struct {
    double *sums;
    int64_t first, number, copy;
} Sums;

/* What there is for each of a number of cells between two stages; each part has its own, as long as
   it needs it. */
enum { WORKS = 3 };
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
    Stage rows; /* all of them, for sets that are lines */
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
    Work work; /* for slopes, levels and factors, unless these are results */
    const float *counts;
    double count, epsilon;
    int64_t all;      /* how many cells there are */
    int64_t together; /* how many neighbouring cells make a set */
    int varies;       /* whether gamma varies within a set */
    int is_first;     /* whether the first element of a line is its pivot */
    int is_centered, is_training, is_far;
    Way way; /* of the map */
};

/* How many parts there are for each of several threads. */
enum { MORE = 4 };

/* Elements that stay in a core's cache beside as many others; bytes that stay in none until they
   are read again; elements that are not worth a thread of a runtime, or waking a helper. */
enum { CHUNK = 1 << 15, LARGE = 1 << 23, SMALL = 1 << 15, MODERATE = 1 << 17 };

static int along_line(const Job *job, int operand, const void *data) {
    if (!data) return ABSENT;
    return job->nest.stride[operand][job->nest.rank - 1] ? MANY : ONE;
}

/* Return the way of the map. Of bfloat16 it is direct only where cells lie along the lines: with one
   cell for a line there is little else to load, and loops that widen and narrow it are faster. */
static Way way_of(const Job *job, int64_t elements) {
    const Nest *nest = &job->nest;
    int last = nest->rank - 1, type = job->types[X];
    int is_past_caches = job->is_training && elements * WIDTH[job->types[Y]] >= LARGE;
    int are_alike = job->types[Y] == type && (!job->big[DY] || job->types[DY] == type);
    int is_able = is_taken(type) && (type == FLOAT || along_line(job, CELL, job->center) == MANY);
    uintptr_t aligned = (uintptr_t)job->big[Y];
    for (int i = 0; i < last; i++) aligned |= (uintptr_t)(nest->stride[Y][i] * WIDTH[type]);
    int is_even = nest->size[last] % LANES == 0 && aligned % 16 == 0;
    return (Way){are_alike && is_able && is_even, type, is_past_caches};
}

/* Say whether each turn of the outermost loop has sets of its own, side by side among all. */
static int are_apart(const Job *job) {
    int64_t stride = job->nest.stride[CELL][0];
    return stride * job->nest.size[0] == job->all && stride % job->together == 0;
}

/* Return how many of some threads so many elements are worth. */
static int threads_for(int64_t elements, int threads) {
    return elements < (start ? SMALL : MODERATE) ? 1 : threads;
}

static int allocate(Sums *sums, int64_t number, int copies) {
    sums->number = number;
    /* Apart by more than what a processor fetches at a time, or parts would wait for each other. */
    sums->copy = copies > 1 ? 2 * number + 64 : 0;
    sums->sums = calloc((size_t)(2 * number + sums->copy * (copies - 1)), sizeof(double));
    return sums->sums != NULL;
}

static void release(Job *job) {
    free(job->cells.sums);
    free(job->columns.sums);
    free(job->work.room);
}

/* Let slopes, levels and factors of a number of cells lie in a room. */
static void place(Job *job, float *room, int64_t first, int64_t number) {
    job->slope = room - first;
    job->level = room + number - first;
    job->factor = room + 2 * number - first;
}

/* Make the nest of a job, its parts, its sums of cells and of columns (0 for none), and room for its
   work; 0 where they cannot be had. */
static int prepare(Job *job, int rank, const int64_t *dims, int64_t cells, int64_t columns,
                   int threads) {
    Nest *nest = &job->nest;
    if (!plan(nest, rank, dims, job->big, threads, job->sum != 0)) return 0;
    int64_t turn = 1;
    for (int i = 1; i < nest->rank; i++) turn *= nest->size[i];
    int64_t elements = turn * nest->size[0];
    job->threads = threads_for(elements, threads);
    /* A thread that comes late finds parts that are left. */
    int64_t wanted = job->threads * (job->threads > 1 && elements > 64 * cells ? MORE : 1);
    job->parts = (int)(nest->size[0] < wanted ? nest->size[0] : wanted);
    job->way = way_of(job, elements);
    job->many = turn < CHUNK ? CHUNK / turn : 1;
    job->all = cells;
    if (!job->sum) return 1;
    int64_t chunk = job->many < nest->size[0] ? job->many : nest->size[0];
    int is_shared = !nest->stride[CELL][0], is_apart = are_apart(job);
    int64_t number = is_apart ? chunk * nest->stride[CELL][0] : cells;
    int is_done = allocate(&job->cells, number, is_apart || is_shared ? job->parts : 1)
        && (!columns || allocate(&job->columns, columns, job->parts));
    if (is_done && job->map) {
        int64_t all = WORKS * number * (is_apart ? job->parts : 1);
        job->work = (Work){malloc((size_t)all * sizeof(float)), number};
        is_done = job->work.room != NULL;
        if (is_done) place(job, job->work.room, 0, number);
    }
    if (!is_done) release(job);
    return is_done;
}

#endif
