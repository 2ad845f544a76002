// Rows times one block of a layer, whatever the kind of the rows and the form of the weights.
//
// A block is dequantized by slabs, which stay in the first-level cache while all rows pass by; the codes are thus read
// once, whatever the number of rows. Products of a slab are summed in float32 and scaled then, so that weights are never
// rounded. Every row is summed in the same order whatever rows are beside it.

#pragma once

#include "rows_amx.h"
#include "rows_bfloat16.h"
#include "rows_float32.h"
#include "rows_int8.h"

// sums[r] = the products of rows[r] with one block of outputs; at most CHUNK rows, which follow each other if they are for a
// matrix unit.
typedef void Multiply(const Packed *, int64_t expert, int64_t block, const void *const *rows, int num_rows,
                      float (*sums)[BLOCK]);

// Plain weights are what they are.
INLINE void no_scale(float *scale) {
    for (int output = 0; output < BLOCK; output++) scale[output] = 1.0f;
}

// A slab where its weights lie, and as it is made for many rows.
typedef struct {
    const uint32_t *codes;
    const void *made; // NULL where it is multiplied as it lies
    const float *scale;
    int64_t first;
    int step;
} Slab;

INLINE void tile(const Packed *layer, const Slab *slab, const void *const *rows, const int num_rows,
                 float (*sums)[BLOCK], const int bits, const int kind, const int is_made, Ahead *ahead) {
    const int words = slab->step * bits / 32;
    if (kind == INT8)
        direct_int8(rows, num_rows, layer, slab->first, slab->step, bits, slab->codes, slab->scale, sums);
#if HAS_BF16
    else if (kind == BFLOAT16 && !is_made)
        direct_bf16(rows, num_rows, slab->first, words, bits, table_bf16(bits), slab->codes, slab->scale, sums);
    else if (kind == BFLOAT16)
        tile_bf16(rows, num_rows, slab->first, slab->step, slab->made, slab->scale, sums, bits == 16);
#endif
    else if (is_made) tiles_f32[num_rows](rows, slab->first, slab->step, slab->made, slab->scale, sums, ahead);
    else direct_f32(rows, num_rows, slab->first, words, bits, slab->codes, slab->scale, sums);
}

// Tiles are of nearly equal numbers of rows: with one or two the sums would wait for each other.
INLINE void all_tiles(const Packed *layer, const Slab *slab, const void *const *rows, int num_rows,
                      float (*sums)[BLOCK], const int bits, const int kind, const int is_made) {
    int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const int lines = slab->codes ? slab->step * bits * BLOCK / 512 : 0; // of the slab, and of the next
    Ahead ahead = {(const char *)slab->codes + 64 * lines, lines, 0, num_tiles * (BLOCK / (2 * REGISTER))};
#if HAS_AMX
    if (kind == AMX) {
        const float *scale = layer->scales ? slab->scale : NULL;
        amx_slab(layer, rows[0], num_rows, slab->first, slab->step, slab->made, scale, sums, &ahead);
        return;
    }
#endif
    for (; num_tiles; num_tiles--) {
        const int count = (num_rows + num_tiles - 1) / num_tiles;
        switch (count) { // numbers known when compiled, so that sums stay in registers
#define TILE(rows_of_tile) \
    case rows_of_tile: tile(layer, slab, rows, rows_of_tile, sums, bits, kind, is_made, &ahead); break
            TILE(1);
            TILE(2);
            TILE(3);
            TILE(4);
            TILE(5);
            TILE(6);
        }
        rows += count, sums += count, num_rows -= count;
    }
}

// Before the first slab, and after the last.
INLINE void begin(float (*sums)[BLOCK], int num_rows, const int kind, const int is_plain) {
    (void)is_plain;
#if HAS_AMX
    if (kind == AMX) amx_begin(num_rows);
    if (kind == AMX && is_plain) return; // sums begin in tiles
#endif
    memset(sums, 0, num_rows * sizeof *sums);
}

INLINE void end(const int kind) {
    (void)kind;
#if HAS_AMX
    if (kind == AMX) _tile_release();
#endif
}

INLINE void multiply_blocks(const Packed *layer, int64_t expert, int64_t block, const void *const *rows, int num_rows,
                            float (*sums)[BLOCK], const int bits, const int kind) {
    const int64_t words = layer->inputs * bits / 32, groups = layer->inputs / layer->group;
    const int64_t place = expert * num_blocks(layer) + block;
    const uint32_t *codes = (const uint32_t *)layer->codes + place * words * BLOCK;
    const uint16_t *scales = bits < 16 ? layer->scales + place * groups * BLOCK : NULL;
    const int is_bf16 = kind == BFLOAT16 || kind == AMX;
    const int is_plain = is_bf16 && bits == 16; // weights which are multiplied where they lie
    const int step = is_plain ? plain_step(layer->inputs, kind == AMX ? AMX_SLAB : PLAIN_SLAB) : step_of(layer);
    const int most_direct = kind == FLOAT32 && bits >= 8 ? 10 : TILE_ROWS; // for more rows a slab is worth its making
    const int is_made = is_plain || kind == AMX || (kind != INT8 && num_rows > most_direct);
    float made[SLAB * BLOCK] __attribute__((aligned(64))), scale[BLOCK];
    no_scale(scale);
    begin(sums, num_rows, kind, is_plain);
    for (int64_t first = 0; first < layer->inputs; first += step) {
        const int inputs = least(step, layer->inputs - first);
        Slab slab = {codes + first * bits / 32 * BLOCK, made, scale, first, inputs};
        if (bits < 16)
            for (int output = 0; output < BLOCK; output++)
                scale[output] = from_half(scales[first / layer->group * BLOCK + output]);
        if (!is_made) {
            all_tiles(layer, &slab, rows, num_rows, sums, bits, kind, 0);
            continue;
        }
#if HAS_BF16
        if (is_plain) slab.made = slab.codes;
        else if (is_bf16) slab_bf16(slab.codes, inputs * bits / 32, bits, table_bf16(bits), (uint32_t *)made);
        else
#endif
        slab_f32(slab.codes, inputs * bits / 32, bits, made);
        all_tiles(layer, &slab, rows, num_rows, sums, bits, kind, 1);
    }
    end(kind);
}

#define BLOCKS(bits, kind) \
    static __attribute__((noinline)) void multiply_##bits##_##kind( \
        const Packed *layer, int64_t expert, int64_t block, const void *const *rows, int num_rows, \
        float (*sums)[BLOCK]) { \
        multiply_blocks(layer, expert, block, rows, num_rows, sums, bits, kind); \
    }
BLOCKS(2, FLOAT32)
BLOCKS(4, FLOAT32)
BLOCKS(8, FLOAT32)
BLOCKS(16, FLOAT32)
BLOCKS(32, FLOAT32)
#if HAS_BF16
BLOCKS(2, BFLOAT16)
BLOCKS(4, BFLOAT16)
BLOCKS(8, BFLOAT16)
BLOCKS(16, BFLOAT16)
#endif
#if HAS_AMX
BLOCKS(2, AMX)
BLOCKS(4, AMX)
BLOCKS(8, AMX)
BLOCKS(16, AMX)
#endif
BLOCKS(2, INT8)
BLOCKS(4, INT8)
BLOCKS(8, INT8)

// The same for one plain layer that lies as torch has it.
static void multiply_matrix(const Packed *layer, int64_t expert, int64_t block, const void *const *rows, int num_rows,
                            float (*sums)[BLOCK]) {
    (void)expert;
    float made[SLAB * BLOCK] __attribute__((aligned(64))), scale[BLOCK];
    no_scale(scale);
    memset(sums, 0, num_rows * sizeof *sums);
    for (int64_t first = 0; first < layer->inputs; first += SLAB) {
        const Slab slab = {NULL, made, scale, first, least(SLAB, layer->inputs - first)};
        slab_of_matrix(layer, block, first, slab.step, made);
        all_tiles(layer, &slab, rows, num_rows, sums, 32, FLOAT32, 1);
    }
}

#if HAS_BF16
// The same with an even number of inputs for rows of bfloat16.
INLINE void multiply_matrix_in_pairs(const Packed *layer, int64_t block, const void *const *rows, int num_rows,
                                     float (*sums)[BLOCK], const int kind) {
    uint32_t made[AMX_SLAB / 2 * BLOCK] __attribute__((aligned(64)));
    float scale[BLOCK];
    const int step = plain_step(layer->inputs, kind == AMX ? AMX_SLAB : PLAIN_SLAB);
    no_scale(scale);
    begin(sums, num_rows, kind, 1);
    for (int64_t first = 0; first < layer->inputs; first += step) {
        const Slab slab = {NULL, made, scale, first, least(step, layer->inputs - first)};
        pairs_of_matrix(layer, block, first, slab.step, made);
        all_tiles(layer, &slab, rows, num_rows, sums, 32, kind, 1);
    }
    end(kind);
}

#define MATRIX(kind) \
    static void multiply_matrix_##kind(const Packed *layer, int64_t expert, int64_t block, const void *const *rows, \
                                       int num_rows, float (*sums)[BLOCK]) { \
        (void)expert; \
        multiply_matrix_in_pairs(layer, block, rows, num_rows, sums, kind); \
    }
MATRIX(BFLOAT16)
#if HAS_AMX
MATRIX(AMX)
#endif
#endif

static Multiply *multiply_for(const Packed *layer, int kind) {
    static Multiply *const variants[4][5] = {
        {multiply_2_FLOAT32, multiply_4_FLOAT32, multiply_8_FLOAT32, multiply_16_FLOAT32, multiply_32_FLOAT32},
#if HAS_BF16
        {multiply_2_BFLOAT16, multiply_4_BFLOAT16, multiply_8_BFLOAT16, multiply_16_BFLOAT16},
#else
        {NULL},
#endif
        {multiply_2_INT8, multiply_4_INT8, multiply_8_INT8},
#if HAS_AMX
        {multiply_2_AMX, multiply_4_AMX, multiply_8_AMX, multiply_16_AMX},
#endif
    };
    static Multiply *const of_matrices[4] = {
        multiply_matrix,
#if HAS_BF16
        multiply_matrix_BFLOAT16,
#endif
#if HAS_AMX
        [AMX] = multiply_matrix_AMX,
#endif
    };
    if (layer->stride) return of_matrices[kind];
    return variants[kind][__builtin_ctzll(layer->bits) - 1];
}
