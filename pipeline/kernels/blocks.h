// How the weights of a linear layer lie, and what a block of them is multiplied into; included by what computes and by
// what places them.
//
// A layer of K inputs and N outputs lies in blocks of 32 outputs, each in one piece:
//     codes   uint32   [N / 32][K * bits / 32][32]   a word holds 32 / bits inputs of one output, the first lowest
//     scales  float16  [N / 32][K / group][32]
// weight[n, k] = (code - 2 ** (bits - 1)) * scale. Plain weights lie in the same blocks, without scales: codes of 16 bits
// are bfloat16, of 32 bits float32. Their last block may have fewer outputs than it has room for.
//
// Plain weights may also lie as torch has them, [N][K], rows `stride` numbers apart.

#pragma once

#include "lanes.h"

#define BLOCK 32
#define SLAB 128 // inputs of a block that are multiplied together; as float32 they stay in the first-level cache
#define AHEAD 1024 // words; what is so much further on is asked for while a slab is dequantized or multiplied
#define CHUNK 192 // rows that pass by a slab; bounds what lies on the stack
#define TILE_ROWS 6 // rows of two registers whose sums fit the registers together, of which there are at least 16

// `lines` of 64 bytes that are asked for in parts: a processor has only so many on their way at once.
typedef struct {
    const char *from;
    int lines, part, num_parts;
} Ahead;

INLINE void ask(Ahead *ahead) {
    const int end = ahead->lines * (ahead->part + 1) / ahead->num_parts;
    for (int line = ahead->lines * ahead->part / ahead->num_parts; line < end; line++)
        __builtin_prefetch(ahead->from + 64 * line);
    ahead->part++;
}

enum { FLOAT32, BFLOAT16, INT8, AMX }; // kinds of rows; AMX: bfloat16 in tiles, which callers know nothing of

// One layer, or a stack of equal ones: that of expert e begins e * outputs * inputs further.
typedef struct {
    const void *codes;
    const uint16_t *scales; // NULL for plain weights
    int64_t outputs, inputs, bits, group;
    int64_t stride; // 0 for blocks
} Packed;

INLINE int64_t num_blocks(const Packed *layer) { return (layer->outputs + BLOCK - 1) / BLOCK; }

// Inputs of a slab: scales change between slabs alone, and the last slab of plain weights may be smaller.
INLINE int step_of(const Packed *layer) {
    int step = SLAB;
    while (layer->scales && layer->group % step) step /= 2;
    return step;
}

// Finite values only, which scales are.
INLINE float from_half(uint16_t half) {
    union { uint32_t bits; float value; } number = {(uint32_t)(half & 0x7fff) << 13};
    number.value *= 0x1p112f;
    number.bits |= (uint32_t)(half & 0x8000) << 16;
    return number.value;
}

// In one rounding, wherever it is compiled: with a case of its own for no scale it was one rounding here and two there.
INLINE void add_scaled(float *sums, reg part, const float *scale) { *(reg *)sums += part * *(const reg *)scale; }
