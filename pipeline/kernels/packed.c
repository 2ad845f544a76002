// Linear layers and routed experts whose weights lie in blocks (blocks.h): y[m, n] = sum over k of x[m, k] * weight[n, k].
//
// Rows are float32, or bfloat16 where the processor multiplies that, or float32 that is rounded to whole numbers of 8 bits
// for every slab and row. Plain weights take float32, and those of bfloat16 either of the first. Compiled by native.py,
// called by packed.py and plain.py.

#include <omp.h>
#include <stdlib.h>

#include "multiply.h"

#define LEAST_CHUNK 48 // for fewer rows a slab is not worth its making
#define GROUP_BYTES (1 << 19) // of blocks that all chunks pass by before the next: they stay in the second-level cache

// `count` sums of a block, as numbers of the kind of the rows. A whole block is a case of its own, as a lane is in lanes.h.
INLINE void store_sums(const float *sums, void *out, int64_t at, int64_t count, int bf16) {
    const void *from = sums;
    const size_t size = bf16 ? sizeof(uint16_t) : sizeof(float);
    uint16_t rounded[BLOCK];
    if (bf16) {
        for (int i = 0; i < BLOCK; i += LANES) store_bf16(rounded + i, load_float(sums + i, LANES), LANES);
        from = rounded;
    }
    if (count == BLOCK && bf16) memcpy((uint16_t *)out + at, rounded, sizeof rounded);
    else if (count == BLOCK) memcpy((float *)out + at, sums, BLOCK * sizeof *sums);
    else memcpy((char *)out + at * size, from, count * size);
}

// Whether rows may be bfloat16; 2 if a matrix unit takes them.
int packed_has_bf16(void) {
#if HAS_AMX
    if (amx_is_allowed()) return 2;
#endif
    return HAS_BF16;
}

// The kind that rows are multiplied as.
INLINE int form_of(const Packed *layer, int kind) { return kind == BFLOAT16 && amx_serves(layer) ? AMX : kind; }

// How many bytes a row of a layer takes as such, and for how many there has to be room.
INLINE int64_t row_bytes(const Packed *layer, int form) {
    return form == INT8 ? quantized_bytes(layer) : layer->inputs * (form == FLOAT32 ? 4 : 2);
}

// Of the first cache line on: what is read in whole lines should not lie across two.
static void *room(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

// Puts a row among those that are multiplied; rows of float32, or for plain weights, are multiplied as they come.
INLINE void prepare(const void *row, const Packed *layer, int form, void *prepared, int64_t place) {
    if (form == INT8) quantize(row, layer, (char *)prepared + place * row_bytes(layer, form));
    else arrange(row, layer->inputs, layer->bits, (uint32_t *)((char *)prepared + place * row_bytes(layer, form)));
}

// Tasks of a thread. They follow each other, and so do their weights: the longer a piece of memory, the faster it is read.
// Who is through takes from the others, for none is to have much left to do then.
typedef struct {
    int64_t next, end;
} __attribute__((aligned(64))) Queue; // no two in one cache line

INLINE void deal(Queue *queues, int num_threads, int64_t num_tasks) {
    for (int thread = 0; thread < num_threads; thread++)
        queues[thread] = (Queue){num_tasks * thread / num_threads, num_tasks * (thread + 1) / num_threads};
}

// A task for one of the threads, -1 where none is left.
INLINE int64_t take(Queue *queues, int num_threads, int thread) {
    for (int other = 0; other < num_threads; other++) {
        Queue *queue = queues + (thread + other) % num_threads;
        if (__atomic_load_n(&queue->next, __ATOMIC_RELAXED) >= queue->end) continue;
        const int64_t task = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (task < queue->end) return task;
    }
    return -1;
}

// silu(gate) * up, in place of gate.
INLINE void gate_block(float *gates, const float *ups) {
    reg *gate = (reg *)gates;
    const reg *up = (const reg *)ups;
    silu_registers(gate, BLOCK / REGISTER);
    for (int part = 0; part < BLOCK / REGISTER; part++) gate[part] *= up[part];
}

// `count` numbers of a block of the residual are added to its sums.
INLINE void add_block(float *sums, const void *residual, int64_t at, int64_t count, int bf16) {
    for (int i = 0; i < BLOCK; i += LANES) {
        const int64_t in_lane = least(LANES, count - i);
        if (in_lane > 0) store_float(sums + i, load_float(sums + i, LANES) + load_any(residual, at + i, in_lane, bf16), LANES);
    }
}

// Rows times a layer, and what becomes of the sums before they are rounded. With `up`, a layer of the same form, its sums
// are multiplied with silu of the first.
INLINE int multiply_rows(const Packed *layer, const Packed *up, const void *x, int64_t num_rows, const void *residual,
                         void *out, int kind, int num_threads, const int has_up) {
    const int form = form_of(layer, kind);
    const int64_t blocks = num_blocks(layer), value = kind == BFLOAT16 ? 2 : 4, size = row_bytes(layer, form);
    int64_t chunk = CHUNK;
    while (chunk > LEAST_CHUNK && blocks * ((num_rows + chunk - 1) / chunk) < 4 * num_threads) chunk /= 2;
    const int64_t num_chunks = (num_rows + chunk - 1) / chunk, num_tasks = blocks * num_chunks;
    const int64_t most_in_group = GROUP_BYTES / (BLOCK * layer->inputs * layer->bits / 8) + 1;
    Multiply *multiply_block = multiply_for(layer, form);
    const int as_they_come = form == FLOAT32 || (kind == BFLOAT16 && !layer->scales);
    char *prepared = as_they_come ? NULL : room(num_rows * size);
    if (!as_they_come && !prepared) return 1;
    const char *from = as_they_come ? x : prepared;
    Queue queues[num_threads];
    deal(queues, num_threads, num_tasks);
#pragma omp parallel num_threads(num_threads)
    {
        if (prepared)
#pragma omp for
            for (int64_t row = 0; row < num_rows; row++)
                prepare((const char *)x + row * layer->inputs * value, layer, form, prepared, row);
        for (int64_t task; (task = take(queues, num_threads, omp_get_thread_num())) >= 0;) {
            const int64_t group = task / (most_in_group * num_chunks) * most_in_group, place = task - group * num_chunks;
            const int64_t in_group = least(most_in_group, blocks - group);
            const int64_t block = group + place % in_group, first = place / in_group * chunk;
            const int64_t whole = least(BLOCK, layer->outputs - block * BLOCK);
            const int count = least(chunk, num_rows - first);
            const void *rows[CHUNK];
            float sums[1 + has_up][CHUNK][BLOCK] __attribute__((aligned(64)));
            for (int row = 0; row < count; row++) rows[row] = from + (first + row) * size;
            multiply_block(layer, 0, block, rows, count, sums[0]);
            if (has_up) multiply_block(up, 0, block, rows, count, sums[has_up]);
            for (int row = 0; row < count; row++) {
                const int64_t at = (first + row) * layer->outputs + block * BLOCK;
                if (has_up) gate_block(sums[0][row], sums[has_up][row]);
                if (residual) add_block(sums[0][row], residual, at, whole, kind == BFLOAT16);
                store_sums(sums[0][row], out, at, whole, kind == BFLOAT16);
            }
        }
    }
    free(prepared);
    return 0;
}

// out[m, N] = x[m, K] times the layer, plus residual[m, N] unless that is NULL; 0, or 1 where memory ran out. `kind` is
// that of the rows; x, residual and out are bfloat16 if it is, else float32.
int packed_linear(const Packed *layer, const void *x, int64_t num_rows, const void *residual, void *out, int kind,
                  int num_threads) {
    return multiply_rows(layer, NULL, x, num_rows, residual, out, kind, num_threads, 0);
}

// out[m, N] = silu(x times gate) * (x times up), two layers of one form. Else the same.
int packed_gated(const Packed *gate, const Packed *up, const void *x, int64_t num_rows, void *out, int kind,
                 int num_threads) {
    return multiply_rows(gate, up, x, num_rows, NULL, out, kind, num_threads, 1);
}

// Blocks of outputs that a thread sums up together: of few tokens several, for what an expert has of them follows each
// other. Their sums stay in the second-level cache.
INLINE int64_t blocks_together(int64_t num_tokens, int64_t num_blocks, int num_threads) {
    const int64_t most = least(256 / num_tokens, num_blocks / (4 * num_threads));
    return most > 1 ? most : 1;
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
    // For a matrix unit every thread gathers the rows of its expert.
    const int form = form_of(gate_up, kind) == AMX ? form_of(down, kind) : kind, gathers = form == AMX;
    const int64_t size = row_bytes(gate_up, form), inner_size = row_bytes(down, form);
    int64_t *starts = malloc((num_experts + 1 + num_pairs + num_experts) * sizeof *starts);
    char *inner = room(num_pairs * width * value);
    char *prepared = kind == FLOAT32 ? NULL : room(num_tokens * size);
    char *gathered = gathers ? room(num_threads * CHUNK * size) : NULL;
    char *inner_prepared = kind == INT8 ? malloc(num_pairs * inner_size) : NULL;
    const int64_t together = blocks_together(num_tokens, hidden / BLOCK, num_threads);
    float *totals = malloc(num_threads * num_tokens * together * BLOCK * sizeof *totals);
    if (!starts || !inner || !totals || (kind != FLOAT32 && !prepared) || (kind == INT8 && !inner_prepared) ||
        (gathers && !gathered)) {
        free(starts), free(inner), free(prepared), free(gathered), free(inner_prepared), free(totals);
        return 1;
    }
    int64_t *sorted = starts + num_experts + 1, *hit = sorted + num_pairs, num_hit = 0;
    sort(chosen, num_tokens, top_k, num_experts, starts, sorted);
    for (int64_t expert = 0; expert < num_experts; expert++)
        if (starts[expert + 1] > starts[expert]) hit[num_hit++] = expert;
    Queue queues[num_threads];
    deal(queues, num_threads, num_hit * width_blocks);
    Multiply *into = multiply_for(gate_up, form), *from = multiply_for(down, form);
    const char *tokens = kind == FLOAT32 ? x : prepared, *inner_rows = kind == INT8 ? inner_prepared : inner;
#pragma omp parallel num_threads(num_threads)
    {
        const void *rows[CHUNK];
        float sums[2][CHUNK][BLOCK] __attribute__((aligned(64)));
        char *own_rows = gathers ? gathered + omp_get_thread_num() * CHUNK * size : NULL;
        int64_t gathered_from = -1; // of the sorted pairs
        if (prepared)
#pragma omp for
            for (int64_t token = 0; token < num_tokens; token++)
                prepare((const char *)x + token * hidden * value, gate_up, kind, prepared, token);
        for (int64_t task; (task = take(queues, num_threads, omp_get_thread_num())) >= 0;) {
            const int64_t expert = hit[task / width_blocks], block = task % width_blocks;
            for (int64_t first = starts[expert]; first < starts[expert + 1]; first += CHUNK) {
                const int count = least(CHUNK, starts[expert + 1] - first);
                for (int row = 0; row < count; row++) {
                    rows[row] = tokens + sorted[first + row] / top_k * size;
                    if (!gathers) continue;
                    if (gathered_from != first) memcpy(own_rows + row * size, rows[row], size);
                    rows[row] = own_rows + row * size;
                }
                gathered_from = first;
                into(gate_up, expert, block, rows, count, sums[0]);
                into(gate_up, expert, block + width_blocks, rows, count, sums[1]);
                for (int row = 0; row < count; row++) {
                    gate_block(sums[0][row], sums[1][row]);
                    char *to = inner + ((first + row) * width + block * BLOCK) * value;
                    if (kind == BFLOAT16) {
                        uint16_t rounded[BLOCK];
                        store_sums(sums[0][row], rounded, 0, BLOCK, 1);
                        arrange(rounded, BLOCK, down->bits, (uint32_t *)to);
                    } else {
                        memcpy(to, sums[0][row], sizeof sums[0][row]);
                    }
                }
            }
        }
#pragma omp barrier
        if (inner_prepared)
#pragma omp for
            for (int64_t pair = 0; pair < starts[num_experts]; pair++)
                quantize((const float *)inner + pair * width, down, inner_prepared + pair * inner_size);
        float(*total)[BLOCK] = (float(*)[BLOCK])totals + omp_get_thread_num() * num_tokens * together;
#pragma omp for schedule(dynamic)
        for (int64_t begin = 0; begin < hidden / BLOCK; begin += together) {
            const int64_t end = least(begin + together, hidden / BLOCK);
            memset(total, 0, num_tokens * together * sizeof *total);
            for (int64_t place = 0; place < num_hit; place++) {
                const int64_t expert = hit[place];
                for (int64_t first = starts[expert]; first < starts[expert + 1]; first += CHUNK) {
                    const int count = least(CHUNK, starts[expert + 1] - first);
                    for (int row = 0; row < count; row++) rows[row] = inner_rows + (first + row) * inner_size;
                    for (int64_t block = begin; block < end; block++) {
                        from(down, expert, block, rows, count, sums[0]);
                        for (int row = 0; row < count; row++) {
                            const int64_t pair = sorted[first + row];
                            float *to = total[pair / top_k * together + block - begin];
                            for (int output = 0; output < BLOCK; output++)
                                to[output] += weights[pair] * sums[0][row][output];
                        }
                    }
                }
            }
            for (int64_t token = 0; token < num_tokens; token++)
                for (int64_t block = begin; block < end; block++)
                    store_sums(total[token * together + block - begin], out, token * hidden + block * BLOCK, BLOCK,
                               kind == BFLOAT16);
        }
    }
    free(starts), free(inner), free(prepared), free(gathered), free(inner_prepared), free(totals);
    return 0;
}
