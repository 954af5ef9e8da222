// The most likely token of each row, without a table of rounded logits.
//
// A few rows are bound by memory. With a head in bf16, products of bytes, half as much to read, then say which panels of
// tokens can hold the best one, and only those are multiplied in bf16. With W' the bytes' values,
//
//   |W'_i x' - W_i x| <= |W'_i - W_i| |x| + |W'_i| |x' - x|
//
// by Cauchy and Schwarz. A row's few large values would make x' - x large, so x is split in two rows of bytes, the
// second of what the first leaves. The bf16 products are those of many rows, to the last bit.
#pragma once

#include <limits>

#include "products.h"

namespace shoplm {

constexpr int64_t SCREEN_PARTS = 2;    // rows of bytes that stand for one of x
constexpr int64_t SCREENED_ROWS = 4;   // so few are screened: of 6 rows, all in bf16 took as long
constexpr int64_t GREEDY_ROWS = 32;    // of x, at a time
constexpr int64_t TOKEN_BLOCK = 1024;  // tokens that one thread looks through at a time

struct Greedy {
    Linear w;
    Linear screen;        // `w` in 8 bits; `packed` null: none
    const float* errors;  // [n / 32]: of each panel, the largest norm of a row of screen - w
    int64_t tokens;
    float norm;  // the largest of a row of the screen
};

struct Candidate { float value; int64_t token; };

constexpr float LEAST = -std::numeric_limits<float>::infinity();

// The largest that is a number.
inline float largest_of(const float* values, int64_t count) {
    Floats most = splat(LEAST);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = larger(load(values + i), most);
    float best = largest(most);
    for (; i < count; ++i) best = std::max(best, values[i]);
    return best;
}

// The first of the largest of logits [count] that are numbers, which are of the tokens from `begin` on.
inline Candidate best_of(const float* logits, int64_t begin, int64_t count) {
    const float most = largest_of(logits, count);
    for (int64_t i = 0; i < count; ++i)
        if (logits[i] == most) return {most, begin + i};
    return {LEAST, 0};
}

// The best of each row's candidates [m, count]; where none is a number, the first token.
inline void choose(const Candidate* candidates, int64_t m, int64_t count, int64_t* tokens) {
    for (int64_t row = 0; row < m; ++row) {
        Candidate best{LEAST, 0};
        for (const Candidate* at = candidates + row * count; at != candidates + (row + 1) * count; ++at)
            if (at->value > best.value) best = *at;
        tokens[row] = best.token;
    }
}

struct GreedyScratch {
    Buffer<float> wide, logits, maxima;
    Buffer<GroupScale> scales;
    Buffer<uint8_t> rows, screened;
    Buffer<Candidate> candidates;
    Loops loops;
};

// All logits, then the largest.
inline void greedy_of_all(const Greedy& head, const bf16* x, int64_t m, int64_t* tokens, int64_t threads, GreedyScratch& scratch) {
    const Linear& w = head.w;
    const int64_t blocks = (head.tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    float *widened = scratch.wide.take(m, w.k), *logits = scratch.logits.take(m, w.n);
    GroupScale* scales = scratch.scales.take(m, w.groups());
    const RowSpace to{scratch.rows.take(padded(m), row_bytes(w)), scales, nullptr};
    Candidate* candidates = scratch.candidates.take(m, blocks);
    Loop* loops = scratch.loops.take(LOOPS);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Crew crew(loops, threads);
        const Rows rows = bf16_rows(x, m, w, widened, to, crew);
        linear(rows, w, crew, stored(logits, w.n));
        crew.divide(m * blocks, [&](int64_t item) {
            const int64_t begin = item % blocks * TOKEN_BLOCK, count = std::min(TOKEN_BLOCK, head.tokens - begin);
            candidates[item] = best_of(logits + item / blocks * w.n + begin, begin, count);
        });
    }
    choose(candidates, m, blocks, tokens);
}

// One row of x as SCREEN_PARTS rows of bytes.
inline void put_parts(float* x, const Linear& screen, uint8_t* to, GroupScale* scales) {
    put_row(x, 1.f, nullptr, screen.k, screen, to, scales);
    const int8_t* rounded = reinterpret_cast<const int8_t*>(to);
    for (int64_t i = 0; i < screen.k; ++i) x[i] -= scales[i / screen.group].scale * static_cast<float>(rounded[i]);
    put_row(x, 1.f, nullptr, screen.k, screen, to + row_bytes(screen), scales + screen.groups());
}

// What is added to a panel's error times |x|: for the rounding of x, by half a step of a group each time, and of sums.
inline float rest_error(const Greedy& head, const GroupScale* scales, float norm) {
    constexpr float SUMS = 4e-5f;  // of fp32, in a few thousand products
    float rounding = 0.f;
    for (int64_t group = 0; group < head.screen.groups(); ++group) {
        const float half = scales[head.screen.groups() + group].scale / 2.f;
        rounding += half * half * static_cast<float>(head.screen.group);
    }
    return 2.f * head.norm * (std::sqrt(rounding) + SUMS * norm);
}

// The panels that can hold the best token, then the best of those.
inline void greedy_by_screen(const Greedy& head, const bf16* x, int64_t m, int64_t* tokens, int64_t threads, GreedyScratch& scratch) {
    const Linear &w = head.w, &screen = head.screen;
    const int64_t panels = w.n / PANEL, part_bytes = SCREEN_PARTS * row_bytes(screen), groups = SCREEN_PARTS * screen.groups();
    float *widened = scratch.wide.take(2 * m, w.k), *parts = widened + m * w.k;
    float *logits = scratch.logits.take(m * SCREEN_PARTS, w.n), *maxima = scratch.maxima.take(m, panels);
    GroupScale* scales = scratch.scales.take(m, groups);
    const RowSpace to{scratch.rows.take(padded(m), row_bytes(w)), scales, nullptr};
    uint8_t* screened = scratch.screened.take(padded(m * SCREEN_PARTS), row_bytes(screen));
    Candidate* candidates = scratch.candidates.take(m, panels);
    Loop* loops = scratch.loops.take(LOOPS);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Crew crew(loops, threads);
        const Rows rows = bf16_rows(x, m, w, widened, to, crew);
        crew.divide(m, [&](int64_t row) {
            std::copy_n(widened + row * w.k, w.k, parts + row * w.k);
            put_parts(parts + row * w.k, screen, screened + row * part_bytes, scales + row * groups);
        });
        linear(Rows{screened, scales, m * SCREEN_PARTS}, screen, crew, stored(logits, w.n));
        crew.divide(m * panels, [&](int64_t item) {
            const int64_t row = item / panels, column = item % panels * PANEL, count = std::min(PANEL, head.tokens - column);
            float* at = logits + row * SCREEN_PARTS * w.n + column;
            for (int64_t i = 0; i < PANEL; ++i) at[i] += at[w.n + i];
            maxima[item] = largest_of(at, count);
        });
        crew.each(m, 1, [&](int64_t row) {  // from largest products to what the best of a panel can be at most
            const float norm = std::sqrt(sum_of_squares(widened + row * w.k, w.k)), rest = rest_error(head, scales + row * groups, norm);
            float* most = maxima + row * panels;
            float reached = LEAST;
            for (int64_t panel = 0; panel < panels; ++panel) reached = std::max(reached, most[panel] - head.errors[panel] * norm);
            for (int64_t panel = 0; panel < panels; ++panel)
                candidates[row * panels + panel] = {most[panel] + head.errors[panel] * norm + rest < reached ? LEAST : 0.f, 0};  // a NaN: 0
        });
        crew.divide(m * panels, [&](int64_t item) {
            if (candidates[item].value == LEAST) return;
            alignas(64) float sums[PANEL];
            const int64_t panel = item % panels, column = panel * PANEL;
            multiply_panel(rows, item / panels, w, panel, sums);
            candidates[item] = best_of(sums, column, std::min(PANEL, head.tokens - column));
        });
    }
    choose(candidates, m, panels, tokens);
}

// `tokens` [m] of rows x [m, k]: the token of the largest logit, the first of equal ones.
inline void run_greedy(const Greedy& head, const bf16* x, int64_t m, int64_t* tokens, int64_t threads) {
    static GreedyScratch scratch;
    for (int64_t row = 0; row < m; row += GREEDY_ROWS) {
        const int64_t rows = std::min(GREEDY_ROWS, m - row);
        const bool few = head.screen.packed && rows <= SCREENED_ROWS;
        (few ? greedy_by_screen : greedy_of_all)(head, x + row * head.w.k, rows, tokens + row, threads, scratch);
    }
}

}  // namespace shoplm
