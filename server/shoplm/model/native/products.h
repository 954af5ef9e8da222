// Products in whichever format and with whichever instructions, and the rows that they take.
#pragma once

#include <cmath>

#ifdef __AMX_TILE__
#include "linear_tiles.h"
#else
#include "linear_vectors.h"
#endif

namespace shoplm {

constexpr int64_t LOOPS = 16;  // of a layer or of a head, at most

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

// RMSNorm of rows [m, next.k], as rows for `next`. `weight` null: no norm.
inline Rows norm_rows(const float* from, int64_t m, const float* weight, float epsilon, const Linear& next, uint8_t* to, GroupScale* scales, Crew& crew) {
    crew.divide(m, [&](int64_t row) {
        const float* at = from + row * next.k;
        const float factor = weight ? inverse_rms(at, next.k, epsilon) : 1.f;
        put_row(at, factor, weight, next, to + row * row_bytes(next), scales + row * next.groups());
    });
    return {to, scales, m};
}

// Rows of bf16 x [m, w.k] as rows for `w`, by way of fp32 in `widened`.
inline Rows bf16_rows(const bf16* x, int64_t m, const Linear& w, float* widened, uint8_t* to, GroupScale* scales, Crew& crew) {
    crew.divide(m * w.k / LANES, [&](int64_t i) { store(widened + i * LANES, load_bf16(x + i * LANES)); });
    return norm_rows(widened, m, nullptr, 0.f, w, to, scales, crew);
}

}  // namespace shoplm
