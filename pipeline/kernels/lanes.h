// Lanes of 16 numbers, as float32 whatever they are stored as; included by the kernels, which say what they compute.
//
// A load or store of `count` numbers (at most LANES) leaves the rest zero or untouched. Without AVX-512 the compiler
// makes two or four registers of a lane.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t first, int64_t second) { return first < second ? first : second; }

// To a multiple of `unit`.
INLINE int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

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
// compare them number by number. `ROWS` of two registers fit the registers together, with two more and a factor.
#ifdef __AVX512F__
#define REGISTER 16 // numbers
#define ROWS 12
#elif defined(__AVX2__)
#define REGISTER 8
#define ROWS 6
#else
#define REGISTER 4
#define ROWS 6
#endif
typedef float reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
typedef int32_t int_reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
typedef uint32_t word_reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));

// Where the condition holds the one, elsewhere the other.
INLINE reg choose(int_reg condition, reg yes, reg no) {
    return (reg)((condition & (int_reg)yes) | (~condition & (int_reg)no));
}

// The larger number of each two, the second where one is none; and the smaller.
INLINE reg larger(reg one, reg other) {
#ifdef __AVX512F__
    return (reg)_mm512_max_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
    return (reg)_mm256_max_ps((__m256)one, (__m256)other);
#else
    return choose(one > other, one, other);
#endif
}

INLINE reg smaller(reg one, reg other) {
#ifdef __AVX512F__
    return (reg)_mm512_min_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
    return (reg)_mm256_min_ps((__m256)one, (__m256)other);
#else
    return choose(one < other, one, other);
#endif
}

// The largest of the numbers of a register, and their sum, by halves.
INLINE float largest(reg x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float one = x[0] > x[1] ? x[0] : x[1], other = x[2] > x[3] ? x[2] : x[3];
    return one > other ? one : other;
#endif
}

INLINE float total_of(reg x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (x[0] + x[1]) + (x[2] + x[3]);
#endif
}

// e^x, within 2e-7 of it, for x between -87 and 88, to which it is held; no number stays none.
INLINE reg exp_register(reg x) {
    x = larger((reg){0} - 87.0f, smaller((reg){0} + 88.0f, x));
#ifdef __AVX512F__
    const reg n = (reg)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
    const reg n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
#endif
    const reg r = x - n * 0.693359375f + n * 2.12194440e-4f;
    reg p = 8.3333840e-3f + r * 1.3888940e-3f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (4.1666668e-2f + r * p))));
#ifdef __AVX512F__
    return (reg)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (reg)((__builtin_convertvector(n, int_reg) + 127) << 23);
#endif
}

// 2^x in place of x, within 2e-7 of it, for x up to 127; below -126 as there, and no number stays none. The polynomial is
// the one of its degree whose largest error on [0, 1] is least. Each step is taken for all `count`, at most 8, before the
// next, so that none waits for itself.
INLINE void exp2_registers(reg *x, const int count) {
    static const float factors[] = {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 1.0f};
    reg floors[8], parts[8], powers[8];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        x[i] = larger((reg){0} - 126.0f, x[i]);
#ifdef __AVX512DQ__
        parts[i] = (reg)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
        floors[i] = (x[i] - 0.5f + 12582912.0f) - 12582912.0f;
        parts[i] = x[i] - floors[i];
#endif
        powers[i] = (reg){0} + 1.8775767e-3f;
    }
#pragma GCC unroll 8
    for (int k = 0; k < 5; k++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) powers[i] = powers[i] * parts[i] + factors[k];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
#ifdef __AVX512DQ__
        (void)floors;
        x[i] = (reg)_mm512_scalef_ps((__m512)powers[i], (__m512)x[i]);
#else
        x[i] = powers[i] * (reg)((__builtin_convertvector(floors[i], int_reg) + 127) << 23);
#endif
    }
}

// x / (1 + e^-x) in place of x, for `count` registers, at most 8.
INLINE void silu_registers(reg *x, const int count) {
    reg powers[8];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) powers[i] = x[i] * -1.44269504f;
    exp2_registers(powers, count);
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) x[i] = x[i] / (1.0f + powers[i]);
}
