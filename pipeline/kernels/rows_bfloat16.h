// Rows of bfloat16 times a slab of weights, where the processor multiplies that (AVX512-BF16): two inputs side by side in
// a word. Of packed weights those are the first and the middle one of a word of codes first; plain ones lie so already.

#pragma once

#include "blocks.h"

// Most inputs of a slab of plain weights: it is to stay in the first-level cache, beside its rows unless they are tiles.
#define PLAIN_SLAB 320
#define AMX_SLAB 576

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16 1
#include <immintrin.h>
#else
#define HAS_BF16 0
#endif

// Puts the inputs of a row into the order in which the slab has them.
static void arrange(const uint16_t *row, int64_t inputs, int bits, uint32_t *pairs) {
    if (bits == 16) {
        memcpy(pairs, row, inputs * sizeof *row);
        return;
    }
    const int per_half = 16 / bits;
    for (int64_t word = 0; word < inputs / (2 * per_half); word++)
        for (int place = 0; place < per_half; place++) {
            const uint16_t *first = row + word * 2 * per_half + place;
            pairs[word * per_half + place] = first[0] | (uint32_t)first[per_half] << 16;
        }
}

// Inputs of a slab of plain weights: parts as equal as whole tiles of a matrix unit are, 32 inputs each.
INLINE int plain_step(int64_t inputs, int64_t most) {
    const int64_t parts = (inputs + most - 1) / most;
    return ((inputs + parts - 1) / parts + 31) / 32 * 32;
}

// A slab of plain weights that lie as torch has them; beyond the last output it is repeated.
INLINE void pairs_of_matrix(const Packed *layer, int64_t block, int64_t first, int step, uint32_t *slab) {
    for (int output = 0; output < BLOCK; output++) {
        const int64_t at = least(block * BLOCK + output, layer->outputs - 1) * layer->stride + first;
        for (int pair = 0; pair < step / 2; pair++)
            memcpy(slab + pair * BLOCK + output, (const uint16_t *)layer->codes + at + 2 * pair, sizeof *slab);
    }
}

#if HAS_BF16
// The values of codes of so many bits, for an instruction that looks at five of them.
INLINE __m512i table_bf16(const int bits) {
    uint16_t entries[32];
    for (int half = 0; half < 32; half += LANES) {
        vec values;
        for (int index = 0; index < LANES; index++)
            values[index] = ((half + index) & ((1 << bits) - 1)) - (1 << (bits - 1));
        store_bf16(entries + half, values, LANES);
    }
    return _mm512_loadu_si512(entries);
}

// The weights of one word of 16 outputs, not yet scaled, in pairs of inputs.
INLINE void pairs_of(word_reg code, const int bits, __m512i table, word_reg *pairs) {
    const int per_half = 16 / bits;
    if (bits < 8) {
        for (int place = 0; place < per_half; place++)
            pairs[place] = (word_reg)_mm512_permutexvar_epi16((__m512i)(code >> (bits * place)), table);
        return;
    }
    // Of 256 values no table: convert, which is exact, and take the upper halves.
    code ^= 0x80808080u;
    reg values[4];
    for (int place = 0; place < 4; place++)
        values[place] = __builtin_convertvector((int_reg)(code << (24 - 8 * place)) >> 24, reg);
    for (int place = 0; place < 2; place++)
        pairs[place] = (word_reg)values[place] >> 16 | (word_reg)values[place + 2];
}

INLINE void slab_bf16(const uint32_t *codes, int words, const int bits, __m512i table, uint32_t *slab) {
    const int per_half = 16 / bits;
    for (int word = 0; word < words; word++)
        for (int half = 0; half < BLOCK; half += REGISTER) {
            word_reg pairs[8];
            __builtin_prefetch(codes + word * BLOCK + half + AHEAD);
            pairs_of(*(const word_reg *)(codes + word * BLOCK + half), bits, table, pairs);
            for (int place = 0; place < per_half; place++)
                *(word_reg *)(slab + (word * per_half + place) * BLOCK + half) = pairs[place];
        }
}

// Adds to one sum of each row the products of one pair of inputs.
INLINE void pair_bf16(const void *const *rows, const int num_rows, int64_t pair, const uint32_t *weights,
                      __m512 (*part)[2]) {
    __m512bh low = (__m512bh)_mm512_loadu_si512(weights), high = (__m512bh)_mm512_loadu_si512(weights + REGISTER);
    for (int row = 0; row < num_rows; row++) {
        __m512bh x = (__m512bh)_mm512_set1_epi32(((const int32_t *)rows[row])[pair]);
        part[row][0] = _mm512_dpbf16_ps(part[row][0], x, low);
        part[row][1] = _mm512_dpbf16_ps(part[row][1], x, high);
    }
}

INLINE void add_parts(__m512 (*part)[TILE_ROWS][2], const int num_rows, const float *scale, float (*sums)[BLOCK]) {
    for (int row = 0; row < num_rows; row++)
        for (int half = 0; half < 2; half++)
            add_scaled(sums[row] + REGISTER * half, (reg)(part[0][row][half] + part[1][row][half]),
                       scale + REGISTER * half);
}

// `far`: the slab lies among the weights, and what follows it is asked for.
INLINE void tile_bf16(const void *const *rows, const int num_rows, int64_t first, int step, const uint32_t *slab,
                      const float *scale, float (*sums)[BLOCK], const int far) {
    __m512 part[2][TILE_ROWS][2] = {}; // two sums each, so that one product need not wait for the last
    int pair = 0;
    for (; pair + 1 < step / 2; pair += 2)
        for (int odd = 0; odd < 2; odd++) {
            const uint32_t *weights = slab + (pair + odd) * BLOCK;
            if (far)
                for (int half = 0; half < BLOCK; half += REGISTER) __builtin_prefetch(weights + half + AHEAD);
            pair_bf16(rows, num_rows, first / 2 + pair + odd, weights, part[odd]);
        }
    if (pair < step / 2) pair_bf16(rows, num_rows, first / 2 + pair, slab + pair * BLOCK, part[0]);
    add_parts(part, num_rows, scale, sums);
}

// The same sums for the rows of one tile, without a slab: converting hides behind so few products.
INLINE void direct_bf16(const void *const *rows, const int num_rows, int64_t first, int words, const int bits,
                        __m512i table, const uint32_t *codes, const float *scale, float (*sums)[BLOCK]) {
    const int per_half = 16 / bits;
    __m512 part[2][TILE_ROWS][2] = {};
    for (int word = 0; word < words; word++) {
        word_reg pairs[2][8];
        for (int half = 0; half < 2; half++) {
            const uint32_t *from = codes + word * BLOCK + half * REGISTER;
            __builtin_prefetch(from + AHEAD);
            pairs_of(*(const word_reg *)from, bits, table, pairs[half]);
        }
        for (int place = 0; place < per_half; place++)
            for (int row = 0; row < num_rows; row++) {
                const int32_t *pair = (const int32_t *)rows[row] + first / 2 + word * per_half + place;
                __m512bh x = (__m512bh)_mm512_set1_epi32(*pair);
                for (int half = 0; half < 2; half++)
                    part[place % 2][row][half] =
                        _mm512_dpbf16_ps(part[place % 2][row][half], x, (__m512bh)pairs[half][place]);
            }
    }
    add_parts(part, num_rows, scale, sums);
}
#endif
