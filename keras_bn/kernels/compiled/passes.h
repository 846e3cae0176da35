/* Passes over a tensor: one kind of sum or map, along all of its lines. */

#ifndef KERAS_BN_PASSES_H
#define KERAS_BN_PASSES_H

#include <math.h>

#include "job.h"

/* A piece of one line, or of as many as there are rows; from row to row an operand is `apart`, and
   what comes after these lines is so far `ahead`, if that is known. Of the `all` elements of a line
   it has n, after the `start`. */
typedef struct {
    const int64_t *at, *apart, *ahead;
    int rows;
    int64_t n, start, all;
} Piece;

/* Return how far ahead of a piece to fetch [elements]: so many blocks that there is time. */
INLINED int64_t distance_of(const Job *job, const Piece *piece, int operand) {
    int64_t bytes = piece->rows * piece->all * WIDTH[job->types[operand]];
    return piece->ahead ? piece->ahead[operand] * ((AHEAD + bytes - 1) / bytes) : 0;
}

/* Return lines in float32, from memory or from a room for them, and the step from one to the next.
   Where they are widened, what comes next is fetched. */
INLINED const float *lines_of(const Job *job, int operand, const Piece *piece, float *room,
                              int64_t *step) {
    int type = job->types[operand];
    int64_t width = WIDTH[type], apart = piece->apart[operand] * width, n = piece->n;
    const char *data = job->big[operand] + piece->at[operand] * width;
    *step = type == FLOAT ? piece->apart[operand] : SHORT;
    if (type == FLOAT) return (const float *)data;
    int64_t ahead = distance_of(job, piece, operand) * width;
    for (int i = 0; i < piece->rows; i++, data += apart) {
        if (ahead) fetch(data + ahead, n * width);
        widened(data, type, n, room + i * SHORT);
    }
    return room;
}

/* Return what to fetch ahead of lines in memory. */
INLINED Next next_of(const Job *job, const Piece *piece, int operand) {
    int is_memory = piece->ahead && job->types[operand] == FLOAT;
    return (Next){distance_of(job, piece, operand), piece->start, is_memory ? piece->all : 0};
}

INLINED void sum_piece(Job *job, const Piece *piece, int part, Pass pass, int cell, int column,
                       int weight) {
    float x_room[LINE], dy_room[LINE];
    int rows = piece->rows;
    int64_t n = piece->n, step = 0, dy_step = 0, at = piece->at[CELL], apart = piece->apart[CELL];
    const float *x = lines_of(job, X, piece, x_room, &step);
    const float *dy = pass == MOMENTS ? 0 : lines_of(job, DY, piece, dy_room, &dy_step);
    const float *w = weight ? job->weights + piece->at[WEIGHT] : 0, *center = job->center + at;
    double *first = job->cells.sums + part * job->cells.copy + at - job->cells.first;
    double *second = first + job->cells.number;
    Next next_x = next_of(job, piece, X), next_dy = next_of(job, piece, DY);
    if (pass == MOMENTS && cell == MANY)
        moments_block(x, step, rows, n, weight, w, center, first, second, next_x);
    if (pass == PRODUCTS && cell == MANY)
        products_block(x, step, dy, dy_step, rows, n, center, first, second, next_x, next_dy);
    Ends ends[ROWS];
    for (int i = 0; pass == MOMENTS && cell == ONE && job->is_first && i < rows; i++)
        job->center[at + i * apart] = pivot_of(x[i * step], job->is_centered);
    int is_about_0 = pass == MOMENTS && !weight && !job->is_centered;
    for (int i = 0; cell == ONE && is_about_0 && i < rows; i++)
        ends[i] = squares_line(x + i * step, n);
    for (int i = 0; pass <= PRODUCTS && cell == ONE && !is_about_0 && i < rows; i++)
        ends[i] = pass == MOMENTS
            ? moments_line(x + i * step, n, weight, w + i * piece->apart[WEIGHT],
                           center + i * apart)
            : products_line(x + i * step, dy + i * dy_step, n, center + i * apart);
    if (pass <= PRODUCTS && cell == ONE) add_ends(ends, rows, apart, first, second);
    if (pass != MAPPED_PRODUCTS) return;
    const float *scale = job->scale + at, *shift = job->shift + at, one = 1;
    const float *gamma = job->gamma + piece->at[COLUMN];
    int is_memory = x != x_room && dy != dy_room; /* and not what was widened */
    if (is_memory && step > n) fetch_along(x, step, rows, n), fetch_along(dy, dy_step, rows, n);
    double *sums = job->columns.sums + part * job->columns.copy + piece->at[COLUMN];
    for (int i = 0; i < rows && cell == MANY; i++)
        mapped_products(x + i * step, dy + i * dy_step, n, column, center + i * apart,
                        scale + i * apart, shift + i * apart, gamma, first + i * apart,
                        second + i * apart);
    for (int i = 0; i < rows && cell == ONE; i++)
        ends[i] = mapped_products_line(x + i * step, dy + i * dy_step, n, ONE, column,
                                       center + i * apart, scale + i * apart, shift + i * apart,
                                       gamma);
    if (cell == ONE) add_ends(ends, rows, apart, first, second);
    for (int i = 0; i < rows && column == ONE; i++)
        ends[i] = mapped_products_line(x + i * step, dy + i * dy_step, n, cell, ONE,
                                       center + i * apart, scale + i * apart, shift + i * apart,
                                       &one);
    if (column == ONE) add_ends(ends, rows, 0, sums, sums + job->columns.number);
    if (column == MANY)
        column_products_block(x, step, dy, dy_step, rows, n, cell, apart, center, scale, shift,
                              sums, sums + job->columns.number);
}

/* Rooms for a line of results on its way to memory. */
typedef struct {
    float wide[LINE];
    char out[LINE * sizeof(float)];
} Rooms;

/* Return where to make a line of results in float32. */
INLINED float *line_for(const Job *job, char *target, Rooms *rooms) {
    if (job->types[Y] != FLOAT) return rooms->wide;
    return (float *)(job->way.is_past_caches ? rooms->out : target);
}

/* Bring a line of results, which was made there, to memory. */
INLINED void put(const Job *job, char *target, int64_t n, const float *y, Rooms *rooms) {
    int type = job->types[Y];
    narrow(job->way.is_past_caches ? rooms->out : target, type, n, y);
    if (job->way.is_past_caches) copy_past_caches(target, rooms->out, n * WIDTH[type]);
}

INLINED void map_piece(Job *job, const Piece *piece, Pass pass, int cell, int column, int weight) {
    float x_room[LINE], dy_room[LINE];
    Rooms rooms;
    Way way = job->way;
    int64_t n = piece->n, step = piece->apart[X], dy_step = piece->apart[DY];
    int64_t width = WIDTH[way.is_direct ? way.type : FLOAT];
    const char *x = job->big[X] + piece->at[X] * width, *dy = job->big[DY];
    dy = pass == MAP ? 0 : dy + piece->at[DY] * width;
    if (!way.is_direct) x = (const char *)lines_of(job, X, piece, x_room, &step);
    if (!way.is_direct && dy) dy = (const char *)lines_of(job, DY, piece, dy_room, &dy_step);
    step *= width, dy_step *= width;
    for (int i = 0; i < piece->rows; i++) {
        int64_t at = piece->at[CELL] + i * piece->apart[CELL];
        int64_t own = piece->at[COLUMN] + i * piece->apart[COLUMN];
        char *target = job->big[Y] + (piece->at[Y] + i * piece->apart[Y]) * WIDTH[job->types[Y]];
        char *y = way.is_direct ? target : (char *)line_for(job, target, &rooms);
        const float *gamma = column ? job->gamma + own : 0;
        if (pass == MAP)
            map_line(way, y, x + i * step, n, cell, column, job->center + at, job->slope + at,
                     job->level + at, gamma, column ? job->beta + own : 0);
        else
            combined_line(way, y, x + i * step, dy + i * dy_step, n, cell, column, weight,
                          weight ? job->weights + piece->at[WEIGHT] + i * piece->apart[WEIGHT] : 0,
                          job->center + at, job->factor + at, job->slope + at, job->level + at,
                          gamma);
        if (!way.is_direct) put(job, target, n, (const float *)y, &rooms);
    }
}

INLINED void go(Job *job, const Piece *piece, int part, Pass pass, int cell, int column,
                int weight) {
    if (pass >= MAP) map_piece(job, piece, pass, cell, column, weight);
    else sum_piece(job, piece, part, pass, cell, column, weight);
}

/* Say whether lines go in blocks of rows: where these share sums, or are short. */
INLINED int is_blocked(const Nest *nest, Pass pass, int cell, int weight) {
    int loop = nest->rank - 2;
    if (pass == MAPPED_PRODUCTS) return !nest->stride[COLUMN][loop];
    if (pass <= PRODUCTS && cell == MANY) return !nest->stride[CELL][loop] && !weight;
    return nest->size[loop + 1] <= SHORT;
}

/* Go through the pieces of lines, of up to `most` elements. */
INLINED void pieces_of(Job *job, const Piece *whole, int64_t most, int part, Pass pass, int cell,
                       int column, int weight) {
    int is_along[] = {1, 1, 1, weight == MANY, cell == MANY, column == MANY};
    int64_t at[OPERANDS];
    memcpy(at, whole->at, sizeof at);
    Piece piece = *whole;
    for (piece.at = at; piece.start < whole->all; piece.start += most) {
        int64_t left = whole->all - piece.start;
        piece.n = left < most ? left : most;
        go(job, &piece, part, pass, cell, column, weight);
        for (int o = 0; o < OPERANDS; o++) at[o] += is_along[o] * piece.n;
    }
}

/* Lines that follow each other, one or ROWS of them; what comes after them is so far `ahead`. */
typedef struct {
    Walk walk; /* at the turn after that of these lines */
    int64_t line, at[OPERANDS], apart[OPERANDS], ahead[DY + 1];
    int rows;
} Block;

/* Return what stands before the first block of a walk. */
INLINED Block before(Walk walk) {
    Block block = {.walk = walk, .line = walk.lines};
    for (int o = 0; o < OPERANDS; o++) block.apart[o] = walk.nest->stride[o][walk.nest->rank - 2];
    return block;
}

/* Go to the next block, of ROWS lines where that is wanted and so many are left; 0 at the end. */
INLINED int next_block(Block *block, int is_wanted) {
    Walk *walk = &block->walk;
    for (int o = 0; o < OPERANDS; o++) block->at[o] += block->rows * block->apart[o];
    block->line += block->rows;
    if (block->line == walk->lines) {
        if (!walk->left || !walk->lines) return 0;
        memcpy(block->at, walk->at, sizeof block->at);
        next_turn(walk);
        block->line = 0;
    }
    int64_t left = walk->lines - block->line;
    block->rows = is_wanted && left >= ROWS ? ROWS : 1;
    /* A nest of two loops has one turn: after its last lines come those of another part. */
    int is_last = left == block->rows && walk->nest->rank > 2;
    for (int o = X; o <= DY; o++)
        block->ahead[o] = is_last ? walk->at[o] - block->at[o] : block->rows * block->apart[o];
    return 1;
}

/* Return a block as a piece, of lines of n elements; its rows are told, as a constant. */
INLINED Piece piece_of(const Block *block, int rows, int64_t n) {
    return (Piece){block->at, block->apart, block->ahead, rows, n, 0, n};
}

/* Go through the lines of a walk. */
INLINED void lines_of_walk(Job *job, Walk walk, int part, Pass pass, int cell, int column,
                           int weight) {
    const Nest *nest = walk.nest;
    int64_t n = nest->size[nest->rank - 1];
    int is_block = is_blocked(nest, pass, cell, weight);
    for (Block block = before(walk); next_block(&block, is_block);) {
        Piece several = piece_of(&block, ROWS, n), one = piece_of(&block, 1, n);
        if (block.rows == ROWS) pieces_of(job, &several, SHORT, part, pass, cell, column, weight);
        else pieces_of(job, &one, LINE, part, pass, cell, column, weight);
    }
}

/* Go through the lines of some turns. It is compiled once for each pass and each way that the small
   operands lie along a line. */
INLINED void pass_of(Job *job, int64_t from, int64_t to, int part, Pass pass, int cell, int column,
                     int weight) {
    const Nest *nest = &job->nest;
    /* Where the lines of a turn have columns of their own, those of one place in several turns
       have them in common; of many turns they would take each other's place in the cache. */
    int is_turned = pass == MAPPED_PRODUCTS && nest->stride[COLUMN][nest->rank - 2]
        && !nest->stride[COLUMN][0];
    Nest turned;
    int64_t most = is_turned ? 2 * ROWS : to - from;
    for (int64_t last; from < to; from = last) {
        last = to - from > most ? from + most : to;
        if (is_turned) turned = turned_nest(nest, last - from);
        Walk walk = is_turned ? walk_of(&turned, 0, turned.size[0]) : walk_of(nest, from, last);
        for (int o = 0; is_turned && o < OPERANDS; o++) walk.at[o] += from * nest->stride[o][0];
        lines_of_walk(job, walk, part, pass, cell, column, weight);
    }
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

/* Take first elements of sums as their pivots, where they count. */
INLINED void pivots_line(float *restrict pivot, int64_t n, const float *restrict x, int weight,
                         const float *restrict w, int is_centered) {
    for (int64_t j = 0; j < n; j++) {
        int is_counted = !weight || OF(w, weight, j) > 0;
        pivot[j] = is_counted ? pivot_of(x[j], is_centered) : 0;
    }
}

INLINED void pivots_of(Job *job, int64_t from, int64_t to, int weight) {
    Nest nest = job->nest;
    for (int i = 0; i < nest.rank; i++)
        if (!nest.stride[CELL][i]) nest.size[i] = 1;
    if (!nest.stride[CELL][0]) to = from + 1;
    int64_t length = nest.size[nest.rank - 1];
    for (Block line = before(walk_of(&nest, from, to)); next_block(&line, 0);)
        for (int64_t start = 0; start < length; start += LINE) {
            int64_t n = length - start < LINE ? length - start : LINE;
            int type = job->types[X];
            float room[LINE];
            const char *data = job->big[X] + (line.at[X] + start) * WIDTH[type];
            pivots_line(job->center + line.at[CELL] + start, n, widened(data, type, n, room),
                        weight, job->weights + line.at[WEIGHT] + (weight == MANY ? start : 0),
                        job->is_centered);
        }
}

static void find_pivots(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    int weight = along_line(job, WEIGHT, job->weights);
    if (weight == ABSENT) pivots_of(job, from, to, ABSENT);
    else if (weight == ONE) pivots_of(job, from, to, ONE);
    else pivots_of(job, from, to, MANY);
}

static void sum_moments(Job *job, int64_t from, int64_t to, int part) {
    int weight = along_line(job, WEIGHT, job->weights);
    if (along_line(job, CELL, job->center) == ONE) { BY_WEIGHT(MOMENTS, ONE); }
    else { BY_WEIGHT(MOMENTS, MANY); }
}

static void sum_products(Job *job, int64_t from, int64_t to, int part) {
    if (along_line(job, CELL, job->center) == ONE) WITH(PRODUCTS, ONE, ABSENT, ABSENT);
    else WITH(PRODUCTS, MANY, ABSENT, ABSENT);
}

static void sum_mapped_products(Job *job, int64_t from, int64_t to, int part) {
    int is_one = along_line(job, COLUMN, job->gamma) == ONE;
    if (along_line(job, CELL, job->center) == ONE) {
        if (is_one) WITH(MAPPED_PRODUCTS, ONE, ONE, ABSENT);
        else WITH(MAPPED_PRODUCTS, ONE, MANY, ABSENT);
    } else {
        if (is_one) WITH(MAPPED_PRODUCTS, MANY, ONE, ABSENT);
        else WITH(MAPPED_PRODUCTS, MANY, MANY, ABSENT);
    }
}

static void map(Job *job, int64_t from, int64_t to, int part) {
    int column = job->varies ? along_line(job, COLUMN, job->gamma) : ABSENT;
    if (along_line(job, CELL, job->center) == ONE) { BY_COLUMN(MAP, ONE); }
    else { BY_COLUMN(MAP, MANY); }
}

static void combine(Job *job, int64_t from, int64_t to, int part) {
    int is_one = along_line(job, CELL, job->center) == ONE;
    int column = job->varies ? along_line(job, COLUMN, job->gamma) : ABSENT;
    int weight = along_line(job, WEIGHT, job->weights);
    if (weight && is_one) { BY_WEIGHT(COMBINED, ONE); }
    else if (weight) { BY_WEIGHT(COMBINED, MANY); }
    else if (is_one) { BY_COLUMN(COMBINED, ONE); }
    else { BY_COLUMN(COMBINED, MANY); }
}

#endif
