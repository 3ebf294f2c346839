/* Means of weight vectors, and P_s in place: x ← x − s·(mean(x) − kept), where kept is 0 for
 * CENTER, the mean before the step for RESTORE, and −λ·mean(w) for SHIFT. Restoring the mean turns
 * the step into w ← w + Φ(Δw), which is placement "update"; a mean that is not finite is not
 * restored. SHIFT turns a gradient into Φ(g) − λ·mean(w), which is placement "regularized". This
 * file is included once per dtype. */
#define NAME(name) JOIN2(name, SUFFIX)

#define EACH_STRETCH(from, to, n) \
    for (int64_t from = 0, to; to = n - from < STRETCH ? n : from + STRETCH, from < n; from = to)

/* The position of column j's sum and mean. With bf16, a loop over words processes two columns
 * per iteration and vectorizes only if their sums are not interleaved: the sums of all lower halves
 * come first, then those of the upper halves. */
#define SLOT(j, width) \
    (DTYPE == BF16 && (j) < 2 * PAIRS(width) ? ((j) >> 1) + ((j) & 1) * PAIRS(width) : (j))

INLINE double NAME(sum)(const STORED *restrict x, int64_t n) {
    double total = 0;
    EACH_STRETCH (from, to, n) {
        prefetch(x + from, x + to);
        PARTIAL sum = 0;
        if (DTYPE == BF16) {
#pragma omp simd reduction(+ : sum)
            for (int64_t k = from / 2; k < to / 2; k++)
                sum += lower(word_of(x + 2 * k)) + upper(word_of(x + 2 * k));
            if (to % 2) sum += LOAD(x[to - 1]);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = from; i < to; i++) sum += LOAD(x[i]);
        }
        total += sum;
    }
    return total;
}

/* Add 4 rows, `apart` elements from one another, to the column sums at once, so that the sums are
 * read and written a quarter as often. */
INLINE void NAME(add_4_rows)(const STORED *restrict x, int64_t apart, int64_t width,
                             double *restrict sums) {
    const STORED *restrict x0 = x, *restrict x1 = x + apart, *restrict x2 = x + 2 * apart,
                           *restrict x3 = x + 3 * apart;
    const int64_t pairs = PAIRS(width);
#pragma omp simd
    for (int64_t k = 0; k < pairs; k++) {
        const uint32_t w0 = word_of(x0 + 2 * k), w1 = word_of(x1 + 2 * k);
        const uint32_t w2 = word_of(x2 + 2 * k), w3 = word_of(x3 + 2 * k);
        sums[k] += (lower(w0) + lower(w1)) + (lower(w2) + lower(w3));
        sums[pairs + k] += (upper(w0) + upper(w1)) + (upper(w2) + upper(w3));
    }
#pragma omp simd
    for (int64_t i = 2 * pairs; i < width; i++)
        sums[i] += ((PARTIAL)LOAD(x0[i]) + LOAD(x1[i])) + ((PARTIAL)LOAD(x2[i]) + LOAD(x3[i]));
}

/* Compute the column sums of one block of the gradient, or of the tensor itself in centering. */
CLONES static void NAME(sum_block)(const Parameter *p, int64_t index, const Coefficients *unused) {
    const Block block = block_of(p, index);
    const int64_t rows = block.rows, width = block.width;
    const STORED *x = (const STORED *)p->g + block.row * width;
    double *restrict sums = p->sums + index * width;
    memset(sums, 0, (size_t)width * sizeof *sums);
    /* Read each quarter of the block from its beginning to its end: the processor prefetches 4 long
     * streams, but not 4 adjacent short rows. */
    const int64_t quarter = rows / 4;
    for (int64_t i = 0; i < quarter; i++)
        NAME(add_4_rows)(x + i * width, quarter * width, width, sums);
    for (int64_t i = 4 * quarter; i < rows; i++) {
        const STORED *restrict row = x + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sums[SLOT(j, width)] += LOAD(row[j]);
    }
}

/* Visit each column j of a group; `first` is the first column of the same weight vector. */
#define EACH_COLUMN(j, first, p)                                                                 \
    for (int64_t unit = 0; unit < width_of(p); unit += p->inner)                                 \
        for (int64_t j = unit, first = unit;                                                     \
             j < unit + p->inner && (first = unit + (p->same_as ? p->same_as[j - unit] : 0), 1); \
             j++)

/* Compute the mean of each weight vector of a group from the column sums of the group's blocks, and
 * write it, times the strength, to every column of the vector. In a step with placement "gradient",
 * it is the mean of the scaled gradient. Without coefficients, it is the mean itself. */
CLONES static void NAME(finish_means)(const Parameter *p, int64_t group,
                                      const Coefficients *coefficients) {
    const double scale = p->placement == GRADIENT && coefficients ? coefficients->scale : 1;
    const double factor = coefficients ? scale * coefficients->strength : 1;
    const int64_t width = width_of(p);
    const double fan_in = (double)p->outer * (double)(p->inner / p->phases);
    const int only_finite = p->placement == UPDATE;
    double *restrict sums = p->sums + group * p->blocks * width;
    REAL *restrict means = (REAL *)p->means + group * width;
    for (int64_t block = 1; block < p->blocks; block++) {
        const double *restrict more = sums + block * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sums[j] += more[j];
    }
    if (p->inner > 1) { /* the sum of a vector replaces those of all its columns */
        EACH_COLUMN(j, first, p)
        if (j != first) sums[SLOT(first, width)] += sums[SLOT(j, width)];
        EACH_COLUMN(j, first, p) sums[SLOT(j, width)] = sums[SLOT(first, width)];
    }
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        const REAL mean = (REAL)(factor * (sums[j] / fan_in));
        means[j] = only_finite ? OR_ZERO(mean) : mean;
    }
}

/* Subtract one shift per element (`many`, in the order of SLOT) or the same shift from n elements.
 */
INLINE void NAME(subtract)(STORED *restrict x, int64_t n, const REAL *restrict shifts, REAL shift,
                           const int many) {
    const int64_t pairs = PAIRS(n);
#pragma omp simd
    for (int64_t k = 0; k < pairs; k++) {
        const uint32_t word = word_of(x + 2 * k);
        store_pair(x + 2 * k, lower(word) - (many ? shifts[k] : shift),
                   upper(word) - (many ? shifts[pairs + k] : shift));
    }
#pragma omp simd
    for (int64_t i = 2 * pairs; i < n; i++) x[i] = STORE(LOAD(x[i]) - (many ? shifts[i] : shift));
}

CLONES static void NAME(center_rows)(const Parameter *p, int64_t begin, int64_t end,
                                     const Coefficients *coefficients) {
    const double strength = coefficients->strength;
    const int64_t n = p->outer;
    for (int64_t r = begin; r < end; r++) {
        STORED *restrict row = (STORED *)p->w + r * n;
        const double mean = NAME(sum)(row, n) / n;
        const REAL shift = (REAL)(strength * (p->kept ? mean - p->kept[r] : mean));
        NAME(subtract)(row, n, NULL, shift, 0);
    }
}

CLONES static void NAME(restore_rows)(const Parameter *p, int64_t begin, int64_t end,
                                      const Coefficients *coefficients) {
    const double strength = coefficients->strength;
    const int64_t n = p->outer;
    for (int64_t r = begin; r < end; r++) {
        STORED *restrict row = (STORED *)p->w + r * n;
        const REAL shift = (REAL)(strength * (NAME(sum)(row, n) / n - p->kept[r]));
        NAME(subtract)(row, n, NULL, OR_ZERO(shift), 0);
    }
}

/* Center rows [begin, end) of columns, counted over all groups, with the finished means. */
CLONES static void NAME(center_columns)(const Parameter *p, int64_t begin, int64_t end,
                                        const Coefficients *unused) {
    const int64_t width = width_of(p);
    for (int64_t row = begin; row < end; row++)
        NAME(subtract)((STORED *)p->w + row * width, width,
                       (const REAL *)p->means + row / p->outer * width, 0, 1);
}

static void NAME(keep_rows)(const Parameter *p, int64_t begin, int64_t end,
                            const Coefficients *unused) {
    for (int64_t r = begin; r < end; r++)
        p->kept[r] = NAME(sum)((const STORED *)p->w + r * p->outer, p->outer) / p->outer;
}

static void NAME(keep_means)(const Parameter *p, int64_t group, const Coefficients *unused) {
    NAME(finish_means)(p, group, NULL);
    const int64_t width = width_of(p);
    const REAL *means = (const REAL *)p->means + group * width;
    double *kept = p->kept + group * p->units * p->phases;
    EACH_COLUMN(j, first, p)
    if (j == first) *kept++ = means[SLOT(j, width)];
}

/* Turn means into shifts to the kept ones; with `if_finite`, shifts that are not finite into 0. */
INLINE void NAME(shifts)(const Parameter *p, int64_t group, const int if_finite, REAL strength) {
    NAME(finish_means)(p, group, NULL);
    const int64_t width = width_of(p);
    REAL *means = (REAL *)p->means + group * width;
    const double *kept = p->kept + group * p->units * p->phases;
    EACH_COLUMN(j, first, p) {
        if (j == first) {
            const REAL shift = strength * (means[SLOT(j, width)] - (REAL)*kept++);
            means[SLOT(j, width)] = if_finite ? OR_ZERO(shift) : shift;
        } else {
            means[SLOT(j, width)] = means[SLOT(first, width)];
        }
    }
}

static void NAME(restore_means)(const Parameter *p, int64_t group,
                                const Coefficients *coefficients) {
    NAME(shifts)(p, group, 1, (REAL)coefficients->strength);
}

static void NAME(shift_means)(const Parameter *p, int64_t group, const Coefficients *coefficients) {
    NAME(shifts)(p, group, 0, (REAL)coefficients->strength);
}

static const Kernels NAME(center) = {NULL, NAME(center_rows), NAME(sum_block), NAME(finish_means),
                                     NAME(center_columns)};
static const Kernels NAME(means) = {NULL, NAME(keep_rows), NAME(sum_block), NAME(keep_means), NULL};
static const Kernels NAME(restore) = {NULL, NAME(restore_rows), NAME(sum_block),
                                      NAME(restore_means), NAME(center_columns)};
static const Kernels NAME(shift) = {NULL, NAME(center_rows), NAME(sum_block), NAME(shift_means),
                                    NAME(center_columns)};
#undef NAME
