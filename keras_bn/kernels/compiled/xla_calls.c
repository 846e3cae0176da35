/* The passes as custom calls of XLA, by its foreign function interface (xla/ffi/api/c_api.h, version
   0.1 and later; its structures are stated here, so that nothing of XLA is needed to compile).

   What a call does is in three attributes: `dims`, as the passes take them, whole `numbers` and
   `reals`; kernels/jax/compiled.py writes them. Operands and results are dense. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"

typedef struct Extension {
    size_t bytes;
    int type;
    struct Extension *next;
} Extension;

typedef struct {
    size_t bytes;
    Extension *extension;
    int major, minor;
} Version;

typedef struct {
    Extension base;
    struct {
        size_t bytes;
        Version version;
        uint32_t traits;
    } *metadata;
} Metadata;

typedef struct Error Error;

typedef struct {
    size_t bytes;
    Extension *extension;
    const char *message;
    int code;
} NewError;

typedef struct {
    size_t bytes;
    Extension *extension;
    Version version;
    const void *internal;
    Error *(*error)(NewError *);
} Api;

typedef struct {
    size_t bytes;
    Extension *extension;
    int dtype;
    void *data;
    int64_t rank, *dims;
} Buffer;

typedef struct {
    const char *text;
    size_t length;
} Name;

typedef struct {
    int dtype;
    size_t size;
    void *data;
} Array;

typedef struct {
    size_t bytes;
    Extension *extension;
    int64_t size;
    int *types;
    Buffer **buffers;
} Buffers;

typedef struct {
    size_t bytes;
    Extension *extension;
    int64_t size;
    int *types;
    Name **names;
    Array **arrays;
} Attributes;

typedef struct {
    size_t bytes;
    Extension *extension;
    const Api *api;
    void *context;
    int stage;
    Buffers operands, results;
    Attributes attributes;
} Frame;

enum { IS_METADATA = 1, NO_MEMORY = 8 };

static const void *attribute(const Frame *frame, const char *name) {
    for (int64_t i = 0; i < frame->attributes.size; i++) {
        const Name *own = frame->attributes.names[i];
        if (own->length == strlen(name) && !memcmp(own->text, name, own->length))
            return frame->attributes.arrays[i]->data;
    }
    return NULL;
}

static void *operand(const Frame *frame, int i) { return frame->operands.buffers[i]->data; }
static void *result(const Frame *frame, int i) { return frame->results.buffers[i]->data; }

/* ---- Each returns 1, or 0 where there is no memory for sums. */

typedef struct {
    int64_t rank, type, y_type, cells, columns, together, is_centered, varies, is_given,
        is_training, threads;
} Numbers;

typedef struct {
    double count, epsilon;
} Reals;

/* x, and weights with counts if given; pivots, offsets and m2. */
static int moments(const Frame *frame, const int64_t *dims, const Numbers *n, const Reals *r) {
    return keras_bn_moments((int)n->rank, dims, operand(frame, 0), (int)n->type,
                            n->is_given ? operand(frame, 1) : NULL,
                            n->is_given ? operand(frame, 2) : NULL, r->count,
                            (int)n->is_centered, n->cells, result(frame, 0), (int)n->threads);
}

/* x, and gamma with beta if given; y, maps, and the rest of what `keras_bn_normalize` gives. */
static int normalize(const Frame *frame, const int64_t *dims, const Numbers *n, const Reals *r) {
    return keras_bn_normalize((int)n->rank, dims, operand(frame, 0), (int)n->type,
                              result(frame, 0), (int)n->y_type,
                              n->is_given ? operand(frame, 1) : NULL,
                              n->is_given ? operand(frame, 2) : NULL, (int)n->varies, r->count,
                              n->together, r->epsilon, (int)n->is_centered, n->cells, n->columns,
                              result(frame, 1), result(frame, 2), NULL, 0, NULL, NULL,
                              (int)n->is_training, (int)n->threads);
}

/* x, gamma with beta if given, maps and dy; dx, and the gradients of beta and gamma. */
static int gradients(const Frame *frame, const int64_t *dims, const Numbers *n, const Reals *r) {
    float *work = malloc((size_t)(3 * n->cells) * sizeof(float));
    int maps = n->is_given ? 3 : 1;
    int is_done = work
        && keras_bn_gradients((int)n->rank, dims, operand(frame, 0), (int)n->type,
                              operand(frame, maps + 1), (int)n->y_type, result(frame, 0),
                              (int)n->type, n->is_given ? operand(frame, 1) : NULL,
                              (int)n->varies, r->count, n->together, (int)n->is_centered,
                              n->cells, n->columns, operand(frame, maps), work,
                              result(frame, 1), (int)n->threads);
    free(work);
    return is_done;
}

static Error *called(Frame *frame, int (*body)(const Frame *, const int64_t *, const Numbers *,
                                               const Reals *)) {
    if (frame->extension && frame->extension->type == IS_METADATA) {
        Metadata *asked = (Metadata *)frame->extension;
        asked->metadata->version.major = 0, asked->metadata->version.minor = 1;
        return NULL;
    }
    if (body(frame, attribute(frame, "dims"), attribute(frame, "numbers"),
             attribute(frame, "reals")))
        return NULL;
    NewError error = {sizeof error, NULL, "keras_bn: no memory for sums", NO_MEMORY};
    return frame->api->error(&error);
}

Error *keras_bn_xla_moments(Frame *frame) { return called(frame, moments); }
Error *keras_bn_xla_normalize(Frame *frame) { return called(frame, normalize); }
Error *keras_bn_xla_gradients(Frame *frame) { return called(frame, gradients); }
