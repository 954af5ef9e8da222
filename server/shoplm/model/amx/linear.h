// y = x W^T on AMX tiles, bf16 or 8-bit integers, with an epilogue on the fp32 sums. Called by all threads of a
// parallel region; returns when all of them are done.
//
// W is packed as [n / 32][k / depth][2][16][16][depth / 16]: 32 output columns are a panel that streams from memory
// once, depth being 32 (bf16) or 64 (int8) inputs a tile. Every row is summed over k in the same order whatever else
// is in the batch.
#pragma once

#include "tiles.h"

namespace shoplm {

constexpr int64_t PANEL = 32;      // columns of W, and rows of x, that are multiplied together
constexpr int64_t ROW_BLOCK = 256; // rows of x that one thread takes: they stay in its second-level cache

struct Linear {
    const uint8_t* packed;
    const float* scales;  // [n] of an int8 weight; null: the weight is bf16
    const float* bias;    // [n]; null: none
    int64_t n;            // output columns, padded to PANEL
    int64_t k;            // inputs, a multiple of a tile's depth
};

// Rows of x in the weight's format. Reads go on to a multiple of PANEL rows.
struct Rows {
    const uint8_t* data;  // [m, k] bf16 or int8
    const float* scales;  // [m] of int8 rows
    int64_t m;
};

template <bool INT8>
inline void multiply_panel(const uint8_t* x, int64_t row_bytes, bool second, const uint8_t* w, int64_t steps,
                           bool prefetch, float* sums) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, w += 2048, x += 64) {
        if (prefetch)
            for (int line = 0; line < 2048; line += 64) _mm_prefetch(reinterpret_cast<const char*>(w) + 8192 + line, _MM_HINT_T0);
        _tile_loadd(4, w, 64);
        _tile_loadd(5, w + 1024, 64);
        _tile_loadd(6, x, row_bytes);
        if constexpr (INT8) { _tile_dpbssd(0, 6, 4); _tile_dpbssd(1, 6, 5); }
        else { _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5); }
        if (!second) continue;
        _tile_loadd(7, x + TILE * row_bytes, row_bytes);
        if constexpr (INT8) { _tile_dpbssd(2, 7, 4); _tile_dpbssd(3, 7, 5); }
        else { _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5); }
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + TILE, PANEL * 4);
    if (!second) return;
    _tile_stored(2, sums + TILE * PANEL, PANEL * 4);
    _tile_stored(3, sums + TILE * PANEL + TILE, PANEL * 4);
}

// `epilogue(row, column, low, high)` gets the columns `column` .. `column` + 31 of one row.
template <class Epilogue>
void linear(const Rows& x, const Linear& w, const Epilogue& epilogue) {
    const bool is_int8 = w.scales != nullptr;
    const int64_t row_bytes = w.k * (is_int8 ? 1 : 2), steps = row_bytes / 64;
    const int64_t panels = w.n / PANEL, blocks = (x.m + ROW_BLOCK - 1) / ROW_BLOCK;
    use_full_tiles();
    alignas(64) float sums[PANEL * PANEL];
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < panels * blocks; ++item) {
        const int64_t panel = item % panels, begin = item / panels * ROW_BLOCK;
        const int64_t end = begin + ROW_BLOCK < x.m ? begin + ROW_BLOCK : x.m;
        const uint8_t* weights = w.packed + panel * steps * 2048;
        const int64_t column = panel * PANEL;
        for (int64_t row = begin; row < end; row += PANEL) {
            const uint8_t* from = x.data + row * row_bytes;
            const bool second = row + TILE < end;
            if (is_int8) multiply_panel<true>(from, row_bytes, second, weights, steps, row == begin, sums);
            else multiply_panel<false>(from, row_bytes, second, weights, steps, row == begin, sums);
            const int64_t rows = end - row < PANEL ? end - row : PANEL;
            for (int64_t r = 0; r < rows; ++r) {
                __m512 part[2];
                for (int half = 0; half < 2; ++half) {
                    const float* at = sums + r * PANEL + half * TILE;
                    const int64_t c = column + half * TILE;
                    if (is_int8) {
                        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x.scales[row + r]), _mm512_loadu_ps(w.scales + c));
                        part[half] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), scale);
                    } else {
                        part[half] = _mm512_load_ps(at);
                    }
                    if (w.bias) part[half] = _mm512_add_ps(part[half], _mm512_loadu_ps(w.bias + c));
                }
                epilogue(row + r, column, part[0], part[1]);
            }
        }
    }
    _tile_release();
}

}  // namespace shoplm
