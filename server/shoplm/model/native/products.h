// Products in whichever format and with whichever instructions, and the rows that they take.
#pragma once

#include <cmath>
#include <cstring>

#ifdef __AMX_TILE__
#include "linear_tiles.h"
#else
#include "linear_vectors.h"
#endif

namespace shoplm {

constexpr int64_t LOOPS = 24;  // of a layer or of a head, at most

template <class Epilogue>
void linear(const Rows& x, const Linear& w, Crew& crew, const Epilogue& epilogue) {
    switch (w.format) {
        case INT8: return linear_as<INT8>(x, w, crew, epilogue);
        case INT4: return linear_as<INT4>(x, w, crew, epilogue);
        default: return linear_as<BF16>(x, w, crew, epilogue);
    }
}

// An epilogue: the sums as they are, to [rows, columns].
inline auto stored(float* to, int64_t columns) {
    return [=](int64_t row, int64_t column, Floats low, Floats high) {
        store(to + row * columns + column, low);
        store(to + row * columns + column + LANES, high);
    };
}

inline float sum_of_squares(const float* from, int64_t size) {
    Floats squares = zero();
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats x = load(from + i);
        squares = multiply_add(x, x, squares);
    }
    return sum(squares);
}

inline float inverse_rms(const float* from, int64_t size, float epsilon) {
    return 1.f / std::sqrt(sum_of_squares(from, size) / static_cast<float>(size) + epsilon);
}

// Where rows are put.
struct RowSpace {
    uint8_t* data;
    GroupScale* scales;
    float* low_rank;  // [m, rank], for weights with an adapter beside them
};

// The inputs that an adapter beside `w` gives, behind those that are there. W and the adapter's second matrix are one
// weight; the first one's columns of these inputs are zeros, so that it reads the same rows.
inline void put_low_rank(const Linear& w, int64_t m, const RowSpace& to, Crew& crew) {
    linear({to.data, to.scales, m}, *w.low_rank, crew, stored(to.low_rank, w.rank));
    crew.divide(m, [&](int64_t row) {
        put_row(to.low_rank + row * w.rank, 1.f, nullptr, w.rank, w, to.data + row * row_bytes(w) + bytes_of(w.given(), w), to.scales + row * w.groups() + w.given() / w.group);
    });
}

// RMSNorm of rows [m, next.given()], as rows for `next`. `weight` null: no norm.
inline Rows norm_rows(const float* from, int64_t m, const float* weight, float epsilon, const Linear& next, const RowSpace& to, Crew& crew) {
    const int64_t size = next.given();
    crew.divide(m, [&](int64_t row) {
        const float* at = from + row * size;
        const float factor = weight ? inverse_rms(at, size, epsilon) : 1.f;
        uint8_t* data = to.data + row * row_bytes(next);
        GroupScale* scales = to.scales + row * next.groups();
        put_row(at, factor, weight, size, next, data, scales);
        if (!next.rank) return;
        std::memset(data + bytes_of(size, next), 0, bytes_of(next.rank, next));
        std::fill(scales + size / next.group, scales + next.groups(), GroupScale{});
    });
    if (next.rank) put_low_rank(next, m, to, crew);
    return {to.data, to.scales, m};
}

// Rows of bf16 x [m, w.given()] as rows for `w`, by way of fp32 in `widened`.
inline Rows bf16_rows(const bf16* x, int64_t m, const Linear& w, float* widened, const RowSpace& to, Crew& crew) {
    crew.divide(m * w.given() / LANES, [&](int64_t i) { store(widened + i * LANES, load_bf16(x + i * LANES)); });
    return norm_rows(widened, m, nullptr, 0.f, w, to, crew);
}

}  // namespace shoplm
