// The matrix unit of processors that have one for bfloat16 (AMX-BF16): tiles of 16 rows by 64 bytes, products of which are
// summed up in float32, and how a thread begins to use them.

#pragma once

#include "lanes.h"

#define AMX_ROWS 16
#define AMX_INPUTS 32 // numbers of bfloat16 in a row of a tile

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

// Linux hands the registers out on request, once for all threads of a process (its documentation, arch/x86/xstate.rst).
static int amx_is_allowed(void) {
    static int answer = -1; // whichever thread asks, it is the same
    const int request = 0x1023, tiles = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (answer < 0) answer = syscall(SYS_arch_prctl, request, tiles) == 0;
    return answer;
}

// Shapes of the eight tiles.
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; // of a row
    uint8_t rows[16];
} AmxShape;

#define AMX_WHOLE_TILES {.palette = 1, .bytes = {[0 ... 7] = 2 * AMX_INPUTS}, .rows = {[0 ... 7] = AMX_ROWS}}

INLINE void amx_configure(const AmxShape *shape) {
    __asm__ volatile("" : : "r"(shape) : "memory"); // compilers do not know how much of it is read
    _tile_loadconfig(shape);
}

// Tiles for products of up to 32 rows with 32 columns: 0 to 3 are sums, two of columns for each of rows, 4 and 5 rows, 6 and
// 7 columns. Whoever is through with them calls _tile_release, or they are saved with every change of threads.
INLINE void amx_begin(int num_rows) {
    AmxShape shape = AMX_WHOLE_TILES;
    shape.rows[0] = shape.rows[1] = shape.rows[4] = least(num_rows, AMX_ROWS);
    if (num_rows > AMX_ROWS) shape.rows[2] = shape.rows[3] = shape.rows[5] = least(num_rows - AMX_ROWS, AMX_ROWS);
    amx_configure(&shape);
}
#else
#define HAS_AMX 0
#endif
