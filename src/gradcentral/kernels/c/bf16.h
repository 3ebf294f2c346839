/* A bfloat16 is the upper half of a float. Kernels read and write two of them as one 32-bit word,
 * whose halves become floats by a shift and a mask; converting single values would require shuffles
 * into wider lanes. */
#ifndef GRADCENTRAL_BF16_H
#define GRADCENTRAL_BF16_H
#include "kernels.h"

INLINE float word_as_float(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE float bf16_to_float(uint16_t x) { return word_as_float((uint32_t)x << 16); }

/* Round to nearest even; the result is in the upper half. A NaN remains a NaN: it comes from a bf16
 * or is the processor's default NaN, so its lower half is zero and no carry reaches the upper half.
 */
INLINE uint32_t round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE uint16_t float_to_bf16(float value) { return (uint16_t)(round_to_bf16(value) >> 16); }

/* This uses memcpy because a row may begin at an odd element, where words are not aligned. */
INLINE uint32_t word_of(const void *pair) {
    uint32_t word;
    memcpy(&word, pair, sizeof word);
    return word;
}

INLINE float lower(uint32_t word) { return word_as_float(word << 16); }
INLINE float upper(uint32_t word) { return word_as_float(word & 0xffff0000u); }

INLINE void store_pair(void *pair, float low, float high) {
    const uint32_t word = (round_to_bf16(low) >> 16) | (round_to_bf16(high) & 0xffff0000u);
    memcpy(pair, &word, sizeof word);
}
#endif
