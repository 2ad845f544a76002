// Attention of single tokens in the matrix unit of AMX, in bfloat16; part of attention.c.
//
// Up to 16 heads of a row, of whole key heads, are the lanes of a register. Keys are taken as they lie: a tile has 16 places
// of one key head, and is multiplied with a matrix of queries whose other lanes are zeros, so that the products of all key
// heads add up to one register of scores for each place. Softmax is that of attention_prompts.h. Weights are rounded to
// bfloat16 and turned on their side, and values lie in pairs, as everywhere.

#pragma once

#include "attention_prompts.h"

#if HAS_AMX
#define AMX_LANES 16

// Tiles 0 and 1 are scores of 16 places each, 2 keys, 3 queries; 4 the weights of the heads of a key head, 5 and 6 their
// sums, 7 values.
INLINE void amx_begin_single(int64_t group) {
    AmxShape shape = AMX_WHOLE_TILES;
    shape.rows[4] = shape.rows[5] = shape.rows[6] = group;
    amx_configure(&shape);
}

// Queries of some key heads: for each of them and 32 numbers, 16 pairs below each other of each lane.
static void put_queries(const uint16_t *query, int64_t num_key_heads, int64_t group, int64_t size,
                        uint32_t (*lanes)[16][AMX_LANES]) {
    memset(lanes, 0, num_key_heads * (size / 32) * sizeof *lanes);
    for (int64_t head = 0; head < num_key_heads * group; head++)
        for (int64_t i = 0; i < size / 2; i++)
            memcpy(&lanes[head / group * (size / 32) + i / 16][i % 16][head], query + head * size + 2 * i, sizeof(uint32_t));
}

INLINE void attend_matrices(const Shape *shape, int64_t row, const Context *context, int64_t key_head, int64_t num_key_heads,
                            const int64_t size) {
    const int64_t last = context->last, steps = size / AMX_INPUTS, columns = size / 16;
    const int64_t group = shape->heads / shape->key_heads, stride = shape->key_heads * size;
    const int64_t query_at = (row * shape->heads + key_head * group) * size, most_together = AMX_LANES / group;
    const uint16_t *all_keys = (const uint16_t *)shape->keys + key_head * size;
    const uint16_t *all_values = (const uint16_t *)shape->values + key_head * size;
    const int64_t num_sets = (num_key_heads + most_together - 1) / most_together;
    uint32_t queries[num_key_heads * steps][16][AMX_LANES] __attribute__((aligned(64)));
    float sums[num_key_heads * group][size] __attribute__((aligned(64)));
    float scores[TILE][AMX_LANES] __attribute__((aligned(64))), weights[AMX_LANES][16] __attribute__((aligned(64)));
    uint16_t some_keys[TILE * size] __attribute__((aligned(64)));
    uint32_t pairs[TILE / 2][size] __attribute__((aligned(64)));
    reg most[num_sets], total[num_sets];
    const float scale = shape->scale * 1.44269504f; // so that powers are those of two
    for (int64_t set = 0; set < num_sets; set++) {
        const int64_t from = set * most_together, together = least(most_together, num_key_heads - from);
        put_queries((const uint16_t *)shape->query + query_at + from * group * size, together, group, size,
                    queries + from * steps);
        most[set] = (reg){0} - FLT_MAX;
        total[set] = (reg){0};
    }
    memset(sums, 0, sizeof sums);
    amx_begin_single(group);
    for (int64_t begin = context->first; begin < last; begin += TILE) {
        const int64_t at = read_at(context, begin) * stride, count = least(last - begin, TILE);
        const int64_t after = begin + TILE, next = read_at(context, after) * stride;
        const int64_t places = after < last ? least(last - after, TILE) : 0, parts = num_key_heads * (steps + columns);
        int64_t part = 0;
#define FETCH \
    fetch(all_keys + next, all_values + next, places, stride * sizeof *all_keys, num_key_heads * size * sizeof *all_keys, \
          part, parts), part++
        for (int64_t set = 0; set < num_sets; set++) {
            const int64_t from = set * most_together, together = least(most_together, num_key_heads - from);
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t head = from; head < from + together; head++) {
                int64_t apart;
                const uint16_t *keys = all_keys + at + head * size;
                keys = keys_in_pairs(keys, stride, 0, count, size, some_keys, &apart, TILE);
                __asm__ volatile("" : : "r"(keys), "r"(queries) : "memory"); // tiles are loaded from what is written before
                for (int64_t step = 0; step < steps; step++) {
                    FETCH;
                    _tile_loadd(3, queries[head * steps + step], sizeof queries[0][0]);
                    _tile_loadd(2, keys + step * 32, apart * 4);
                    _tile_dpbf16ps(0, 2, 3);
                    _tile_loadd(2, keys + 16 * 2 * apart + step * 32, apart * 4);
                    _tile_dpbf16ps(1, 2, 3);
                }
            }
            _tile_stored(0, scores[0], sizeof scores[0]);
            _tile_stored(1, scores[16], sizeof scores[0]);
            __asm__ volatile("" : : "r"(scores) : "memory");

            reg high = most[set], keep[1], added = {0};
            for (int64_t t = 0; t < count; t++) high = larger(*(const reg *)scores[t] * scale, high);
            keep[0] = most[set] - high;
            exp2_registers(keep, 1);
            for (int64_t t = 0; t < TILE; t += 8) {
                reg powers[8];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) powers[i] = *(const reg *)scores[t + i] * scale - high;
                exp2_registers(powers, 8);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    if (t + i >= count) powers[i] = (reg){0};
                    added += powers[i];
                }
#pragma GCC unroll 4
                for (int i = 0; i < 8; i += 2) *(word_reg *)scores[(t + i) / 2] = in_turn(powers[i], powers[i + 1]);
            }
            most[set] = high;
            total[set] = total[set] * keep[0] + added;
            turn(scores, AMX_LANES, weights, 16);

            for (int64_t head = from; head < from + together; head++) {
                float *own = sums[head * group];
                for (int64_t lane = 0; lane < group; lane++)
                    for (int64_t i = 0; i < size; i += REGISTER)
                        *(reg *)(own + lane * size + i) *= ((const float *)keep)[(head - from) * group + lane];
                values_in_pairs(all_values + at + head * size, stride, 0, count, size, pairs[0], TILE);
                __asm__ volatile("" : : "r"(own), "r"(pairs), "r"(weights) : "memory");
                _tile_loadd(4, weights[(head - from) * group], sizeof weights[0]);
                for (int64_t column = 0; column < size; column += 32) {
                    FETCH;
                    _tile_loadd(5, own + column, size * sizeof *own);
                    _tile_loadd(7, pairs[0] + column, sizeof pairs[0]);
                    _tile_dpbf16ps(5, 4, 7);
                    _tile_stored(5, own + column, size * sizeof *own);
                    FETCH;
                    _tile_loadd(6, own + column + 16, size * sizeof *own);
                    _tile_loadd(7, pairs[0] + column + 16, sizeof pairs[0]);
                    _tile_dpbf16ps(6, 4, 7);
                    _tile_stored(6, own + column + 16, size * sizeof *own);
                }
                __asm__ volatile("" : : "r"(own) : "memory");
            }
        }
#undef FETCH
    }
    _tile_release();
    for (int64_t head = 0; head < num_key_heads * group; head++) {
        const int64_t set = head / (most_together * group), lane = head % (most_together * group);
        put_pairs(sums[head], size / 32, ((const float *)(total + set))[lane], (uint16_t *)shape->out + query_at + head * size);
    }
}
#endif
