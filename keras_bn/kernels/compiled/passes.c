/* The passes over a big tensor on the CPU: sums and maps, each reading memory once.

   Sums are in double precision (of gradients, after four terms), so that they do not lose digits
   however many terms there are. Deviations are from the first element of each sum, and again from
   the mean where that element lies so far off that digits would be lost.

   Nothing but the C library is needed. Threads are those of an OpenMP runtime that the process has
   already (`keras_bn_threads`), so that its pool is shared, or our own. */

#include "calls.h"
#include "merging.h"
#include "moving.h"
#include "stages.h"

int keras_bn_reads_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

void keras_bn_take_generation(int most) { newest = most; }

int keras_bn_moments(int rank, const int64_t *dims, char *x, int type, const float *weights,
                     const float *counts, double count, int is_centered, int64_t cells, float *out,
                     int threads) {
    const Generation *cpu = generation();
    Job job = {.sum = cpu->sum_moments, .finish = cpu->finish_moments, .big = {x},
               .types = {type}, .weights = weights, .counts = counts, .count = count, .together = 1,
               .is_centered = is_centered, .center = out, .offset = out + cells,
               .m2 = out + 2 * cells};
    if (!prepare(&job, rank, dims, cells, 0, threads)) return 0;
    run(&job);
    release(&job);
    return 1;
}

int keras_bn_products(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                      float *center, int64_t cells, float *out, int threads) {
    const Generation *cpu = generation();
    Job job = {.sum = cpu->sum_products, .finish = cpu->finish_sums, .big = {x, dy},
               .types = {type, dy_type}, .together = 1, .center = center, .level = out,
               .slope = out + cells};
    if (!prepare(&job, rank, dims, cells, 0, threads)) return 0;
    run(&job);
    release(&job);
    return 1;
}

int keras_bn_mapped_products(int rank, const int64_t *dims, char *x, int type, char *dy,
                             int dy_type, float *center, float *scale, float *shift,
                             const float *gamma, int64_t cells, int64_t columns, float *out,
                             float *others, int threads) {
    const Generation *cpu = generation();
    Job job = {.sum = cpu->sum_mapped_products, .finish = cpu->finish_sums, .big = {x, dy},
               .types = {type, dy_type}, .together = 1, .center = center, .scale = scale,
               .shift = shift, .gamma = gamma, .varies = 1, .level = out, .slope = out + cells};
    if (!prepare(&job, rank, dims, cells, columns, threads)) return 0;
    run(&job);
    write_columns(&job, others);
    release(&job);
    return 1;
}

int keras_bn_map(int rank, const int64_t *dims, char *x, int type, char *y, int y_type,
                 float *center, float *scale, float *shift, const float *gamma, const float *beta,
                 int is_training, int threads) {
    const Generation *cpu = generation();
    Job job = {.map = cpu->map, .big = {x, NULL, y}, .types = {type, 0, y_type},
               .center = center, .slope = scale, .level = shift, .gamma = gamma, .beta = beta,
               .varies = gamma != 0, .is_training = is_training};
    if (!prepare(&job, rank, dims, 0, 0, threads)) return 0;
    run(&job);
    return 1;
}

int keras_bn_combined(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                      char *dx, int dx_type, const float *weights, float *center, float *slope,
                      float *level, float *factor, const float *gamma, int threads) {
    const Generation *cpu = generation();
    Job job = {.map = cpu->combine, .big = {x, dy, dx}, .types = {type, dy_type, dx_type},
               .weights = weights, .center = center, .factor = factor, .slope = slope,
               .level = level, .gamma = gamma, .varies = gamma != 0, .is_training = 1};
    if ((weights && gamma) || !prepare(&job, rank, dims, 0, 0, threads)) return 0;
    run(&job);
    return 1;
}

int keras_bn_normalize(int rank, const int64_t *dims, char *x, int type, char *y, int y_type,
                       const float *gamma, const float *beta, int varies, double count,
                       int64_t together, double epsilon, int is_centered, int64_t cells,
                       int64_t columns, float *affine, float *rest, int64_t merged,
                       const float *kept_mean, const float *kept_variance, int64_t kept_columns,
                       const double *limits, int is_training, int threads) {
    const Generation *cpu = generation();
    Job job = {.sum = cpu->sum_moments, .finish = cpu->finish_map, .map = cpu->map,
               .rows = cpu->normalize_rows, .strips = cpu->normalize_strips,
               .big = {x, NULL, y}, .types = {type, 0, y_type}, .gamma = gamma, .beta = beta,
               .varies = varies, .count = count, .together = together, .epsilon = epsilon,
               .is_centered = is_centered, .center = affine, .scale = affine + cells,
               .shift = affine + 2 * cells, .offset = rest, .m2 = rest + cells,
               .columns.number = columns, .kept_mean = kept_mean, .kept_variance = kept_variance,
               .kept_columns = kept_columns, .limits = limits,
               .r = kept_mean ? affine + 3 * cells : NULL, .d = affine + 4 * cells,
               .merged.columns = merged, .is_training = is_training};
    if (!prepare(&job, rank, dims, cells, 0, threads)) return 0;
    run(&job);
    if (merged) write_merged(&job, rest);
    release(&job);
    return 1;
}

int keras_bn_gradients(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                       char *dx, int dx_type, const float *gamma, int varies, double count,
                       int64_t together, int is_centered, int64_t cells, int64_t columns,
                       float *affine, int is_corrected, float *d_learned, int threads) {
    const Generation *cpu = generation();
    Job job = {.sum = varies ? cpu->sum_mapped_products : cpu->sum_products,
               .finish = cpu->finish_gradients, .map = cpu->combine,
               .rows = cpu->differentiate_rows, .strips = cpu->differentiate_strips,
               .big = {x, dy, dx}, .types = {type, dy_type, dx_type}, .gamma = gamma,
               .varies = varies, .count = count, .together = together, .is_centered = is_centered,
               .center = affine, .scale = affine + cells, .shift = affine + 2 * cells,
               .r = is_corrected ? affine + 3 * cells : NULL, .d = affine + 4 * cells,
               .is_training = 1};
    if ((varies && is_corrected) || !prepare(&job, rank, dims, cells, columns, threads)) return 0;
    run(&job);
    write_columns(&job, d_learned);
    release(&job);
    return 1;
}

int keras_bn_move(const float *mean, const float *variance, const float *center,
                  const float *offset, const float *m2, int64_t number, double divisor,
                  double momentum, double epsilon, float *out) {
    Shares shares = {(float)momentum, (float)(1 - momentum)};
    int are_any = 0;
    for (int64_t i = 0; i < number; i++) {
        int is_moved = is_known(m2[i]);
        float fresh = m2[i] / (float)divisor;
        float spread = epsilon < 0 ? moved(variance[i], fresh, shares)
                                   : moved_by_root(variance[i], fresh, (float)epsilon, shares);
        out[i] = is_moved ? moved(mean[i], center[i] + offset[i], shares) : mean[i];
        out[number + i] = is_moved ? spread : variance[i];
        are_any |= is_moved;
    }
    return are_any;
}
