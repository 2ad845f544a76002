// Attention of new tokens of several sequences, each to its own context: single tokens, and consecutive ones of prompts.
//
// query, out   [rows, heads, size]; heads that share a key head are neighbours
// keys, values [places, key_heads, size]; a sequence has `lengths[row]` places from `starts[row]` on
// window       most places that are looked back at; 0 for all
//
// Each task is one key head of one row: its context is read once for all heads that share it, in tiles that stay in
// the first cache, with the running maximum of online softmax (Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax"). Sums are float32 whatever the type of the numbers; rows never see each other.
//
// Heads are handled in lanes of 16 numbers, the last filled up with zeros. A task is compiled for the usual head sizes,
// so that its sums stay in registers.

#include "lanes.h"

#define TILE 32      // places
#define MOST_VECS 32 // of a head: 512 numbers
#define MOST_GROUP 64 // heads that share a key head

#define ATTEND_ONE(NAME, NUMBER, LOAD, STORE)                                                                          \
    static inline __attribute__((always_inline)) void NAME(                                                            \
        const NUMBER *query, const NUMBER *keys, const NUMBER *values, int64_t first, int64_t last, int64_t group,     \
        int64_t size, int64_t stride, float scale, NUMBER *out) {                                                      \
        int64_t vecs = (size + LANES - 1) / LANES, rest = size - (vecs - 1) * LANES;                                   \
        vec q[group * vecs], sum[group * vecs], tile[TILE * vecs];                                                     \
        float scores[group * TILE], most[group], total[group];                                                         \
        for (int64_t g = 0; g < group; g++) {                                                                          \
            most[g] = -INFINITY;                                                                                       \
            total[g] = 0.0f;                                                                                           \
            for (int64_t i = 0; i < vecs; i++) {                                                                       \
                q[g * vecs + i] = LOAD(query + g * size + i * LANES, i + 1 < vecs ? LANES : rest) * scale;             \
                sum[g * vecs + i] = (vec){0};                                                                          \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t begin = first; begin < last; begin += TILE) {                                                     \
            int64_t count = last - begin < TILE ? last - begin : TILE;                                                 \
            const NUMBER *place = keys + begin * stride;                                                               \
            for (int64_t t = 0; t < count; t++, place += stride) {                                                     \
                vec key[MOST_VECS];                                                                                    \
                for (int64_t i = 0; i < vecs; i++) key[i] = LOAD(place + i * LANES, i + 1 < vecs ? LANES : rest);      \
                for (int64_t g = 0; g < group; g++) {                                                                  \
                    vec products = q[g * vecs] * key[0];                                                               \
                    for (int64_t i = 1; i < vecs; i++) products += q[g * vecs + i] * key[i];                           \
                    scores[g * TILE + t] = add_up(products);                                                           \
                }                                                                                                      \
            }                                                                                                          \
            place = values + begin * stride;                                                                           \
            for (int64_t t = 0; t < count; t++, place += stride)                                                       \
                for (int64_t i = 0; i < vecs; i++)                                                                     \
                    tile[t * vecs + i] = LOAD(place + i * LANES, i + 1 < vecs ? LANES : rest);                         \
            for (int64_t g = 0; g < group; g++) {                                                                      \
                float *weights = scores + g * TILE, highest = most[g], added = 0.0f;                                   \
                for (int64_t t = 0; t < count; t++)                                                                    \
                    highest = weights[t] > highest || weights[t] != weights[t] ? weights[t] : highest;                 \
                float keep = most[g] == -INFINITY ? 0.0f : exp_negative(most[g] - highest);                            \
                most[g] = highest;                                                                                     \
                _Pragma("omp simd reduction(+ : added)")                                                               \
                for (int64_t t = 0; t < count; t++) added += weights[t] = exp_negative(weights[t] - highest);          \
                total[g] = total[g] * keep + added;                                                                    \
                vec own[MOST_VECS];                                                                                    \
                for (int64_t i = 0; i < vecs; i++) own[i] = sum[g * vecs + i] * keep;                                  \
                for (int64_t t = 0; t < count; t++)                                                                    \
                    for (int64_t i = 0; i < vecs; i++) own[i] += weights[t] * tile[t * vecs + i];                      \
                for (int64_t i = 0; i < vecs; i++) sum[g * vecs + i] = own[i];                                         \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t g = 0; g < group; g++)                                                                            \
            for (int64_t i = 0; i < vecs; i++)                                                                         \
                STORE(out + g * size + i * LANES, sum[g * vecs + i] / total[g], i + 1 < vecs ? LANES : rest);          \
    }

ATTEND_ONE(attend_one_float32, float, load_float, store_float)
ATTEND_ONE(attend_one_bfloat16, uint16_t, load_bf16, store_bf16)

#ifdef __AVX512BF16__
#include <immintrin.h>

// Sums of the numbers of each of 16 registers, in their order.
INLINE __m512 sums_of(const __m512 *x) {
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++) {
        __m512d one = _mm512_castps_pd(pairs[2 * i]), other = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other)) + _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
    }
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88) +
                    _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
    return _mm512_shuffle_f32x4(halves[0], halves[1], 0x88) + _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd);
}

// One head's sums over its total, whose numbers lie as unpacked pairs do, 2 * halves registers.
INLINE void put_pairs(const __m512 *sum, int64_t halves, float total, uint16_t *out) {
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    for (int64_t i = 0; i < halves; i++)
        for (int half = 0; half < 2; half++) {
            __m512i which = _mm512_add_epi32(order, _mm512_set1_epi32(8 * half));
            __m512 own = _mm512_permutex2var_ps(sum[2 * i], which, sum[2 * i + 1]) / total;
            store_bf16(out + i * 32 + half * 16, (vec)own, LANES);
        }
}

// Asks for one of `parts` equal parts of some places of keys and of values, `width` numbers each.
INLINE void fetch(const uint16_t *keys, const uint16_t *values, int64_t places, int64_t stride, int64_t width,
                  int64_t part, int64_t parts) {
    for (int64_t place = part * places / parts; place < (part + 1) * places / parts; place++)
        for (int64_t i = 0; i < width; i += 32) {
            __builtin_prefetch(keys + place * stride + i);
            __builtin_prefetch(values + place * stride + i);
        }
}

// The same with products of two bfloat16 numbers at once, for heads of whole registers of 32. Weights are rounded to
// bfloat16, as torch's own attention rounds them. Values of two places are interleaved, by which the numbers of a sum
// lie in another order until the end; a tile that is not full is filled up with zeros in a copy. What is done for one
// head waits for itself at every turn, so each step is taken for all heads that share a key head before the next. The
// next tile is asked for in small parts all the while: a processor has only so many lines on their way at once.
INLINE void attend_pairs(const uint16_t *query, const uint16_t *keys, const uint16_t *values, int64_t first,
                         int64_t last, int64_t key_heads, int64_t group, const int64_t size, int64_t stride,
                         float scale, uint16_t *out) {
    const int64_t halves = size / 32, heads = key_heads * group;
    __m512 sum[heads * 2 * halves], scores[group][2];
    __m512i pairs[TILE / 2 * 2 * halves];
    uint16_t some_keys[TILE * size], some_values[TILE * size];
    float most[heads], total[heads], keep[group];
    for (int64_t i = 0; i < heads * 2 * halves; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t head = 0; head < heads; head++) {
        most[head] = -INFINITY;
        total[head] = 0.0f;
    }
    for (int64_t task = 0, begin = first; begin < last; begin += ++task % key_heads ? 0 : TILE) {
        const int64_t shared = task % key_heads, head = shared * group;
        const uint16_t *key = keys + begin * stride + shared * size, *value = values + begin * stride + shared * size;
        int64_t count = last - begin < TILE ? last - begin : TILE, apart = stride;
        const int64_t next = begin + TILE, places = next < last ? (last - next < TILE ? last - next : TILE) : 0;
        if (count < TILE) {
            memset(some_keys + count * size, 0, (TILE - count) * size * sizeof *keys);
            memset(some_values + count * size, 0, (TILE - count) * size * sizeof *values);
            for (int64_t t = 0; t < count; t++) {
                memcpy(some_keys + t * size, key + t * stride, size * sizeof *keys);
                memcpy(some_values + t * size, value + t * stride, size * sizeof *values);
            }
            key = some_keys;
            value = some_values;
            apart = size;
        }
        for (int64_t t = 0; t < TILE; t += 2)
            for (int64_t i = 0; i < halves; i++) {
                __m512i one = _mm512_loadu_si512(value + t * apart + i * 32);
                __m512i next = _mm512_loadu_si512(value + (t + 1) * apart + i * 32);
                pairs[(t / 2 * halves + i) * 2] = _mm512_unpacklo_epi16(one, next);
                pairs[(t / 2 * halves + i) * 2 + 1] = _mm512_unpackhi_epi16(one, next);
            }
        for (int64_t g = 0; g < group; g++)
            for (int half = 0; half < 2; half++) {
                fetch(keys + next * stride, values + next * stride, places, stride, key_heads * size,
                      (head + g) * 2 + half, heads * 2);
                __m512 products[16];
#pragma GCC unroll 16
                for (int t = 0; t < 16; t++) {
                    const uint16_t *place = key + (half * 16 + t) * apart;
                    products[t] = _mm512_setzero_ps();
                    for (int64_t i = 0; i < halves; i++)
                        products[t] = _mm512_dpbf16_ps(
                            products[t], (__m512bh)_mm512_loadu_si512(query + (head + g) * size + i * 32),
                            (__m512bh)_mm512_loadu_si512(place + i * 32));
                }
                scores[g][half] = sums_of(products) * scale;
            }
        for (int64_t g = 0; g < group; g++) {
            __mmask16 seen[2];
            for (int half = 0; half < 2; half++) {
                int64_t places = count - half * 16;
                seen[half] = places >= 16 ? 0xffff : places > 0 ? (1 << places) - 1 : 0;
                scores[g][half] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen[half], scores[g][half]);
            }
            // A NaN comes back in the weights.
            float highest = _mm512_reduce_max_ps(_mm512_max_ps(scores[g][0], scores[g][1]));
            keep[g] = 1.0f;
            if (highest > most[head + g]) {
                keep[g] = most[head + g] == -INFINITY ? 0.0f : exp_negative(most[head + g] - highest);
                most[head + g] = highest;
            }
            for (int half = 0; half < 2; half++)
                scores[g][half] = _mm512_maskz_mov_ps(
                    seen[half], (__m512)exp_register((reg)(scores[g][half] - most[head + g])));
            total[head + g] = total[head + g] * keep[g] + _mm512_reduce_add_ps(scores[g][0] + scores[g][1]);
        }
        for (int64_t g = 0; g < group; g++) {
            __m512bh rounded = _mm512_cvtne2ps_pbh(scores[g][1], scores[g][0]);
            int32_t weights[TILE / 2];
            memcpy(weights, &rounded, sizeof weights);
            __m512 own[2 * halves], *to = sum + (head + g) * 2 * halves;
            for (int64_t i = 0; i < 2 * halves; i++) own[i] = to[i] * keep[g];
            for (int64_t t = 0; t < TILE / 2; t++)
                for (int64_t i = 0; i < 2 * halves; i++)
                    own[i] = _mm512_dpbf16_ps(own[i], (__m512bh)_mm512_set1_epi32(weights[t]),
                                              (__m512bh)pairs[t * 2 * halves + i]);
            for (int64_t i = 0; i < 2 * halves; i++) to[i] = own[i];
        }
    }
    for (int64_t head = 0; head < heads; head++)
        put_pairs(sum + head * 2 * halves, halves, total[head], out + head * size);
}
#endif

// Several key heads, whose places lie side by side.
#define ATTEND_HEADS(NAME, NUMBER, ATTEND_ONE)                                                                         \
    INLINE void NAME(const NUMBER *query, const NUMBER *keys, const NUMBER *values, int64_t first, int64_t last,       \
                     int64_t key_heads, int64_t group, const int64_t size, int64_t stride, float scale,                \
                     NUMBER *out) {                                                                                    \
        for (int64_t head = 0; head < key_heads; head++)                                                               \
            ATTEND_ONE(query + head * group * size, keys + head * size, values + head * size, first, last, group,      \
                       size, stride, scale, out + head * group * size);                                                \
    }

ATTEND_HEADS(attend_heads_float32, float, attend_one_float32)
ATTEND_HEADS(attend_heads_singly, uint16_t, attend_one_bfloat16)

INLINE void attend_heads_bfloat16(const uint16_t *query, const uint16_t *keys, const uint16_t *values, int64_t first,
                                  int64_t last, int64_t key_heads, int64_t group, const int64_t size, int64_t stride,
                                  float scale, uint16_t *out) {
#ifdef __AVX512BF16__
    if (size % 32 == 0) {
        attend_pairs(query, keys, values, first, last, key_heads, group, size, stride, scale, out);
        return;
    }
#endif
    attend_heads_singly(query, keys, values, first, last, key_heads, group, size, stride, scale, out);
}

// Of many rows each is one task, whose places are read as they lie; of few each key head is one.
#define ATTEND(NAME, NUMBER, TASK)                                                                                     \
    int NAME(const NUMBER *query, const NUMBER *keys, const NUMBER *values, const int64_t *starts,                     \
             const int64_t *lengths, int64_t rows, int64_t heads, int64_t key_heads, int64_t size, float scale,        \
             int64_t window, NUMBER *out, int64_t threads) {                                                           \
        const int64_t group = heads / key_heads, stride = key_heads * size;                                            \
        const int64_t parts = rows < 4 * threads ? key_heads : 1, part = key_heads / parts;                            \
        if (size > MOST_VECS * LANES || group > MOST_GROUP) return 1;                                                  \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                             \
        for (int64_t task = 0; task < rows * parts; task++) {                                                          \
            int64_t row = task / parts, head = task % parts * part;                                                    \
            int64_t first = starts[row], last = first + lengths[row];                                                  \
            if (window > 0 && lengths[row] > window) first = last - window;                                            \
            const NUMBER *q = query + (row * heads + head * group) * size, *k = keys + head * size;                    \
            const NUMBER *v = values + head * size;                                                                    \
            NUMBER *o = out + (row * heads + head * group) * size;                                                     \
            if (size == 64) TASK(q, k, v, first, last, part, group, 64, stride, scale, o);                             \
            else if (size == 128) TASK(q, k, v, first, last, part, group, 128, stride, scale, o);                      \
            else if (size == 256) TASK(q, k, v, first, last, part, group, 256, stride, scale, o);                      \
            else TASK(q, k, v, first, last, part, group, size, stride, scale, o);                                      \
        }                                                                                                              \
        return 0;                                                                                                      \
    }

ATTEND(attend_float32, float, attend_heads_float32)
ATTEND(attend_bfloat16, uint16_t, attend_heads_bfloat16)

// ---- prompts: tokens of one sequence that follow each other, each attends to itself and all before it ----
//
// A task is one key head of a block of tokens. The tiles of the context begin at the same places of a sequence however
// its prompt is cut into parts, so that a token's sums do not depend on the cut. Keys of a tile are turned on their
// side, for 16 places to be multiplied at once.

#define BLOCK_ROWS 96 // tokens x heads that share a key head

typedef struct {
    int64_t first, num_tokens, start, num_before; // as Span in slot_cache.py
} Span;

typedef struct {
    const void *query, *keys, *values;
    void *out;
    int64_t heads, key_heads, size, window;
    float scale;
} Shape;

INLINE void prefill_tile(float *scores, float *keep, float *most, float *total, int64_t rows, int64_t group,
                         int64_t position, int64_t begin, int64_t count, int64_t window) {
    for (int64_t row = 0; row < rows; row++) {
        float *weights = scores + row * TILE;
        int64_t own = position + row / group; // the token's place in its sequence
        int64_t from = window > 0 && own - window + 1 > begin ? own - window + 1 - begin : 0;
        int64_t to = own + 1 - begin < count ? own + 1 - begin : count;
        keep[row] = 1.0f;
        if (from >= to) {
            memset(weights, 0, TILE * sizeof *weights);
            continue;
        }
        for (int64_t t = 0; t < from; t++) weights[t] = -INFINITY;
        for (int64_t t = to; t < TILE; t++) weights[t] = -INFINITY;
        reg parts[TILE / REGISTER], high = (reg){0} - INFINITY, added = {0};
        memcpy(parts, weights, sizeof parts);
        for (int i = 0; i < TILE / REGISTER; i++) high = choose((parts[i] > high) | (parts[i] != parts[i]), parts[i], high);
        float highest = most[row];
        for (int i = 0; i < REGISTER; i++) highest = high[i] > highest || high[i] != high[i] ? high[i] : highest;
        if (highest == -INFINITY) {
            memset(weights, 0, TILE * sizeof *weights);
            continue;
        }
        for (int i = 0; i < TILE / REGISTER; i++) {
            int_reg seen = parts[i] != (reg){0} - INFINITY; // e^-87 is not nothing
            parts[i] = choose(seen, exp_register(parts[i] - highest), (reg){0});
            added += parts[i];
        }
        memcpy(weights, parts, sizeof parts);
        float sum = 0.0f;
        for (int i = 0; i < REGISTER; i++) sum += added[i];
        keep[row] = most[row] == -INFINITY ? 0.0f : exp_negative(most[row] - highest);
        total[row] = total[row] * keep[row] + sum;
        most[row] = highest;
    }
}

INLINE void prefill_task(const Shape *shape, const Span *span, int64_t token, int64_t num_tokens, int64_t head,
                         const int64_t size, const int is_bf16) {
    const int64_t group = shape->heads / shape->key_heads, vecs = (size + LANES - 1) / LANES, width = vecs * LANES;
    const int64_t rest = size - (vecs - 1) * LANES, stride = shape->key_heads * size, rows = num_tokens * group;
    const int64_t position = span->num_before + token, last = position + num_tokens;
    // Products are of so many rows always, whoever the last are: of fewer a compiler may round in another way.
    const int64_t room = rows + ROWS - 1;
    float query[room * width], sum[room * width];
    float turned[width * TILE], values[TILE * width], scores[room * TILE], keep[room], most[rows], total[rows];
    int64_t from = shape->window > 0 && position - shape->window + 1 > 0 ? position - shape->window + 1 : 0;

    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((span->first + token + row / group) * shape->heads + head * group + row % group) * size;
        for (int64_t i = 0; i < vecs; i++) {
            vec scaled = load_any(shape->query, at + i * LANES, i + 1 < vecs ? LANES : rest, is_bf16) * shape->scale;
            memcpy(query + row * width + i * LANES, &scaled, sizeof scaled);
        }
        most[row] = -INFINITY;
        total[row] = 0.0f;
    }
    memset(query + rows * width, 0, (room - rows) * width * sizeof *query);
    memset(scores, 0, sizeof scores);
    memset(keep, 0, sizeof keep);
    memset(sum, 0, sizeof sum);
    for (int64_t begin = from / TILE * TILE; begin < last; begin += TILE) {
        int64_t count = last - begin < TILE ? last - begin : TILE;
        memset(turned, 0, sizeof turned);
        for (int64_t t = 0; t < count; t++) {
            int64_t at = (span->start + begin + t) * stride + head * size;
            for (int64_t i = 0; i < vecs; i++) {
                vec key = load_any(shape->keys, at + i * LANES, i + 1 < vecs ? LANES : rest, is_bf16);
                for (int lane = 0; lane < LANES; lane++) turned[(i * LANES + lane) * TILE + t] = key[lane];
                vec value = load_any(shape->values, at + i * LANES, i + 1 < vecs ? LANES : rest, is_bf16);
                memcpy(values + t * width + i * LANES, &value, sizeof value);
            }
        }
        // Places before the window are masked, but what lies there may be no number: 0 times NaN is NaN.
        for (int64_t t = 0; t < from - begin; t++) {
            for (int64_t d = 0; d < width; d++) turned[d * TILE + t] = 0.0f;
            memset(values + t * width, 0, width * sizeof *values);
        }
        // The first rows may all be of tokens before this tile.
        int64_t first_row = begin > position ? (begin - position) * group : 0;
        for (int64_t row = first_row; row < rows; row += ROWS)
            for (int i = 0; i < TILE / LANES; i++) {
                float products[ROWS][LANES] = {0};
                multiply(query + row * width, width, turned + i * LANES, TILE, size, ROWS, products);
                for (int r = 0; r < ROWS; r++)
                    memcpy(scores + (row + r) * TILE + i * LANES, products[r], sizeof *products);
            }
        prefill_tile(scores + first_row * TILE, keep + first_row, most + first_row, total + first_row,
                     rows - first_row, group, position + first_row / group, begin, count, shape->window);
        for (int64_t row = first_row; row < rows; row += ROWS)
            for (int64_t i = 0; i < vecs; i++) {
                float own[ROWS][LANES];
                for (int r = 0; r < ROWS; r++)
                    for (int lane = 0; lane < LANES; lane++)
                        own[r][lane] = sum[(row + r) * width + i * LANES + lane] * keep[row + r];
                multiply(scores + row * TILE, TILE, values + i * LANES, width, count, ROWS, own);
                for (int r = 0; r < ROWS; r++) memcpy(sum + (row + r) * width + i * LANES, own[r], sizeof *own);
            }
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((span->first + token + row / group) * shape->heads + head * group + row % group) * size;
        for (int64_t i = 0; i < vecs; i++) {
            vec own = load_float(sum + row * width + i * LANES, LANES) / total[row];
            store_any(shape->out, at + i * LANES, own, i + 1 < vecs ? LANES : rest, is_bf16);
        }
    }
}

#ifdef __AVX512BF16__
// Words [16][..] on their side: to[16 words][16], rows `apart` and `to_apart` words from each other.
INLINE void turn(const uint16_t *from, int64_t apart, uint32_t *to, int64_t to_apart) {
    __m512i rows[16], twos[16], fours[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(from + i * apart);
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
        _mm512_storeu_si512(to + word * to_apart, _mm512_shuffle_i32x4(low, last_low, 0x88));
        _mm512_storeu_si512(to + (word + 4) * to_apart, _mm512_shuffle_i32x4(high, last_high, 0x88));
        _mm512_storeu_si512(to + (word + 8) * to_apart, _mm512_shuffle_i32x4(low, last_low, 0xdd));
        _mm512_storeu_si512(to + (word + 12) * to_apart, _mm512_shuffle_i32x4(high, last_high, 0xdd));
    }
}

// Weights of one row in a tile from its scores: bfloat16, those of unseen places 0. Gives what its sums so far are to be
// multiplied with.
INLINE float weigh(const float *scores, __mmask32 seen, float scale, float *most, float *total, int32_t *weights) {
    __m512 parts[2];
    for (int half = 0; half < 2; half++)
        parts[half] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen >> 16 * half,
                                         _mm512_loadu_ps(scores + 16 * half) * scale);
    float highest = _mm512_reduce_max_ps(_mm512_max_ps(parts[0], parts[1])), keep = 1.0f;
    if (highest > *most) {
        keep = *most == -INFINITY ? 0.0f : exp_negative(*most - highest);
        *most = highest;
    }
    for (int half = 0; half < 2; half++) // a NaN comes back here
        parts[half] = _mm512_maskz_mov_ps(seen >> 16 * half, (__m512)exp_register((reg)(parts[half] - *most)));
    *total = *total * keep + _mm512_reduce_add_ps(parts[0] + parts[1]);
    __m512bh rounded = _mm512_cvtne2ps_pbh(parts[1], parts[0]);
    memcpy(weights, &rounded, sizeof rounded);
    return keep;
}

// The same with products of two bfloat16 numbers at once, for heads of whole registers of 32. Values lie, and weights are
// rounded, as in attend_pairs.
INLINE void prefill_pairs(const Shape *shape, const Span *span, int64_t token, int64_t num_tokens, int64_t head,
                          const int64_t size) {
    const int64_t group = shape->heads / shape->key_heads, halves = size / 32, stride = shape->key_heads * size;
    const int64_t rows = num_tokens * group, room = rows + ROWS - 1;
    const int64_t position = span->num_before + token, last = position + num_tokens;
    const int64_t from = shape->window > 0 && position - shape->window + 1 > 0 ? position - shape->window + 1 : 0;
    int32_t query[room][size / 2], weights[room][TILE / 2];
    uint32_t turned[size / 2][TILE];
    __m512i pairs[TILE / 2][2 * halves];
    __m512 sum[room][2 * halves];
    float scores[room][TILE], most[rows], total[rows], keep[room];
    uint16_t some_keys[TILE * size], some_values[TILE * size];

    memset(query, 0, sizeof query);
    memset(weights, 0, sizeof weights);
    memset(sum, 0, sizeof sum);
    memset(keep, 0, sizeof keep);
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((span->first + token + row / group) * shape->heads + head * group + row % group) * size;
        memcpy(query[row], (const uint16_t *)shape->query + at, size * sizeof(uint16_t));
        most[row] = -INFINITY;
        total[row] = 0.0f;
    }
    for (int64_t begin = from / TILE * TILE; begin < last; begin += TILE) {
        const int64_t count = last - begin < TILE ? last - begin : TILE, before = from > begin ? from - begin : 0;
        const int64_t at = (span->start + begin) * stride + head * size;
        const uint16_t *key = (const uint16_t *)shape->keys + at, *value = (const uint16_t *)shape->values + at;
        int64_t apart = stride;
        if (count < TILE || before) { // what is not to be seen may be no number, and 0 times NaN is NaN
            for (int64_t t = 0; t < TILE; t++) {
                const int seen = t >= before && t < count;
                if (seen) memcpy(some_keys + t * size, key + t * stride, size * sizeof *key);
                else memset(some_keys + t * size, 0, size * sizeof *key);
                if (seen) memcpy(some_values + t * size, value + t * stride, size * sizeof *value);
                else memset(some_values + t * size, 0, size * sizeof *value);
            }
            key = some_keys;
            value = some_values;
            apart = size;
        }
        for (int64_t i = 0; i < halves; i++) {
            for (int half = 0; half < TILE; half += 16) turn(key + half * apart + i * 32, apart, turned[16 * i] + half, TILE);
            for (int64_t t = 0; t < TILE; t += 2) {
                __m512i one = _mm512_loadu_si512(value + t * apart + i * 32);
                __m512i next = _mm512_loadu_si512(value + (t + 1) * apart + i * 32);
                pairs[t / 2][2 * i] = _mm512_unpacklo_epi16(one, next);
                pairs[t / 2][2 * i + 1] = _mm512_unpackhi_epi16(one, next);
            }
        }
        // The first rows may all be of tokens before this tile.
        const int64_t first_row = begin > position ? (begin - position) * group : 0;
        for (int64_t row = first_row; row < rows; row += ROWS) {
            __m512 products[ROWS][2] = {};
            for (int64_t pair = 0; pair < size / 2; pair++) {
                __m512bh low = (__m512bh)_mm512_loadu_si512(turned[pair]);
                __m512bh high = (__m512bh)_mm512_loadu_si512(turned[pair] + 16);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) {
                    __m512bh x = (__m512bh)_mm512_set1_epi32(query[row + r][pair]);
                    products[r][0] = _mm512_dpbf16_ps(products[r][0], x, low);
                    products[r][1] = _mm512_dpbf16_ps(products[r][1], x, high);
                }
            }
            memcpy(scores[row], products, sizeof products);
        }
        for (int64_t row = first_row; row < rows; row++) {
            const int64_t own = position + row / group; // the token's place in its sequence
            const int64_t low = shape->window > 0 && own - shape->window + 1 > begin ? own - shape->window + 1 - begin : 0;
            const int64_t high = own + 1 - begin < TILE ? own + 1 - begin : TILE;
            const uint64_t seen = low < high ? (1ull << high) - (1ull << low) : 0;
            if (seen) keep[row] = weigh(scores[row], seen, shape->scale, most + row, total + row, weights[row]);
            else memset(weights[row], 0, sizeof weights[row]), keep[row] = 1.0f;
        }
        for (int64_t row = first_row; row < rows; row += ROWS / 2)
            for (int64_t i = 0; i < halves; i += 2) {
                const int64_t num_regs = halves - i < 2 ? 2 : 4;
                __m512 own[ROWS / 2][4] = {};
#pragma GCC unroll 6
                for (int r = 0; r < ROWS / 2; r++)
                    for (int64_t j = 0; j < num_regs; j++) own[r][j] = sum[row + r][2 * i + j] * keep[row + r];
                for (int64_t t = 0; t < TILE / 2; t++)
#pragma GCC unroll 6
                    for (int r = 0; r < ROWS / 2; r++) {
                        __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[row + r][t]);
                        for (int64_t j = 0; j < num_regs; j++)
                            own[r][j] = _mm512_dpbf16_ps(own[r][j], weight, (__m512bh)pairs[t][2 * i + j]);
                    }
#pragma GCC unroll 6
                for (int r = 0; r < ROWS / 2; r++)
                    for (int64_t j = 0; j < num_regs; j++) sum[row + r][2 * i + j] = own[r][j];
            }
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((span->first + token + row / group) * shape->heads + head * group + row % group) * size;
        put_pairs(sum[row], halves, total[row], (uint16_t *)shape->out + at);
    }
}
#endif

INLINE void prefill_any(const Shape *shape, const Span *span, int64_t token, int64_t count, int64_t head,
                        const int is_bf16) {
#ifdef __AVX512BF16__
    if (is_bf16 && shape->size % 32 == 0) {
        if (shape->size == 64) prefill_pairs(shape, span, token, count, head, 64);
        else if (shape->size == 128) prefill_pairs(shape, span, token, count, head, 128);
        else if (shape->size == 256) prefill_pairs(shape, span, token, count, head, 256);
        else prefill_pairs(shape, span, token, count, head, shape->size);
        return;
    }
#endif
    if (shape->size == 64) prefill_task(shape, span, token, count, head, 64, is_bf16);
    else if (shape->size == 128) prefill_task(shape, span, token, count, head, 128, is_bf16);
    else prefill_task(shape, span, token, count, head, shape->size, is_bf16);
}

// `spans` int64 [num_spans][4]; query, out [tokens, heads, size]; 1 for heads that there is no room for.
int attend_prompts(const void *query, const void *keys, const void *values, const Span *spans, int64_t num_spans,
                   int64_t heads, int64_t key_heads, int64_t size, float scale, int64_t window, void *out, int is_bf16,
                   int64_t threads) {
    const Shape shape = {query, keys, values, out, heads, key_heads, size, window, scale};
    const int64_t group = heads / key_heads, block = BLOCK_ROWS / group;
    if (size > MOST_VECS * LANES || group > MOST_GROUP) return 1;
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
        if (is_bf16) prefill_any(&shape, span, token, count, head, 1);
        else prefill_any(&shape, span, token, count, head, 0);
    }
    return 0;
}
