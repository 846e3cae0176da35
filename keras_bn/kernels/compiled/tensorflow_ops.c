/* The passes as operations of TensorFlow on the CPU, through its C interface.

   They are registered when `tf.load_op_library` loads this library. What is declared here is
   tensorflow/c/ops.h, kernels.h and tf_tensor.h, of which only this much is needed; it is stable. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "shape.h"

/* The operations promise float16; without it there shall be none, as without a compiler. */
#ifndef __FLT16_MAX__
#error "a compiler with _Float16 is needed (gcc 12, clang 15)"
#endif

typedef struct TF_Status TF_Status;
typedef struct TF_Tensor TF_Tensor;
typedef struct TF_OpDefinitionBuilder TF_OpDefinitionBuilder;
typedef struct TF_ShapeInferenceContext TF_ShapeInferenceContext;
typedef struct TF_ShapeHandle TF_ShapeHandle;
typedef struct TF_KernelBuilder TF_KernelBuilder;
typedef struct TF_OpKernelConstruction TF_OpKernelConstruction;
typedef struct TF_OpKernelContext TF_OpKernelContext;

extern TF_Status *TF_NewStatus(void);
extern void TF_DeleteStatus(TF_Status *);
extern void TF_SetStatus(TF_Status *, int code, const char *message);
extern int TF_GetCode(const TF_Status *);
extern TF_OpDefinitionBuilder *TF_NewOpDefinitionBuilder(const char *name);
extern void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder *, const char *);
extern void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder *, const char *);
extern void TF_OpDefinitionBuilderAddAttr(TF_OpDefinitionBuilder *, const char *);
extern void TF_OpDefinitionBuilderSetShapeInferenceFunction(
    TF_OpDefinitionBuilder *, void (*)(TF_ShapeInferenceContext *, TF_Status *));
extern void TF_RegisterOpDefinition(TF_OpDefinitionBuilder *, TF_Status *);
extern TF_ShapeHandle *TF_NewShapeHandle(void);
extern void TF_DeleteShapeHandle(TF_ShapeHandle *);
extern void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext *, int, TF_ShapeHandle *,
                                             TF_Status *);
extern void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext *, int, TF_ShapeHandle *,
                                              TF_Status *);
extern TF_KernelBuilder *TF_NewKernelBuilder(const char *name, const char *device,
                                             void *(*create)(TF_OpKernelConstruction *),
                                             void (*compute)(void *, TF_OpKernelContext *),
                                             void (*destroy)(void *));
extern void TF_RegisterKernelBuilder(const char *name, TF_KernelBuilder *, TF_Status *);
extern void TF_OpKernelConstruction_GetAttrSize(TF_OpKernelConstruction *, const char *,
                                                int32_t *length, int32_t *bytes, TF_Status *);
extern void TF_OpKernelConstruction_GetAttrInt64List(TF_OpKernelConstruction *, const char *,
                                                     int64_t *, int, TF_Status *);
extern void TF_OpKernelConstruction_GetAttrInt64(TF_OpKernelConstruction *, const char *,
                                                 int64_t *, TF_Status *);
extern void TF_OpKernelConstruction_GetAttrFloat(TF_OpKernelConstruction *, const char *, float *,
                                                 TF_Status *);
extern void TF_OpKernelConstruction_GetAttrBool(TF_OpKernelConstruction *, const char *,
                                                unsigned char *, TF_Status *);
extern void TF_OpKernelConstruction_GetAttrType(TF_OpKernelConstruction *, const char *, int *,
                                                TF_Status *);
extern void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction *, TF_Status *);
extern void TF_OpKernelContext_Failure(TF_OpKernelContext *, TF_Status *);
extern int TF_NumInputs(TF_OpKernelContext *);
extern void TF_GetInput(TF_OpKernelContext *, int, TF_Tensor **, TF_Status *);
extern TF_Tensor *TF_AllocateOutput(TF_OpKernelContext *, int, int dtype, const int64_t *dims,
                                    int rank, size_t bytes, TF_Status *);
extern void TF_DeleteTensor(TF_Tensor *);
extern int TF_TensorType(const TF_Tensor *);
extern int TF_NumDims(const TF_Tensor *);
extern int64_t TF_Dim(const TF_Tensor *, int);
extern int64_t TF_TensorElementCount(const TF_Tensor *);
extern void *TF_TensorData(const TF_Tensor *);

/* TF_FLOAT, TF_BFLOAT16, TF_HALF; TF_INVALID_ARGUMENT and TF_INTERNAL. */
static const int DTYPES[] = {1, 14, 19};
enum { BAD_ARGUMENT = 3, INTERNAL = 13, MOST_INPUTS = 7 };

typedef struct {
    int64_t mask, together, threads;
    int type;
    float epsilon;
    unsigned char is_centered, varies, is_corrected, merges;
} Options;

static int of_dtype(int dtype) {
    for (int type = 0; type < 3; type++)
        if (DTYPES[type] == dtype) return type;
    return FLOAT;
}

static void *create(TF_OpKernelConstruction *construction) {
    TF_Status *status = TF_NewStatus();
    Options *options = calloc(1, sizeof *options);
    int64_t axes[RANK];
    int32_t number, bytes;
    TF_OpKernelConstruction_GetAttrSize(construction, "axes", &number, &bytes, status);
    if (number > RANK) TF_SetStatus(status, BAD_ARGUMENT, "too many axes");
    if (!TF_GetCode(status))
        TF_OpKernelConstruction_GetAttrInt64List(construction, "axes", axes, number, status);
    for (int i = 0; i < number && !TF_GetCode(status); i++) options->mask |= (int64_t)1 << axes[i];
    TF_OpKernelConstruction_GetAttrInt64(construction, "together", &options->together, status);
    TF_OpKernelConstruction_GetAttrInt64(construction, "threads", &options->threads, status);
    TF_OpKernelConstruction_GetAttrFloat(construction, "epsilon", &options->epsilon, status);
    TF_OpKernelConstruction_GetAttrBool(construction, "is_centered", &options->is_centered, status);
    TF_OpKernelConstruction_GetAttrBool(construction, "varies", &options->varies, status);
    TF_OpKernelConstruction_GetAttrBool(construction, "is_corrected", &options->is_corrected,
                                        status);
    TF_OpKernelConstruction_GetAttrBool(construction, "merges", &options->merges, status);
    TF_OpKernelConstruction_GetAttrType(construction, "U", &options->type, status);
    if (TF_GetCode(status)) TF_OpKernelConstruction_Failure(construction, status);
    TF_DeleteStatus(status);
    return options;
}

static void read_sizes(const TF_Tensor *tensor, int64_t *size) {
    for (int i = 0; i < TF_NumDims(tensor); i++) size[i] = TF_Dim(tensor, i);
}

/* Without what there is for each cell, axes are summed over. */
static Shape shape_with(const Options *options, const TF_Tensor *x, const TF_Tensor *gamma,
                        const TF_Tensor *weights, const TF_Tensor *cells) {
    int64_t size[RANK], cell[RANK], column[RANK], weight[RANK];
    read_sizes(x, size);
    if (cells) read_sizes(cells, cell);
    if (gamma) read_sizes(gamma, column);
    if (weights) read_sizes(weights, weight);
    return shape_of(TF_NumDims(x), size, cells ? cell : NULL, gamma ? column : NULL,
                    weights ? weight : NULL, options->mask);
}

/* Allocate so many parts of what there is for each cell or column. */
static float *parts_of(TF_OpKernelContext *context, int output, int64_t parts, int64_t *dims,
                       int rank, int64_t number, TF_Tensor **made, TF_Status *status) {
    dims[0] = parts;
    size_t bytes = (size_t)(parts * number) * sizeof(float);
    *made = TF_AllocateOutput(context, output, DTYPES[FLOAT], dims, rank + 1, bytes, status);
    if (TF_GetCode(status)) return NULL;
    return memset(TF_TensorData(*made), 0, bytes);
}

typedef struct {
    TF_OpKernelContext *context;
    TF_Status *status;
    TF_Tensor *inputs[MOST_INPUTS], *outputs[3];
} Call;

static Call call_of(TF_OpKernelContext *context) {
    Call call = {context, TF_NewStatus(), {NULL}, {NULL}};
    for (int i = 0; i < TF_NumInputs(context) && i < MOST_INPUTS && !TF_GetCode(call.status); i++)
        TF_GetInput(context, i, &call.inputs[i], call.status);
    if (!TF_GetCode(call.status) && TF_NumDims(call.inputs[0]) > RANK)
        TF_SetStatus(call.status, BAD_ARGUMENT, "too many axes");
    return call;
}

static void finish(Call *call, int is_done) {
    if (!is_done && !TF_GetCode(call->status))
        TF_SetStatus(call->status, INTERNAL, "no memory for sums");
    if (TF_GetCode(call->status)) TF_OpKernelContext_Failure(call->context, call->status);
    for (int i = 0; i < MOST_INPUTS; i++)
        if (call->inputs[i]) TF_DeleteTensor(call->inputs[i]);
    for (int i = 0; i < 3; i++)
        if (call->outputs[i]) TF_DeleteTensor(call->outputs[i]);
    TF_DeleteStatus(call->status);
}

/* Allocate what has the shape of the input. */
static char *like_input(Call *call, const Shape *shape, int type) {
    call->outputs[0] = TF_AllocateOutput(call->context, 0, DTYPES[type], shape->size, shape->rank,
                                         (size_t)(shape->elements * WIDTH[type]), call->status);
    return TF_GetCode(call->status) ? NULL : TF_TensorData(call->outputs[0]);
}

static void *data_of(const Call *call, int input) {
    return call->inputs[input] ? TF_TensorData(call->inputs[input]) : NULL;
}

/* What sets are corrected towards, and the limits, are the last inputs. */
static void normalize(void *kernel, TF_OpKernelContext *context) {
    const Options *options = kernel;
    Call call = call_of(context);
    int is_done = 0, kept = options->is_corrected ? TF_NumInputs(context) - 3 : 0;
    if (!TF_GetCode(call.status)) {
        TF_Tensor *x = call.inputs[0];
        int is_learned = kept != 1;
        Shape shape = shape_with(options, x, is_learned ? call.inputs[1] : NULL, NULL, NULL);
        int type = of_dtype(options->type);
        double limits[3] = {0};
        for (int i = 0; kept && i < 3; i++) limits[i] = ((float *)data_of(&call, kept + 2))[i];
        char *y = like_input(&call, &shape, type);
        float *affine = parts_of(context, 1, kept ? 5 : 3, shape.sums, shape.rank, shape.cells,
                                 &call.outputs[1], call.status);
        int64_t merged = options->merges ? merge_sets(&shape) : 0;
        float *rest = parts_of(context, 2, merged ? 3 : 2, shape.sums, shape.rank,
                               merged ? merged : shape.cells, &call.outputs[2], call.status);
        is_done = !shape.elements;
        if (!TF_GetCode(call.status) && !is_done)
            is_done = keras_bn_normalize(
                shape.rank, shape.dims, TF_TensorData(x), of_dtype(TF_TensorType(x)), y, type,
                is_learned ? data_of(&call, 1) : NULL, is_learned ? data_of(&call, 2) : NULL,
                options->varies, (double)shape.elements / shape.cells, options->together,
                options->epsilon, options->is_centered, shape.cells, shape.number, affine, rest,
                merged, kept ? data_of(&call, kept) : NULL, kept ? data_of(&call, kept + 1) : NULL,
                kept ? TF_TensorElementCount(call.inputs[kept]) : 0, limits, 1,
                (int)options->threads);
    }
    finish(&call, is_done);
}

static void gradients(void *kernel, TF_OpKernelContext *context) {
    const Options *options = kernel;
    Call call = call_of(context);
    int is_done = 0, gamma = TF_NumInputs(context) > 3 ? 3 : 0;
    if (!TF_GetCode(call.status)) {
        TF_Tensor *x = call.inputs[0], *dy = call.inputs[1];
        Shape shape = shape_with(options, x, gamma ? call.inputs[gamma] : NULL, NULL, NULL);
        int type = of_dtype(TF_TensorType(x));
        char *dx = like_input(&call, &shape, type);
        float *learned = parts_of(context, 1, 2, shape.columns, shape.rank, shape.number,
                                  &call.outputs[1], call.status);
        is_done = !shape.elements;
        if (!TF_GetCode(call.status) && !is_done)
            is_done = keras_bn_gradients(
                shape.rank, shape.dims, TF_TensorData(x), type, TF_TensorData(dy),
                of_dtype(TF_TensorType(dy)), dx, type,
                gamma ? data_of(&call, gamma) : NULL, options->varies,
                (double)shape.elements / shape.cells, options->together, options->is_centered,
                shape.cells, shape.number, TF_TensorData(call.inputs[2]),
                options->is_corrected, learned, (int)options->threads);
    }
    finish(&call, is_done);
}

/* Say whether some inputs have an element for each cell. */
static int are_of_cells(Call *call, int first, int last, const Shape *shape) {
    for (int i = first; i <= last; i++)
        if (TF_TensorElementCount(call->inputs[i]) != shape->cells)
            TF_SetStatus(call->status, BAD_ARGUMENT, "parts of a map must have one shape");
    return !TF_GetCode(call->status);
}

static void moments(void *kernel, TF_OpKernelContext *context) {
    const Options *options = kernel;
    Call call = call_of(context);
    int is_done = 0;
    if (!TF_GetCode(call.status)) {
        TF_Tensor *x = call.inputs[0];
        Shape shape = shape_with(options, x, NULL, call.inputs[1], NULL);
        float *found = parts_of(context, 0, 3, shape.sums, shape.rank, shape.cells,
                                &call.outputs[0], call.status);
        is_done = !shape.elements;
        if (found && !is_done)
            is_done = keras_bn_moments(
                shape.rank, shape.dims, TF_TensorData(x), of_dtype(TF_TensorType(x)),
                data_of(&call, 1), data_of(&call, 2),
                (double)shape.elements / shape.cells, options->is_centered, shape.cells, found,
                (int)options->threads);
    }
    finish(&call, is_done);
}

static void products(void *kernel, TF_OpKernelContext *context) {
    const Options *options = kernel;
    Call call = call_of(context);
    int is_done = 0;
    if (!TF_GetCode(call.status)) {
        TF_Tensor *x = call.inputs[0], *dy = call.inputs[1];
        Shape shape = shape_with(options, x, NULL, NULL, call.inputs[2]);
        float *found = parts_of(context, 0, 2, shape.sums, shape.rank, shape.cells,
                                &call.outputs[0], call.status);
        is_done = !shape.elements;
        if (found && !is_done)
            is_done = keras_bn_products(shape.rank, shape.dims, TF_TensorData(x),
                                        of_dtype(TF_TensorType(x)), TF_TensorData(dy),
                                        of_dtype(TF_TensorType(dy)), data_of(&call, 2),
                                        shape.cells, found, (int)options->threads);
    }
    finish(&call, is_done);
}

static void map_by_cells(void *kernel, TF_OpKernelContext *context) {
    const Options *options = kernel;
    Call call = call_of(context);
    int is_done = 0;
    if (!TF_GetCode(call.status)) {
        TF_Tensor *x = call.inputs[0];
        Shape shape = shape_with(options, x, NULL, NULL, call.inputs[1]);
        int type = of_dtype(options->type);
        char *y = like_input(&call, &shape, type);
        is_done = !shape.elements;
        if (y && !is_done && are_of_cells(&call, 1, 3, &shape))
            is_done = keras_bn_map(shape.rank, shape.dims, TF_TensorData(x),
                                   of_dtype(TF_TensorType(x)), y, type, data_of(&call, 1),
                                   data_of(&call, 2), data_of(&call, 3), NULL, NULL, 1,
                                   (int)options->threads);
    }
    finish(&call, is_done);
}

static void combined(void *kernel, TF_OpKernelContext *context) {
    const Options *options = kernel;
    Call call = call_of(context);
    int is_done = 0;
    if (!TF_GetCode(call.status)) {
        TF_Tensor *x = call.inputs[0], *dy = call.inputs[1];
        Shape shape = shape_with(options, x, NULL, call.inputs[6], call.inputs[2]);
        int type = of_dtype(TF_TensorType(x));
        char *dx = like_input(&call, &shape, type);
        is_done = !shape.elements;
        if (dx && !is_done && are_of_cells(&call, 2, 5, &shape))
            is_done = keras_bn_combined(
                shape.rank, shape.dims, TF_TensorData(x), type, TF_TensorData(dy),
                of_dtype(TF_TensorType(dy)), dx, type, data_of(&call, 6),
                data_of(&call, 2), data_of(&call, 3), data_of(&call, 4),
                data_of(&call, 5), NULL, (int)options->threads);
    }
    finish(&call, is_done);
}

/* Leave the shape of sums to the caller, who knows it. */
static void infer_nothing(TF_ShapeInferenceContext *context, TF_Status *status) {
    (void)context, (void)status;
}

/* The first output has the shape of the first input; the caller knows those of the others. */
static void infer(TF_ShapeInferenceContext *context, TF_Status *status) {
    TF_ShapeHandle *shape = TF_NewShapeHandle();
    TF_ShapeInferenceContextGetInput(context, 0, shape, status);
    if (!TF_GetCode(status)) TF_ShapeInferenceContextSetOutput(context, 0, shape, status);
    TF_DeleteShapeHandle(shape);
}

/* Inputs are x, maybe dy, and what there is for each cell or column; what may be absent is last. */
static void declare(const char *name, const char *const *outputs, int is_backward,
                    void (*compute)(void *, TF_OpKernelContext *),
                    void (*shapes)(TF_ShapeInferenceContext *, TF_Status *)) {
    static const char *const options[] = {
        "T: {float, bfloat16, half}", "U: {float, bfloat16, half} = DT_FLOAT", "N: int >= 0",
        "axes: list(int) = []", "together: int = 1", "epsilon: float = 0.0",
        "is_centered: bool = true", "varies: bool = false", "is_corrected: bool = false",
        "merges: bool = false", "threads: int", NULL};
    TF_Status *status = TF_NewStatus();
    TF_OpDefinitionBuilder *definition = TF_NewOpDefinitionBuilder(name);
    TF_OpDefinitionBuilderAddInput(definition, "x: T");
    if (is_backward) TF_OpDefinitionBuilderAddInput(definition, "dy: U");
    TF_OpDefinitionBuilderAddInput(definition, "others: N * float");
    for (int i = 0; outputs[i]; i++) TF_OpDefinitionBuilderAddOutput(definition, outputs[i]);
    for (int i = 0; options[i]; i++) TF_OpDefinitionBuilderAddAttr(definition, options[i]);
    TF_OpDefinitionBuilderSetShapeInferenceFunction(definition, shapes);
    TF_RegisterOpDefinition(definition, status);
    TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", create, compute, free), status);
    TF_DeleteStatus(status);
}

__attribute__((constructor)) static void declare_all(void) {
    const char *const sums[] = {"sums: float", NULL}, *const y[] = {"y: U", NULL};
    const char *const dx[] = {"dx: T", NULL};
    const char *const normalized[] = {"y: U", "affine: float", "rest: float", NULL};
    const char *const slopes[] = {"dx: T", "d_learned: float", NULL};
    declare("KerasBnMoments", sums, 0, moments, infer_nothing);
    declare("KerasBnProducts", sums, 1, products, infer_nothing);
    declare("KerasBnMap", y, 0, map_by_cells, infer);
    declare("KerasBnCombined", dx, 1, combined, infer);
    declare("KerasBnNormalize", normalized, 0, normalize, infer);
    declare("KerasBnGradients", slopes, 1, gradients, infer);
    keras_bn_register_calls();
}
