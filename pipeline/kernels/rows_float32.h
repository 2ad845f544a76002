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

// Has the compiler read codes anew for every place of a word: kept in registers, they drive sums out of them.
#define READ_AGAIN __asm__ volatile("" ::: "memory")

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

// A part of `ahead` is asked for in each pass over the slab.
INLINE void tile_f32(const void *const *rows, const int num_rows, int64_t first, int step, const float *slab,
                     const float *scale, float (*sums)[BLOCK], Ahead *ahead) {
    for (int output = 0; output < BLOCK; output += 2 * REGISTER) {
        reg part[TILE_ROWS][2] = {};
        ask(ahead);
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
                add_scaled(sums[row] + output + half * REGISTER, part[row][half], scale + output + half * REGISTER);
    }
}

// Not inlined: among other code compilers run out of registers for where the rows lie.
typedef void Tile(const void *const *rows, int64_t first, int step, const float *slab, const float *scale,
                  float (*sums)[BLOCK], Ahead *ahead);
#define TILE_F32(num_rows) \
    static __attribute__((noinline)) void tile_f32_##num_rows( \
        const void *const *rows, int64_t first, int step, const float *slab, const float *scale, \
        float (*sums)[BLOCK], Ahead *ahead) { \
        tile_f32(rows, num_rows, first, step, slab, scale, sums, ahead); \
    }
TILE_F32(1)
TILE_F32(2)
TILE_F32(3)
TILE_F32(4)
TILE_F32(5)
TILE_F32(6)
static Tile *const tiles_f32[] = {NULL, tile_f32_1, tile_f32_2, tile_f32_3, tile_f32_4, tile_f32_5, tile_f32_6};

// The same sums for the rows of one tile, without a slab: converting hides behind so few products. The
// codes that follow, of few bits those after them, are asked for meanwhile, a part in each pass.
INLINE void direct_f32(const void *const *rows, const int num_rows, int64_t first, int words, const int bits,
                       const uint32_t *codes, const float *scale, float (*sums)[BLOCK]) {
    const int per_word = 32 / bits, width = num_rows > 2 || BLOCK / REGISTER < 4 ? 2 : 4; // vectors side by side
    const uint32_t *ahead = codes + words * BLOCK * (bits < 8 ? 2 : 1);
    for (int output = 0; output < BLOCK; output += width * REGISTER) {
        reg part[TILE_ROWS][4] = {};
        for (int word = 0; word < words; word++) {
            const uint32_t *from = codes + word * BLOCK + output;
            for (int i = 0; i < width * REGISTER; i += 16, ahead += 16) __builtin_prefetch(ahead);
#pragma GCC unroll 16
            for (int place = 0; place < per_word; place++) {
                reg weights[4];
#pragma GCC unroll 4
                for (int vector = 0; vector < width; vector++)
                    weights[vector] = weights_at(*(const word_reg *)(from + vector * REGISTER) ^ middles(bits), place, bits);
                for (int row = 0; row < num_rows; row++) {
                    const float x = ((const float *)rows[row])[first + word * per_word + place];
#pragma GCC unroll 4
                    for (int vector = 0; vector < width; vector++) part[row][vector] += x * weights[vector];
                }
                if (num_rows > 1) READ_AGAIN;
            }
        }
        for (int row = 0; row < num_rows; row++)
            for (int vector = 0; vector < width; vector++)
                add_scaled(sums[row] + output + vector * REGISTER, part[row][vector], scale + output + vector * REGISTER);
    }
}
