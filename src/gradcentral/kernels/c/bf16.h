/* bfloat16 is the upper half of a float; rounding to nearest even, NaN stays NaN. */
#ifndef GRADCENTRAL_BF16_H
#define GRADCENTRAL_BF16_H
#include "kernels.h"

INLINE float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}
#endif
