// Attention over pages, in place: no copies, no padding. Formula: softmax(q K^T) V per head, queries scaled beforehand.
// All keys of a query are scored before the softmax, so that its result depends on nothing else in the batch.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace shoplm {

constexpr int64_t MOST_HEAD_DIM = 256;

// One row of the batch. All int64: Python fills an array of them.
struct Row {
    int64_t query_start, query_len;
    int64_t kv_len;        // keys that lie in the pages
    int64_t past;          // position of the first query; the same for all lanes
    int64_t lanes;         // 1: queries are lanes, each seeing all keys in the pages and its own
    int64_t pages;         // index of the first page in the page list
    int64_t own, own_steps;  // lanes: index in the list of own slots [query_len, own_steps]
    int64_t masked, mask;    // 1: index in the list of masks [blocks of 16 queries, kv_len], a bit per query: do not read
};

// Keys and values of one layer: [page][kv_head] and then `page_size` * `head_dim` numbers, by token or in blocks of 16
// tokens [page_size / 16][head_dim][16]; AVX-512's form says how it orders pairs within them. Numbers of a byte are times
// their token's scale [page][kv_head][page_size].
template <class Number>
struct Pool {
    Number *keys, *values;
    float *key_scales, *value_scales;  // null: none
    int64_t kv_heads, page_size, head_dim;

    int64_t scale_at(int64_t page, int64_t head, int64_t offset) const { return (page * kv_heads + head) * page_size + offset; }
    int64_t token_at(int64_t page, int64_t head, int64_t offset) const { return scale_at(page, head, offset) * head_dim; }
    int64_t block_at(int64_t page, int64_t head, int64_t offset) const { return token_at(page, head, offset / LANES * LANES); }
};

// `from` [head_dim] as one column of a block.
inline void put_column(const float* from, int64_t head_dim, int64_t offset, bf16* block) {
    alignas(64) bf16 rounded[LANES];
    for (int64_t i = 0; i < head_dim; i += LANES) {
        store_bf16(rounded, load(from + i));
        for (int64_t j = 0; j < LANES; ++j) block[(i + j) * LANES + offset % LANES] = rounded[j];
    }
}

inline void put_token(const float* from, int64_t head_dim, bf16* to) {
    for (int64_t i = 0; i < head_dim; i += LANES) store_bf16(to + i, load(from + i));
}

struct AttentionInputs {
    const Row* row;
    const int64_t* pages;
    const int64_t* own_slots;
    const uint16_t* masks;
    const int64_t* positions;   // of the tokens; a masked row's are not where its keys are kept
    const Activation* queries;  // [tokens, heads, head_dim]
    Activation* output;         // the same shape
    int64_t heads;
    int64_t window;             // keys that a query sees at most; 0: all before it
};

}  // namespace shoplm
