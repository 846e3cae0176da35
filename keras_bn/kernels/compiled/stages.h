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

static void whole_of_part(void *shared, int part) {
    Job own = *(Job *)shared;
    int64_t size = own.nest.size[0];
    own.whole(&own, size * part / own.parts, size * (part + 1) / own.parts, part);
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
    if (job->merged.columns) find_merged_pivots(job);
    if (job->whole) {
        in_parts(whole_of_part, job, parts, threads);
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
