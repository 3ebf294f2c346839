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

/* "update", first pass: the state moves on, and Δw, as its second pass will find it, is summed. */
#define ADVANCE_ELEMENT(t, j, total)                                     \
    do {                                                                 \
        NAME(State) s = {0, 0, 0};                                       \
        const REAL w = LOAD((t).w[j]);                                   \
        const REAL d = NAME(direction)(LOAD((t).g[j]), w, c);            \
        LOAD_STATE(s, t, j);                                             \
        s = NAME(advance)(s, d, c);                                      \
        STORE_STATE(s, t, j);                                            \
        ROUND_STATE(s);                                                  \
        (total) += NAME(change)(s, d, w, c);                             \
    } while (0)

/* "update", second pass: w ← w + (Δw − mean(Δw)), rounded once. */
#define CHANGE_ELEMENT(t, j, mean)                                       \
    do {                                                                 \
        NAME(State) s = {0, 0, 0};                                       \
        const REAL w = LOAD((t).w[j]);                                   \
        const REAL d = NAME(direction)(LOAD((t).g[j]), w, c);            \
        LOAD_STATE(s, t, j);                                             \
        (t).w[j] = STORE(w + (NAME(change)(s, d, w, c) - (mean)));       \
    } while (0)

#if DTYPE == BF16
#define ROUND_STATE(s)                                                                            \
    ((s).m = LOAD(STORE((s).m)), (s).v = LOAD(STORE((s).v)), (s).x = LOAD(STORE((s).x)))
#else
#define ROUND_STATE(s) ((void)0)
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
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < n; j++) {
            STEP_ELEMENT(t, j, mean);
            total += LOAD(next[j]);
        }
    }
}

/* While the state of row r + 1 moves on, the weights of row r change. */
CLONES static void NAME(update_rows)(const Item *item, int64_t begin, int64_t end, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const int64_t n = item->a;
    for (int64_t r = begin; r < end; r++) {
        const NAME(At) t = NAME(at)(item, r * n);
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < n; j++) ADVANCE_ELEMENT(t, j, total);
        const REAL mean = (REAL)(total / n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) CHANGE_ELEMENT(t, j, mean);
    }
}

CLONES static void NAME(gradient_panel)(const Item *item, Panel p, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    double sums[PANEL];
    REAL means[PANEL];
    JOIN2(sum_columns, SUFFIX)((const STORED *)item->g + p.offset, item->a, p.width, p.stride, sums);
    unit_means(item, p, sums);
    for (int64_t j = 0; j < p.width; j++) means[j] = (REAL)sums[j];
    for (int64_t i = 0; i < item->a; i++) {
        const NAME(At) t = NAME(at)(item, p.offset + i * p.stride);
#pragma omp simd
        for (int64_t j = 0; j < p.width; j++) STEP_ELEMENT(t, j, means[j]);
    }
}

CLONES static void NAME(update_panel)(const Item *item, Panel p, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    double sums[PANEL];
    REAL means[PANEL];
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < item->a; i++) {
        const NAME(At) t = NAME(at)(item, p.offset + i * p.stride);
#pragma omp simd
        for (int64_t j = 0; j < p.width; j++) ADVANCE_ELEMENT(t, j, sums[j]);
    }
    unit_means(item, p, sums);
    for (int64_t j = 0; j < p.width; j++) means[j] = (REAL)sums[j];
    for (int64_t i = 0; i < item->a; i++) {
        const NAME(At) t = NAME(at)(item, p.offset + i * p.stride);
#pragma omp simd
        for (int64_t j = 0; j < p.width; j++) CHANGE_ELEMENT(t, j, means[j]);
    }
}

/* A unit whose innermost run alone is wider than a panel: a run at a time. */
CLONES static void NAME(step_runs)(const Item *item, Panel p, const Rule *rule) {
    const NAME(Coefficients) c = NAME(coefficients)(item, rule);
    const double fan_in = (double)item->a * (double)item->b;
    double total = 0;
    for (int64_t i = 0; i < item->a; i++) {
        const NAME(At) t = NAME(at)(item, p.offset + i * p.stride);
        if (item->placement == GRADIENT) {
            total += JOIN2(sum, SUFFIX)(t.g, p.width);
        } else {
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < p.width; j++) ADVANCE_ELEMENT(t, j, total);
        }
    }
    const REAL mean = (REAL)(total / fan_in);
    for (int64_t i = 0; i < item->a; i++) {
        const NAME(At) t = NAME(at)(item, p.offset + i * p.stride);
        if (item->placement == GRADIENT) {
#pragma omp simd
            for (int64_t j = 0; j < p.width; j++) STEP_ELEMENT(t, j, mean);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < p.width; j++) CHANGE_ELEMENT(t, j, mean);
        }
    }
}

static void NAME(step_piece)(const Item *item, const Piece *piece, const Rule *rule) {
    if (item->placement == PLAIN) {
        NAME(plain_elements)(item, piece->begin, piece->end, rule);
    } else if (is_rows(item)) {
        (item->placement == GRADIENT ? NAME(gradient_rows) : NAME(update_rows))(item, piece->begin, piece->end, rule);
    } else {
        for (int64_t index = piece->begin; index < piece->end; index++) {
            const Panel p = panel(item, index, sizeof(STORED));
            if (item->b > PANEL)
                NAME(step_runs)(item, p, rule);
            else
                (item->placement == GRADIENT ? NAME(gradient_panel) : NAME(update_panel))(item, p, rule);
        }
    }
}
#undef NAME
#undef HAS_M
#undef HAS_V
#undef HAS_X
#undef LOAD_STATE
#undef STORE_STATE
#undef ROUND_STATE
#undef STEP_ELEMENT
#undef ADVANCE_ELEMENT
#undef CHANGE_ELEMENT
