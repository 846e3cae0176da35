/* Sets that are one line each, as those of layer normalization: all stages for a few lines, and then
   for the next, so that what lies between is at hand. */

#ifndef KERAS_BN_ROWS_H
#define KERAS_BN_ROWS_H

#include "cells.h"

/* Normalize a line; `at` is where its operands are. */
INLINED void normalize_line(Job *job, const int64_t *at, const float *x, char *y, int64_t n,
                            double share, int is_centered, int column) {
    int64_t i = at[CELL];
    Found found = {pivot_of(x[0], is_centered), 0, 0, 1};
    for (int times = 0; times < 2 && found.is_far; times++) {
        float pivot = found.center;
        Ends ends = is_centered ? moments_line(x, n, ABSENT, 0, &pivot) : squares_line(x, n);
        found = found_of(sum_of(ends.first) + ends.c, sum_of(ends.second) + ends.d, share, pivot,
                         EXACT, is_centered);
    }
    const float *gamma = job->gamma + at[COLUMN], *beta = job->beta + at[COLUMN];
    int is_one = is_composed(job);
    Map map = map_of(found.m2, found.offset, share, job->epsilon, 0, 0, is_one ? gamma : 0,
                     is_one ? beta : 0);
    job->center[i] = found.center, job->offset[i] = found.offset, job->m2[i] = found.m2;
    job->scale[i] = map.scale, job->shift[i] = map.shift;
    map_line(job->way, y, (const char *)x, n, ONE, column, &found.center, &map.slope, &map.level,
             gamma, beta);
}

/* Sums, and what lies between two stages, of the cells of ROWS lines. */
typedef struct {
    double sums[2 * ROWS];
    float work[WORKS * ROWS];
} Between;

/* Let a job have those of the cells from one on, with sums of 0. */
INLINED void settle(Job *job, Between *between, int64_t from) {
    memset(between->sums, 0, sizeof between->sums);
    job->cells = (Sums){between->sums, from, ROWS, 0};
    place(job, between->work, from, ROWS);
}

_Static_assert(SHORT <= EXACT, "or a pivot may be far off");

/* Find the maps of ROWS lines of up to SHORT elements at once. No pivot is far off: an element lies
   within √n standard deviations of the mean. */
INLINED void find_maps(Job *job, const float *x, int64_t step, int64_t n, int64_t from,
                       int is_centered) {
    Ends ends[ROWS];
    for (int i = 0; i < ROWS; i++) {
        const float *line = x + i * step;
        float *pivot = job->center + from + i;
        *pivot = pivot_of(line[0], is_centered);
        ends[i] = is_centered ? moments_line(line, n, ABSENT, 0, pivot) : squares_line(line, n);
    }
    add_ends(ends, ROWS, 1, job->cells.sums, job->cells.sums + ROWS);
    job->finish(job, from, from + ROWS, 0);
}

/* Normalize lines. Of several what becomes of the sums is found together, and the results are
   narrowed together, or each line would wait for its own. */
INLINED void normalize_lines(Job *job, const Piece *lines, double share, int is_centered,
                             int column) {
    float room[LINE];
    Rooms rooms;
    Between between;
    char *targets[ROWS], *y[ROWS];
    int rows = lines->rows;
    int is_narrowed = !job->way.is_direct && job->types[Y] != FLOAT;
    int64_t n = lines->n, step, at[OPERANDS];
    memcpy(at, lines->at, sizeof at);
    const float *x = lines_of(job, X, lines, room, &step);
    if (rows == ROWS) {
        settle(job, &between, at[CELL]);
        find_maps(job, x, step, n, at[CELL], is_centered);
    }
    for (int i = 0; i < rows; i++, x += step) {
        int64_t cell = at[CELL];
        y[i] = targets[i] = job->big[Y] + at[Y] * WIDTH[job->types[Y]];
        if (!job->way.is_direct)
            y[i] = (char *)(line_for(job, targets[i], &rooms) + (is_narrowed ? i * SHORT : 0));
        if (rows == ROWS)
            map_line(job->way, y[i], (const char *)x, n, ONE, column, job->center + cell,
                     job->slope + cell, job->level + cell, job->gamma + at[COLUMN],
                     job->beta + at[COLUMN]);
        else normalize_line(job, at, x, y[i], n, share, is_centered, column);
        if (!job->way.is_direct && !is_narrowed)
            put(job, targets[i], n, (const float *)y[i], &rooms);
        for (int o = 0; o < OPERANDS; o++) at[o] += lines->apart[o];
    }
    for (int i = 0; i < rows && is_narrowed; i++)
        put(job, targets[i], n, (const float *)y[i], &rooms);
}

INLINED void normalize_by_rows(Job *job, int64_t first, int64_t last, int is_centered, int column) {
    int64_t n = job->nest.size[job->nest.rank - 1];
    double share = 1 / job->count;
    /* Wide results of longer lines go line by line: so a processor reads the next while it writes
       this one. */
    int is_block = n <= (job->types[Y] == FLOAT ? FEW * IN_LINE : SHORT);
    for (Block block = before(walk_of(&job->nest, first, last)); next_block(&block, is_block);) {
        Piece several = piece_of(&block, ROWS, n), one = piece_of(&block, 1, n);
        if (block.rows == ROWS) normalize_lines(job, &several, share, is_centered, column);
        else normalize_lines(job, &one, share, is_centered, column);
    }
}

/* Fetch the line of a block ahead that takes the place of one, while there is time: all that is read
   now lies in the cache. What is widened was fetched when it was. */
INLINED void fetch_line(const Job *job, const Piece *lines, const int64_t *at) {
    for (int o = X; o <= DY && job->way.is_past_caches; o++) {
        int64_t ahead = distance_of(job, lines, o);
        if (ahead && job->types[o] == FLOAT)
            fetch((const float *)job->big[o] + at[o] + ahead, lines->n * WIDTH[FLOAT]);
    }
}

/* Sum several lines, which have the sums for themselves, and map them. */
INLINED void differentiate_lines(Job *job, const Piece *lines, int64_t most, int part, Pass sum,
                                 int column) {
    int rows = lines->rows;
    int64_t at[OPERANDS], from = lines->at[CELL], to = from + rows;
    memcpy(at, lines->at, sizeof at);
    Between between;
    settle(job, &between, from);
    pieces_of(job, lines, most, part, sum, ONE, column, ABSENT);
    job->finish(job, from, to, part);
    if (sum == PRODUCTS) add_to_columns(job, from, to, 0, job->columns.number, part);
    Piece line = {at, lines->apart, NULL, 1, lines->n, 0, lines->n};
    for (int i = 0; i < rows; i++) {
        if (rows == ROWS) fetch_line(job, lines, at);
        go(job, &line, part, COMBINED, ONE, column, ABSENT);
        for (int o = 0; o < OPERANDS; o++) at[o] += lines->apart[o];
    }
}

/* The same of several short lines, widened once for sums and maps; `wide` is the job on what that
   makes. */
INLINED void differentiate_widened(const Job *job, Job *wide, const Piece *lines, int part,
                                   Pass sum, int column) {
    float x_room[LINE], dy_room[LINE];
    int64_t at[OPERANDS], apart[OPERANDS];
    memcpy(at, lines->at, sizeof at);
    memcpy(apart, lines->apart, sizeof apart);
    wide->big[X] = (char *)lines_of(job, X, lines, x_room, &apart[X]);
    wide->big[DY] = (char *)lines_of(job, DY, lines, dy_room, &apart[DY]);
    at[X] = at[DY] = 0;
    differentiate_lines(wide, &(Piece){at, apart, NULL, ROWS, lines->n, 0, lines->n}, SHORT, part,
                        sum, column);
}

INLINED void differentiate_by_rows(Job *job, int64_t first, int64_t last, int part, Pass sum,
                                   int column) {
    int64_t n = job->nest.size[job->nest.rank - 1];
    int is_block = n <= SHORT || sum == MAPPED_PRODUCTS;
    /* What is widened goes in pieces that there is room for; else a line stays in one. */
    int is_wide = job->types[X] == FLOAT && job->types[DY] == FLOAT;
    Job wide = *job;
    wide.types[X] = wide.types[DY] = FLOAT;
    for (Block block = before(walk_of(&job->nest, first, last)); next_block(&block, is_block);) {
        Piece several = piece_of(&block, ROWS, n), one = piece_of(&block, 1, n);
        if (block.rows != ROWS) differentiate_lines(job, &one, LINE, part, sum, column);
        else if (is_wide) differentiate_lines(job, &several, LINE, part, sum, column);
        else if (n > SHORT) differentiate_lines(job, &several, SHORT, part, sum, column);
        else differentiate_widened(job, &wide, &several, part, sum, column);
    }
}

static void normalize_rows(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    if (!job->is_centered && job->varies) normalize_by_rows(job, from, to, 0, MANY);
    else if (!job->is_centered) normalize_by_rows(job, from, to, 0, ABSENT);
    else if (job->varies) normalize_by_rows(job, from, to, 1, MANY);
    else normalize_by_rows(job, from, to, 1, ABSENT);
}

static void differentiate_rows(Job *job, int64_t from, int64_t to, int part) {
    if (job->varies) differentiate_by_rows(job, from, to, part, MAPPED_PRODUCTS, MANY);
    else differentiate_by_rows(job, from, to, part, PRODUCTS, ABSENT);
}

#endif
