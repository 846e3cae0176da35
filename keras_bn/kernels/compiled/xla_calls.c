/* The passes as custom calls of XLA, by its foreign function interface (xla/ffi/api/c_api.h, version
   0.1 and later; its structures are stated here, so that nothing of XLA is needed to compile).

   What a call does is in two attributes, `numbers` and `epsilon`; kernels/jax/compiled.py and
   kernels/tensorflow/calls.py write them. Operands and results are dense. What may be absent comes
   last; operands beyond those named here have told XLA the results' shapes. */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "shape.h"

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
    const char *text;
    size_t length;
} Name;

typedef struct Frame Frame;

typedef struct {
    size_t bytes;
    Extension *extension;
    Name name, platform;
    Error *(*stages[4])(Frame *); /* the last is that of the call */
    uint32_t traits;
} Registration;

typedef struct {
    size_t bytes;
    Extension *extension;
    Version version;
    const void *internal;
    Error *(*error)(NewError *);
    void *others[2]; /* what an error says, and the end of one */
    Error *(*add)(Registration *);
} Api;

typedef struct {
    size_t bytes;
    Extension *extension;
    int dtype;
    void *data;
    int64_t rank, *dims;
} Buffer;

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

struct Frame {
    size_t bytes;
    Extension *extension;
    const Api *api;
    void *context;
    int stage;
    Buffers operands, results;
    Attributes attributes;
};

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

/* F16, F32 and BF16 of XLA. */
static int type_of(const Buffer *buffer) {
    return buffer->dtype == 10 ? HALF : buffer->dtype == 16 ? BFLOAT : FLOAT;
}

/* ---- Each returns 1, or 0 where there are too many axes, or no memory for sums. */

typedef struct {
    int64_t mask, together, is_centered, is_given, varies, is_training, is_corrected, merges;
    int64_t threads;
} Numbers;

typedef struct {
    const Frame *frame;
    Numbers is;
    double epsilon, count;
    Shape shape;
    int x_type;
} Call;

/* Operands that have the sizes of what there is for each cell, of gamma and of the weights; 0 for
   none, where the axes of the mask are summed over and there is neither. */
static Call call_of(const Frame *frame, int cell, int gamma, int weight) {
    Buffer **of = frame->operands.buffers;
    Call call = {frame, *(const Numbers *)attribute(frame, "numbers"),
                 *(const double *)attribute(frame, "epsilon")};
    call.shape = shape_of((int)of[0]->rank, of[0]->dims, cell ? of[cell]->dims : NULL,
                          gamma && call.is.is_given ? of[gamma]->dims : NULL,
                          weight && call.is.is_given ? of[weight]->dims : NULL, call.is.mask);
    call.count = (double)call.shape.elements / (double)call.shape.cells;
    call.x_type = type_of(of[0]);
    return call;
}

static void *further(const Call *call, int i) {
    return call->is.is_given ? operand(call->frame, i) : NULL;
}

static int64_t elements_of(const Buffer *buffer) {
    int64_t elements = 1;
    for (int64_t axis = 0; axis < buffer->rank; axis++) elements *= buffer->dims[axis];
    return elements;
}

static int is_empty(const Call *call) {
    if (call->shape.elements) return 0;
    for (int64_t i = 0; i < call->frame->results.size; i++) {
        const Buffer *found = call->frame->results.buffers[i];
        int64_t elements = elements_of(found);
        if (elements) memset(found->data, 0, (size_t)elements * sizeof(float)); /* a small one */
    }
    return 1;
}

/* x, weights and counts; pivots, offsets and m2. */
static int moments(const Frame *frame) {
    Call call = call_of(frame, 0, 0, 1);
    const Shape *of = &call.shape;
    return is_empty(&call)
        || keras_bn_moments(of->rank, of->dims, operand(frame, 0), call.x_type, further(&call, 1),
                            further(&call, 2), call.count, (int)call.is.is_centered, of->cells,
                            result(frame, 0), (int)call.is.threads);
}

/* x, dy and centers; Σ dy and Σ dy·(x - center). */
static int products(const Frame *frame) {
    Call call = call_of(frame, 2, 0, 0);
    const Shape *of = &call.shape;
    return is_empty(&call)
        || keras_bn_products(of->rank, of->dims, operand(frame, 0), call.x_type,
                             operand(frame, 1), type_of(frame->operands.buffers[1]),
                             operand(frame, 2), of->cells, result(frame, 0),
                             (int)call.is.threads);
}

/* x, centers, scales and shifts; y. */
static int map_by_cells(const Frame *frame) {
    Call call = call_of(frame, 1, 0, 0);
    const Shape *of = &call.shape;
    return is_empty(&call)
        || keras_bn_map(of->rank, of->dims, operand(frame, 0), call.x_type, result(frame, 0),
                        type_of(frame->results.buffers[0]), operand(frame, 1), operand(frame, 2),
                        operand(frame, 3), NULL, NULL, (int)call.is.is_training,
                        (int)call.is.threads);
}

/* x, dy, centers, slopes, levels, factors and weights; dx. */
static int combined(const Frame *frame) {
    Call call = call_of(frame, 2, 0, 6);
    const Shape *of = &call.shape;
    return is_empty(&call)
        || keras_bn_combined(of->rank, of->dims, operand(frame, 0), call.x_type, operand(frame, 1),
                             type_of(frame->operands.buffers[1]), result(frame, 0), call.x_type,
                             further(&call, 6), operand(frame, 2), operand(frame, 3),
                             operand(frame, 4), operand(frame, 5), NULL, (int)call.is.threads);
}

/* x, gamma and beta, and maybe what to correct towards, with the limits; y, and what
   `keras_bn_normalize` writes into affine and rest. */
static int normalize(const Frame *frame) {
    Call call = call_of(frame, 0, 1, 0);
    const Shape *of = &call.shape;
    int kept = !call.is.is_corrected ? 0 : call.is.is_given ? 3 : 1;
    double limits[3] = {0};
    for (int i = 0; kept && i < 3; i++) limits[i] = ((float *)operand(frame, kept + 2))[i];
    return is_empty(&call)
        || keras_bn_normalize(of->rank, of->dims, operand(frame, 0), call.x_type, result(frame, 0),
                              type_of(frame->results.buffers[0]), further(&call, 1),
                              further(&call, 2), (int)call.is.varies, call.count,
                              call.is.together, call.epsilon, (int)call.is.is_centered, of->cells,
                              of->number, result(frame, 1), result(frame, 2),
                              call.is.merges ? merge_sets(&call.shape) : 0,
                              kept ? operand(frame, kept) : NULL,
                              kept ? operand(frame, kept + 1) : NULL,
                              kept ? elements_of(frame->operands.buffers[kept]) : 0, limits,
                              (int)call.is.is_training, (int)call.is.threads);
}

/* x, dy, what `keras_bn_normalize` wrote into affine, and gamma; dx, and the gradients of beta and
   gamma. */
static int gradients(const Frame *frame) {
    Call call = call_of(frame, 0, 3, 0);
    const Shape *of = &call.shape;
    return is_empty(&call)
        || keras_bn_gradients(of->rank, of->dims, operand(frame, 0), call.x_type,
                              operand(frame, 1), type_of(frame->operands.buffers[1]),
                              result(frame, 0), call.x_type, further(&call, 3),
                              (int)call.is.varies, call.count, call.is.together,
                              (int)call.is.is_centered, of->cells, of->number, operand(frame, 2),
                              (int)call.is.is_corrected, result(frame, 1),
                              (int)call.is.threads);
}

static Error *called(Frame *frame, int (*body)(const Frame *)) {
    if (frame->extension && frame->extension->type == IS_METADATA) {
        Metadata *asked = (Metadata *)frame->extension;
        asked->metadata->version.major = 0, asked->metadata->version.minor = 1;
        return NULL;
    }
    if (body(frame)) return NULL;
    NewError error = {sizeof error, NULL, "keras_bn: too many axes, or no memory for sums",
                      NO_MEMORY};
    return frame->api->error(&error);
}

Error *keras_bn_xla_moments(Frame *frame) { return called(frame, moments); }
Error *keras_bn_xla_products(Frame *frame) { return called(frame, products); }
Error *keras_bn_xla_map(Frame *frame) { return called(frame, map_by_cells); }
Error *keras_bn_xla_combined(Frame *frame) { return called(frame, combined); }
Error *keras_bn_xla_normalize(Frame *frame) { return called(frame, normalize); }
Error *keras_bn_xla_gradients(Frame *frame) { return called(frame, gradients); }

extern const Api *XLA_FFI_GetApi(void) __attribute__((weak));

void keras_bn_register_calls(void) {
    const struct {
        const char *name;
        Error *(*handler)(Frame *);
    } calls[] = {{"keras_bn_moments", keras_bn_xla_moments},
                 {"keras_bn_products", keras_bn_xla_products},
                 {"keras_bn_map", keras_bn_xla_map},
                 {"keras_bn_combined", keras_bn_xla_combined},
                 {"keras_bn_normalize", keras_bn_xla_normalize},
                 {"keras_bn_gradients", keras_bn_xla_gradients}};
    if (!XLA_FFI_GetApi || XLA_FFI_GetApi()->version.major) return; /* or it is another one */
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        Registration registration = {sizeof registration, NULL,
                                     {calls[i].name, strlen(calls[i].name)}, {"Host", 4},
                                     {NULL, NULL, NULL, calls[i].handler}, 0};
        XLA_FFI_GetApi()->add(&registration);
    }
}
