/* What is called. Each returns 1; 0 where it does not serve, and then has done nothing.

   `dims` has the sizes of the tensor and the strides of each operand; of the big operands data and
   dtype are given. What there is for each cell has `cells` elements, dense; `count` is the number
   of elements of a cell. In training so many tensors are at work that no cache holds a large result
   until it is read. */

#ifndef KERAS_BN_CALLS_H
#define KERAS_BN_CALLS_H

#include <stdint.h>

/* Dtypes and their bytes; how many axes a tensor may have. */
enum { FLOAT, BFLOAT, HALF };
static const int64_t WIDTH[] = {4, 2, 2};
enum { RANK = 8 };

/* What an operand is: of the tensor's size, or small: weights, what there is for each sum (`CELL`),
   and what is learned, gamma and beta (`COLUMN`). */
enum { X, DY, Y, WEIGHT, CELL, COLUMN, OPERANDS };

/* Tell the XLA of this process of the passes, if there is one that says where. */
void keras_bn_register_calls(void);

/* Say whether the passes know float16. */
int keras_bn_reads_half(void);

/* Take the passes of no newer generation of processors than 0, 1 (AVX2) or 2 (AVX-512): for tests. */
void keras_bn_take_generation(int most);

/* Moments about the mean, or about 0 if not centered: pivots, offsets and m2 into out. The count is
   that of each cell where `counts` is given. */
int keras_bn_moments(int rank, const int64_t *dims, char *x, int type, const float *weights,
                     const float *counts, double count, int is_centered, int64_t cells, float *out,
                     int threads);

/* Σ dy and Σ dy·(x - center) into out. */
int keras_bn_products(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                      float *center, int64_t cells, float *out, int threads);

/* With z = (x - center)·scale + shift: Σ gamma·dy and Σ gamma·dy·z of each cell into out, Σ dy
   and Σ dy·z of each column into others. */
int keras_bn_mapped_products(int rank, const int64_t *dims, char *x, int type, char *dy,
                             int dy_type, float *center, float *scale, float *shift,
                             const float *gamma, int64_t cells, int64_t columns, float *out,
                             float *others, int threads);

/* y = ((x - center)·scale + shift)·gamma + beta; gamma and beta both or neither. */
int keras_bn_map(int rank, const int64_t *dims, char *x, int type, char *y, int y_type,
                 float *center, float *scale, float *shift, const float *gamma, const float *beta,
                 int is_training, int threads);

/* dx = gamma·dy·factor + w·((x - center)·slope + level); not both gamma and weights. */
int keras_bn_combined(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                      char *dx, int dx_type, const float *weights, float *center, float *slope,
                      float *level, float *factor, const float *gamma, int threads);

/* y = gamma·(x - mean)/√(variance + epsilon) + beta, where `together` neighbouring cells make a
   set. Of gamma and beta, which vary within a set or not, cell i then has element i mod columns.
   For each cell: center, scale and shift into affine; offsets and m2 into rest. Where cells i and
   i + merged are to be told together, pivots, offsets and m2 of so many into rest; else that is 0.
   With kept means and variances, of so many columns, the sets are corrected towards these: r and d
   of each cell into affine, too, within the limits (least and most of r, most of d). */
int keras_bn_normalize(int rank, const int64_t *dims, char *x, int type, char *y, int y_type,
                       const float *gamma, const float *beta, int varies, double count,
                       int64_t together, double epsilon, int is_centered, int64_t cells,
                       int64_t columns, float *affine, float *rest, int64_t merged,
                       const float *kept_mean, const float *kept_variance, int64_t kept_columns,
                       const double *limits, int is_training, int threads);

/* The gradients of that: dx, and those of beta and gamma into d_learned, of `columns` elements
   each. Where the sets were corrected, r and d of each cell are in affine; not with a gamma that
   varies within a set. */
int keras_bn_gradients(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                       char *dx, int dx_type, const float *gamma, int varies, double count,
                       int64_t together, int is_centered, int64_t cells, int64_t columns,
                       float *affine, int is_corrected, float *d_learned, int threads);

/* Kept means and variances, moved towards moments of which m2 is finite: of the old there stays the
   share `momentum`. It is the variances that move, or, with an epsilon of at least 0, the roots of
   these with it added. Means and variances into out. Return whether any were moved. */
int keras_bn_move(const float *mean, const float *variance, const float *center,
                  const float *offset, const float *m2, int64_t number, double divisor,
                  double momentum, double epsilon, float *out);

#endif
