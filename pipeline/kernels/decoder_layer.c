// A decoder layer in one call: y = x + attention(norm(x)), and y + mlp(norm(y)). Nothing is computed here: the functions of
// the other libraries are called one after the other, in memory that all layers of a step use. From Python each call costs as much
// as a few rows of a small layer, and lets the threads fall asleep in between. Compiled by native.py, called by
// decoder_layer.py.

#include "blocks.h"
#include "rotation.h"

// Of rowwise.c, packed.c and attention.c, where they are explained.
typedef struct {
    void (*norm)(const void *, const float *, float, int64_t, int64_t, void *, int, int64_t);
    int (*linear)(const Packed *, const void *, int64_t, const void *, void *, int, int);
    int (*gated)(const Packed *, const Packed *, const void *, int64_t, void *, int, int);
    void (*rotate)(const Rotation *, int, int64_t);
    int (*attend_one)(const void *, const void *, const void *, const int64_t *, const int64_t *, const int64_t (*)[2],
                      int64_t, int64_t, int64_t, int64_t, float, int64_t, void *, int, int64_t);
    int (*attend_prompts)(const void *, const void *, const void *, const int64_t (*)[4], int64_t, int64_t, int64_t, int64_t,
                          float, int64_t, void *, int, int64_t);
} Functions;

typedef struct {
    Packed layer;
    int kind; // of the rows it takes (blocks.h)
} Product;

typedef struct {
    const float *first_norm, *second_norm, *query_norm, *key_norm; // the last two NULL where there are none
    Product projections[3], output, gate, up, down;                // one for queries, keys and values together, or each
    int64_t num_projections, heads, key_heads, size, window;
    float first_epsilon, second_epsilon, head_epsilon, scale;
    int is_bf16; // the numbers of rows and of the context
} DecoderLayer;

// What the rows of a step are: `num_single` are the last tokens of their sequences so far, others of parts of prompts.
typedef struct {
    const int64_t *places, *starts, *lengths, (*alike)[2], (*spans)[4];
    int64_t num_rows, num_single, num_spans;
} Rows;

typedef struct {
    const void *cosine, *sine;
    int64_t rotated;
    void *keys, *values;
} Context;

enum { NORMED, PROJECTED, ROTATED, ATTENDED, BETWEEN, INNER, NUM_PARTS }; // what lies between the calls

// Where so many rows of each part begin; gives the bytes of all.
static int64_t lay_out(const DecoderLayer *layer, int64_t num_rows, int64_t *places) {
    const int64_t width = layer->heads * layer->size, key_width = layer->key_heads * layer->size;
    const int64_t hidden = layer->output.layer.outputs, inner = layer->gate.layer.outputs;
    const int64_t sizes[NUM_PARTS] = {hidden, width + 2 * key_width, width, width, hidden, inner};
    int64_t all = 0;
    for (int part = 0; part < NUM_PARTS; part++) {
        places[part] = all;
        all += rounded_up(num_rows * sizes[part] * (layer->is_bf16 ? 2 : 4), 64);
    }
    return all;
}

// The bytes that a layer needs for what lies between its calls.
int64_t decoder_layer_bytes(const DecoderLayer *layer, int64_t num_rows) {
    int64_t places[NUM_PARTS];
    return lay_out(layer, num_rows, places);
}

// x, out [rows, hidden], which must not overlap; `room` has decoder_layer_bytes. 0, or 1 where memory ran out.
int decoder_layer(const Functions *call, const DecoderLayer *layer, const Rows *rows, const Context *context, const void *x,
                  char *room, void *out, int64_t threads) {
    const int64_t number = layer->is_bf16 ? 2 : 4, num_rows = rows->num_rows, hidden = layer->output.layer.outputs;
    const int64_t width = layer->heads * layer->size, key_width = layer->key_heads * layer->size;
    int64_t places[NUM_PARTS];
    char *parts[NUM_PARTS];
    lay_out(layer, num_rows, places);
    for (int part = 0; part < NUM_PARTS; part++) parts[part] = room + places[part];

    call->norm(x, layer->first_norm, layer->first_epsilon, num_rows, hidden, parts[NORMED], layer->is_bf16, threads);
    int failed = 0;
    char *projected[3], *next = parts[PROJECTED];
    int64_t strides[3];
    for (int64_t i = 0; i < 3; i++) {
        const int64_t own = i ? key_width : width;
        projected[i] = next;
        if (layer->num_projections == 1) {
            strides[i] = width + 2 * key_width;
            next += own * number;
        } else {
            strides[i] = own;
            next += num_rows * own * number;
        }
    }
    for (int64_t i = 0; i < layer->num_projections; i++)
        failed |= call->linear(&layer->projections[i].layer, parts[NORMED], num_rows, NULL, projected[i],
                               layer->projections[i].kind, threads);
    const Rotation rotation = {
        projected[0], projected[1], projected[2], context->cosine, context->sine, layer->query_norm, layer->key_norm,
        rows->places, parts[ROTATED], context->keys, context->values, strides[0], strides[1], strides[2],
        num_rows, layer->heads, layer->key_heads, layer->size, context->rotated, layer->head_epsilon};
    call->rotate(&rotation, layer->is_bf16, threads);
    if (rows->num_spans)
        failed |= call->attend_prompts(parts[ROTATED], context->keys, context->values, rows->spans, rows->num_spans,
                                       layer->heads, layer->key_heads, layer->size, layer->scale, layer->window,
                                       parts[ATTENDED], layer->is_bf16, threads);
    if (rows->num_single)
        failed |= call->attend_one(parts[ROTATED], context->keys, context->values, rows->starts, rows->lengths, rows->alike,
                                   rows->num_single, layer->heads, layer->key_heads, layer->size, layer->scale,
                                   layer->window, parts[ATTENDED], layer->is_bf16, threads);
    failed |= call->linear(&layer->output.layer, parts[ATTENDED], num_rows, x, parts[BETWEEN], layer->output.kind, threads);
    call->norm(parts[BETWEEN], layer->second_norm, layer->second_epsilon, num_rows, hidden, parts[NORMED], layer->is_bf16,
               threads);
    failed |= call->gated(&layer->gate.layer, &layer->up.layer, parts[NORMED], num_rows, parts[INNER], layer->gate.kind,
                          threads);
    failed |= call->linear(&layer->down.layer, parts[INNER], num_rows, parts[BETWEEN], out, layer->down.kind, threads);
    return failed;
}
