// One step of a decoder: all layers in one call, threads kept together over the whole of it.
//
// The residual stream is fp32. How products and attention are computed is a matter of the instructions compiled for.
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <mutex>

#ifdef __AMX_TILE__
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif
#include "attention_bytes.h"
#include "greedy.h"
#include "packing.h"
#include "products.h"

namespace shoplm {

struct Layer {
    Linear qkv, output, gate_up, down;  // gate_up: 16 columns of gate, the 16 of up, and so on
    const float *input_norm, *mlp_norm;
    const float *query_norm, *key_norm;  // [head_dim] or null
    int64_t window;                      // 0: none
    int64_t uses_rope;
};

struct Model {
    const Layer* layers;
    const bf16* embedding;
    const float* final_norm;
    const float *cosine, *sine;  // [positions, head_dim / 2]
    void *keys, *values;         // the pool, all layers
    float *key_scales, *value_scales;  // null: keys and values are bf16, else bytes
    int64_t count, hidden, middle, heads, kv_heads, head_dim, page_size, layer_elements;
    int64_t widest, rank;  // the largest of all products
    float epsilon, query_scale;
};

struct Step {
    const int64_t *tokens, *positions, *slots;
    const Row* rows;
    const int64_t *pages, *own_slots;
    const uint16_t* masks;
    const int64_t* outputs;  // tokens whose hidden state is wanted
    bf16* result;            // [output_count, hidden]
    int64_t token_count, row_count, output_count, threads;
};

struct Scratch {
    Buffer<float> residual, projected, product, low_rank;
    Buffer<GroupScale> scales;
    Buffer<Activation> queries, attended;
    Buffer<uint8_t> rows;
};

// Norms, turns and scales a head.
inline void turn_head(const Model& model, const float* from, const float* norm, const float* cosine, const float* sine, float scale, float* to) {
    const int64_t d = model.head_dim, half = d / 2;
    const Floats factor = splat((norm ? inverse_rms(from, d, model.epsilon) : 1.f) * scale);
    for (int64_t i = 0; i < half; i += LANES) {
        Floats a = multiply(load(from + i), factor), b = multiply(load(from + half + i), factor);
        if (norm) {
            a = multiply(a, load(norm + i));
            b = multiply(b, load(norm + half + i));
        }
        if (cosine) {
            const Floats c = load(cosine + i), s = load(sine + i);
            const Floats turned = multiply_subtract(b, s, multiply(a, c));
            b = multiply_add(a, s, multiply(b, c));
            a = turned;
        }
        store(to + i, a);
        store(to + half + i, b);
    }
}

template <class Number>
inline Pool<Number> pool_of(const Model& model, int64_t layer) {
    const int64_t numbers = layer * model.layer_elements, scales = numbers / model.head_dim;
    const bool scaled = model.key_scales != nullptr;
    return {static_cast<Number*>(model.keys) + numbers, static_cast<Number*>(model.values) + numbers,
            scaled ? model.key_scales + scales : nullptr, scaled ? model.value_scales + scales : nullptr,
            model.kv_heads, model.page_size, model.head_dim};
}

// Queries to `queries`, keys and values to the pool.
template <class Number>
inline void place_heads(const Model& model, const Layer& layer, const Step& step, const Pool<Number>& pool, const float* projected, Activation* queries, Crew& crew) {
    const int64_t d = model.head_dim, heads = model.heads, kv_heads = model.kv_heads, half = d / 2;
    const int64_t columns = layer.qkv.n;
    crew.divide(step.token_count, [&](int64_t token) {
        alignas(64) float turned[MOST_HEAD_DIM];
        const float* from = projected + token * columns;
        const float* cosine = layer.uses_rope ? model.cosine + step.positions[token] * half : nullptr;
        const float* sine = layer.uses_rope ? model.sine + step.positions[token] * half : nullptr;
        for (int64_t head = 0; head < heads; ++head) {
            turn_head(model, from + head * d, layer.query_norm, cosine, sine, model.query_scale, turned);
            for (int64_t i = 0; i < d; i += LANES) store_activations(queries + (token * heads + head) * d + i, load(turned + i));
        }
        const int64_t page = step.slots[token] / pool.page_size, offset = step.slots[token] % pool.page_size;
        for (int64_t head = 0; head < kv_heads; ++head) {
            turn_head(model, from + (heads + head) * d, layer.key_norm, cosine, sine, 1.f, turned);
            put_key(pool, turned, page, head, offset);
            put_value(pool, from + (heads + kv_heads + head) * d, page, head, offset);
        }
    });
}

struct Work { int64_t row, head, first; bool wanted; };  // wanted: a token's hidden state is, behind the last layer

template <class Number>
inline void attend(const Model& model, const Layer& layer, const Step& step, const Pool<Number>& pool, const std::vector<Work>& work, bool last, const Activation* queries, Activation* output, Crew& crew) {
    static thread_local std::vector<float> scratch;
    Attention attention{{nullptr, step.pages, step.own_slots, step.masks, step.positions, queries, output, model.heads, layer.window}};
    use_attention();
    crew.each(static_cast<int64_t>(work.size()), 4, [&](int64_t index) {
        if (last && !work[index].wanted) return;
        attention.row = step.rows + work[index].row;
        attention.block(pool, work[index].head, work[index].first, scratch);
    });
    leave_attention();
}

inline std::vector<Work> attention_work(const Model& model, const Step& step) {
    std::vector<Work> work;
    const int64_t group = model.heads / model.kv_heads;
    const int64_t* end = step.outputs + step.output_count;  // ascending
    for (int64_t row = 0; row < step.row_count; ++row) {
        const int64_t start = step.rows[row].query_start, queries = step.rows[row].query_len * group;
        for (int64_t first = 0; first < queries; first += LANES) {
            const int64_t last = std::min(first + LANES, queries) - 1;
            const int64_t* next = std::lower_bound(step.outputs, end, start + first / group);
            const bool wanted = next < end && *next <= start + last / group;
            for (int64_t head = 0; head < model.kv_heads; ++head) work.push_back({row, head, first, wanted});
        }
    }
    return work;
}

// residual += x W^T
inline void add_product(const Rows& x, const Linear& w, int64_t columns, float* residual, Crew& crew) {
    linear(x, w, crew, [=](int64_t row, int64_t column, Floats low, Floats high) {
        float* at = residual + row * columns + column;
        store(at, add(load(at), low));
        if (column + LANES < columns) store(at + LANES, add(load(at + LANES), high));
    });
}

void run(const Model& model, const Step& step) {
    static Scratch scratch;
    const int64_t tokens = step.token_count, hidden = model.hidden, middle = model.middle, attended_size = model.heads * model.head_dim;
    float* residual = scratch.residual.take(tokens, hidden);
    float* projected = scratch.projected.take(tokens, model.layers[0].qkv.n);
    GroupScale* scales = scratch.scales.take(tokens, model.widest / INT4_GROUP);
    float* product = scratch.product.take(tokens, std::max(middle, attended_size));
    Activation* queries = scratch.queries.take(tokens, attended_size);
    Activation* attended = scratch.attended.take(padded(tokens), attended_size);
    uint8_t* data = scratch.rows.take(padded(tokens), model.widest * static_cast<int64_t>(sizeof(Activation)));
    const RowSpace rows{data, scales, scratch.low_rank.take(tokens, model.rank)};
    const std::vector<Work> work = attention_work(model, step);
    static Loops all;
    Loop* loops = all.take(LOOPS * (model.count + 1));
#pragma omp parallel num_threads(static_cast<int>(step.threads))
    {
        Crew crew(loops, step.threads);
        crew.divide(tokens, [&](int64_t token) {
            for (int64_t i = 0; i < hidden; i += LANES)
                store(residual + token * hidden + i, load_bf16(model.embedding + step.tokens[token] * hidden + i));
        });
        for (int64_t index = 0; index < model.count; ++index) {
            const Layer& layer = model.layers[index];
            Rows x = norm_rows(residual, tokens, layer.input_norm, model.epsilon, layer.qkv, rows, crew);
            linear(x, layer.qkv, crew, stored(projected, layer.qkv.n));
            const bool last = index + 1 == model.count;  // nothing behind it is needed of other tokens than the outputs
            auto attention = [&](const auto& pool) {
                place_heads(model, layer, step, pool, projected, queries, crew);
                attend(model, layer, step, pool, work, last, queries, attended, crew);
            };
            if (model.key_scales) attention(pool_of<int8_t>(model, index));
            else attention(pool_of<bf16>(model, index));
            int64_t m = tokens;
            if (last) {
                m = step.output_count;
                crew.each(m, m, [&](int64_t row) {  // one thread, ascending: no row is overwritten before it is read
                    std::memmove(residual + row * hidden, residual + step.outputs[row] * hidden, sizeof(float) * hidden);
                    std::memmove(attended + row * attended_size, attended + step.outputs[row] * attended_size, sizeof(Activation) * attended_size);
                });
            }
            x = {reinterpret_cast<const uint8_t*>(attended), nullptr, m};
            if (layer.output.format != BF16 || layer.output.rank) {
                crew.divide(m * attended_size / LANES, [&](int64_t i) { store(product + i * LANES, load_activations(attended + i * LANES)); });
                x = norm_rows(product, m, nullptr, 0.f, layer.output, rows, crew);
            }
            add_product(x, layer.output, hidden, residual, crew);
            x = norm_rows(residual, m, layer.mlp_norm, model.epsilon, layer.gate_up, rows, crew);
            linear(x, layer.gate_up, crew, [=](int64_t row, int64_t column, Floats gate, Floats up) {
                store(product + row * middle + column / 2, multiply(silu(gate), up));
            });
            x = norm_rows(product, m, nullptr, 0.f, layer.down, rows, crew);
            add_product(x, layer.down, hidden, residual, crew);
        }
        crew.divide(step.output_count, [&](int64_t row) {
            put_floats(residual + row * hidden, inverse_rms(residual + row * hidden, hidden, model.epsilon), model.final_norm, hidden, step.result + row * hidden);
        });
    }
}

void run_linear(const Linear& w, const bf16* x, int64_t m, int64_t columns, bf16* result, int64_t threads) {
    static Buffer<float> wide;
    static Buffer<GroupScale> scales;
    static Buffer<uint8_t> rows;
    static Buffer<float> low_rank;
    float* widened = wide.take(m, w.given());
    const RowSpace to{rows.take(padded(m), row_bytes(w)), scales.take(m, w.groups()), low_rank.take(m, w.rank)};
    static Loops all;
    Loop* loops = all.take(LOOPS);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Crew crew(loops, threads);
        const Rows from = bf16_rows(x, m, w, widened, to, crew);
        linear(from, w, crew, [=](int64_t row, int64_t column, Floats low, Floats high) {
            bf16* to = result + row * columns + column;
            alignas(64) bf16 padded[PANEL];
            const bool whole = column + PANEL <= columns;
            store_bf16(whole ? to : padded, low);
            store_bf16(whole ? to + LANES : padded + LANES, high);
            if (!whole) std::memcpy(to, padded, sizeof(bf16) * (columns - column));
        });
    }
}

// Of all calls that use memory which the library keeps between calls. Python lets go of its own lock meanwhile.
std::mutex one_call;

}  // namespace shoplm

extern "C" {

// 0 where the system lets this process use what the library was compiled for (tiles ask Linux for a permission:
// ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
int shoplm_allow() {
#ifdef __AMX_TILE__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 0 : 1;
#else
    return 0;
#endif
}

void shoplm_step(const shoplm::Model* model, const shoplm::Step* step) {
    const std::lock_guard<std::mutex> lock(shoplm::one_call);
    shoplm::run(*model, *step);
}

void shoplm_linear(const shoplm::Linear* w, const void* x, int64_t m, int64_t columns, void* result, int64_t threads) {
    const std::lock_guard<std::mutex> lock(shoplm::one_call);
    shoplm::run_linear(*w, static_cast<const shoplm::bf16*>(x), m, columns, static_cast<shoplm::bf16*>(result), threads);
}

void shoplm_greedy(const shoplm::Greedy* head, const void* x, int64_t m, int64_t* tokens, int64_t threads) {
    const std::lock_guard<std::mutex> lock(shoplm::one_call);
    shoplm::run_greedy(*head, static_cast<const shoplm::bf16*>(x), m, tokens, threads);
}

void shoplm_pack(const shoplm::Packing* packing, int64_t threads) {
    packing->wide ? shoplm::run_packing<float>(*packing, threads) : shoplm::run_packing<shoplm::bf16>(*packing, threads);
}
}
