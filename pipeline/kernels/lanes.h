// Lanes of 16 numbers, as float32 whatever they are stored as; included by the kernels, which say what they compute.
//
// A load or store of `count` numbers (at most LANES) leaves the rest zero or untouched. Without AVX-512 the compiler
// makes two or four registers of a lane.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef float quarter_vec __attribute__((vector_size(LANES)));
typedef uint32_t bits_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t short_vec __attribute__((vector_size(2 * LANES)));

// e^x for x <= 0, within 2e-7 of it: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
INLINE float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // rounds to the nearest whole number
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 8.3333840e-3f + r * 1.3888940e-3f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (4.1666668e-2f + r * p))));
    union { int32_t bits; float value; } scale = {((int32_t)n + 127) << 23};
    return p * scale.value;
}

INLINE float add_up(vec x) {
    half_vec halves[2];
    memcpy(halves, &x, sizeof x);
    half_vec half = halves[0] + halves[1];
    quarter_vec quarters[2];
    memcpy(quarters, &half, sizeof half);
    quarter_vec quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// `count` numbers (at most LANES), the rest zeros. A whole lane is a case of its own: copies of a length that is not known
// when this is compiled become loops.

INLINE vec load_float(const float *x, int64_t count) {
    vec wide = {0};
    if (count == LANES) memcpy(&wide, x, sizeof wide);
    else memcpy(&wide, x, count * sizeof *x);
    return wide;
}

INLINE void store_float(float *x, vec wide, int64_t count) {
    if (count == LANES) memcpy(x, &wide, sizeof wide);
    else memcpy(x, &wide, count * sizeof *x);
}

INLINE vec load_bf16(const uint16_t *x, int64_t count) {
    short_vec narrow = {0};
    if (count == LANES) memcpy(&narrow, x, sizeof narrow);
    else memcpy(&narrow, x, count * sizeof *x);
    bits_vec bits = __builtin_convertvector(narrow, bits_vec) << 16;
    return (vec)bits;
}

INLINE void store_bf16(uint16_t *x, vec wide, int64_t count) { // to the nearest, ties to even; NaN stays NaN
    bits_vec bits = (bits_vec)wide;
    bits_vec is_nan = (bits_vec)(wide != wide);
    bits = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16 & ~is_nan) | (is_nan & 0x7fc0);
    short_vec narrow = __builtin_convertvector(bits, short_vec);
    if (count == LANES) memcpy(x, &narrow, sizeof narrow);
    else memcpy(x, &narrow, count * sizeof *x);
}

INLINE vec load_any(const void *x, int64_t at, int64_t count, const int is_bf16) {
    return is_bf16 ? load_bf16((const uint16_t *)x + at, count) : load_float((const float *)x + at, count);
}

INLINE void store_any(void *x, int64_t at, vec wide, int64_t count, const int is_bf16) {
    if (is_bf16) store_bf16((uint16_t *)x + at, wide, count);
    else store_float((float *)x + at, wide, count);
}

// Registers by their true width, for what is computed most: of wider vectors compilers leave copies in memory, and they
// compare them number by number. `ROWS` of 16 numbers each fit the registers together.
#ifdef __AVX512F__
#define REGISTER 16 // numbers
#define ROWS 12
#elif defined(__AVX2__)
#define REGISTER 8
#define ROWS 6
#else
#define REGISTER 4
#define ROWS 3
#endif
typedef float reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
typedef int32_t int_reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
typedef uint32_t word_reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));

// Where the condition holds the one, elsewhere the other.
INLINE reg choose(int_reg condition, reg yes, reg no) {
    return (reg)((condition & (int_reg)yes) | (~condition & (int_reg)no));
}

// e^x, within 2e-7 of it, for x between -87 and 88, to which it is held; no number stays none.
INLINE reg exp_register(reg x) {
    const reg most = (reg){0} + 88.0f, least = (reg){0} - 87.0f;
    x = choose(x < least, least, choose(x > most, most, x));
    reg n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    reg r = x - n * 0.693359375f + n * 2.12194440e-4f;
    reg p = 8.3333840e-3f + r * 1.3888940e-3f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (4.1666668e-2f + r * p))));
    return p * (reg)((__builtin_convertvector(n, int_reg) + 127) << 23);
}

// Product of small matrices: sums[row][16] += sum over k of a[row * a_stride + k] * b[k * b_stride ...]; each sum in the order of k.
INLINE void multiply(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
                     const int rows, float (*sums)[LANES]) {
    reg own[ROWS][LANES / REGISTER];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < LANES / REGISTER; i++) own[row][i] = *(const reg *)(sums[row] + i * REGISTER);
    for (int64_t k = 0; k < depth; k++) {
        reg column[LANES / REGISTER];
#pragma GCC unroll 4
        for (int i = 0; i < LANES / REGISTER; i++) column[i] = *(const reg *)(b + k * b_stride + i * REGISTER);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            float factor = a[row * a_stride + k];
#pragma GCC unroll 4
            for (int i = 0; i < LANES / REGISTER; i++) own[row][i] += factor * column[i];
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < LANES / REGISTER; i++) *(reg *)(sums[row] + i * REGISTER) = own[row][i];
}
