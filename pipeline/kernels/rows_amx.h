// Rows of bfloat16 times a slab of weights in the matrix unit of a processor that has one (AMX-BF16): 16 rows by 16 outputs
// at once, 32 inputs at a time. The words of a slab of pairs (rows_bfloat16.h) are what its tiles take, as they lie; rows
// follow each other in memory, and 16 of them are read as a tile wherever it begins. A row is summed in one order, whatever
// is beside it.

#pragma once

#include "amx.h"
#include "rows_bfloat16.h"

#if HAS_AMX
// Whether the rows of a layer are multiplied so: always or never, for this sums in another order than other code.
INLINE int amx_serves(const Packed *layer) {
    const int step = layer->scales ? step_of(layer) : AMX_INPUTS;
    return layer->inputs % AMX_INPUTS == 0 && step % AMX_INPUTS == 0 && amx_is_allowed();
}

// A few lines of the next slab, into the second-level cache: the first has this one, and more at a time than memory gives
// would have the rows wait.
INLINE void amx_ask(Ahead *ahead) {
    for (int line = 0; line < 4 && ahead->part < ahead->lines; line++, ahead->part++)
        __builtin_prefetch(ahead->from + 64 * ahead->part, 0, 2);
}

// The products of up to two tiles of rows with a slab: added to their sums, by way of a copy if they are to be scaled, else
// in place; `is_first` where there are no sums yet.
INLINE void amx_products(const char *rows, int64_t apart, int num_rows, const int num_tiles, int step, int is_first,
                         const uint32_t *slab, const float *scale, float (*sums)[BLOCK], Ahead *ahead) {
    float part[2 * AMX_ROWS][BLOCK] __attribute__((aligned(64)));
    float(*to)[BLOCK] = scale ? part : sums;
    if (scale || is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, to[0], sizeof *to);
        _tile_loadd(1, to[0] + 16, sizeof *to);
        if (num_tiles > 1) {
            _tile_loadd(2, to[AMX_ROWS], sizeof *to);
            _tile_loadd(3, to[AMX_ROWS] + 16, sizeof *to);
        }
    }
    // Of rows and weights the one is in the first-level cache or to stay there, and what passes by is read past it.
    const char *more_rows = rows + AMX_ROWS * apart;
    for (int k = 0; k < step; k += AMX_INPUTS) {
        const uint32_t *weights = slab + k / 2 * BLOCK;
        amx_ask(ahead);
        if (num_tiles > 1) {
            _tile_stream_loadd(4, rows + 2 * k, apart);
            _tile_stream_loadd(5, more_rows + 2 * k, apart);
            _tile_loadd(6, weights, BLOCK * sizeof *slab);
            _tile_loadd(7, weights + 16, BLOCK * sizeof *slab);
        } else {
            _tile_loadd(4, rows + 2 * k, apart);
            _tile_stream_loadd(6, weights, BLOCK * sizeof *slab);
            _tile_stream_loadd(7, weights + 16, BLOCK * sizeof *slab);
        }
        _tile_dpbf16ps(0, 4, 6);
        if (num_tiles > 1) _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (num_tiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to[0], sizeof *to);
    _tile_stored(1, to[0] + 16, sizeof *to);
    if (num_tiles > 1) {
        _tile_stored(2, to[AMX_ROWS], sizeof *to);
        _tile_stored(3, to[AMX_ROWS] + 16, sizeof *to);
    }
    for (int row = 0; scale && row < num_rows; row++)
        for (int i = 0; i < BLOCK; i += REGISTER) add_scaled(sums[row] + i, *(const reg *)(part[row] + i), scale + i);
}

// All rows of a chunk times a slab of pairs, from the inputs `first` on; `scale` is NULL for plain weights.
INLINE void amx_slab(const Packed *layer, const void *rows, int num_rows, int64_t first, int step, const uint32_t *slab,
                     const float *scale, float (*sums)[BLOCK], Ahead *ahead) {
    // Compilers do not know that tiles are loaded from what they may have yet to write.
    __asm__ volatile("" : : "r"(rows), "r"(slab), "r"(sums) : "memory");
    const int64_t apart = layer->inputs * 2;
    const char *from = (const char *)rows + first * 2;
    for (int left = num_rows; left > 0; left -= 2 * AMX_ROWS, from += 2 * AMX_ROWS * apart, sums += 2 * AMX_ROWS) {
        const int count = least(left, 2 * AMX_ROWS), is_part = count < least(num_rows, 2 * AMX_ROWS);
        if (is_part) amx_begin(count);
        if (count > AMX_ROWS) amx_products(from, apart, count, 2, step, !first, slab, scale, sums, ahead);
        else amx_products(from, apart, count, 1, step, !first, slab, scale, sums, ahead);
        if (is_part) amx_begin(num_rows);
    }
}
#else
INLINE int amx_serves(const Packed *layer) {
    (void)layer;
    return 0;
}
#endif
