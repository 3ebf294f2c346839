/*
 * One optimizer step with Gradient Centralization. Included once per dtype and rule; the algorithm stands in
 * `direction`, `advance` and `change`, the rest is the order in which memory is walked.
 *
 * Algorithms 1 and 2 of Yong et al. 2020 (SGD with momentum, Adam), with torch's options:
 *
 *     g ← scale · Φ(∂L/∂w)             placement "gradient"; without Φ otherwise
 *     d ← g + λ w                      L2 weight decay
 *     state ← advance(state, d)
 *     Δw ← change(state, d, w)
 *     w ← w + Δw                       or w + Φ(Δw): placement "update"
 */
#define NAME(name) JOIN3(name, RULE_NAME, SUFFIX)

#define HAS_M (RULE != SGD)
#define HAS_V (RULE == ADAM || RULE == AMSGRAD)
#define HAS_X (RULE == AMSGRAD)

typedef struct {
    REAL scale, l2, decay;
    REAL momentum, keep, of_d, of_m;                        /* SGD: m ← μ m + keep·d, Δw = of_d·d + of_m·m */
    REAL one_minus_beta1, beta2, one_minus_beta2, epsilon;  /* Adam */
    REAL step_size, root_correction;                        /* η / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ) */
} NAME(Scalars);

typedef struct {
    REAL m, v, x;
} NAME(State);

INLINE NAME(Scalars) NAME(scalars)(const Parameter *p, const Coefficients *coefficients) {
    NAME(Scalars) c = {
        .scale = (REAL)coefficients->scale,
        .l2 = (REAL)coefficients->l2,
        .decay = (REAL)coefficients->decay,
        .momentum = (REAL)(p->fresh ? 0 : coefficients->momentum),
        .keep = (REAL)(p->fresh ? 1 : coefficients->keep),
        .of_d = (REAL)(-coefficients->lr * (RULE == SGD ? 1 : coefficients->nesterov)),
        .of_m = (REAL)(-coefficients->lr * (coefficients->nesterov != 0 ? coefficients->momentum : 1)),
        .one_minus_beta1 = (REAL)(1 - coefficients->beta1),
        .beta2 = (REAL)coefficients->beta2,
        .one_minus_beta2 = (REAL)(1 - coefficients->beta2),
        .epsilon = (REAL)coefficients->epsilon,
        .step_size = (REAL)p->step_size,
        .root_correction = (REAL)p->root_correction,
    };
    return c;
}

/* shift is scale·mean(g) where the gradient is centered, else 0: one multiplication less for each element. */
INLINE REAL NAME(direction)(REAL g, REAL w, REAL shift, NAME(Scalars) c) {
    return c.scale * g + (c.l2 * w - shift);
}

INLINE NAME(State) NAME(advance)(NAME(State) s, REAL d, NAME(Scalars) c) {
#if RULE == MOMENTUM
    s.m = c.momentum * s.m + c.keep * d;
#elif HAS_V
    s.m += c.one_minus_beta1 * (d - s.m);
    s.v = c.beta2 * s.v + c.one_minus_beta2 * d * d;
#if HAS_X
    s.x = s.v <= s.x ? s.x : s.v;   /* this way round, a NaN of v comes through */
#endif
#endif
    return s;
}

INLINE REAL NAME(change)(NAME(State) s, REAL d, REAL w, NAME(Scalars) c) {
#if RULE == SGD
    return c.of_d * d;
#elif RULE == MOMENTUM
    return c.of_d * d + c.of_m * s.m;
#else
    return -(c.decay * w + c.step_size * s.m / (ROOT(HAS_X ? s.x : s.v) * c.root_correction + c.epsilon));
#endif
}

/* The tensors of one parameter, at one element. */
typedef struct {
    STORED *restrict w;
    const STORED *restrict g;
    STORED *restrict m, *restrict v, *restrict x;
} NAME(At);

INLINE NAME(At) NAME(at)(const Parameter *p, int64_t offset) {
    NAME(At) t;
    t.w = (STORED *)p->w + offset;
    t.g = (const STORED *)p->g + offset;
    t.m = HAS_M ? (STORED *)p->m + offset : NULL;
    t.v = HAS_V ? (STORED *)p->v + offset : NULL;
    t.x = HAS_X ? (STORED *)p->x + offset : NULL;
    return t;
}

/* One element of a step whose gradient is known: the new weight. */
INLINE REAL NAME(step)(REAL w, REAL g, NAME(State) *s, REAL shift, NAME(Scalars) c) {
    const REAL d = NAME(direction)(g, w, shift, c);
    *s = NAME(advance)(*s, d, c);
    return w + NAME(change)(*s, d, w, c);
}

/*
 * Placement "update", in two passes: the first moves the state on and sums Δw, the second takes mean(Δw) off.
 * Where w holds enough bits, the first stores w + Δw at once. A bf16 weight would lose a mean that is smaller than its
 * own rounding: there the second pass computes the same Δw again, from the state as it was rounded, and
 * w + (Δw − mean(Δw)) is rounded once.
 */
INLINE REAL NAME(first_pass)(REAL w, REAL g, NAME(State) *s, REAL *delta, NAME(Scalars) c) {
    const REAL d = NAME(direction)(g, w, 0, c);
    *s = NAME(advance)(*s, d, c);
#if DTYPE == BF16
    const NAME(State) rounded = {LOAD(STORE(s->m)), LOAD(STORE(s->v)), LOAD(STORE(s->x))};
    *delta = NAME(change)(rounded, d, w, c);
    return w;
#else
    *delta = NAME(change)(*s, d, w, c);
    return w + *delta;
#endif
}

INLINE REAL NAME(second_pass)(REAL w, REAL g, NAME(State) s, REAL mean, NAME(Scalars) c) {
#if DTYPE == BF16
    return w + (NAME(change)(s, NAME(direction)(g, w, 0, c), w, c) - mean);
#else
    (void)g, (void)s, (void)c;
    return w - mean;
#endif
}

/* The passes on element j in memory. */
INLINE NAME(State) NAME(load_state)(NAME(At) t, int64_t j) {
    NAME(State) s = {HAS_M ? LOAD(t.m[j]) : 0, HAS_V ? LOAD(t.v[j]) : 0, HAS_X ? LOAD(t.x[j]) : 0};
    return s;
}

INLINE void NAME(store_state)(NAME(At) t, int64_t j, NAME(State) s) {
    if (HAS_M) t.m[j] = STORE(s.m);
    if (HAS_V) t.v[j] = STORE(s.v);
    if (HAS_X) t.x[j] = STORE(s.x);
}

INLINE void NAME(step_at)(NAME(At) t, int64_t j, REAL shift, NAME(Scalars) c) {
    NAME(State) s = NAME(load_state)(t, j);
    const REAL w = NAME(step)(LOAD(t.w[j]), LOAD(t.g[j]), &s, shift, c);
    NAME(store_state)(t, j, s);
    t.w[j] = STORE(w);
}

INLINE REAL NAME(first_pass_at)(NAME(At) t, int64_t j, NAME(Scalars) c) {
    REAL delta;
    NAME(State) s = NAME(load_state)(t, j);
    const REAL w = NAME(first_pass)(LOAD(t.w[j]), LOAD(t.g[j]), &s, &delta, c);
    NAME(store_state)(t, j, s);
    if (DTYPE != BF16) t.w[j] = STORE(w);
    return delta;
}

INLINE void NAME(second_pass_at)(NAME(At) t, int64_t j, REAL mean, NAME(Scalars) c) {
    NAME(State) s = {0, 0, 0};
    if (DTYPE == BF16) s = NAME(load_state)(t, j);
    t.w[j] = STORE(NAME(second_pass)(LOAD(t.w[j]), DTYPE == BF16 ? LOAD(t.g[j]) : 0, s, mean, c));
}

#if DTYPE == BF16
/* The passes on two elements in one word. */
#define HALF(half, t, j) \
    {HAS_M ? half(word_of(t.m + j)) : 0, HAS_V ? half(word_of(t.v + j)) : 0, HAS_X ? half(word_of(t.x + j)) : 0}

INLINE void NAME(store_states)(NAME(At) t, int64_t j, NAME(State) low, NAME(State) high) {
    if (HAS_M) store_pair(t.m + j, low.m, high.m);
    if (HAS_V) store_pair(t.v + j, low.v, high.v);
    if (HAS_X) store_pair(t.x + j, low.x, high.x);
}

INLINE void NAME(step_at_pair)(NAME(At) t, int64_t j, REAL low_shift, REAL high_shift, NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    NAME(State) low = HALF(lower, t, j), high = HALF(upper, t, j);
    const REAL low_w = NAME(step)(lower(w), lower(g), &low, low_shift, c);
    const REAL high_w = NAME(step)(upper(w), upper(g), &high, high_shift, c);
    NAME(store_states)(t, j, low, high);
    store_pair(t.w + j, low_w, high_w);
}

INLINE void NAME(first_pass_at_pair)(NAME(At) t, int64_t j, REAL *low_delta, REAL *high_delta,
                                     NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    NAME(State) low = HALF(lower, t, j), high = HALF(upper, t, j);
    NAME(first_pass)(lower(w), lower(g), &low, low_delta, c);
    NAME(first_pass)(upper(w), upper(g), &high, high_delta, c);
    NAME(store_states)(t, j, low, high);
}

INLINE void NAME(second_pass_at_pair)(NAME(At) t, int64_t j, REAL low_mean, REAL high_mean, NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    const NAME(State) low = HALF(lower, t, j), high = HALF(upper, t, j);
    store_pair(t.w + j, NAME(second_pass)(lower(w), lower(g), low, low_mean, c),
               NAME(second_pass)(upper(w), upper(g), high, high_mean, c));
}
#undef HALF
#endif

/*
 * A stretch of n elements, with a shift for each (MANY: in the order of SLOT) or one for all; adds up next, the gradient of the row to come,
 * if asked to (SUM). What to do is known when this is compiled, so that the loops have no branches.
 */
INLINE PARTIAL NAME(step_stretch)(NAME(At) t, int64_t n, const REAL *restrict shifts, REAL shift,
                                  const STORED *restrict next, const int what, NAME(Scalars) c) {
    PARTIAL total = 0;
    int64_t j = 0;
#if DTYPE == BF16
    const int64_t pairs = n / 2;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < pairs; k++) {
        NAME(step_at_pair)(t, 2 * k, what & MANY ? shifts[k] : shift, what & MANY ? shifts[pairs + k] : shift, c);
        if (what & SUM) total += lower(word_of(next + 2 * k)) + upper(word_of(next + 2 * k));
    }
    j = 2 * pairs;
#endif
#pragma omp simd reduction(+ : total)
    for (int64_t i = j; i < n; i++) {
        NAME(step_at)(t, i, what & MANY ? shifts[i] : shift, c);
        if (what & SUM) total += LOAD(next[i]);
    }
    return total;
}

/* The first pass of "update" over a row's stretch: the sum of Δw. */
INLINE PARTIAL NAME(first_stretch)(NAME(At) t, int64_t n, NAME(Scalars) c) {
    PARTIAL total = 0;
    int64_t j = 0;
#if DTYPE == BF16
    const int64_t pairs = n / 2;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < pairs; k++) {
        REAL low, high;
        NAME(first_pass_at_pair)(t, 2 * k, &low, &high, c);
        total += low + high;
    }
    j = 2 * pairs;
#endif
#pragma omp simd reduction(+ : total)
    for (int64_t i = j; i < n; i++) total += NAME(first_pass_at)(t, i, c);
    return total;
}

/* The second pass over n elements, with a mean for each or one for all. */
INLINE void NAME(second_stretch)(NAME(At) t, int64_t n, const REAL *restrict means, REAL mean, const int what,
                                 NAME(Scalars) c) {
    int64_t j = 0;
#if DTYPE == BF16
    const int64_t pairs = n / 2;
#pragma omp simd
    for (int64_t k = 0; k < pairs; k++)
        NAME(second_pass_at_pair)(t, 2 * k, what & MANY ? means[k] : mean,
                                  what & MANY ? means[pairs + k] : mean, c);
    j = 2 * pairs;
#endif
#pragma omp simd
    for (int64_t i = j; i < n; i++) NAME(second_pass_at)(t, i, what & MANY ? means[i] : mean, c);
}

CLONES static void NAME(plain_elements)(const Parameter *p, int64_t begin, int64_t end, const Coefficients *coefficients) {
    NAME(step_stretch)(NAME(at)(p, begin), end - begin, NULL, 0, NULL, 0, NAME(scalars)(p, coefficients));
}

/* While row r is updated, the gradient of row r + 1 is summed in the same loop: there is no read-only phase. */
CLONES static void NAME(gradient_rows)(const Parameter *p, int64_t begin, int64_t end, const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t n = p->outer;
    double total = JOIN2(sum, SUFFIX)((const STORED *)p->g + begin * n, n);
    for (int64_t r = begin; r < end; r++) {
        const STORED *next = (const STORED *)p->g + (r + 1 < end ? r + 1 : r) * n;
        const REAL shift = (REAL)(coefficients->scale * (total / n));
        total = 0;
        EACH_STRETCH(from, count, n)
            total += NAME(step_stretch)(NAME(at)(p, r * n + from), count, NULL, shift, next + from, SUM, c);
    }
}

CLONES static void NAME(update_rows)(const Parameter *p, int64_t begin, int64_t end, const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t n = p->outer;
    for (int64_t r = begin; r < end; r++) {
        double total = 0;
        EACH_STRETCH(from, count, n)
            total += NAME(first_stretch)(NAME(at)(p, r * n + from), count, c);
        NAME(second_stretch)(NAME(at)(p, r * n), n, NULL, (REAL)(total / n), 0, c);
    }
}

/* The first pass over a block of columns: the gradient's column sums, or those of Δw. */
CLONES static void NAME(sum_block)(const Parameter *p, int64_t index, const Coefficients *coefficients) {
    if (p->placement == GRADIENT) {
        JOIN2(sum_block, SUFFIX)(p, (const STORED *)p->g, index);
        return;
    }
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const Block at = block_of(p, index);
    double *restrict sums = p->sums + index * at.width;
    memset(sums, 0, (size_t)at.width * sizeof *sums);
    for (int64_t i = 0; i < at.rows; i++) {
        const NAME(At) t = NAME(at)(p, (at.row + i) * at.width);
        int64_t j = 0;
#if DTYPE == BF16
        const int64_t pairs = at.width / 2;
#pragma omp simd
        for (int64_t k = 0; k < pairs; k++) {
            REAL low, high;
            NAME(first_pass_at_pair)(t, 2 * k, &low, &high, c);
            sums[k] += low, sums[pairs + k] += high;
        }
        j = 2 * pairs;
#endif
#pragma omp simd
        for (int64_t k = j; k < at.width; k++) sums[k] += NAME(first_pass_at)(t, k, c);
    }
}

/* The second pass over rows [begin, end) of columns, counted over all groups, when their means are known. */
CLONES static void NAME(step_columns)(const Parameter *p, int64_t begin, int64_t end, const Coefficients *coefficients) {
    const NAME(Scalars) c = NAME(scalars)(p, coefficients);
    const int64_t width = p->units * p->inner;
    for (int64_t row = begin; row < end; row++) {
        const NAME(At) t = NAME(at)(p, row * width);
        const REAL *means = (const REAL *)p->means + row / p->outer * width;
        if (p->placement == GRADIENT)
            NAME(step_stretch)(t, width, means, 0, NULL, MANY, c);
        else
            NAME(second_stretch)(t, width, means, 0, MANY, c);
    }
}

static void NAME(step_piece)(Parameter *p, const WorkPiece *piece, const Coefficients *coefficients) {
    const double factor = p->placement == GRADIENT ? coefficients->scale : 1;
    switch (piece->kind) {
    case ELEMENTS:
        NAME(plain_elements)(p, piece->begin, piece->end, coefficients);
        break;
    case ROWS:
        (p->placement == GRADIENT ? NAME(gradient_rows) : NAME(update_rows))(p, piece->begin, piece->end, coefficients);
        break;
    case GROUPS:
        for (int64_t group = piece->begin; group < piece->end; group++) {
            NAME(sum_block)(p, group, coefficients);
            JOIN2(finish_means, SUFFIX)(p, group, factor);
            NAME(step_columns)(p, group * p->outer, (group + 1) * p->outer, coefficients);
        }
        break;
    case SUM_BLOCKS:
        for (int64_t index = piece->begin; index < piece->end; index++) NAME(sum_block)(p, index, coefficients);
        if (all_summed(p, piece))
            for (int64_t group = 0; group < p->groups; group++) JOIN2(finish_means, SUFFIX)(p, group, factor);
        break;
    default:
        NAME(step_columns)(p, piece->begin, piece->end, coefficients);
    }
}
#undef NAME
#undef HAS_M
#undef HAS_V
#undef HAS_X
