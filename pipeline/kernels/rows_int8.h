// Rows rounded to whole numbers of 8 bits, one scale for a slab of each, times packed weights.
//
// Such a row is `inputs` bytes, four to a word as they meet the codes, then for each slab a float32 scale, then for each
// slab the sum of its numbers as int32: with it unsigned codes are products of signed weights.

#pragma once

#include "blocks.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

INLINE int64_t quantized_bytes(const Packed *layer) { return layer->inputs + layer->inputs / step_of(layer) * 8; }

// Numbers that are none make the slab's scale none.
static void quantize(const float *row, const Packed *layer, void *to) {
    const int64_t inputs = layer->inputs;
    const int step = step_of(layer), bits = layer->bits, per_word = 32 / bits, sets = 8 / bits;
    int8_t *numbers = to;
    float *scales = (float *)(numbers + inputs);
    int32_t *sums = (int32_t *)(scales + inputs / step);
    for (int64_t slab = 0; slab < inputs / step; slab++) {
        const float *x = row + slab * step;
        float most = 0, none = 0;
        for (int k = 0; k < step; k++) {
            float size = x[k] < 0 ? -x[k] : x[k];
            most = size > most ? size : most;
            none += x[k] * 0.0f;
        }
        const float factor = most > 0 && none == 0 ? 127.0f / most : 0;
        int8_t rounded[SLAB];
        int32_t sum = 0;
        for (int k = 0; k < step; k++) {
            float shifted = x[k] * factor + 12582912.0f; // rounds to whole numbers
            rounded[k] = factor > 0 ? (int)(shifted - 12582912.0f) : 0;
            sum += rounded[k];
        }
        for (int word = 0; word < step / per_word; word++)
            for (int set = 0; set < sets; set++)
                for (int place = 0; place < 4; place++)
                    *numbers++ = rounded[word * per_word + set + sets * place];
        scales[slab] = most / 127.0f + none;
        sums[slab] = sum;
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
#define SIGNED_BYTES 1 // codes of 8 bits are taken as weights: products of unsigned ones do not fit 16 bits in pairs
#else
#define SIGNED_BYTES 0
#endif

// Adds to each lane the products of its four bytes: codes, which are unsigned and below 2 ** bits, and signed numbers.
INLINE int_reg dot(int_reg sum, word_reg codes, word_reg numbers, const int bits) {
#if defined(__AVX512VNNI__)
    (void)bits;
    return (int_reg)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)numbers);
#elif SIGNED_BYTES
    __m256i left = (__m256i)codes, right = (__m256i)numbers;
    if (bits == 8) { // 128 * 127 * 2 is below 2 ** 15
        __m256i weights = _mm256_xor_si256(left, _mm256_set1_epi8(-128));
        left = _mm256_abs_epi8(weights), right = _mm256_sign_epi8(right, weights);
    }
    __m256i pairs = _mm256_maddubs_epi16(left, right);
    return sum + (int_reg)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    (void)bits;
    for (int place = 0; place < 4; place++)
        sum += (int_reg)(codes >> (8 * place) & 255u) * ((int_reg)(numbers << (24 - 8 * place)) >> 24);
    return sum;
#endif
}

INLINE void direct_int8(const void *const *rows, const int num_rows, const Packed *layer, int64_t first, int step,
                        const int bits, const uint32_t *codes, const float *scale, float (*sums)[BLOCK]) {
    const int words = step * bits / 32, sets = 8 / bits;
    const int64_t num_slabs = layer->inputs / step, slab = first / step;
    const int32_t half = bits == 8 && SIGNED_BYTES ? 0 : 1 << (bits - 1);
    const uint32_t mask = bits == 8 ? 0xffffffffu : bits == 4 ? 0x0f0f0f0fu : 0x03030303u;
    for (int output = 0; output < BLOCK; output += 2 * REGISTER) {
        int_reg part[TILE_ROWS][2] = {};
        for (int word = 0; word < words; word++)
#pragma GCC unroll 2
            for (int vector = 0; vector < 2; vector++) {
                const uint32_t *from = codes + word * BLOCK + output + vector * REGISTER;
                word_reg code = *(const word_reg *)from;
                __builtin_prefetch(from + AHEAD);
                for (int set = 0; set < sets; set++) {
                    word_reg some = code >> (bits * set) & mask;
                    for (int row = 0; row < num_rows; row++) {
                        word_reg numbers = (word_reg){} + ((const uint32_t *)rows[row])[first / 4 + word * sets + set];
                        part[row][vector] = dot(part[row][vector], some, numbers, bits);
                    }
                }
            }
        for (int row = 0; row < num_rows; row++) {
            const float *scales = (const float *)((const char *)rows[row] + layer->inputs);
            const int32_t sum = ((const int32_t *)(scales + num_slabs))[slab];
            for (int vector = 0; vector < 2; vector++) {
                reg products = __builtin_convertvector(part[row][vector] - half * sum, reg);
                add_scaled(sums[row] + output + vector * REGISTER, products * scales[slab],
                           scale + output + vector * REGISTER);
            }
        }
    }
}
