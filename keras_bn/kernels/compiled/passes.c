/* The passes over a big tensor on the CPU: sums and maps, each reading memory once.

   Sums are in double precision: of n terms they err by n·2^-53 at most, which leaves the float32
   that they are rounded to as right as it can be. Deviations are from the first element of each
   sum, and again from the mean where that element lies so far off that digits would be lost.

   Nothing but the C library is needed. Threads are those of an OpenMP runtime that the process has
   already (`keras_bn_threads`), so that its pool is shared. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lines.h"
#include "nest.h"

/* Compiled for several generations of processors, of which the library's loader chooses. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

typedef enum { MOMENTS, PRODUCTS, MAPPED_PRODUCTS, MAP, COMBINED } Pass;

/* Two sums for each cell or column; `copy` is the distance between those of the parts, which is 0
   where no two parts have a sum in common. */
typedef struct {
    double *sums;
    int64_t number, copy;
} Sums;

typedef struct Job Job;

/* Go through turns of the outermost loop, or through cells; `part` says whose sums are added to. */
typedef void (*Stage)(Job *job, int64_t from, int64_t to, int part);

/* What a call does: stages, of which some may be missing, and what they work on. */
struct Job {
    Stage sum, finish, map;
    Nest nest;
    int parts, types[Y + 1];
    char *big[Y + 1];
    const float *weights, *gamma, *beta;
    float *center, *scale, *shift, *factor, *slope, *level, *offset, *m2;
    Sums cells, columns;
    const float *counts;
    double count, epsilon;
    int64_t together; /* how many neighbouring cells make a set */
    int varies;       /* whether gamma varies within a set */
    int is_centered, is_far, is_past_caches;
};

/* ---- Threads */

typedef struct {
    void (*body)(Job *job, int part);
    Job *job;
} Team;

static void (*start)(void (*)(void *), void *, unsigned, unsigned);
static int (*member_number)(void), (*team_size)(void);

/* Take the threads of an OpenMP runtime: GOMP_parallel, omp_get_thread_num, omp_get_num_threads. */
void keras_bn_threads(void *parallel, void *thread_number, void *thread_count) {
    start = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    member_number = (int (*)(void))thread_number;
    team_size = (int (*)(void))thread_count;
}

static void as_member(void *given) {
    Team *team = given;
    /* The runtime may give fewer threads than there are parts. */
    for (int part = member_number(); part < team->job->parts; part += team_size())
        team->body(team->job, part);
}

static void in_parts(void (*body)(Job *, int), Job *job) {
    Team team = {body, job};
    if (job->parts > 1 && start) {
        start(as_member, &team, (unsigned)job->parts, 0);
        return;
    }
    for (int part = 0; part < job->parts; part++) body(job, part);
}

/* ---- Passes through the nest */

/* Return lines in float32, from memory or from a room for them, and the step from one to the next. */
INLINED const float *lines_of(const Job *job, int operand, int64_t at, int rows, int64_t n,
                              float *room, int64_t *step) {
    int type = job->types[operand];
    const char *data = job->big[operand] + at * WIDTH[type];
    int64_t apart = job->nest.stride[operand][job->nest.rank - 2];
    *step = type == FLOAT ? apart : SHORT;
    if (type == FLOAT) return (const float *)data;
    for (int i = 0; i < rows; i++)
        widened(data + i * apart * WIDTH[type], type, n, room + i * SHORT);
    return room;
}

/* Go along a piece of one line, or of as many as there are rows. */
INLINED void go(Job *job, const int64_t *at, int rows, int64_t n, int part, Pass pass, int cell,
                int column, int weight) {
    float x_room[LINE], dy_room[LINE], y_room[LINE];
    int has_dy = pass != MOMENTS && pass != MAP, has_y = pass >= MAP;
    int64_t step = 0, dy_step = 0, number = job->columns.number;
    const float *x = lines_of(job, X, at[X], rows, n, x_room, &step);
    const float *dy = has_dy ? lines_of(job, DY, at[DY], rows, n, dy_room, &dy_step) : 0;
    const float *w = weight ? job->weights + at[WEIGHT] : 0;
    const float *gamma = column ? job->gamma + at[COLUMN] : 0;
    const float *beta = column && pass == MAP ? job->beta + at[COLUMN] : 0;
    const float *center = job->center + at[CELL];
    double *first = has_y ? 0 : job->cells.sums + part * job->cells.copy + at[CELL];
    double *second = has_y ? 0 : first + job->cells.number;
    if (pass == MOMENTS && cell == ONE) moments_line(x, n, weight, w, center, first, second);
    if (pass == MOMENTS && cell == MANY)
        moments_block(x, step, rows, n, weight, w, center, first, second);
    if (pass == PRODUCTS && cell == ONE) products_line(x, dy, n, center, first, second);
    if (pass == PRODUCTS && cell == MANY)
        products_block(x, step, dy, dy_step, rows, n, center, first, second);
    if (pass == MAPPED_PRODUCTS) {
        int64_t apart = job->nest.stride[CELL][job->nest.rank - 2];
        const float *scale = job->scale + at[CELL], *shift = job->shift + at[CELL];
        double *sums = job->columns.sums + part * job->columns.copy + at[COLUMN];
        const float one = 1;
        for (int i = 0; i < rows; i++) {
            const float *own = x + i * step, *slopes = dy + i * dy_step;
            int64_t k = i * apart;
            if (cell == ONE)
                mapped_products_line(own, slopes, n, ONE, column, center + k, scale + k, shift + k,
                                     gamma, first + k, second + k);
            else
                mapped_products(own, slopes, n, column, center + k, scale + k, shift + k, gamma,
                                first + k, second + k);
            if (column == ONE)
                mapped_products_line(own, slopes, n, cell, ONE, center + k, scale + k, shift + k,
                                     &one, sums, sums + number);
        }
        if (column == MANY)
            column_products_block(x, step, dy, dy_step, rows, n, cell, apart, center, scale, shift,
                                  sums, sums + number);
    }
    if (!has_y) return;
    char *target = job->big[Y] + at[Y] * WIDTH[job->types[Y]], *out = target;
    char out_room[LINE * sizeof(float)];
    if (job->is_past_caches) out = out_room;
    float *y = job->types[Y] == FLOAT ? (float *)out : y_room;
    const float *slope = job->slope + at[CELL], *level = job->level + at[CELL];
    if (pass == MAP) map_line(y, x, n, cell, column, center, slope, level, gamma, beta);
    if (pass == COMBINED)
        combined_line(y, x, dy, n, cell, column, weight, w, center, job->factor + at[CELL], slope,
                      level, gamma);
    narrow(out, job->types[Y], n, y);
    if (job->is_past_caches) copy_past_caches(target, out, n * WIDTH[job->types[Y]]);
}

/* Go through the lines of some turns. It is compiled once for each pass and each way that the small
   operands lie along a line. */
INLINED void pass_of(Job *job, int64_t from, int64_t to, int part, Pass pass, int cell, int column,
                     int weight) {
    const Nest *nest = &job->nest;
    int loop = nest->rank - 2;
    int64_t length = nest->size[loop + 1], at[OPERANDS];
    /* Rows that have their sums in common. */
    int is_blocked = !weight && (pass == MAPPED_PRODUCTS
        ? !nest->stride[COLUMN][loop] : pass <= PRODUCTS && cell == MANY && !nest->stride[CELL][loop]);
    int is_along[] = {1, 1, 1, weight == MANY, cell == MANY, column == MANY};
    for (Walk walk = walk_of(nest, from, to); walk.left > 0; next_turn(&walk)) {
        memcpy(at, walk.at, sizeof at);
        for (int64_t line = 0; line < walk.lines;) {
            int rows = is_blocked && walk.lines - line >= ROWS ? ROWS : 1;
            int64_t most = rows == ROWS ? SHORT : LINE;
            for (int64_t start = 0; start < length; start += most) {
                int64_t n = length - start < most ? length - start : most;
                if (rows == ROWS) go(job, at, ROWS, n, part, pass, cell, column, weight);
                else go(job, at, 1, n, part, pass, cell, column, weight);
                for (int o = 0; o < OPERANDS; o++) at[o] += is_along[o] * n;
            }
            for (int o = 0; o < OPERANDS; o++)
                at[o] += rows * nest->stride[o][loop] - is_along[o] * length;
            line += rows;
        }
    }
}

static int along_line(const Job *job, int operand, const void *data) {
    if (!data) return ABSENT;
    return job->nest.stride[operand][job->nest.rank - 1] ? MANY : ONE;
}

#define WITH(pass, cell, column, weight) pass_of(job, from, to, part, pass, cell, column, weight)
#define BY_COLUMN(pass, cell)                                                             \
    if (column == ABSENT) WITH(pass, cell, ABSENT, ABSENT);                               \
    else if (column == ONE) WITH(pass, cell, ONE, ABSENT);                                \
    else WITH(pass, cell, MANY, ABSENT)
#define BY_WEIGHT(pass, cell)                                                             \
    if (weight == ABSENT) WITH(pass, cell, ABSENT, ABSENT);                               \
    else if (weight == ONE) WITH(pass, cell, ABSENT, ONE);                                \
    else WITH(pass, cell, ABSENT, MANY)

FOR_EACH_CPU static void sum_moments(Job *job, int64_t from, int64_t to, int part) {
    int weight = along_line(job, WEIGHT, job->weights);
    if (along_line(job, CELL, job->center) == ONE) { BY_WEIGHT(MOMENTS, ONE); }
    else { BY_WEIGHT(MOMENTS, MANY); }
}

FOR_EACH_CPU static void sum_products(Job *job, int64_t from, int64_t to, int part) {
    if (along_line(job, CELL, job->center) == ONE) WITH(PRODUCTS, ONE, ABSENT, ABSENT);
    else WITH(PRODUCTS, MANY, ABSENT, ABSENT);
}

FOR_EACH_CPU static void sum_mapped_products(Job *job, int64_t from, int64_t to, int part) {
    int is_one = along_line(job, COLUMN, job->gamma) == ONE;
    if (along_line(job, CELL, job->center) == ONE) {
        if (is_one) WITH(MAPPED_PRODUCTS, ONE, ONE, ABSENT);
        else WITH(MAPPED_PRODUCTS, ONE, MANY, ABSENT);
    } else {
        if (is_one) WITH(MAPPED_PRODUCTS, MANY, ONE, ABSENT);
        else WITH(MAPPED_PRODUCTS, MANY, MANY, ABSENT);
    }
}

FOR_EACH_CPU static void map(Job *job, int64_t from, int64_t to, int part) {
    int column = job->varies ? along_line(job, COLUMN, job->gamma) : ABSENT;
    if (along_line(job, CELL, job->center) == ONE) { BY_COLUMN(MAP, ONE); }
    else { BY_COLUMN(MAP, MANY); }
}

FOR_EACH_CPU static void combine(Job *job, int64_t from, int64_t to, int part) {
    int is_one = along_line(job, CELL, job->center) == ONE;
    int column = job->varies ? along_line(job, COLUMN, job->gamma) : ABSENT;
    int weight = along_line(job, WEIGHT, job->weights);
    if (weight && is_one) { BY_WEIGHT(COMBINED, ONE); }
    else if (weight) { BY_WEIGHT(COMBINED, MANY); }
    else if (is_one) { BY_COLUMN(COMBINED, ONE); }
    else { BY_COLUMN(COMBINED, MANY); }
}

/* ---- Sums, and what becomes of them */

/* Elements that stay in a core's cache beside as many others; bytes that stay in none until they are
   read again. */
enum { CHUNK = 1 << 14, LARGE = 1 << 23 };

/* Make the nest of a job, and its parts; 0 where it cannot be had. */
static int prepare(Job *job, int rank, const int64_t *dims, int threads) {
    if (!plan(&job->nest, rank, dims, threads, job->sum != 0)) return 0;
    int64_t elements = 1;
    for (int i = 0; i < job->nest.rank; i++) elements *= job->nest.size[i];
    job->is_past_caches = elements * WIDTH[job->types[Y]] >= LARGE;
    /* What is small is done before other threads wake up. */
    job->parts = elements < 32 * LINE ? 1
        : job->nest.size[0] < threads ? (int)job->nest.size[0] : threads;
    return 1;
}

static int allocate(Sums *sums, const Job *job, int operand, int64_t number) {
    /* Apart by more than what a processor fetches at a time, or parts would wait for each other. */
    int is_shared = job->parts > 1 && !job->nest.stride[operand][0];
    sums->number = number;
    sums->copy = is_shared ? 2 * number + 64 : 0;
    sums->sums = calloc((size_t)(2 * number + sums->copy * (job->parts - 1)), sizeof(double));
    return sums->sums != NULL;
}

static double total(const Job *job, const Sums *sums, int64_t i) {
    double found = sums->sums[i];
    for (int part = 1; part < job->parts && sums->copy; part++)
        found += sums->sums[part * sums->copy + i];
    return found;
}

static void write_totals(const Job *job, const Sums *sums, float *out) {
    for (int64_t i = 0; i < 2 * sums->number; i++) out[i] = (float)total(job, sums, i);
}

/* Set the sums of some cells to 0. */
static void clear(Job *job, int64_t from, int64_t to) {
    Sums *sums = &job->cells;
    for (int part = 0; part < (sums->copy ? job->parts : 1); part++)
        for (int half = 0; half < 2; half++)
            memset(sums->sums + part * sums->copy + half * sums->number + from, 0,
                   (size_t)(to - from) * sizeof(double));
}

/* Take the first element of each sum as its pivot. */
static void find_pivots(Job *job, int64_t from, int64_t to) {
    Nest nest = job->nest;
    for (int i = 0; i < nest.rank; i++)
        if (!nest.stride[CELL][i]) nest.size[i] = 1;
    if (!nest.stride[CELL][0]) to = from + 1;
    int loop = nest.rank - 2, type = job->types[X];
    for (Walk walk = walk_of(&nest, from, to); walk.left > 0; next_turn(&walk)) {
        for (int64_t line = 0; line < walk.lines; line++) {
            int64_t at = walk.at[X] + line * nest.stride[X][loop];
            int64_t cell = walk.at[CELL] + line * nest.stride[CELL][loop];
            int64_t weight = walk.at[WEIGHT] + line * nest.stride[WEIGHT][loop];
            for (int64_t j = 0; j < nest.size[loop + 1]; j++) {
                float room, x = *widened(job->big[X] + (at + j) * WIDTH[type], type, 1, &room);
                int is_counted = !job->weights
                    || job->weights[weight + j * nest.stride[WEIGHT][loop + 1]] > 0;
                job->center[cell + j] = isfinite(x) && is_counted && job->is_centered ? x : 0;
            }
        }
    }
}

static double positive(double count) { return count > 0 ? count : 1; }

/* Turn the sums of cells into moments. */
FOR_EACH_CPU static void finish_moments(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    const double *sums = job->cells.sums;
    int64_t number = job->cells.number, copy = job->cells.copy;
    int is_far = 0;
    for (int64_t i = from; i < to; i++) {
        double first = sums[i], second = sums[number + i];
        for (int other = 1; copy && other < job->parts; other++)
            first += sums[other * copy + i], second += sums[other * copy + number + i];
        double count = job->counts ? positive(job->counts[i]) : job->count;
        double distance = job->is_centered ? first / count : 0;
        double rest = second - first * distance, mean = job->center[i] + distance;
        /* 12 of 53 bits may go. */
        is_far |= first * distance > 4096 * rest;
        job->center[i] = (float)mean;
        job->offset[i] = (float)(mean - job->center[i]);
        job->m2[i] = rest < 0 ? 0 : (float)rest; /* a NaN stays one */
    }
    if (is_far) job->is_far = 1;
}

/* Give each cell the moments of its set, as core/moments.py merges them. */
static void merge(Job *job, int64_t from, int64_t to) {
    int64_t number = job->together;
    for (int64_t set = from; set < to; set += number) {
        double distance = 0, m2 = 0, pivot = job->center[set];
        for (int64_t i = set; i < set + number; i++)
            distance += (job->center[i] - pivot + job->offset[i]) / number;
        for (int64_t i = set; i < set + number; i++) {
            double own = job->center[i] - pivot + job->offset[i] - distance;
            m2 += job->m2[i] + job->count * own * own;
        }
        float center = (float)(pivot + distance), offset = (float)(pivot + distance - center);
        for (int64_t i = set; i < set + number; i++)
            job->center[i] = center, job->offset[i] = offset, job->m2[i] = (float)m2;
    }
}

/* Turn the sums of cells into the map of each. */
FOR_EACH_CPU static void finish_map(Job *job, int64_t from, int64_t to, int part) {
    finish_moments(job, from, to, part);
    if (job->together > 1) merge(job, from, to);
    double count = job->count * job->together;
    for (int64_t i = from; i < to; i++) {
        float scale = (float)(1 / sqrt(job->m2[i] / count + job->epsilon));
        job->scale[i] = job->slope[i] = scale;
        job->shift[i] = job->level[i] = -job->offset[i] * scale;
    }
    if (!job->gamma || job->varies) return;
    for (int64_t i = from, column = from % job->columns.number; i < to; i++) {
        job->slope[i] *= job->gamma[column];
        job->level[i] = job->level[i] * job->gamma[column] + job->beta[column];
        column = column + 1 < job->columns.number ? column + 1 : 0;
    }
}

/* With first = Σ g·dy and second = Σ g·dy·z over a set of n, dx = scale·(g·dy - first / n - z·second
   / n) is scale·g·dy + (x - center)·slope + level. */
static void finish_gradients(Job *job, int64_t from, int64_t to, int part) {
    (void)part;
    int64_t number = job->together, columns = job->columns.number;
    for (int64_t set = from; set < to; set += number) {
        double first = 0, second = 0, count = job->count * number;
        for (int64_t i = set; i < set + number; i++) {
            double a = total(job, &job->cells, i), b = total(job, &job->cells, job->cells.number + i);
            double gamma = job->gamma && !job->varies ? job->gamma[i % columns] : 1;
            if (!job->varies) {
                b = (b * job->scale[i] + a * job->shift[i]) * gamma, a *= gamma;
            }
            first += a, second += b;
        }
        first = job->is_centered ? first / count : 0, second /= count;
        for (int64_t i = set; i < set + number; i++) {
            double scale = job->scale[i], gamma = job->gamma && !job->varies ? job->gamma[i % columns] : 1;
            job->factor[i] = (float)(scale * gamma);
            job->slope[i] = (float)(-scale * scale * second);
            job->level[i] = (float)(-scale * (first + job->shift[i] * second));
        }
    }
}

/* Give each column the sums of its cells: Σ dy, and Σ dy·z. */
static void add_to_columns(Job *job) {
    int64_t cells = job->cells.number, columns = job->columns.number;
    for (int64_t i = 0; i < cells; i++) {
        double first = total(job, &job->cells, i), second = total(job, &job->cells, cells + i);
        job->columns.sums[i % columns] += first;
        job->columns.sums[columns + i % columns] += second * job->scale[i] + first * job->shift[i];
    }
}

/* ---- The stages in turn */


/* Say whether each turn of the outermost loop has sets of its own, side by side among all. */
static int are_apart(const Job *job) {
    int64_t stride = job->nest.stride[CELL][0];
    return stride * job->nest.size[0] == job->cells.number && stride % job->together == 0;
}

static void sum_and_finish(Job *job, int64_t from, int64_t to, int part) {
    int64_t stride = job->nest.stride[CELL][0], first = from * stride, last = to * stride;
    if (job->sum == sum_moments) find_pivots(job, from, to);
    job->sum(job, from, to, part);
    if (job->finish) job->finish(job, first, last, part);
    if (!job->is_far) return;
    job->is_far = 0;
    clear(job, first, last);
    job->sum(job, from, to, part);
    job->finish(job, first, last, part);
    job->is_far = 0;
}

static void all_of_part(Job *shared, int part) {
    Job own = *shared, *job = &own;
    const Nest *nest = &job->nest;
    int64_t turn = 1;
    for (int i = 1; i < nest->rank; i++) turn *= nest->size[i];
    int64_t many = turn < CHUNK ? CHUNK / turn : 1;
    int64_t end = nest->size[0] * (part + 1) / job->parts;
    for (int64_t from = nest->size[0] * part / job->parts; from < end; from += many) {
        int64_t to = from + many < end ? from + many : end;
        sum_and_finish(job, from, to, part);
        if (job->map) job->map(job, from, to, part);
    }
    finish_copies();
}

static void sums_of_part(Job *job, int part) {
    int64_t size = job->nest.size[0];
    job->sum(job, size * part / job->parts, size * (part + 1) / job->parts, part);
}

static void map_of_part(Job *job, int part) {
    int64_t size = job->nest.size[0];
    job->map(job, size * part / job->parts, size * (part + 1) / job->parts, part);
    finish_copies();
}

static void finish_of_part(Job *job, int part) {
    int64_t sets = job->cells.number / job->together, number = job->together;
    job->finish(job, sets * part / job->parts * number, sets * (part + 1) / job->parts * number, part);
}

static void run(Job *job) {
    if (job->sum && are_apart(job)) {
        in_parts(all_of_part, job);
        return;
    }
    if (job->sum == sum_moments) find_pivots(job, 0, job->nest.size[0]);
    if (job->sum) in_parts(sums_of_part, job);
    if (job->finish) in_parts(finish_of_part, job);
    if (job->is_far) {
        clear(job, 0, job->cells.number);
        in_parts(sums_of_part, job);
        in_parts(finish_of_part, job);
    }
    if (job->map) in_parts(map_of_part, job);
}

/* ---- What is called. Each returns 1; 0 where it does not serve, and then has done nothing.

   `dims` has the sizes of the tensor and the strides of each operand; of the big operands data and
   dtype are given. What there is for each cell has `cells` elements, dense; `count` is the number
   of elements of a cell. */

int keras_bn_reads_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* Moments about the mean, or about 0 if not centered: pivots, offsets and m2 into out. The count is
   that of each cell where `counts` is given. */
int keras_bn_moments(int rank, const int64_t *dims, char *x, int type, const float *weights,
                     const float *counts, double count, int is_centered, int64_t cells, float *out,
                     int threads) {
    Job job = {.sum = sum_moments, .finish = finish_moments, .big = {x}, .types = {type},
               .weights = weights, .counts = counts, .count = count, .together = 1,
               .is_centered = is_centered, .center = out, .offset = out + cells,
               .m2 = out + 2 * cells};
    if (!prepare(&job, rank, dims, threads) || !allocate(&job.cells, &job, CELL, cells)) return 0;
    run(&job);
    free(job.cells.sums);
    return 1;
}

/* Σ dy and Σ dy·(x - center) into out. */
int keras_bn_products(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                      float *center, int64_t cells, float *out, int threads) {
    Job job = {.sum = sum_products, .big = {x, dy}, .types = {type, dy_type}, .together = 1,
               .center = center};
    if (!prepare(&job, rank, dims, threads) || !allocate(&job.cells, &job, CELL, cells)) return 0;
    run(&job);
    write_totals(&job, &job.cells, out);
    free(job.cells.sums);
    return 1;
}

/* With z = (x - center)·scale + shift: Σ gamma·dy and Σ gamma·dy·z of each cell into out, Σ dy and
   Σ dy·z of each column into others. */
int keras_bn_mapped_products(int rank, const int64_t *dims, char *x, int type, char *dy,
                             int dy_type, float *center, float *scale, float *shift,
                             const float *gamma, int64_t cells, int64_t columns, float *out,
                             float *others, int threads) {
    Job job = {.sum = sum_mapped_products, .big = {x, dy}, .types = {type, dy_type},
               .together = 1, .center = center, .scale = scale, .shift = shift, .gamma = gamma};
    if (!prepare(&job, rank, dims, threads) || !allocate(&job.cells, &job, CELL, cells)) return 0;
    int is_able = allocate(&job.columns, &job, COLUMN, columns);
    if (is_able) {
        run(&job);
        write_totals(&job, &job.cells, out);
        write_totals(&job, &job.columns, others);
    }
    free(job.cells.sums);
    free(job.columns.sums);
    return is_able;
}

/* y = ((x - center)·scale + shift)·gamma + beta; gamma and beta both or neither. */
int keras_bn_map(int rank, const int64_t *dims, char *x, int type, char *y, int y_type,
                 float *center, float *scale, float *shift, const float *gamma, const float *beta,
                 int threads) {
    Job job = {.map = map, .big = {x, NULL, y}, .types = {type, 0, y_type}, .center = center,
               .slope = scale, .level = shift, .gamma = gamma, .beta = beta, .varies = gamma != 0};
    if (!prepare(&job, rank, dims, threads)) return 0;
    run(&job);
    return 1;
}

/* dx = gamma·dy·factor + w·((x - center)·slope + level); not both gamma and weights. */
int keras_bn_combined(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                      char *dx, int dx_type, const float *weights, float *center, float *slope,
                      float *level, float *factor, const float *gamma, int threads) {
    Job job = {.map = combine, .big = {x, dy, dx}, .types = {type, dy_type, dx_type},
               .weights = weights, .center = center, .factor = factor, .slope = slope,
               .level = level, .gamma = gamma, .varies = gamma != 0};
    if ((weights && gamma) || !prepare(&job, rank, dims, threads)) return 0;
    run(&job);
    return 1;
}

/* y = gamma·(x - mean)/√(variance + epsilon) + beta, where `together` neighbouring cells make a
   set. Of gamma and beta, which vary within a set or not, cell i then has element i mod columns.
   For each cell: center, scale and shift into affine; offsets and m2, and then work, into rest. */
int keras_bn_normalize(int rank, const int64_t *dims, char *x, int type, char *y, int y_type,
                       const float *gamma, const float *beta, int varies, double count,
                       int64_t together, double epsilon, int is_centered, int64_t cells,
                       int64_t columns, float *affine, float *rest, int threads) {
    Job job = {.sum = sum_moments, .finish = finish_map, .map = map, .big = {x, NULL, y},
               .types = {type, 0, y_type}, .gamma = gamma, .beta = beta, .varies = varies,
               .count = count, .together = together, .epsilon = epsilon,
               .is_centered = is_centered, .center = affine, .scale = affine + cells,
               .shift = affine + 2 * cells, .offset = rest, .m2 = rest + cells,
               .slope = rest + 2 * cells, .level = rest + 3 * cells, .columns.number = columns};
    if (!prepare(&job, rank, dims, threads) || !allocate(&job.cells, &job, CELL, cells)) return 0;
    run(&job);
    free(job.cells.sums);
    return 1;
}

/* The gradients of that: dx, and those of beta and gamma into d_learned, of `columns` elements each.
   Work has room for three numbers a cell. */
int keras_bn_gradients(int rank, const int64_t *dims, char *x, int type, char *dy, int dy_type,
                       char *dx, int dx_type, const float *gamma, int varies, double count,
                       int64_t together, int is_centered, int64_t cells, int64_t columns,
                       float *affine, float *work, float *d_learned, int threads) {
    Job job = {.sum = varies ? sum_mapped_products : sum_products, .finish = finish_gradients,
               .map = combine, .big = {x, dy, dx}, .types = {type, dy_type, dx_type},
               .gamma = gamma, .varies = varies, .count = count, .together = together,
               .is_centered = is_centered, .center = affine, .scale = affine + cells,
               .shift = affine + 2 * cells, .factor = work, .slope = work + cells,
               .level = work + 2 * cells};
    if (!prepare(&job, rank, dims, threads) || !allocate(&job.cells, &job, CELL, cells)) return 0;
    int is_able = allocate(&job.columns, &job, COLUMN, columns);
    if (is_able) {
        run(&job);
        if (!varies) add_to_columns(&job);
        write_totals(&job, &job.columns, d_learned);
    }
    free(job.cells.sums);
    free(job.columns.sums);
    return is_able;
}
