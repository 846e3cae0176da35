/* What is done along a line, or along several that follow each other.

   The loops are simple enough for a compiler to take many elements at a time; what does not change
   along the way (how an operand lies, how many rows there are) is known when they are compiled. */

#ifndef KERAS_BN_LINES_H
#define KERAS_BN_LINES_H

#include "vectors.h"

/* How an operand lies along a line. */
enum { ABSENT, ONE, MANY };

/* Lines whose sums stay in registers from one to the next, and the length in which they then go. */
enum { ROWS = 8, SHORT = LINE / ROWS };

/* Sums: four terms in float32, which err by 3 units in the last place of the whole at most, and
   these sums in double precision. To widen each term takes longer than all the rest. */
enum { FEW = 4 };

/* Find the sums of a vector for each row, by sums of neighbours: of two, of four, of eight. */
INLINED void sums_of_rows(const Doubles *rows, double *sums) {
#if LANES == 16
    Doubles two[4], four[2];
    for (int i = 0; i < 4; i++)
        two[i] = MIXED(rows[2 * i], rows[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14)
            + MIXED(rows[2 * i], rows[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        four[i] = MIXED(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13)
            + MIXED(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    Doubles eight = MIXED(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11)
        + MIXED(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(sums, &eight, sizeof eight);
#else
    for (int i = 0; i < ROWS; i++) sums[i] = sum_of(rows[i]);
#endif
}

/* The two sums of a line: in parts, and of what is left at its end. */
typedef struct {
    Doubles first, second;
    double c, d;
} Ends;

/* Add the sums of lines to those of their cells, which are `apart`; a cell may have several. */
INLINED void add_ends(const Ends *ends, int rows, int64_t apart, double *first, double *second) {
    if (rows == 1) {
        *first += sum_of(ends->first) + ends->c, *second += sum_of(ends->second) + ends->d;
        return;
    }
    Doubles firsts[ROWS], seconds[ROWS];
    for (int i = 0; i < ROWS; i++) firsts[i] = ends[i].first, seconds[i] = ends[i].second;
    double a[ROWS], b[ROWS];
    sums_of_rows(firsts, a), sums_of_rows(seconds, b);
    for (int i = 0; i < ROWS; i++)
        first[i * apart] += a[i] + ends[i].c, second[i * apart] += b[i] + ends[i].d;
}

/* Go through a line of n elements: `lanes(j, a, b)` adds those from j on, `one(j, c, d)` one. */
#define ALONG_LINE(n, lanes, one)                                                         \
    Total firsts = {{0}, {0}}, seconds = {{0}, {0}};                                      \
    double c = 0, d = 0;                                                                  \
    int64_t j = 0;                                                                        \
    for (; j + FEW * LANES <= (n); j += FEW * LANES) {                                    \
        Floats a = {0}, b = {0};                                                          \
        for (int i = 0; i < FEW; i++) lanes(j + i * LANES, a, b);                         \
        add(&firsts, a), add(&seconds, b);                                                \
    }                                                                                     \
    if (j + LANES <= (n)) {                                                               \
        Floats a = {0}, b = {0};                                                          \
        for (; j + LANES <= (n); j += LANES) lanes(j, a, b);                              \
        add(&firsts, a), add(&seconds, b);                                                \
    }                                                                                     \
    for (; j < (n); j++) one(j, c, d);                                                    \
    return (Ends){firsts.low + firsts.high, seconds.low + seconds.high, c, d}

#define SOME(values, how, j) ((how) == MANY ? loaded((values) + (j)) : repeated(*(values)))
#define OF(values, how, j) ((values)[(how) == MANY ? (j) : 0])

INLINED void add_moments(const float *x, int weight, const float *w, double origin,
                         Doubles *first, Doubles *second) {
    Doubles deviation = widened_half(x) - origin, counted = deviation;
    if (weight) {
        Doubles own = weight == MANY ? widened_half(w) : (Doubles){0} + *w;
        /* What lies under a 0 does not matter, a NaN included. */
        deviation = (Doubles)((Choice)deviation & (own != 0));
        counted = own * deviation;
    }
    *first += counted, *second += counted * deviation;
}

/* Of the moments every term is exact: where the pivot is far off, the sum of squares is much larger
   than what is left of it. */
INLINED Ends moments_line(const float *restrict x, int64_t n, int weight, const float *restrict w,
                          const float *restrict pivot) {
    Total firsts = {{0}, {0}}, seconds = {{0}, {0}};
    double origin = *pivot, c = 0, d = 0;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        add_moments(x + j, weight, weight == MANY ? w + j : w, origin, &firsts.low, &seconds.low);
        add_moments(x + j + HALF_LANES, weight, weight == MANY ? w + j + HALF_LANES : w, origin,
                    &firsts.high, &seconds.high);
    }
    for (; j + HALF_LANES <= n; j += HALF_LANES)
        add_moments(x + j, weight, weight == MANY ? w + j : w, origin, &firsts.low, &seconds.low);
    for (; j < n; j++) {
        double own = weight ? OF(w, weight, j) : 1, deviation = own != 0 ? x[j] - origin : 0;
        c += own * deviation, d += own * deviation * deviation;
    }
    return (Ends){firsts.low + firsts.high, seconds.low + seconds.high, c, d};
}

/* Of moments about 0. */
INLINED Ends squares_line(const float *restrict x, int64_t n) {
#define LANES_FROM(j, a, b) (a += 0, b += loaded(x + (j)) * loaded(x + (j)))
#define ONE_AT(j, a, b) (a += 0, b += (double)x[j] * x[j])
    ALONG_LINE(n, LANES_FROM, ONE_AT);
#undef LANES_FROM
#undef ONE_AT
}

/* Fetch what comes next along some rows, n elements of which are read: short pieces of rows that are
   apart, a processor does not foresee. */
INLINED void fetch_along(const float *x, int64_t step, int rows, int64_t n) {
    int64_t ahead = n < FEW * IN_LINE ? FEW * IN_LINE : n;
    for (int i = 0; i < rows; i++) fetch(x + i * step + ahead, n * (int64_t)sizeof *x);
}

INLINED Ends products_line(const float *restrict x, const float *restrict dy, int64_t n,
                           const float *restrict center) {
#define LANES_FROM(j, a, b)                                                               \
    do {                                                                                  \
        Floats slope = loaded(dy + (j));                                                  \
        a += slope, b += slope * (loaded(x + (j)) - *center);                             \
    } while (0)
#define ONE_AT(j, a, b) (a += dy[j], b += (double)dy[j] * (x[j] - *center))
    ALONG_LINE(n, LANES_FROM, ONE_AT);
#undef LANES_FROM
#undef ONE_AT
}

/* Σ gamma·dy and Σ gamma·dy·z, where z = (x - center)·scale + shift. */
INLINED Ends mapped_products_line(const float *restrict x, const float *restrict dy, int64_t n,
                                  int cell, int column, const float *restrict center,
                                  const float *restrict scale, const float *restrict shift,
                                  const float *restrict gamma) {
#define LANES_FROM(j, a, b)                                                               \
    do {                                                                                  \
        Floats z = (loaded(x + (j)) - SOME(center, cell, j)) * SOME(scale, cell, j);      \
        Floats slope = loaded(dy + (j)) * SOME(gamma, column, j);                         \
        a += slope, b += slope * (z + SOME(shift, cell, j));                              \
    } while (0)
#define ONE_AT(j, a, b)                                                                   \
    do {                                                                                  \
        float slope = dy[j] * OF(gamma, column, j);                                       \
        a += slope;                                                                       \
        float z = (x[j] - OF(center, cell, j)) * OF(scale, cell, j);                      \
        b += slope * (z + OF(shift, cell, j));                                            \
    } while (0)
    ALONG_LINE(n, LANES_FROM, ONE_AT);
#undef LANES_FROM
#undef ONE_AT
}

/* Sums over the rows of a block, one for each of n columns: so they stay in registers from row to
   row. In what order columns go through the rows, a processor does not foresee: what takes the place
   of some of them in the next block is fetched ahead. */

/* What is fetched lies so far `ahead` of a block; of its `all` columns those `from` on take the place
   of what is read. There are none where a block is no memory. */
typedef struct {
    int64_t ahead, from, all;
} Next;

/* Fetch as much of what comes next as some columns from j on have, in the order of memory where
   rows are without gaps. */
INLINED void fetch_next(const float *block, int64_t step, int rows, Next next, int64_t j) {
    int is_dense = step == next.all;
    const float *data = block + next.ahead + (is_dense ? (next.from + j) * rows - next.from : j);
    for (int i = 0; next.all && i < rows; i++)
        __builtin_prefetch(data + i * (is_dense ? IN_LINE : step));
}

/* `fetch(j)` goes before so many columns; `column(j)` is one. */
#define BY_COLUMNS(n, fetch, column)                                                      \
    int64_t some = 0;                                                                     \
    for (; some + IN_LINE <= (n); some += IN_LINE) {                                      \
        fetch(some);                                                                      \
        for (int64_t j = some; j < some + IN_LINE; j++) column(j);                        \
    }                                                                                     \
    for (int64_t j = some; j < (n); j++) column(j);

/* `term(i, a, b)` adds what is in row i of a column. */
#define ALONG_ROWS(rows, first, second, term)                                             \
    double c = 0, d = 0;                                                                  \
    for (int some = 0; some < (rows); some += FEW) {                                      \
        float a = 0, b = 0;                                                               \
        for (int i = some; i < some + ((rows) < FEW ? 1 : FEW); i++) term(i, a, b);       \
        c += a, d += b;                                                                   \
    }                                                                                     \
    *(first) += c, *(second) += d;

INLINED void moments_column(const float *x, int64_t step, int rows, double own, double origin,
                            double *first, double *second) {
    double a = 0, b = 0;
    for (int i = 0; i < rows; i++) {
        double deviation = x[i * step] - origin;
        deviation = own == 0 ? 0 : deviation;
        a += own * deviation, b += own * deviation * deviation;
    }
    *first += a, *second += b;
}

INLINED void moments_block(const float *restrict x, int64_t step, int rows, int64_t n, int weight,
                           const float *restrict w, const float *restrict pivot,
                           double *restrict first, double *restrict second, Next next) {
#define FETCH(j) fetch_next(x, step, rows, next, j)
#define COLUMN_AT(j)                                                                      \
    moments_column(x + j, step, rows, weight ? OF(w, weight, j) : 1, pivot[j], first + j, \
                   second + j)
    BY_COLUMNS(n, FETCH, COLUMN_AT)
#undef FETCH
#undef COLUMN_AT
}

INLINED void products_column(const float *x, int64_t step, const float *dy, int64_t dy_step,
                             int rows, float center, double *first, double *second) {
#define TERM(i, a, b) (a += dy[i * dy_step], b += dy[i * dy_step] * (x[i * step] - center))
    ALONG_ROWS(rows, first, second, TERM)
#undef TERM
}

INLINED void products_block(const float *restrict x, int64_t step, const float *restrict dy,
                            int64_t dy_step, int rows, int64_t n, const float *restrict center,
                            double *restrict first, double *restrict second, Next next_x,
                            Next next_dy) {
#define FETCH(j)                                                                          \
    (fetch_next(x, step, rows, next_x, j), fetch_next(dy, dy_step, rows, next_dy, j))
#define COLUMN_AT(j)                                                                      \
    products_column(x + j, step, dy + j, dy_step, rows, center[j], first + j, second + j)
    BY_COLUMNS(n, FETCH, COLUMN_AT)
#undef FETCH
#undef COLUMN_AT
}

/* Σ gamma·dy and Σ gamma·dy·z, each element a sum of its own. */
INLINED void mapped_products(const float *restrict x, const float *restrict dy, int64_t n,
                             int column, const float *restrict center, const float *restrict scale,
                             const float *restrict shift, const float *restrict gamma,
                             double *restrict first, double *restrict second) {
    for (int64_t j = 0; j < n; j++) {
        float slope = dy[j] * OF(gamma, column, j);
        first[j] += slope, second[j] += slope * ((x[j] - center[j]) * scale[j] + shift[j]);
    }
}

/* Σ dy and Σ dy·z; from row to row the cells are `apart`. */
INLINED void column_products_block(const float *restrict x, int64_t step, const float *restrict dy,
                                   int64_t dy_step, int rows, int64_t n, int cell, int64_t apart,
                                   const float *restrict center, const float *restrict scale,
                                   const float *restrict shift, double *restrict first,
                                   double *restrict second) {
#define TERM(i, a, b)                                                                     \
    do {                                                                                  \
        int64_t k = i * apart + (cell == MANY ? j : 0);                                   \
        float z = (x[i * step + j] - center[k]) * scale[k] + shift[k];                    \
        a += dy[i * dy_step + j], b += dy[i * dy_step + j] * z;                           \
    } while (0)
    for (int64_t j = 0; j < n; j++) { ALONG_ROWS(rows, first + j, second + j, TERM) }
#undef TERM
}

/* Maps. Each `value(Numbers, big, type, get, out)` is made, from j on, of what is as large as the
   tensor, of a dtype, by `big`, and of what is small, by `get`. */

/* How a map reads and writes: directly, in the dtype of memory, lines that are multiples of LANES; or
   in float32, lines of any length. */
typedef struct {
    int is_direct, type, is_past_caches;
} Way;

#define READ(data, type, j) (((const float *)(data))[j])
#define TAKEN(data, type, j) taken((data) + (j) * WIDTH[type], type)
#define DIRECTLY(y, n, value, type)                                                       \
    for (int64_t j = 0; j < (n); j += LANES) {                                            \
        Floats some;                                                                      \
        value(Floats, TAKEN, type, SOME, some);                                           \
        give((y) + j * WIDTH[type], type, some, way.is_past_caches);                      \
    }
#define ALONG_MAP(y, n, value)                                                            \
    if (!way.is_direct)                                                                   \
        for (int64_t j = 0; j < (n); j++) value(float, READ, FLOAT, OF, ((float *)(y))[j]); \
    else if (way.type == FLOAT) DIRECTLY(y, n, value, FLOAT)                              \
    else DIRECTLY(y, n, value, BFLOAT)

INLINED void map_line(Way way, char *restrict y, const char *restrict x, int64_t n, int cell,
                      int column, const float *restrict center, const float *restrict slope,
                      const float *restrict level, const float *restrict gamma,
                      const float *restrict beta) {
#define VALUE(Numbers, big, type, get, out)                                               \
    do {                                                                                  \
        Numbers z = big(x, type, j) - get(center, cell, j);                               \
        z = z * get(slope, cell, j) + get(level, cell, j);                                \
        out = column ? z * get(gamma, column, j) + get(beta, column, j) : z;              \
    } while (0)
    ALONG_MAP(y, n, VALUE);
#undef VALUE
}

INLINED void combined_line(Way way, char *restrict dx, const char *restrict x,
                           const char *restrict dy, int64_t n, int cell, int column, int weight,
                           const float *restrict w, const float *restrict center,
                           const float *restrict factor, const float *restrict slope,
                           const float *restrict level, const float *restrict gamma) {
#define VALUE(Numbers, big, type, get, out)                                               \
    do {                                                                                  \
        Numbers line = big(x, type, j) - get(center, cell, j);                            \
        line = line * get(slope, cell, j) + get(level, cell, j);                          \
        Numbers d = big(dy, type, j);                                                     \
        d = column ? d * get(gamma, column, j) : d;                                       \
        out = d * get(factor, cell, j) + (weight ? get(w, weight, j) * line : line);      \
    } while (0)
    ALONG_MAP(dx, n, VALUE);
#undef VALUE
}

#endif
