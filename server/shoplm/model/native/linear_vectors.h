// y = x W^T with vectors, with an epilogue on the fp32 sums. Called by all threads of a parallel region; returns when all
// of them are done. A panel of W is two halves of 16 columns, one after the other.
#pragma once

#include <algorithm>

#ifdef SHOPLM_AVX512
#include "products_avx512.h"
#else
#include "products_avx2.h"
#endif

namespace shoplm {

using Activation = float;          // of attention's queries and results
constexpr int64_t ROW_BLOCK = 96;  // rows of x that one thread takes: they stay in its second-level cache

inline int64_t padded(int64_t rows) { return rows; }  // what is read

// sums [rows][PANEL] of `rows` <= ROWS rows from `first` on, and 16 columns.
template <Format FORMAT, int ROWS = MOST_ROWS<FORMAT>>
inline void multiply_rows(const Rows& x, int64_t first, int64_t rows, const Linear& w, const uint8_t* columns, bool unpacked, const uint16_t* scales, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return multiply_rows<FORMAT, ROWS - 1>(x, first, rows, w, columns, unpacked, scales, sums);
    }
    multiply<FORMAT, ROWS>(x.data + first * row_bytes(w), x.scales + first * w.groups(), w, columns, unpacked, scales, sums);
}

// `epilogue(row, column, low, high)` gets the columns `column` .. `column` + 31 of one row.
template <Format FORMAT, class Epilogue>
void linear_as(const Rows& x, const Linear& w, const Epilogue& epilogue) {
    if (!x.m) return;
    static thread_local Buffer<uint8_t> buffer;
    constexpr int64_t most = MOST_ROWS<FORMAT>;
    const int64_t panels = w.n / PANEL, blocks = (x.m + ROW_BLOCK - 1) / ROW_BLOCK;
    const bool unpacked = x.m >= UNPACK_ROWS;
    alignas(64) float sums[most * PANEL];
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < panels * blocks; ++item) {
        const int64_t panel = item % panels, begin = item / panels * ROW_BLOCK, column = panel * PANEL;
        const int64_t end = std::min(begin + ROW_BLOCK, x.m);
        const uint8_t* halves[2] = {w.packed + panel * w.panel_bytes(), w.packed + panel * w.panel_bytes() + w.panel_bytes() / 2};
        if (unpacked) {
            uint8_t* to = buffer.take(2, unpacked_bytes(w));
            for (int half = 0; half < 2; ++half, to += unpacked_bytes(w)) halves[half] = unpack<FORMAT>(halves[half], w.k, to);
        }
        const Floats bias[2] = {w.bias ? load(w.bias + column) : zero(), w.bias ? load(w.bias + column + LANES) : zero()};
        for (int64_t row = begin; row < end; row += most) {
            const int64_t rows = std::min(end - row, most);
            for (int half = 0; half < 2; ++half)
                multiply_rows<FORMAT>(x, row, rows, w, halves[half], unpacked, w.panel_scales(panel) + half * LANES, sums + half * LANES);
            for (int64_t r = 0; r < rows; ++r)
                epilogue(row + r, column, add(load(sums + r * PANEL), bias[0]), add(load(sums + r * PANEL + LANES), bias[1]));
        }
    }
}

}  // namespace shoplm
