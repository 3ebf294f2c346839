/*
 * Means of weight vectors, and Φ in place: x ← x − (mean(x) − kept). Included once per dtype.
 *
 * kept is 0 for centering a gradient, and the mean before the step for the placement "update", which thus restores
 * the mean of each weight vector: w ← w + Φ(Δw).
 */
#define NAME(name) JOIN2(name, SUFFIX)

INLINE double NAME(sum)(const STORED *restrict x, int64_t n) {
    double total = 0;
    for (int64_t from = 0; from < n; from += STRETCH) {
        const int64_t to = n - from < STRETCH ? n : from + STRETCH;
        PARTIAL partial = 0;
#pragma omp simd reduction(+ : partial)
        for (int64_t j = from; j < to; j++) partial += LOAD(x[j]);
        total += partial;
        if (to == n) break;
    }
    return total;
}

/* Sums of the columns of rows × width. Four rows at a time: the running sums are read and written a quarter as often. */
INLINE void NAME(sum_columns)(const STORED *restrict x, int64_t rows, int64_t width, double *restrict sums) {
    memset(sums, 0, (size_t)width * sizeof *sums);
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const STORED *restrict r0 = x + i * width, *restrict r1 = r0 + width, *restrict r2 = r1 + width,
                     *restrict r3 = r2 + width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++)
            sums[j] += ((PARTIAL)LOAD(r0[j]) + LOAD(r1[j])) + ((PARTIAL)LOAD(r2[j]) + LOAD(r3[j]));
    }
    for (; i < rows; i++) {
        const STORED *restrict row = x + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sums[j] += LOAD(row[j]);
    }
}

/* The column sums of a group's blocks to the mean of each unit, given to each of the unit's columns. */
static void NAME(finish_means)(const Item *item, int64_t group) {
    const int64_t width = item->unit * item->b;
    const double fan_in = (double)item->a * (double)item->b;
    const double *sums = item->sums + group * item->blocks * width;
    REAL *means = (REAL *)item->means + group * width;
    for (int64_t u = 0; u < item->unit; u++) {
        double total = 0;
        for (int64_t block = 0; block < item->blocks; block++)
            for (int64_t k = 0; k < item->b; k++) total += sums[block * width + u * item->b + k];
        for (int64_t k = 0; k < item->b; k++) means[u * item->b + k] = (REAL)(total / fan_in);
    }
}

CLONES static void NAME(sum_block)(const Item *item, const STORED *x, int64_t index) {
    const Block at = block_of(item, index);
    NAME(sum_columns)(x + at.row * at.width, at.rows, at.width, item->sums + index * at.width);
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

CLONES static void NAME(center_block)(const Item *item, int64_t index) {
    const Block at = block_of(item, index);
    STORED *x = (STORED *)item->w + at.row * at.width;
    REAL *restrict shift = (REAL *)item->means + at.group * at.width;
    for (int64_t i = 0; i < at.rows; i++) {
        STORED *restrict row = x + i * at.width;
#pragma omp simd
        for (int64_t j = 0; j < at.width; j++) row[j] = STORE(LOAD(row[j]) - shift[j]);
    }
}

/* A group's means are known: write them out, or make them the shifts that give the kept ones back. */
static void NAME(use_means)(const Item *item, int64_t group, int what, double *means) {
    const int64_t width = item->unit * item->b;
    REAL *own = (REAL *)item->means + group * width;
    for (int64_t u = 0; u < item->unit && what != CENTER; u++) {
        double *kept = &means[group * item->unit + u];
        if (what == MEANS)
            *kept = own[u * item->b];
        else
            for (int64_t k = 0; k < item->b; k++) own[u * item->b + k] -= (REAL)*kept;
    }
}

static void NAME(center_piece)(Item *item, const Piece *piece, int what, double *means) {
    const STORED *x = (const STORED *)item->w;
    switch (piece->kind) {
    case ROWS:
        if (what == MEANS)
            for (int64_t r = piece->begin; r < piece->end; r++)
                means[r] = NAME(sum)(x + r * item->a, item->a) / item->a;
        else
            NAME(center_rows)(item, piece->begin, piece->end, what == RESTORE ? means : NULL);
        break;
    case GROUPS:
        for (int64_t group = piece->begin; group < piece->end; group++) {
            NAME(sum_block)(item, x, group);
            NAME(finish_means)(item, group);
            NAME(use_means)(item, group, what, means);
            if (what != MEANS) NAME(center_block)(item, group);
        }
        break;
    case SUM_BLOCKS:
        for (int64_t index = piece->begin; index < piece->end; index++) NAME(sum_block)(item, x, index);
        if (all_summed(item, piece))
            for (int64_t group = 0; group < item->group; group++) {
                NAME(finish_means)(item, group);
                NAME(use_means)(item, group, what, means);
            }
        break;
    default:
        for (int64_t index = piece->begin; index < piece->end && what != MEANS; index++)
            NAME(center_block)(item, index);
    }
}
#undef NAME
