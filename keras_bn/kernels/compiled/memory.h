/* How numbers come from memory, in any dtype, and go there: a line by way of a room in float32, or
   some at a time in registers. */

#ifndef KERAS_BN_MEMORY_H
#define KERAS_BN_MEMORY_H

#include <string.h>

#include "calls.h"
#include "nest.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* nothing here is called from outside */
#endif

/* Numbers in float32 that a register holds: longer vectors GCC 12 takes apart in memory. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Shorts __attribute__((vector_size(LANES * sizeof(uint16_t))));

INLINED Floats loaded(const float *data) {
    Floats values;
    memcpy(&values, data, sizeof values);
    return values;
}

INLINED Floats repeated(float value) { return (Floats){0} + value; }

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

/* Bytes that have to be fetched ahead for memory to be there in time; those of a line of a cache, and
   how many numbers in float32 these are. */
enum { AHEAD = 4096, CACHE_LINE = 64, IN_LINE = CACHE_LINE / sizeof(float) };

/* Fetch some bytes, before they are read. */
INLINED void fetch(const void *data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch((const char *)data + i);
}

/* The bits of a float32 as those of a bfloat16: to the nearest, ties to even; a NaN stays one. They
   are those of a number, or of a vector of them. */
#define ROUNDED(bits) (((bits) + 0x7fff + (((bits) >> 16) & 1)) >> 16)
#define IS_NAN(bits) (((bits) & 0x7fffffff) > 0x7f800000)
enum { NARROW_NAN = 0x7fc0 };

/* Whether bfloat16 is best taken some at a time. Without AVX-512, GCC 12 converts what is in
   registers one by one, and twice as fast in loops. */
#if defined(__AVX512BW__) && defined(__AVX512VL__)
enum { TAKES_BFLOAT = 1 };
#else
enum { TAKES_BFLOAT = 0 };
#endif

/* Return numbers as bfloat16. */
INLINED Shorts bfloats_of(Floats values) {
#ifdef __AVX512BF16__
    __m256bh found = _mm512_cvtneps_pbh((__m512)values); /* 0 for less than 2⁻¹²⁶ */
    Shorts narrow;
    memcpy(&narrow, &found, sizeof narrow);
    return narrow;
#else
    Bits bits = (Bits)values, is_nan = (Bits)IS_NAN(bits);
    return __builtin_convertvector((ROUNDED(bits) & ~is_nan) | (NARROW_NAN & is_nan), Shorts);
#endif
}

INLINED void narrow(char *data, int type, int64_t n, const float *wide) {
    if (type == BFLOAT) {
        uint16_t *found = (uint16_t *)data;
        const uint32_t *bits = (const uint32_t *)wide;
        int64_t j = 0;
        for (; TAKES_BFLOAT && j + LANES <= n; j += LANES) {
            Shorts some = bfloats_of(loaded(wide + j));
            memcpy(found + j, &some, sizeof some);
        }
        for (; j < n; j++)
            found[j] = (uint16_t)(IS_NAN(bits[j]) ? NARROW_NAN : ROUNDED(bits[j]));
    }
#ifdef __FLT16_MAX__
    if (type == HALF) {
        _Float16 *found = (_Float16 *)data;
        for (int64_t j = 0; j < n; j++) found[j] = (_Float16)wide[j];
    }
#endif
}

/* Copy up to n bytes past the caches, as many at a time as a register has and memory is aligned to, 16
   at least. Return how many. */
INLINED int64_t stream(char *target, const char *source, int64_t n) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; (uintptr_t)target % 64 == 0 && i + 64 <= n; i += 64)
        _mm512_stream_si512((void *)(target + i), _mm512_loadu_si512(source + i));
#endif
#ifdef __AVX__
    for (; (uintptr_t)target % 32 == 0 && i + 32 <= n; i += 32)
        _mm256_stream_si256((void *)(target + i), _mm256_loadu_si256((const void *)(source + i)));
#endif
#ifdef __SSE2__
    for (; i + 16 <= n; i += 16)
        _mm_stream_si128((__m128i *)(target + i), _mm_loadu_si128((const __m128i *)(source + i)));
#else
    (void)target, (void)source, (void)n;
#endif
    return i;
}

/* Copy n bytes to memory that nobody reads soon, past the caches: these would fetch it first. */
INLINED void copy_past_caches(char *target, const char *source, int64_t n) {
    int64_t i = (uintptr_t)target % 16 == 0 ? stream(target, source, n) : 0;
    memcpy(target + i, source + i, (size_t)(n - i));
}

INLINED void finish_copies(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* Return some numbers in float32. */
INLINED Floats taken(const char *data, int type) {
    if (type == FLOAT) return loaded((const float *)data);
    Shorts bits;
    memcpy(&bits, data, sizeof bits);
    return (Floats)(__builtin_convertvector(bits, Bits) << 16);
}

/* Write some bytes; past the caches, a multiple of 16 to where memory is aligned to as many. */
INLINED void write_some(char *target, const void *made, int64_t n, int is_past_caches) {
    if (!is_past_caches || !stream(target, made, n)) memcpy(target, made, (size_t)n);
}

/* Give some numbers to memory. */
INLINED void give(char *target, int type, Floats values, int is_past_caches) {
    if (type == FLOAT) {
        write_some(target, &values, sizeof values, is_past_caches);
        return;
    }
    Shorts narrow = bfloats_of(values);
    write_some(target, &narrow, sizeof narrow, is_past_caches);
}

#endif
