// Attention of new tokens of several sequences, each to its own context: single tokens, and consecutive ones of prompts.
//
// query, out   [rows, heads, size]; heads that share a key head are neighbours
// keys, values [places, key_heads, size]; a sequence has `lengths[row]` places from `starts[row]` on
// window       most places that are looked back at; 0 for all
//
// A context is read once for all heads that share a key head, in tiles that stay in the first caches, with the running
// maximum of online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). Sums are float32
// whatever the type of the numbers; rows never see each other.
//
// Heads are handled in whole registers, filled up with zeros. What computes is compiled for the usual head sizes, so that
// sums stay in registers; the type of the numbers is looked at when they are read, which is a small part of the time.

#include "lanes.h"

#define TILE 32      // places
#define FEW 16       // places of a tile of single tokens in float32
#define FEW_BYTES 12288 // of its keys, and of its values: both stay in a first-level cache of 32 KiB
#define MOST_SIZE 512 // of a head
#define MOST_GROUP 64 // heads that share a key head
#define SUMS 8       // registers of sums side by side: fewer would wait for each other

typedef struct {
    const void *query, *keys, *values;
    void *out;
    int64_t heads, key_heads, size, window;
    float scale;
} Shape;

// The places that a token looks at, `first` to `last`. What is before `alike` lies `shift` further on as well, where others
// read it too: what many rows begin with comes from memory once.
typedef struct {
    int64_t first, last, alike, shift;
} Context;

INLINE int64_t read_at(const Context *context, int64_t place) {
    return place < context->alike ? place + context->shift : place;
}

// Sums of the numbers of each of REGISTER registers, in their order.
INLINE reg sums_of(const reg *x) {
#ifdef __AVX512F__
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; i++) {
        __m512 one = (__m512)x[2 * i], other = (__m512)x[2 * i + 1];
        pairs[i] = _mm512_unpacklo_ps(one, other) + _mm512_unpackhi_ps(one, other);
    }
    for (int i = 0; i < 4; i++) {
        __m512d one = _mm512_castps_pd(pairs[2 * i]), other = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other)) + _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
    }
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88) +
                    _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
    return (reg)(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88) + _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
#elif defined(__AVX2__)
    __m256 pairs[4], fours[2];
    for (int i = 0; i < 4; i++) pairs[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    for (int i = 0; i < 2; i++) fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
    return (reg)(_mm256_permute2f128_ps(fours[0], fours[1], 0x20) + _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
    reg sums;
    for (int i = 0; i < REGISTER; i++) sums[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
    return sums;
#endif
}

// A row's scores of some places, -INFINITY where it does not look, become weights, which are added to its totals, one for
// each number of a register. Gives what its sums so far are to be multiplied with. What is no number comes back in the
// weights.
INLINE float weigh(float *scores, const int places, float *most, reg *total) {
    reg parts[TILE / REGISTER], high = (reg){0} - INFINITY, added = {0};
    memcpy(parts, scores, places * sizeof *scores);
    for (int i = 0; i < places / REGISTER; i++) high = larger(parts[i], high);
    const float before = *most, highest = largest(high);
    float keep = 1.0f;
    if (highest > before) {
        keep = before == -INFINITY ? 0.0f : exp_negative(before - highest);
        *most = highest;
    }
    for (int i = 0; i < places / REGISTER; i++) {
        int_reg seen = parts[i] != (reg){0} - INFINITY; // e^-87 is not nothing
        parts[i] = choose(seen, exp_register(parts[i] - *most), (reg){0});
        added += parts[i];
    }
    memcpy(scores, parts, places * sizeof *scores);
    *total = *total * keep + added;
    return keep;
}

// How many numbers of a head of `size` a lane from `i` on has.
INLINE int64_t in_lane(int64_t size, int64_t i) { return size - i >= LANES ? LANES : size > i ? size - i : 0; }

// The width that a head is filled up to with zeros: whole registers, two at a time.
INLINE int64_t filled(int64_t size) { return (size + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// A head, times `scale`, as float32.
static void copy_head(const void *from, int64_t at, int64_t size, float scale, float *to, int is_bf16) {
    for (int64_t i = 0; i < filled(size); i += LANES)
        store_float(to + i, load_any(from, at + i, in_lane(size, i), is_bf16) * scale, LANES);
}

// One head of a tile's places as float32, `apart` numbers from each other: where they lie, or copied, with zeros beyond the
// head's size and at places that are not of `from` .. `to`. What lies there may be no number, and 0 times NaN is NaN.
static const float *tile_of(const void *pool, int64_t at, int64_t stride, int64_t places, int64_t from, int64_t to,
                            int64_t size, float *copy, int64_t *apart, int is_bf16) {
    const int64_t width = filled(size);
    *apart = stride;
    if (!is_bf16 && size == width && from == 0 && to == places) return (const float *)pool + at;
    *apart = width;
    for (int64_t t = 0; t < places; t++)
        if (t >= from && t < to) copy_head(pool, at + t * stride, size, 1.0f, copy + t * width, is_bf16);
        else memset(copy + t * width, 0, width * sizeof *copy);
    return copy;
}

static void put_head(const float *sum, float total, int64_t size, void *out, int64_t at, int is_bf16) {
    for (int64_t i = 0; i < size; i += LANES)
        store_any(out, at + i, load_float(sum + i, LANES) / total, in_lane(size, i), is_bf16);
}

// Asks for some places, `each` of them at a step; all sizes in bytes.
INLINE void ask(const char *from, int64_t places, int64_t stride, int64_t width, int64_t step, int64_t each) {
    for (int64_t place = step * each; place < places && place < (step + 1) * each; place++)
        for (int64_t i = 0; i < width; i += 64) __builtin_prefetch(from + place * stride + i);
}

// Some key heads of one row, whose places lie side by side. What is done for one head waits for itself at every turn, so
// each step is taken for all heads before the next, or for as many as have their tile of keys and that of values in the
// first-level cache. While one of the two is used the other is asked for, in small parts: a processor has only so many
// lines on their way at once, and what is read from the second-level cache has to wait for its turn among them.
INLINE void attend_floats(const Shape *shape, int64_t row, const Context *context, int64_t key_head,
                          int64_t num_key_heads, const int64_t size, int is_bf16) {
    const int64_t last = context->last;
    const int64_t group = shape->heads / shape->key_heads, heads = num_key_heads * group;
    const int64_t stride = shape->key_heads * size, number = is_bf16 ? 2 : 4;
    const int64_t width = filled(size), query_at = (row * shape->heads + key_head * group) * size;
    int64_t together = num_key_heads;
    while (num_key_heads % together || (together > 1 && together * size * number * FEW > FEW_BYTES)) together--;
    const int64_t steps = together * group, turns = FEW / REGISTER, bytes = together * size * number;
    const int64_t few_values = (FEW + steps * turns - 1) / (steps * turns), few_keys = (FEW + steps - 1) / steps;
    float query[heads * width], sum[heads * width], most[heads], scores[steps][FEW], keep[steps];
    float some_keys[FEW * width], some_values[FEW * width];
    reg total[heads];
    for (int64_t head = 0; head < heads; head++) {
        copy_head(shape->query, query_at + head * size, size, shape->scale, query + head * width, is_bf16);
        most[head] = -INFINITY;
        total[head] = (reg){0};
    }
    memset(sum, 0, sizeof sum);
    for (int64_t begin = context->first, from = 0; begin < last;) {
        const int64_t at = read_at(context, begin) * stride + (key_head + from) * size, head = from * group;
        const int64_t count = last - begin < FEW ? last - begin : FEW;
        const char *all_values = (const char *)shape->values + at * number;
        const float *keys = NULL, *values = NULL;
        int64_t apart;
        for (int64_t g = 0; g < steps; g++) {
            if (g % group == 0)
                keys = tile_of(shape->keys, at + g / group * size, stride, FEW, 0, count, size, some_keys, &apart, is_bf16);
            for (int turn = 0; turn < turns; turn++) {
                ask(all_values, count, stride * number, bytes, g * turns + turn, few_values);
                reg products[REGISTER] = {};
#pragma GCC unroll 8
                for (int64_t i = 0; i < width; i += REGISTER) {
                    reg own = *(const reg *)(query + (head + g) * width + i);
#pragma GCC unroll 16
                    for (int t = 0; t < REGISTER; t++)
                        products[t] += own * *(const reg *)(keys + (turn * REGISTER + t) * apart + i);
                }
                *(reg *)(scores[g] + turn * REGISTER) = sums_of(products);
            }
        }
        for (int64_t g = 0; g < steps; g++) {
            for (int64_t t = count; t < FEW; t++) scores[g][t] = -INFINITY;
            keep[g] = weigh(scores[g], FEW, most + head + g, total + head + g);
        }
        from += together;
        if (from == num_key_heads) from = 0, begin += FEW;
        const int64_t next = read_at(context, begin) * stride + (key_head + from) * size;
        const char *next_keys = (const char *)shape->keys + next * number;
        for (int64_t g = 0; g < steps; g++) {
            if (g % group == 0)
                values = tile_of(shape->values, at + g / group * size, stride, FEW, 0, count, size, some_values, &apart, is_bf16);
            ask(next_keys, last - begin < FEW ? last - begin : FEW, stride * number, bytes, g, few_keys);
            for (int64_t i = 0; i < width; i += SUMS * REGISTER) {
                const int64_t num_sums = width - i < SUMS * REGISTER ? (width - i) / REGISTER : SUMS;
                float *to = sum + (head + g) * width + i;
                reg own[SUMS];
#pragma GCC unroll 8
                for (int64_t j = 0; j < num_sums; j++) own[j] = *(const reg *)(to + j * REGISTER) * keep[g];
#pragma GCC unroll 4
                for (int64_t t = 0; t < FEW; t++)
#pragma GCC unroll 8
                    for (int64_t j = 0; j < num_sums; j++)
                        own[j] += scores[g][t] * *(const reg *)(values + t * apart + i + j * REGISTER);
#pragma GCC unroll 8
                for (int64_t j = 0; j < num_sums; j++) *(reg *)(to + j * REGISTER) = own[j];
            }
        }
    }
    for (int64_t head = 0; head < heads; head++)
        put_head(sum + head * width, total_of(total[head]), size, shape->out, query_at + head * size, is_bf16);
}

#ifdef __AVX512BF16__
// Asks for one of `parts` equal parts of some places of keys and of values; all sizes in bytes.
INLINE void fetch(const void *keys, const void *values, int64_t places, int64_t stride, int64_t width, int64_t part,
                  int64_t parts) {
    for (int64_t place = part * places / parts; place < (part + 1) * places / parts; place++)
        for (int64_t i = 0; i < width; i += 64) {
            __builtin_prefetch((const char *)keys + place * stride + i);
            __builtin_prefetch((const char *)values + place * stride + i);
        }
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

// The same with products of two bfloat16 numbers at once, for heads of whole registers of 32. Weights are rounded to
// bfloat16, as torch's own attention rounds them. Values of two places are interleaved, by which the numbers of a sum
// lie in another order until the end; a tile that is not full is filled up with zeros in a copy.
INLINE void attend_pairs(const Shape *shape, int64_t row, const Context *context, int64_t key_head,
                         int64_t num_key_heads, const int64_t size) {
    const int64_t last = context->last;
    const int64_t group = shape->heads / shape->key_heads, heads = num_key_heads * group;
    const int64_t halves = size / 32, stride = shape->key_heads * size;
    const int64_t query_at = (row * shape->heads + key_head * group) * size;
    const uint16_t *query = (const uint16_t *)shape->query + query_at;
    const uint16_t *keys = (const uint16_t *)shape->keys + key_head * size;
    const uint16_t *values = (const uint16_t *)shape->values + key_head * size;
    __m512 sum[heads * 2 * halves], scores[group][2];
    __m512i pairs[TILE / 2 * 2 * halves];
    uint16_t some_keys[TILE * size], some_values[TILE * size];
    float most[heads], total[heads], keep[group];
    for (int64_t i = 0; i < heads * 2 * halves; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t head = 0; head < heads; head++) {
        most[head] = -INFINITY;
        total[head] = 0.0f;
    }
    for (int64_t task = 0, begin = context->first; begin < last; begin += ++task % num_key_heads ? 0 : TILE) {
        const int64_t shared = task % num_key_heads, head = shared * group;
        const int64_t at = read_at(context, begin) * stride + shared * size;
        const uint16_t *key = keys + at, *value = values + at;
        int64_t count = last - begin < TILE ? last - begin : TILE, apart = stride;
        const int64_t after = begin + TILE, places = after < last ? (last - after < TILE ? last - after : TILE) : 0;
        const int64_t next = read_at(context, after);
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
                fetch(keys + next * stride, values + next * stride, places, stride * sizeof *keys,
                      num_key_heads * size * sizeof *keys, (head + g) * 2 + half, heads * 2);
                reg products[16];
#pragma GCC unroll 16
                for (int t = 0; t < 16; t++) {
                    const uint16_t *place = key + (half * 16 + t) * apart;
                    __m512 sums = _mm512_setzero_ps();
                    for (int64_t i = 0; i < halves; i++)
                        sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(query + (head + g) * size + i * 32),
                                                (__m512bh)_mm512_loadu_si512(place + i * 32));
                    products[t] = (reg)sums;
                }
                scores[g][half] = (__m512)sums_of(products) * shape->scale;
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
        put_pairs(sum + head * 2 * halves, halves, total[head], (uint16_t *)shape->out + query_at + head * size);
}
#endif

INLINE void attend_row(const Shape *shape, int64_t row, const Context *context, int64_t key_head, int64_t num_key_heads,
                       const int64_t size, int is_bf16) {
#ifdef __AVX512BF16__
    if (is_bf16 && size % 32 == 0) {
        attend_pairs(shape, row, context, key_head, num_key_heads, size);
        return;
    }
#endif
    attend_floats(shape, row, context, key_head, num_key_heads, size, is_bf16);
}

// One token of each sequence, whose context is `lengths[row]` places from `starts[row]` on; 1 for heads that there is no
// room for. Of many rows each is one task, whose places are read as they lie; of few each key head is one. `alike` is NULL,
// or tells where the first places of a row lie too, and how many of them: whole tiles.
int attend_one(const void *query, const void *keys, const void *values, const int64_t *starts, const int64_t *lengths,
               const int64_t (*alike)[2], int64_t rows, int64_t heads, int64_t key_heads, int64_t size, float scale,
               int64_t window, void *out, int is_bf16, int64_t threads) {
    const Shape shape = {query, keys, values, out, heads, key_heads, size, window, scale};
    const int64_t parts = rows < 4 * threads ? key_heads : 1, part = key_heads / parts;
    if (size > MOST_SIZE || heads / key_heads > MOST_GROUP) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < rows * parts; task++) {
        const int64_t row = task / parts, head = task % parts * part, last = starts[row] + lengths[row];
        Context context = {starts[row], last, starts[row], 0};
        if (window > 0 && lengths[row] > window) context.first = last - window; // in the middle of a tile
        else if (alike) context.alike += alike[row][1], context.shift = alike[row][0] - starts[row];
        switch (size) { // numbers known when compiled, so that sums stay in registers
            case 64: attend_row(&shape, row, &context, head, part, 64, is_bf16); break;
            case 128: attend_row(&shape, row, &context, head, part, 128, is_bf16); break;
            case 256: attend_row(&shape, row, &context, head, part, 256, is_bf16); break;
            default: attend_row(&shape, row, &context, head, part, size, is_bf16);
        }
    }
    return 0;
}

// ---- prompts: tokens of one sequence that follow each other, each attends to itself and all before it ----
//
// A task is one key head of a block of tokens. The tiles of the context begin at the same places of a sequence however
// its prompt is cut into parts, so that a token's sums do not depend on the cut. Keys of a tile are turned on their
// side, for two registers of places to be multiplied at once.

#define BLOCK_ROWS 96 // tokens x heads that share a key head

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

// ROWS rows of two registers: sums[row][..] = or += the sum over k of a[row][k] * b[k][..], in the order of k.
INLINE void multiply(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth, float *sums,
                     int64_t sums_stride, const int adds) {
    reg own[ROWS][2] = {};
    if (adds)
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++)
            for (int i = 0; i < 2; i++) own[row][i] = *(const reg *)(sums + row * sums_stride + i * REGISTER);
    for (int64_t k = 0; k < depth; k++) {
        reg low = *(const reg *)(b + k * b_stride), high = *(const reg *)(b + k * b_stride + REGISTER);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            float factor = a[row * a_stride + k];
            own[row][0] += factor * low;
            own[row][1] += factor * high;
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < 2; i++) *(reg *)(sums + row * sums_stride + i * REGISTER) = own[row][i];
}

INLINE void prefill_floats(const Shape *shape, const Span *span, int64_t token, int64_t num_tokens, int64_t head,
                           const int64_t size, int is_bf16) {
    const int64_t group = shape->heads / shape->key_heads, width = filled(size), stride = shape->key_heads * size;
    const int64_t rows = num_tokens * group, position = span->num_before + token, last = position + num_tokens;
    const int64_t room = rows + ROWS - 1; // products are of whole ROWS
    const int64_t from = shape->window > 0 && position - shape->window + 1 > 0 ? position - shape->window + 1 : 0;
    float query[room * width], sum[room * width], scores[room][TILE], turned[width * TILE], most[rows];
    reg total[rows];
    float some_keys[TILE * width], some_values[TILE * width];

    memset(query + rows * width, 0, (room - rows) * width * sizeof *query);
    memset(sum, 0, sizeof sum);
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((span->first + token + row / group) * shape->heads + head * group + row % group) * size;
        copy_head(shape->query, at, size, shape->scale, query + row * width, is_bf16);
        most[row] = -INFINITY;
        total[row] = (reg){0};
    }
    for (int64_t begin = from / TILE * TILE; begin < last; begin += TILE) {
        const int64_t count = last - begin < TILE ? last - begin : TILE, before = from > begin ? from - begin : 0;
        const int64_t at = (span->start + begin) * stride + head * size;
        int64_t apart;
        const float *keys = tile_of(shape->keys, at, stride, TILE, before, count, size, some_keys, &apart, is_bf16);
        const float *values = tile_of(shape->values, at, stride, TILE, before, count, size, some_values, &apart, is_bf16);
        for (int64_t t = 0; t < TILE; t += REGISTER)
            for (int64_t i = 0; i < width; i += REGISTER)
                turn(keys + t * apart + i, apart, turned + i * TILE + t, TILE);
        // The first rows may all be of tokens before this tile.
        const int64_t first_row = begin > position ? (begin - position) * group : 0;
        for (int64_t row = first_row; row < rows; row += ROWS)
            for (int64_t t = 0; t < TILE; t += 2 * REGISTER)
                multiply(query + row * width, width, turned + t, TILE, size, scores[row] + t, TILE, 0);
        for (int64_t row = first_row; row < rows; row++) {
            const int64_t own = position + row / group; // the token's place in its sequence
            const int64_t low = shape->window > 0 && own - shape->window + 1 > begin ? own - shape->window + 1 - begin : 0;
            const int64_t high = own + 1 - begin < TILE ? own + 1 - begin : TILE;
            if (low >= high) {
                memset(scores[row], 0, sizeof scores[row]);
                continue;
            }
            for (int64_t t = 0; t < low; t++) scores[row][t] = -INFINITY;
            for (int64_t t = high; t < TILE; t++) scores[row][t] = -INFINITY;
            const float keep = weigh(scores[row], TILE, most + row, total + row);
            if (keep != 1.0f)
                for (int64_t i = 0; i < width; i += REGISTER) *(reg *)(sum + row * width + i) *= keep;
        }
        for (int64_t row = first_row; row < rows; row += ROWS)
            for (int64_t i = 0; i < width; i += 2 * REGISTER)
                multiply(scores[row], TILE, values + i, apart, count, sum + row * width + i, width, 1);
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = ((span->first + token + row / group) * shape->heads + head * group + row % group) * size;
        put_head(sum + row * width, total_of(total[row]), size, shape->out, at, is_bf16);
    }
}

#ifdef __AVX512BF16__
// Weights of one row in a tile from its scores: bfloat16, those of unseen places 0. Gives what its sums so far are to be
// multiplied with.
INLINE float weigh_pairs(const float *scores, __mmask32 seen, float scale, float *most, float *total, int32_t *weights) {
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
            for (int half = 0; half < TILE; half += 16) turn(key + half * apart + i * 32, apart / 2, turned[16 * i] + half, TILE);
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
            if (seen) keep[row] = weigh_pairs(scores[row], seen, shape->scale, most + row, total + row, weights[row]);
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
                        int is_bf16) {
#ifdef __AVX512BF16__
    if (is_bf16 && shape->size % 32 == 0) {
        if (shape->size == 64) prefill_pairs(shape, span, token, count, head, 64);
        else if (shape->size == 128) prefill_pairs(shape, span, token, count, head, 128);
        else if (shape->size == 256) prefill_pairs(shape, span, token, count, head, 256);
        else prefill_pairs(shape, span, token, count, head, shape->size);
        return;
    }
#endif
    if (shape->size == 64) prefill_floats(shape, span, token, count, head, 64, is_bf16);
    else if (shape->size == 128) prefill_floats(shape, span, token, count, head, 128, is_bf16);
    else prefill_floats(shape, span, token, count, head, shape->size, is_bf16);
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
        prefill_any(&shape, span, token, count, head, is_bf16);
    }
    return 0;
}
