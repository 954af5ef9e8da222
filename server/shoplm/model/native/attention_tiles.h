// Attention on AMX tiles. Keys lie by token, values in blocks, so that a tile is read from either without reordering.
// Sixteen queries of one key-value head are the columns of K q^T [keys, 16] and of V^T p [head_dim, 16].
#pragma once

#include "attention.h"
#include "tiles.h"

namespace shoplm {

// Where dimension `i` of a token's key and value lies.
template <class Number>
inline int64_t key_at(const Pool<Number>& pool, int64_t page, int64_t head, int64_t offset, int64_t i) {
    return pool.token_at(page, head, offset) + i;
}
template <class Number>
inline int64_t value_at(const Pool<Number>& pool, int64_t page, int64_t head, int64_t offset, int64_t i) {
    return pool.block_at(page, head, offset) + i * TILE + offset % TILE;
}

inline void put_key(const Pool<bf16>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_token(from, pool.head_dim, pool.keys + pool.token_at(page, head, offset));
}

inline void put_value(const Pool<bf16>& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_column(from, pool.head_dim, offset, pool.values + pool.block_at(page, head, offset));
}

inline float own_score(const Pool<bf16>& pool, int64_t slot, int64_t head, const bf16* query) {
    const bf16* key = pool.keys + pool.token_at(slot / pool.page_size, head, slot % pool.page_size);
    __m512 score = _mm512_setzero_ps();
    for (int64_t i = 0; i < pool.head_dim; i += TILE) score = _mm512_fmadd_ps(load_bf16(key + i), load_bf16(query + i), score);
    return _mm512_reduce_add_ps(score);
}

// Its dimensions `i` .. `i` + 15.
inline __m512 own_value(const Pool<bf16>& pool, int64_t slot, int64_t head, int64_t i) {
    alignas(64) float value[TILE];
    const bf16* from = pool.values + value_at(pool, slot / pool.page_size, head, slot % pool.page_size, i);
    for (int64_t j = 0; j < TILE; ++j) value[j] = to_float(from[j * TILE]);
    return _mm512_load_ps(value);
}

// `count` numbers as tiles take them; bytes go to `spare`.
inline const bf16* tile_numbers(const bf16* from, int64_t, bf16*) { return from; }
inline const bf16* tile_numbers(const int8_t* from, int64_t count, bf16* spare) {
    for (int64_t i = 0; i < count; i += TILE) store_bf16(spare + i, load_numbers(from + i));
    return spare;
}

struct Attention : AttentionInputs {
    // Queries `first` .. `first` + 15 of a key-value head, counted token by token and within it head by head.
    template <class Number>
    void block(const Pool<Number>& pool, int64_t head, int64_t first, std::vector<float>& scratch) const;
};

inline void use_attention() {
    TileConfig config;
    for (int tile = 0; tile < 6; ++tile) config.set(tile, TILE, 64);
    config.set(6, TILE, 32);    // 16 dimensions of V^T, 16 keys
    config.set(7, TILE / 2, 64);  // pairs of keys, 16 queries
    _tile_loadconfig(&config);
}

inline void leave_attention() { _tile_release(); }

template <class Number>
inline void Attention::block(const Pool<Number>& pool, int64_t head, int64_t first, std::vector<float>& scratch) const {
    const int64_t d = pool.head_dim, group = heads / pool.kv_heads;
    const int count = static_cast<int>(std::min<int64_t>(TILE, row->query_len * group - first));
    int64_t token[TILE], at[TILE];
    alignas(64) int32_t position[TILE] = {}, seen_from[TILE] = {};  // where a query is kept, and where a window counts from
    alignas(64) bf16 packed[256 / 2 * TILE * 2] = {};  // q^T: [head_dim / 2][16][2]
    for (int lane = 0; lane < count; ++lane) {
        token[lane] = (first + lane) / group;
        at[lane] = ((row->query_start + token[lane]) * heads + head * group + (first + lane) % group) * d;
        position[lane] = static_cast<int32_t>(row->lanes ? row->past : row->past + token[lane]);
        seen_from[lane] = row->masked ? static_cast<int32_t>(positions[row->query_start + token[lane]]) : position[lane];
        for (int64_t i = 0; i < d; i += 2) std::memcpy(packed + (i / 2 * TILE + lane) * 2, queries + at[lane] + i, 4);
    }
    for (int lane = count; lane < TILE; ++lane) position[lane] = position[count - 1], seen_from[lane] = seen_from[count - 1];
    const int64_t newest = position[count - 1], oldest = position[0];
    const uint16_t* mask = row->masked ? masks + row->mask + first / TILE * row->kv_len : nullptr;
    const int64_t last = row->lanes ? row->kv_len : std::min(row->kv_len, newest + 1);
    int64_t begin = window ? std::max<int64_t>(0, *std::min_element(seen_from, seen_from + count) - window + 1) : 0;
    begin = std::min(begin, last - 1) / TILE * TILE;
    const int64_t blocks = (last - begin + TILE - 1) / TILE, keys = blocks * TILE, own = row->lanes ? row->own_steps : 0;
    scratch.resize(static_cast<size_t>((keys + own) * TILE + d * TILE + keys * TILE / 2 + TILE * d / 2 + 64));
    float* scores = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
    float* result = scores + (keys + own) * TILE;                        // [head_dim][16]
    uint32_t* shares = reinterpret_cast<uint32_t*>(result + d * TILE);   // bf16 pairs of keys: [keys / 2][16]
    bf16* spare = reinterpret_cast<bf16*>(shares + keys * TILE / 2);     // [head_dim][16]
    constexpr bool in_bytes = sizeof(Number) == 1;
    auto page_of = [&](int64_t key) { return pages[row->pages + key / pool.page_size]; };
    auto scale_of = [&](const float* scales, int64_t key) { return key < last ? scales[pool.scale_at(page_of(key), head, key % pool.page_size)] : 0.f; };

    const __m512i positions = _mm512_load_si512(position);
    const __m512i starts = _mm512_sub_epi32(_mm512_load_si512(seen_from), _mm512_set1_epi32(static_cast<int32_t>(window)));
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = lowest;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t key = begin + block * TILE;
        const bf16* from = tile_numbers(pool.keys + pool.token_at(page_of(key), head, key % pool.page_size), TILE * d, spare);
        _tile_zero(0);
        for (int64_t i = 0; i < d; i += 32) {
            _tile_loadd(4, from + i, d * 2);
            _tile_loadd(5, packed + i * TILE, 64);
            _tile_dpbf16ps(0, 4, 5);
        }
        float* to = scores + block * TILE * TILE;
        _tile_stored(0, to, 64);
        const bool whole = !mask && key + TILE <= last && (row->lanes || key + TILE - 1 <= oldest) && (!window || key > newest - window);
        for (int r = 0; r < TILE; ++r) {
            __m512 score = _mm512_load_ps(to + r * TILE);
            if constexpr (in_bytes) {
                score = _mm512_mul_ps(score, _mm512_set1_ps(scale_of(pool.key_scales, key + r)));
                _mm512_store_ps(to + r * TILE, score);
            }
            if (!whole) {
                const __m512i k = _mm512_set1_epi32(static_cast<int32_t>(key + r));
                __mmask16 seen = key + r < last ? 0xFFFF : 0;
                if (!row->lanes) seen &= _mm512_cmple_epi32_mask(k, positions);
                if (window) seen &= _mm512_cmpgt_epi32_mask(k, starts);
                if (mask && key + r < last) seen &= static_cast<__mmask16>(~mask[key + r]);
                score = _mm512_mask_blend_ps(seen, lowest, score);
                _mm512_store_ps(to + r * TILE, score);
            }
            most = _mm512_max_ps(most, score);
        }
    }
    for (int64_t step = 0; step < own; ++step) {
        alignas(64) float dots[TILE] = {};
        for (int lane = 0; lane < count; ++lane) dots[lane] = own_score(pool, own_slots[row->own + token[lane] * own + step], head, queries + at[lane]);
        const __m512 score = _mm512_load_ps(dots);
        _mm512_store_ps(scores + (keys + step) * TILE, score);
        most = _mm512_max_ps(most, score);
    }
    // A query that sees no key of the pages (lanes behind a short window) has its own.
    __m512 total = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; key += 2) {
        const __m512 even = exponential(_mm512_sub_ps(_mm512_load_ps(scores + key * TILE), most));
        const __m512 odd = exponential(_mm512_sub_ps(_mm512_load_ps(scores + (key + 1) * TILE), most));
        const __mmask16 even_seen = _mm512_cmp_ps_mask(_mm512_load_ps(scores + key * TILE), lowest, _CMP_NEQ_UQ);
        const __mmask16 odd_seen = _mm512_cmp_ps_mask(_mm512_load_ps(scores + (key + 1) * TILE), lowest, _CMP_NEQ_UQ);
        __m512 a = _mm512_maskz_mov_ps(even_seen, even), b = _mm512_maskz_mov_ps(odd_seen, odd);
        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
        if constexpr (in_bytes) {
            a = _mm512_mul_ps(a, _mm512_set1_ps(scale_of(pool.value_scales, begin + key)));
            b = _mm512_mul_ps(b, _mm512_set1_ps(scale_of(pool.value_scales, begin + key + 1)));
        }
        const __m512i low = _mm512_cvtepu16_epi32(round_bf16(a)), high = _mm512_cvtepu16_epi32(round_bf16(b));
        _mm512_store_si512(shares + key / 2 * TILE, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    for (int64_t step = 0; step < own; ++step) {
        float* score = scores + (keys + step) * TILE;
        const __m512 share = exponential(_mm512_sub_ps(_mm512_load_ps(score), most));
        _mm512_store_ps(score, share);
        total = _mm512_add_ps(total, share);
    }
    for (int64_t i = 0; i < d; i += 4 * TILE) {  // four tiles of dimensions at once; head_dim 32 leaves two unused
        const bool upper = d - i >= 4 * TILE;
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t key = begin + block * TILE;
            const int64_t dimensions = std::min<int64_t>(4 * TILE, d - i);
            const bf16* from = tile_numbers(pool.values + pool.block_at(page_of(key), head, key % pool.page_size) + i * TILE, dimensions * TILE, spare);
            if (!in_bytes && key + TILE > last) {  // what unused slots hold may be NaN: 0 * NaN would spoil the sum
                const __mmask16 used = static_cast<__mmask16>((1u << (last - key)) - 1);
                for (int64_t r = 0; r < dimensions; ++r)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(spare + r * TILE), _mm256_maskz_loadu_epi16(used, from + r * TILE));
                from = spare;
            }
            _tile_loadd(7, shares + block * TILE * TILE / 2, 64);
            _tile_loadd(6, from, 32);
            _tile_dpbf16ps(0, 6, 7);
            _tile_loadd(6, from + TILE * TILE, 32);
            _tile_dpbf16ps(1, 6, 7);
            if (!upper) continue;
            _tile_loadd(6, from + 2 * TILE * TILE, 32);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(6, from + 3 * TILE * TILE, 32);
            _tile_dpbf16ps(3, 6, 7);
        }
        _tile_stored(0, result + i * TILE, 64);
        _tile_stored(1, result + (i + TILE) * TILE, 64);
        if (!upper) continue;
        _tile_stored(2, result + (i + 2 * TILE) * TILE, 64);
        _tile_stored(3, result + (i + 3 * TILE) * TILE, 64);
    }
    alignas(64) float inverse[TILE];
    _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.f), total));
    const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(TILE));
    for (int lane = 0; lane < count; ++lane)
        for (int64_t i = 0; i < d; i += TILE) {
            __m512 sum = _mm512_i32gather_ps(column, result + i * TILE + lane, 4);
            for (int64_t step = 0; step < own; ++step) {
                const __m512 value = own_value(pool, own_slots[row->own + token[lane] * own + step], head, i);
                sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[(keys + step) * TILE + lane]), value, sum);
            }
            store_bf16(output + at[lane] + i, _mm512_mul_ps(sum, _mm512_set1_ps(inverse[lane])));
        }
}

}  // namespace shoplm
