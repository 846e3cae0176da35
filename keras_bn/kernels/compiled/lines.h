/* What is done along a line, or along several that follow each other.

   The loops are simple enough for a compiler to take many elements at a time; what does not change
   along the way (how an operand lies, how many rows there are) is known when they are compiled. */

#ifndef KERAS_BN_LINES_H
#define KERAS_BN_LINES_H

#include <string.h>

#include "nest.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* nothing here is called from outside */
#endif

enum { FLOAT, BFLOAT, HALF };
static const int64_t WIDTH[] = {4, 2, 2};

/* How an operand lies along a line. */
enum { ABSENT, ONE, MANY };

/* Lines whose sums stay in registers from one to the next, and the length in which they then go. */
enum { ROWS = 8, SHORT = LINE / ROWS };

INLINED const float *widened(const char *data, int type, int64_t n, float *room) {
    if (type == FLOAT) return (const float *)data;
    if (type == BFLOAT) {
        const uint16_t *narrow = (const uint16_t *)data;
        uint32_t *bits = (uint32_t *)room;
        for (int64_t j = 0; j < n; j++) bits[j] = (uint32_t)narrow[j] << 16;
    }
#ifdef __FLT16_MAX__
    if (type == HALF) {
        const _Float16 *narrow = (const _Float16 *)data;
        for (int64_t j = 0; j < n; j++) room[j] = (float)narrow[j];
    }
#endif
    return room;
}

INLINED void narrow(char *data, int type, int64_t n, const float *wide) {
    if (type == BFLOAT) {
        uint16_t *found = (uint16_t *)data;
        const uint32_t *bits = (const uint32_t *)wide;
        for (int64_t j = 0; j < n; j++) {
            /* To the nearest, ties to even; a NaN stays one. */
            uint32_t rounded = (bits[j] + 0x7fff + ((bits[j] >> 16) & 1)) >> 16;
            int is_nan = (bits[j] & 0x7fffffff) > 0x7f800000;
            found[j] = (uint16_t)(is_nan ? 0x7fc0 : rounded);
        }
    }
#ifdef __FLT16_MAX__
    if (type == HALF) {
        _Float16 *found = (_Float16 *)data;
        for (int64_t j = 0; j < n; j++) found[j] = (_Float16)wide[j];
    }
#endif
}

/* Copy n bytes to memory that nobody reads soon, past the caches: these would fetch it first. */
INLINED void copy_past_caches(char *target, const char *source, int64_t n) {
    int64_t i = 0;
#ifdef __SSE2__
    if ((uintptr_t)target % 16 == 0)
        for (; i + 16 <= n; i += 16)
            _mm_stream_si128((__m128i *)(target + i),
                             _mm_loadu_si128((const __m128i *)(source + i)));
#endif
    memcpy(target + i, source + i, (size_t)(n - i));
}

INLINED void finish_copies(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* Sums: four terms in float32, which err by 3 units in the last place of the whole at most, and
   these sums in double precision. To widen each term takes longer than all the rest. */

enum { FEW = 4, LANES = 16, HALF_LANES = LANES / 2 };
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef float Eight __attribute__((vector_size(HALF_LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(HALF_LANES * sizeof(double))));
typedef int64_t Choice __attribute__((vector_size(HALF_LANES * sizeof(double))));

INLINED Floats loaded(const float *data) {
    Floats values;
    memcpy(&values, data, sizeof values);
    return values;
}

INLINED Doubles widened_eight(const float *data) {
    Eight values;
    memcpy(&values, data, sizeof values);
    return __builtin_convertvector(values, Doubles);
}

INLINED Floats repeated(float value) { return (Floats){0} + value; }

/* Not one vector of sixteen: GCC 12 would keep that in memory. */
typedef struct {
    Doubles low, high;
} Total;

INLINED void add(Total *total, Floats values) {
    Eight low, high;
    memcpy(&low, &values, sizeof low);
    memcpy(&high, (const char *)&values + sizeof low, sizeof high);
    total->low += __builtin_convertvector(low, Doubles);
    total->high += __builtin_convertvector(high, Doubles);
}

INLINED double sum_of(const Total *total) {
    Doubles eight = total->low + total->high;
    return eight[0] + eight[4] + (eight[2] + eight[6])
        + (eight[1] + eight[5] + (eight[3] + eight[7]));
}

/* Go through a line of n elements: `lanes(j, a, b)` adds those from j on, `one(j, c, d)` one. */
#define ALONG_LINE(n, first, second, lanes, one)                                          \
    do {                                                                                  \
        Total firsts = {{0}, {0}}, seconds = {{0}, {0}};                                  \
        double c = 0, d = 0;                                                              \
        int64_t j = 0;                                                                    \
        while (j + LANES <= (n)) {                                                        \
            Floats a = {0}, b = {0};                                                      \
            if (j + FEW * LANES <= (n)) {                                                 \
                for (int i = 0; i < FEW; i++, j += LANES) lanes(j, a, b);                 \
            } else if (j + 2 * LANES <= (n)) {                                            \
                for (int i = 0; i < 2; i++, j += LANES) lanes(j, a, b);                   \
            } else {                                                                      \
                lanes(j, a, b);                                                           \
                j += LANES;                                                               \
            }                                                                             \
            add(&firsts, a);                                                              \
            add(&seconds, b);                                                             \
        }                                                                                 \
        for (; j < (n); j++) one(j, c, d);                                                \
        *(first) += sum_of(&firsts) + c, *(second) += sum_of(&seconds) + d;               \
    } while (0)

#define SOME(values, how, j) ((how) == MANY ? loaded((values) + (j)) : repeated(*(values)))
#define OF(values, how) ((values)[(how) == MANY ? j : 0])

/* Of the moments every term is exact: where the pivot is far off, the sum of squares is much larger
   than what is left of it. */
INLINED void moments_line(const float *restrict x, int64_t n, int weight, const float *restrict w,
                          const float *restrict pivot, double *first, double *second) {
    Total firsts = {{0}, {0}}, seconds = {{0}, {0}};
    double origin = *pivot, c = 0, d = 0;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int half = 0; half < 2; half++) {
            int64_t from = j + half * HALF_LANES;
            Doubles deviation = widened_eight(x + from) - origin, counted = deviation;
            if (weight) {
                Doubles own = weight == MANY ? widened_eight(w + from) : (Doubles){0} + *w;
                /* What lies under a 0 does not matter, a NaN included. */
                deviation = (Doubles)((Choice)deviation & (own != 0));
                counted = own * deviation;
            }
            *(half ? &firsts.high : &firsts.low) += counted;
            *(half ? &seconds.high : &seconds.low) += counted * deviation;
        }
    }
    for (; j < n; j++) {
        double own = weight ? OF(w, weight) : 1, deviation = own != 0 ? x[j] - origin : 0;
        c += own * deviation, d += own * deviation * deviation;
    }
    *first += sum_of(&firsts) + c, *second += sum_of(&seconds) + d;
}

INLINED void products_line(const float *restrict x, const float *restrict dy, int64_t n,
                           const float *restrict center, double *first, double *second) {
#define LANES_FROM(j, a, b)                                                               \
    do {                                                                                  \
        Floats slope = loaded(dy + (j));                                                  \
        a += slope, b += slope * (loaded(x + (j)) - *center);                             \
    } while (0)
#define ONE_AT(j, a, b) (a += dy[j], b += (double)dy[j] * (x[j] - *center))
    ALONG_LINE(n, first, second, LANES_FROM, ONE_AT);
#undef LANES_FROM
#undef ONE_AT
}

/* Σ gamma·dy and Σ gamma·dy·z, where z = (x - center)·scale + shift. */
INLINED void mapped_products_line(const float *restrict x, const float *restrict dy, int64_t n,
                                  int cell, int column, const float *restrict center,
                                  const float *restrict scale, const float *restrict shift,
                                  const float *restrict gamma, double *first, double *second) {
#define LANES_FROM(j, a, b)                                                               \
    do {                                                                                  \
        Floats z = (loaded(x + (j)) - SOME(center, cell, j)) * SOME(scale, cell, j);      \
        Floats slope = loaded(dy + (j)) * SOME(gamma, column, j);                         \
        a += slope, b += slope * (z + SOME(shift, cell, j));                              \
    } while (0)
#define ONE_AT(j, a, b)                                                                   \
    do {                                                                                  \
        float slope = dy[j] * OF(gamma, column);                                          \
        a += slope;                                                                       \
        b += slope * ((x[j] - OF(center, cell)) * OF(scale, cell) + OF(shift, cell));     \
    } while (0)
    ALONG_LINE(n, first, second, LANES_FROM, ONE_AT);
#undef LANES_FROM
#undef ONE_AT
}

/* Sums over the rows of a block, one for each of n columns: so they stay in registers from row to
   row. `term(i, a, b)` adds what is in row i and column j. */
#define ALONG_ROWS(rows, n, first, second, term)                                          \
    for (int64_t j = 0; j < (n); j++) {                                                   \
        double c = 0, d = 0;                                                              \
        for (int some = 0; some < (rows); some += FEW) {                                  \
            float a = 0, b = 0;                                                           \
            for (int i = some; i < some + ((rows) < FEW ? 1 : FEW); i++) term(i, a, b);   \
            c += a, d += b;                                                               \
        }                                                                                 \
        first[j] += c, second[j] += d;                                                    \
    }

INLINED void moments_block(const float *restrict x, int64_t step, int rows, int64_t n, int weight,
                           const float *restrict w, const float *restrict pivot,
                           double *restrict first, double *restrict second) {
    for (int64_t j = 0; j < n; j++) {
        double a = 0, b = 0;
        for (int i = 0; i < rows; i++) {
            double own = weight ? OF(w, weight) : 1, deviation = x[i * step + j] - (double)pivot[j];
            deviation = own != 0 ? deviation : 0;
            a += own * deviation, b += own * deviation * deviation;
        }
        first[j] += a, second[j] += b;
    }
}

INLINED void products_block(const float *restrict x, int64_t step, const float *restrict dy,
                            int64_t dy_step, int rows, int64_t n, const float *restrict center,
                            double *restrict first, double *restrict second) {
#define TERM(i, a, b)                                                                     \
    (a += dy[i * dy_step + j], b += dy[i * dy_step + j] * (x[i * step + j] - center[j]))
    ALONG_ROWS(rows, n, first, second, TERM)
#undef TERM
}

/* Σ gamma·dy and Σ gamma·dy·z, each element a sum of its own. */
INLINED void mapped_products(const float *restrict x, const float *restrict dy, int64_t n,
                             int column, const float *restrict center, const float *restrict scale,
                             const float *restrict shift, const float *restrict gamma,
                             double *restrict first, double *restrict second) {
    for (int64_t j = 0; j < n; j++) {
        float slope = dy[j] * OF(gamma, column);
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
    ALONG_ROWS(rows, n, first, second, TERM)
#undef TERM
}

/* Maps. */

INLINED void map_line(float *restrict y, const float *restrict x, int64_t n, int cell, int column,
                      const float *restrict center, const float *restrict slope,
                      const float *restrict level, const float *restrict gamma,
                      const float *restrict beta) {
    for (int64_t j = 0; j < n; j++) {
        float z = (x[j] - OF(center, cell)) * OF(slope, cell) + OF(level, cell);
        y[j] = column ? z * OF(gamma, column) + OF(beta, column) : z;
    }
}

INLINED void combined_line(float *restrict dx, const float *restrict x, const float *restrict dy,
                           int64_t n, int cell, int column, int weight, const float *restrict w,
                           const float *restrict center, const float *restrict factor,
                           const float *restrict slope, const float *restrict level,
                           const float *restrict gamma) {
    for (int64_t j = 0; j < n; j++) {
        float line = (x[j] - OF(center, cell)) * OF(slope, cell) + OF(level, cell);
        float d = column ? dy[j] * OF(gamma, column) : dy[j];
        dx[j] = d * OF(factor, cell) + (weight ? OF(w, weight) * line : line);
    }
}

#endif
