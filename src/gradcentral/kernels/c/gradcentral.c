/*
 * Gradient Centralization on the CPU: fused optimizer steps, and centering alone, for all
 * parameters in one call.
 *
 * This is plain C, called through ctypes, without Python and torch headers, so that one library
 * works with every version of both.
 *
 *     step.h       the update rules and the steps     center.h     means and centering
 *     work_list.h  the division of the work           kernels.h    the structures
 *     dtype.h      definitions per dtype              bf16.h       two bf16 numbers in a word
 *     loops.h      loops over memory                  row_blocks.h short rows, several at a time
 */
#include "kernels.h"
#include "bf16.h"
#include "work_list.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#define DTYPE F32
#include "dtype.h"
#define DTYPE F64
#include "dtype.h"
#define DTYPE BF16
#include "dtype.h"

#define KERNELS_OF(dtype)                                                    \
    {&sgd_##dtype,    &momentum_##dtype, &adam_##dtype,    &amsgrad_##dtype, \
     &center_##dtype, &means_##dtype,    &restore_##dtype, &shift_##dtype}
/* Indexed by dtype, then by UpdateRule or Operation. */
static const Kernels *const KERNELS[3][8] = {KERNELS_OF(f32), KERNELS_OF(f64), KERNELS_OF(bf16)};

static void run_piece(const Kernels *kernels, Parameter *p, const WorkPiece *piece,
                      const Coefficients *coefficients) {
    const int64_t begin = piece->begin, end = piece->end;
    switch (piece->kind) {
    case ELEMENTS: kernels->elements(p, begin, end, coefficients); break;
    case ROWS: kernels->rows(p, begin, end, coefficients); break;
    case GROUPS:
        for (int64_t group = begin; group < end; group++) {
            kernels->sum_block(p, group, coefficients);
            kernels->finish_means(p, group, coefficients);
            if (kernels->columns)
                kernels->columns(p, group * p->outer, (group + 1) * p->outer, coefficients);
        }
        break;
    case SUM_BLOCKS:
        for (int64_t index = begin; index < end; index++)
            kernels->sum_block(p, index, coefficients);
        if (all_summed(p, piece))
            for (int64_t group = 0; group < p->groups; group++)
                kernels->finish_means(p, group, coefficients);
        break;
    case STEP_ROWS:
        if (kernels->columns) kernels->columns(p, begin, end, coefficients);
    }
}

/* `pointers` holds all w, then all g, m, v, x, and Adam's step counters. */
static void set_up(Parameter *parameters, int64_t n, void *const *pointers, char *scratch,
                   double *means) {
    for (int64_t i = 0; i < n; i++) {
        Parameter *p = &parameters[i];
        p->w = pointers[i];
        p->g = pointers[i + n];
        p->m = pointers[i + n * 2];
        p->v = pointers[i + n * 3];
        p->x = pointers[i + n * 4];
        p->kept = means;
        if (means) means += vectors_of(p);
        if (!is_columns(p)) continue;
        p->sums = (double *)(scratch + p->scratch);
        p->means = p->sums + p->groups * p->blocks * width_of(p);
        p->missing = p->groups * p->blocks;
    }
}

/* Count Adam's step and compute the bias corrections of each parameter from its own counter. */
static void count_steps(Parameter *parameters, int64_t n, void *const *pointers,
                        const Coefficients *coefficients) {
    double last = -1, step_size = 0, root_correction = 0;
    for (int64_t i = 0; i < n; i++) {
        void *step = pointers[i + n * 5];
        double t = parameters[i].step_is_f64 ? ++*(double *)step : ++*(float *)step;
        if (t != last) {
            last = t;
            step_size = coefficients->lr / (1 - pow(coefficients->beta1, t));
            root_correction = 1 / sqrt(1 - pow(coefficients->beta2, t));
        }
        parameters[i].step_size = step_size;
        parameters[i].root_correction = root_correction;
    }
}

#if defined(_OPENMP)
#define PARALLEL \
    _Pragma("omp parallel num_threads(threads) if (threads > 1 && list->n_batches > 1)")
#define EACH _Pragma("omp for schedule(dynamic, 1)")
#else
#define PARALLEL
#define EACH
#endif

/* Process parameters of one dtype: take an optimizer step (`rule` is an UpdateRule), or center each
 * w (CENTER), write the mean of each weight vector to `means` (MEANS), restore these means
 * (RESTORE), or shift each weight vector to the mean given there (SHIFT). */
EXPORT void gradcentral_run(Parameter *parameters, int64_t n, void *const *pointers,
                            const WorkList *list, int32_t dtype, int32_t rule,
                            const Coefficients *coefficients, double *means, int32_t threads) {
    set_up(parameters, n, pointers, list->scratch, means);
    if (rule == ADAM || rule == AMSGRAD) count_steps(parameters, n, pointers, coefficients);
    (void)threads;
    PARALLEL
    for (int64_t wave = 0; wave < list->n_waves; wave++) {
        EACH
        for (int64_t k = list->waves[wave]; k < list->waves[wave + 1]; k++)
            for (int64_t j = list->batches[k]; j < list->batches[k + 1]; j++)
                run_piece(KERNELS[dtype][rule], &parameters[list->pieces[j].parameter],
                          &list->pieces[j], coefficients);
    }
}

/* Return the size of a structure, so that the caller can check its own definition. */
EXPORT int64_t gradcentral_struct_size(int32_t which) {
    static const int64_t sizes[] = {sizeof(Parameter), sizeof(WorkPiece), sizeof(Coefficients),
                                    sizeof(WorkList)};
    return sizes[which];
}

EXPORT int32_t gradcentral_has_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* Read and write the memory of a step without computing, to measure the bound that memory bandwidth
 * sets. Values do not change, because `zero` is 0; it is an argument so that the compiler cannot
 * drop the accesses. */
EXPORT void gradcentral_stream(void *const *pointers, const int64_t *bytes, int64_t n,
                               int32_t states, uint64_t zero, int32_t threads) {
    enum { CHUNK = 1 << 20 };
    (void)threads;
    for (int64_t i = 0; i < n; i++) {
        const uint64_t *g = (const uint64_t *)pointers[i + n];
        const int64_t words = bytes[i] / 8, chunks = (words + CHUNK / 8 - 1) / (CHUNK / 8);
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (chunks > 1)
#endif
        for (int64_t k = 0; k < chunks; k++) {
            const int64_t begin = k * (CHUNK / 8),
                          end = begin + CHUNK / 8 < words ? begin + CHUNK / 8 : words;
            uint64_t *w = (uint64_t *)pointers[i], *m = (uint64_t *)pointers[i + 2 * n],
                     *v = (uint64_t *)pointers[i + 3 * n];
            if (states == 2)
#pragma omp simd
                for (int64_t j = begin; j < end; j++)
                    w[j] |= g[j] & zero, m[j] |= g[j] & zero, v[j] |= g[j] & zero;
            else if (states == 1)
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= g[j] & zero, m[j] |= g[j] & zero;
            else
#pragma omp simd
                for (int64_t j = begin; j < end; j++) w[j] |= zero;
        }
    }
}
