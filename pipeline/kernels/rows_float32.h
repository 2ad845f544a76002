// Rows of float32 times a slab of weights: at most 128 inputs of a block of 32 outputs.
//
// However a product is made here, each of its sums is the same: from zero, the inputs one after the other, each
// multiplied and added in one rounding. So a row's bits do not depend on how many rows are beside it.

#pragma once

#include "blocks.h"

// Has the compiler load a register once: it would rather read from memory for every row, and processors read two a cycle.
#if defined(__x86_64__)
#define STAY(register) __asm__("" : "+v"(register))
#else
#define STAY(register)
#endif

// A word of codes with this flipped holds numbers in two's complement.
INLINE uint32_t middles(const int bits) {
    return bits == 8 ? 0x80808080u : bits == 4 ? 0x88888888u : bits == 2 ? 0xaaaaaaaau : 0;
}

// The weights at one place of such words, not yet scaled.
INLINE reg weights_at(word_reg code, int place, const int bits) {
    if (bits == 32) return (reg)code;
    if (bits == 16) return place ? (reg)(code & 0xffff0000u) : (reg)(code << 16);
    return __builtin_convertvector((int_reg)(code << (32 - bits * (place + 1))) >> (32 - bits), reg);
}

INLINE void slab_f32(const uint32_t *codes, int words, const int bits, float *slab) {
    const int per_word = 32 / bits;
    for (int word = 0; word < words; word++)
        for (int output = 0; output < BLOCK; output += REGISTER) {
            word_reg code = *(const word_reg *)(codes + word * BLOCK + output) ^ middles(bits);
            __builtin_prefetch(codes + word * BLOCK + output + AHEAD);
            for (int place = 0; place < per_word; place++)
                *(reg *)(slab + (word * per_word + place) * BLOCK + output) = weights_at(code, place, bits);
        }
}

// The same of weights that lie as torch has them; beyond the last output it is repeated.
INLINE void slab_of_matrix(const Packed *layer, int64_t block, int64_t first, int step, float *slab) {
    for (int output = 0; output < BLOCK; output++) {
        const int64_t at = least(block * BLOCK + output, layer->outputs - 1) * layer->stride + first;
        uint32_t *to = (uint32_t *)slab + output;
        if (layer->bits == 32)
            for (int k = 0; k < step; k++) to[k * BLOCK] = ((const uint32_t *)layer->codes)[at + k];
        else
            for (int k = 0; k < step; k++) to[k * BLOCK] = (uint32_t)((const uint16_t *)layer->codes)[at + k] << 16;
    }
}

INLINE void tile_f32(const void *const *rows, const int num_rows, int64_t first, int step, const float *slab,
                     const float *scale, float (*sums)[BLOCK]) {
    for (int output = 0; output < BLOCK; output += 2 * REGISTER) {
        reg part[TILE_ROWS][2] = {};
        for (int k = 0; k < step; k++) {
            reg low = *(const reg *)(slab + k * BLOCK + output);
            reg high = *(const reg *)(slab + k * BLOCK + output + REGISTER);
            STAY(low);
            STAY(high);
            for (int row = 0; row < num_rows; row++) {
                float x = ((const float *)rows[row])[first + k];
                part[row][0] += x * low;
                part[row][1] += x * high;
            }
        }
        for (int row = 0; row < num_rows; row++)
            for (int half = 0; half < 2; half++)
                add_scaled(sums[row] + output + half * REGISTER, part[row][half],
                           scale ? scale + output + half * REGISTER : NULL);
    }
}

// The same sums for at most TILE_ROWS rows, without a slab: converting hides behind so few products.
INLINE void direct_f32(const void *const *rows, const int num_rows, int64_t first, int words, const int bits,
                       const uint32_t *codes, const float *scale, float (*sums)[BLOCK]) {
    const int per_word = 32 / bits, width = num_rows > 2 || BLOCK / REGISTER < 4 ? 2 : 4; // vectors side by side
    for (int output = 0; output < BLOCK; output += width * REGISTER) {
        reg part[TILE_ROWS][4] = {};
        for (int word = 0; word < words; word++) {
#pragma GCC unroll 4
            for (int vector = 0; vector < width; vector++) {
                const uint32_t *from = codes + word * BLOCK + output + vector * REGISTER;
                word_reg code = *(const word_reg *)from ^ middles(bits);
                __builtin_prefetch(from + AHEAD);
                for (int place = 0; place < per_word; place++) {
                    reg weights = weights_at(code, place, bits);
                    for (int row = 0; row < num_rows; row++)
                        part[row][vector] += ((const float *)rows[row])[first + word * per_word + place] * weights;
                }
            }
        }
        for (int row = 0; row < num_rows; row++)
            for (int vector = 0; vector < width; vector++)
                add_scaled(sums[row] + output + vector * REGISTER, part[row][vector],
                           scale ? scale + output + vector * REGISTER : NULL);
    }
}
