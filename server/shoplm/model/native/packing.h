// Weights to the order in which products read them, rounded to integers where the format has them.
//
// 8 bits are symmetric, 4 bits have a lowest value beside their scale. Both are those of the group's numbers alone.
#pragma once

#include <cmath>

#include "linear.h"

namespace shoplm {

constexpr float LEAST_SCALE = 0x1p-14f;  // the smallest that fp16 holds with all its digits
constexpr int64_t LONGEST_GROUP = 64;
constexpr int64_t WORD = 4;  // that lie together: of one column, as many inputs as fit
constexpr int64_t TILE_STEPS = 16;

struct Packing {
    const void* weight;  // [n, k], bf16 or fp32
    uint8_t* packed;     // as `Linear` has them
    uint16_t* scales;
    float* errors;  // [n]: norms of what 8 bits have changed of a row; null: not asked for
    int64_t n, k, group, format;
    int64_t wide;  // whether `weight` is fp32
};

inline uint16_t to_half(float x) { return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), 0))); }
inline float from_half(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

// Where a step of a panel's column lies, in steps; `steps` are a row's. Tiles hold 16 steps of 16 columns.
inline int64_t place(int64_t panel, int64_t column, int64_t step, int64_t steps) {
#if defined(__AMX_TILE__)
    return ((panel * steps + step / TILE_STEPS * TILE_STEPS) * 2 + column / LANES * TILE_STEPS + step % TILE_STEPS) * LANES + column % LANES;
#elif defined(SHOPLM_AVX512)
    return (panel * steps + step) * PANEL + column;
#else
    return ((panel * 2 + column / LANES) * steps + step) * LANES + column % LANES;
#endif
}

// Two values of 4 bits share a byte: those of two tiles side by side, or of two steps.
struct HalfBytes { int64_t place; bool second; };
inline HalfBytes place_halves(int64_t panel, int64_t column, int64_t step, int64_t steps) {
#ifdef __AMX_TILE__
    return {(panel * steps + step) * LANES + column % LANES, column >= LANES};
#else
    return {place(panel, column, step / 2, steps / 2), step % 2 == 1};
#endif
}

// Rounds a group; returns its scale and, of 4 bits, its lowest value. Values beyond 127 scales there are none: a scale in
// fp16 is 1/2048 too small at most. The scale of a group with a NaN or an infinite number is none, so that no product of it is
// a number.
struct Grid { uint16_t scale, low; };
template <Format FORMAT, class Number>
inline Grid round_group(const Number* from, int64_t group, int8_t* values, float* squares) {
    Floats size = zero(), most = splat(-INFINITY), least = splat(-INFINITY);  // `least`: of the numbers' negatives
    for (int64_t i = 0; i < group; i += LANES) {
        const Floats x = load_numbers(from + i);
        size = larger_magnitude(size, x);
        if (FORMAT == INT8) continue;
        most = larger(most, x);
        least = larger(least, subtract(zero(), x));
    }
    const float furthest = largest_magnitude(size);
    const uint16_t low = FORMAT == INT4 ? to_half(-largest(least)) : 0;
    const float from_low = FORMAT == INT4 ? from_half(low) : 0.f;
    const float range = FORMAT == INT8 || !std::isfinite(furthest) ? furthest : largest(most) - from_low;
    const uint16_t scale = to_half(std::max(range / (FORMAT == INT4 ? 15.f : 127.f), LEAST_SCALE));
    const Floats by = splat(from_half(scale)), start = splat(from_low);
    Floats errors = zero();
    for (int64_t i = 0; i < group; i += LANES) {
        const Floats x = subtract(load_numbers(from + i), start);
        const Integers rounded = round_integers(divide(x, by));
        store_integers(values + i, rounded);
        const Floats error = multiply_subtract(to_floats(rounded), by, x);
        errors = multiply_add(error, error, errors);
    }
    if (FORMAT == INT4)
        for (int64_t i = 0; i < group; ++i) values[i] = std::clamp<int8_t>(values[i], 0, 15);
    *squares += sum(errors);
    return {scale, low};
}

template <Format FORMAT, class Number>
void pack_integers(const Packing& to, const Number* from, int64_t panel, int64_t column) {
    const int64_t row = panel * PANEL + column, groups = to.k / to.group, steps = to.k / WORD;
    float squares = 0.f;
    for (int64_t group = 0; group < groups; ++group) {
        alignas(64) int8_t values[LONGEST_GROUP];
        const Grid grid = round_group<FORMAT>(from + row * to.k + group * to.group, to.group, values, &squares);
        constexpr int64_t tables = FORMAT == INT4 ? 2 : 1;
        uint16_t* scales = to.scales + ((panel * groups + group) * tables) * PANEL + column;
        scales[0] = grid.scale;
        if (FORMAT == INT4) scales[PANEL] = grid.low;
        for (int64_t i = 0; i < to.group; i += WORD) {
            const int64_t step = (group * to.group + i) / WORD;
            uint32_t bytes, before;
            std::memcpy(&bytes, values + i, sizeof bytes);
            if (FORMAT == INT4) {
                const HalfBytes at = place_halves(panel, column, step, steps);
                uint8_t* target = to.packed + at.place * WORD;
                std::memcpy(&before, target, sizeof before);
                bytes = at.second ? before | bytes << 4 : bytes;
                std::memcpy(target, &bytes, sizeof bytes);
                continue;
            }
#if defined(SHOPLM_AVX512) && !defined(__AMX_TILE__)
            bytes ^= 0x80808080;  // its products take W without a sign
#endif
            std::memcpy(to.packed + place(panel, column, step, steps) * WORD, &bytes, sizeof bytes);
        }
    }
    if (to.errors) to.errors[row] = std::sqrt(squares);
}

template <class Number>
void pack_bf16(const Packing& to, const Number* from, int64_t panel, int64_t column) {
    const int64_t row = panel * PANEL + column, steps = to.k * static_cast<int64_t>(sizeof(bf16)) / WORD;
    for (int64_t i = 0; i < to.k; i += LANES) {
        alignas(64) bf16 values[LANES];
        store_bf16(values, load_numbers(from + row * to.k + i));
        for (int64_t j = 0; j < LANES; j += 2)
            std::memcpy(to.packed + place(panel, column, (i + j) / 2, steps) * WORD, values + j, WORD);
    }
}

template <class Number>
void run_packing(const Packing& packing, int64_t threads) {
    const Number* from = static_cast<const Number*>(packing.weight);
#pragma omp parallel for num_threads(static_cast<int>(threads))
    for (int64_t panel = 0; panel < packing.n / PANEL; ++panel)
        for (int64_t column = 0; column < PANEL; ++column) switch (packing.format) {
            case INT8: pack_integers<INT8>(packing, from, panel, column); break;
            case INT4: pack_integers<INT4>(packing, from, panel, column); break;
            default: pack_bf16(packing, from, panel, column);
        }
}

}  // namespace shoplm
