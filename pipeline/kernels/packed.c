// Products with linear layers whose weights are packed integers: y[m, n] = sum over k of x[m, k] * weight[n, k].
//
// A layer of K inputs and N outputs lies in blocks of 32 outputs, each in one piece:
//     codes   uint32   [N / 32][K * bits / 32][32]   a word holds 32 / bits inputs of one output, the first lowest
//     scales  float16  [N / 32][K / group][32]
// weight[n, k] = (code - 2 ** (bits - 1)) * scale. A block is dequantized by slabs of at most 128 inputs, which stay in
// the first-level cache while all rows pass by; the codes are thus read once, whatever the number of rows. Products of
// a slab are summed in float32 and scaled then, so that weights are never rounded. Every row is summed in the same
// order whatever rows are beside it.
//
// Plain weights lie in the same blocks, without scales: codes of 16 bits are bfloat16, of 32 bits float32. Their last
// block may have fewer outputs than it has room for.
//
// Rows are float32, or bfloat16 where the processor multiplies that, or float32 that is rounded to whole numbers of 8 bits
// for every slab and row; plain weights take float32 only. Compiled by native.py, called by packed.py and plain.py.

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 32
#define SLAB 128
#define AHEAD 1024 // words; the next slab is asked for while this one is dequantized, which gains a third to a half
#define CHUNK 192 // rows that pass by a slab; bounds what lies on the stack
#define LEAST_CHUNK 48 // for fewer rows a slab is not worth its making

#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif
enum { FLOAT32, BFLOAT16, INT8 }; // kinds of rows
// Vectors are as wide as the processor's registers: a compiler takes wider ones apart badly, a hundred times slower.
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / 4)
#define ROWS 6 // rows of two vectors whose sums fit the registers together, of which there are at least 16

#define INLINE static inline __attribute__((always_inline))
typedef float Floats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

// One layer, or a stack of equal ones: that of expert e begins e * outputs * inputs further.
typedef struct {
    const uint32_t *codes;
    const uint16_t *scales;
    int64_t outputs, inputs, bits, group;
} Packed;

typedef union {
    float f;
    uint32_t u;
} Bits;

INLINE int64_t least(int64_t first, int64_t second) { return first < second ? first : second; }

INLINE int64_t num_blocks(const Packed *layer) { return (layer->outputs + BLOCK - 1) / BLOCK; }

// Finite values only, which scales are.
INLINE float from_half(uint16_t half) {
    Bits value = {.u = (uint32_t)(half & 0x7fff) << 13};
    value.f *= 0x1p112f;
    value.u |= (uint32_t)(half & 0x8000) << 16;
    return value.f;
}

INLINE uint16_t to_bf16(float number) {
    Bits value = {.f = number};
    if ((value.u & 0x7fffffff) > 0x7f800000) return 0x7fc0; // not a number
    return (value.u + 0x7fff + ((value.u >> 16) & 1)) >> 16;
}

INLINE Floats choose(Integers condition, float yes, Floats no) {
    return (Floats)((condition & (Integers)((Floats){} + yes)) | (~condition & (Integers)no));
}

// 2 to the power of x * log2(e), the power held within 126; relative error below 1e-6.
INLINE Floats exponential(Floats x) {
    Floats power = x * 1.44269504088896341f;
    power = choose(power > 126.0f, 126.0f, power);
    power = choose(power < -126.0f, -126.0f, power);
    const Floats shift = (Floats){} + 12582912.0f; // adding it rounds to whole numbers
    Floats whole = (power + shift) - shift;
    Floats rest = power - whole;
    Floats sum = 1.5353362e-4f + (Floats){};
    sum = sum * rest + 1.3398874e-3f;
    sum = sum * rest + 9.6184373e-3f;
    sum = sum * rest + 5.5503324e-2f;
    sum = sum * rest + 2.4022648e-1f;
    sum = sum * rest + 6.9314720e-1f;
    sum = sum * rest + 1.0f;
    Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return sum * (Floats)exponent;
}

// `scale` NULL: as it is.
INLINE void add_scaled(float *sums, Floats part, const float *scale) {
    if (scale) part *= *(const Floats *)scale;
    *(Floats *)sums += part;
}

// ---- float32 rows ----

// A word of codes with this flipped holds numbers in two's complement.
INLINE uint32_t middles(const int bits) {
    return bits == 8 ? 0x80808080u : bits == 4 ? 0x88888888u : bits == 2 ? 0xaaaaaaaau : 0;
}

// The weights at one place of such words, not yet scaled.
INLINE Floats weights_at(Words code, int place, const int bits) {
    if (bits == 32) return (Floats)code;
    if (bits == 16) return place ? (Floats)(code & 0xffff0000u) : (Floats)(code << 16);
    return __builtin_convertvector((Integers)(code << (32 - bits * (place + 1))) >> (32 - bits), Floats);
}

INLINE void slab_f32(const uint32_t *codes, int words, const int bits, float *slab) {
    const int per_word = 32 / bits;
    for (int word = 0; word < words; word++)
        for (int output = 0; output < BLOCK; output += LANES) {
            Words code = *(const Words *)(codes + word * BLOCK + output) ^ middles(bits);
            __builtin_prefetch(codes + word * BLOCK + output + AHEAD);
            for (int place = 0; place < per_word; place++)
                *(Floats *)(slab + (word * per_word + place) * BLOCK + output) = weights_at(code, place, bits);
        }
}

INLINE void tile_f32(const void *const *rows, const int num_rows, int64_t first, int step, const float *slab,
                     const float *scale, float (*sums)[BLOCK]) {
    for (int output = 0; output < BLOCK; output += 2 * LANES) {
        Floats part[ROWS][2] = {};
        for (int k = 0; k < step; k++) {
            Floats low = *(const Floats *)(slab + k * BLOCK + output);
            Floats high = *(const Floats *)(slab + k * BLOCK + output + LANES);
            for (int row = 0; row < num_rows; row++) {
                float x = ((const float *)rows[row])[first + k];
                part[row][0] += x * low;
                part[row][1] += x * high;
            }
        }
        for (int row = 0; row < num_rows; row++)
            for (int half = 0; half < 2; half++)
                add_scaled(sums[row] + output + half * LANES, part[row][half], scale ? scale + output + half * LANES : NULL);
    }
}

// The same sums for at most ROWS rows, without a slab: converting hides behind so few products.
INLINE void direct_f32(const void *const *rows, const int num_rows, int64_t first, int words, const int bits,
                       const uint32_t *codes, const float *scale, float (*sums)[BLOCK]) {
    const int per_word = 32 / bits, width = num_rows > 2 || BLOCK / LANES < 4 ? 2 : 4; // vectors side by side
    for (int output = 0; output < BLOCK; output += width * LANES) {
        Floats part[ROWS][4] = {};
        for (int word = 0; word < words; word++) {
#pragma GCC unroll 4
            for (int vector = 0; vector < width; vector++) {
                const uint32_t *from = codes + word * BLOCK + output + vector * LANES;
                Words code = *(const Words *)from ^ middles(bits);
                __builtin_prefetch(from + AHEAD);
                for (int place = 0; place < per_word; place++) {
                    Floats weights = weights_at(code, place, bits);
                    for (int row = 0; row < num_rows; row++)
                        part[row][vector] += ((const float *)rows[row])[first + word * per_word + place] * weights;
                }
            }
        }
        for (int row = 0; row < num_rows; row++)
            for (int vector = 0; vector < width; vector++)
                add_scaled(sums[row] + output + vector * LANES, part[row][vector],
                           scale ? scale + output + vector * LANES : NULL);
    }
}

// ---- bfloat16 rows: two inputs side by side in a word, the first and the middle one of a word of codes first ----

// Puts the inputs of a row into the order in which the slab has them.
static void arrange(const uint16_t *row, int64_t inputs, int bits, uint32_t *pairs) {
    const int per_half = 16 / bits;
    for (int64_t word = 0; word < inputs / (2 * per_half); word++)
        for (int place = 0; place < per_half; place++) {
            const uint16_t *first = row + word * 2 * per_half + place;
            pairs[word * per_half + place] = first[0] | (uint32_t)first[per_half] << 16;
        }
}

#if HAS_BF16
INLINE void slab_bf16(const uint32_t *codes, int words, const int bits, uint32_t *slab) {
    const int per_half = 16 / bits;
    uint16_t entries[32];
    for (int index = 0; index < 32; index++) // the instruction looks at five bits, of which `bits` count
        entries[index] = to_bf16((float)((index & ((1 << bits) - 1)) - (1 << (bits - 1))));
    const __m512i table = _mm512_loadu_si512(entries);
    for (int word = 0; word < words; word++)
        for (int half = 0; half < BLOCK; half += LANES) {
            Words code = *(const Words *)(codes + word * BLOCK + half);
            __builtin_prefetch(codes + word * BLOCK + half + AHEAD);
            uint32_t *to = slab + word * per_half * BLOCK + half;
            if (bits < 8) {
                for (int place = 0; place < per_half; place++)
                    *(Words *)(to + place * BLOCK) =
                        (Words)_mm512_permutexvar_epi16((__m512i)(code >> (bits * place)), table);
            } else { // of 256 values no table: convert, which is exact, and take the upper halves
                code ^= 0x80808080u;
                Floats values[4];
                for (int place = 0; place < 4; place++)
                    values[place] = __builtin_convertvector((Integers)(code << (24 - 8 * place)) >> 24, Floats);
                for (int place = 0; place < 2; place++)
                    *(Words *)(to + place * BLOCK) = (Words)values[place] >> 16 | (Words)values[place + 2];
            }
        }
}

INLINE void tile_bf16(const void *const *rows, const int num_rows, int64_t first, int step, const uint32_t *slab,
                      const float *scale, float (*sums)[BLOCK]) {
    __m512 part[ROWS][2][2] = {}; // two sums each, so that one product need not wait for the last
    for (int pair = 0; pair < step / 2; pair += 2)
        for (int odd = 0; odd < 2; odd++) {
            __m512bh low = (__m512bh)_mm512_loadu_si512(slab + (pair + odd) * BLOCK);
            __m512bh high = (__m512bh)_mm512_loadu_si512(slab + (pair + odd) * BLOCK + 16);
            for (int row = 0; row < num_rows; row++) {
                __m512bh x = (__m512bh)_mm512_set1_epi32(((const int32_t *)rows[row])[first / 2 + pair + odd]);
                part[row][0][odd] = _mm512_dpbf16_ps(part[row][0][odd], x, low);
                part[row][1][odd] = _mm512_dpbf16_ps(part[row][1][odd], x, high);
            }
        }
    for (int row = 0; row < num_rows; row++)
        for (int half = 0; half < 2; half++)
            add_scaled(sums[row] + LANES * half, (Floats)(part[row][half][0] + part[row][half][1]), scale + LANES * half);
}
#endif

// ---- rows of 8-bit whole numbers ----
//
// A row is `inputs` bytes, four to a word as they meet the codes, then for each slab a float32 scale, then for each slab
// the sum of its numbers as int32: with it unsigned codes are products of signed weights.

INLINE int step_of(const Packed *layer) {
    int step = SLAB;
    while (layer->group % step) step /= 2;
    return step;
}

INLINE int64_t quantized_bytes(const Packed *layer) { return layer->inputs + layer->inputs / step_of(layer) * 8; }

// Numbers that are none make the slab's scale none.
static void quantize(const float *row, const Packed *layer, void *to) {
    const int64_t inputs = layer->inputs;
    const int step = step_of(layer), bits = layer->bits, per_word = 32 / bits, sets = 8 / bits;
    int8_t *numbers = to;
    float *scales = (float *)(numbers + inputs);
    int32_t *sums = (int32_t *)(scales + inputs / step);
    for (int64_t slab = 0; slab < inputs / step; slab++) {
        const float *x = row + slab * step;
        float most = 0, none = 0;
        for (int k = 0; k < step; k++) {
            float size = x[k] < 0 ? -x[k] : x[k];
            most = size > most ? size : most;
            none += x[k] * 0.0f;
        }
        const float factor = most > 0 && none == 0 ? 127.0f / most : 0;
        int8_t rounded[SLAB];
        int32_t sum = 0;
        for (int k = 0; k < step; k++) {
            float shifted = x[k] * factor + 12582912.0f; // rounds to whole numbers
            rounded[k] = factor > 0 ? (int)(shifted - 12582912.0f) : 0;
            sum += rounded[k];
        }
        for (int word = 0; word < step / per_word; word++)
            for (int set = 0; set < sets; set++)
                for (int place = 0; place < 4; place++)
                    *numbers++ = rounded[word * per_word + set + sets * place];
        scales[slab] = most / 127.0f + none;
        sums[slab] = sum;
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
#define SIGNED_BYTES 1 // codes of 8 bits are taken as weights: products of unsigned ones do not fit 16 bits in pairs
#else
#define SIGNED_BYTES 0
#endif

// Adds to each lane the products of its four bytes: codes, which are unsigned and below 2 ** bits, and signed numbers.
INLINE Integers dot(Integers sum, Words codes, Words numbers, const int bits) {
#if defined(__AVX512VNNI__)
    (void)bits;
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)numbers);
#elif SIGNED_BYTES
    __m256i left = (__m256i)codes, right = (__m256i)numbers;
    if (bits == 8) { // 128 * 127 * 2 is below 2 ** 15
        __m256i weights = _mm256_xor_si256(left, _mm256_set1_epi8(-128));
        left = _mm256_abs_epi8(weights), right = _mm256_sign_epi8(right, weights);
    }
    __m256i pairs = _mm256_maddubs_epi16(left, right);
    return sum + (Integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    (void)bits;
    for (int place = 0; place < 4; place++)
        sum += (Integers)(codes >> (8 * place) & 255u) * ((Integers)(numbers << (24 - 8 * place)) >> 24);
    return sum;
#endif
}

INLINE void direct_int8(const void *const *rows, const int num_rows, const Packed *layer, int64_t first, int step,
                        const int bits, const uint32_t *codes, const float *scale, float (*sums)[BLOCK]) {
    const int words = step * bits / 32, sets = 8 / bits;
    const int64_t num_slabs = layer->inputs / step, slab = first / step;
    const int32_t half = bits == 8 && SIGNED_BYTES ? 0 : 1 << (bits - 1);
    const uint32_t mask = bits == 8 ? 0xffffffffu : bits == 4 ? 0x0f0f0f0fu : 0x03030303u;
    for (int output = 0; output < BLOCK; output += 2 * LANES) {
        Integers part[ROWS][2] = {};
        for (int word = 0; word < words; word++)
#pragma GCC unroll 2
            for (int vector = 0; vector < 2; vector++) {
                const uint32_t *from = codes + word * BLOCK + output + vector * LANES;
                Words code = *(const Words *)from;
                __builtin_prefetch(from + AHEAD);
                for (int set = 0; set < sets; set++) {
                    Words some = code >> (bits * set) & mask;
                    for (int row = 0; row < num_rows; row++) {
                        Words numbers = (Words){} + ((const uint32_t *)rows[row])[first / 4 + word * sets + set];
                        part[row][vector] = dot(part[row][vector], some, numbers, bits);
                    }
                }
            }
        for (int row = 0; row < num_rows; row++) {
            const float *scales = (const float *)((const char *)rows[row] + layer->inputs);
            const int32_t sum = ((const int32_t *)(scales + num_slabs))[slab];
            for (int vector = 0; vector < 2; vector++) {
                Floats products = __builtin_convertvector(part[row][vector] - half * sum, Floats);
                add_scaled(sums[row] + output + vector * LANES, products * scales[slab],
                           scale + output + vector * LANES);
            }
        }
    }
}

// ---- what all have in common ----

typedef union {
    float f32[SLAB * BLOCK];
    uint32_t bf16[SLAB / 2 * BLOCK];
} __attribute__((aligned(64))) Slab;

INLINE void slab_of(const uint32_t *codes, int words, const int bits, const int kind, Slab *slab) {
#if HAS_BF16
    if (kind == BFLOAT16) {
        slab_bf16(codes, words, bits, slab->bf16);
        return;
    }
#endif
    (void)kind;
    slab_f32(codes, words, bits, slab->f32);
}

INLINE void tile_of(const void *const *rows, const int num_rows, int64_t first, int step, const int kind,
                    const void *slab, const float *scale, float (*sums)[BLOCK]) {
#if HAS_BF16
    if (kind == BFLOAT16) {
        tile_bf16(rows, num_rows, first, step, slab, scale, sums);
        return;
    }
#endif
    (void)kind;
    tile_f32(rows, num_rows, first, step, slab, scale, sums);
}

// sums[r] = the products of rows[r] with one block of outputs; at most CHUNK rows.
INLINE void multiply_(const Packed *layer, int64_t expert, int64_t block, const void *const *rows, int num_rows,
                      float (*sums)[BLOCK], const int bits, const int kind) {
    const int64_t words = layer->inputs * bits / 32, groups = layer->inputs / layer->group;
    const int64_t place = expert * num_blocks(layer) + block;
    const uint32_t *codes = layer->codes + place * words * BLOCK;
    const uint16_t *scales = layer->scales + place * groups * BLOCK;
    const int step = step_of(layer);
    Slab slab;
    memset(sums, 0, num_rows * sizeof *sums);
    for (int64_t first = 0; first < layer->inputs; first += step) {
        const uint32_t *slab_codes = codes + first * bits / 32 * BLOCK;
        const int slab_words = step * bits / 32;
        float scale_of_group[BLOCK], *scale = bits < 16 ? scale_of_group : NULL;
        for (int output = 0; scale && output < BLOCK; output++)
            scale[output] = from_half(scales[first / layer->group * BLOCK + output]);
        if (kind == INT8 || (kind == FLOAT32 && num_rows <= ROWS)) {
            for (int row = 0; row < num_rows; row += ROWS)
                switch (least(ROWS, num_rows - row)) { // numbers known when compiled, so that sums stay in registers
#define DIRECT(count) \
    case count: \
        if (kind == INT8) \
            direct_int8(rows + row, count, layer, first, step, bits, slab_codes, scale, sums + row); \
        else \
            direct_f32(rows + row, count, first, slab_words, bits, slab_codes, scale, sums + row); \
        break
                    DIRECT(1);
                    DIRECT(2);
                    DIRECT(3);
                    DIRECT(4);
                    DIRECT(5);
                    DIRECT(6);
                }
            continue;
        }
        if (bits < 32) slab_of(slab_codes, slab_words, bits, kind, &slab);
        const void *from = bits < 32 ? (const void *)&slab : slab_codes; // there float32 lies as a slab does
        int row = 0;
        for (; row + ROWS <= num_rows; row += ROWS)
            tile_of(rows + row, ROWS, first, step, kind, from, scale, sums + row);
        switch (num_rows - row) {
#define REST(rest) \
    case rest: \
        tile_of(rows + row, rest < ROWS ? rest : 1, first, step, kind, from, scale, sums + row); \
        break
            REST(1);
            REST(2);
            REST(3);
            REST(4);
            REST(5);
        }
    }
}

#define VARIANT(bits, kind) \
    static __attribute__((noinline)) void multiply_##bits##_##kind( \
        const Packed *layer, int64_t expert, int64_t block, const void *const *rows, int num_rows, \
        float (*sums)[BLOCK]) { \
        multiply_(layer, expert, block, rows, num_rows, sums, bits, kind); \
    }
VARIANT(2, FLOAT32)
VARIANT(4, FLOAT32)
VARIANT(8, FLOAT32)
VARIANT(16, FLOAT32)
VARIANT(32, FLOAT32)
VARIANT(2, BFLOAT16)
VARIANT(4, BFLOAT16)
VARIANT(8, BFLOAT16)
VARIANT(2, INT8)
VARIANT(4, INT8)
VARIANT(8, INT8)

typedef void Multiply(const Packed *, int64_t, int64_t, const void *const *, int, float (*)[BLOCK]);

static Multiply *multiply_for(int64_t bits, int kind) {
    static Multiply *const variants[3][5] = {
        {multiply_2_FLOAT32, multiply_4_FLOAT32, multiply_8_FLOAT32, multiply_16_FLOAT32, multiply_32_FLOAT32},
        {multiply_2_BFLOAT16, multiply_4_BFLOAT16, multiply_8_BFLOAT16},
        {multiply_2_INT8, multiply_4_INT8, multiply_8_INT8},
    };
    return variants[kind][bits == 2 ? 0 : bits == 4 ? 1 : bits == 8 ? 2 : bits == 16 ? 3 : 4];
}

INLINE void store(const float *sums, void *out, int64_t at, int64_t count, int bf16) {
    if (!bf16) {
        memcpy((float *)out + at, sums, count * sizeof(float));
        return;
    }
    for (int output = 0; output < count; output++) ((uint16_t *)out)[at + output] = to_bf16(sums[output]);
}

// Whether rows may be bfloat16.
int packed_has_bf16(void) { return HAS_BF16; }

// How many bytes a row of a layer takes in the form in which it is multiplied.
INLINE int64_t row_bytes(const Packed *layer, int kind) {
    return kind == INT8 ? quantized_bytes(layer) : layer->inputs * (kind == BFLOAT16 ? 2 : 4);
}

// Puts a row into that form, but for float32, which is multiplied as it comes.
INLINE void prepare(const void *row, const Packed *layer, int kind, void *to) {
    if (kind == INT8) quantize(row, layer, to);
    else arrange(row, layer->inputs, layer->bits, to);
}

// out[m, N] = x[m, K] times the layer; 0, or 1 where memory ran out. `kind` is that of the rows; x and out are bfloat16
// if it is, else float32.
int packed_linear(const Packed *layer, const void *x, int64_t num_rows, void *out, int kind, int num_threads) {
    const int64_t blocks = num_blocks(layer), value = kind == BFLOAT16 ? 2 : 4, size = row_bytes(layer, kind);
    int64_t chunk = CHUNK;
    while (chunk > LEAST_CHUNK && blocks * ((num_rows + chunk - 1) / chunk) < 4 * num_threads) chunk /= 2;
    const int64_t num_chunks = (num_rows + chunk - 1) / chunk;
    Multiply *multiply = multiply_for(layer->bits, kind);
    char *prepared = kind == FLOAT32 ? NULL : malloc(num_rows * size);
    if (kind != FLOAT32 && !prepared) return 1;
    const char *from = kind == FLOAT32 ? x : prepared;
#pragma omp parallel num_threads(num_threads)
    {
        if (prepared)
#pragma omp for
            for (int64_t row = 0; row < num_rows; row++)
                prepare((const char *)x + row * layer->inputs * value, layer, kind, prepared + row * size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * num_chunks; task++) {
            const int64_t block = task / num_chunks, first = task % num_chunks * chunk;
            const int count = least(chunk, num_rows - first);
            const void *rows[CHUNK];
            float sums[CHUNK][BLOCK];
            for (int row = 0; row < count; row++) rows[row] = from + (first + row) * size;
            multiply(layer, 0, block, rows, count, sums);
            for (int row = 0; row < count; row++)
                store(sums[row], out, (first + row) * layer->outputs + block * BLOCK,
                      least(BLOCK, layer->outputs - block * BLOCK), kind == BFLOAT16);
        }
    }
    free(prepared);
    return 0;
}

// Sorts pairs of token and expert by expert, tokens ascending: starts[e] .. starts[e + 1] are those of expert e.
static void sort(const int64_t *chosen, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t *starts,
                 int64_t *sorted) {
    memset(starts, 0, (num_experts + 1) * sizeof *starts);
    for (int64_t pair = 0; pair < num_tokens * top_k; pair++)
        if (chosen[pair] >= 0 && chosen[pair] < num_experts) starts[chosen[pair] + 1]++;
    for (int64_t expert = 0; expert < num_experts; expert++) starts[expert + 1] += starts[expert];
    for (int64_t pair = 0; pair < num_tokens * top_k; pair++)
        if (chosen[pair] >= 0 && chosen[pair] < num_experts) sorted[starts[chosen[pair]]++] = pair;
    for (int64_t expert = num_experts; expert > 0; expert--) starts[expert] = starts[expert - 1];
    starts[0] = 0;
}

// out[t] = sum over the experts that token t chose of weight * down(silu(gate(x[t])) * up(x[t])), experts ascending.
// `gate_up` has the outputs of gate, then those of up. A chosen expert outside 0 .. num_experts counts for nothing.
// 0, or 1 where memory ran out.
int packed_experts(const Packed *gate_up, const Packed *down, const void *x, int64_t num_tokens, const int64_t *chosen,
                   const float *weights, int64_t top_k, int64_t num_experts, void *out, int kind, int num_threads) {
    const int64_t hidden = gate_up->inputs, width = down->inputs, num_pairs = num_tokens * top_k;
    const int64_t value = kind == BFLOAT16 ? 2 : 4, width_blocks = width / BLOCK;
    const int64_t size = row_bytes(gate_up, kind), inner_size = row_bytes(down, kind);
    int64_t *starts = malloc((num_experts + 1 + num_pairs + num_experts) * sizeof *starts);
    char *inner = malloc(num_pairs * width * value), *prepared = kind == FLOAT32 ? NULL : malloc(num_tokens * size);
    char *inner_prepared = kind == INT8 ? malloc(num_pairs * inner_size) : NULL;
    float *totals = malloc(num_threads * num_tokens * BLOCK * sizeof *totals);
    if (!starts || !inner || !totals || (kind != FLOAT32 && !prepared) || (kind == INT8 && !inner_prepared)) {
        free(starts), free(inner), free(prepared), free(inner_prepared), free(totals);
        return 1;
    }
    int64_t *sorted = starts + num_experts + 1, *hit = sorted + num_pairs, num_hit = 0;
    sort(chosen, num_tokens, top_k, num_experts, starts, sorted);
    for (int64_t expert = 0; expert < num_experts; expert++)
        if (starts[expert + 1] > starts[expert]) hit[num_hit++] = expert;
    Multiply *into = multiply_for(gate_up->bits, kind), *from = multiply_for(down->bits, kind);
    const char *tokens = kind == FLOAT32 ? x : prepared, *inner_rows = kind == INT8 ? inner_prepared : inner;
#pragma omp parallel num_threads(num_threads)
    {
        const void *rows[CHUNK];
        float sums[2][CHUNK][BLOCK];
        if (prepared)
#pragma omp for
            for (int64_t token = 0; token < num_tokens; token++)
                prepare((const char *)x + token * hidden * value, gate_up, kind, prepared + token * size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_hit * width_blocks; task++) {
            const int64_t expert = hit[task / width_blocks], block = task % width_blocks;
            for (int64_t first = starts[expert]; first < starts[expert + 1]; first += CHUNK) {
                const int count = least(CHUNK, starts[expert + 1] - first);
                for (int row = 0; row < count; row++)
                    rows[row] = tokens + sorted[first + row] / top_k * size;
                into(gate_up, expert, block, rows, count, sums[0]);
                into(gate_up, expert, block + width_blocks, rows, count, sums[1]);
                for (int row = 0; row < count; row++) {
                    Floats *gate = (Floats *)sums[0][row], *up = (Floats *)sums[1][row];
                    for (int half = 0; half < BLOCK / LANES; half++)
                        gate[half] = gate[half] / (1.0f + exponential(-gate[half])) * up[half];
                    char *to = inner + ((first + row) * width + block * BLOCK) * value;
                    if (kind == BFLOAT16) {
                        uint16_t rounded[BLOCK];
                        store(sums[0][row], rounded, 0, BLOCK, 1);
                        arrange(rounded, BLOCK, down->bits, (uint32_t *)to);
                    } else {
                        memcpy(to, sums[0][row], sizeof sums[0][row]);
                    }
                }
            }
        }
        if (inner_prepared)
#pragma omp for
            for (int64_t pair = 0; pair < starts[num_experts]; pair++)
                quantize((const float *)inner + pair * width, down, inner_prepared + pair * inner_size);
        float(*total)[BLOCK] = (float(*)[BLOCK])totals + omp_get_thread_num() * num_tokens;
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < hidden / BLOCK; block++) {
            memset(total, 0, num_tokens * sizeof *total);
            for (int64_t place = 0; place < num_hit; place++) {
                const int64_t expert = hit[place];
                for (int64_t first = starts[expert]; first < starts[expert + 1]; first += CHUNK) {
                    const int count = least(CHUNK, starts[expert + 1] - first);
                    for (int row = 0; row < count; row++) rows[row] = inner_rows + (first + row) * inner_size;
                    from(down, expert, block, rows, count, sums[0]);
                    for (int row = 0; row < count; row++) {
                        const int64_t pair = sorted[first + row];
                        for (int output = 0; output < BLOCK; output++)
                            total[pair / top_k][output] += weights[pair] * sums[0][row][output];
                    }
                }
            }
            for (int64_t token = 0; token < num_tokens; token++)
                store(total[token], out, token * hidden + block * BLOCK, BLOCK, kind == BFLOAT16);
        }
    }
    free(starts), free(inner), free(prepared), free(inner_prepared), free(totals);
    return 0;
}

// Copies matrices of a checkpoint into blocks of 32 columns. Matrix i has rows[i] rows and columns[i] columns of
// sizes[i] bytes at from + offsets[i], and goes to the address to[i]; of size 0 is one of 4-byte words that must all be
// the number to[i], and goes nowhere. Gives the first matrix that is not, or -1.
int64_t packed_place(int64_t count, const char *from, const int64_t *offsets, const int64_t *to, const int64_t *rows,
                     const int64_t *columns, const int64_t *sizes) {
    for (int64_t index = 0; index < count; index++) {
        const char *matrix = from + offsets[index];
        const int64_t height = rows[index], width = columns[index];
        if (!sizes[index]) {
            uint32_t differ = 0, word;
            for (int64_t at = 0; at < height * width; at++) {
                memcpy(&word, matrix + 4 * at, 4);
                differ |= word ^ (uint32_t)to[index];
            }
            if (differ) return index;
            continue;
        }
        const int64_t piece = BLOCK * sizes[index];
        for (int64_t block = 0; block < width / BLOCK; block++) {
            char *out = (char *)to[index] + block * height * piece;
            const char *in = matrix + block * piece;
            if (sizes[index] == 4) // a length known when compiled: no call for each row
                for (int64_t row = 0; row < height; row++) memcpy(out + row * 128, in + row * width * 4, 128);
            else
                for (int64_t row = 0; row < height; row++) memcpy(out + row * 64, in + row * width * 2, 64);
        }
    }
    return -1;
}

// Puts a float32 matrix [outputs, inputs] into blocks, as bfloat16 (16 bits, of even inputs) or as it is (32 bits).
// Gives 1 if a weight would lose something as bfloat16; then the blocks are not to be used.
int plain_place(const float *weight, int64_t outputs, int64_t inputs, int bits, uint32_t *blocks, int num_threads) {
    const int64_t words = inputs * bits / 32;
    int loses = 0;
#pragma omp parallel for num_threads(num_threads) reduction(| : loses)
    for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) {
        const uint32_t *rows = (const uint32_t *)weight + block * BLOCK * inputs;
        const int64_t count = least(BLOCK, outputs - block * BLOCK);
        uint32_t *to = blocks + block * words * BLOCK;
        uint32_t lost = 0;
        for (int64_t word = 0; word < words; word++, to += BLOCK)
            for (int64_t output = 0; output < BLOCK; output++) {
                const uint32_t *from = rows + output * inputs + word * (32 / bits);
                if (output >= count) to[output] = 0;
                else if (bits == 32) to[output] = *from;
                else to[output] = from[0] >> 16 | (from[1] & 0xffff0000u), lost |= (from[0] | from[1]) & 0xffff;
            }
        loses |= lost != 0;
    }
    return loses;
}
