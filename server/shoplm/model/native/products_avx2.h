// Products of some rows of x and a panel of W, with AVX2 (and FMA, F16C).
//
// A panel is two halves of 16 columns, one after the other, each packed in the order of reading:
//   bf16   [k / 2][16][2]: both of a pair share 32 bits, and are widened by a shift or a mask; x is fp32
//   8 bits [k][16]: widened to fp32, their sums scaled group by group; x is fp32, too
//   4 bits [k / 8][16][4]: two steps of 4 inputs share their bytes, the first in the low halves; a step's products are
//          summed in 16 bits, which a group of 32 inputs cannot overflow: 16 * 15 * 127 < 2^15; x is 8 bits
// Where many rows follow, the columns are unpacked once: to fp32, or to a byte for each 4-bit integer.
#pragma once

#include <utility>

#include "linear.h"

namespace shoplm {

using Activation = float;  // of attention's queries and results

template <Format FORMAT>
constexpr int MOST_ROWS = FORMAT == INT4 ? 4 : 6;  // that 16 registers hold the sums of
constexpr int64_t UNPACK_ROWS = 12;                // from so many rows on, unpacking pays

constexpr int SCREEN_PARTS = 1;  // x is not rounded (see greedy.h)

inline int64_t row_bytes(const Linear& w) { return w.format == INT4 ? w.k : w.k * 4; }

// One row in the form that `next` takes.
inline void put_row(const float* from, float factor, const float* weight, const Linear& next, uint8_t* to, GroupScale* scales) {
    if (next.format == INT4) put_integers(from, factor, weight, next.k, next.group, reinterpret_cast<int8_t*>(to), scales);
    else put_floats(from, factor, weight, next.k, reinterpret_cast<float*>(to));
}

inline __m256i load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// Sums of up to six rows and 16 columns.
template <int ROWS>
struct Sums {
    __m256 low[ROWS], high[ROWS];

    Sums() {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm256_setzero_ps();
    }
    // The products with one input's 16 weights.
    __attribute__((always_inline)) void add(const float* x, int64_t k, __m256 a, __m256 b) {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const __m256 factor = _mm256_broadcast_ss(x + r * k);
            low[r] = _mm256_fmadd_ps(factor, a, low[r]);
            high[r] = _mm256_fmadd_ps(factor, b, high[r]);
        }
    }
    void add_unpacked(const float* x, int64_t k, const float* w, int64_t inputs) {
        for (int64_t i = 0; i < inputs; ++i, w += LANES) add(x + i, k, _mm256_load_ps(w), _mm256_load_ps(w + 8));
    }
};

// sums [ROWS][PANEL] of 16 columns; `unpacked`: W is fp32 [k][16].
template <int ROWS>
inline void multiply_bf16(const float* x, int64_t k, const uint8_t* w, bool unpacked, float* sums) {
    Sums<ROWS> of;
    if (unpacked) {
        of.add_unpacked(x, k, reinterpret_cast<const float*>(w), k);
    } else {
        const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
        for (int64_t i = 0; i < k; i += 2, w += 64) {
            of.add(x + i, k, _mm256_castsi256_ps(_mm256_slli_epi32(load_bytes(w), 16)), _mm256_castsi256_ps(_mm256_slli_epi32(load_bytes(w + 32), 16)));
            of.add(x + i + 1, k, _mm256_castsi256_ps(_mm256_and_si256(load_bytes(w), upper)), _mm256_castsi256_ps(_mm256_and_si256(load_bytes(w + 32), upper)));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) store(sums + r * PANEL, {of.low[r], of.high[r]});
}

inline void unpack_bf16(const uint8_t* from, int64_t k, float* to) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    for (int64_t i = 0; i < k; i += 2, from += 64, to += 2 * LANES)
        for (int half = 0; half < 2; ++half) {
            const __m256i pairs = load_bytes(from + half * 32);
            _mm256_store_ps(to + half * 8, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
            _mm256_store_ps(to + LANES + half * 8, _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)));
        }
}

inline __m256 widen_int8(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

// As `multiply_bf16`, of 8-bit integers.
template <int ROWS>
inline void multiply_int8(const float* x, const Linear& w, const uint8_t* packed, bool unpacked, const uint16_t* scales, float* sums) {
    const float* floats = reinterpret_cast<const float*>(packed);
    for (int64_t begin = 0; begin < w.k; begin += w.group, x += w.group, scales += PANEL) {
        Sums<ROWS> of;
        if (unpacked) of.add_unpacked(x, w.k, floats + begin * LANES, w.group);
        else for (int64_t i = 0; i < w.group; ++i, packed += LANES) of.add(x + i, w.k, widen_int8(packed), widen_int8(packed + 8));
        const Floats scale = load_fp16(scales);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
            store(sums + r * PANEL, multiply_add({of.low[r], of.high[r]}, scale, begin ? load(sums + r * PANEL) : zero()));
    }
}

inline void unpack_int8(const uint8_t* from, int64_t k, float* to) {
    for (int64_t i = 0; i < k * LANES; i += 8) _mm256_store_ps(to + i, widen_int8(from + i));
}

// `unpacked`: W is a byte for each integer, [k / 4][16][4].
template <int ROWS>
inline void multiply_int4(const int8_t* x, const GroupScale* row_scales, const Linear& w, const uint8_t* packed, bool unpacked, const uint16_t* scales, float* sums) {
    const int64_t groups = w.groups();
    const __m256i ones = _mm256_set1_epi16(1), lower = _mm256_set1_epi8(15);
    for (int64_t group = 0; group < groups; ++group, x += INT4_GROUP, scales += 2 * PANEL) {
        __m256i low[ROWS], high[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm256_setzero_si256();
        auto add_step = [&](int64_t i, __m256i a, __m256i b) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const Integers four = splat_bytes(x + r * w.k + i);
                low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(a, four.low));
                high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(b, four.high));
            }
        };
        for (int64_t i = 0; i < INT4_GROUP; i += 8) {
            if (unpacked) {
                add_step(i, load_bytes(packed), load_bytes(packed + 32));
                add_step(i + 4, load_bytes(packed + 64), load_bytes(packed + 96));
                packed += 128;
            } else {
                const __m256i a = load_bytes(packed), b = load_bytes(packed + 32);
                add_step(i, _mm256_and_si256(a, lower), _mm256_and_si256(b, lower));
                add_step(i + 4, _mm256_and_si256(_mm256_srli_epi16(a, 4), lower), _mm256_and_si256(_mm256_srli_epi16(b, 4), lower));
                packed += 64;
            }
        }
        const Floats scale = load_fp16(scales), lowest = load_fp16(scales + PANEL);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const GroupScale by = row_scales[r * groups + group];
            const Floats before = group ? load(sums + r * PANEL) : zero();
            store(sums + r * PANEL, add_group({_mm256_madd_epi16(low[r], ones), _mm256_madd_epi16(high[r], ones)}, scale, lowest, by, before));
        }
    }
}

inline void unpack_int4(const uint8_t* from, int64_t k, uint8_t* to) {
    const __m256i lower = _mm256_set1_epi8(15);
    for (int64_t i = 0; i < k; i += 8, from += 64, to += 128)
        for (int half = 0; half < 64; half += 32) {
            const __m256i both = load_bytes(from + half);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half), _mm256_and_si256(both, lower));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 + half), _mm256_and_si256(_mm256_srli_epi16(both, 4), lower));
        }
}

struct Halves { const uint8_t *low, *high; };  // of a panel: 16 columns each

struct Columns {  // of a panel
    Halves halves;
    bool unpacked;

    void passed() {}  // rows have passed over it
};

template <Format FORMAT>
inline Columns columns_of(const Linear& w, int64_t panel, int64_t rows) {
    const uint8_t* first = w.packed + panel * w.panel_bytes();
    const Halves packed{first, first + w.panel_bytes() / 2};
    if (rows < UNPACK_ROWS) return {packed, false};
    static thread_local Buffer<uint8_t> buffer;
    uint8_t* low = buffer.take(PANEL, row_bytes(w));
    uint8_t* high = low + LANES * row_bytes(w);
    for (auto [from, to] : {std::pair{packed.low, low}, std::pair{packed.high, high}}) {
        if constexpr (FORMAT == BF16) unpack_bf16(from, w.k, reinterpret_cast<float*>(to));
        else if constexpr (FORMAT == INT8) unpack_int8(from, w.k, reinterpret_cast<float*>(to));
        else unpack_int4(from, w.k, to);
    }
    return {{low, high}, true};
}

// sums [ROWS][PANEL].
template <Format FORMAT, int ROWS>
inline void multiply(const uint8_t* x, const GroupScale* row_scales, const Linear& w, const Columns& columns, const uint16_t* scales, float* sums) {
    const float* floats = reinterpret_cast<const float*>(x);
    for (int half = 0; half < 2; ++half, scales += LANES, sums += LANES) {
        const uint8_t* from = half ? columns.halves.high : columns.halves.low;
        if constexpr (FORMAT == BF16) multiply_bf16<ROWS>(floats, w.k, from, columns.unpacked, sums);
        else if constexpr (FORMAT == INT8) multiply_int8<ROWS>(floats, w, from, columns.unpacked, scales, sums);
        else multiply_int4<ROWS>(reinterpret_cast<const int8_t*>(x), row_scales, w, from, columns.unpacked, scales, sums);
    }
}

}  // namespace shoplm
