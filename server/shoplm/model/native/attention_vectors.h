// Attention with vectors of sixteen floats.
#pragma once

#ifdef SHOPLM_AVX512
#include "attention_avx512.h"
#else
#include "attention_avx2.h"
#endif
#include "linear_vectors.h"

namespace shoplm {

inline void use_attention() {}
inline void leave_attention() {}

struct Attention : AttentionInputs {
    // Queries `first` .. `first` + 15 of a key-value head, counted token by token and within it head by head.
    template <class Number>
    void block(const Pool<Number>& pool, int64_t head, int64_t first, std::vector<float>& scratch) const;
};

// Scores [count] to shares in their place, each as `stored`(key, share) gives it; -inf: none. `own` of them follow at
// `own_scores`. Returns one over the shares' sum.
template <class Stored>
inline float to_shares(float* scores, int64_t count, float* own_scores, int64_t own, const Stored& stored) {
    const Floats lowest = splat(-std::numeric_limits<float>::infinity());
    Floats most = lowest;
    for (int64_t key = 0; key < count; key += LANES) most = larger(most, load(scores + key));
    float peak = largest(most);
    for (int64_t step = 0; step < own; ++step) peak = std::max(peak, own_scores[step]);
    const Floats peaks = splat(peak);
    Share* shares = reinterpret_cast<Share*>(scores);
    Floats total = zero();
    for (int64_t key = 0; key < count; key += LANES) {
        const Floats score = load(scores + key);
        const Floats share = keep_unless_equal(exponential(subtract(score, peaks)), score, lowest);
        store_activations(shares + key, stored(key, share));
        total = add(total, share);
    }
    float whole = sum(total);
    for (int64_t step = 0; step < own; ++step) whole += own_scores[step] = std::exp(own_scores[step] - peak);
    return 1.f / whole;
}

template <class Number>
inline void Attention::block(const Pool<Number>& pool, int64_t head, int64_t first, std::vector<float>& scratch) const {
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
    const int64_t keys = (last - begin + KEYS_TOGETHER - 1) / KEYS_TOGETHER * KEYS_TOGETHER;
    scratch.resize(static_cast<size_t>(count * (keys + own + 2 * d)));
    float* scores = scratch.data();             // [count][keys]
    float* own_scores = scores + count * keys;  // [count][own]
    float* results = own_scores + count * own;  // [count][head_dim]
    Activation* packed = reinterpret_cast<Activation*>(results + count * d);  // [count][head_dim]
    float inverse[LANES];
    for (int lane = 0; lane < count; ++lane) std::memcpy(packed + lane * d, queries + at[lane], sizeof(Activation) * d);

    auto page_of = [&](int64_t key) { return pages[row->pages + (begin + key) / pool.page_size]; };
    auto keys_at = [&](int64_t key) { return pool.keys + pool.block_at(page_of(key), head, (begin + key) % pool.page_size); };
    auto scale_at = [&](int64_t key) { return pool.scale_at(page_of(key), head, (begin + key) % pool.page_size); };
    auto stored_share = [&](int64_t key, Floats share) {
        if constexpr (sizeof(Number) > 1) return share;
        if (key >= last - begin) return share;
        return keep_unless_equal(multiply(share, load(pool.value_scales + scale_at(key))), share, zero());  // an unused slot's may be NaN
    };
    score_all(packed, count, d, last - begin, keys_at, scores, keys);
    for (int lane = 0; lane < count; ++lane) {
        constexpr float none = -std::numeric_limits<float>::infinity();
        float* of = scores + lane * keys;
        if constexpr (sizeof(Number) == 1)
            for (int64_t key = 0; key < last - begin; key += LANES) store(of + key, multiply(load(of + key), load(pool.key_scales + scale_at(key))));
        std::fill(of, of + (from[lane] - begin), none);
        std::fill(of + (to[lane] - begin), of + keys, none);  // what unused slots hold may be NaN
        if (row->masked) {
            const uint16_t* mask = masks + row->mask + first / LANES * row->kv_len;
            for (int64_t key = from[lane]; key < to[lane]; ++key)
                if (mask[key] >> lane & 1) of[key - begin] = none;
        }
        for (int64_t step = 0; step < own; ++step)
            own_scores[lane * own + step] = own_score(pool, own_slots[row->own + token[lane] * own + step], head, packed + lane * d);
        inverse[lane] = to_shares(of, keys, own_scores + lane * own, own, stored_share);
    }
    auto values_at = [&](int64_t key) { return pool.values + pool.token_at(page_of(key), head, (begin + key) % pool.page_size); };
    constexpr int64_t shares = sizeof(float) / sizeof(Share);  // in a score's place
    sum_values(reinterpret_cast<const Share*>(scores), count, keys * shares, d, last - begin, values_at, results);
    for (int lane = 0; lane < count; ++lane)
        for (int64_t i = 0; i < d; i += LANES) {
            Floats result = load(results + lane * d + i);
            for (int64_t step = 0; step < own; ++step)
                result = multiply_add(splat(own_scores[lane * own + step]), own_value(pool, own_slots[row->own + token[lane] * own + step], head, i), result);
            store_activations(output + at[lane] + i, multiply(result, splat(inverse[lane])));
        }
}

}  // namespace shoplm
