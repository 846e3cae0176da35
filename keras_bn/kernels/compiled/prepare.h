/* What a job needs before it runs: a processor's passes, parts, memory, the way of its map, and
   whether all stages go at once. */

#ifndef KERAS_BN_PREPARE_H
#define KERAS_BN_PREPARE_H

#include <stdlib.h>

#include "generation.h"
#include "several.h"
#include "team.h"

enum { ANY, AVX2, AVX512, AVX512_BF16 };
static int newest = AVX512_BF16;

/* Return the passes for this processor. */
static const Generation *generation(void) {
#ifdef SEVERAL_GENERATIONS
    if (newest >= AVX512 && __builtin_cpu_supports("x86-64-v4")) {
        int rounds = newest >= AVX512_BF16 && __builtin_cpu_supports("avx512bf16");
        return rounds ? &keras_bn_avx512_bf16 : &keras_bn_avx512;
    }
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

/* Say whether each line, in one piece, is all of its cell: then its pivot is found on the way. */
static int are_lines_alone(const Job *job) {
    int64_t lines = 1, length = job->nest.size[job->nest.rank - 1];
    for (int i = 0; i < job->nest.rank - 1; i++) lines *= job->nest.size[i];
    return lines == job->all && length <= LINE && !job->weights
        && !job->nest.stride[CELL][job->nest.rank - 1];
}

/* Say whether sets are lines, with cells side by side from line to line. What is learned is of sets,
   or it varies along the lines, and those of a block share it where there are gradients. */
static int are_rows(const Job *job) {
    const Nest *nest = &job->nest;
    int lines = nest->rank - 2, is_shared = !nest->stride[COLUMN][lines];
    int is_along = along_line(job, COLUMN, job->gamma) == MANY;
    int varies_so = is_along && (is_shared || !job->columns.sums);
    return are_lines_alone(job) && job->together == 1 && !job->kept_mean && !job->merged.columns
        && nest->stride[CELL][lines] == 1 && (!job->varies || varies_so);
}

/* Say whether sets are ROWS rows of each of many columns, and may be gone through in strips. No
   pivot is far off: an element lies within √ROWS standard deviations of the mean. */
static int are_strips(const Job *job) {
    const Nest *nest = &job->nest;
    int columns = nest->rank - 1, rows = columns - 1;
    int64_t cells = nest->size[columns];
    for (int i = 0; i < rows; i++) cells *= nest->size[i];
    int is_even = job->merged.columns % IN_LINE == 0
        && (job->columns.number % IN_LINE == 0 || !(job->columns.sums || is_composed(job)));
    return rows > 0 && nest->size[rows] == ROWS && cells == job->all && !nest->stride[CELL][rows]
        && nest->stride[CELL][columns] && are_apart(job) && is_even && !job->varies && !job->weights
        && job->is_centered && job->together == 1 && !job->r && job->way.is_direct;
}

/* Return what goes through all stages at once, for sets of this form; NULL where nothing does. */
static Stage whole_of(const Job *job) {
    if (job->rows && are_rows(job)) return job->rows;
    return job->strips && are_strips(job) ? job->strips : NULL;
}

/* Make the sums of cells, and room for what there is of them between stages; 0 where they cannot be
   had. */
static int allocate_cells(Job *job) {
    const Nest *nest = &job->nest;
    int is_shared = !nest->stride[CELL][0], is_apart = are_apart(job);
    int64_t chunk = job->many < nest->size[0] ? job->many : nest->size[0];
    int64_t number = is_apart ? chunk * nest->stride[CELL][0] : job->all;
    if (!allocate(&job->cells, number, is_apart || is_shared ? job->parts : 1)) return 0;
    if (!job->map) return 1;
    int64_t all = WORKS * number * (is_apart ? job->parts : 1);
    job->work = (Work){malloc((size_t)all * sizeof(float)), number};
    if (job->work.room) place(job, job->work.room, 0, number);
    return job->work.room != NULL;
}

/* Make the nest of a job, its parts, its sums of columns (0 for none), and what else it needs; 0
   where that cannot be had. */
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
    int is_done = (!columns || allocate(&job->columns, columns, job->parts))
        && (!job->merged.columns || allocate_merged(&job->merged, job->parts));
    job->whole = whole_of(job);
    if (is_done && !job->whole) is_done = allocate_cells(job);
    if (!is_done) release(job);
    return is_done;
}

#endif
