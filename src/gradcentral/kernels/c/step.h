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
    REAL scale, l2, decay, lr;
    REAL momentum, keep, of_d, of_m;                        /* SGD: m ← μ m + keep·d, Δw = −η (of_d·d + of_m·m) */
    REAL one_minus_beta1, beta2, one_minus_beta2, epsilon;  /* Adam */
    REAL step_size, root_correction;                        /* η / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ) */
} NAME(Coefficients);

typedef struct {
    REAL m, v, x;
} NAME(State);

INLINE NAME(Coefficients) NAME(coefficients)(const Item *item, const Rule *rule) {
    NAME(Coefficients) c = {
        .scale = (REAL)rule->scale,
        .l2 = (REAL)rule->l2,
        .decay = (REAL)rule->decay,
        .lr = (REAL)rule->lr,
        .momentum = (REAL)(item->first ? 0 : rule->momentum),
        .keep = (REAL)(item->first ? 1 : rule->keep),
        .of_d = (REAL)(RULE == SGD ? 1 : rule->nesterov),
        .of_m = (REAL)(rule->nesterov != 0 ? rule->momentum : 1),
        .one_minus_beta1 = (REAL)(1 - rule->beta1),
        .beta2 = (REAL)rule->beta2,
        .one_minus_beta2 = (REAL)(1 - rule->beta2),
        .epsilon = (REAL)rule->epsilon,
        .step_size = (REAL)item->step_size,
        .root_correction = (REAL)item->root_correction,
    };
    return c;
}

INLINE REAL NAME(direction)(REAL g, REAL w, NAME(Coefficients) c) { return c.scale * g + c.l2 * w; }

INLINE NAME(State) NAME(advance)(NAME(State) s, REAL d, NAME(Coefficients) c) {
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

INLINE REAL NAME(change)(NAME(State) s, REAL d, REAL w, NAME(Coefficients) c) {
#if RULE == SGD
    return -c.lr * d;
#elif RULE == MOMENTUM
    return -c.lr * (c.of_d * d + c.of_m * s.m);
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

INLINE NAME(At) NAME(at)(const Item *item, int64_t offset) {
    NAME(At) t;
    t.w = (STORED *)item->w + offset;
    t.g = (const STORED *)item->g + offset;
    t.m = HAS_M ? (STORED *)item->m + offset : NULL;
    t.v = HAS_V ? (STORED *)item->v + offset : NULL;
    t.x = HAS_X ? (STORED *)item->x + offset : NULL;
    return t;
}

/* What the state holds after rounding: both passes of placement "update" compute the same Δw from it. */
#if HAS_X
#define LOAD_STATE(s, t, j) ((s).m = LOAD((t).m[j]), (s).v = LOAD((t).v[j]), (s).x = LOAD((t).x[j]))
#define STORE_STATE(s, t, j) ((t).m[j] = STORE((s).m), (t).v[j] = STORE((s).v), (t).x[j] = STORE((s).x))
#elif HAS_V
#define LOAD_STATE(s, t, j) ((s).m = LOAD((t).m[j]), (s).v = LOAD((t).v[j]))
#define STORE_STATE(s, t, j) ((t).m[j] = STORE((s).m), (t).v[j] = STORE((s).v))
#elif HAS_M
#define LOAD_STATE(s, t, j) ((s).m = LOAD((t).m[j]))
#define STORE_STATE(s, t, j) ((t).m[j] = STORE((s).m))
#else
#define LOAD_STATE(s, t, j) ((void)0)
#define STORE_STATE(s, t, j) ((void)0)
#endif

/* One element of a step whose gradient is known: w ← w + change. */
#define STEP_ELEMENT(t, j, mean)                                         \
    do {                                                                 \
        NAME(State) s = {0, 0, 0};                                       \
        const REAL w = LOAD((t).w[j]);                                   \
        const REAL d = NAME(direction)(LOAD((t).g[j]) - (mean), w, c);   \
        LOAD_STATE(s, t, j);                                             \
        s = NAME(advance)(s, d, c);                                      \
        STORE_STATE(s, t, j);                                            \
        (t).w[j] = STORE(w + NAME(change)(s, d, w, c));                  \
    } while (0)

/*
 * Placement "update", in two passes: the first moves the state on and sums Δw, the second takes mean(Δw) off.
 * Where w holds enough bits, the first stores w + Δw at once. A bf16 weight would lose a mean that is smaller than its
 * own rounding: there the second pass computes the same Δw again, from the state as it was rounded, and
 * w + (Δw − mean(Δw)) is rounded once.
 */
#if DTYPE == BF16
#define FIRST_PASS(t, j, total)                                                                              \
    do {                                                                                                     \
        NAME(State) s = {0, 0, 0};                                                                           \
        const REAL w = LOAD((t).w[j]);                                                                       \
        const REAL d = NAME(direction)(LOAD((t).g[j]), w, c);                                                \
        LOAD_STATE(s, t, j);                                                                                 \
        s = NAME(advance)(s, d, c);                                                                          \
        STORE_STATE(s, t, j);                                                                                \
        s.m = LOAD(STORE(s.m)), s.v = LOAD(STORE(s.v)), s.x = LOAD(STORE(s.x));                              \
        (total) += NAME(change)(s, d, w, c);                                                                 \
    } while (0)
#define SECOND_PASS(t, j, mean)                                                                              \
    do {                                                                                                     \
        NAME(State) s = {0, 0, 0};                                                                           \
        const REAL w = LOAD((t).w[j]);                                                                       \
        const REAL d = NAME(direction)(LOAD((t).g[j]), w, c);                                                \
        LOAD_STATE(s, t, j);                                                                                 \
        (t).w[j] = STORE(w + (NAME(change)(s, d, w, c) - (mean)));                                           \
    } while (0)
#else
#define FIRST_PASS(t, j, total)                                                                              \
    do {                                                                                                     \
        NAME(State) s = {0, 0, 0};                                                                           \
        const REAL w = LOAD((t).w[j]);                                                                       \
        const REAL d = NAME(direction)(LOAD((t).g[j]), w, c);                                                \
        LOAD_STATE(s, t, j);                                                                                 \
        s = NAME(advance)(s, d, c);                                                                          \
        STORE_STATE(s, t, j);                                                                                \
        const REAL change = NAME(change)(s, d, w, c);                                                        \
        (t).w[j] = STORE(w + change);                                                                        \
        (total) += change;                                                                                   \
    } while (0)
#define SECOND_PASS(t, j, mean) ((t).w[j] = STORE(LOAD((t).w[j]) - (mean)))
#endif

CLONES static void NAME(plain_elements)(const Item *item, int64_t begin, int64_t end, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const NAME(At) t = NAME(at)(item, begin);
#pragma omp simd
    for (int64_t j = 0; j < end - begin; j++) STEP_ELEMENT(t, j, 0);
}

/* While row r is updated, the gradient of row r + 1 is summed in the same loop: there is no read-only phase. */
CLONES static void NAME(gradient_rows)(const Item *item, int64_t begin, int64_t end, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const int64_t n = item->a;
    double total = JOIN2(sum, SUFFIX)((const STORED *)item->g + begin * n, n);
    for (int64_t r = begin; r < end; r++) {
        const NAME(At) t = NAME(at)(item, r * n);
        const STORED *restrict next = r + 1 < end ? t.g + n : t.g;
        const REAL mean = (REAL)(total / n);
        total = 0;
        for (int64_t from = 0; from < n; from += STRETCH) {
            const int64_t to = n - from < STRETCH ? n : from + STRETCH;
            PARTIAL partial = 0;
#pragma omp simd reduction(+ : partial)
            for (int64_t j = from; j < to; j++) {
                STEP_ELEMENT(t, j, mean);
                partial += LOAD(next[j]);
            }
            total += partial;
            if (to == n) break;
        }
    }
}

CLONES static void NAME(update_rows)(const Item *item, int64_t begin, int64_t end, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const int64_t n = item->a;
    for (int64_t r = begin; r < end; r++) {
        const NAME(At) t = NAME(at)(item, r * n);
        double total = 0;
        for (int64_t from = 0; from < n; from += STRETCH) {
            const int64_t to = n - from < STRETCH ? n : from + STRETCH;
            PARTIAL partial = 0;
#pragma omp simd reduction(+ : partial)
            for (int64_t j = from; j < to; j++) FIRST_PASS(t, j, partial);
            total += partial;
            if (to == n) break;
        }
        const REAL mean = (REAL)(total / n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) SECOND_PASS(t, j, mean);
    }
}

/* The first pass over a block of columns: the gradient's column sums, or those of Δw. */
CLONES static void NAME(sum_block)(const Item *item, int64_t index, const Rule *rule) {
    if (item->placement == GRADIENT) {
        JOIN2(sum_block, SUFFIX)(item, (const STORED *)item->g, index);
        return;
    }
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const Block at = block_of(item, index);
    double *restrict sums = item->sums + index * at.width;
    memset(sums, 0, (size_t)at.width * sizeof *sums);
    for (int64_t i = 0; i < at.rows; i++) {
        const NAME(At) t = NAME(at)(item, (at.row + i) * at.width);
#pragma omp simd
        for (int64_t j = 0; j < at.width; j++) FIRST_PASS(t, j, sums[j]);
    }
}

/* The second pass, when the means of the block's group are known. */
CLONES static void NAME(step_block)(const Item *item, int64_t index, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const Block at = block_of(item, index);
    const REAL *restrict means = (const REAL *)item->means + at.group * at.width;
    for (int64_t i = 0; i < at.rows; i++) {
        const NAME(At) t = NAME(at)(item, (at.row + i) * at.width);
        if (item->placement == GRADIENT) {
#pragma omp simd
            for (int64_t j = 0; j < at.width; j++) STEP_ELEMENT(t, j, means[j]);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < at.width; j++) SECOND_PASS(t, j, means[j]);
        }
    }
}

static void NAME(step_piece)(Item *item, const Piece *piece, const Rule *rule) {
    switch (piece->kind) {
    case ELEMENTS:
        NAME(plain_elements)(item, piece->begin, piece->end, rule);
        break;
    case ROWS:
        (item->placement == GRADIENT ? NAME(gradient_rows) : NAME(update_rows))(item, piece->begin, piece->end, rule);
        break;
    case GROUPS:
        for (int64_t group = piece->begin; group < piece->end; group++) {
            NAME(sum_block)(item, group, rule);
            JOIN2(finish_means, SUFFIX)(item, group);
            NAME(step_block)(item, group, rule);
        }
        break;
    case SUM_BLOCKS:
        for (int64_t index = piece->begin; index < piece->end; index++) NAME(sum_block)(item, index, rule);
        if (all_summed(item, piece))
            for (int64_t group = 0; group < item->group; group++) JOIN2(finish_means, SUFFIX)(item, group);
        break;
    default:
        for (int64_t index = piece->begin; index < piece->end; index++) NAME(step_block)(item, index, rule);
    }
}
#undef NAME
#undef HAS_M
#undef HAS_V
#undef HAS_X
#undef LOAD_STATE
#undef STORE_STATE
#undef STEP_ELEMENT
#undef FIRST_PASS
#undef SECOND_PASS
