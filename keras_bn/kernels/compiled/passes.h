/* Passes over a tensor: one kind of sum or map, along all of its lines. */

#ifndef KERAS_BN_PASSES_H
#define KERAS_BN_PASSES_H

#include "job.h"

/* Compiled for several generations of processors, of which the library's loader chooses. */
#ifndef FOR_EACH_CPU
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#endif

/* Return lines in float32, from memory or from a room for them, and the step from one to the
   next. */
INLINED const float *lines_of(const Job *job, int operand, int64_t at, int rows, int64_t n,
                              float *room, int64_t *step) {
    int type = job->types[operand];
    const char *data = job->big[operand] + at * WIDTH[type];
    int64_t apart = job->nest.stride[operand][job->nest.rank - 2];
    *step = type == FLOAT ? apart : SHORT;
    if (type == FLOAT) return (const float *)data;
    for (int i = 0; i < rows; i++)
        widened(data + i * apart * WIDTH[type], type, n, room + i * SHORT);
    return room;
}

/* Go along a piece of one line, or of as many as there are rows. */
INLINED void go(Job *job, const int64_t *at, int rows, int64_t n, int part, Pass pass, int cell,
                int column, int weight) {
    float x_room[LINE], dy_room[LINE], y_room[LINE];
    int has_dy = pass != MOMENTS && pass != MAP, has_y = pass >= MAP;
    int64_t step = 0, dy_step = 0, number = job->columns.number;
    const float *x = lines_of(job, X, at[X], rows, n, x_room, &step);
    const float *dy = has_dy ? lines_of(job, DY, at[DY], rows, n, dy_room, &dy_step) : 0;
    const float *w = weight ? job->weights + at[WEIGHT] : 0;
    const float *gamma = column ? job->gamma + at[COLUMN] : 0;
    const float *beta = column && pass == MAP ? job->beta + at[COLUMN] : 0;
    const float *center = job->center + at[CELL];
    double *first = has_y ? 0
        : job->cells.sums + part * job->cells.copy + at[CELL] - job->cells.first;
    double *second = has_y ? 0 : first + job->cells.number;
    if (pass == MOMENTS && cell == ONE) moments_line(x, n, weight, w, center, first, second);
    if (pass == MOMENTS && cell == MANY)
        moments_block(x, step, rows, n, weight, w, center, first, second);
    if (pass == PRODUCTS && cell == ONE) products_line(x, dy, n, center, first, second);
    if (pass == PRODUCTS && cell == MANY)
        products_block(x, step, dy, dy_step, rows, n, center, first, second);
    if (pass == MAPPED_PRODUCTS) {
        int64_t apart = job->nest.stride[CELL][job->nest.rank - 2];
        const float *scale = job->scale + at[CELL], *shift = job->shift + at[CELL];
        double *sums = job->columns.sums + part * job->columns.copy + at[COLUMN];
        const float one = 1;
        for (int i = 0; i < rows; i++) {
            const float *own = x + i * step, *slopes = dy + i * dy_step;
            int64_t k = i * apart;
            if (cell == ONE)
                mapped_products_line(own, slopes, n, ONE, column, center + k, scale + k, shift + k,
                                     gamma, first + k, second + k);
            else
                mapped_products(own, slopes, n, column, center + k, scale + k, shift + k, gamma,
                                first + k, second + k);
            if (column == ONE)
                mapped_products_line(own, slopes, n, cell, ONE, center + k, scale + k, shift + k,
                                     &one, sums, sums + number);
        }
        if (column == MANY)
            column_products_block(x, step, dy, dy_step, rows, n, cell, apart, center, scale, shift,
                                  sums, sums + number);
    }
    if (!has_y) return;
    char *target = job->big[Y] + at[Y] * WIDTH[job->types[Y]], *out = target;
    char out_room[LINE * sizeof(float)];
    if (job->is_past_caches) out = out_room;
    float *y = job->types[Y] == FLOAT ? (float *)out : y_room;
    const float *slope = job->slope + at[CELL], *level = job->level + at[CELL];
    if (pass == MAP) map_line(y, x, n, cell, column, center, slope, level, gamma, beta);
    if (pass == COMBINED)
        combined_line(y, x, dy, n, cell, column, weight, w, center, job->factor + at[CELL], slope,
                      level, gamma);
    narrow(out, job->types[Y], n, y);
    if (job->is_past_caches) copy_past_caches(target, out, n * WIDTH[job->types[Y]]);
}

/* Go through the lines of some turns. It is compiled once for each pass and each way that the small
   operands lie along a line. */
INLINED void pass_of(Job *job, int64_t from, int64_t to, int part, Pass pass, int cell, int column,
                     int weight) {
    const Nest *nest = &job->nest;
    int loop = nest->rank - 2;
    int64_t length = nest->size[loop + 1], at[OPERANDS];
    /* Rows that have their sums in common. */
    int is_block_of_cells = pass <= PRODUCTS && cell == MANY && !nest->stride[CELL][loop];
    int is_blocked = pass == MAPPED_PRODUCTS ? !nest->stride[COLUMN][loop]
        : is_block_of_cells && !weight;
    int is_along[] = {1, 1, 1, weight == MANY, cell == MANY, column == MANY};
    for (Walk walk = walk_of(nest, from, to); walk.left > 0; next_turn(&walk)) {
        memcpy(at, walk.at, sizeof at);
        for (int64_t line = 0; line < walk.lines;) {
            int rows = is_blocked && walk.lines - line >= ROWS ? ROWS : 1;
            int64_t most = rows == ROWS ? SHORT : LINE;
            for (int64_t start = 0; start < length; start += most) {
                int64_t n = length - start < most ? length - start : most;
                if (rows == ROWS) go(job, at, ROWS, n, part, pass, cell, column, weight);
                else go(job, at, 1, n, part, pass, cell, column, weight);
                for (int o = 0; o < OPERANDS; o++) at[o] += is_along[o] * n;
            }
            for (int o = 0; o < OPERANDS; o++)
                at[o] += rows * nest->stride[o][loop] - is_along[o] * length;
            line += rows;
        }
    }
}

static int along_line(const Job *job, int operand, const void *data) {
    if (!data) return ABSENT;
    return job->nest.stride[operand][job->nest.rank - 1] ? MANY : ONE;
}

#define WITH(pass, cell, column, weight) pass_of(job, from, to, part, pass, cell, column, weight)
#define BY_COLUMN(pass, cell)                                                             \
    if (column == ABSENT) WITH(pass, cell, ABSENT, ABSENT);                               \
    else if (column == ONE) WITH(pass, cell, ONE, ABSENT);                                \
    else WITH(pass, cell, MANY, ABSENT)
#define BY_WEIGHT(pass, cell)                                                             \
    if (weight == ABSENT) WITH(pass, cell, ABSENT, ABSENT);                               \
    else if (weight == ONE) WITH(pass, cell, ABSENT, ONE);                                \
    else WITH(pass, cell, ABSENT, MANY)

FOR_EACH_CPU static void sum_moments(Job *job, int64_t from, int64_t to, int part) {
    int weight = along_line(job, WEIGHT, job->weights);
    if (along_line(job, CELL, job->center) == ONE) { BY_WEIGHT(MOMENTS, ONE); }
    else { BY_WEIGHT(MOMENTS, MANY); }
}

FOR_EACH_CPU static void sum_products(Job *job, int64_t from, int64_t to, int part) {
    if (along_line(job, CELL, job->center) == ONE) WITH(PRODUCTS, ONE, ABSENT, ABSENT);
    else WITH(PRODUCTS, MANY, ABSENT, ABSENT);
}

FOR_EACH_CPU static void sum_mapped_products(Job *job, int64_t from, int64_t to, int part) {
    int is_one = along_line(job, COLUMN, job->gamma) == ONE;
    if (along_line(job, CELL, job->center) == ONE) {
        if (is_one) WITH(MAPPED_PRODUCTS, ONE, ONE, ABSENT);
        else WITH(MAPPED_PRODUCTS, ONE, MANY, ABSENT);
    } else {
        if (is_one) WITH(MAPPED_PRODUCTS, MANY, ONE, ABSENT);
        else WITH(MAPPED_PRODUCTS, MANY, MANY, ABSENT);
    }
}

FOR_EACH_CPU static void map(Job *job, int64_t from, int64_t to, int part) {
    int column = job->varies ? along_line(job, COLUMN, job->gamma) : ABSENT;
    if (along_line(job, CELL, job->center) == ONE) { BY_COLUMN(MAP, ONE); }
    else { BY_COLUMN(MAP, MANY); }
}

FOR_EACH_CPU static void combine(Job *job, int64_t from, int64_t to, int part) {
    int is_one = along_line(job, CELL, job->center) == ONE;
    int column = job->varies ? along_line(job, COLUMN, job->gamma) : ABSENT;
    int weight = along_line(job, WEIGHT, job->weights);
    if (weight && is_one) { BY_WEIGHT(COMBINED, ONE); }
    else if (weight) { BY_WEIGHT(COMBINED, MANY); }
    else if (is_one) { BY_COLUMN(COMBINED, ONE); }
    else { BY_COLUMN(COMBINED, MANY); }
}

#endif
