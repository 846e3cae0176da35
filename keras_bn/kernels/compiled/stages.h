/* The stages in turn: either all of them for what stays in the cache, and then for the next, or each
   for the whole tensor. */

#ifndef KERAS_BN_STAGES_H
#define KERAS_BN_STAGES_H

#include "prepare.h"

/* Add what the other parts have to the sums of some cells. */
static void join_parts(Job *job, const Sums *sums, int64_t from, int64_t to) {
    for (int part = 1; sums->copy && part < job->parts; part++)
        for (int half = 0; half < 2; half++) {
            double *own = sums->sums + half * sums->number, *others = own + part * sums->copy;
            for (int64_t i = from; i < to; i++) own[i] += others[i];
        }
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

/* Set the sums of some cells to 0. */
static void clear(Job *job, int64_t from, int64_t to) {
    Sums *sums = &job->cells;
    for (int part = 0; part < (sums->copy ? job->parts : 1); part++)
        for (int half = 0; half < 2; half++)
            memset(sums->sums + part * sums->copy + half * sums->number + from - sums->first, 0,
                   (size_t)(to - from) * sizeof(double));
}

/* Take the first element of each column as its pivot: one of those that are merged is near enough. */
static void find_merged_pivots(Job *job) {
    int64_t stride = job->nest.stride[CELL][0], columns = job->merged.columns;
    int64_t turns = are_apart(job) ? (columns + stride - 1) / stride : job->nest.size[0];
    generation()->find_pivots(job, 0, turns, 0);
    memcpy(job->merged.pivots, job->center, (size_t)columns * sizeof(float));
}

static void sum_and_finish(Job *job, int64_t from, int64_t to, int part) {
    int64_t stride = job->nest.stride[CELL][0], first = from * stride, last = to * stride;
    int is_alone = are_lines_alone(job);
    int64_t number = job->work.number;
    if (job->map) place(job, job->work.room + part * WORKS * number, first, number);
    if (job->sum == generation()->sum_moments && !is_alone)
        generation()->find_pivots(job, from, to, part);
    job->cells.first = first;
    for (int times = 0; times < 2; times++) {
        job->is_far = 0;
        job->is_first = is_alone && !times;
        clear(job, first, last);
        job->sum(job, from, to, part);
        job->finish(job, first, last, part);
        if (!job->is_far) return;
    }
}

static void all_of_part(void *shared, int part) {
    Job own = *(Job *)shared, *job = &own;
    int64_t size = job->nest.size[0], end = size * (part + 1) / job->parts;
    int64_t stride = job->nest.stride[CELL][0];
    job->cells.sums += part * job->cells.copy;
    job->cells.copy = 0;
    for (int64_t from = size * part / job->parts, to; from < end; from = to) {
        to = from + job->many < end ? from + job->many : end;
        sum_and_finish(job, from, to, part);
        if (job->merged.columns)
            generation()->add_to_merged(job, from * stride, to * stride, part);
        if (job->columns.sums && !job->varies)
            generation()->add_to_columns(job, from * stride, to * stride, 0, job->columns.number,
                                         part);
        if (job->map) job->map(job, from, to, part);
    }
    finish_copies();
}

static void sums_of_part(void *given, int part) {
    Job *job = given;
    int64_t size = job->nest.size[0];
    job->sum(job, size * part / job->parts, size * (part + 1) / job->parts, part);
}

static void finish_of_part(void *given, int part) {
    Job *job = given;
    int64_t sets = job->all / job->together;
    int64_t from = sets * part / job->parts * job->together;
    int64_t to = sets * (part + 1) / job->parts * job->together;
    join_parts(job, &job->cells, from, to);
    job->finish(job, from, to, part);
}

static void columns_of_part(void *given, int part) {
    Job *job = given;
    int64_t number = job->columns.number;
    int64_t from = number * part / job->parts, to = number * (part + 1) / job->parts;
    generation()->add_to_columns(job, 0, job->all, from, to, 0);
}

static void rows_of_part(void *shared, int part) {
    Job own = *(Job *)shared;
    int64_t size = own.nest.size[0];
    own.rows(&own, size * part / own.parts, size * (part + 1) / own.parts, part);
    finish_copies();
}

static void strips_of_part(void *shared, int part) {
    Job *job = shared;
    int64_t size = job->nest.size[0];
    job->strips(job, size * part / job->parts, size * (part + 1) / job->parts, part);
    finish_copies();
}

static void map_of_part(void *given, int part) {
    Job *job = given;
    int64_t size = job->nest.size[0];
    job->map(job, size * part / job->parts, size * (part + 1) / job->parts, part);
    finish_copies();
}

static void run(Job *job) {
    int parts = job->parts, threads = job->threads, few = job->all < SMALL ? 1 : threads;
    if (job->rows && are_rows(job)) {
        in_parts(rows_of_part, job, parts, threads);
        return;
    }
    if (job->merged.columns) find_merged_pivots(job);
    if (job->strips && are_strips(job)) {
        in_parts(strips_of_part, job, parts, threads);
        return;
    }
    if (job->sum && are_apart(job)) {
        in_parts(all_of_part, job, parts, threads);
        return;
    }
    if (job->sum == generation()->sum_moments)
        generation()->find_pivots(job, 0, job->nest.size[0], 0);
    for (int times = 0; job->sum && times < 2; times++) {
        if (times) clear(job, 0, job->all);
        in_parts(sums_of_part, job, parts, threads);
        in_parts(finish_of_part, job, parts, few);
        if (!job->is_far) break;
        job->is_far = 0;
    }
    if (job->columns.sums && !job->varies) in_parts(columns_of_part, job, parts, few);
    if (job->merged.columns) generation()->add_to_merged(job, 0, job->all, 0);
    if (job->map) in_parts(map_of_part, job, parts, threads);
}

static void write_columns(Job *job, float *out) {
    join_parts(job, &job->columns, 0, job->columns.number);
    for (int64_t i = 0; i < 2 * job->columns.number; i++) out[i] = (float)job->columns.sums[i];
}

#endif
