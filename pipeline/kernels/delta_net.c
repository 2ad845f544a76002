// The gated delta rule of several sequences, from the projected inputs of a layer to what its last projection takes:
// convolution, gates, norms of queries and keys, the rule itself, and the gated norm of what it gives.
//
// q, k        of a key head, `key_size` numbers; v, z of each of the `group` value heads that share it, `value_size`;
//             b, a of each value head, one number. An input says where a token's first group is, and how far the next
//             token and the next group are: projections lay them out in different ways.
// windows     [slots, taps - 1, channels]: the latest inputs of the convolution, the oldest first; channels are the
//             queries of all heads, then the keys, then the values
// states      [slots, value heads, key_size, value_size]
// spans       [spans, 4]: slot, first token, number of tokens, whether the sequence begins here
// out         [tokens, value heads, value_size]
//
// Per token of a value head (Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks", eq. 10), with the state S:
//   y = S^T k,  delta = beta (v - decay y),  out = decay S^T q + (q . k) delta,  S = decay S + k delta^T
// so that S is read for both products at once, and then updated, in blocks of columns that stay in the first cache.
// A task is one key head of one sequence: nothing that it computes depends on other tasks, on how a sequence's tokens
// are spread over calls, or on the number of threads. All is float32.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define VECS 4    // of columns in a block: with two sums each they fill the registers
#define TOKENS 16 // that a task prepares at once
#define NORM_EPS 1e-6f

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t int_vec __attribute__((vector_size(4 * LANES)));

struct input {
    const float *data;
    int64_t token_stride, group_stride;
};

struct layer {
    int64_t key_heads, group, key_size, value_size, taps;
    const float *taps_by_channel; // [taps, channels], the oldest first
    const float *rate, *bias;     // [value heads]: decay is exp(-rate softplus(a + bias))
    const float *norm;            // [value_size]
    float norm_eps;
    float *windows, *states;
};

// Fixed sizes in a branch of their own: copies of a variable size become slow string instructions.
INLINE vec load(const float *x, int64_t count) {
    vec wide = {0};
    if (count == LANES) memcpy(&wide, x, sizeof wide);
    else memcpy(&wide, x, (size_t)count * sizeof *x);
    return wide;
}

INLINE void store(float *x, vec wide, int64_t count) {
    if (count == LANES) memcpy(x, &wide, sizeof wide);
    else memcpy(x, &wide, (size_t)count * sizeof *x);
}

INLINE void copy(float *to, const float *from, int64_t count) { memcpy(to, from, (size_t)count * sizeof *to); }

// Of one token's one key head.
INLINE const float *numbers(const struct input *input, int64_t token, int64_t head) {
    return input->data + token * input->token_stride + head * input->group_stride;
}

INLINE int64_t in_vec(int64_t size, int64_t first) { return size - first < LANES ? size - first : LANES; }

INLINE float add_up(vec x) {
    float part[LANES];
    memcpy(part, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE vec choose(int_vec mask, vec yes, vec no) { return (vec)(((int_vec)yes & mask) | ((int_vec)no & ~mask)); }

// Within 2e-7 of e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; beyond +-87 it stays what it is there.
INLINE vec exponential(vec x) {
    vec most = (vec){0} + 87.0f, least = -most;
    x = choose(x > most, most, x);
    x = choose(x < least, least, x);
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // rounds to the nearest whole number
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 8.3333840e-3f + r * 1.3888940e-3f;
    p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (4.1666668e-2f + r * p))));
    return p * (vec)((__builtin_convertvector(n, int_vec) + 127) << 23);
}

INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Inputs of `tokens` tokens behind the window; the convolution of each; the window moves on.
static void convolve(float *rows, float *out, int64_t tokens, int64_t taps, int64_t width, const float *weights,
                     int64_t channels) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t count = in_vec(width, c);
            vec sum = {0};
            for (int64_t tap = 0; tap < taps; tap++)
                sum += load(rows + (t + tap) * width + c, count) * load(weights + tap * channels + c, count);
            store(out + t * width + c, silu(sum), count);
        }
    memmove(rows, rows + tokens * width, (size_t)((taps - 1) * width) * sizeof *rows);
}

static void normalize(float *x, int64_t size, float factor) {
    vec squares = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        vec part = load(x + i, in_vec(size, i));
        squares += part * part;
    }
    float by = factor / sqrtf(add_up(squares) + NORM_EPS);
    for (int64_t i = 0; i < size; i += LANES) store(x + i, load(x + i, in_vec(size, i)) * by, in_vec(size, i));
}

static float dot(const float *x, const float *y, int64_t size) {
    vec sum = {0};
    for (int64_t i = 0; i < size; i += LANES) sum += load(x + i, in_vec(size, i)) * load(y + i, in_vec(size, i));
    return add_up(sum);
}

// What a token brings to the rule, for one value head.
struct token {
    const float *q, *k, *v;
    float *out;
    float qk, beta, decay;
};

// The rule over `vecs` columns of a state, the last of them `last` numbers wide.
INLINE void columns(float *state, int64_t stride, int64_t key_size, const int vecs, const int64_t last,
                    const struct token *tokens, int64_t num_tokens, int64_t first) {
    for (int64_t t = 0; t < num_tokens; t++) {
        const struct token *token = tokens + t;
        const float *k = token->k, *q = token->q, decay = token->decay;
        vec by_key[VECS] = {0}, by_query[VECS] = {0};
        for (int64_t i = 0; i < key_size; i++)
            for (int u = 0; u < vecs; u++) {
                vec s = load(state + i * stride + u * LANES, u + 1 < vecs ? LANES : last);
                by_key[u] += s * k[i];
                by_query[u] += s * q[i];
            }
        for (int u = 0; u < vecs; u++) {
            int64_t count = u + 1 < vecs ? LANES : last;
            vec delta = (load(token->v + first + u * LANES, count) - by_key[u] * decay) * token->beta;
            store(token->out + first + u * LANES, by_query[u] * decay + delta * token->qk, count);
            by_key[u] = delta;
        }
        for (int64_t i = 0; i < key_size; i++)
            for (int u = 0; u < vecs; u++) {
                int64_t count = u + 1 < vecs ? LANES : last;
                float *place = state + i * stride + u * LANES;
                store(place, load(place, count) * decay + by_key[u] * k[i], count);
            }
    }
}

static void rule(float *state, int64_t key_size, int64_t value_size, const struct token *tokens, int64_t num_tokens,
                 float *block) {
    const int64_t whole = VECS * LANES;
    int64_t first = 0;
    for (; first + whole <= value_size; first += whole) {
        if (num_tokens == 1) {
            columns(state + first, value_size, key_size, VECS, LANES, tokens, num_tokens, first);
            continue;
        }
        // Rows a power of two apart share few sets of the first cache: several tokens are worth a copy.
        for (int64_t i = 0; i < key_size; i++)
            copy(block + i * whole, state + i * value_size + first, whole);
        columns(block, whole, key_size, VECS, LANES, tokens, num_tokens, first);
        for (int64_t i = 0; i < key_size; i++)
            copy(state + i * value_size + first, block + i * whole, whole);
    }
    for (; first + LANES <= value_size; first += LANES)
        columns(state + first, value_size, key_size, 1, LANES, tokens, num_tokens, first);
    if (first < value_size)
        columns(state + first, value_size, key_size, 1, value_size - first, tokens, num_tokens, first);
}

// x / rms(x) * weight * silu(gate), in place
static void gated_norm(float *x, const float *gate, const float *weight, int64_t size, float eps) {
    float by = 1.0f / sqrtf(dot(x, x, size) / (float)size + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        int64_t count = in_vec(size, i);
        vec normed = load(x + i, count) * by * load(weight + i, count);
        store(x + i, normed * silu(load(gate + i, count)), count);
    }
}

// The numbers of a key head in a window: where they begin among the channels, and how many.
struct piece {
    int64_t channel, size;
};

static void task(const struct layer *layer, const struct input *inputs, const int64_t *span, int64_t head, float *out,
                 float *scratch) {
    const int64_t group = layer->group, key_size = layer->key_size, value_size = layer->value_size;
    const int64_t keys = layer->key_heads * key_size, values = layer->key_heads * group * value_size;
    const int64_t channels = 2 * keys + values, history = layer->taps - 1;
    const int64_t width = 2 * key_size + group * value_size;
    const struct piece pieces[3] = {
        {head * key_size, key_size},
        {keys + head * key_size, key_size},
        {2 * keys + head * group * value_size, group * value_size},
    };
    float *rows = scratch, *mixed = rows + (history + TOKENS) * width; // [history + tokens, width], [tokens, width]
    float *weights = mixed + TOKENS * width;                           // [taps, width]
    float *block = weights + layer->taps * width;                      // [key_size, columns of a block]
    float *window = layer->windows + span[0] * history * channels;
    float *state = layer->states + (span[0] * layer->key_heads + head) * group * key_size * value_size;
    for (int64_t i = 0, at = 0; i < 3; at += pieces[i++].size) {
        for (int64_t tap = 0; tap < layer->taps; tap++)
            copy(weights + tap * width + at, layer->taps_by_channel + tap * channels + pieces[i].channel,
                 pieces[i].size);
        for (int64_t row = 0; row < history; row++)
            if (span[3]) memset(rows + row * width + at, 0, (size_t)pieces[i].size * sizeof *rows);
            else copy(rows + row * width + at, window + row * channels + pieces[i].channel, pieces[i].size);
    }
    if (span[3]) memset(state, 0, (size_t)(group * key_size * value_size) * sizeof *state);
    for (int64_t begin = 0; begin < span[2]; begin += TOKENS) {
        int64_t num_tokens = span[2] - begin < TOKENS ? span[2] - begin : TOKENS, first = span[1] + begin;
        for (int64_t t = 0; t < num_tokens; t++)
            for (int64_t i = 0, at = 0; i < 3; at += pieces[i++].size)
                copy(rows + (history + t) * width + at, numbers(inputs + i, first + t, head), pieces[i].size);
        convolve(rows, mixed, num_tokens, layer->taps, width, weights, width);
        for (int64_t t = 0; t < num_tokens; t++) {
            normalize(mixed + t * width, key_size, 1.0f / sqrtf((float)key_size));
            normalize(mixed + t * width + key_size, key_size, 1.0f);
        }
        for (int64_t member = 0; member < group; member++) {
            int64_t value_head = head * group + member;
            struct token tokens[TOKENS];
            for (int64_t t = 0; t < num_tokens; t++) {
                const float *q = mixed + t * width, *k = q + key_size;
                float b = numbers(inputs + 4, first + t, head)[member];
                float a = numbers(inputs + 5, first + t, head)[member] + layer->bias[value_head];
                tokens[t] = (struct token){
                    .q = q, .k = k, .v = k + key_size + member * value_size,
                    .out = out + ((first + t) * layer->key_heads * group + value_head) * value_size,
                    .qk = dot(q, k, key_size),
                    .beta = 1.0f / (1.0f + expf(-b)),
                    .decay = expf(-layer->rate[value_head] * softplus(a)),
                };
            }
            rule(state + member * key_size * value_size, key_size, value_size, tokens, num_tokens, block);
            for (int64_t t = 0; t < num_tokens; t++) {
                const float *gate = numbers(inputs + 3, first + t, head) + member * value_size;
                gated_norm(tokens[t].out, gate, layer->norm, value_size, layer->norm_eps);
            }
        }
    }
    for (int64_t i = 0, at = 0; i < 3; at += pieces[i++].size)
        for (int64_t row = 0; row < history; row++)
            copy(window + row * channels + pieces[i].channel, rows + row * width + at, pieces[i].size);
}

// `inputs`: q, k, v, z, b, a. 1: there is no memory.
int delta_net(const struct layer *layer, const struct input *inputs, const int64_t *spans, int64_t num_spans,
              float *out, int threads) {
    int64_t width = 2 * layer->key_size + layer->group * layer->value_size;
    int64_t each = (2 * layer->taps - 1 + 2 * TOKENS) * width + layer->key_size * VECS * LANES;
    float *scratch = malloc((size_t)(threads * each) * sizeof *scratch);
    if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        thread = omp_get_thread_num();
#endif
#pragma omp for schedule(dynamic)
        for (int64_t index = num_spans * layer->key_heads - 1; index >= 0; index--) { // long spans are last: they first
            const int64_t *span = spans + 4 * (index / layer->key_heads);
            task(layer, inputs, span, index % layer->key_heads, out, scratch + thread * each);
        }
    }
    free(scratch);
    return 0;
}
