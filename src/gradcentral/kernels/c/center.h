/*
 * Means of weight vectors, and Φ in place: x ← x − (mean(x) − kept). Included once per dtype.
 *
 * kept is 0 for centering a gradient, and the mean before the step for the placement "update", which thus restores
 * the mean of each weight vector: w ← w + Φ(Δw). Sums are in double.
 */
#define NAME(name) JOIN2(name, SUFFIX)

INLINE double NAME(sum)(const STORED *restrict x, int64_t n) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < n; j++) total += LOAD(x[j]);
    return total;
}

/* Sums of the columns of a rows × width slice whose rows are stride apart. Four rows at a time, so that the running
 * sums are read and written a quarter as often. */
INLINE void NAME(sum_columns)(const STORED *restrict x, int64_t rows, int64_t width, int64_t stride,
                              double *restrict sums) {
    memset(sums, 0, (size_t)width * sizeof *sums);
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const STORED *restrict r0 = x + i * stride, *restrict r1 = r0 + stride, *restrict r2 = r1 + stride,
                     *restrict r3 = r2 + stride;
#pragma omp simd
        for (int64_t j = 0; j < width; j++)
            sums[j] += ((double)LOAD(r0[j]) + LOAD(r1[j])) + ((double)LOAD(r2[j]) + LOAD(r3[j]));
    }
    for (; i < rows; i++) {
        const STORED *restrict row = x + i * stride;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sums[j] += LOAD(row[j]);
    }
}

CLONES static void NAME(center_rows)(const Item *item, int64_t begin, int64_t end, const double *kept) {
    const int64_t n = item->a;
    STORED *x = (STORED *)item->w;
    for (int64_t r = begin; r < end; r++) {
        STORED *restrict row = x + r * n;
        const REAL shift = (REAL)(NAME(sum)(row, n) / n - (kept ? kept[r] : 0));
#pragma omp simd
        for (int64_t j = 0; j < n; j++) row[j] = STORE(LOAD(row[j]) - shift);
    }
}

CLONES static void NAME(mean_rows)(const Item *item, int64_t begin, int64_t end, double *means) {
    const STORED *x = (const STORED *)item->w;
    for (int64_t r = begin; r < end; r++) means[r] = NAME(sum)(x + r * item->a, item->a) / item->a;
}

CLONES static void NAME(mean_panel)(const Item *item, Panel p, double *means) {
    double sums[PANEL];
    NAME(sum_columns)((const STORED *)item->w + p.offset, item->a, p.width, p.stride, sums);
    unit_means(item, p, sums);
    for (int64_t u = 0; u < p.units; u++) means[p.first_unit + u] = sums[u * item->b];
}

CLONES static void NAME(center_panel)(const Item *item, Panel p, const double *kept) {
    double sums[PANEL];
    REAL shift[PANEL];
    STORED *x = (STORED *)item->w + p.offset;
    NAME(sum_columns)(x, item->a, p.width, p.stride, sums);
    unit_means(item, p, sums);
    for (int64_t j = 0; j < p.width; j++) shift[j] = (REAL)(sums[j] - (kept ? kept[p.first_unit + j / item->b] : 0));
    for (int64_t i = 0; i < item->a; i++) {
        STORED *restrict row = x + i * p.stride;
#pragma omp simd
        for (int64_t j = 0; j < p.width; j++) row[j] = STORE(LOAD(row[j]) - shift[j]);
    }
}

/* A unit whose innermost run alone is wider than a panel: a run at a time. */
CLONES static void NAME(center_runs)(const Item *item, Panel p, const double *kept, double *means) {
    STORED *x = (STORED *)item->w + p.offset;
    double total = 0;
    for (int64_t i = 0; i < item->a; i++) total += NAME(sum)(x + i * p.stride, p.width);
    const double mean = total / ((double)item->a * (double)item->b);
    if (means) {
        means[p.first_unit] = mean;
        return;
    }
    const REAL shift = (REAL)(mean - (kept ? kept[p.first_unit] : 0));
    for (int64_t i = 0; i < item->a; i++) {
        STORED *restrict run = x + i * p.stride;
#pragma omp simd
        for (int64_t j = 0; j < p.width; j++) run[j] = STORE(LOAD(run[j]) - shift);
    }
}

static void NAME(center_piece)(const Item *item, const Piece *piece, int what, double *means) {
    const double *kept = what == RESTORE ? means : NULL;
    if (is_rows(item)) {
        if (what == MEANS)
            NAME(mean_rows)(item, piece->begin, piece->end, means);
        else
            NAME(center_rows)(item, piece->begin, piece->end, kept);
        return;
    }
    for (int64_t index = piece->begin; index < piece->end; index++) {
        const Panel p = panel(item, index, sizeof(STORED));
        if (item->b > PANEL)
            NAME(center_runs)(item, p, kept, what == MEANS ? means : NULL);
        else if (what == MEANS)
            NAME(mean_panel)(item, p, means);
        else
            NAME(center_panel)(item, p, kept);
    }
}
#undef NAME
