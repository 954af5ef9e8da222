// Products of some rows of x and a panel of W, with AVX2 (and FMA, F16C).
//
// A panel is two halves of 16 columns, one after the other, each packed in the order of reading:
//   bf16   [k / 2][16][2]: both of a pair share 32 bits, and are widened by a shift or a mask; x is fp32
//   8 bits [k / 4][16][4]; x is 8 bits. Two products may need 16 bits, so they are added in 32: a byte without a sign times
//          one with a sign is what AVX2 multiplies, so W's signs go to x
//   4 bits [k / 8][16][4]: two steps of 4 inputs share their bytes, the first in the low halves; a step's products are
//          summed in 16 bits, which a group of 32 inputs cannot overflow: 16 * 15 * 127 < 2^15; x is 8 bits
// Where many rows follow, bf16 columns are widened to fp32 once, and 4 bits to bytes.
#pragma once

#include <type_traits>
#include <utility>

#include "linear.h"

namespace shoplm {

template <Format FORMAT>
constexpr int MOST_ROWS = FORMAT == BF16 ? 6 : 4;  // that 16 registers hold the sums of
constexpr int64_t FETCH_INPUTS = 64;               // while so many are multiplied, some of the panel behind is fetched
constexpr int64_t UNPACK_ROWS = 12;                // from so many rows on, unpacking pays

// The panel behind the one that rows pass over, which is fetched evenly meanwhile, so that memory works all the time.
struct Behind {
    const uint8_t* at;
    int64_t bytes;  // at a time

    void fetch() {
        for (int64_t byte = 0; byte < bytes; byte += 64) _mm_prefetch(reinterpret_cast<const char*>(at) + byte, _MM_HINT_T1);
        at += bytes;
    }
};

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
};

// sums [ROWS][PANEL] of 16 columns; `unpacked`: W is fp32 [k][16].
template <int ROWS>
inline void multiply_bf16(const float* x, int64_t k, const uint8_t* w, bool unpacked, Behind& behind, float* sums) {
    Sums<ROWS> of;
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    for (int64_t begin = 0; begin < k; begin += FETCH_INPUTS) {
        behind.fetch();
        if (unpacked) {
            const float* wide = reinterpret_cast<const float*>(w) + begin * LANES;
            for (int64_t i = begin; i < begin + FETCH_INPUTS; ++i, wide += LANES) of.add(x + i, k, _mm256_load_ps(wide), _mm256_load_ps(wide + 8));
        } else {
            for (int64_t i = begin; i < begin + FETCH_INPUTS; i += 2) {
                const __m256i a = load_bytes(w + i * 32), b = load_bytes(w + i * 32 + 32);
                of.add(x + i, k, _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)));
                of.add(x + i + 1, k, _mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper)));
            }
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

// Sums of 8 columns; as __m256i, GCC would copy them in every step of a loop.
using Sums8 = int32_t __attribute__((vector_size(32)));   // 8 bits: 2 * 127 * 127 < 2^15, so a step's pairs are exact
using Sums4 = int16_t __attribute__((vector_size(32)));   // 4 bits: two for each column

inline Sums8 add_products(Sums8 before, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return before + reinterpret_cast<Sums8>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Sums4 add_products(Sums4 before, __m256i w, __m256i x) { return before + reinterpret_cast<Sums4>(_mm256_maddubs_epi16(w, x)); }

inline __m256i whole(Sums8 sums) { return reinterpret_cast<__m256i>(sums); }
inline __m256i whole(Sums4 sums) { return _mm256_madd_epi16(reinterpret_cast<__m256i>(sums), _mm256_set1_epi16(1)); }

// sums [ROWS][PANEL] of 16 columns; `unpacked`: 4-bit W is a byte for each integer, too.
template <Format FORMAT, int ROWS>
inline void multiply_integers(const int8_t* x, const GroupScale* row_scales, const Linear& w, const uint8_t* packed, bool unpacked, const uint16_t* scales, Behind& behind, float* sums) {
    constexpr int64_t TABLES = FORMAT == INT4 ? 2 : 1;
    const int64_t groups = w.groups();
    const __m256i lower = _mm256_set1_epi8(15);
    for (int64_t group = 0; group < groups; ++group, x += w.group, scales += TABLES * PANEL) {
        behind.fetch();
        using Of = std::conditional_t<FORMAT == INT4, Sums4, Sums8>;
        Of low[ROWS], high[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) low[r] = high[r] = Of{};
        auto add_step = [&](int64_t i, __m256i a, __m256i b) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const Integers four = splat_bytes(x + r * w.k + i);
                low[r] = add_products(low[r], a, four.low);
                high[r] = add_products(high[r], b, four.high);
            }
        };
        if (FORMAT == INT8 || unpacked) {
            for (int64_t i = 0; i < w.group; i += 4, packed += 64) add_step(i, load_bytes(packed), load_bytes(packed + 32));
        } else {
            for (int64_t i = 0; i < w.group; i += 8, packed += 64) {
                const __m256i a = load_bytes(packed), b = load_bytes(packed + 32);
                add_step(i, _mm256_and_si256(a, lower), _mm256_and_si256(b, lower));
                add_step(i + 4, _mm256_and_si256(_mm256_srli_epi16(a, 4), lower), _mm256_and_si256(_mm256_srli_epi16(b, 4), lower));
            }
        }
        const Floats scale = load_fp16(scales), lowest = FORMAT == INT4 ? load_fp16(scales + PANEL) : zero();
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const GroupScale by = row_scales[r * groups + group];
            const Floats before = group ? load(sums + r * PANEL) : zero();
            store(sums + r * PANEL, add_group({whole(low[r]), whole(high[r])}, scale, lowest, by, before));
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
    Behind behind;
};

template <Format FORMAT>
inline Columns columns_of(const Linear& w, int64_t panel, int64_t rows) {
    const uint8_t* first = w.packed + panel * w.panel_bytes();
    const Halves packed{first, first + w.panel_bytes() / 2};
    const int64_t times = 2 * passes_of(rows, MOST_ROWS<FORMAT>) * (w.k / std::min(w.group, FETCH_INPUTS));
    const Behind behind{first + w.panel_bytes(), (w.panel_bytes() + times - 1) / times};
    if (FORMAT == INT8 || rows < UNPACK_ROWS) return {packed, false, behind};
    static thread_local Buffer<uint8_t> buffer;
    uint8_t* low = buffer.take(PANEL, row_bytes(w));
    uint8_t* high = low + LANES * row_bytes(w);
    for (auto [from, to] : {std::pair{packed.low, low}, std::pair{packed.high, high}}) {
        if constexpr (FORMAT == BF16) unpack_bf16(from, w.k, reinterpret_cast<float*>(to));
        else unpack_int4(from, w.k, to);
    }
    return {{low, high}, true, behind};
}

// sums [ROWS][PANEL].
template <Format FORMAT, int ROWS>
inline void multiply(const uint8_t* x, const GroupScale* row_scales, const Linear& w, Columns& columns, const uint16_t* scales, float* sums) {
    for (int half = 0; half < 2; ++half, scales += LANES, sums += LANES) {
        const uint8_t* from = half ? columns.halves.high : columns.halves.low;
        if constexpr (FORMAT == BF16) multiply_bf16<ROWS>(reinterpret_cast<const float*>(x), w.k, from, columns.unpacked, columns.behind, sums);
        else multiply_integers<FORMAT, ROWS>(reinterpret_cast<const int8_t*>(x), row_scales, w, from, columns.unpacked, scales, columns.behind, sums);
    }
}

}  // namespace shoplm
