// y = x W^T on AMX tiles, with an epilogue on the fp32 sums. Called by all threads of a parallel region; returns when
// all of them are done.
//
// W is packed as [n / 32][k / depth][2][16][16][depth / 16], depth being 32 (bf16) or 64 (integers) inputs a tile. Of
// 4-bit integers, the two tiles of a step share their bytes: the first has the low halves. x is bf16 or 8 bits.
#pragma once

#include <algorithm>

#include "crew.h"
#include "linear.h"
#include "tiles.h"

namespace shoplm {

constexpr int64_t ROW_BLOCK = 256;  // rows of x that one thread takes: they stay in its second-level cache
constexpr int64_t STEP_BYTES = 2048;  // of a panel: one step's two tiles
constexpr int64_t AHEAD = 8192;       // bytes that are fetched before they are needed

inline int64_t padded(int64_t rows) { return (rows + PANEL - 1) / PANEL * PANEL; }  // what is read

inline void fetch(const uint8_t* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD + at, _MM_HINT_T0);
}

// A macro: the tiles' numbers must be constants.
#define SHOPLM_MULTIPLY(sum, x, w)                                         \
    if constexpr (FORMAT == BF16) _tile_dpbf16ps(sum, x, w);               \
    else if constexpr (FORMAT == INT8) _tile_dpbssd(sum, x, w);            \
    else _tile_dpbsud(sum, x, w)

// Tiles for up to PANEL rows of x (no more rows than there are are multiplied and stored) and `depth` bytes of inputs.
inline void use_product_tiles(int64_t rows, int depth) {
    TileConfig config;
    const int first = static_cast<int>(rows < TILE ? rows : TILE), rest = static_cast<int>(rows > PANEL ? TILE : rows - first);
    for (int tile : {0, 1}) config.set(tile, first, 64);
    for (int tile : {2, 3}) config.set(tile, rest ? rest : TILE, 64);
    for (int tile : {4, 5}) config.set(tile, depth / 4, 64);
    config.set(6, first, depth);
    config.set(7, rest ? rest : TILE, depth);
    _tile_loadconfig(&config);
}

// The sums [32, 32] of `steps` steps; `second`: rows 16 to 31, too.
template <Format FORMAT>
inline void multiply_steps(const uint8_t* x, int64_t row_bytes, bool second, const uint8_t* w, int64_t steps, bool prefetch, void* sums) {
    char* to = static_cast<char*>(sums);
    constexpr int64_t stride = PANEL * 4, half = TILE * 4;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, w += STEP_BYTES, x += 64) {
        if (prefetch) fetch(w, STEP_BYTES);
        _tile_loadd(4, w, 64);
        _tile_loadd(5, w + STEP_BYTES / 2, 64);
        _tile_loadd(6, x, row_bytes);
        SHOPLM_MULTIPLY(0, 6, 4);
        SHOPLM_MULTIPLY(1, 6, 5);
        if (!second) continue;
        _tile_loadd(7, x + TILE * row_bytes, row_bytes);
        SHOPLM_MULTIPLY(2, 7, 4);
        SHOPLM_MULTIPLY(3, 7, 5);
    }
    _tile_stored(0, to, stride);
    _tile_stored(1, to + half, stride);
    if (!second) return;
    _tile_stored(2, to + TILE * stride, stride);
    _tile_stored(3, to + TILE * stride + half, stride);
}
#undef SHOPLM_MULTIPLY

// Two tiles of bytes 0 to 15 a step.
inline void unpack_panel(const uint8_t* from, int64_t steps, uint8_t* to) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t step = 0; step < steps; ++step, from += STEP_BYTES / 2, to += STEP_BYTES) {
        fetch(from, STEP_BYTES / 2);
        for (int64_t at = 0; at < STEP_BYTES / 2; at += 64) {
            const __m512i both = _mm512_load_si512(from + at);
            _mm512_store_si512(to + at, _mm512_and_si512(both, low));
            _mm512_store_si512(to + STEP_BYTES / 2 + at, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
    }
}

// sums [32, 32] fp32 of integer products, group by group. `rows` of them are wanted, `scales` is of the first.
template <Format FORMAT>
inline void multiply_groups(const uint8_t* x, const GroupScale* row_scales, int64_t rows, const Linear& w, const uint8_t* tiles, const uint16_t* scales, bool prefetch, float* sums) {
    constexpr int64_t tables = FORMAT == INT4 ? 2 : 1;
    const int64_t groups = w.groups(), steps = FORMAT == INT4 ? 1 : w.group / 64;
    alignas(64) int32_t products[PANEL * PANEL];
    for (int64_t group = 0; group < groups; ++group, scales += tables * PANEL) {
        // A group of 4-bit integers is one half of a step: the upper or the lower rows of its tiles.
        const int64_t at = FORMAT == INT4 ? group / 2 * STEP_BYTES + group % 2 * (STEP_BYTES / 4) : group * steps * STEP_BYTES;
        multiply_steps<FORMAT>(x + group * w.group, w.k, rows > TILE, tiles + at, steps, prefetch, products);
        for (int64_t half = 0; half < PANEL; half += TILE) {
            const __m512 scale = load_fp16(scales + half);
            for (int64_t row = 0; row < rows; ++row) {
                const GroupScale by = row_scales[row * groups + group];
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(products + row * PANEL + half)), scale);
                if constexpr (FORMAT == INT4) value = _mm512_fmadd_ps(load_fp16(scales + PANEL + half), _mm512_set1_ps(by.sum), value);
                float* at = sums + row * PANEL + half;
                const __m512 before = group ? _mm512_load_ps(at) : _mm512_setzero_ps();
                _mm512_store_ps(at, _mm512_fmadd_ps(value, _mm512_set1_ps(by.scale), before));
            }
        }
    }
}

// sums [PANEL] of one row and one panel of a bf16 weight.
inline void multiply_panel(const Rows& x, int64_t row, const Linear& w, int64_t panel, float* sums) {
    alignas(64) float tile[PANEL * PANEL];
    use_product_tiles(1, 64);
    multiply_steps<BF16>(x.data + row * row_bytes(w), row_bytes(w), false, w.packed + panel * w.panel_bytes(), row_bytes(w) / 64, false, tile);
    _tile_release();
    std::copy_n(tile, PANEL, sums);
}

// `epilogue(row, column, low, high)` gets the columns `column` .. `column` + 31 of one row.
template <Format FORMAT, class Epilogue>
void linear_as(const Rows& x, const Linear& w, Crew& crew, const Epilogue& epilogue) {
    if (!x.m) return;
    static thread_local Buffer<uint8_t> unpacked;
    const int64_t bytes = row_bytes(w), steps = bytes / 64;
    const int64_t panels = w.n / PANEL, blocks = (x.m + ROW_BLOCK - 1) / ROW_BLOCK;
    use_product_tiles(x.m, FORMAT == INT4 ? INT4_GROUP : 64);
    alignas(64) float sums[PANEL * PANEL];
    crew.each(panels * blocks, 1, [&](int64_t item) {
        const int64_t panel = item % panels, begin = item / panels * ROW_BLOCK;
        const int64_t end = begin + ROW_BLOCK < x.m ? begin + ROW_BLOCK : x.m;
        const uint8_t* tiles = w.packed + panel * w.panel_bytes();
        if constexpr (FORMAT == INT4) {
            uint8_t* to = unpacked.take(steps, STEP_BYTES);
            unpack_panel(tiles, steps, to);
            tiles = to;
        }
        const int64_t column = panel * PANEL;
        const __m512 bias[2] = {w.bias ? _mm512_loadu_ps(w.bias + column) : _mm512_setzero_ps(),
                                w.bias ? _mm512_loadu_ps(w.bias + column + TILE) : _mm512_setzero_ps()};
        for (int64_t row = begin; row < end; row += PANEL) {
            const uint8_t* from = x.data + row * bytes;
            const int64_t rows = end - row < PANEL ? end - row : PANEL;
            const bool prefetch = FORMAT != INT4 && row == begin;
            if constexpr (FORMAT == BF16) multiply_steps<BF16>(from, bytes, rows > TILE, tiles, steps, prefetch, sums);
            else multiply_groups<FORMAT>(from, x.scales + row * w.groups(), rows, w, tiles, w.panel_scales(panel), prefetch, sums);
            for (int64_t r = 0; r < rows; ++r)
                epilogue(row + r, column, _mm512_add_ps(_mm512_load_ps(sums + r * PANEL), bias[0]),
                         _mm512_add_ps(_mm512_load_ps(sums + r * PANEL + TILE), bias[1]));
        }
    });
    _tile_release();
}

}  // namespace shoplm
