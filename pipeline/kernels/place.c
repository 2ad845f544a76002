// Puts weights into blocks (blocks.h): those of a checkpoint and plain ones. Compiled by native.py, called by place.py.

#include "blocks.h"

// Copies matrices of a checkpoint into blocks of 32 columns. Matrix i has rows[i] rows and columns[i] columns of
// sizes[i] bytes at from + offsets[i], and goes to the address to[i]; of size 0 is one of 4-byte words that must all be
// the number to[i], and goes nowhere. Gives the first matrix that is not, or -1.
int64_t packed_place(int64_t count, const char *from, const int64_t *offsets, const int64_t *to, const int64_t *rows,
                     const int64_t *columns, const int64_t *sizes) {
    for (int64_t index = 0; index < count; index++) {
        const char *matrix = from + offsets[index];
        const int64_t height = rows[index], width = columns[index];
        if (!sizes[index]) {
            uint32_t differ = 0, word;
            for (int64_t at = 0; at < height * width; at++) {
                memcpy(&word, matrix + 4 * at, 4);
                differ |= word ^ (uint32_t)to[index];
            }
            if (differ) return index;
            continue;
        }
        const int64_t piece = BLOCK * sizes[index];
        for (int64_t block = 0; block < width / BLOCK; block++) {
            char *out = (char *)to[index] + block * height * piece;
            const char *in = matrix + block * piece;
            if (sizes[index] == 4) // a length known when compiled: no call for each row
                for (int64_t row = 0; row < height; row++) memcpy(out + row * 128, in + row * width * 4, 128);
            else
                for (int64_t row = 0; row < height; row++) memcpy(out + row * 64, in + row * width * 2, 64);
        }
    }
    return -1;
}

// Puts a float32 matrix [outputs, inputs] into blocks, as bfloat16 (16 bits, of even inputs) or as it is (32 bits).
// Gives 1 if a weight would lose something as bfloat16; then the blocks are not to be used.
int plain_place(const float *weight, int64_t outputs, int64_t inputs, int bits, uint32_t *blocks, int num_threads) {
    const int64_t words = inputs * bits / 32;
    int loses = 0;
#pragma omp parallel for num_threads(num_threads) reduction(| : loses)
    for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) {
        const uint32_t *rows = (const uint32_t *)weight + block * BLOCK * inputs;
        const int64_t count = least(BLOCK, outputs - block * BLOCK);
        uint32_t *to = blocks + block * words * BLOCK;
        uint32_t lost = 0;
        for (int64_t word = 0; word < words; word++, to += BLOCK)
            for (int64_t output = 0; output < BLOCK; output++) {
                const uint32_t *from = rows + output * inputs + word * (32 / bits);
                if (output >= count) to[output] = 0;
                else if (bits == 32) to[output] = *from;
                else to[output] = from[0] >> 16 | (from[1] & 0xffff0000u), lost |= (from[0] | from[1]) & 0xffff;
            }
        loses |= lost != 0;
    }
    return loses;
}
