// Products of some rows of x and 16 columns of W, with AVX-512's dot products of bf16 pairs and of four bytes.
//
// The columns are packed in the order of reading:
//   bf16   [k / 2][16][2]; x is bf16
//   8 bits [k / 4][16][4], 128 added, which the group's lowest value takes away again: -128 * scale; x is 8 bits
//   4 bits [k / 8][16][4]: two steps of 4 inputs share their bytes, the first in the low halves; x is 8 bits
#pragma once

#include "linear.h"

namespace shoplm {

template <Format FORMAT>
constexpr int MOST_ROWS = 12;
constexpr int64_t UNPACK_ROWS = 2 * MOST_ROWS<INT4>;  // from so many rows on, unpacking 4 bits pays
constexpr bool ROUNDS_RESULTS_OF_ATTENTION = true;

inline int64_t unpacked_bytes(const Linear& w) { return LANES * row_bytes(w); }

template <int ROWS>
inline void multiply_bf16(const uint8_t* x, int64_t k, const uint8_t* columns, float* sums) {
    Floats of[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) of[r] = zero();
    for (int64_t i = 0; i < k * 2; i += 4, columns += 64) {
        const __m512bh pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(columns));
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) of[r] = _mm512_dpbf16_ps(of[r], reinterpret_cast<__m512bh>(splat_bytes(x + r * k * 2 + i)), pairs);
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) store(sums + r * PANEL, of[r]);
}

template <Format FORMAT, int ROWS>
inline void multiply_integers(const uint8_t* x, const GroupScale* row_scales, const Linear& w, const uint8_t* columns, bool unpacked, const uint16_t* scales, float* sums) {
    const int64_t groups = w.groups(), tables = FORMAT == INT4 ? 2 : 1;
    const __m512i lower = _mm512_set1_epi8(15);
    for (int64_t group = 0; group < groups; ++group, x += w.group, scales += tables * PANEL) {
        Integers of[ROWS];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) of[r] = no_integers();
        auto add_step = [&](int64_t i, __m512i four) __attribute__((always_inline)) {
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) of[r] = _mm512_dpbusd_epi32(of[r], four, splat_bytes(x + r * w.k + i));
        };
        if (FORMAT == INT8 || unpacked) {
            for (int64_t i = 0; i < w.group; i += 4, columns += 64) add_step(i, _mm512_loadu_si512(columns));
        } else {
            for (int64_t i = 0; i < w.group; i += 8, columns += 64) {
                const __m512i both = _mm512_loadu_si512(columns);
                add_step(i, _mm512_and_si512(both, lower));
                add_step(i + 4, _mm512_and_si512(_mm512_srli_epi16(both, 4), lower));
            }
        }
        const Floats scale = load_fp16(scales);
        const Floats lowest = FORMAT == INT4 ? load_fp16(scales + PANEL) : multiply(scale, splat(-128.f));
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) add_group(of[r], scale, lowest, row_scales[r * groups + group], group == 0, sums + r * PANEL);
    }
}

// sums [ROWS][PANEL] of 16 columns; `unpacked`: `columns` are what `unpack` made of them.
template <Format FORMAT, int ROWS>
inline void multiply(const uint8_t* x, const GroupScale* row_scales, const Linear& w, const uint8_t* columns, bool unpacked, const uint16_t* scales, float* sums) {
    if constexpr (FORMAT == BF16) multiply_bf16<ROWS>(x, w.k, columns, sums);
    else multiply_integers<FORMAT, ROWS>(x, row_scales, w, columns, unpacked, scales, sums);
}

template <Format FORMAT>
inline const uint8_t* unpack(const uint8_t* columns, int64_t k, uint8_t* to) {
    if constexpr (FORMAT != INT4) return columns;
    const __m512i lower = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < k; i += 8, columns += 64) {
        const __m512i both = _mm512_loadu_si512(columns);
        _mm512_storeu_si512(to + i * LANES, _mm512_and_si512(both, lower));
        _mm512_storeu_si512(to + i * LANES + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), lower));
    }
    return to;
}

}  // namespace shoplm
