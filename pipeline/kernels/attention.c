// Attention of one new token of each of several sequences to the whole of its own context.
//
// query, out   [rows, heads, size]; heads that share a key head are neighbours
// keys, values [places, key_heads, size]; a sequence has `lengths[row]` places from `starts[row]` on
// window       most places that are looked back at; 0 for all
//
// Each task is one key head of one row: its context is read once for all heads that share it, in tiles that stay in
// the first cache, with the running maximum of online softmax (Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax"). Sums are float32 whatever the type of the numbers; rows never see each other.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 32       // places
#define MOST_SIZE 512 // of a head
#define MOST_GROUP 64 // heads that share a key head

// e^x for x <= 0, within 2e-7 of it: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // rounds to the nearest whole number
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (4.1666668e-2f + r * (8.3333840e-3f + r * 1.3888940e-3f)))));
    union { int32_t bits; float value; } scale = {((int32_t)n + 127) << 23};
    return p * scale.value;
}

static inline float from_bf16(uint16_t x) {
    union { uint32_t bits; float value; } wide = {(uint32_t)x << 16};
    return wide.value;
}

static inline uint16_t to_bf16(float x) { // to the nearest, ties to even; NaN stays NaN
    union { float value; uint32_t bits; } wide = {x};
    if (x != x) return 0x7fc0;
    return (uint16_t)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);
}

static inline float from_float(float x) { return x; }
static inline float to_float(float x) { return x; }

#define ATTEND(NAME, NUMBER, FROM, TO)                                                                                  \
    static void NAME##_task(const NUMBER *query, const NUMBER *keys, const NUMBER *values, int64_t first, int64_t last,   \
                            int64_t group, int64_t size, int64_t stride, float scale, NUMBER *out) {                     \
        float q[group * size], sum[group * size], tile[TILE * size], scores[group * TILE], most[group], total[group];    \
        for (int64_t i = 0; i < group * size; i++) {                                                                      \
            q[i] = FROM(query[i]) * scale;                                                                                \
            sum[i] = 0.0f;                                                                                                \
        }                                                                                                                 \
        for (int64_t g = 0; g < group; g++) {                                                                             \
            most[g] = -INFINITY;                                                                                          \
            total[g] = 0.0f;                                                                                              \
        }                                                                                                                 \
        for (int64_t begin = first; begin < last; begin += TILE) {                                                        \
            int64_t count = last - begin < TILE ? last - begin : TILE;                                                    \
            for (int64_t t = 0; t < count; t++) {                                                                         \
                const NUMBER *key = keys + (begin + t) * stride;                                                          \
                for (int64_t i = 0; i < size; i++) tile[t * size + i] = FROM(key[i]);                                     \
            }                                                                                                             \
            for (int64_t g = 0; g < group; g++) {                                                                         \
                float highest = most[g];                                                                                  \
                for (int64_t t = 0; t < count; t++) {                                                                     \
                    float dot = 0.0f;                                                                                     \
                    _Pragma("omp simd reduction(+ : dot)")                                                               \
                    for (int64_t i = 0; i < size; i++) dot += q[g * size + i] * tile[t * size + i];                       \
                    scores[g * TILE + t] = dot;                                                                           \
                    highest = dot > highest || dot != dot ? dot : highest;                                                \
                }                                                                                                         \
                float keep = most[g] == -INFINITY ? 0.0f : exp_negative(most[g] - highest);                               \
                most[g] = highest;                                                                                        \
                float weights = 0.0f;                                                                                     \
                _Pragma("omp simd reduction(+ : weights)")                                                               \
                for (int64_t t = 0; t < count; t++) {                                                                     \
                    float weight = exp_negative(scores[g * TILE + t] - highest);                                          \
                    scores[g * TILE + t] = weight;                                                                        \
                    weights += weight;                                                                                    \
                }                                                                                                         \
                total[g] = total[g] * keep + weights;                                                                     \
                for (int64_t i = 0; i < size; i++) sum[g * size + i] *= keep;                                             \
            }                                                                                                             \
            for (int64_t t = 0; t < count; t++) {                                                                         \
                const NUMBER *value = values + (begin + t) * stride;                                                      \
                for (int64_t i = 0; i < size; i++) tile[t * size + i] = FROM(value[i]);                                   \
            }                                                                                                             \
            for (int64_t g = 0; g < group; g++)                                                                           \
                for (int64_t t = 0; t < count; t++) {                                                                     \
                    float weight = scores[g * TILE + t];                                                                  \
                    for (int64_t i = 0; i < size; i++) sum[g * size + i] += weight * tile[t * size + i];                  \
                }                                                                                                         \
        }                                                                                                                 \
        for (int64_t g = 0; g < group; g++)                                                                               \
            for (int64_t i = 0; i < size; i++) out[g * size + i] = TO(sum[g * size + i] / total[g]);                      \
    }                                                                                                                     \
                                                                                                                          \
    int NAME(const NUMBER *query, const NUMBER *keys, const NUMBER *values, const int64_t *starts,                        \
             const int64_t *lengths, int64_t rows, int64_t heads, int64_t key_heads, int64_t size, float scale,           \
             int64_t window, NUMBER *out, int64_t threads) {                                                              \
        int64_t group = heads / key_heads, stride = key_heads * size;                                                     \
        if (size > MOST_SIZE || group > MOST_GROUP) return 1;                                                             \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                               \
        for (int64_t task = 0; task < rows * key_heads; task++) {                                                         \
            int64_t row = task / key_heads, head = task % key_heads;                                                      \
            int64_t last = starts[row] + lengths[row], first = starts[row];                                               \
            if (window > 0 && lengths[row] > window) first = last - window;                                               \
            int64_t offset = (row * heads + head * group) * size;                                                         \
            NAME##_task(query + offset, keys + head * size, values + head * size, first, last, group, size, stride,       \
                        scale, out + offset);                                                                             \
        }                                                                                                                 \
        return 0;                                                                                                         \
    }

ATTEND(attend_float32, float, from_float, to_float)
ATTEND(attend_bfloat16, uint16_t, from_bf16, to_bf16)
