/* What the kernels share: one parameter of a step, the coefficients of a rule, and the work list. */
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

/* The same source for AVX-512, AVX2 and the baseline; the loader picks one when the library is loaded. */
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

/* Names of their own for each dtype and rule: sum_f32, step_piece_adam_bf16. */
#define JOIN2_(a, b) a##_##b
#define JOIN2(a, b) JOIN2_(a, b)
#define JOIN3(a, b, c) JOIN2(a, JOIN2(b, c))

enum { PLAIN = 0, GRADIENT = 1, UPDATE = 2 };                  /* where a parameter is centered */

/* Update rules, and types of all of a parameter's tensors: macros, for the preprocessor compares them. */
#define SGD 0
#define MOMENTUM 1
#define ADAM 2
#define AMSGRAD 3
#define F32 0
#define F64 1
#define BF16 2

/*
 * One parameter, in memory order: element (g, i, u, j) of group × a × unit × b lies at ((g·a + i)·unit + u)·b + j,
 * and (g, u) names an output unit, whose weight vector runs over i and j. Rows are (n, fan-in, 1, 1).
 */
typedef struct {
    int64_t groups, outer, units, inner;
    int32_t placement;
    int32_t fresh;               /* MOMENTUM: the buffer is new and starts as the direction itself */
    int32_t step_is_f64;         /* Adam: the type of the step counter, f32 or f64 */
    int32_t blocks;              /* columns: into how many blocks of rows a group is cut to be summed */
    int64_t scratch;             /* columns: where its sums and means begin in the scratch, in bytes */
    /* Filled in at each step, from the table that comes with it: all w, all g, m, v, x, and Adam's step counters. */
    void *w, *g, *m, *v, *x;     /* weight, gradient, momentum, squares, largest squares (as the rule needs) */
    double step_size;            /* Adam: η / (1 − β₁ᵗ) */
    double root_correction;      /* Adam: 1 / √(1 − β₂ᵗ) */
    double *sums;                /* columns: group × blocks × width */
    void *means;                 /* columns: group × width, in the type to compute in */
    int64_t missing;             /* columns: blocks that are not summed yet */
} Parameter;

/* What a loop over a row does besides stepping: a mean for each element, not one for all; add up the next row. */
enum { MANY = 1, SUM = 2 };

/*
 * What one thread does at a stretch: a range of an parameter's elements (not centered), of its rows, of its groups of
 * columns (each summed and then stepped), or, where a group is too large for one thread, of its blocks to sum and,
 * after all of those, of its rows to step.
 */
enum { ELEMENTS, ROWS, GROUPS, SUM_BLOCKS, STEP_ROWS };

typedef struct {
    int64_t parameter, begin, end;
    int64_t kind;
} WorkPiece;

typedef struct {
    double lr, l2, decay;        /* η, λ of g + λw, and the decoupled decay per step, η·λ */
    double momentum, keep;       /* μ, and 1 − dampening */
    double nesterov;             /* 0 or 1 */
    double beta1, beta2, epsilon;
    double scale;                /* of the gradient: −1 to maximize, 1/grad_scale to unscale */
} Coefficients;

#endif
