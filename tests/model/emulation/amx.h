// Tiles. Rows and columns outside the configuration are neither read nor written.
#pragma once

#include "avx512.h"

namespace emulated {

struct Tile {
    int rows, bytes;
    alignas(64) uint8_t data[16][64];
};
struct Tiles { bool configured; Tile all[8]; };
inline thread_local Tiles tiles;

inline Tile& tile(int number) {
    if (!tiles.configured || !tiles.all[number].rows) fault("a tile is used that is not configured");
    return tiles.all[number];
}

// `add`(8 sums, x, w, k) adds the products of `k` times four bytes at `x` and 32 bytes of as many rows of `w`.
template <class Add>
inline void multiply_tiles(int to, int a, int b, const Add& add) {
    Tile &sums = tile(to), &x = tile(a), &w = tile(b);
    if (to == a || to == b || a == b) fault("a tile is used twice in a product");
    if (sums.rows != x.rows || sums.bytes != w.bytes || x.bytes != 4 * w.rows || sums.bytes % 4) fault("tiles do not fit each other");
    for (int row = 0; row < sums.rows; ++row) {
        __m256i result[2];
        for (int half : {0, 1}) result[half] = add(get<__m256i>(sums.data[row] + 32 * half), x.data[row], &w.data[0][32 * half], w.rows);
        std::memcpy(sums.data[row], result, static_cast<size_t>(sums.bytes));
    }
}
template <bool SIGNED>
inline void multiply_bytes(int to, int a, int b) {
    multiply_tiles(to, a, b, [](__m256i sums, const uint8_t* x, const uint8_t* w, int steps) {
        for (int k = 0; k < steps; ++k)
            sums = add_bytes<SIGNED>(sums, get<__m256i>(w + 64 * k), _mm256_set1_epi32(get<int32_t>(x + 4 * k)));
        return sums;
    });
}

}  // namespace emulated

namespace shoplm {

inline void _tile_release() { tiles = {}; }
inline void _tile_loadconfig(const void* from) {
    struct { uint8_t palette, start_row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config;
    static_assert(sizeof config == 64);
    std::memcpy(&config, from, sizeof config);
    _tile_release();
    if (config.palette == 0) return;
    if (config.palette != 1 || config.start_row) fault("the configuration of tiles is none of palette 1");
    for (int i = 0; i < 14; ++i)
        if (config.reserved[i]) fault("a reserved byte of the configuration of tiles is not 0");
    for (int i = 0; i < 16; ++i) {
        const int rows = config.rows[i], bytes = config.bytes[i];
        if (rows > (i < 8 ? 16 : 0) || bytes > 64 || !rows != !bytes) fault("there is no tile of such a size");
        if (i < 8) tiles.all[i].rows = rows, tiles.all[i].bytes = bytes;
    }
    tiles.configured = true;
}
inline void _tile_zero(int number) { std::memset(tile(number).data, 0, sizeof Tile::data); }
inline void _tile_loadd(int number, const void* from, int64_t stride) {
    Tile& to = tile(number);
    _tile_zero(number);
    const char* at = static_cast<const char*>(from);
    for (int row = 0; row < to.rows; ++row, at += stride) std::memcpy(to.data[row], at, static_cast<size_t>(to.bytes));
}
inline void _tile_stored(int number, void* to, int64_t stride) {
    const Tile& from = tile(number);
    char* at = static_cast<char*>(to);
    for (int row = 0; row < from.rows; ++row, at += stride) std::memcpy(at, from.data[row], static_cast<size_t>(from.bytes));
}
inline void _tile_dpbf16ps(int to, int a, int b) {  // even and odd inputs have sums of their own
    multiply_tiles(to, a, b, [](__m256i sums, const uint8_t* x, const uint8_t* w, int steps) {
        __m256 even = _mm256_setzero_ps(), odd = even;
        for (int k = 0; k < steps; ++k) {
            const __m256i pair = _mm256_set1_epi32(get<int32_t>(x + 4 * k)), row = get<__m256i>(w + 64 * k);
            even = _mm256_fmadd_ps(first_of_pairs(pair), first_of_pairs(row), even);
            odd = _mm256_fmadd_ps(second_of_pairs(pair), second_of_pairs(row), odd);
        }
        return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(sums), _mm256_add_ps(even, odd)));
    });
}
inline void _tile_dpbssd(int to, int a, int b) { multiply_bytes<true>(to, a, b); }
inline void _tile_dpbsud(int to, int a, int b) { multiply_bytes<false>(to, a, b); }

}  // namespace shoplm
