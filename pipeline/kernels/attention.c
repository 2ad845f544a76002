// Attention of one new token of each of several sequences to the whole of its own context.
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

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 32      // places
#define LANES 16     // numbers
#define MOST_VECS 32 // of a head: 512 numbers
#define MOST_GROUP 64 // heads that share a key head

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef float quarter_vec __attribute__((vector_size(LANES)));
typedef uint32_t bits_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t short_vec __attribute__((vector_size(2 * LANES)));

// e^x for x <= 0, within 2e-7 of it: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // rounds to the nearest whole number
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 8.3333840e-3f + r * 1.3888940e-3f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (4.1666668e-2f + r * p))));
    union { int32_t bits; float value; } scale = {((int32_t)n + 127) << 23};
    return p * scale.value;
}

static inline float add_up(vec x) {
    half_vec halves[2];
    memcpy(halves, &x, sizeof x);
    half_vec half = halves[0] + halves[1];
    quarter_vec quarters[2];
    memcpy(quarters, &half, sizeof half);
    quarter_vec quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// `count` numbers (at most LANES), the rest zeros

static inline vec load_float(const float *x, int64_t count) {
    vec wide = {0};
    memcpy(&wide, x, count == LANES ? sizeof wide : count * sizeof *x);
    return wide;
}

static inline void store_float(float *x, vec wide, int64_t count) {
    memcpy(x, &wide, count == LANES ? sizeof wide : count * sizeof *x);
}

static inline vec load_bf16(const uint16_t *x, int64_t count) {
    short_vec narrow = {0};
    memcpy(&narrow, x, count == LANES ? sizeof narrow : count * sizeof *x);
    bits_vec bits = __builtin_convertvector(narrow, bits_vec) << 16;
    return (vec)bits;
}

static inline void store_bf16(uint16_t *x, vec wide, int64_t count) { // to the nearest, ties to even; NaN stays NaN
    bits_vec bits = (bits_vec)wide;
    bits_vec is_nan = (bits_vec)(wide != wide);
    bits = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16 & ~is_nan) | (is_nan & 0x7fc0);
    short_vec narrow = __builtin_convertvector(bits, short_vec);
    memcpy(x, &narrow, count == LANES ? sizeof narrow : count * sizeof *x);
}

#define ATTEND(NAME, NUMBER, LOAD, STORE)                                                                              \
    static inline __attribute__((always_inline)) void NAME##_task(                                                     \
        const NUMBER *query, const NUMBER *keys, const NUMBER *values, int64_t first, int64_t last, int64_t group,      \
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
    }                                                                                                                  \
                                                                                                                       \
    int NAME(const NUMBER *query, const NUMBER *keys, const NUMBER *values, const int64_t *starts,                     \
             const int64_t *lengths, int64_t rows, int64_t heads, int64_t key_heads, int64_t size, float scale,        \
             int64_t window, NUMBER *out, int64_t threads) {                                                           \
        int64_t group = heads / key_heads, stride = key_heads * size;                                                  \
        if (size > MOST_VECS * LANES || group > MOST_GROUP) return 1;                                                  \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                             \
        for (int64_t task = 0; task < rows * key_heads; task++) {                                                      \
            int64_t row = task / key_heads, head = task % key_heads;                                                   \
            int64_t first = starts[row], last = first + lengths[row];                                                  \
            if (window > 0 && lengths[row] > window) first = last - window;                                            \
            const NUMBER *q = query + (row * heads + head * group) * size, *k = keys + head * size;                    \
            const NUMBER *v = values + head * size;                                                                    \
            NUMBER *o = out + (row * heads + head * group) * size;                                                     \
            if (size == 64) NAME##_task(q, k, v, first, last, group, 64, stride, scale, o);                            \
            else if (size == 128) NAME##_task(q, k, v, first, last, group, 128, stride, scale, o);                     \
            else if (size == 256) NAME##_task(q, k, v, first, last, group, 256, stride, scale, o);                     \
            else NAME##_task(q, k, v, first, last, group, size, stride, scale, o);                                     \
        }                                                                                                              \
        return 0;                                                                                                      \
    }

ATTEND(attend_float32, float, load_float, store_float)
ATTEND(attend_bfloat16, uint16_t, load_bf16, store_bf16)
