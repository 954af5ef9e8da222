// Scores and results of attention by AVX-512's dot products of bf16 pairs. A block of 16 keys lies as
// [head_dim / 2][16][2], values as [page_size / 2][head_dim][2]: pairs of dimensions, and pairs of tokens.
#pragma once

#include "attention.h"

namespace shoplm {

using Share = bf16;
constexpr int64_t KEYS_TOGETHER = 4 * LANES;  // with four queries, or four queries and 64 dimensions: 16 sums

inline __m512bh load_pairs(const bf16* from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }
inline __m512bh load_pairs(const int8_t* from) {  // bf16 holds them exactly
    return _mm512_cvtne2ps_pbh(load_numbers(from + LANES), load_numbers(from));
}
inline __m512bh load_first_of_pairs(const bf16* from) {  // what the unused slot holds may be NaN
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(0x55555555, from));
}
inline __m512bh load_first_of_pairs(const int8_t* from) { return load_pairs(from); }  // the unused slot's share is 0
inline __m512bh splat_pair(const bf16* from) { return reinterpret_cast<__m512bh>(splat_bytes(from)); }

// Where dimension `i` of a token's key and value lies.
template <class Number>
inline int64_t key_at(const Pool<Number>& pool, int64_t page, int64_t head, int64_t offset, int64_t i) {
    return pool.block_at(page, head, offset) + i / 2 * (2 * LANES) + offset % LANES * 2 + i % 2;
}
template <class Number>
inline int64_t value_at(const Pool<Number>& pool, int64_t page, int64_t head, int64_t offset, int64_t i) {
    return pool.token_at(page, head, offset / 2 * 2) + i * 2 + offset % 2;
}

inline void put_key(const Pool<bf16>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    bf16* to = pool.keys + key_at(pool, page, head, offset, 0);
    alignas(64) bf16 rounded[LANES];
    for (int64_t i = 0; i < pool.head_dim; i += LANES) {
        store_bf16(rounded, load(from + i));
        for (int64_t j = 0; j < LANES; j += 2) std::memcpy(to + (i + j) * LANES, rounded + j, 4);
    }
}

inline void put_value(const Pool<bf16>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    bf16* to = pool.values + pool.token_at(page, head, offset / 2 * 2);
    const bool odd = offset % 2;
    for (int64_t i = 0; i < pool.head_dim; i += LANES) {
        const __m512i wide = _mm512_cvtepu16_epi32(round_bf16(load(from + i)));
        _mm512_mask_storeu_epi16(to + i * 2, odd ? 0xAAAAAAAA : 0x55555555, odd ? _mm512_slli_epi32(wide, 16) : wide);
    }
}

inline float own_score(const Pool<bf16>& pool, int64_t slot, int64_t head, const bf16* query) {
    const int64_t offset = slot % pool.page_size;
    const bf16* key = pool.keys + key_at(pool, slot / pool.page_size, head, offset, 0);
    const __m512i at = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(LANES));
    Floats score = zero();
    for (int64_t i = 0; i < pool.head_dim; i += 2 * LANES)
        score = _mm512_dpbf16_ps(score, load_pairs(query + i), reinterpret_cast<__m512bh>(_mm512_i32gather_epi32(at, key + i * LANES, 4)));
    return sum(score);
}

// Its dimensions `i` .. `i` + 15.
inline Floats own_value(const Pool<bf16>& pool, int64_t slot, int64_t head, int64_t i) {
    const int64_t offset = slot % pool.page_size;
    const __m512i pairs = _mm512_loadu_si512(pool.values + pool.token_at(slot / pool.page_size, head, offset / 2 * 2) + i * 2);
    return _mm512_castsi512_ps(offset % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))) : _mm512_slli_epi32(pairs, 16));
}

// What lies at `next` as these do at `blocks` is fetched meanwhile: pages are too short for the hardware to see what comes.
template <int QUERIES, class Number>
inline void score_keys(const bf16* queries, int64_t d, const Number* const* blocks, const Number* const* next, float* scores, int64_t stride) {
    Floats of[QUERIES][4];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) of[q][0] = of[q][1] = of[q][2] = of[q][3] = zero();
    for (int64_t i = 0; i < d; i += 2) {
        const int64_t at = i * LANES;
        const __m512bh keys[4] = {load_pairs(blocks[0] + at), load_pairs(blocks[1] + at), load_pairs(blocks[2] + at), load_pairs(blocks[3] + at)};
#pragma GCC unroll 4
        for (int block = 0; block < 4; ++block) _mm_prefetch(reinterpret_cast<const char*>(next[block] + at), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q) {
            const __m512bh pair = splat_pair(queries + q * d + i);
#pragma GCC unroll 4
            for (int block = 0; block < 4; ++block) of[q][block] = _mm512_dpbf16_ps(of[q][block], pair, keys[block]);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int block = 0; block < 4; ++block) store(scores + q * stride + block * LANES, of[q][block]);
}

// scores [count][stride] of `keys` keys, and of what fills KEYS_TOGETHER. `block_at`(key) is where the block of a key lies.
template <class BlockAt>
inline void score_all(const bf16* queries, int count, int64_t d, int64_t keys, const BlockAt& block_at, float* scores, int64_t stride) {
    for (int64_t key = 0; key < keys; key += KEYS_TOGETHER) {
        decltype(block_at(0)) blocks[4], next[4];
        for (int64_t block = 0; block < 4; ++block) {
            blocks[block] = block_at(std::min(key + block * LANES, keys - 1));
            next[block] = block_at(std::min(key + KEYS_TOGETHER + block * LANES, keys - 1));
        }
        for (int q = 0; q < count; q += 4) {
            const bf16* from = queries + q * d;
            float* to = scores + q * stride + key;
            switch (count - q) {
                case 1: score_keys<1>(from, d, blocks, next, to, stride); break;
                case 2: score_keys<2>(from, d, blocks, next, to, stride); break;
                case 3: score_keys<3>(from, d, blocks, next, to, stride); break;
                default: score_keys<4>(from, d, blocks, next, to, stride);
            }
        }
    }
}

// results [QUERIES][d] of VECTORS times 16 dimensions; `block_at`(key) is where the values of a key and those behind it lie.
template <int QUERIES, int VECTORS, class BlockAt>
inline void add_values(const bf16* shares, int64_t stride, int64_t d, int64_t keys, const BlockAt& block_at, float* results) {
    Floats of[QUERIES][VECTORS];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) of[q][v] = zero();
    auto add_pair = [&](int64_t key, const auto* values, const auto* next, bool both) __attribute__((always_inline)) {
        __m512bh rows[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            rows[v] = both ? load_pairs(values + v * LANES * 2) : load_first_of_pairs(values + v * LANES * 2);
            _mm_prefetch(reinterpret_cast<const char*>(next + v * LANES * 2), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q) {
            const __m512bh pair = splat_pair(shares + q * stride + key);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) of[q][v] = _mm512_dpbf16_ps(of[q][v], pair, rows[v]);
        }
    };
    for (int64_t block = 0; block < keys; block += LANES) {
        const auto* values = block_at(block);
        const auto* next = block_at(std::min(block + LANES, keys - 1));
        const int64_t end = std::min(keys - block, static_cast<int64_t>(LANES));
        int64_t key = 0;
        for (; key + 1 < end; key += 2) add_pair(block + key, values + key * d, next + key * d, true);
        if (key < end) add_pair(block + key, values + key * d, next + key * d, false);
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(results + q * d + v * LANES, of[q][v]);
}

template <int QUERIES, class BlockAt>
inline void add_dimensions(const bf16* shares, int64_t stride, int64_t d, int64_t keys, const BlockAt& block_at, float* results) {
    int64_t i = 0;
    auto from_dimension = [&](int64_t key) { return block_at(key) + i * 2; };
    for (; i + 4 * LANES <= d; i += 4 * LANES) add_values<QUERIES, 4>(shares, stride, d, keys, from_dimension, results + i);
    if (i < d) add_values<QUERIES, 2>(shares, stride, d, keys, from_dimension, results + i);
}

// results [count][d]: the sums of the values of `keys` keys by their shares [count][stride].
template <class BlockAt>
inline void sum_values(const bf16* shares, int count, int64_t stride, int64_t d, int64_t keys, const BlockAt& block_at, float* results) {
    for (int q = 0; q < count; q += 4) {
        const bf16* from = shares + q * stride;
        float* to = results + q * d;
        switch (count - q) {
            case 1: add_dimensions<1>(from, stride, d, keys, block_at, to); break;
            case 2: add_dimensions<2>(from, stride, d, keys, block_at, to); break;
            case 3: add_dimensions<3>(from, stride, d, keys, block_at, to); break;
            default: add_dimensions<4>(from, stride, d, keys, block_at, to);
        }
    }
}

}  // namespace shoplm
