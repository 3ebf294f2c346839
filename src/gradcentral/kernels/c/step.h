/*
 * One optimizer step with Gradient Centralization, element by element. This file is included once
 * per dtype and update rule.
 *
 * Algorithms 1 and 2 of Yong et al. 2020 (SGD with momentum, Adam), with torch's options:
 *
 *     g ← scale · Φ(∂L/∂w)             placement "gradient"; without Φ otherwise
 *     d ← g + λ w                      L2 weight decay; Φ(g + λ w): placement "regularized"
 *     state ← advance(state, d)
 *     Δw ← change(state, d, w)
 *     w ← w + Δw                       or w + Φ(Δw): placement "update"
 *
 * This differs from the paper and from torch in the following ways:
 *
 * 1. Momentum is torch's, m ← μm + (1 − dampening)d; algorithm 1 has m ← βm + (1 − β)g. A new
 * buffer starts as d.
 * 2. The centered gradient is never stored, and p.grad keeps its values: `direction` subtracts
 * scale·mean(g).
 * 3. Under placement "gradient", L2 weight decay is added after centering, as if the optimizer had
 * received Φ(g). Placement "regularized" centers g + λw (§3.4).
 * 4. Nesterov momentum is one linear combination, Δw = of_d·d + of_m·m, instead of a second pass
 * over d.
 * 5. Adam's m is torch's lerp from m to d, which starts from the nearer end. The bias corrections
 * are computed once per parameter, in double, as step_size and root_correction; ε is added to the
 * corrected root, as in torch.
 * 6. Decoupled weight decay is part of Δw, where torch's AdamW first scales w by 1 − ηλ: placement
 * "update" centers the whole change. The difference is one rounding.
 * 7. AMSGrad takes the maximum of the uncorrected squares, as torch does.
 * 8. A term whose coefficient is 0 is left out, as in torch: an infinite weight (a masked class)
 * would make it NaN. Decoupled weight decay leaves infinite weights alone, and placement "update"
 * does not center a change whose mean does not exist.
 */
#define NAME(name) JOIN3(name, RULE_NAME, SUFFIX)

#define HAS_M (RULE != SGD)
#define HAS_V (RULE == ADAM || RULE == AMSGRAD)
#define HAS_X (RULE == AMSGRAD)

/* The coefficients of one parameter as the formulas need them. */
typedef struct {
    REAL scale, l2, decay;
    REAL momentum, keep, of_d, of_m; /* SGD: m ← momentum·m + keep·d, Δw = of_d·d + of_m·m */
    REAL lerp;                       /* Adam: m ← (from_d ? d : m) + lerp·(d − m) */
    BITS has_l2, has_of_d, from_d;   /* masks for CHOOSE; the first two: whether the term exists */
    REAL beta2, one_minus_beta2, epsilon;
    REAL step_size, root_correction; /* Adam: η / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ) */
} NAME(Scalars);

typedef struct {
    REAL m, v, x;
} NAME(State);

INLINE NAME(Scalars) NAME(scalars)(const Parameter *p, const Coefficients *coefficients) {
    const int from_d = coefficients->beta1 <= 0.5;
    NAME(Scalars)
    c = {
        .scale = (REAL)coefficients->scale,
        .l2 = (REAL)coefficients->l2,
        .decay = (REAL)coefficients->decay,
        .momentum = (REAL)(p->fresh ? 0 : coefficients->momentum),
        .keep = (REAL)(p->fresh ? 1 : coefficients->keep),
        .of_d = (REAL)(-coefficients->lr * (RULE == SGD ? 1 : coefficients->nesterov)),
        .of_m =
            (REAL)(-coefficients->lr * (coefficients->nesterov != 0 ? coefficients->momentum : 1)),
        .lerp = (REAL)(from_d ? -coefficients->beta1 : 1 - coefficients->beta1),
        .has_l2 = MASK(coefficients->l2 != 0),
        .has_of_d = MASK(RULE == SGD || coefficients->nesterov != 0),
        .from_d = MASK(from_d),
        .beta2 = (REAL)coefficients->beta2,
        .one_minus_beta2 = (REAL)(1 - coefficients->beta2),
        .epsilon = (REAL)coefficients->epsilon,
        .step_size = (REAL)p->step_size,
        .root_correction = (REAL)p->root_correction,
    };
    return c;
}

/* `shift` is scale·mean(g) under placement "gradient", mean(scale·g + λw) under "regularized",
 * otherwise 0, so that centering costs no multiplication per element. */
INLINE REAL NAME(direction)(REAL g, REAL w, REAL shift, NAME(Scalars) c) {
    return c.scale * g + (c.l2 * CHOOSE(c.has_l2, w, 0) - shift);
}

INLINE NAME(State) NAME(advance)(NAME(State) s, REAL d, NAME(Scalars) c) {
#if RULE == MOMENTUM
    s.m = c.momentum * s.m + c.keep * d;
#elif HAS_V
    s.m = CHOOSE(c.from_d, d, s.m) + c.lerp * (d - s.m);
    s.v = c.beta2 * s.v + c.one_minus_beta2 * d * d;
#if HAS_X
    s.x = s.x > s.v || s.x != s.x ? s.x : s.v; /* a NaN in either propagates */
#endif
#endif
    return s;
}

INLINE REAL NAME(change)(NAME(State) s, REAL d, REAL w, NAME(Scalars) c) {
#if RULE == SGD
    return c.of_d * d;
#elif RULE == MOMENTUM
    return c.of_d * CHOOSE(c.has_of_d, d, 0) + c.of_m * s.m;
#else
    return -(c.decay * (IS_FINITE(w) ? w : 0) +
             c.step_size * s.m / (ROOT(HAS_X ? s.x : s.v) * c.root_correction + c.epsilon));
#endif
}

/* Take the step of one element with a known shift; return the new weight. */
INLINE REAL NAME(step)(REAL w, REAL g, NAME(State) * s, REAL shift, NAME(Scalars) c) {
    const REAL d = NAME(direction)(g, w, shift, c);
    *s = NAME(advance)(*s, d, c);
    return w + NAME(change)(*s, d, w, c);
}

/*
 * Placement "update" takes two passes: the first advances the state and sums Δw, the second
 * subtracts mean(Δw).
 *
 * In f32 and f64 the first pass stores w + Δw, and the second subtracts the mean from it. In bf16
 * that would round twice, and a mean smaller than the rounding error of w (8 bits) would be lost in
 * every weight. There the first pass does not change w, and the second computes the same Δw again,
 * from the state rounded for storage (which the first pass uses too, for the sum), and rounds
 * w + (Δw − mean(Δw)) once. Where row_blocks.h keeps Δw in a buffer, it is not computed again.
 *
 * A weight vector with an infinite weight has no mean to keep: its sum becomes NaN, and the second
 * pass leaves such a vector as the first made it.
 */
INLINE REAL NAME(first_pass)(REAL w, REAL g, NAME(State) * s, REAL *delta, NAME(Scalars) c) {
    const REAL d = NAME(direction)(g, w, 0, c);
    *s = NAME(advance)(*s, d, c);
#if DTYPE == BF16
    const NAME(State) rounded = {LOAD(STORE(s->m)), LOAD(STORE(s->v)), LOAD(STORE(s->x))};
    const REAL change = NAME(change)(rounded, d, w, c), stepped = w;
#else
    const REAL change = NAME(change)(*s, d, w, c), stepped = w + change;
#endif
    *delta = change + 0 * w; /* NaN if w is infinite; a condition would not vectorize */
    return stepped;
}

INLINE REAL NAME(second_pass)(REAL w, REAL g, NAME(State) s, REAL mean, NAME(Scalars) c) {
#if DTYPE == BF16
    return w + (NAME(change)(s, NAME(direction)(g, w, 0, c), w, c) - mean);
#else
    (void)g, (void)s, (void)c;
    return w - mean;
#endif
}

/* The tensors of one parameter, starting at one element. */
typedef struct {
    STORED *restrict w;
    const STORED *restrict g;
    STORED *restrict m, *restrict v, *restrict x;
} NAME(Tensors);

INLINE NAME(Tensors) NAME(tensors)(const Parameter *p, int64_t offset) {
    NAME(Tensors) t;
    t.w = (STORED *)p->w + offset;
    t.g = (const STORED *)p->g + offset;
    t.m = HAS_M ? (STORED *)p->m + offset : NULL;
    t.v = HAS_V ? (STORED *)p->v + offset : NULL;
    t.x = HAS_X ? (STORED *)p->x + offset : NULL;
    return t;
}

INLINE NAME(State) NAME(load_state)(NAME(Tensors) t, int64_t j) {
    NAME(State) s = {HAS_M ? LOAD(t.m[j]) : 0, HAS_V ? LOAD(t.v[j]) : 0, HAS_X ? LOAD(t.x[j]) : 0};
    return s;
}

INLINE void NAME(store_state)(NAME(Tensors) t, int64_t j, NAME(State) s) {
    if (HAS_M) t.m[j] = STORE(s.m);
    if (HAS_V) t.v[j] = STORE(s.v);
    if (HAS_X) t.x[j] = STORE(s.x);
}

/* The passes on element j in memory. `direction_at` is the first pass of placement "regularized".
 */
INLINE REAL NAME(direction_at)(NAME(Tensors) t, int64_t j, NAME(Scalars) c) {
    return NAME(direction)(LOAD(t.g[j]), LOAD(t.w[j]), 0, c);
}

INLINE void NAME(step_at)(NAME(Tensors) t, int64_t j, REAL shift, NAME(Scalars) c) {
    NAME(State) s = NAME(load_state)(t, j);
    const REAL w = NAME(step)(LOAD(t.w[j]), LOAD(t.g[j]), &s, shift, c);
    NAME(store_state)(t, j, s);
    t.w[j] = STORE(w);
}

INLINE REAL NAME(first_pass_at)(NAME(Tensors) t, int64_t j, NAME(Scalars) c) {
    REAL delta;
    NAME(State) s = NAME(load_state)(t, j);
    const REAL w = NAME(first_pass)(LOAD(t.w[j]), LOAD(t.g[j]), &s, &delta, c);
    NAME(store_state)(t, j, s);
    if (DTYPE != BF16) t.w[j] = STORE(w);
    return delta;
}

INLINE void NAME(second_pass_at)(NAME(Tensors) t, int64_t j, REAL mean, NAME(Scalars) c) {
    NAME(State) s = {0, 0, 0};
    if (DTYPE == BF16) s = NAME(load_state)(t, j);
    t.w[j] = STORE(NAME(second_pass)(LOAD(t.w[j]), DTYPE == BF16 ? LOAD(t.g[j]) : 0, s, mean, c));
}

/* The passes on the two bf16 elements of one word. */
#define HALF(half, t, j)                                                     \
    {HAS_M ? half(word_of(t.m + j)) : 0, HAS_V ? half(word_of(t.v + j)) : 0, \
     HAS_X ? half(word_of(t.x + j)) : 0}

INLINE void NAME(store_states)(NAME(Tensors) t, int64_t j, NAME(State) low, NAME(State) high) {
    if (HAS_M) store_pair(t.m + j, low.m, high.m);
    if (HAS_V) store_pair(t.v + j, low.v, high.v);
    if (HAS_X) store_pair(t.x + j, low.x, high.x);
}

INLINE void NAME(direction_at_pair)(NAME(Tensors) t, int64_t j, REAL *low, REAL *high,
                                    NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    *low = NAME(direction)(lower(g), lower(w), 0, c);
    *high = NAME(direction)(upper(g), upper(w), 0, c);
}

INLINE void NAME(step_at_pair)(NAME(Tensors) t, int64_t j, REAL low_shift, REAL high_shift,
                               NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    NAME(State) low = HALF(lower, t, j), high = HALF(upper, t, j);
    const REAL low_w = NAME(step)(lower(w), lower(g), &low, low_shift, c);
    const REAL high_w = NAME(step)(upper(w), upper(g), &high, high_shift, c);
    NAME(store_states)(t, j, low, high);
    store_pair(t.w + j, low_w, high_w);
}

INLINE void NAME(first_pass_at_pair)(NAME(Tensors) t, int64_t j, REAL *low_delta, REAL *high_delta,
                                     NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    NAME(State) low = HALF(lower, t, j), high = HALF(upper, t, j);
    NAME(first_pass)(lower(w), lower(g), &low, low_delta, c);
    NAME(first_pass)(upper(w), upper(g), &high, high_delta, c);
    NAME(store_states)(t, j, low, high);
}

INLINE void NAME(second_pass_at_pair)(NAME(Tensors) t, int64_t j, REAL low_mean, REAL high_mean,
                                      NAME(Scalars) c) {
    const uint32_t w = word_of(t.w + j), g = word_of(t.g + j);
    const NAME(State) low = HALF(lower, t, j), high = HALF(upper, t, j);
    store_pair(t.w + j, NAME(second_pass)(lower(w), lower(g), low, low_mean, c),
               NAME(second_pass)(upper(w), upper(g), high, high_mean, c));
}
#undef HALF

#include "loops.h"

#undef NAME
#undef HAS_M
#undef HAS_V
#undef HAS_X
#undef RULE
#undef RULE_NAME
