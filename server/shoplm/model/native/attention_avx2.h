// Scores and results of attention in fp32, with AVX2. Keys lie in blocks, values by token, so that scores are sums over
// dimensions of 16 keys at once and results sums over keys of 16 dimensions at once: both read rows of 16 numbers, each
// row used for up to six queries while it is in registers.
#pragma once

#include "attention.h"

namespace shoplm {

using Share = float;
constexpr int64_t KEYS_TOGETHER = LANES;
constexpr int MOST_SUMS = 6;  // of 16 numbers, that registers hold

// Where dimension `i` of a token's key and value lies.
template <class Number>
inline int64_t key_at(const Pool<Number>& pool, int64_t page, int64_t head, int64_t offset, int64_t i) {
    return pool.block_at(page, head, offset) + i * LANES + offset % LANES;
}
template <class Number>
inline int64_t value_at(const Pool<Number>& pool, int64_t page, int64_t head, int64_t offset, int64_t i) {
    return pool.token_at(page, head, offset) + i;
}

inline void put_key(const Pool<bf16>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_column(from, pool.head_dim, offset, pool.keys + pool.block_at(page, head, offset));
}

inline void put_value(const Pool<bf16>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_token(from, pool.head_dim, pool.values + pool.token_at(page, head, offset));
}

inline float own_score(const Pool<bf16>& pool, int64_t slot, int64_t head, const float* query) {
    const int64_t offset = slot % pool.page_size;
    const bf16* key = pool.keys + key_at(pool, slot / pool.page_size, head, offset, 0);
    float score = 0.f;
    for (int64_t i = 0; i < pool.head_dim; ++i) score += query[i] * to_float(key[i * LANES]);
    return score;
}

// Its dimensions `i` .. `i` + 15.
inline Floats own_value(const Pool<bf16>& pool, int64_t slot, int64_t head, int64_t i) {
    return load_bf16(pool.values + pool.token_at(slot / pool.page_size, head, slot % pool.page_size) + i);
}

// sums[q][w] += sum over i of factors[q * stride + i] * rows[w][i * row_stride] .. + 15. What lies at `next` as these do at
// `rows` is fetched meanwhile: pages are too short for the hardware to see what comes.
template <int QUERIES, int WIDTH, class Number>
inline void add_rows(const float* factors, int64_t stride, const Number* const* rows, const Number* const* next, int64_t row_stride, int64_t count, Floats* sums) {
    Floats of[QUERIES][WIDTH];
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 2
        for (int w = 0; w < WIDTH; ++w) of[q][w] = sums[q * WIDTH + w];
    for (int64_t i = 0; i < count; ++i) {
        Floats row[WIDTH];
#pragma GCC unroll 2
        for (int w = 0; w < WIDTH; ++w) {
            row[w] = load_numbers(rows[w] + i * row_stride);
            _mm_prefetch(reinterpret_cast<const char*>(next[w] + i * row_stride), _MM_HINT_T0);
        }
#pragma GCC unroll 6
        for (int q = 0; q < QUERIES; ++q) {
            const Floats factor = splat(factors[q * stride + i]);
#pragma GCC unroll 2
            for (int w = 0; w < WIDTH; ++w) of[q][w] = multiply_add(factor, row[w], of[q][w]);
        }
    }
#pragma GCC unroll 6
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 2
        for (int w = 0; w < WIDTH; ++w) sums[q * WIDTH + w] = of[q][w];
}

template <int WIDTH, class Number>
inline void add_rows(int queries, const float* factors, int64_t stride, const Number* const* rows, const Number* const* next, int64_t row_stride, int64_t count, Floats* sums) {
    switch (queries) {
        case 1: return add_rows<1, WIDTH>(factors, stride, rows, next, row_stride, count, sums);
        case 2: return add_rows<2, WIDTH>(factors, stride, rows, next, row_stride, count, sums);
        case 3: return add_rows<3, WIDTH>(factors, stride, rows, next, row_stride, count, sums);
    }
    if constexpr (WIDTH == 1) switch (queries) {
        case 4: return add_rows<4, 1>(factors, stride, rows, next, row_stride, count, sums);
        case 5: return add_rows<5, 1>(factors, stride, rows, next, row_stride, count, sums);
        default: return add_rows<6, 1>(factors, stride, rows, next, row_stride, count, sums);
    }
}

// scores [some][stride] of WIDTH times 16 keys.
template <int WIDTH, class BlockAt>
inline void score_blocks(const float* queries, int some, int64_t d, int64_t key, int64_t keys, const BlockAt& block_at, float* scores, int64_t stride) {
    decltype(block_at(0)) rows[WIDTH], next[WIDTH];
    for (int w = 0; w < WIDTH; ++w) {
        const int64_t behind = key + (WIDTH + w) * LANES;
        rows[w] = block_at(key + w * LANES);
        next[w] = behind < keys ? block_at(behind) : rows[w];
    }
    Floats sums[MOST_SUMS];
    std::fill(sums, sums + some * WIDTH, zero());
    add_rows<WIDTH>(some, queries, d, rows, next, LANES, d, sums);
    for (int q = 0; q < some; ++q)
        for (int w = 0; w < WIDTH; ++w) store(scores + q * stride + key + w * LANES, sums[q * WIDTH + w]);
}

// scores [count][stride] of `keys` keys, and of what fills KEYS_TOGETHER. `block_at`(key) is where the block of a key lies.
template <class BlockAt>
inline void score_all(const float* queries, int count, int64_t d, int64_t keys, const BlockAt& block_at, float* scores, int64_t stride) {
    int64_t key = 0;
    if (2 * count <= MOST_SUMS)  // few sums would wait for each other: two blocks at once
        for (; key + LANES < keys; key += 2 * LANES) score_blocks<2>(queries, count, d, key, keys, block_at, scores, stride);
    for (; key < keys; key += LANES)
        for (int first = 0; first < count; first += MOST_SUMS)
            score_blocks<1>(queries + first * d, std::min(count - first, MOST_SUMS), d, key, keys, block_at, scores + first * stride, stride);
}

// results [some][d] of WIDTH times 16 dimensions.
template <int WIDTH, class BlockAt>
inline void sum_dimensions(const float* shares, int some, int64_t stride, int64_t d, int64_t keys, const BlockAt& block_at, float* results) {
    Floats sums[MOST_SUMS];
    std::fill(sums, sums + some * WIDTH, zero());
    for (int64_t key = 0; key < keys; key += LANES) {
        decltype(block_at(0)) rows[WIDTH], next[WIDTH];
        for (int w = 0; w < WIDTH; ++w) {
            rows[w] = block_at(key) + w * LANES;
            next[w] = key + LANES < keys ? block_at(key + LANES) + w * LANES : rows[w];
        }
        add_rows<WIDTH>(some, shares + key, stride, rows, next, d, std::min<int64_t>(LANES, keys - key), sums);
    }
    for (int q = 0; q < some; ++q)
        for (int w = 0; w < WIDTH; ++w) store(results + q * d + w * LANES, sums[q * WIDTH + w]);
}

// results [count][d]: the sums of the values of `keys` keys by their shares [count][stride].
template <class BlockAt>
inline void sum_values(const float* shares, int count, int64_t stride, int64_t d, int64_t keys, const BlockAt& block_at, float* results) {
    for (int64_t i = 0; i < d; i += 2 * LANES)
        for (int first = 0; first < count; first += MOST_SUMS) {
            const int some = std::min(count - first, MOST_SUMS);
            const float* from = shares + first * stride;
            float* to = results + first * d + i;
            auto at = [&](int64_t key) { return block_at(key) + i; };
            if (2 * some <= MOST_SUMS) {
                sum_dimensions<2>(from, some, stride, d, keys, at, to);
                continue;
            }
            sum_dimensions<1>(from, some, stride, d, keys, at, to);
            sum_dimensions<1>(from, some, stride, d, keys, [&](int64_t key) { return at(key) + LANES; }, to + LANES);
        }
}

}  // namespace shoplm
