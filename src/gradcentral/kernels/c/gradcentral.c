/*
 * Gradient Centralization on the CPU: fused optimizer steps, and centering alone, for all parameters in one call.
 *
 * Plain C, called through ctypes: no Python and no torch headers, one library for every version of both.
 * Read step.h for the algorithm; kernels.h for what an Parameter is; this file for how the work is laid out and shared.
 */
#include "kernels.h"
#include "bf16.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

/* Some of a group's rows: `rows` of them from `row` on, counted over all groups, each of `width` columns. */
typedef struct {
    int64_t group, row, rows, width;
} Block;

INLINE Block block_of(const Parameter *p, int64_t index) {
    const int64_t group = index / p->blocks, block = index % p->blocks;
    const int64_t first = p->outer * block / p->blocks, last = p->outer * (block + 1) / p->blocks;
    Block at = {group, group * p->outer + first, last - first, p->units * p->inner};
    return at;
}

/* Count a piece's blocks as summed; true for the one call that finds none missing any more. */
static int all_summed(Parameter *p, const WorkPiece *piece) {
    int64_t missing;
#if defined(_OPENMP)
#pragma omp atomic capture seq_cst
#endif
    missing = p->missing -= piece->end - piece->begin;
    return missing == 0;
}

enum { CENTER = 4, MEANS = 5, RESTORE = 6 };                   /* what to do to the means of one tensor */

#define DTYPE F32
#include "dtype.h"
#undef DTYPE
#define DTYPE F64
#include "dtype.h"
#undef DTYPE
#define DTYPE BF16
#include "dtype.h"
#undef DTYPE

typedef void (*StepPiece)(Parameter *, const WorkPiece *, const Coefficients *);
typedef void (*CenterPiece)(Parameter *, const WorkPiece *, int, double *);

static const StepPiece STEPS[3][4] = {
    {step_piece_sgd_f32, step_piece_momentum_f32, step_piece_adam_f32, step_piece_amsgrad_f32},
    {step_piece_sgd_f64, step_piece_momentum_f64, step_piece_adam_f64, step_piece_amsgrad_f64},
    {step_piece_sgd_bf16, step_piece_momentum_bf16, step_piece_adam_bf16, step_piece_amsgrad_bf16},
};
static const CenterPiece CENTERS[3] = {center_piece_f32, center_piece_f64, center_piece_bf16};

static const int64_t REAL_SIZES[3] = {4, 8, 4};

/*
 * How the work is shared out, whatever the number of threads, so that results never depend on it. A batch is what a
 * thread takes at a time; a piece larger than PIECE is cut. A group of columns larger than that is summed in up to
 * BLOCKS blocks, and stepped when all are: in a later wave, but soon enough to find its gradient in the cache.
 */
enum { PIECE = 1 << 18, BATCH = 1 << 16, BLOCKS = 4, WAVE = 1 << 21 };

/* A work list under construction; pieces and batches are NULL while they are only counted. */
typedef struct {
    WorkPiece *pieces;
    int64_t *batches, *waves;
    int64_t n_pieces, n_batches, n_waves, in_batch;
} WorkListBuilder;

static void add_piece(WorkListBuilder *work, WorkPiece piece, int64_t elements) {
    if (work->in_batch >= BATCH) {
        if (work->batches) work->batches[work->n_batches] = work->n_pieces;
        work->n_batches++;
        work->in_batch = 0;
    }
    if (work->pieces) work->pieces[work->n_pieces] = piece;
    work->n_pieces++;
    work->in_batch += elements;
}

/* Units of `each` elements, in pieces of at most about PIECE elements. */
static void add_pieces(WorkListBuilder *work, int64_t parameter, int64_t kind, int64_t units, int64_t each) {
    const int64_t step = each < PIECE ? PIECE / each : 1;
    for (int64_t begin = 0; begin < units; begin += step) {
        const int64_t end = units - begin < step ? units : begin + step;
        add_piece(work, (WorkPiece){parameter, begin, end, kind}, (end - begin) * each);
    }
}

static void end_wave(WorkListBuilder *work) {
    if (work->waves) work->waves[work->n_waves] = work->n_batches;
    work->n_waves++;
    work->in_batch = BATCH;   /* no batch reaches over two waves */
}

INLINE int is_columns(const Parameter *p) { return p->placement != PLAIN && p->units * p->inner > 1; }

/* How far a set of columns reaches, from the parameter `from` on: until a wave's worth of elements is together. */
static int64_t end_of_set(const Parameter *parameters, int64_t from, int64_t n_parameters) {
    int64_t elements = 0;
    for (; from < n_parameters && elements < WAVE; from++)
        if (is_columns(&parameters[from])) elements += parameters[from].groups * parameters[from].outer * parameters[from].units * parameters[from].inner;
    return from;
}

/* A set's first wave: what fits one thread is summed and stepped at once, the rest is summed. */
static void add_sums(WorkListBuilder *work, Parameter *parameters, int64_t from, int64_t to, int32_t dtype, int64_t begin, int64_t *end) {
    *end = begin;
    for (int64_t i = from; i < to; i++) {
        Parameter *p = &parameters[i];
        const int64_t width = p->units * p->inner, in_group = p->outer * width;
        if (!is_columns(p) || p->groups * in_group == 0) continue;
        int64_t blocks = (in_group + PIECE - 1) / PIECE;
        blocks = blocks < BLOCKS ? blocks : BLOCKS;
        p->blocks = (int32_t)(blocks < p->outer ? blocks : p->outer);
        p->scratch = *end;
        *end += p->groups * width * (p->blocks * (int64_t)sizeof(double) + REAL_SIZES[dtype]);
        *end = (*end + 63) / 64 * 64;
        if (p->blocks == 1)
            add_pieces(work, i, GROUPS, p->groups, in_group);
        else
            add_pieces(work, i, SUM_BLOCKS, p->groups * p->blocks, in_group / p->blocks);
    }
}

/* Its second wave: the rest is stepped, by rows. */
static void add_steps(WorkListBuilder *work, const Parameter *parameters, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++)
        if (is_columns(&parameters[i]) && parameters[i].blocks > 1)
            add_pieces(work, i, STEP_ROWS, parameters[i].groups * parameters[i].outer, parameters[i].units * parameters[i].inner);
}

/*
 * Lay out the work: fills in the parameters' blocks and scratch, the pieces, the first piece of each batch and the first
 * batch of each wave (and behind the last, their numbers). Waves run one after another. counts: pieces, batches,
 * waves, bytes of scratch. Without pieces only counts.
 */
EXPORT void gradcentral_plan(Parameter *parameters, int64_t n_parameters, int32_t dtype, WorkPiece *pieces, int64_t *batches,
                             int64_t *waves, int64_t *counts) {
    WorkListBuilder work = {pieces, batches, waves, 0, 0, 1, BATCH};
    if (waves) waves[0] = 0;
    for (int64_t i = 0; i < n_parameters; i++) {
        Parameter *p = &parameters[i];
        const int64_t elements = p->groups * p->outer * p->units * p->inner;
        p->blocks = 1;
        if (elements == 0 || is_columns(p)) continue;
        if (p->placement == PLAIN)
            add_pieces(&work, i, ELEMENTS, elements, 1);
        else
            add_pieces(&work, i, ROWS, p->groups, p->outer);
    }
    /*
     * One set of columns is stepped while the next is summed: sums | steps + sums | … | steps. Two sets are under way
     * at a time and take turns with two halves of the scratch, of which the first must hold the largest of its sets.
     */
    int64_t half = 0, scratch = 0, end, set = 0;
    for (int64_t from = 0, to; from < n_parameters; from = to, set++) {
        to = end_of_set(parameters, from, n_parameters);
        add_sums(&(WorkListBuilder){NULL, NULL, NULL, 0, 0, 0, 0}, parameters, from, to, dtype, 0, &end);
        if (set % 2 == 0 && end > half) half = end;
    }
    set = 0;
    for (int64_t from = 0, before = 0; before < n_parameters; set++) {
        const int64_t to = end_of_set(parameters, from, n_parameters);
        if (set > 0) add_steps(&work, parameters, before, from);
        add_sums(&work, parameters, from, to, dtype, set % 2 ? half : 0, &end);
        if (end > scratch) scratch = end;
        end_wave(&work);
        if (set > 0) before = from;
        from = to;
    }
    if (batches) batches[work.n_batches] = work.n_pieces;
    counts[0] = work.n_pieces, counts[1] = work.n_batches, counts[2] = work.n_waves - 1, counts[3] = scratch;
}

static void set_scratch(Parameter *parameters, int64_t n_parameters, char *scratch) {
    for (int64_t i = 0; i < n_parameters; i++) {
        Parameter *p = &parameters[i];
        const int64_t width = p->units * p->inner;
        if (!is_columns(p)) continue;
        p->sums = (double *)(scratch + p->scratch);
        p->means = p->sums + p->groups * p->blocks * width;
        p->missing = p->groups * p->blocks;
    }
}

#if defined(_OPENMP)
#define PARALLEL _Pragma("omp parallel num_threads(threads) if (threads > 1 && list->n_batches > 1)")
#define EACH _Pragma("omp for schedule(dynamic, 1)")
#else
#define PARALLEL
#define EACH
#endif

/* A work list as gradcentral_plan made it. */
typedef struct {
    const WorkPiece *pieces;
    const int64_t *batches, *waves;
    int64_t n_batches, n_waves;
    char *scratch;
} WorkList;

static void set_pointers(Parameter *parameters, int64_t n_parameters, void *const *pointers) {
    for (int64_t i = 0; i < n_parameters; i++) {
        parameters[i].w = pointers[i];
        parameters[i].g = pointers[i + n_parameters];
        parameters[i].m = pointers[i + n_parameters * 2];
        parameters[i].v = pointers[i + n_parameters * 3];
        parameters[i].x = pointers[i + n_parameters * 4];
    }
}

/* Count Adam's step and correct the bias of its averages, for each parameter by its own counter. */
static void count_steps(Parameter *parameters, int64_t n_parameters, void *const *pointers, const Coefficients *coefficients) {
    double seen = -1, step_size = 0, root_correction = 0;
    for (int64_t i = 0; i < n_parameters; i++) {
        void *step = pointers[i + n_parameters * 5];
        double t = parameters[i].step_is_f64 ? ++*(double *)step : ++*(float *)step;
        if (t != seen) {
            seen = t;
            step_size = coefficients->lr / (1 - pow(coefficients->beta1, t));
            root_correction = 1 / sqrt(1 - pow(coefficients->beta2, t));
        }
        parameters[i].step_size = step_size;
        parameters[i].root_correction = root_correction;
    }
}

/* One optimizer step of all parameters, which share their dtype and rule. */
EXPORT void gradcentral_step(Parameter *parameters, int64_t n_parameters, void *const *pointers, const WorkList *list, int32_t dtype,
                             int32_t kind, const Coefficients *coefficients, int32_t threads) {
    const StepPiece step_piece = STEPS[dtype][kind];
    set_pointers(parameters, n_parameters, pointers);
    set_scratch(parameters, n_parameters, list->scratch);
    if (kind == ADAM || kind == AMSGRAD) count_steps(parameters, n_parameters, pointers, coefficients);
    (void)threads;
    PARALLEL
    for (int64_t wave = 0; wave < list->n_waves; wave++) {
        EACH
        for (int64_t k = list->waves[wave]; k < list->waves[wave + 1]; k++)
            for (int64_t q = list->batches[k]; q < list->batches[k + 1]; q++)
                step_piece(&parameters[list->pieces[q].parameter], &list->pieces[q], coefficients);
    }
}

/*
 * Each parameter's w: center it, write the mean of each weight vector to means, or give each back the mean that stands
 * there. means holds the parameters' numbers one after another, parameter i's from first_mean[i]; CENTER takes NULL for both.
 */
EXPORT void gradcentral_center(Parameter *parameters, int64_t n_parameters, void *const *pointers, const WorkList *list, int32_t dtype,
                               int32_t what, double *means, const int64_t *first_mean, int32_t threads) {
    const CenterPiece center_piece = CENTERS[dtype];
    set_pointers(parameters, n_parameters, pointers);
    set_scratch(parameters, n_parameters, list->scratch);
    (void)threads;
    PARALLEL
    for (int64_t wave = 0; wave < list->n_waves; wave++) {
        EACH
        for (int64_t k = list->waves[wave]; k < list->waves[wave + 1]; k++)
            for (int64_t q = list->batches[k]; q < list->batches[k + 1]; q++) {
                const int64_t parameter = list->pieces[q].parameter;
                center_piece(&parameters[parameter], &list->pieces[q], what, what == CENTER ? NULL : means + first_mean[parameter]);
            }
    }
}

/* So that the caller can check that it agrees on the layout of the structures. */
EXPORT int64_t gradcentral_struct_size(int32_t which) {
    static const int64_t sizes[] = {sizeof(Parameter), sizeof(WorkPiece), sizeof(Coefficients), sizeof(WorkList)};
    return sizes[which];
}

EXPORT int32_t gradcentral_has_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/*
 * Reads and writes what a step does and computes nothing: the bound that memory sets, for measuring. Leaves every
 * value as it is, for zero is 0; the compiler must not know.
 */
EXPORT void gradcentral_stream(void *const *pointers, const int64_t *bytes, int64_t n_parameters, int32_t states,
                               uint64_t zero, int32_t threads) {
    enum { CHUNK = 1 << 20 };
    (void)threads;
    for (int64_t i = 0; i < n_parameters; i++) {
        const uint64_t *g = (const uint64_t *)pointers[i + n_parameters];
        const int64_t words = bytes[i] / 8, n_batches = (words + CHUNK / 8 - 1) / (CHUNK / 8);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (n_batches > 1)
#endif
        for (int64_t k = 0; k < n_batches; k++) {
            const int64_t begin = k * (CHUNK / 8), end = begin + CHUNK / 8 < words ? begin + CHUNK / 8 : words;
            uint64_t *w = (uint64_t *)pointers[i], *m = (uint64_t *)pointers[i + 2 * n_parameters],
                     *v = (uint64_t *)pointers[i + 3 * n_parameters];
            if (states == 2)
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= g[j] & zero, m[j] |= g[j] & zero, v[j] |= g[j] & zero;
            else if (states == 1)
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= g[j] & zero, m[j] |= g[j] & zero;
            else
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= zero;
        }
    }
}
