/*
 * Means of weight vectors, and Φ in place: x ← x − (mean(x) − kept). Included once per dtype.
 *
 * kept is 0 for centering a gradient, and the mean before the step for the placement "update", which thus restores
 * the mean of each weight vector: w ← w + Φ(Δw).
 */
#define NAME(name) JOIN2(name, SUFFIX)

/* Where column j has its sum and its mean: with bf16 the lower halves of all words first, then the upper ones. */
#if DTYPE == BF16
#define SLOT(j, width) ((j) < (width) / 2 * 2 ? (j) / 2 + ((j) % 2 ? (width) / 2 : 0) : (j))
#else
#define SLOT(j, width) (j)
#endif

INLINE PARTIAL NAME(sum_stretch)(const STORED *restrict x, int64_t n) {
    PARTIAL total = 0;
    int64_t j = 0;
#if DTYPE == BF16
    const int64_t pairs = n / 2;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < pairs; k++) total += lower(word_of(x + 2 * k)) + upper(word_of(x + 2 * k));
    j = 2 * pairs;
#endif
#pragma omp simd reduction(+ : total)
    for (int64_t i = j; i < n; i++) total += LOAD(x[i]);
    return total;
}

INLINE double NAME(sum)(const STORED *restrict x, int64_t n) {
    double total = 0;
    EACH_STRETCH(from, count, n) total += NAME(sum_stretch)(x + from, count);
    return total;
}

/* Adds the columns of 4 rows to sums: together, so that the sums are read and written a quarter as often. */
INLINE void NAME(add_4_rows)(const STORED *restrict x, int64_t width, double *restrict sums) {
    const STORED *restrict x0 = x, *restrict x1 = x + width, *restrict x2 = x + 2 * width, *restrict x3 = x + 3 * width;
    int64_t j = 0;
#if DTYPE == BF16
    const int64_t pairs = width / 2;
#pragma omp simd
    for (int64_t k = 0; k < pairs; k++) {
        const uint32_t w0 = word_of(x0 + 2 * k), w1 = word_of(x1 + 2 * k), w2 = word_of(x2 + 2 * k),
                       w3 = word_of(x3 + 2 * k);
        sums[k] += (lower(w0) + lower(w1)) + (lower(w2) + lower(w3));
        sums[pairs + k] += (upper(w0) + upper(w1)) + (upper(w2) + upper(w3));
    }
    j = 2 * pairs;
#endif
#pragma omp simd
    for (int64_t i = j; i < width; i++)
        sums[i] += ((PARTIAL)LOAD(x0[i]) + LOAD(x1[i])) + ((PARTIAL)LOAD(x2[i]) + LOAD(x3[i]));
}

INLINE void NAME(sum_columns)(const STORED *restrict x, int64_t rows, int64_t width, double *restrict sums) {
    memset(sums, 0, (size_t)width * sizeof *sums);
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) NAME(add_4_rows)(x + i * width, width, sums);
    for (; i < rows; i++) {
        const STORED *restrict row = x + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sums[SLOT(j, width)] += LOAD(row[j]);
    }
}

/* The column sums of a group's blocks to the mean of each unit times a factor, given to each of the unit's columns. */
static void NAME(finish_means)(const Parameter *p, int64_t group, double factor) {
    const int64_t width = p->units * p->inner;
    const double fan_in = (double)p->outer * (double)p->inner;
    const double *sums = p->sums + group * p->blocks * width;
    REAL *means = (REAL *)p->means + group * width;
    for (int64_t u = 0; u < p->units; u++) {
        double total = 0;
        for (int64_t block = 0; block < p->blocks; block++)
            for (int64_t k = 0; k < p->inner; k++) total += sums[block * width + SLOT(u * p->inner + k, width)];
        for (int64_t k = 0; k < p->inner; k++) means[SLOT(u * p->inner + k, width)] = (REAL)(factor * (total / fan_in));
    }
}

CLONES static void NAME(sum_block)(const Parameter *p, const STORED *x, int64_t index) {
    const Block at = block_of(p, index);
    NAME(sum_columns)(x + at.row * at.width, at.rows, at.width, p->sums + index * at.width);
}

/* Subtracts from n elements what is due to each (MANY) or one number from all. */
INLINE void NAME(subtract)(STORED *restrict x, int64_t n, const REAL *restrict shifts, REAL shift, const int what) {
    int64_t j = 0;
#if DTYPE == BF16
    const int64_t pairs = n / 2;
#pragma omp simd
    for (int64_t k = 0; k < pairs; k++) {
        const uint32_t word = word_of(x + 2 * k);
        store_pair(x + 2 * k, lower(word) - (what & MANY ? shifts[k] : shift),
                   upper(word) - (what & MANY ? shifts[pairs + k] : shift));
    }
    j = 2 * pairs;
#endif
#pragma omp simd
    for (int64_t i = j; i < n; i++) x[i] = STORE(LOAD(x[i]) - (what & MANY ? shifts[i] : shift));
}

CLONES static void NAME(center_rows)(const Parameter *p, int64_t begin, int64_t end, const double *kept) {
    const int64_t n = p->outer;
    STORED *x = (STORED *)p->w;
    for (int64_t r = begin; r < end; r++) {
        STORED *restrict row = x + r * n;
        NAME(subtract)(row, n, NULL, (REAL)(NAME(sum)(row, n) / n - (kept ? kept[r] : 0)), 0);
    }
}

/* Rows [begin, end) of columns, counted over all groups, whose means are known. */
CLONES static void NAME(center_columns)(const Parameter *p, int64_t begin, int64_t end) {
    const int64_t width = p->units * p->inner;
    STORED *x = (STORED *)p->w;
    for (int64_t row = begin; row < end; row++)
        NAME(subtract)(x + row * width, width, (const REAL *)p->means + row / p->outer * width, 0, MANY);
}

/* A group's means are known: write them out, or make them the shifts that give the kept ones back. */
static void NAME(use_means)(const Parameter *p, int64_t group, int what, double *means) {
    const int64_t width = p->units * p->inner;
    REAL *own = (REAL *)p->means + group * width;
    for (int64_t u = 0; u < p->units && what != CENTER; u++) {
        double *kept = &means[group * p->units + u];
        if (what == MEANS)
            *kept = own[SLOT(u * p->inner, width)];
        else
            for (int64_t k = 0; k < p->inner; k++) own[SLOT(u * p->inner + k, width)] -= (REAL)*kept;
    }
}

static void NAME(center_piece)(Parameter *p, const WorkPiece *piece, int what, double *means) {
    const STORED *x = (const STORED *)p->w;
    switch (piece->kind) {
    case ROWS:
        if (what == MEANS)
            for (int64_t r = piece->begin; r < piece->end; r++)
                means[r] = NAME(sum)(x + r * p->outer, p->outer) / p->outer;
        else
            NAME(center_rows)(p, piece->begin, piece->end, what == RESTORE ? means : NULL);
        break;
    case GROUPS:
        for (int64_t group = piece->begin; group < piece->end; group++) {
            NAME(sum_block)(p, x, group);
            NAME(finish_means)(p, group, 1);
            NAME(use_means)(p, group, what, means);
            if (what != MEANS) NAME(center_columns)(p, group * p->outer, (group + 1) * p->outer);
        }
        break;
    case SUM_BLOCKS:
        for (int64_t index = piece->begin; index < piece->end; index++) NAME(sum_block)(p, x, index);
        if (all_summed(p, piece))
            for (int64_t group = 0; group < p->groups; group++) {
                NAME(finish_means)(p, group, 1);
                NAME(use_means)(p, group, what, means);
            }
        break;
    default:
        if (what != MEANS) NAME(center_columns)(p, piece->begin, piece->end);
    }
}
#undef NAME
