// Products of some rows of x and a panel of W, with AVX-512's dot products of bf16 pairs and of four bytes.
//
// A panel is packed in the order of reading:
//   bf16   [k / 2][32][2]; x is bf16
//   8 bits [k / 4][32][4], 128 added, which the group's lowest value takes away again: -128 * scale; x is 8 bits
//   4 bits [k / 8][32][4]: two steps of 4 inputs share their bytes, the first in the low halves; x is 8 bits
#pragma once

#include "linear.h"

namespace shoplm {

template <Format FORMAT>
constexpr int MOST_ROWS = FORMAT == BF16 ? 12 : 6;  // that 32 registers hold the sums of; integers have two of each

constexpr int64_t STEP_BYTES = 128;  // of a panel

// A panel. While rows pass over it, the panel behind it is fetched, evenly, so that memory works all the time.
struct Columns {
    const uint8_t* packed;
    const uint8_t* behind;  // what the next step fetches is here
    int64_t stride, steps;  // bytes of it for each step, and steps of a pass

    void fetch(int64_t step) const {
        const char* at = reinterpret_cast<const char*>(behind) + step * stride;
        _mm_prefetch(at, _MM_HINT_T1);
        _mm_prefetch(at + 64, _MM_HINT_T1);
    }
};

template <Format FORMAT>
inline Columns columns_of(const Linear& w, int64_t panel, int64_t rows) {
    const uint8_t* packed = w.packed + panel * w.panel_bytes();
    const int64_t passes = passes_of(rows, MOST_ROWS<FORMAT>);
    return {packed, packed + w.panel_bytes(), (STEP_BYTES + passes - 1) / passes, w.panel_bytes() / STEP_BYTES};
}

// sums [ROWS][PANEL].
template <int ROWS>
inline void multiply_bf16(const uint8_t* x, int64_t k, const Columns& w, float* sums) {
    Floats low[ROWS], high[ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = zero();
    for (int64_t i = 0; i < k * 2; i += 4) {
        const __m512bh a = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w.packed + i * PANEL));
        const __m512bh b = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w.packed + i * PANEL + 64));
        w.fetch(i / 4);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh pair = reinterpret_cast<__m512bh>(splat_bytes(x + r * k * 2 + i));
            low[r] = _mm512_dpbf16_ps(low[r], pair, a);
            high[r] = _mm512_dpbf16_ps(high[r], pair, b);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        store(sums + r * PANEL, low[r]);
        store(sums + r * PANEL + LANES, high[r]);
    }
}

inline Integers add_products(Integers before, __m512i w, Integers x) {
    return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(before), w, reinterpret_cast<__m512i>(x)));
}

// sums [ROWS][PANEL].
template <Format FORMAT, int ROWS>
inline void multiply_integers(const uint8_t* x, const GroupScale* row_scales, const Linear& w, const Columns& columns, const uint16_t* scales, float* sums) {
    constexpr int64_t TABLES = FORMAT == INT4 ? 2 : 1, DEPTH = FORMAT == INT4 ? 8 : 4;  // inputs of 64 bytes
    const int64_t groups = w.groups();
    int64_t step = 0;
    const __m512i lower = _mm512_set1_epi8(15);
    Floats low[ROWS], high[ROWS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = zero();
    for (int64_t group = 0; group < groups; ++group, x += w.group, scales += TABLES * PANEL) {
        Integers of_low[ROWS], of_high[ROWS];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) of_low[r] = of_high[r] = no_integers();
        auto add_step = [&](int64_t i, __m512i a, __m512i b) __attribute__((always_inline)) {
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r) {
                const Integers four = splat_bytes(x + r * w.k + i);
                of_low[r] = add_products(of_low[r], a, four);
                of_high[r] = add_products(of_high[r], b, four);
            }
        };
        for (int64_t i = 0; i < w.group; i += DEPTH, ++step) {
            const uint8_t* at = columns.packed + step * STEP_BYTES;
            const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64);
            columns.fetch(step);
            if constexpr (FORMAT == INT8) {
                add_step(i, a, b);
            } else {
                add_step(i, _mm512_and_si512(a, lower), _mm512_and_si512(b, lower));
                add_step(i + 4, _mm512_and_si512(_mm512_srli_epi16(a, 4), lower), _mm512_and_si512(_mm512_srli_epi16(b, 4), lower));
            }
        }
        const Floats scale[2] = {load_fp16(scales), load_fp16(scales + LANES)};
        Floats lowest[2];
        for (int half = 0; half < 2; ++half) lowest[half] = FORMAT == INT4 ? load_fp16(scales + PANEL + half * LANES) : multiply(scale[half], splat(-128.f));
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const GroupScale by = row_scales[r * groups + group];
            low[r] = add_group(of_low[r], scale[0], lowest[0], by, low[r]);
            high[r] = add_group(of_high[r], scale[1], lowest[1], by, high[r]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
        store(sums + r * PANEL, low[r]);
        store(sums + r * PANEL + LANES, high[r]);
    }
}

template <Format FORMAT, int ROWS>
inline void multiply(const uint8_t* x, const GroupScale* row_scales, const Linear& w, Columns& columns, const uint16_t* scales, float* sums) {
    if constexpr (FORMAT == BF16) multiply_bf16<ROWS>(x, w.k, columns, sums);
    else multiply_integers<FORMAT, ROWS>(x, row_scales, w, columns, scales, sums);
    columns.behind += columns.steps * columns.stride;
}

}  // namespace shoplm
