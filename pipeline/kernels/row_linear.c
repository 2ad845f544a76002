// Products with plain linear layers, weights as torch lays them: y[m, n] = sum over k of x[m, k] * weight[n, k].
//
// Every number of y is summed by the same instructions in the same order: lane i of a vector takes k = i, i + LANES, ...,
// and the lanes are added in a fixed tree. Neither the number of rows, nor a row's place among them, nor the number of
// threads changes a bit, which libraries that choose a kernel by the sizes of the matrices do not promise.
//
// A tile is 4 rows by 3 outputs, whose 12 sums fill the registers of AVX2. Where fewer are left the last one is computed
// again in the others' place, so that there is one code path.

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define ROWS 4
#define OUTPUTS 3
#define TASK_ROWS 64
#define TASK_BYTES (1 << 17) // of weights, which stay in the second cache while rows pass by

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE vec load_float(const float *x) {
    vec wide;
    memcpy(&wide, x, sizeof wide);
    return wide;
}

INLINE vec load_bf16(const uint16_t *x) {
    halves narrow;
    memcpy(&narrow, x, sizeof narrow);
    words bits = __builtin_convertvector(narrow, words) << 16;
    return (vec)bits;
}

INLINE float add_up(vec x) {
    float part[LANES];
    memcpy(part, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define ROW_LINEAR(NAME, NUMBER, LOAD)                                                                                 \
    INLINE void NAME##_tile(const float *const *x, const NUMBER *const *weight, int64_t inputs,                        \
                            float (*y)[OUTPUTS]) {                                                                     \
        vec sums[ROWS][OUTPUTS] = {0};                                                                                 \
        int64_t whole = inputs - inputs % LANES;                                                                       \
        for (int64_t k = 0; k < whole; k += LANES) {                                                                   \
            vec w[OUTPUTS];                                                                                            \
            for (int n = 0; n < OUTPUTS; n++) w[n] = LOAD(weight[n] + k);                                              \
            for (int m = 0; m < ROWS; m++) {                                                                           \
                vec row = load_float(x[m] + k);                                                                        \
                for (int n = 0; n < OUTPUTS; n++) sums[m][n] += row * w[n];                                            \
            }                                                                                                          \
        }                                                                                                              \
        if (whole < inputs) { /* zeros beyond the end */                                                               \
            size_t count = (size_t)(inputs - whole);                                                                   \
            NUMBER ends[OUTPUTS][LANES] = {0};                                                                         \
            for (int n = 0; n < OUTPUTS; n++) memcpy(ends[n], weight[n] + whole, count * sizeof(NUMBER));              \
            for (int m = 0; m < ROWS; m++) {                                                                           \
                float end[LANES] = {0};                                                                                \
                memcpy(end, x[m] + whole, count * sizeof *end);                                                        \
                for (int n = 0; n < OUTPUTS; n++) sums[m][n] += load_float(end) * LOAD(ends[n]);                       \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < ROWS; m++)                                                                                 \
            for (int n = 0; n < OUTPUTS; n++) y[m][n] = add_up(sums[m][n]);                                            \
    }                                                                                                                  \
                                                                                                                       \
    static void NAME##_task(const float *x, const NUMBER *weight, int64_t stride, int64_t inputs, int64_t rows,        \
                            int64_t outputs, float *y, int64_t y_stride) {                                             \
        for (int64_t m = 0; m < rows; m += ROWS)                                                                       \
            for (int64_t n = 0; n < outputs; n += OUTPUTS) {                                                           \
                const float *from[ROWS];                                                                               \
                const NUMBER *by[OUTPUTS];                                                                             \
                float tile[ROWS][OUTPUTS];                                                                             \
                for (int i = 0; i < ROWS; i++) from[i] = x + least(m + i, rows - 1) * inputs;                          \
                for (int i = 0; i < OUTPUTS; i++) by[i] = weight + least(n + i, outputs - 1) * stride;                 \
                NAME##_tile(from, by, inputs, tile);                                                                   \
                for (int i = 0; i < least(ROWS, rows - m); i++)                                                        \
                    for (int j = 0; j < least(OUTPUTS, outputs - n); j++) y[(m + i) * y_stride + n + j] = tile[i][j];  \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    /* x [rows, inputs]; weight [outputs, inputs], its rows `stride` numbers apart; y [rows, outputs] */               \
    void NAME(const float *x, const NUMBER *weight, int64_t stride, int64_t inputs, int64_t rows, int64_t outputs,     \
              float *y, int threads) {                                                                                 \
        int64_t bytes = inputs * (int64_t)sizeof(NUMBER) * OUTPUTS;                                                    \
        int64_t wide = OUTPUTS * (bytes < TASK_BYTES ? TASK_BYTES / bytes : 1);                                        \
        int64_t across = (outputs + wide - 1) / wide, down = (rows + TASK_ROWS - 1) / TASK_ROWS;                       \
        _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                             \
        for (int64_t task = 0; task < across * down; task++) {                                                         \
            int64_t n = task / down * wide, m = task % down * TASK_ROWS;                                               \
            NAME##_task(x + m * inputs, weight + n * stride, stride, inputs, least(TASK_ROWS, rows - m),               \
                        least(wide, outputs - n), y + m * outputs + n, outputs);                                       \
        }                                                                                                              \
    }

ROW_LINEAR(row_linear_float32, float, load_float)
ROW_LINEAR(row_linear_bfloat16, uint16_t, load_bf16)
