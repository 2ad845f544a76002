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

#define TILE 32      // places of a tile of single tokens in pairs of bfloat16, ALIKE_TOKENS of attention.py
#define FEW 16       // and in float32
#define FEW_BYTES 12288 // of its keys, and of its values: both stay in a first-level cache of 32 KiB
#define MOST_SIZE 512 // of a head; this and the next as in attention.py
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

// A row's scores of FEW places, -INFINITY where it does not look, become weights, which are added to its totals, one for
// each number of a register. Gives what its sums so far are to be multiplied with. What is no number comes back in the
// weights.
INLINE float weigh(float *scores, float *most, reg *total) {
    reg parts[FEW / REGISTER], high = (reg){0} - INFINITY, added = {0};
    memcpy(parts, scores, sizeof parts);
    for (int i = 0; i < FEW / REGISTER; i++) high = larger(parts[i], high);
    const float before = *most, highest = largest(high);
    float keep = 1.0f;
    if (highest > before) {
        keep = before == -INFINITY ? 0.0f : exp_negative(before - highest);
        *most = highest;
    }
    for (int i = 0; i < FEW / REGISTER; i++) {
        int_reg seen = parts[i] != (reg){0} - INFINITY; // e^-87 is not nothing
        parts[i] = choose(seen, exp_register(parts[i] - *most), (reg){0});
        added += parts[i];
    }
    memcpy(scores, parts, sizeof parts);
    *total = *total * keep + added;
    return keep;
}

// How many numbers of a head of `size` a lane from `i` on has.
INLINE int64_t in_lane(int64_t size, int64_t i) { return size - i >= LANES ? LANES : size > i ? size - i : 0; }

// The width that a head is filled up to with zeros: whole registers, two at a time.
INLINE int64_t filled(int64_t size) { return rounded_up(size, 2 * LANES); }

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
            keep[g] = weigh(scores[g], most + head + g, total + head + g);
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
INLINE void put_pairs(const float *sum, int64_t halves, float total, uint16_t *out) {
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    for (int64_t i = 0; i < halves; i++)
        for (int half = 0; half < 2; half++) {
            __m512i which = _mm512_add_epi32(order, _mm512_set1_epi32(8 * half));
            __m512 low = _mm512_loadu_ps(sum + 32 * i), high = _mm512_loadu_ps(sum + 32 * i + 16);
            __m512 own = _mm512_permutex2var_ps(low, which, high) / total;
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
    for (int64_t head = 0; head < heads; head++) {
        uint16_t *out = (uint16_t *)shape->out + query_at + head * size;
        put_pairs((const float *)(sum + head * 2 * halves), halves, total[head], out);
    }
}
#endif

#include "attention_amx.h"
#include "attention_prompts.h"

INLINE void attend_row(const Shape *shape, int64_t row, const Context *context, int64_t key_head, int64_t num_key_heads,
                       const int64_t size, int is_bf16) {
#if HAS_AMX
    if (is_bf16 && size % 32 == 0 && shape->heads / shape->key_heads <= AMX_LANES && amx_is_allowed()) {
        attend_matrices(shape, row, context, key_head, num_key_heads, size);
        return;
    }
#endif
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
