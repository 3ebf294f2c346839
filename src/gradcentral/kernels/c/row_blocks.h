/*
 * Blocks of whole rows. loops.h includes this file once per dtype and update rule.
 *
 * A loop over one row ends in a sum over the lanes of a vector and, if the row does not end with a
 * vector, in single elements, which for a row of ten elements is most of the work. A block
 * therefore consists of several such rows that are adjacent in memory. A buffer holds one number
 * per element, in the order of SLOT: under placements "gradient" and "regularized" the shift of its
 * row, with which the block is updated like a row of columns; under "update" what is subtracted
 * from the weight at the end.
 *
 * In bf16, the buffer also avoids computing Δw twice under "update". With Adam's square root and
 * division, this pays for every row that fits in the buffer, also if it is a block by itself.
 */
#ifndef GRADCENTRAL_ROW_BLOCKS_H
#define GRADCENTRAL_ROW_BLOCKS_H
enum {
    BUFFER = 16384,   /* most elements of a row that is a block by itself (Adam in bf16) */
    ROW_BLOCK = 2048, /* most elements of a block of several rows */
    SHORT_ROW = 256,  /* most elements of a row that shares a block with others */
};
#endif

/* Sum numbers of the buffer. */
INLINE double NAME(sum_buffer)(const REAL *restrict x, int64_t n) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += x[i];
    return total;
}

/* Replace each x by `value`, or by value − x. */
INLINE void NAME(fill_buffer)(REAL *restrict x, int64_t n, REAL value, const int subtract) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = subtract ? value - x[i] : value;
}

/* The two ranges of slots that elements [begin, end) of a block occupy (see SLOT). */
typedef struct {
    int64_t lower, n_lower, rest, n_rest;
} NAME(Slots);

INLINE NAME(Slots) NAME(slots)(int64_t begin, int64_t end, int64_t pairs) {
    const int64_t lower = (begin + 1) / 2,
                  lower_end = (end + 1) / 2 < pairs ? (end + 1) / 2 : pairs;
    const int64_t rest = begin > 2 * pairs ? begin : pairs + begin / 2;
    const int64_t rest_end = end > 2 * pairs ? end : pairs + end / 2;
    NAME(Slots) s = {lower, lower_end - lower, rest, rest_end - rest};
    return s;
}

/* Make the first pass of placement "update" over a block and write Δw to the buffer. */
INLINE void NAME(first_pass_into)(REAL *restrict buffer, NAME(Tensors) t, int64_t n,
                                  NAME(Scalars) c) {
    const int64_t pairs = PAIRS(n);
    EACH_STRETCH (from, to, n) {
        NAME(prefetch)(t, from, to);
        prefetch(t.g + from, t.g + to);
        if (DTYPE == BF16) {
#pragma omp simd
            for (int64_t k = from / 2; k < to / 2; k++) {
                REAL low, high;
                NAME(first_pass_at_pair)(t, 2 * k, &low, &high, c);
                buffer[k] = low, buffer[pairs + k] = high;
            }
            if (to % 2) buffer[to - 1] = NAME(first_pass_at)(t, to - 1, c);
        } else {
#pragma omp simd
            for (int64_t i = from; i < to; i++) buffer[i] = NAME(first_pass_at)(t, i, c);
        }
    }
}

/* Return what is subtracted from all weights of a row under placement "update". In bf16, the first
 * pass has not changed the weights. If the mean does not exist, add Δw here, without a buffer that
 * holds NaN for it. */
INLINE REAL NAME(finite_mean)(REAL mean, NAME(Tensors) row, int64_t n, NAME(Scalars) c) {
    if (IS_FINITE(mean)) return mean;
    if (DTYPE == BF16) NAME(second_pass_over)(row, n, NULL, 0, 0, c);
    return 0;
}

CLONES static void NAME(row_blocks)(const Parameter *p, int64_t begin, int64_t end,
                                    const Coefficients *coefficients) {
    REAL buffer[DTYPE == BF16 && HAS_V ? BUFFER : ROW_BLOCK];
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int update = p->placement == UPDATE;
    const double strength = coefficients->strength;
    const int64_t n = p->outer, most = n < ROW_BLOCK ? ROW_BLOCK / n : 1;
    for (int64_t r = begin; r < end; r += most) {
        const int64_t rows = most < end - r ? most : end - r, size = rows * n, pairs = PAIRS(size);
        if (update) NAME(first_pass_into)(buffer, NAME(tensors)(p, r * n), size, c);
        for (int64_t i = 0; i < rows; i++) {
            const NAME(Tensors) row = NAME(tensors)(p, (r + i) * n);
            const NAME(Slots) s = NAME(slots)(i * n, (i + 1) * n, pairs);
            REAL *low = buffer + s.lower, *rest = buffer + s.rest;
            if (update) {
                const double total =
                    NAME(sum_buffer)(low, s.n_lower) + NAME(sum_buffer)(rest, s.n_rest);
                const REAL mean = (REAL)(strength * (total / n));
                const REAL shift = NAME(finite_mean)(mean, row, n, c);
                const int subtract = DTYPE == BF16 && IS_FINITE(mean);
                NAME(fill_buffer)(low, s.n_lower, shift, subtract);
                NAME(fill_buffer)(rest, s.n_rest, shift, subtract);
            } else {
                const double mean = p->placement == GRADIENT
                                        ? coefficients->scale * (JOIN2(sum, SUFFIX)(row.g, n) / n)
                                        : NAME(first_pass_over)(row, n, 0, c) / n;
                NAME(fill_buffer)(low, s.n_lower, (REAL)(strength * mean), 0);
                NAME(fill_buffer)(rest, s.n_rest, (REAL)(strength * mean), 0);
            }
        }
        if (update)
            JOIN2(subtract, SUFFIX)((STORED *)p->w + r * n, size, buffer, 0, 1);
        else
            NAME(step_elements)(NAME(tensors)(p, r * n), size, buffer, 0, 1, NULL, 0, c);
    }
}
