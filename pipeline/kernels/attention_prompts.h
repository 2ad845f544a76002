// Attention of tokens of one sequence that follow each other: each attends to itself and all before it; part of attention.c.
//
// A task is one key head of a block of tokens; its rows are the tokens' heads that share it. Rows lie side by side in
// registers: queries are turned on their side once, keys and values are read as they lie, and softmax is taken of whole
// registers, none of whose rows looks at its neighbours. The tiles of the context begin at the same places of a sequence
// however its prompt is cut into parts, so that a token's sums do not depend on the cut.
//
// Words are float32 numbers, or pairs of bfloat16 numbers where the processor multiplies those; a matrix unit takes pairs as
// they lie.

#pragma once

#include <float.h>

#include "amx.h"

enum { NUMBERS, PAIRS, MATRICES }; // what is multiplied: numbers, pairs, or pairs in a matrix unit

#define PLACES 48     // of a tile; whole ROWS
#define MATRIX_PLACES 64
#define BLOCK_ROWS 96 // whole pairs of registers, and whole ROWS
#define AT_ONCE 6     // places whose scores become weights; ROWS are whole such
#define MATRIX_AT_ONCE 8

typedef struct {
    int64_t first, num_tokens, start, num_before; // as Span in slot_cache.py
} Span;

// REGISTER rows of as many words, `apart` words from each other, on their side: to[word * to_apart + row].
INLINE void turn(const void *from, int64_t apart, void *to, int64_t to_apart) {
#ifdef __AVX512F__
    __m512i rows[16], twos[16], fours[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512((const int32_t *)from + i * apart);
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    for (int word = 0; word < 4; word++) { // each holds this word of each fourth, of four rows
        __m512i low = _mm512_shuffle_i32x4(fours[word], fours[word + 4], 0x88);
        __m512i high = _mm512_shuffle_i32x4(fours[word], fours[word + 4], 0xdd);
        __m512i last_low = _mm512_shuffle_i32x4(fours[word + 8], fours[word + 12], 0x88);
        __m512i last_high = _mm512_shuffle_i32x4(fours[word + 8], fours[word + 12], 0xdd);
        int32_t *place = (int32_t *)to + word * to_apart;
        _mm512_storeu_si512(place, _mm512_shuffle_i32x4(low, last_low, 0x88));
        _mm512_storeu_si512(place + 4 * to_apart, _mm512_shuffle_i32x4(high, last_high, 0x88));
        _mm512_storeu_si512(place + 8 * to_apart, _mm512_shuffle_i32x4(low, last_low, 0xdd));
        _mm512_storeu_si512(place + 12 * to_apart, _mm512_shuffle_i32x4(high, last_high, 0xdd));
    }
#elif defined(__AVX2__)
    __m256 rows[8], twos[8], fours[8];
    for (int i = 0; i < 8; i++) rows[i] = _mm256_loadu_ps((const float *)from + i * apart);
    for (int i = 0; i < 8; i += 2) {
        twos[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        twos[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(twos[i + j], twos[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(twos[i + j], twos[i + j + 2], 0xee);
        }
    for (int word = 0; word < 4; word++) { // each holds this word of each half, of four rows
        float *place = (float *)to + word * to_apart;
        _mm256_storeu_ps(place, _mm256_permute2f128_ps(fours[word], fours[word + 4], 0x20));
        _mm256_storeu_ps(place + 4 * to_apart, _mm256_permute2f128_ps(fours[word], fours[word + 4], 0x31));
    }
#else
    for (int row = 0; row < REGISTER; row++)
        for (int word = 0; word < REGISTER; word++)
            memcpy((int32_t *)to + word * to_apart + row, (const int32_t *)from + row * apart + word, sizeof(int32_t));
#endif
}

// ROWS rows of two registers: sums[row][..] = the sum over k of a[row][k] * b[k][..], in the order of k; after what is
// there already times keep[row], unless `keep` is NULL. Distances are in words.
INLINE void multiply(const void *a, int64_t a_row, int64_t a_step, const void *b, int64_t b_step, int64_t depth,
                     float *sums, int64_t sums_row, const float *keep, const int in_pairs) {
    reg own[ROWS][2] = {};
    if (keep)
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++)
            for (int i = 0; i < 2; i++) own[row][i] = *(const reg *)(sums + row * sums_row + i * REGISTER) * keep[row];
    for (int64_t k = 0; k < depth; k++) {
        const word_reg *words = (const word_reg *)((const uint32_t *)b + k * b_step), low = words[0], high = words[1];
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const void *factor = (const uint32_t *)a + row * a_row + k * a_step;
            if (!in_pairs) {
                own[row][0] += *(const float *)factor * (reg)low;
                own[row][1] += *(const float *)factor * (reg)high;
            }
#ifdef __AVX512BF16__
            if (in_pairs) {
                __m512bh both = (__m512bh)_mm512_set1_epi32(*(const int32_t *)factor);
                own[row][0] = (reg)_mm512_dpbf16_ps((__m512)own[row][0], both, (__m512bh)low);
                own[row][1] = (reg)_mm512_dpbf16_ps((__m512)own[row][1], both, (__m512bh)high);
            }
#endif
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < 2; i++) *(reg *)(sums + row * sums_row + i * REGISTER) = own[row][i];
}

#if HAS_AMX
// 32 rows times 32 columns: sums[row][column] = the sum over k of a[row][k] * b[k][column], after what is there already if
// `adds`. A word has two k side by side, and there are 16 words to a step. Distances are in words.
INLINE void multiply_matrices(const void *a, int64_t a_row, const void *b, int64_t b_row, int64_t steps, float *sums,
                              int64_t sums_row, int adds) {
    const char *rows = a, *columns = b;
    float *more = sums + AMX_ROWS * sums_row;
    // Compilers do not know that tiles are loaded from what they may have yet to write.
    __asm__ volatile("" : : "r"(a), "r"(b), "r"(sums) : "memory");
    if (adds) {
        _tile_loadd(0, sums, sums_row * 4);
        _tile_loadd(1, sums + 16, sums_row * 4);
        _tile_loadd(2, more, sums_row * 4);
        _tile_loadd(3, more + 16, sums_row * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++, rows += 64, columns += 16 * b_row * 4) {
        _tile_loadd(4, rows, a_row * 4);
        _tile_loadd(5, rows + AMX_ROWS * a_row * 4, a_row * 4);
        _tile_loadd(6, columns, b_row * 4);
        _tile_loadd(7, columns + 64, b_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, sums_row * 4);
    _tile_stored(1, sums + 16, sums_row * 4);
    _tile_stored(2, more, sums_row * 4);
    _tile_stored(3, more + 16, sums_row * 4);
    __asm__ volatile("" : : : "memory");
}
#endif

// What is known of each row's scores: their maximum so far, and the sum of the weights; and what the sums of the tiles
// before are to be multiplied with.
typedef struct {
    reg most[BLOCK_ROWS / REGISTER], total[BLOCK_ROWS / REGISTER];
    float keep[BLOCK_ROWS];
} Softmax;

#ifdef __AVX512BF16__
// Numbers of two registers as pairs of bfloat16.
INLINE word_reg in_turn(reg one, reg other) {
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                            20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (word_reg)_mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one));
}
#endif

// The scores of some places from `begin` on become weights, for one register of rows; in pairs those of two places lie side
// by side, rounded to bfloat16 as torch's own attention rounds them. The rows are of tokens at the places `own`, which see
// `window` places; of rows that see all these nothing is looked at. What is no number comes back in the weights.
INLINE void weigh_rows(float (*scores)[BLOCK_ROWS], int64_t places, float scale, Softmax *softmax, int64_t row,
                       int_reg own, int32_t begin, int32_t window, const int all_seen, const int in_pairs,
                       const int at_once) {
    const int64_t at = row / REGISTER;
    const reg before = softmax->most[at];
    reg most = before, added = {0};
    for (int t = 0; t < places; t++) {
        reg *score = (reg *)(scores[t] + row);
        if (!all_seen) {
            const int_reg back = own - (begin + t);
            *score = choose((back >= 0) & (back < window), *score, (reg){0} - INFINITY);
        }
        most = larger(*score * scale, most);
    }
    for (int t = 0; t < places; t += at_once) {
        reg own_scores[MATRIX_AT_ONCE], weights[MATRIX_AT_ONCE];
#pragma GCC unroll 8
        for (int i = 0; i < at_once; i++) {
            own_scores[i] = *(const reg *)(scores[t + i] + row);
            weights[i] = own_scores[i] * scale - most;
        }
        exp2_registers(weights, at_once);
#pragma GCC unroll 8
        for (int i = 0; i < at_once; i++) {
            const int_reg seen = own_scores[i] != (reg){0} - INFINITY; // 2^-126 is not nothing
            if (!all_seen) weights[i] = choose(seen, weights[i], (reg){0});
            added += weights[i];
            if (!in_pairs) *(reg *)(scores[t + i] + row) = weights[i];
        }
#ifdef __AVX512BF16__
#pragma GCC unroll 4
        for (int i = 0; in_pairs && i < at_once; i += 2) // of places 0 and 1 where those of place 0 were, and so on
            *(word_reg *)(scores[(t + i) / 2] + row) = in_turn(weights[i], weights[i + 1]);
#endif
    }
    reg keep = before - most;
    exp2_registers(&keep, 1);
    softmax->most[at] = most;
    softmax->total[at] = softmax->total[at] * keep + added;
    *(reg *)(softmax->keep + row) = keep;
}

#ifdef __AVX512BF16__
// Some places of one head as pairs of bfloat16, with zeros at those that are not of `from` .. `to`: keys where they lie or
// copied, `apart` words from each other, and values of two places each side by side, by which the numbers of a sum lie in
// another order until the end.
INLINE const void *keys_in_pairs(const uint16_t *keys, int64_t stride, int64_t from, int64_t to, int64_t size,
                                 uint16_t *copy, int64_t *apart, const int64_t places) {
    *apart = stride / 2;
    if (from == 0 && to == places) return keys;
    *apart = size / 2;
    memset(copy, 0, places * size * sizeof *copy);
    for (int64_t t = from; t < to; t++) memcpy(copy + t * size, keys + t * stride, size * sizeof *copy);
    return copy;
}

INLINE void values_in_pairs(const uint16_t *values, int64_t stride, int64_t from, int64_t to, int64_t size,
                            uint32_t *pairs, const int64_t places) {
    for (int64_t t = 0; t < places; t += 2)
        for (int64_t i = 0; i < size; i += 32, pairs += 32) {
            __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int one = 0; one < 2; one++)
                if (t + one >= from && t + one < to) both[one] = _mm512_loadu_si512(values + (t + one) * stride + i);
            _mm512_storeu_si512(pairs, _mm512_unpacklo_epi16(both[0], both[1]));
            _mm512_storeu_si512(pairs + 16, _mm512_unpackhi_epi16(both[0], both[1]));
        }
}
#endif

// `num_tokens` tokens of a span from one on, for one key head.
INLINE void prefill(const Shape *shape, const Span *span, int64_t token, int64_t num_tokens, int64_t key_head,
                    const int64_t size, const int is_bf16, const int kind) {
    const int in_pairs = kind != NUMBERS, in_matrices = kind == MATRICES;
    const int64_t most_places = in_matrices ? MATRIX_PLACES : PLACES, unit = in_matrices ? 2 * REGISTER : ROWS;
    const int64_t group = shape->heads / shape->key_heads, stride = shape->key_heads * size, rows = num_tokens * group;
    const int64_t width = filled(size), words = in_pairs ? size / 2 : width; // of a row of sums, and of queries and keys
    const int64_t position = span->num_before + token, last = position + num_tokens;
    const int64_t all_rows = rounded_up(rounded_up(rows, unit), 2 * REGISTER); // that the loops touch
    const int64_t from = shape->window > 0 && position - shape->window + 1 > 0 ? position - shape->window + 1 : 0;
    const float scale = shape->scale * 1.44269504f; // so that powers are those of two
    const int32_t window = shape->window > 0 ? least(shape->window, INT32_MAX) : INT32_MAX;
    float query[BLOCK_ROWS * words] __attribute__((aligned(64))), turned[words * BLOCK_ROWS] __attribute__((aligned(64)));
    // In matrices sums lie as scores do: a register has the numbers of as many rows.
    float sum[BLOCK_ROWS * width] __attribute__((aligned(64)));
    float scores[MATRIX_PLACES][BLOCK_ROWS] __attribute__((aligned(64)));
    float some_keys[most_places * words] __attribute__((aligned(64)));
    float some_values[most_places * (in_pairs ? size / 2 : width)] __attribute__((aligned(64)));
    int32_t own[BLOCK_ROWS] = {}; // the places of the rows' tokens
    Softmax softmax;

    memset(query + rows * words, 0, (all_rows - rows) * words * sizeof *query);
    memset(&softmax, 0, sizeof softmax);
    for (int i = 0; i < BLOCK_ROWS / REGISTER; i++) softmax.most[i] -= FLT_MAX;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = ((span->first + token + row / group) * shape->heads + key_head * group + row % group) * size;
        if (in_pairs) memcpy(query + row * words, (const uint16_t *)shape->query + at, size * sizeof(uint16_t));
        else copy_head(shape->query, at, size, 1.0f, query + row * words, is_bf16);
        own[row] = position + row / group;
    }
    for (int64_t row = 0; row < all_rows; row += REGISTER)
        for (int64_t word = 0; word < words; word += REGISTER)
            turn(query + row * words + word, words, turned + word * BLOCK_ROWS + row, BLOCK_ROWS);
#if HAS_AMX
    uint32_t turned_values[in_matrices ? size * MATRIX_PLACES / 2 : 1] __attribute__((aligned(64)));
    if (in_matrices) amx_begin(2 * AMX_ROWS);
#endif

    for (int64_t begin = from / most_places * most_places; begin < last; begin += most_places) {
        const int64_t count = least(last - begin, most_places), before = from > begin ? from - begin : 0;
        const int64_t at = (span->start + begin) * stride + key_head * size;
        // The first rows may all be of tokens before this tile, and the last places of none.
        const int64_t first = begin > position ? (begin - position) * group / unit * unit : 0;
        const int64_t places = rounded_up(count, unit);
        const int all_seen = begin + most_places <= position + 1 && last - begin <= window;
        int64_t keys_apart, values_apart;
        const void *keys = some_keys, *values = some_values;
#ifdef __AVX512BF16__
        if (in_pairs) {
            const uint16_t *key = (const uint16_t *)shape->keys + at, *value = (const uint16_t *)shape->values + at;
            keys = keys_in_pairs(key, stride, before, count, size, (uint16_t *)some_keys, &keys_apart, most_places);
            values_in_pairs(value, stride, before, count, size, (uint32_t *)some_values, most_places), values_apart = size;
        }
#endif
        if (!in_pairs) {
            keys = tile_of(shape->keys, at, stride, PLACES, before, count, size, some_keys, &keys_apart, is_bf16);
            values = tile_of(shape->values, at, stride, PLACES, before, count, size, some_values, &values_apart, is_bf16);
        }
#if HAS_AMX
        for (int64_t pair = 0; in_matrices && pair < places / 2; pair += REGISTER)
            for (int64_t i = 0; i < size; i += REGISTER)
                turn((const uint32_t *)values + pair * size + i, size, turned_values + i * MATRIX_PLACES / 2 + pair,
                     MATRIX_PLACES / 2);
#endif
        for (int64_t row = first / (2 * REGISTER) * 2 * REGISTER; row < all_rows; row += 2 * REGISTER) {
            for (int64_t t = 0; t < places; t += unit) {
                const float *some = (const float *)keys + t * keys_apart;
                if (!in_matrices)
                    multiply(some, keys_apart, 1, turned + row, BLOCK_ROWS, in_pairs ? words : size, scores[t] + row,
                             BLOCK_ROWS, NULL, in_pairs);
#if HAS_AMX
                else multiply_matrices(some, keys_apart, turned + row, BLOCK_ROWS, size / AMX_INPUTS, scores[t] + row,
                                       BLOCK_ROWS, 0);
#endif
            }
            for (int64_t half = row; half < row + 2 * REGISTER; half += REGISTER) {
                const int_reg tokens = *(const int_reg *)(own + half);
                const int at_once = in_matrices ? MATRIX_AT_ONCE : AT_ONCE;
                if (all_seen)
                    weigh_rows(scores, most_places, scale, &softmax, half, tokens, begin, window, 1, in_pairs, at_once);
                else weigh_rows(scores, places, scale, &softmax, half, tokens, begin, window, 0, in_pairs, at_once);
            }
#if HAS_AMX
            for (int64_t i = 0; in_matrices && i < size; i += 2 * REGISTER) {
                for (int64_t j = i; begin > from && j < i + 2 * REGISTER; j++)
                    for (int64_t half = row; half < row + 2 * REGISTER; half += REGISTER)
                        *(reg *)(sum + j * BLOCK_ROWS + half) *= *(const reg *)(softmax.keep + half);
                multiply_matrices(turned_values + i * MATRIX_PLACES / 2, MATRIX_PLACES / 2, scores[0] + row, BLOCK_ROWS,
                                  places / AMX_INPUTS, sum + i * BLOCK_ROWS + row, BLOCK_ROWS, begin > from);
            }
#endif
        }
        for (int64_t row = first; !in_matrices && row < rows; row += ROWS)
            for (int64_t i = 0; i < width; i += 2 * REGISTER)
                multiply(scores[0] + row, 1, BLOCK_ROWS, (const float *)values + i, values_apart,
                         in_pairs ? places / 2 : places, sum + row * width + i, width,
                         begin <= from ? NULL : softmax.keep + row, in_pairs);
    }
#if HAS_AMX
    float across[in_matrices ? BLOCK_ROWS * width : 1] __attribute__((aligned(64)));
    if (in_matrices) {
        _tile_release();
        for (int64_t row = 0; row < all_rows; row += REGISTER)
            for (int64_t i = 0; i < size; i += REGISTER)
                turn(sum + i * BLOCK_ROWS + row, BLOCK_ROWS, across + row * width + i, width);
    }
    const float *sums = in_matrices ? across : sum;
#else
    const float *sums = sum;
#endif
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = ((span->first + token + row / group) * shape->heads + key_head * group + row % group) * size;
        const float total = ((const float *)softmax.total)[row];
        if (!in_pairs) put_head(sums + row * width, total, size, shape->out, at, is_bf16);
#ifdef __AVX512BF16__
        if (in_pairs) put_pairs(sums + row * width, size / 32, total, (uint16_t *)shape->out + at);
#endif
    }
}

INLINE void prefill_any(const Shape *shape, const Span *span, int64_t token, int64_t count, int64_t head, const int64_t size,
                        int is_bf16) {
#if HAS_AMX
    if (is_bf16 && size % 32 == 0 && amx_is_allowed()) {
        prefill(shape, span, token, count, head, size, 1, MATRICES);
        return;
    }
#endif
#ifdef __AVX512BF16__
    if (is_bf16 && size % 32 == 0) {
        prefill(shape, span, token, count, head, size, 1, PAIRS);
        return;
    }
#endif
    prefill(shape, span, token, count, head, size, is_bf16, NUMBERS);
}

// `spans` int64 [num_spans][4]; query, out [tokens, heads, size]; 1 for heads that there is no room for.
int attend_prompts(const void *query, const void *keys, const void *values, const Span *spans, int64_t num_spans,
                   int64_t heads, int64_t key_heads, int64_t size, float scale, int64_t window, void *out, int is_bf16,
                   int64_t threads) {
    const Shape shape = {query, keys, values, out, heads, key_heads, size, window, scale};
    const int64_t group = heads / key_heads, block = BLOCK_ROWS / group;
    if (size > MOST_SIZE || group > MOST_GROUP) return 1;
    int64_t most_blocks = 0;
    for (int64_t s = 0; s < num_spans; s++) {
        int64_t blocks = (spans[s].num_tokens + block - 1) / block;
        most_blocks = blocks > most_blocks ? blocks : most_blocks;
    }
    // The last blocks of a prompt have the longest context: they go first, and the short ones fill the end.
    _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")
    for (int64_t task = 0; task < most_blocks * num_spans * key_heads; task++) {
        const Span *span = spans + task / key_heads % num_spans;
        int64_t token = (most_blocks - 1 - task / (key_heads * num_spans)) * block, head = task % key_heads;
        if (token >= span->num_tokens) continue;
        int64_t count = span->num_tokens - token < block ? span->num_tokens - token : block;
        switch (size) {
            case 64: prefill_any(&shape, span, token, count, head, 64, is_bf16); break;
            case 128: prefill_any(&shape, span, token, count, head, 128, is_bf16); break;
            case 256: prefill_any(&shape, span, token, count, head, 256, is_bf16); break;
            default: prefill_any(&shape, span, token, count, head, size, is_bf16);
        }
    }
    return 0;
}
