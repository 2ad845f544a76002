// Rows of bfloat16 times a slab of weights in the matrix unit of a processor that has one (AMX-BF16): 16 rows by 16 outputs
// at once, 32 inputs at a time. The words of a slab of pairs (rows_bfloat16.h) are what its tiles take, as they lie.
//
// Rows lie as tiles too: 32 inputs of each of 16 rows in one piece, all inputs of these rows, then the next 16. What fills
// the last tile up is of no importance: no row sees another. A row is summed in one order, whatever is beside it.

#pragma once

#include "rows_bfloat16.h"

#define AMX_ROWS 16
#define AMX_INPUTS 32
#define AMX_BYTES 1024 // of a tile

#if AMX_INPUTS != BLOCK
#error "a block of an expert's inner numbers is one row of a tile"
#endif

#if HAS_BF16 && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

// Rows in whole tiles.
INLINE int64_t amx_padded(int64_t num_rows) { return rounded_up(num_rows, AMX_ROWS); }

// The first inputs of a row among tiles; those that follow are a tile further each.
INLINE char *amx_place(void *tiles, int64_t inputs, int64_t row) {
    return (char *)tiles + row / AMX_ROWS * AMX_ROWS * inputs * 2 + row % AMX_ROWS * AMX_INPUTS * 2;
}

// Puts a row among tiles, its inputs in the order in which a slab of weights of so many bits has them.
static void amx_put(const uint16_t *row, int64_t inputs, int bits, void *tiles, int64_t place) {
    char *to = amx_place(tiles, inputs, place);
    for (int64_t k = 0; k < inputs; k += AMX_INPUTS, to += AMX_BYTES) arrange(row + k, AMX_INPUTS, bits, (uint32_t *)to);
}

#if HAS_AMX
// Linux hands the registers out on request, once for all threads of a process (its documentation, arch/x86/xstate.rst).
static int amx_is_allowed(void) {
    static int answer = -1; // whichever thread asks, it is the same
    const int request = 0x1023, tiles = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (answer < 0) answer = syscall(SYS_arch_prctl, request, tiles) == 0;
    return answer;
}

// Whether the rows of a layer are multiplied so: always or never, for this sums in another order than other code.
INLINE int amx_serves(const Packed *layer) {
    const int step = layer->scales ? step_of(layer) : AMX_INPUTS;
    return layer->inputs % AMX_INPUTS == 0 && step % AMX_INPUTS == 0 && amx_is_allowed();
}

// Eight whole tiles. Whoever is through with them calls _tile_release, or they are saved with every change of threads.
INLINE void amx_begin(void) {
    static const struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {
        .palette = 1, .bytes = {[0 ... 7] = 2 * AMX_INPUTS}, .rows = {[0 ... 7] = AMX_ROWS}};
    _tile_loadconfig(&shape);
}

// Adds the products of one or two tiles of rows, of which `num_rows` count, to their sums: by way of a copy if they are to
// be scaled, else in place. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
INLINE void amx_products(const char *rows, const char *more_rows, const int num_tiles, int num_rows, int step,
                         const uint32_t *slab, const float *scale, float (*sums)[BLOCK], Ahead *ahead) {
    float part[2 * AMX_ROWS][BLOCK] __attribute__((aligned(64)));
    float(*to)[BLOCK] = scale ? part : sums;
    const int64_t apart = sizeof *sums;
    if (scale) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, to[0], apart);
        _tile_loadd(1, to[0] + 16, apart);
        if (num_tiles > 1) {
            _tile_loadd(2, to[AMX_ROWS], apart);
            _tile_loadd(3, to[AMX_ROWS] + 16, apart);
        }
    }
    for (int k = 0; k < step; k += AMX_INPUTS) {
        const uint32_t *weights = slab + k / 2 * BLOCK;
        const int64_t at = k / AMX_INPUTS * AMX_BYTES;
        ask(ahead);
        _tile_loadd(6, weights, BLOCK * sizeof *slab);
        _tile_loadd(7, weights + 16, BLOCK * sizeof *slab);
        _tile_loadd(4, rows + at, 2 * AMX_INPUTS);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (num_tiles > 1) {
            _tile_loadd(5, more_rows + at, 2 * AMX_INPUTS);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to[0], apart);
    _tile_stored(1, to[0] + 16, apart);
    if (num_tiles > 1) {
        _tile_stored(2, to[AMX_ROWS], apart);
        _tile_stored(3, to[AMX_ROWS] + 16, apart);
    }
    for (int row = 0; scale && row < num_rows; row++)
        for (int i = 0; i < BLOCK; i += REGISTER) add_scaled(sums[row] + i, *(const reg *)(part[row] + i), scale + i);
}

// How often a part of what follows is asked for.
INLINE int amx_passes(int num_rows, int step) { return (num_rows + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS) * (step / AMX_INPUTS); }

// All rows of a chunk times a slab of pairs, from the inputs `first` on; `scale` is NULL for plain weights.
INLINE void amx_slab(const Packed *layer, const void *tiles, int num_rows, int64_t first, int step, const uint32_t *slab,
                     const float *scale, float (*sums)[BLOCK], Ahead *ahead) {
    // Compilers do not know that tiles are loaded from what they may have yet to write.
    __asm__ volatile("" : : "r"(tiles), "r"(slab), "r"(sums) : "memory");
    for (int row = 0; row < num_rows; row += 2 * AMX_ROWS) {
        const char *rows = (const char *)tiles + row * layer->inputs * 2 + first / AMX_INPUTS * AMX_BYTES;
        const char *more_rows = rows + AMX_ROWS * layer->inputs * 2;
        const int count = least(2 * AMX_ROWS, num_rows - row);
        if (count > AMX_ROWS) amx_products(rows, more_rows, 2, count, step, slab, scale, sums + row, ahead);
        else amx_products(rows, NULL, 1, count, step, slab, scale, sums + row, ahead);
    }
}
#else
INLINE int amx_serves(const Packed *layer) {
    (void)layer;
    return 0;
}
#endif
