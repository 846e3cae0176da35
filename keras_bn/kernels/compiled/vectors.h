/* Halves of vectors, and the same numbers in double precision: so many fit into a register. */

#ifndef KERAS_BN_VECTORS_H
#define KERAS_BN_VECTORS_H

#include <math.h>

#include "memory.h"

enum { HALF_LANES = LANES / 2 };
typedef float Half __attribute__((vector_size(HALF_LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(HALF_LANES * sizeof(double))));
typedef int64_t Choice __attribute__((vector_size(HALF_LANES * sizeof(double))));
typedef int32_t HalfChoice __attribute__((vector_size(HALF_LANES * sizeof(float))));

#if LANES == 16
#define EACH_OF_HALF(of) of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)
#elif LANES == 8
#define EACH_OF_HALF(of) of(0), of(1), of(2), of(3)
#else
#define EACH_OF_HALF(of) of(0), of(1)
#endif

/* Said by element: of a conversion of vectors GCC 12 makes two, and joins them. */
INLINED Doubles doubles_of(Half v) {
#define ELEMENT(i) v[i]
    return (Doubles){EACH_OF_HALF(ELEMENT)};
#undef ELEMENT
}

/* Not by element: what is widened again, GCC 12 takes for what it was before. */
INLINED Half narrowed(Doubles v) { return __builtin_convertvector(v, Half); }

INLINED Doubles root_of(Doubles v) {
#define ELEMENT(i) sqrt(v[i])
    return (Doubles){EACH_OF_HALF(ELEMENT)};
#undef ELEMENT
}

/* Return one vector where it is chosen, else the other. */
INLINED Half chosen(HalfChoice is_chosen, Half one, Half other) {
    return (Half)(((HalfChoice)one & is_chosen) | ((HalfChoice)other & ~is_chosen));
}

INLINED Half half_at(const float *data) {
    Half values;
    memcpy(&values, data, sizeof values);
    return values;
}

INLINED void keep_half(float *target, Half values) { memcpy(target, &values, sizeof values); }

INLINED void add_to(double *target, Doubles values) {
    Doubles sums;
    memcpy(&sums, target, sizeof sums);
    sums += values;
    memcpy(target, &sums, sizeof sums);
}

INLINED Doubles widened_half(const float *data) { return doubles_of(half_at(data)); }

/* Not one vector of sixteen: GCC 12 would keep that in memory. */
typedef struct {
    Doubles low, high;
} Total;

#if defined(__clang__) || __GNUC__ >= 12
#define AT(i) (i)
#define AFTER(i) HALF_LANES + (i)
#define JOINED(low, high) __builtin_shufflevector(low, high, EACH_OF_HALF(AT), EACH_OF_HALF(AFTER))
#define LOW(values) __builtin_shufflevector(values, values, EACH_OF_HALF(AT))
#define HIGH(values) __builtin_shufflevector(values, values, EACH_OF_HALF(AFTER))
#else
#define JOINED(low, high) joined(low, high)
#define LOW(values) half_of(values, 0)
#define HIGH(values) half_of(values, HALF_LANES)
INLINED Half half_of(Floats values, int from) {
    Half part;
    memcpy(&part, (const char *)&values + from * sizeof(float), sizeof part);
    return part;
}
INLINED Floats joined(Half low, Half high) {
    Half halves[2] = {low, high};
    Floats values;
    memcpy(&values, halves, sizeof values);
    return values;
}
#endif

INLINED void add(Total *total, Floats values) {
    total->low += doubles_of(LOW(values));
    total->high += doubles_of(HIGH(values));
}

INLINED double sum_of(Doubles v) {
#if LANES == 16
    return v[0] + v[4] + (v[2] + v[6]) + (v[1] + v[5] + (v[3] + v[7]));
#elif LANES == 8
    return v[0] + v[2] + (v[1] + v[3]);
#else
    return v[0] + v[1];
#endif
}

#ifdef __clang__
#define MIXED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(a, b, ...) __builtin_shuffle(a, b, (Choice){__VA_ARGS__})
#endif

#endif
