// Stands in for CUDA's header of this name; see cuda_runtime.h beside it.
#pragma once

#include <stdint.h>

#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    bits += 0x7fff + (bits >> 16 & 1);  // half of the last place, down at a tie where that place is even
    return {static_cast<uint16_t>(bits >> 16)};
}
