// What a transformer does to each token's row between its matrix products, each in one pass over the row.
//
// Numbers are float32 or bfloat16 (`is_bf16`), computed in float32 and rounded once. Rows never see each other.

#include "lanes.h"
#include "rotation.h"

#define LEAST_WORK 16384 // numbers; waking another thread for fewer takes longer than the work
#define ROWS_AHEAD 2     // whose places in the pools are asked for: they lie anywhere
#define PIECE 1024       // numbers that are searched for their largest before the next

INLINE void norm_row(const void *x, int64_t from, const float *weight, float epsilon, int64_t size, void *out, int64_t to,
                     const int is_bf16) {
    vec squares[4] = {{0}};
    for (int64_t at = 0, turn = 0; at < size; at += LANES, turn++) {
        vec part = load_any(x, from + at, size - at < LANES ? size - at : LANES, is_bf16);
        squares[turn % 4] += part * part;
    }
    float mean = add_up((squares[0] + squares[1]) + (squares[2] + squares[3])) / size;
    float factor = 1.0f / sqrtf(mean + epsilon);
    for (int64_t at = 0; at < size; at += LANES) {
        int64_t count = size - at < LANES ? size - at : LANES;
        vec part = load_any(x, from + at, count, is_bf16) * factor * load_float(weight + at, count);
        store_any(out, to + at, part, count, is_bf16);
    }
}

// RMS norm (Zhang and Sennrich 2019): x [rows, size] over the root of its mean square, times weight float32 [size].
void norm(const void *x, const float *weight, float epsilon, int64_t rows, int64_t size, void *out, int is_bf16,
          int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= LEAST_WORK)
    for (int64_t row = 0; row < rows; row++) {
        if (is_bf16) norm_row(x, row * size, weight, epsilon, size, out, row * size, 1);
        else norm_row(x, row * size, weight, epsilon, size, out, row * size, 0);
    }
}

// silu(gate) * up: both [rows, size] with rows `stride` apart, out [rows, size].
void gated(const void *gate, const void *up, int64_t stride, int64_t rows, int64_t size, void *out, int is_bf16,
           int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= LEAST_WORK)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < size; at += LANES) {
            int64_t count = size - at < LANES ? size - at : LANES;
            vec product = is_bf16 ? load_any(gate, row * stride + at, count, 1) : load_any(gate, row * stride + at, count, 0);
            vec other = is_bf16 ? load_any(up, row * stride + at, count, 1) : load_any(up, row * stride + at, count, 0);
            reg parts[LANES / REGISTER];
            memcpy(parts, &product, sizeof parts);
            silu_registers(parts, LANES / REGISTER);
            memcpy(&product, parts, sizeof parts);
            product *= other;
            if (is_bf16) store_any(out, row * size + at, product, count, 1);
            else store_any(out, row * size + at, product, count, 0);
        }
}

// A head as numbers in float32, normalized where there is a weight for that, and rotated.
INLINE void turn_head(const void *x, int64_t at, const float *weight, float epsilon, const void *cosine, const void *sine,
                      int64_t angle, int64_t rotated, int64_t size, float *head, const int is_bf16) {
    if (is_bf16)
        for (int64_t i = 0; i < size; i += LANES) {
            int64_t count = size - i < LANES ? size - i : LANES;
            store_float(head + i, load_bf16((const uint16_t *)x + at + i, count), count);
        }
    else memcpy(head, (const float *)x + at, size * sizeof *head);
    if (weight) norm_row(head, 0, weight, epsilon, size, head, 0, 0);
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t count = half - i < LANES ? half - i : LANES;
        vec low = load_float(head + i, count), high = load_float(head + half + i, count);
        vec first = low * load_any(cosine, angle + i, count, is_bf16) - high * load_any(sine, angle + i, count, is_bf16);
        vec second = high * load_any(cosine, angle + half + i, count, is_bf16) +
                     low * load_any(sine, angle + half + i, count, is_bf16);
        store_float(head + i, first, count);
        store_float(head + half + i, second, count);
    }
}

INLINE void put_head(const float *head, int64_t size, void *out, int64_t at, const int is_bf16) {
    for (int64_t i = 0; i < size; i += LANES) {
        int64_t count = size - i < LANES ? size - i : LANES;
        store_any(out, at + i, load_float(head + i, count), count, is_bf16);
    }
}

INLINE void rotate_row(const Rotation *r, int64_t row, const int is_bf16) {
    float head[r->size];
    const int64_t angle = row * r->rotated, width = is_bf16 ? 2 : 4;
    if (row + ROWS_AHEAD < r->rows)
        for (int64_t i = 0; i < r->key_heads * r->size * width; i += 64) {
            const int64_t at = r->places[row + ROWS_AHEAD] * r->key_heads * r->size * width + i;
            __builtin_prefetch((char *)r->keys + at, 1);
            __builtin_prefetch((char *)r->values + at, 1);
        }
    for (int64_t h = 0; h < r->heads; h++) {
        turn_head(r->query, row * r->query_stride + h * r->size, r->query_norm, r->epsilon, r->cosine, r->sine, angle,
                  r->rotated, r->size, head, is_bf16);
        put_head(head, r->size, r->out, (row * r->heads + h) * r->size, is_bf16);
    }
    int64_t place = r->places[row] * r->key_heads * r->size;
    for (int64_t h = 0; h < r->key_heads; h++) {
        turn_head(r->key, row * r->key_stride + h * r->size, r->key_norm, r->epsilon, r->cosine, r->sine, angle,
                  r->rotated, r->size, head, is_bf16);
        put_head(head, r->size, r->keys, place + h * r->size, is_bf16);
    }
    memcpy((char *)r->values + place * width, (const char *)r->value + row * r->value_stride * width,
           r->key_heads * r->size * width);
}

// Rotary positions (Su et al. 2021) in the order of GPT-NeoX, halves apart: queries go to `out`, keys and values to
// their places in the pools.
void rotate(const Rotation *r, int is_bf16, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (r->rows * (r->heads + r->key_heads) * r->size >= LEAST_WORK)
    for (int64_t row = 0; row < r->rows; row++) {
        if (is_bf16) rotate_row(r, row, 1);
        else rotate_row(r, row, 0);
    }
}

// The largest of some numbers; what is no number is larger than all.
INLINE float highest_of(const void *scores, int64_t from, int64_t size, const int is_bf16) {
    reg high = (reg){0} - INFINITY, parts[LANES / REGISTER];
    int_reg is_none = {0};
    for (int64_t at = 0; at < size; at += LANES) {
        int64_t count = size - at < LANES ? size - at : LANES;
        vec part = load_any(scores, from + at, count, is_bf16);
        for (int64_t rest = count; rest < LANES; rest++) part[rest] = -INFINITY;
        memcpy(parts, &part, sizeof parts);
        for (int i = 0; i < LANES / REGISTER; i++) {
            is_none |= parts[i] != parts[i];
            high = choose(parts[i] > high, parts[i], high);
        }
    }
    float most = -INFINITY;
    for (int i = 0; i < REGISTER; i++) {
        if (is_none[i]) return NAN;
        most = high[i] > most ? high[i] : most;
    }
    return most;
}

INLINE int64_t best_of(const void *scores, int64_t from, int64_t size, const int is_bf16) {
    float most = -INFINITY;
    int64_t where = 0;
    for (int64_t at = 0; at < size; at += PIECE) {
        float highest = highest_of(scores, from + at, size - at < PIECE ? size - at : PIECE, is_bf16);
        if (!(highest < INFINITY)) return -1;
        if (highest > most) most = highest, where = at;
    }
    for (int64_t at = where; at < size; at++)
        if (load_any(scores, from + at, 1, is_bf16)[0] == most) return most == -INFINITY ? -1 : at;
    return -1;
}

// The first of the largest numbers of each of the rows [rows, size]; -1 where it is infinite or one is no number.
void best(const void *scores, int64_t rows, int64_t size, int64_t *index, int is_bf16, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= LEAST_WORK)
    for (int64_t row = 0; row < rows; row++)
        index[row] = is_bf16 ? best_of(scores, row * size, size, 1) : best_of(scores, row * size, size, 0);
}
