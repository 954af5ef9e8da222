// Scores and results of attention in fp32, with AVX2. Keys lie in blocks, values by token, so that scores are sums over
// dimensions of 16 keys at once and results sums over keys of 16 dimensions at once: both read rows of 16 numbers, each
// row used for up to six queries while it is in registers.
#pragma once

#include "attention.h"

namespace shoplm {

using Share = float;
constexpr int64_t KEYS_TOGETHER = LANES;
constexpr int MOST_QUERIES = 6;  // whose sums of 16 numbers registers hold

inline void put_key(const Pool& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_column(from, pool.head_dim, offset, pool.keys + pool.block_at(page, head, offset));
}

inline void put_value(const Pool& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_token(from, pool.head_dim, pool.values + pool.token_at(page, head, offset));
}

inline float own_score(const Pool& pool, int64_t slot, int64_t head, const float* query) {
    const int64_t offset = slot % pool.page_size;
    const bf16* key = pool.keys + pool.block_at(slot / pool.page_size, head, offset) + offset % LANES;
    float score = 0.f;
    for (int64_t i = 0; i < pool.head_dim; ++i) score += query[i] * to_float(key[i * LANES]);
    return score;
}

// Its dimensions `i` .. `i` + 15.
inline Floats own_value(const Pool& pool, int64_t slot, int64_t head, int64_t i) {
    return load_bf16(pool.values + pool.token_at(slot / pool.page_size, head, slot % pool.page_size) + i);
}

// sums[q] += sum over i of factors[q * stride + i] * rows[i * row_stride] .. + 15.
template <int QUERIES>
inline void add_rows(const float* factors, int64_t stride, const bf16* rows, int64_t row_stride, int64_t count, Floats* sums) {
    Floats of[QUERIES];
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; ++q) of[q] = sums[q];
    for (int64_t i = 0; i < count; ++i, rows += row_stride) {
        const Floats row = load_bf16(rows);
#pragma GCC unroll 6
        for (int q = 0; q < QUERIES; ++q) of[q] = multiply_add(splat(factors[q * stride + i]), row, of[q]);
    }
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; ++q) sums[q] = of[q];
}

inline void add_rows(int queries, const float* factors, int64_t stride, const bf16* rows, int64_t row_stride, int64_t count, Floats* sums) {
    switch (queries) {
        case 1: return add_rows<1>(factors, stride, rows, row_stride, count, sums);
        case 2: return add_rows<2>(factors, stride, rows, row_stride, count, sums);
        case 3: return add_rows<3>(factors, stride, rows, row_stride, count, sums);
        case 4: return add_rows<4>(factors, stride, rows, row_stride, count, sums);
        case 5: return add_rows<5>(factors, stride, rows, row_stride, count, sums);
        default: return add_rows<6>(factors, stride, rows, row_stride, count, sums);
    }
}

// scores [count][stride] of `keys` keys, and of what fills KEYS_TOGETHER. `block_at`(key) is where the block of a key lies.
template <class BlockAt>
inline void score_all(const float* queries, int count, int64_t d, int64_t keys, const BlockAt& block_at, float* scores, int64_t stride) {
    for (int64_t key = 0; key < keys; key += LANES) {
        const bf16* block = block_at(key);
        for (int first = 0; first < count; first += MOST_QUERIES) {
            const int some = std::min(count - first, MOST_QUERIES);
            Floats sums[MOST_QUERIES];
            std::fill(sums, sums + some, zero());
            add_rows(some, queries + first * d, d, block, LANES, d, sums);
            for (int q = 0; q < some; ++q) store(scores + (first + q) * stride + key, sums[q]);
        }
    }
}

// results [count][d]: the sums of the values of `keys` keys by their shares [count][stride].
template <class BlockAt>
inline void sum_values(const float* shares, int count, int64_t stride, int64_t d, int64_t keys, const BlockAt& block_at, float* results) {
    for (int64_t i = 0; i < d; i += LANES)
        for (int first = 0; first < count; first += MOST_QUERIES) {
            const int some = std::min(count - first, MOST_QUERIES);
            Floats sums[MOST_QUERIES];
            std::fill(sums, sums + some, zero());
            for (int64_t key = 0; key < keys; key += LANES)
                add_rows(some, shares + first * stride + key, stride, block_at(key) + i, d, std::min<int64_t>(LANES, keys - key), sums);
            for (int q = 0; q < some; ++q) store(results + (first + q) * d + i, sums[q]);
        }
}

}  // namespace shoplm
