// Keys and values of a byte: each token's head is rounded by its largest number, and its scores and shares are multiplied by
// its scale. Behind a form that says where its numbers lie.
#pragma once

#include "attention.h"

namespace shoplm {

// `from` [head_dim] as bytes; returns what a byte of 1 stands for, which a NaN or an infinite number makes no number.
inline float to_bytes(const float* from, int64_t head_dim, int8_t* to) {
    Floats most = zero();
    for (int64_t i = 0; i < head_dim; i += LANES) most = larger_magnitude(most, load(from + i));
    const float scale = largest_magnitude(most) / 127.f;
    const Floats factor = splat(scale > 0x1p-120f ? 1.f / scale : 1.f);
    for (int64_t i = 0; i < head_dim; i += LANES) store_integers(to + i, round_integers(multiply(load(from + i), factor)));
    return scale;
}

inline void put_key(const Pool<int8_t>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    int8_t bytes[MOST_HEAD_DIM];
    pool.key_scales[pool.scale_at(page, head, offset)] = to_bytes(from, pool.head_dim, bytes);
    for (int64_t i = 0; i < pool.head_dim; ++i) pool.keys[key_at(pool, page, head, offset, i)] = bytes[i];
}

inline void put_value(const Pool<int8_t>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    int8_t bytes[MOST_HEAD_DIM];
    pool.value_scales[pool.scale_at(page, head, offset)] = to_bytes(from, pool.head_dim, bytes);
    for (int64_t i = 0; i < pool.head_dim; ++i) pool.values[value_at(pool, page, head, offset, i)] = bytes[i];
}

inline float own_score(const Pool<int8_t>& pool, int64_t slot, int64_t head, const Activation* query) {
    const int64_t page = slot / pool.page_size, offset = slot % pool.page_size;
    float score = 0.f;
    for (int64_t i = 0; i < pool.head_dim; ++i) score += to_float(query[i]) * static_cast<float>(pool.keys[key_at(pool, page, head, offset, i)]);
    return score * pool.key_scales[pool.scale_at(page, head, offset)];
}

// Its dimensions `i` .. `i` + 15.
inline Floats own_value(const Pool<int8_t>& pool, int64_t slot, int64_t head, int64_t i) {
    const int64_t page = slot / pool.page_size, offset = slot % pool.page_size;
    alignas(64) int8_t bytes[LANES];
    for (int64_t j = 0; j < LANES; ++j) bytes[j] = pool.values[value_at(pool, page, head, offset, i + j)];
    return multiply(load_numbers(bytes), splat(pool.value_scales[pool.scale_at(page, head, offset)]));
}

}  // namespace shoplm
