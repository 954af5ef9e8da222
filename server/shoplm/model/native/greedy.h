// The most likely token, without a table of all logits in memory that is read again, and with half of what a head in bf16
// would read: 8-bit products of all tokens find those that can be the most likely, and bf16 decides between them.
//
// |W'x' - Wx| <= |W' - W| |x| + |W'| |x' - x| by Cauchy and Schwarz, of which the largest of any token is taken: whoever is
// further below the best than twice that is not the best. So the result is that of bf16.
#pragma once

#include <cmath>
#include <limits>

#include "linear.h"

namespace shoplm {

constexpr int64_t TOKEN_BLOCK = 1024;  // that one thread looks through at a time
constexpr int64_t GREEDY_ROWS = 32;    // of x, at a time

struct Greedy {
    Linear w;
    const bf16* exact;  // [tokens, k]: what `w` stands for; null: itself
    int64_t tokens;
    float error;  // the largest norm of a row's difference, exact - w
    float norm;   // the largest norm of a row of `exact`
};

struct Candidate { float value; int64_t token; };

inline float norm_of(const float* x, int64_t size) {
    Floats squares = zero();
    for (int64_t i = 0; i < size; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    return std::sqrt(sum(squares));
}

// By how much two products can be off, together: a row is rounded by at most half a step of each of its groups.
inline float greedy_margin(const Greedy& head, const float* x) {
    if (!head.exact) return 0.f;
    const int64_t k = head.w.k, group = head.w.group;
    float rounding = 0.f;
    for (int64_t begin = 0; begin < k; begin += group) {
        Floats most = zero();
        for (int64_t i = begin; i < begin + group; i += LANES) most = larger(most, magnitude(load(x + i)));
        const float half = largest(most) / 254.f;
        rounding += half * half * static_cast<float>(group);
    }
    constexpr float SUMS = 1e-4f;  // of fp32, of a few thousand products
    const float norm = norm_of(x, k);
    return 2.f * (head.error * norm + (head.norm + head.error) * std::sqrt(rounding) + SUMS * head.norm * norm);
}

inline float exact_product(const bf16* w, const float* x, int64_t k) {
    Floats even = zero(), odd = zero();
    for (int64_t i = 0; i < k; i += 2 * LANES) {
        even = multiply_add(load_bf16(w + i), load(x + i), even);
        odd = multiply_add(load_bf16(w + i + LANES), load(x + i + LANES), odd);
    }
    return sum(add(even, odd));
}

// The largest of logits [count]; what is behind them may be read.
inline float largest_of(const float* logits, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    Floats most = splat(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < whole; i += LANES) most = larger(most, load(logits + i));
    float best = largest(most);
    for (int64_t i = whole; i < count; ++i) best = std::max(best, logits[i]);
    return best;
}

// The best of a block's tokens that reach `least`, the first of equal ones; `none` if none does.
inline Candidate best_of_block(const Greedy& head, const float* logits, const float* x, int64_t begin, int64_t end, float least) {
    Candidate best{-std::numeric_limits<float>::infinity(), -1};
    for (int64_t token = begin; token < end; ++token) {
        if (!(logits[token] >= least)) continue;
        const float value = head.exact ? exact_product(head.exact + token * head.w.k, x, head.w.k) : logits[token];
        if (value > best.value) best = {value, token};
    }
    return best;
}

}  // namespace shoplm
