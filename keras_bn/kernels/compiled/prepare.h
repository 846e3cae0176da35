/* What a job needs before it runs: a processor's passes, parts, memory, and the way of its map. */

#ifndef KERAS_BN_PREPARE_H
#define KERAS_BN_PREPARE_H

#include <stdlib.h>

#include "generation.h"
#include "several.h"
#include "team.h"

enum { ANY, AVX2, AVX512 };
static int newest = AVX512;

/* Return the passes for this processor. */
static const Generation *generation(void) {
#ifdef SEVERAL_GENERATIONS
    if (newest >= AVX512 && __builtin_cpu_supports("x86-64-v4")) return &keras_bn_avx512;
    if (newest >= AVX2 && __builtin_cpu_supports("x86-64-v3")) return &keras_bn_avx2;
#endif
    return &keras_bn_any;
}

/* How many parts there are for each of several threads. */
enum { MORE = 4 };

/* Elements that stay in a core's cache beside as many others; bytes that stay in none until they
   are read again; elements that are not worth a thread of a runtime, or waking a helper. */
enum { CHUNK = 1 << 15, LARGE = 1 << 23, SMALL = 1 << 15, MODERATE = 1 << 17 };

/* Return the way of the map. Of bfloat16 it is direct only where cells lie along the lines: with one
   cell for a line there is little else to load, and loops that widen and narrow it are faster. */
static Way way_of(const Job *job, int64_t elements) {
    const Nest *nest = &job->nest;
    int last = nest->rank - 1, type = job->types[X];
    int is_past_caches = job->is_training && elements * WIDTH[job->types[Y]] >= LARGE;
    int are_alike = job->types[Y] == type && (!job->big[DY] || job->types[DY] == type);
    int is_able = type == FLOAT
        || (type == BFLOAT && generation()->takes_bfloat
            && along_line(job, CELL, job->center) == MANY);
    uintptr_t aligned = (uintptr_t)job->big[Y];
    for (int i = 0; i < last; i++) aligned |= (uintptr_t)(nest->stride[Y][i] * WIDTH[type]);
    int is_even = nest->size[last] % IN_LINE == 0 && aligned % 16 == 0;
    return (Way){are_alike && is_able && is_even, type, is_past_caches};
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
    free(job->merged.pivots);
    free(job->merged.sums);
}

static int allocate_merged(Merged *merged, int parts) {
    size_t number = (size_t)merged->columns;
    merged->pivots = malloc(number * sizeof(float));
    merged->sums = calloc(3 * number * (size_t)parts, sizeof(double));
    return merged->pivots && merged->sums;
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
        && (!columns || allocate(&job->columns, columns, job->parts))
        && (!job->merged.columns || allocate_merged(&job->merged, job->parts));
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
