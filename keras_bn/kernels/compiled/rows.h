/* Sets that are one line each, as those of layer normalization: all stages for a few lines, and then
   for the next, so that what lies between is at hand. */

#ifndef KERAS_BN_ROWS_H
#define KERAS_BN_ROWS_H

#include "cells.h"

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
    return are_lines_alone(job) && job->together == 1 && !job->kept
        && nest->stride[CELL][lines] == 1 && (!job->varies || varies_so);
}

/* Sum several lines, which have the sums for themselves, and map them. */
INLINED void go_through(Job *job, const int64_t *at, const int64_t *apart, int rows, int64_t length,
                        int64_t most, int part, Pass sum, int column) {
    double sums[2 * ROWS];
    int64_t from = at[CELL], to = from + rows;
    job->cells = (Sums){sums, from, ROWS, 0};
    for (int times = 0; times < 2; times++) {
        memset(sums, 0, sizeof sums);
        job->is_far = 0, job->is_first = !times;
        pieces_of(job, at, apart, rows, length, most, part, sum, ONE, column, ABSENT);
        job->finish(job, from, to, part);
        if (!job->is_far) break;
    }
    if (sum == PRODUCTS) add_to_columns(job, from, to, 0, job->columns.number, part);
    Pass map = sum == MOMENTS ? MAP : COMBINED;
    pieces_of(job, at, apart, rows, length, most, part, map, ONE, column, ABSENT);
}

INLINED void go_by_rows(Job *job, int64_t first, int64_t last, int part, Pass sum, int column) {
    const Nest *nest = &job->nest;
    int loop = nest->rank - 2;
    int64_t length = nest->size[loop + 1], at[OPERANDS], apart[OPERANDS];
    for (int o = 0; o < OPERANDS; o++) apart[o] = nest->stride[o][loop];
    int is_block = length <= SHORT || sum == MAPPED_PRODUCTS;
    /* What is widened goes in pieces that there is room for; else a line stays in one. */
    int is_wide = job->types[X] == FLOAT && (!job->big[DY] || job->types[DY] == FLOAT);
    for (Walk walk = walk_of(nest, first, last); walk.left > 0; next_turn(&walk)) {
        memcpy(at, walk.at, sizeof at);
        for (int64_t line = 0; line < walk.lines;) {
            int rows = is_block && walk.lines - line >= ROWS ? ROWS : 1;
            if (rows == ROWS && is_wide)
                go_through(job, at, apart, ROWS, length, LINE, part, sum, column);
            else if (rows == ROWS)
                go_through(job, at, apart, ROWS, length, SHORT, part, sum, column);
            else go_through(job, at, apart, 1, length, LINE, part, sum, column);
            for (int o = 0; o < OPERANDS; o++) at[o] += rows * apart[o];
            line += rows;
        }
    }
}

FOR_EACH_CPU static void normalize_rows(Job *job, int64_t from, int64_t to, int part) {
    if (job->varies) go_by_rows(job, from, to, part, MOMENTS, MANY);
    else go_by_rows(job, from, to, part, MOMENTS, ABSENT);
}

FOR_EACH_CPU static void differentiate_rows(Job *job, int64_t from, int64_t to, int part) {
    if (job->varies) go_by_rows(job, from, to, part, MAPPED_PRODUCTS, MANY);
    else go_by_rows(job, from, to, part, PRODUCTS, ABSENT);
}

#endif
