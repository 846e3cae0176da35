/* Sets that are ROWS rows of each of many columns, as ghosts of a table may be: all stages for a
   strip of as many columns as a register holds, and then for the next. What there is of cells,
   nearly as much as their elements, stays in registers. */

#ifndef KERAS_BN_STRIPS_H
#define KERAS_BN_STRIPS_H

#include "cells.h"

/* Where a strip begins, how far its rows are apart [bytes], and the first of its cells. */
typedef struct {
    char *big[Y + 1];
    int64_t apart[Y + 1], cell;
} Strip;

INLINED Floats row_of(const Strip *strip, int operand, int type, int row) {
    return taken(strip->big[operand] + row * strip->apart[operand], type);
}

INLINED void give_row(const Job *job, const Strip *strip, int type, int row, Floats values) {
    give(strip->big[Y] + row * strip->apart[Y], type, values, job->way.is_past_caches);
}

/* The two sums of each column of a strip. */
typedef struct {
    Doubles first[2], second[2];
} Pair;

INLINED Half half_of_row(Floats row, int half) { return half ? HIGH(row) : LOW(row); }

INLINED Floats joined_halves(const Half *halves) { return JOINED(halves[0], halves[1]); }

/* Add the moments of cells to those of their columns. */
INLINED void add_half_to_merged(const Job *job, int64_t cell, int part, Half center, Half offset,
                                Half m2) {
    int64_t columns = job->merged.columns, column = cell % columns;
    double *sums = job->merged.sums + 3 * columns * part + column;
    Doubles distance = deviation_of_several(center, offset, half_at(job->merged.pivots + column));
    add_to(sums, distance), add_to(sums + columns, distance * distance);
    add_to(sums + 2 * columns, doubles_of(m2));
}

/* Find moments and maps of half of a strip, and keep what is a result. */
INLINED Map_several finish_half(const Job *job, int64_t cell, int part, Found_several found) {
    Half gamma = {0}, beta = {0};
    if (job->gamma) {
        gamma = half_at(job->gamma + cell % job->columns.number);
        beta = half_at(job->beta + cell % job->columns.number);
    }
    Map_several map = map_of_several(found.m2, found.offset, 1 / job->count, job->epsilon, 0, 0,
                                     job->gamma ? &gamma : 0, &beta);
    keep_half(job->center + cell, found.center);
    keep_half(job->scale + cell, map.scale), keep_half(job->shift + cell, map.shift);
    if (job->merged.columns) {
        add_half_to_merged(job, cell, part, found.center, found.offset, found.m2);
    } else {
        keep_half(job->offset + cell, found.offset), keep_half(job->m2 + cell, found.m2);
    }
    return map;
}

INLINED void normalize_strip(const Job *job, const Strip *strip, int type, int part) {
    Floats pivots = row_of(strip, X, type, 0); /* where one is no number, neither is the mean */
    Pair sums = {0};
    for (int i = 0; i < ROWS; i++) {
        Floats row = row_of(strip, X, type, i);
        for (int half = 0; half < 2; half++) {
            Doubles deviation = doubles_of(half_of_row(row, half));
            deviation -= doubles_of(half_of_row(pivots, half));
            sums.first[half] += deviation, sums.second[half] += deviation * deviation;
        }
    }
    Half centers[2], slopes[2], levels[2];
    for (int half = 0; half < 2; half++) {
        Found_several found = found_of_several(sums.first[half], sums.second[half], 1 / job->count,
                                               half_of_row(pivots, half), EXACT, 1);
        Map_several map = finish_half(job, strip->cell + half * HALF_LANES, part, found);
        centers[half] = found.center, slopes[half] = map.slope, levels[half] = map.level;
    }
    Floats center = joined_halves(centers), slope = joined_halves(slopes);
    Floats level = joined_halves(levels);
    for (int i = 0; i < ROWS; i++)
        give_row(job, strip, type, i, (row_of(strip, X, type, i) - center) * slope + level);
}

/* Find what x and dy are combined by in half of a strip, and add its sums to those of columns. */
INLINED Combination_several weigh_half(const Job *job, int64_t cell, int part, Doubles first,
                                       Doubles second) {
    int64_t column = cell % job->columns.number;
    double *firsts = job->columns.sums + part * job->columns.copy + column;
    Half scale = half_at(job->scale + cell), shift = half_at(job->shift + cell), factor = scale;
    second = mapped_several(first, second, scale, shift);
    add_to(firsts, first), add_to(firsts + job->columns.number, second);
    if (job->gamma) {
        Half gamma = half_at(job->gamma + column);
        factor *= gamma, first *= doubles_of(gamma), second *= doubles_of(gamma);
    }
    return combination_of_several(factor, first, second, scale, shift, 1 / job->count,
                                  1 / job->count);
}

INLINED void differentiate_strip(const Job *job, const Strip *strip, int type, int part) {
    Floats center = loaded(job->center + strip->cell);
    Pair sums = {0};
    for (int few = 0; few < ROWS; few += FEW) {
        Floats a = {0}, b = {0};
        for (int i = few; i < few + FEW; i++) {
            Floats dy = row_of(strip, DY, type, i);
            a += dy, b += dy * (row_of(strip, X, type, i) - center);
        }
        for (int half = 0; half < 2; half++) {
            sums.first[half] += doubles_of(half_of_row(a, half));
            sums.second[half] += doubles_of(half_of_row(b, half));
        }
    }
    Half factors[2], slopes[2], levels[2];
    for (int half = 0; half < 2; half++) {
        Combination_several own = weigh_half(job, strip->cell + half * HALF_LANES, part,
                                             sums.first[half], sums.second[half]);
        factors[half] = own.factor, slopes[half] = own.slope, levels[half] = own.level;
    }
    Floats factor = joined_halves(factors), slope = joined_halves(slopes);
    Floats level = joined_halves(levels);
    for (int i = 0; i < ROWS; i++) {
        Floats line = (row_of(strip, X, type, i) - center) * slope + level;
        give_row(job, strip, type, i, row_of(strip, DY, type, i) * factor + line);
    }
}

INLINED void strips_of(const Job *job, int64_t from, int64_t to, int part, int is_gradient,
                       int type) {
    const Nest *nest = &job->nest;
    int rows = nest->rank - 2;
    Strip strip;
    for (int o = X; o <= Y; o++) strip.apart[o] = nest->stride[o][rows] * WIDTH[type];
    for (Walk walk = walk_of(nest, from, to); walk.left; next_turn(&walk))
        for (int64_t j = 0; j < nest->size[rows + 1]; j += LANES) {
            for (int o = X; o <= Y; o++)
                if (job->big[o]) strip.big[o] = job->big[o] + (walk.at[o] + j) * WIDTH[type];
            strip.cell = walk.at[CELL] + j;
            if (is_gradient) differentiate_strip(job, &strip, type, part);
            else normalize_strip(job, &strip, type, part);
        }
}

static void normalize_strips(Job *job, int64_t from, int64_t to, int part) {
    if (job->way.type == FLOAT) strips_of(job, from, to, part, 0, FLOAT);
    else strips_of(job, from, to, part, 0, BFLOAT);
}

static void differentiate_strips(Job *job, int64_t from, int64_t to, int part) {
    if (job->way.type == FLOAT) strips_of(job, from, to, part, 1, FLOAT);
    else strips_of(job, from, to, part, 1, BFLOAT);
}

#endif
