/* Loops over the elements of a tensor and of what is broadcast over it.

   A tensor is a nest of loops, outermost first; each operand has a stride for every loop, 0 where
   it is broadcast. The loops come in the order of memory, and those that all operands allow are
   joined. The innermost is a line: contiguous in what is of the tensor's size, and one value, or
   one for each element, in what is small. */

#ifndef KERAS_BN_NEST_H
#define KERAS_BN_NEST_H

#include "calls.h"

#define INLINED static inline __attribute__((always_inline))

enum { LINE = 2048 };

typedef struct {
    int rank;
    int64_t size[RANK], stride[OPERANDS][RANK];
} Nest;

static void swap_loops(Nest *nest, int a, int b) {
    int64_t size = nest->size[a];
    nest->size[a] = nest->size[b], nest->size[b] = size;
    for (int o = 0; o < OPERANDS; o++) {
        int64_t stride = nest->stride[o][a];
        nest->stride[o][a] = nest->stride[o][b], nest->stride[o][b] = stride;
    }
}

static void to_front(Nest *nest, int loop) {
    for (; loop > 0; loop--) swap_loops(nest, loop, loop - 1);
}

static void new_outermost(Nest *nest) {
    nest->size[nest->rank] = 1;
    for (int o = 0; o < OPERANDS; o++) nest->stride[o][nest->rank] = 0;
    to_front(nest, nest->rank++);
}

/* Say whether a loop and the next one inside go through all operands as one loop would. */
static int are_one(const Nest *nest, int outer) {
    for (int o = 0; o < OPERANDS; o++)
        if (nest->stride[o][outer] != nest->stride[o][outer + 1] * nest->size[outer + 1]) return 0;
    return 1;
}

static void join_loops(Nest *nest) {
    int last = 0;
    for (int i = 1; i < nest->rank; i++) {
        swap_loops(nest, last + 1, i);
        if (!are_one(nest, last)) {
            last++;
            continue;
        }
        nest->size[last] *= nest->size[last + 1];
        for (int o = 0; o < OPERANDS; o++) nest->stride[o][last] = nest->stride[o][last + 1];
    }
    nest->rank = last + 1;
}

/* Cut a long line of many sums, or these would not stay in the cache from row to row. */
static void cut_line(Nest *nest) {
    int last = nest->rank - 1;
    if (nest->rank == RANK || nest->size[last] < 2 * LINE || !nest->stride[CELL][last]) return;
    for (int64_t length = LINE; length > LINE / 4; length--) {
        if (nest->size[last] % length) continue;
        new_outermost(nest);
        nest->size[0] = nest->size[last + 1] / length;
        nest->size[last + 1] = length;
        for (int o = 0; o < OPERANDS; o++)
            nest->stride[o][0] = nest->stride[o][last + 1] * length;
        return;
    }
}

/* Return the loop whose turns threads share: of sums one that tells sums apart, if there is one. */
static int shared_loop(const Nest *nest, int threads, int is_sum) {
    int largest = 0;
    for (int i = 0; i < nest->rank - 1; i++) {
        if (nest->size[i] >= 2 * threads && (!is_sum || nest->stride[CELL][i])) return i;
        if (nest->size[i] > nest->size[largest]) largest = i;
    }
    return largest;
}

/* Return some turns of a nest, with the outermost loop as that of the lines. */
static Nest turned_nest(const Nest *nest, int64_t turns) {
    Nest turned = *nest;
    swap_loops(&turned, 0, nest->rank - 2);
    turned.size[nest->rank - 2] = turns;
    return turned;
}

/* Read sizes and the strides of each operand, a row for each; 0 where there are too many loops. */
static int read_loops(Nest *nest, int rank, const int64_t *dims) {
    for (int i = 0; i < rank; i++) {
        if (dims[i] == 1) continue;
        if (nest->rank == RANK - 1) return 0;
        nest->size[nest->rank] = dims[i];
        for (int o = 0; o < OPERANDS; o++)
            nest->stride[o][nest->rank] = dims[(o + 1) * rank + i];
        for (int j = nest->rank++; j > 0 && nest->stride[X][j] > nest->stride[X][j - 1]; j--)
            swap_loops(nest, j, j - 1);
    }
    return 1;
}

/* Say whether all operands are dense along the lines: those of the tensor's size, where there are
   any, and the small ones as far as they go along them. */
static int has_lines(const Nest *nest, char *const *big) {
    int last = nest->rank - 1;
    for (int o = 0; o < OPERANDS; o++) {
        int64_t stride = nest->stride[o][last];
        if (o <= Y ? big[o] && stride != 1 : stride != 0 && stride != 1) return 0;
    }
    return 1;
}

/* Make the nest; 0 where an operand has gaps along what would be the lines. The loop in front is
   the one that threads share. */
static int plan(Nest *nest, int rank, const int64_t *dims, char *const *big, int threads,
                int is_sum) {
    if (!read_loops(nest, rank, dims)) return 0;
    if (nest->rank) {
        join_loops(nest);
        if (!has_lines(nest, big)) return 0;
        if (is_sum) cut_line(nest);
    }
    while (nest->rank < 2) new_outermost(nest);
    to_front(nest, shared_loop(nest, threads, is_sum));
    return 1;
}

/* A walk through all loops but the last two: the lines of one turn follow each other. */
typedef struct {
    const Nest *nest;
    int64_t left, lines, index[RANK], at[OPERANDS];
} Walk;

/* Walk through some turns of the outermost loop. */
static Walk walk_of(const Nest *nest, int64_t from, int64_t to) {
    Walk walk = {nest, 1, to - from, {0}, {0}};
    for (int o = 0; o < OPERANDS; o++) walk.at[o] = from * nest->stride[o][0];
    if (nest->rank == 2) return walk;
    walk.left = to - from;
    walk.lines = nest->size[nest->rank - 2];
    for (int i = 1; i < nest->rank - 2; i++) walk.left *= nest->size[i];
    return walk;
}

INLINED void next_turn(Walk *walk) {
    const Nest *nest = walk->nest;
    walk->left--;
    for (int i = nest->rank - 3; i >= 0; i--) {
        for (int o = 0; o < OPERANDS; o++) walk->at[o] += nest->stride[o][i];
        if (i == 0 || ++walk->index[i] < nest->size[i]) return;
        walk->index[i] = 0;
        for (int o = 0; o < OPERANDS; o++) walk->at[o] -= nest->size[i] * nest->stride[o][i];
    }
}

#endif
