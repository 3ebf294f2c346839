/* Definitions that all kernels share: a parameter, an update rule's coefficients, the work list. */
#ifndef GRADCENTRAL_KERNELS_H
#define GRADCENTRAL_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Compile a function for AVX-512, AVX2 and the baseline; the loader selects one version. */
#if defined(GRADCENTRAL_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/*
 * Loops that read elements or rows from memory run in stretches of at most STRETCH elements. Before
 * each, they request the memory AHEAD bytes further on in every tensor. The processor prefetches by
 * itself, but only as far ahead as the instructions that it holds, and a step has many of them per
 * byte, above all in bf16. Rows and pieces are contiguous, so the requests run on into the next
 * ones; a request beyond the end of a tensor is harmless. Longer stretches were slower: their
 * requests exceed what the processor can have outstanding. Loops that sum columns make no requests,
 * and neither does the second pass of placement "update".
 */
enum { STRETCH = 256, AHEAD = 2048, CACHE_LINE = 64 };

INLINE void prefetch(const void *begin, const void *end) {
#if defined(__GNUC__)
    for (uintptr_t at = (uintptr_t)begin; at < (uintptr_t)end; at += CACHE_LINE)
        __builtin_prefetch((const void *)(at + AHEAD));
#else
    (void)begin, (void)end;
#endif
}

/* One name per dtype and update rule: sum_f32, step_piece_adam_bf16. */
#define JOIN2_(a, b) a##_##b
#define JOIN2(a, b) JOIN2_(a, b)
#define JOIN3(a, b, c) JOIN2(a, JOIN2(b, c))

/* The enumerations of forms.py, with the same numbers. */
enum { PLAIN = 0, GRADIENT = 1, UPDATE = 2, REGULARIZED = 3 }; /* Placement */
enum { CENTER = 4, MEANS = 5, RESTORE = 6, SHIFT = 7 };        /* Operation */

/* UpdateRule, and the dtypes. They are macros because the preprocessor compares them. */
#define SGD 0
#define MOMENTUM 1
#define ADAM 2
#define AMSGRAD 3
#define F32 0
#define F64 1
#define BF16 2

/*
 * One parameter of a step (or one tensor to be centered: its w), as the loop of loops.py: element
 * (g, i, u, j) of groups × outer × units × inner lies at ((g·outer + i)·units + u)·inner + j. The
 * output unit is (g, u), and its weight vector runs over i and j. There are two forms,
 * distinguished by width = units·inner:
 *
 *     rows     width = 1: a weight vector is contiguous; (n, fan-in, 1, 1)
 *     columns  width > 1: `outer` rows of `width` elements per group; a column belongs to one unit
 *
 * In a strided transposed convolution, a unit has several weight vectors, one per phase. They share
 * its `inner` columns, and same_as tells them apart.
 */
typedef struct {
    int64_t groups, outer, units, inner;
    int64_t phases;         /* weight vectors per unit */
    const int64_t *same_as; /* for each of the `inner` columns, the first one of the same phase;
                               NULL if phases = 1 */
    int32_t placement;
    int32_t fresh;       /* MOMENTUM: the buffer is new and starts as the direction itself */
    int32_t step_is_f64; /* Adam: the step counter is f64, not f32 */
    int32_t blocks;  /* columns: number of blocks of rows into which a group is cut for summing */
    int64_t scratch; /* columns: offset of its sums and means in the scratch memory, in bytes */
    /* Set at each call. */
    void *w, *g, *m, *v, *x; /* weight, gradient, momentum, squares, largest squares */
    double step_size;        /* Adam: η / (1 − β₁ᵗ) */
    double root_correction;  /* Adam: 1 / √(1 − β₂ᵗ) */
    double *sums;            /* columns: groups × blocks × width */
    void *means;             /* columns: groups × width, of type REAL (see dtype.h) */
    double *kept;            /* MEANS, RESTORE, SHIFT: its means, in the caller's memory */
    int64_t missing;         /* columns: number of blocks not yet summed */
} Parameter;

INLINE int64_t width_of(const Parameter *p) { return p->units * p->inner; }
INLINE int64_t size_of(const Parameter *p) { return p->groups * p->outer * width_of(p); }
INLINE int64_t vectors_of(const Parameter *p) { return p->groups * p->units * p->phases; }
INLINE int is_columns(const Parameter *p) { return p->placement != PLAIN && width_of(p) > 1; }

/*
 * A piece of the work is a range [begin, end) of one of these kinds:
 *     ELEMENTS    elements of a parameter that is not centered;
 *     ROWS        weight vectors that are rows;
 *     GROUPS      groups of columns that one thread sums and then updates;
 *     SUM_BLOCKS  blocks of rows to sum, for groups that are too large for one thread;
 *     STEP_ROWS   rows of these groups to update, in a later wave.
 */
enum { ELEMENTS, ROWS, GROUPS, SUM_BLOCKS, STEP_ROWS };

typedef struct {
    int64_t parameter, begin, end;
    int64_t kind;
} WorkPiece;

/* The work of one call: waves of batches of pieces. Waves run one after another; the batches of a
 * wave run in parallel. Batch k has the pieces batches[k] to batches[k + 1] − 1, and likewise for
 * waves. */
typedef struct {
    const WorkPiece *pieces;
    const int64_t *batches, *waves;
    int64_t n_batches, n_waves;
    char *scratch;
} WorkList;

typedef struct {
    double lr, l2, decay;  /* η; λ of g + λw; decoupled weight decay per step, η·λ */
    double momentum, keep; /* μ; 1 − dampening */
    double nesterov;       /* 0 or 1 */
    double beta1, beta2, epsilon;
    double scale;    /* of the gradient: −1 to maximize, 1/grad_scale to unscale */
    double strength; /* s: the part of each mean that is subtracted */
} Coefficients;

/* The functions of one update rule or Operation for one dtype. Each processes a range of the work,
 * a block or a group. */
typedef void RangeFunction(const Parameter *, int64_t begin, int64_t end, const Coefficients *);
typedef void IndexFunction(const Parameter *, int64_t index, const Coefficients *);

typedef struct {
    RangeFunction *elements, *rows;
    IndexFunction *sum_block, *finish_means;
    RangeFunction *columns; /* NULL if columns are only to be averaged */
} Kernels;

#endif
