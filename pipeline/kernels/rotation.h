// What rotary positions are computed of: `rotate` of rowwise.c takes it, decoder_layer.c fills it in.

#pragma once

#include <stdint.h>

typedef struct {
    const void *query, *key, *value;     // rows of heads, `stride` numbers apart
    const void *cosine, *sine;           // [rows, rotated]
    const float *query_norm, *key_norm;  // [size], or none
    const int64_t *places;               // of the rows in the pools
    void *out, *keys, *values;           // query [rows, heads, size]; pools [.., key_heads, size]
    int64_t query_stride, key_stride, value_stride, rows, heads, key_heads, size, rotated;
    float epsilon;
} Rotation;
