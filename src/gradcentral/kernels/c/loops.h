/* The loops of one step over memory: elements, rows and columns, with the passes of step.h, which
 * includes this file once per dtype and update rule. Every INLINE function is compiled separately
 * for each constant argument, so that no loop contains a branch. */

/* Prefetch the part of the tensors that follows a stretch at distance AHEAD. */
INLINE void NAME(prefetch)(NAME(Tensors) t, int64_t from, int64_t to) {
    prefetch(t.w + from, t.w + to);
    if (HAS_M) prefetch(t.m + from, t.m + to);
    if (HAS_V) prefetch(t.v + from, t.v + to);
    if (HAS_X) prefetch(t.x + from, t.x + to);
}

/* Update n elements, with one shift per element (`many`, in the order of SLOT) or the same shift.
 * With `sum_next`, also return the sum over `next`, the gradient of the next row. */
INLINE double NAME(step_elements)(NAME(Tensors) t, int64_t n, const REAL *restrict shifts,
                                  REAL shift, const int many, const STORED *restrict next,
                                  const int sum_next, NAME(Scalars) c) {
    const int64_t pairs = PAIRS(n);
    double total = 0;
    EACH_STRETCH (from, to, n) {
        NAME(prefetch)(t, from, to);
        if (sum_next)
            prefetch(next + from, next + to);
        else
            prefetch(t.g + from, t.g + to);
        PARTIAL sum = 0;
        if (DTYPE == BF16) {
#pragma omp simd reduction(+ : sum)
            for (int64_t k = from / 2; k < to / 2; k++) {
                NAME(step_at_pair)(t, 2 * k, many ? shifts[k] : shift,
                                   many ? shifts[pairs + k] : shift, c);
                if (sum_next) sum += lower(word_of(next + 2 * k)) + upper(word_of(next + 2 * k));
            }
            if (to % 2) {
                NAME(step_at)(t, to - 1, many ? shifts[to - 1] : shift, c);
                if (sum_next) sum += LOAD(next[to - 1]);
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = from; i < to; i++) {
                NAME(step_at)(t, i, many ? shifts[i] : shift, c);
                if (sum_next) sum += LOAD(next[i]);
            }
        }
        total += sum;
    }
    return total;
}

/* Make the first pass of placement "update" over n elements and return the sum of Δw, or that of
 * "regularized" and return the sum of g + λw. */
INLINE double NAME(first_pass_over)(NAME(Tensors) t, int64_t n, const int update, NAME(Scalars) c) {
    double total = 0;
    EACH_STRETCH (from, to, n) {
        NAME(prefetch)(t, from, to);
        prefetch(t.g + from, t.g + to);
        PARTIAL sum = 0;
        if (DTYPE == BF16) {
#pragma omp simd reduction(+ : sum)
            for (int64_t k = from / 2; k < to / 2; k++) {
                REAL low, high;
                if (update)
                    NAME(first_pass_at_pair)(t, 2 * k, &low, &high, c);
                else
                    NAME(direction_at_pair)(t, 2 * k, &low, &high, c);
                sum += low + high;
            }
            if (to % 2)
                sum +=
                    update ? NAME(first_pass_at)(t, to - 1, c) : NAME(direction_at)(t, to - 1, c);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = from; i < to; i++)
                sum += update ? NAME(first_pass_at)(t, i, c) : NAME(direction_at)(t, i, c);
        }
        total += sum;
    }
    return total;
}

/* Make the second pass over n elements, with one mean per element (`many`) or the same mean. */
INLINE void NAME(second_pass_over)(NAME(Tensors) t, int64_t n, const REAL *restrict means,
                                   REAL mean, const int many, NAME(Scalars) c) {
    const int64_t pairs = PAIRS(n);
    if (DTYPE == BF16) {
#pragma omp simd
        for (int64_t k = 0; k < pairs; k++)
            NAME(second_pass_at_pair)(t, 2 * k, many ? means[k] : mean,
                                      many ? means[pairs + k] : mean, c);
        if (n % 2) NAME(second_pass_at)(t, n - 1, many ? means[n - 1] : mean, c);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) NAME(second_pass_at)(t, i, many ? means[i] : mean, c);
    }
}

CLONES static void NAME(plain_elements)(const Parameter *p, int64_t begin, int64_t end,
                                        const Coefficients *coefficients) {
    NAME(step_elements)(NAME(tensors)(p, begin), end - begin, NULL, 0, 0, NULL, 0,
                        NAME(scalars)(p, coefficients));
}

/* While row r is updated, the gradient of row r + 1 is summed in the same loop, so that no phase of
 * a step only reads memory. */
CLONES static void NAME(gradient_rows)(const Parameter *p, int64_t begin, int64_t end,
                                       const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t n = p->outer;
    const STORED *g = (const STORED *)p->g;
    double total = JOIN2(sum, SUFFIX)(g + begin * n, n);
    for (int64_t r = begin; r < end; r++) {
        const STORED *next = g + (r + 1 < end ? r + 1 : r) * n;
        const REAL shift = (REAL)(coefficients->strength * (coefficients->scale * (total / n)));
        total = NAME(step_elements)(NAME(tensors)(p, r * n), n, NULL, shift, 0, next, 1, c);
    }
}

CLONES static void NAME(update_rows)(const Parameter *p, int64_t begin, int64_t end,
                                     const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t n = p->outer;
    for (int64_t r = begin; r < end; r++) {
        const double total = NAME(first_pass_over)(NAME(tensors)(p, r * n), n, 1, c);
        NAME(second_pass_over)(NAME(tensors)(p, r * n), n, NULL,
                               OR_ZERO((REAL)(coefficients->strength * (total / n))), 0, c);
    }
}

CLONES static void NAME(regularized_rows)(const Parameter *p, int64_t begin, int64_t end,
                                          const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t n = p->outer;
    for (int64_t r = begin; r < end; r++) {
        const double total = NAME(first_pass_over)(NAME(tensors)(p, r * n), n, 0, c);
        NAME(step_elements)(NAME(tensors)(p, r * n), n, NULL,
                            (REAL)(coefficients->strength * (total / n)), 0, NULL, 0, c);
    }
}

#include "row_blocks.h"

static void NAME(rows)(const Parameter *p, int64_t begin, int64_t end,
                       const Coefficients *coefficients) {
    const int is_ragged = p->outer <= SHORT_ROW && p->outer % (CACHE_LINE / sizeof(STORED)) != 0;
    const int is_costly = DTYPE == BF16 && HAS_V && p->placement == UPDATE && p->outer <= BUFFER;
    if (is_ragged || is_costly)
        NAME(row_blocks)(p, begin, end, coefficients);
    else if (p->placement == GRADIENT)
        NAME(gradient_rows)(p, begin, end, coefficients);
    else if (p->placement == UPDATE)
        NAME(update_rows)(p, begin, end, coefficients);
    else
        NAME(regularized_rows)(p, begin, end, coefficients);
}

/* Add the results of the first pass over a block to its column sums. */
INLINE void NAME(add_block)(const Parameter *p, int64_t index, const int update,
                            const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const Block block = block_of(p, index);
    double *restrict sums = p->sums + index * block.width;
    memset(sums, 0, (size_t)block.width * sizeof *sums);
    for (int64_t i = 0; i < block.rows; i++) {
        const NAME(Tensors) t = NAME(tensors)(p, (block.row + i) * block.width);
        const int64_t pairs = PAIRS(block.width);
#pragma omp simd
        for (int64_t k = 0; k < pairs; k++) {
            REAL low, high;
            if (update)
                NAME(first_pass_at_pair)(t, 2 * k, &low, &high, c);
            else
                NAME(direction_at_pair)(t, 2 * k, &low, &high, c);
            sums[k] += low, sums[pairs + k] += high;
        }
#pragma omp simd
        for (int64_t k = 2 * pairs; k < block.width; k++)
            sums[k] += update ? NAME(first_pass_at)(t, k, c) : NAME(direction_at)(t, k, c);
    }
}

/* Make the first pass over a block of columns: compute the column sums of the gradient, of Δw or of
 * g + λw. */
CLONES static void NAME(sum_block)(const Parameter *p, int64_t index,
                                   const Coefficients *coefficients) {
    switch (p->placement) {
    case GRADIENT: JOIN2(sum_block, SUFFIX)(p, index, coefficients); break;
    case UPDATE: NAME(add_block)(p, index, 1, coefficients); break;
    default: NAME(add_block)(p, index, 0, coefficients);
    }
}

/* Make the second pass over rows [begin, end) of columns, counted over all groups, with the
 * finished means. */
CLONES static void NAME(step_columns)(const Parameter *p, int64_t begin, int64_t end,
                                      const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t width = width_of(p);
    for (int64_t row = begin; row < end; row++) {
        const NAME(Tensors) t = NAME(tensors)(p, row * width);
        const REAL *means = (const REAL *)p->means + row / p->outer * width;
        if (p->placement == UPDATE)
            NAME(second_pass_over)(t, width, means, 0, 1, c);
        else
            NAME(step_elements)(t, width, means, 0, 1, NULL, 0, c);
    }
}

static const Kernels JOIN2(RULE_NAME, SUFFIX) = {NAME(plain_elements), NAME(rows), NAME(sum_block),
                                                 JOIN2(finish_means, SUFFIX), NAME(step_columns)};
