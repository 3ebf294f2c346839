/*
 * All kernels for one dtype. This file is included once per dtype, with DTYPE defined; the end of
 * the file undefines it.
 *
 * Tensors hold STORED; arithmetic is in REAL; LOAD and STORE convert. Sums are accumulated in
 * PARTIAL over a stretch (see kernels.h), and in double beyond.
 *
 * Sums are not accumulated in REAL, because a mean in f32 over a fan-in of thousands would be off
 * by several rounding errors, and PΦ(g) = Φ(g) would hold only approximately. Accumulation in
 * double costs nothing here, since the loops are bound by memory. bf16 is the exception: two f32
 * lanes fit in place of one f64 lane, and a sum of 256 numbers of 8 significant bits loses almost
 * nothing in the 24 bits of an f32.
 */
#if DTYPE == F32
#define STORED float
#define REAL float
#define BITS uint32_t
#define SUFFIX f32
#define LOAD(x) (x)
#define STORE(x) (x)
#define ROOT sqrtf
#define PARTIAL double
#elif DTYPE == F64
#define STORED double
#define REAL double
#define BITS uint64_t
#define SUFFIX f64
#define LOAD(x) (x)
#define STORE(x) (x)
#define ROOT sqrt
#define PARTIAL double
#else
#define STORED uint16_t
#define REAL float
#define BITS uint32_t
#define SUFFIX bf16
#define LOAD(x) bf16_to_float(x)
#define STORE(x) float_to_bf16(x)
#define ROOT sqrtf
#define PARTIAL float
#endif

/* The number of two-element words of n bf16 elements that a loop reads and writes (see bf16.h); the
 * rest is processed element by element. It is 0 for other dtypes, for which the compiler drops the
 * loops over words. */
#define PAIRS(n) (DTYPE == BF16 ? (n) / 2 : 0)

#define IS_FINITE(x) ((x) - (x) == 0)
#define OR_ZERO(x) (IS_FINITE(x) ? (x) : 0)

/* Return x if all bits of the mask are set, otherwise `other`, without the branches that compilers
 * may make of a condition, which then prevent vectorization. */
INLINE REAL JOIN2(choose, SUFFIX)(BITS mask, REAL x, REAL other) {
    BITS bits, other_bits;
    memcpy(&bits, &x, sizeof bits);
    memcpy(&other_bits, &other, sizeof other_bits);
    bits = (bits & mask) | (other_bits & ~mask);
    memcpy(&x, &bits, sizeof x);
    return x;
}
#define CHOOSE JOIN2(choose, SUFFIX)
#define MASK(condition) ((condition) ? ~(BITS)0 : 0)

#include "center.h"

/* RULE is a number that the preprocessor compares; step.h undefines it. */
#define RULE SGD
#define RULE_NAME sgd
#include "step.h"
#define RULE MOMENTUM
#define RULE_NAME momentum
#include "step.h"
#define RULE ADAM
#define RULE_NAME adam
#include "step.h"
#define RULE AMSGRAD
#define RULE_NAME amsgrad
#include "step.h"

#undef DTYPE
#undef STORED
#undef REAL
#undef BITS
#undef SUFFIX
#undef LOAD
#undef STORE
#undef ROOT
#undef PARTIAL
#undef PAIRS
#undef IS_FINITE
#undef OR_ZERO
#undef CHOOSE
#undef MASK
#undef SLOT
#undef EACH_STRETCH
#undef EACH_COLUMN
