// Attention with vectors of sixteen floats. Keys lie in blocks, values by token, so that scores are sums over dimensions
// of 16 keys at once and results sums over keys of 16 dimensions at once: both read rows of 16 numbers, each row used for
// up to six queries while it is in registers.
#pragma once

#include "attention.h"

namespace shoplm {

inline void put_key(const Pool& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_column(from, pool.head_dim, offset, pool.keys + pool.block_at(page, head, offset));
}

inline void put_value(const Pool& pool, const float* from, int64_t page, int64_t head, int64_t offset) {
    put_token(from, pool.head_dim, pool.values + pool.token_at(page, head, offset));
}

inline void use_attention() {}
inline void leave_attention() {}

constexpr int MOST_QUERIES = 6;  // whose sums of 16 numbers registers hold

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

struct Attention : AttentionOf<float> {
    // Queries `first` .. `first` + 15 of a key-value head, counted token by token and within it head by head.
    void block(int64_t head, int64_t first, std::vector<float>& scratch) const;

  private:
    const bf16* keys_at(int64_t head, int64_t key) const {
        return pool.keys + pool.block_at(pages[row->pages + key / pool.page_size], head, key % pool.page_size);
    }
    const bf16* values_at(int64_t head, int64_t key) const {
        return pool.values + pool.token_at(pages[row->pages + key / pool.page_size], head, key % pool.page_size);
    }
    float own_score(int64_t slot, int64_t head, const float* query) const {
        const int64_t offset = slot % pool.page_size;
        const bf16* key = pool.keys + pool.block_at(slot / pool.page_size, head, offset) + offset % LANES;
        float score = 0.f;
        for (int64_t i = 0; i < pool.head_dim; ++i) score += query[i] * to_float(key[i * LANES]);
        return score;
    }
};

// Scores [count] to shares; -inf: none. `own` of them follow at `own_scores`. Returns one over the shares' sum.
inline float to_shares(float* scores, int64_t count, float* own_scores, int64_t own) {
    const Floats lowest = splat(-std::numeric_limits<float>::infinity());
    Floats most = lowest;
    for (int64_t key = 0; key < count; key += LANES) most = larger(most, load(scores + key));
    float peak = largest(most);
    for (int64_t step = 0; step < own; ++step) peak = std::max(peak, own_scores[step]);
    const Floats peaks = splat(peak);
    Floats total = zero();
    for (int64_t key = 0; key < count; key += LANES) {
        const Floats score = load(scores + key);
        const Floats share = keep_unless_equal(exponential(subtract(score, peaks)), score, lowest);
        store(scores + key, share);
        total = add(total, share);
    }
    float whole = sum(total);
    for (int64_t step = 0; step < own; ++step) whole += own_scores[step] = std::exp(own_scores[step] - peak);
    return 1.f / whole;
}

inline void Attention::block(int64_t head, int64_t first, std::vector<float>& scratch) const {
    const int64_t d = pool.head_dim, group = heads / pool.kv_heads;
    const int count = static_cast<int>(std::min<int64_t>(LANES, row->query_len * group - first));
    const int64_t own = row->lanes ? row->own_steps : 0;
    int64_t token[LANES], at[LANES], from[LANES], to[LANES];  // a query sees the keys from .. to - 1 of the pages
    for (int lane = 0; lane < count; ++lane) {
        token[lane] = (first + lane) / group;
        at[lane] = ((row->query_start + token[lane]) * heads + head * group + (first + lane) % group) * d;
        const int64_t position = row->lanes ? row->past : row->past + token[lane];
        to[lane] = row->lanes ? row->kv_len : std::min(row->kv_len, position + 1);
        const int64_t counted = row->masked ? positions[row->query_start + token[lane]] : position;
        from[lane] = window ? std::min(std::max<int64_t>(0, counted - window + 1), to[lane]) : 0;
    }
    const int64_t last = *std::max_element(to, to + count);
    const int64_t begin = std::min(*std::min_element(from, from + count), last - 1) / LANES * LANES;
    const int64_t keys = (last - begin + LANES - 1) / LANES * LANES;
    scratch.resize(static_cast<size_t>(count * (keys + own + d)));
    float* packed = scratch.data();          // [count][head_dim]
    float* scores = packed + count * d;      // [count][keys]
    float* own_scores = scores + count * keys;  // [count][own]
    float inverse[LANES];
    for (int lane = 0; lane < count; ++lane) std::memcpy(packed + lane * d, queries + at[lane], sizeof(float) * d);

    for (int64_t key = 0; key < keys; key += LANES) {
        const bf16* block = keys_at(head, begin + key);
        for (int lane = 0; lane < count; lane += MOST_QUERIES) {
            const int some = std::min(count - lane, MOST_QUERIES);
            Floats sums[MOST_QUERIES];
            std::fill(sums, sums + some, zero());
            add_rows(some, packed + lane * d, d, block, LANES, d, sums);
            for (int q = 0; q < some; ++q) store(scores + (lane + q) * keys + key, sums[q]);
        }
    }
    for (int lane = 0; lane < count; ++lane) {
        constexpr float none = -std::numeric_limits<float>::infinity();
        float* of = scores + lane * keys;
        std::fill(of, of + (from[lane] - begin), none);
        std::fill(of + (to[lane] - begin), of + keys, none);  // what unused slots hold may be NaN
        if (row->masked) {
            const uint16_t* mask = masks + row->mask + first / LANES * row->kv_len;
            for (int64_t key = from[lane]; key < to[lane]; ++key)
                if (mask[key] >> lane & 1) of[key - begin] = none;
        }
        for (int64_t step = 0; step < own; ++step)
            own_scores[lane * own + step] = own_score(own_slots[row->own + token[lane] * own + step], head, packed + lane * d);
        inverse[lane] = to_shares(of, keys, own_scores + lane * own, own);
    }
    for (int64_t i = 0; i < d; i += LANES)
        for (int lane = 0; lane < count; lane += MOST_QUERIES) {
            const int some = std::min(count - lane, MOST_QUERIES);
            Floats sums[MOST_QUERIES];
            std::fill(sums, sums + some, zero());
            for (int64_t key = begin; key < last; key += LANES)
                add_rows(some, scores + lane * keys + key - begin, keys, values_at(head, key) + i, d, std::min<int64_t>(LANES, last - key), sums);
            for (int q = 0; q < some; ++q) {
                for (int64_t step = 0; step < own; ++step) {
                    const int64_t slot = own_slots[row->own + token[lane + q] * own + step];
                    const bf16* value = pool.values + pool.token_at(slot / pool.page_size, head, slot % pool.page_size);
                    sums[q] = multiply_add(splat(own_scores[(lane + q) * own + step]), load_bf16(value + i), sums[q]);
                }
                store(output + at[lane + q] + i, multiply(sums[q], splat(inverse[lane + q])));
            }
        }
}

}  // namespace shoplm
