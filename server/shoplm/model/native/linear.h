// y = x W^T: what both ways to multiply share. W is packed by panels of 32 output columns, which stream from memory
// once. Integers have a scale for each group of inputs, of W for each column and of x for each row; 4-bit ones have the
// value of 0, too. A group's products are exact, and every row is summed over k in the same order whatever else is in
// the batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.h"

namespace shoplm {

constexpr int64_t PANEL = 32;       // columns of W that are multiplied together
constexpr int64_t INT4_GROUP = 32;  // the smallest

enum Format : int64_t { BF16 = 0, INT8 = 1, INT4 = 2 };

struct Linear {
    const uint8_t* packed;
    const uint16_t* scales;  // integers: fp16 [n / 32][k / group][32]; 4 bits: [n / 32][k / group][2][32], scale and low
    const float* bias;       // [n]; null: none
    const Linear* low_rank;  // of an adapter beside W: gives the last `rank` of the inputs from the others; null: none
    int64_t n;               // output columns, padded to PANEL
    int64_t k;               // inputs, a multiple of 64
    int64_t group;           // inputs that share a scale; k for bf16
    int64_t rank;            // a multiple of 64
    int64_t format;

    int64_t given() const { return k - rank; }  // inputs
    int64_t groups() const { return k / group; }
    int64_t panel_bytes() const { return PANEL * (format == BF16 ? k * 2 : format == INT8 ? k : k / 2); }
    const uint16_t* panel_scales(int64_t panel) const { return scales + panel * groups() * PANEL * (format == INT4 ? 2 : 1); }
};

// A group of a row of integers: value = scale * integer.
struct GroupScale { float scale, sum; };  // sum of the integers

inline int64_t passes_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }  // over a panel, of `most` rows each

// Rows of x in the form that the weight's format asks for.
struct Rows {
    const uint8_t* data;       // [m, k]
    const GroupScale* scales;  // [m, k / group] of integers
    int64_t m;
};

// `before` + (scale of W * products + low of W * sum of x) * scale of x.
inline Floats add_group(Integers products, Floats scale, Floats lowest, GroupScale by, Floats before) {
    const Floats value = multiply_add(lowest, splat(by.sum), multiply(to_floats(products), scale));
    return multiply_add(value, splat(by.scale), before);
}

// Rounds a row to integers from -127 to 127, group by group. `weight` null: ones. A group with a NaN or an infinite number
// has NaN as its scale, so that no product of it is a number.
inline void put_integers(const float* from, float factor, const float* weight, int64_t size, int64_t group, int8_t* to, GroupScale* scales) {
    const Floats by = splat(factor);
    auto at = [&](int64_t i) {
        const Floats value = multiply(load(from + i), by);
        return weight ? multiply(value, load(weight + i)) : value;
    };
    for (int64_t begin = 0; begin < size; begin += group, ++scales) {
        Floats most = zero();
        for (int64_t i = begin; i < begin + group; i += LANES) most = larger_magnitude(most, at(i));
        const float range = std::max(largest_magnitude(most), 1e-20f);
        if (!std::isfinite(range)) {
            std::memset(to + begin, 0, group);
            *scales = {std::numeric_limits<float>::quiet_NaN(), 0.f};
            continue;
        }
        const Floats inverse = splat(127.f / range);
        Integers total = no_integers();
        for (int64_t i = begin; i < begin + group; i += LANES) {
            const Integers rounded = round_integers(multiply(at(i), inverse));
            total = add_integers(total, rounded);
            store_integers(to + i, rounded);
        }
        *scales = {range / 127.f, static_cast<float>(sum_integers(total))};
    }
}

template <class Number>
inline void put_floats(const float* from, float factor, const float* weight, int64_t size, Number* to) {
    const Floats by = splat(factor);
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats value = multiply(load(from + i), by);
        store_activations(to + i, weight ? multiply(value, load(weight + i)) : value);
    }
}

inline int64_t bytes_of(int64_t inputs, const Linear& w) { return w.format == BF16 ? inputs * static_cast<int64_t>(sizeof(Activation)) : inputs; }
inline int64_t row_bytes(const Linear& w) { return bytes_of(w.k, w); }

// One row, or a part of it of `size` inputs, in the form that `next` takes.
inline void put_row(const float* from, float factor, const float* weight, int64_t size, const Linear& next, uint8_t* to, GroupScale* scales) {
    if (next.format == BF16) put_floats(from, factor, weight, size, reinterpret_cast<Activation*>(to));
    else put_integers(from, factor, weight, size, next.group, reinterpret_cast<int8_t*>(to), scales);
}

}  // namespace shoplm
