// The instructions of AVX-512, AVX512-BF16 and AMX that the kernels use, as C functions, by the pseudocode of Intel's
// "Intrinsics Guide" (2024). What the kernels compute with them is thus tested where a processor has none of them.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512BF16__
#undef __AVX512VNNI__
#undef __AMX_TILE__
#undef __AMX_BF16__
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512BF16__ 1

#undef _mm512_setr_epi32
#define __asm__(...) // what keeps numbers in registers, which are not as wide here

#define EMULATED static inline __attribute__((always_inline, unused))
#define EACH(count, i) for (int i = 0; i < (count); i++)

typedef float floats_512 __attribute__((vector_size(64)));
typedef uint32_t words_512 __attribute__((vector_size(64)));
typedef uint16_t shorts_512 __attribute__((vector_size(64)));

EMULATED float from_bf16_512(uint16_t x) {
    union { uint32_t bits; float value; } number = {(uint32_t)x << 16};
    return number.value;
}

EMULATED uint16_t to_bf16_512(float x) {
    union { float value; uint32_t bits; } number = {x};
    return x != x ? 0x7fc0 : (number.bits + 0x7fff + (number.bits >> 16 & 1)) >> 16;
}

EMULATED __m512i load_512(const void *from) {
    __m512i x;
    memcpy(&x, from, sizeof x);
    return x;
}

EMULATED void store_512(void *to, __m512i x) { memcpy(to, &x, sizeof x); }

// Numbers of so many bits of the lower or higher half of each 128, of the one and the other in turn.
EMULATED __m512i unpack_512(__m512i one, __m512i other, int bytes, int high) {
    const char *from[2] = {(const char *)&one, (const char *)&other};
    __m512i result;
    char *to = (char *)&result;
    EACH(4, part)
    EACH(16 / bytes, place)
        memcpy(to + part * 16 + place * bytes, from[place % 2] + part * 16 + 8 * high + place / 2 * bytes, bytes);
    return result;
}

EMULATED floats_512 shuffle_512(floats_512 one, floats_512 other, int which) {
    floats_512 result;
    EACH(16, i) {
        const int place = (which >> i / 4 * 2 & 3) * 4 + i % 4;
        result[i] = i < 8 ? one[place] : other[place];
    }
    return result;
}

EMULATED floats_512 dot_512(floats_512 sum, __m512bh one, __m512bh other) {
    uint16_t x[32], y[32];
    memcpy(x, &one, sizeof x);
    memcpy(y, &other, sizeof y);
    EACH(16, i) {
        sum[i] += from_bf16_512(x[2 * i + 1]) * from_bf16_512(y[2 * i + 1]);
        sum[i] += from_bf16_512(x[2 * i]) * from_bf16_512(y[2 * i]);
    }
    return sum;
}

EMULATED __m512bh narrow_512(floats_512 high, floats_512 low) {
    uint16_t numbers[32];
    EACH(16, i) {
        numbers[i] = to_bf16_512(low[i]);
        numbers[16 + i] = to_bf16_512(high[i]);
    }
    __m512bh result;
    memcpy(&result, numbers, sizeof result);
    return result;
}

EMULATED floats_512 masked_512(floats_512 others, uint32_t mask, floats_512 x) {
    EACH(16, i) if (mask >> i & 1) others[i] = x[i];
    return others;
}

EMULATED floats_512 chosen_512(floats_512 one, __m512i which, floats_512 other) {
    const words_512 places = (words_512)which;
    floats_512 result;
    EACH(16, i) result[i] = places[i] & 16 ? other[places[i] & 15] : one[places[i] & 15];
    return result;
}

EMULATED __m512i shorts_chosen_512(__m512i which, __m512i from) {
    const shorts_512 places = (shorts_512)which, numbers = (shorts_512)from;
    shorts_512 result;
    EACH(32, i) result[i] = numbers[places[i] & 31];
    return (__m512i)result;
}

EMULATED floats_512 larger_512(floats_512 one, floats_512 other) { // the second where one is no number
    EACH(16, i) one[i] = one[i] > other[i] ? one[i] : other[i];
    return one;
}

EMULATED floats_512 smaller_512(floats_512 one, floats_512 other) {
    EACH(16, i) one[i] = one[i] < other[i] ? one[i] : other[i];
    return one;
}

EMULATED float largest_512(floats_512 x) {
    float most = x[0];
    EACH(16, i) most = most > x[i] ? most : x[i];
    return most;
}

EMULATED float total_512(floats_512 x) {
    float sum = 0;
    EACH(16, i) sum += x[i];
    return sum;
}

#define _mm512_add_epi32(one, other) ((__m512i)((words_512)(one) + (words_512)(other)))
#define _mm512_castpd_ps(x) ((__m512)(x))
#define _mm512_castps_pd(x) ((__m512d)(x))
#define _mm512_cvtne2ps_pbh(high, low) narrow_512((floats_512)(high), (floats_512)(low))
#define _mm512_dpbf16_ps(sum, one, other) ((__m512)dot_512((floats_512)(sum), one, other))
#define _mm512_loadu_ps(from) ((__m512)load_512(from))
#define _mm512_loadu_si512(from) load_512(from)
#define _mm512_mask_mov_ps(others, mask, x) ((__m512)masked_512((floats_512)(others), mask, (floats_512)(x)))
#define _mm512_maskz_mov_ps(mask, x) ((__m512)masked_512((floats_512){0}, mask, (floats_512)(x)))
#define _mm512_max_ps(one, other) ((__m512)larger_512((floats_512)(one), (floats_512)(other)))
#define _mm512_min_ps(one, other) ((__m512)smaller_512((floats_512)(one), (floats_512)(other)))
#define _mm512_permutex2var_ps(one, which, other) ((__m512)chosen_512((floats_512)(one), which, (floats_512)(other)))
#define _mm512_permutexvar_epi16(which, from) shorts_chosen_512(which, from)
#define _mm512_reduce_add_ps(x) total_512((floats_512)(x))
#define _mm512_reduce_max_ps(x) largest_512((floats_512)(x))
#define _mm512_set1_epi32(x) ((__m512i)((words_512){0} + (uint32_t)(x)))
#define _mm512_set1_ps(x) ((__m512)((floats_512){0} + (float)(x)))
#define _mm512_setr_epi32(...) ((__m512i)(words_512){__VA_ARGS__})
#define _mm512_setzero_ps() ((__m512)(floats_512){0})
#define _mm512_shuffle_f32x4(one, other, which) ((__m512)shuffle_512((floats_512)(one), (floats_512)(other), which))
#define _mm512_shuffle_i32x4(one, other, which) ((__m512i)shuffle_512((floats_512)(one), (floats_512)(other), which))
#define _mm512_storeu_si512(to, x) store_512(to, x)
#define _mm512_unpackhi_epi16(one, other) unpack_512(one, other, 2, 1)
#define _mm512_unpackhi_epi32(one, other) unpack_512(one, other, 4, 1)
#define _mm512_unpackhi_epi64(one, other) unpack_512(one, other, 8, 1)
#define _mm512_unpackhi_pd(one, other) ((__m512d)unpack_512((__m512i)(one), (__m512i)(other), 8, 1))
#define _mm512_unpackhi_ps(one, other) ((__m512)unpack_512((__m512i)(one), (__m512i)(other), 4, 1))
#define _mm512_unpacklo_epi16(one, other) unpack_512(one, other, 2, 0)
#define _mm512_unpacklo_epi32(one, other) unpack_512(one, other, 4, 0)
#define _mm512_unpacklo_epi64(one, other) unpack_512(one, other, 8, 0)
#define _mm512_unpacklo_pd(one, other) ((__m512d)unpack_512((__m512i)(one), (__m512i)(other), 8, 0))
#define _mm512_unpacklo_ps(one, other) ((__m512)unpack_512((__m512i)(one), (__m512i)(other), 4, 0))

#ifdef EMULATED_TILES
// Tiles of the thread. What is not configured may not be used, and what is released is not configured.

#include <sys/syscall.h>
#include <unistd.h>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define syscall(number, request, which) ((void)(request), (void)(which), 0) // permission is given
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

static __thread Tiles tiles_shape;
static __thread char tiles_held[8][16][64];

static __attribute__((unused)) void tiles_configure(const Tiles *shape) {
    tiles_shape = *shape;
    memset(tiles_held, 0, sizeof tiles_held);
}

static __attribute__((unused)) void tiles_move(int tile, char *at, int64_t apart, int is_load) {
    if (!tiles_shape.palette || !tiles_shape.rows[tile]) abort();
    EACH(tiles_shape.rows[tile], row)
        if (is_load) memcpy(tiles_held[tile][row], at + row * apart, tiles_shape.bytes[tile]);
        else memcpy(at + row * apart, tiles_held[tile][row], tiles_shape.bytes[tile]);
}

static __attribute__((unused)) void tiles_multiply(int sums, int rows, int weights) {
    const int num_pairs = tiles_shape.bytes[rows] / 4;
    if (!tiles_shape.palette || num_pairs != tiles_shape.rows[weights]) abort();
    if (tiles_shape.rows[sums] != tiles_shape.rows[rows]) abort();
    EACH(tiles_shape.rows[sums], row)
    EACH(tiles_shape.bytes[sums] / 4, column) {
        float part[2] = {0}, sum;
        EACH(num_pairs, pair)
        EACH(2, place) {
            uint16_t x, weight;
            memcpy(&x, tiles_held[rows][row] + pair * 4 + place * 2, sizeof x);
            memcpy(&weight, tiles_held[weights][pair] + column * 4 + place * 2, sizeof weight);
            part[place] += from_bf16_512(x) * from_bf16_512(weight);
        }
        memcpy(&sum, tiles_held[sums][row] + column * 4, sizeof sum);
        sum += part[0] + part[1];
        memcpy(tiles_held[sums][row] + column * 4, &sum, sizeof sum);
    }
}

#define _tile_loadconfig(shape) tiles_configure((const Tiles *)(shape))
#define _tile_release() memset(&tiles_shape, 0, sizeof tiles_shape)
#define _tile_zero(tile) memset(tiles_held[tile], 0, sizeof tiles_held[tile])
#define _tile_loadd(tile, from, apart) tiles_move(tile, (char *)(from), apart, 1)
#define _tile_stream_loadd(tile, from, apart) _tile_loadd(tile, from, apart)
#define _tile_stored(tile, to, apart) tiles_move(tile, (char *)(to), apart, 0)
#define _tile_dpbf16ps(sums, rows, weights) tiles_multiply(sums, rows, weights)
#endif
