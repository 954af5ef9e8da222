// y = x W^T with vectors, with an epilogue on the fp32 sums. Called by all threads of a parallel region; returns when all
// of them are done.
#pragma once

#include <algorithm>

#include "crew.h"

#ifdef SHOPLM_AVX512
#include "products_avx512.h"
#else
#include "products_avx2.h"
#endif

namespace shoplm {

constexpr int64_t ROW_BLOCK = 96;  // rows of x that one thread takes: they stay in its second-level cache

inline int64_t padded(int64_t rows) { return rows; }  // what is read

// sums [rows][PANEL] of `rows` <= ROWS rows from `first` on.
template <Format FORMAT, int ROWS = MOST_ROWS<FORMAT>>
inline void multiply_rows(const Rows& x, int64_t first, int64_t rows, const Linear& w, Columns& columns, const uint16_t* scales, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return multiply_rows<FORMAT, ROWS - 1>(x, first, rows, w, columns, scales, sums);
    }
    multiply<FORMAT, ROWS>(x.data + first * row_bytes(w), x.scales + first * w.groups(), w, columns, scales, sums);
}

// sums [PANEL] of one row and one panel of a bf16 weight.
inline void multiply_panel(const Rows& x, int64_t row, const Linear& w, int64_t panel, float* sums) {
    Columns columns = columns_of<BF16>(w, panel, 1);
    multiply_rows<BF16, 1>(x, row, 1, w, columns, nullptr, sums);
}

// `epilogue(row, column, low, high)` gets the columns `column` .. `column` + 31 of one row.
template <Format FORMAT, class Epilogue>
void linear_as(const Rows& x, const Linear& w, Crew& crew, const Epilogue& epilogue) {
    if (!x.m) return;
    constexpr int64_t most = MOST_ROWS<FORMAT>;
    const int64_t panels = w.n / PANEL, blocks = (x.m + ROW_BLOCK - 1) / ROW_BLOCK;
    alignas(64) float sums[most * PANEL];
    const int64_t part = std::clamp<int64_t>(panels * blocks / (4 * crew.threads()), 1, 16);  // panels, one behind the other
    crew.each(panels * blocks, part, [&](int64_t item) {
        const int64_t panel = item % panels, begin = item / panels * ROW_BLOCK, column = panel * PANEL;
        const int64_t end = std::min(begin + ROW_BLOCK, x.m);
        Columns columns = columns_of<FORMAT>(w, panel, end - begin);
        const Floats bias[2] = {w.bias ? load(w.bias + column) : zero(), w.bias ? load(w.bias + column + LANES) : zero()};
        for (int64_t row = begin, rows, passes = passes_of(end - begin, most); passes; row += rows, --passes) {
            rows = (end - row + passes - 1) / passes;  // about as many in each pass: few rows hide no latency
            multiply_rows<FORMAT>(x, row, rows, w, columns, w.panel_scales(panel), sums);
            for (int64_t r = 0; r < rows; ++r)
                epilogue(row + r, column, add(load(sums + r * PANEL), bias[0]), add(load(sums + r * PANEL + LANES), bias[1]));
        }
    });
}

}  // namespace shoplm
