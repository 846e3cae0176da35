/* The passes as operations of PyTorch on the CPU, through its stable C interface (2.10 and later;
   torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, of which only this much
   is needed). Its functions are looked up in what the process has loaded, so that nothing of
   PyTorch is needed to compile.

   kernels/torch/operations.py says what each operation takes, in the order of the values on its
   stack, and what it gives. What may be absent is in a list; what is small is dense. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "calls.h"
#include "shape.h"

typedef struct Tensor Tensor;
typedef struct List List;
typedef struct Library Library;
/* An argument or a result: a handle, a whole number, or the bits of a real one. */
typedef uint64_t Value;
typedef void Operation(Value *stack, uint64_t inputs, uint64_t outputs);

/* Those that do something return 0, or another number after an error; the check raises one. */
#define FUNCTIONS(known)                                                                           \
    known(int, aoti_torch_library_init_impl,                                                       \
          (const char *space, const char *key, const char *file, uint32_t line, Library **))       \
    known(int, torch_library_impl, (Library *, const char *name, Operation *, uint64_t version))   \
    known(int, torch_call_dispatcher,                                                              \
          (const char *name, const char *overload, Value *stack, uint64_t version))                \
    known(int, torch_get_num_threads, (uint32_t *))                                                \
    known(int, torch_list_size, (List *, size_t *))                                                \
    known(int, torch_list_get_item, (List *, size_t, Value *))                                     \
    known(int, torch_delete_list, (List *))                                                        \
    known(int, aoti_torch_new_tensor_handle, (Tensor *, Tensor **))                                \
    known(int, aoti_torch_delete_tensor_object, (Tensor *))                                        \
    known(int, aoti_torch_get_dim, (Tensor *, int64_t *))                                          \
    known(int, aoti_torch_get_sizes, (Tensor *, int64_t **))                                       \
    known(int, aoti_torch_get_strides, (Tensor *, int64_t **))                                     \
    known(int, aoti_torch_get_dtype, (Tensor *, int32_t *))                                        \
    known(int, aoti_torch_get_data_ptr, (Tensor *, void **))                                       \
    known(int, aoti_torch_empty_strided,                                                           \
          (int64_t rank, const int64_t *sizes, const int64_t *strides, int32_t dtype,              \
           int32_t device, int32_t index, Tensor **))                                              \
    known(int, aoti_torch_copy_, (Tensor *to, Tensor *from, int32_t is_asynchronous))              \
    known(int32_t, aoti_torch_dtype_float32, (void))                                               \
    known(int32_t, aoti_torch_dtype_bfloat16, (void))                                              \
    known(int32_t, aoti_torch_dtype_float16, (void))                                               \
    known(int32_t, aoti_torch_device_type_cpu, (void))                                             \
    known(void, aoti_torch_check,                                                                  \
          (_Bool, const char *function, const char *file, uint32_t line, const char *message))

#define MEMBER(type, name, arguments) type(*name) arguments;
typedef struct { FUNCTIONS(MEMBER) } Functions;
static Functions torch;

/* The version of the interface that is used here, 2.10. */
static const uint64_t VERSION = (uint64_t)2 << 56 | (uint64_t)10 << 48;
/* How PyTorch numbers dtypes, in the order of calls.h. */
static int32_t dtypes[3];

enum { MOST_TENSORS = 16, MOST_RESULTS = 3, IN_LIST = 3 };

/* A tensor; `type` is less than 0 for a dtype that the passes do not take. */
typedef struct {
    Tensor *tensor;
    int64_t rank, *size, *step;
    int type;
    void *data;
} Array;

/* What a call works on, `big` by the operands of calls.h, and what it holds and has made. An error
   is remembered, and told when all is released. */
typedef struct {
    Value *stack;
    Array big[Y + 1];
    Shape shape;
    int64_t order[RANK]; /* strides of a tensor without gaps, with the axes in the order of x */
    Tensor *held[MOST_TENSORS], *made[MOST_RESULTS];
    int number, results, tries, has_failed;
} Call;

static int type_of(int32_t dtype) {
    for (int type = FLOAT; type <= HALF; type++)
        if (dtypes[type] == dtype) return type;
    return -1;
}

static Array array_of(Call *call, Tensor *tensor) {
    Array array = {tensor};
    int32_t dtype = 0;
    call->has_failed |= !tensor || torch.aoti_torch_get_dim(tensor, &array.rank) ||
                        torch.aoti_torch_get_sizes(tensor, &array.size) ||
                        torch.aoti_torch_get_strides(tensor, &array.step) ||
                        torch.aoti_torch_get_dtype(tensor, &dtype) ||
                        torch.aoti_torch_get_data_ptr(tensor, &array.data);
    array.type = type_of(dtype);
    return array;
}

static Array hold(Call *call, Tensor *tensor) {
    if (tensor) call->held[call->number++] = tensor;
    return array_of(call, tensor);
}

/* ---- Arguments. */

static Array given(Call *call, int argument) {
    return hold(call, (Tensor *)call->stack[argument]);
}

/* Read the tensors of a list; those that it lacks have no data. */
static void read_list(Call *call, int argument, Array *arrays) {
    List *list = (List *)call->stack[argument];
    size_t number = 0;
    call->has_failed |= torch.torch_list_size(list, &number);
    for (size_t i = 0; i < IN_LIST; i++) {
        Value item = 0;
        arrays[i] = (Array){NULL};
        if (i >= number) continue;
        call->has_failed |= torch.torch_list_get_item(list, i, &item);
        arrays[i] = hold(call, (Tensor *)item);
    }
    call->has_failed |= torch.torch_delete_list(list);
}

static double real(const Call *call, int argument) {
    double number;
    memcpy(&number, call->stack + argument, sizeof number);
    return number;
}

static int truth(const Call *call, int argument) { return call->stack[argument] & 1; }

static int threads(void) {
    uint32_t number;
    return torch.torch_get_num_threads(&number) ? 1 : (int)number;
}

/* ---- Memory. */

static int64_t elements_of(const Array *x) {
    int64_t elements = 1;
    for (int i = 0; i < x->rank; i++) elements *= x->size[i];
    return elements;
}

/* Say whether the elements lie in memory without gaps, whatever the order of the axes. */
static int is_dense(const Array *x) {
    int64_t step = 1;
    for (int found = 1; found;) {
        found = 0;
        for (int i = 0; i < x->rank && !found; i++)
            if (x->size[i] > 1 && x->step[i] == step) step *= x->size[i], found = 1;
    }
    return step == elements_of(x);
}

/* Find the order in which PyTorch lays what is like x. */
static void find_order(Call *call, const Array *x) {
    Value stack[6] = {0}; /* the tensor; no dtype, layout, device, pinning or format */
    Array like = *x;
    if (!call->has_failed && !is_dense(x)) {
        Tensor *own = NULL;
        call->has_failed |= torch.aoti_torch_new_tensor_handle(x->tensor, &own);
        stack[0] = (Value)own;
        if (!call->has_failed)
            call->has_failed |=
                torch.torch_call_dispatcher("aten::empty_like", "", stack, VERSION);
        if (!call->has_failed) like = hold(call, (Tensor *)stack[0]);
    }
    if (!call->has_failed) memcpy(call->order, like.step, x->rank * sizeof(int64_t));
}

static Tensor *empty(Call *call, int64_t rank, const int64_t *size, const int64_t *step, int type) {
    Tensor *made = NULL;
    call->has_failed |= type < 0;
    if (!call->has_failed)
        call->has_failed |= torch.aoti_torch_empty_strided(
            rank, size, step, dtypes[type], torch.aoti_torch_device_type_cpu(), 0, &made);
    return made;
}

static void write_dense(int64_t *step, const int64_t *size, int rank) {
    int64_t number = 1;
    for (int i = rank - 1; i >= 0; number *= size[i--]) step[i] = number;
}

/* Make the result that is like the input. */
static void make_like(Call *call, int type) {
    const Array *x = &call->big[X];
    find_order(call, x);
    Tensor *made = empty(call, x->rank, x->size, call->order, type);
    call->made[call->results++] = made;
    call->big[Y] = array_of(call, made);
}

/* Make a result of so many parts of what there is for each cell or column. */
static float *make(Call *call, int64_t parts, int64_t *sizes) {
    int64_t step[RANK + 1];
    sizes[0] = parts;
    write_dense(step, sizes, call->shape.rank + 1);
    Tensor *made = empty(call, call->shape.rank + 1, sizes, step, FLOAT);
    call->made[call->results++] = made;
    return array_of(call, made).data;
}

static int is_laid(const Array *x, const int64_t *step) {
    return !memcmp(x->step, step, x->rank * sizeof(int64_t));
}

/* Put an operand into memory with other strides; of a result, the values come later. */
static void lay(Call *call, int operand, const int64_t *step, int type) {
    Array *x = &call->big[operand];
    if (call->has_failed || (x->type == type && is_laid(x, step))) return;
    Array copy = hold(call, empty(call, x->rank, x->size, step, type));
    if (!call->has_failed && operand != Y)
        call->has_failed |= torch.aoti_torch_copy_(copy.tensor, x->tensor, 0);
    *x = copy;
}

/* Say whether to try a pass: on the tensors as they lie, and then, for the passes may not take them
   so, with the last axis as lines. */
static int is_worth_a_try(Call *call) {
    int64_t step[RANK];
    write_dense(step, call->shape.size, call->shape.rank);
    for (int operand = X; operand <= Y && !call->has_failed; operand++) {
        Array *x = &call->big[operand];
        if (!x->tensor) continue;
        if (call->tries) lay(call, operand, step, x->type);
        int64_t *row = call->shape.dims + (operand + 1) * call->shape.rank;
        if (!call->has_failed) memcpy(row, x->step, x->rank * sizeof(int64_t));
    }
    return !call->has_failed && call->tries++ < 2;
}

static Call call_of(Value *stack) {
    Call call = {stack};
    call.big[X] = given(&call, 0);
    if (call.big[X].rank > RANK) call.big[X].rank = 0, call.has_failed = 1;
    return call;
}

static void finish(Call *call, int is_done) {
    Tensor *y = call->big[Y].tensor;
    if (is_done && y && y != call->made[0])
        call->has_failed |= torch.aoti_torch_copy_(call->made[0], y, 0);
    int has_failed = call->has_failed || !is_done;
    for (int i = 0; i < call->number; i++) torch.aoti_torch_delete_tensor_object(call->held[i]);
    for (int i = 0; i < call->results; i++) {
        if (!has_failed) call->stack[i] = (Value)call->made[i];
        else if (call->made[i]) torch.aoti_torch_delete_tensor_object(call->made[i]);
    }
    if (has_failed)
        torch.aoti_torch_check(0, __func__, "torch_ops.c", __LINE__,
                               "keras_bn: no memory, or a tensor that the passes do not take");
}

/* ---- The operations. */

static Shape shape_with(const Call *call, const int64_t *cell, const int64_t *column,
                        const int64_t *weight, int64_t axes) {
    return shape_of((int)call->big[X].rank, call->big[X].size, cell, column, weight, axes);
}

static void normalize(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], *y = &call.big[Y], learned[IN_LIST], kept[IN_LIST];
    read_list(&call, 1, learned);
    read_list(&call, 2, kept);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, NULL, learned[0].size, NULL, (int64_t)stack[3]);
    make_like(&call, type_of((int32_t)stack[10]));
    float *affine = make(&call, kept->data ? 5 : 3, shape->sums);
    int64_t merged = truth(&call, 9) ? merge_sets(shape) : 0;
    float *rest = make(&call, merged ? 3 : 2, shape->sums);
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_normalize(
            shape->rank, shape->dims, x->data, x->type, y->data, y->type, learned[0].data,
            learned[1].data, truth(&call, 4), (double)shape->elements / shape->cells,
            (int64_t)stack[5], real(&call, 6), truth(&call, 7), shape->cells, shape->number, affine,
            rest, merged, kept[0].data, kept[1].data, elements_of(&kept[0]), kept[2].data,
            truth(&call, 8), threads());
    finish(&call, is_done);
}

static void gradients(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], *dy = &call.big[DY], *dx = &call.big[Y], affine, gamma[IN_LIST];
    *dy = given(&call, 1), affine = given(&call, 2);
    read_list(&call, 3, gamma);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, affine.size + 1, gamma[0].size, NULL, 0);
    make_like(&call, x->type);
    float *found = make(&call, 2, shape->columns);
    /* The passes take both alike; so only dy is copied. */
    if (dy->type < 0 || !is_laid(dy, x->step))
        lay(&call, DY, call.order, dy->type < 0 ? x->type : dy->type);
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_gradients(
            shape->rank, shape->dims, x->data, x->type, dy->data, dy->type, dx->data, dx->type,
            gamma[0].data, truth(&call, 4), (double)shape->elements / shape->cells,
            (int64_t)stack[5], truth(&call, 6), shape->cells, shape->number, affine.data,
            !call.has_failed && affine.size[0] == 5, found, threads());
    finish(&call, is_done);
}

static void moments(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], weights[IN_LIST];
    read_list(&call, 1, weights);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, NULL, NULL, weights[0].size, (int64_t)stack[2]);
    float *found = make(&call, 3, shape->sums);
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_moments(shape->rank, shape->dims, x->data, x->type, weights[0].data,
                                   weights[1].data, (double)shape->elements / shape->cells,
                                   truth(&call, 3), shape->cells, found, threads());
    finish(&call, is_done);
}

static void products(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], *dy = &call.big[DY], center;
    *dy = given(&call, 1), center = given(&call, 2);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, center.size, NULL, NULL, 0);
    float *found = make(&call, 2, shape->sums);
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_products(shape->rank, shape->dims, x->data, x->type, dy->data, dy->type,
                                    center.data, shape->cells, found, threads());
    finish(&call, is_done);
}

static void mapped_products(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], *dy = &call.big[DY], center, scale, shift, gamma;
    *dy = given(&call, 1), center = given(&call, 2), scale = given(&call, 3);
    shift = given(&call, 4), gamma = given(&call, 5);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, center.size, gamma.size, NULL, 0);
    float *found = make(&call, 2, shape->sums), *columns = make(&call, 2, shape->columns);
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_mapped_products(
            shape->rank, shape->dims, x->data, x->type, dy->data, dy->type, center.data, scale.data,
            shift.data, gamma.data, shape->cells, shape->number, found, columns, threads());
    finish(&call, is_done);
}

static void mapped(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], *y = &call.big[Y], center, scale, shift, learned[IN_LIST];
    center = given(&call, 1), scale = given(&call, 2), shift = given(&call, 3);
    read_list(&call, 4, learned);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, scale.size, learned[0].size, NULL, 0);
    make_like(&call, type_of((int32_t)stack[6]));
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_map(shape->rank, shape->dims, x->data, x->type, y->data, y->type,
                               center.data, scale.data, shift.data, learned[0].data,
                               learned[1].data, truth(&call, 5), threads());
    finish(&call, is_done);
}

static void combined(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *x = &call.big[X], *dy = &call.big[DY], *dx = &call.big[Y], weights[IN_LIST];
    Array gamma[IN_LIST], center, slope, level, factor;
    *dy = given(&call, 1), center = given(&call, 2), slope = given(&call, 3);
    level = given(&call, 4), factor = given(&call, 5);
    read_list(&call, 6, weights);
    read_list(&call, 7, gamma);
    Shape *shape = &call.shape;
    *shape = shape_with(&call, factor.size, gamma[0].size, weights[0].size, 0);
    make_like(&call, x->type);
    int is_done = 0;
    while (!is_done && is_worth_a_try(&call))
        is_done = keras_bn_combined(
            shape->rank, shape->dims, x->data, x->type, dy->data, dy->type, dx->data, dx->type,
            weights[0].data, center.data, slope.data, level.data, factor.data, gamma[0].data,
            threads());
    finish(&call, is_done);
}

static void moved(Value *stack, uint64_t inputs, uint64_t outputs) {
    Call call = call_of(stack);
    Array *mean = &call.big[X], variance = given(&call, 1), center = given(&call, 2);
    Array offset = given(&call, 3), m2 = given(&call, 4);
    call.shape = shape_with(&call, NULL, NULL, NULL, 0);
    float *found = make(&call, 2, call.shape.sums);
    int are_any = 0;
    if (!call.has_failed)
        are_any = keras_bn_move(mean->data, variance.data, center.data, offset.data, m2.data,
                                call.shape.cells, real(&call, 5), real(&call, 6), real(&call, 7),
                                found);
    finish(&call, 1);
    stack[1] = (Value)are_any;
}

/* Look up what is used of PyTorch, in a library of it or what that has loaded. */
static int find_functions(void *library) {
    Functions found;
#define FIND(type, name, arguments)                                                                \
    if (!(found.name = (type(*) arguments)dlsym(library, #name))) return 0;
    FUNCTIONS(FIND)
    torch = found;
    dtypes[FLOAT] = torch.aoti_torch_dtype_float32();
    dtypes[BFLOAT] = torch.aoti_torch_dtype_bfloat16();
    dtypes[HALF] = torch.aoti_torch_dtype_float16();
    return 1;
}

/* Say whether PyTorch has now the operations, each under its name and a common ending. */
int keras_bn_implement_for_torch(void *library, const char *ending) {
    static const struct {
        const char *name;
        Operation *operation;
    } each[] = {{"normalize", normalize}, {"gradients", gradients}, {"moments", moments},
                {"products", products}, {"mapped_products", mapped_products}, {"mapped", mapped},
                {"combined", combined}, {"moved", moved}};
    static char known[32];
    Library *ours;
    if (!strcmp(known, ending)) return 1;
    if (!find_functions(library) ||
        torch.aoti_torch_library_init_impl("keras_bn", "CPU", "torch_ops.c", __LINE__, &ours))
        return 0;
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s_%s", each[i].name, ending);
        if (torch.torch_library_impl(ours, name, each[i].operation, VERSION)) return 0;
    }
    snprintf(known, sizeof known, "%s", ending);
    return 1;
}
