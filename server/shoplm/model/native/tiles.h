// Tiles of AMX. Every thread configures its own before it uses them: products and attention differ.
#pragma once

#include "vectors.h"

namespace shoplm {

constexpr int TILE = LANES;  // rows of a tile, and 32-bit columns

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int tile_rows, int bytes) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

}  // namespace shoplm
