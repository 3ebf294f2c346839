/*
 * bfloat16 is the upper half of a float. Two of them are read and written as one word: its halves become floats by a
 * shift and a mask, where single ones have to be shuffled into wider lanes.
 */
#ifndef GRADCENTRAL_BF16_H
#define GRADCENTRAL_BF16_H
#include "kernels.h"

INLINE float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/*
 * Rounded to nearest even, in the upper half. A NaN stays one: it stems from a bf16, or from the processor as the
 * default NaN, so that its lower half is zero and nothing carries into the upper.
 */
INLINE uint32_t round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE uint16_t float_to_bf16(float value) { return (uint16_t)(round_to_bf16(value) >> 16); }

/* memcpy, for a row may begin anywhere, and a word of it lie across the alignment of words. */
INLINE uint32_t word_of(const uint16_t *pair) {
    uint32_t word;
    memcpy(&word, pair, sizeof word);
    return word;
}

INLINE float word_as_float(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE float lower(uint32_t word) { return word_as_float(word << 16); }
INLINE float upper(uint32_t word) { return word_as_float(word & 0xffff0000u); }

INLINE void store_pair(uint16_t *pair, float low, float high) {
    const uint32_t word = (round_to_bf16(low) >> 16) | (round_to_bf16(high) & 0xffff0000u);
    memcpy(pair, &word, sizeof word);
}
#endif
