// One step of a decoder: all layers in one call, threads kept together over the whole of it.
//
// The residual stream is fp32; rows of a product are bf16, or int8 with a scale per row where the weights are int8.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>

#include "attention.h"
#include "linear.h"

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
    bf16 *keys, *values;         // the pool, all layers
    int64_t count, hidden, middle, heads, kv_heads, head_dim, page_size, layer_elements;
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
    Buffer<float> residual, projected, product;
    Buffer<GroupScale> scales;
    Buffer<bf16> queries, attended;
    Buffer<uint8_t> rows;
};

inline int64_t padded(int64_t rows) { return (rows + PANEL - 1) / PANEL * PANEL; }  // what products read

// One row in the format that the next product takes. `weight` null: ones.
inline void put_bf16(const float* from, float factor, const float* weight, int64_t size, bf16* to) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < size; i += TILE) {
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(from + i), by);
        store_bf16(to + i, weight ? _mm512_mul_ps(value, _mm512_loadu_ps(weight + i)) : value);
    }
}

inline void put_int8(const float* from, float factor, const float* weight, int64_t size, int64_t group, uint8_t* to, GroupScale* scales) {
    const __m512 by = _mm512_set1_ps(factor);
    auto at = [&](int64_t i) {
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(from + i), by);
        return weight ? _mm512_mul_ps(value, _mm512_loadu_ps(weight + i)) : value;
    };
    for (int64_t begin = 0; begin < size; begin += group, ++scales) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t i = begin; i < begin + group; i += TILE) most = _mm512_max_ps(most, _mm512_abs_ps(at(i)));
        const float largest = std::max(_mm512_reduce_max_ps(most), 1e-20f);
        const __m512 inverse = _mm512_set1_ps(127.f / largest);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = begin; i < begin + group; i += TILE) {
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(at(i), inverse));
            sum = _mm512_add_epi32(sum, rounded);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(rounded));
        }
        *scales = {largest / 127.f, static_cast<float>(_mm512_reduce_add_epi32(sum))};
    }
}

inline float inverse_rms(const float* from, int64_t size, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += TILE) {
        const __m512 x = _mm512_loadu_ps(from + i);
        sum = _mm512_fmadd_ps(x, x, sum);
    }
    return 1.f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(size) + epsilon);
}

// RMSNorm of rows [m, size], as rows for `next`. `weight` null: no norm.
inline Rows norm_rows(const float* from, int64_t m, int64_t size, const float* weight, float epsilon, const Linear& next, uint8_t* to, GroupScale* scales) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < m; ++row) {
        const float* at = from + row * size;
        const float factor = weight ? inverse_rms(at, size, epsilon) : 1.f;
        uint8_t* target = to + row * next.row_bytes();
        if (next.format == BF16) put_bf16(at, factor, weight, size, reinterpret_cast<bf16*>(target));
        else put_int8(at, factor, weight, size, next.group, target, scales + row * next.groups());
    }
    return {to, scales, m};
}

// Norms, turns and scales a head; `to` may be bf16 anywhere.
inline void turn_head(const Model& model, const float* from, const float* norm, const float* cosine, const float* sine, float scale, bf16* to) {
    const int64_t d = model.head_dim, half = d / 2;
    const __m512 factor = _mm512_set1_ps((norm ? inverse_rms(from, d, model.epsilon) : 1.f) * scale);
    for (int64_t i = 0; i < half; i += TILE) {
        __m512 a = _mm512_mul_ps(_mm512_loadu_ps(from + i), factor), b = _mm512_mul_ps(_mm512_loadu_ps(from + half + i), factor);
        if (norm) {
            a = _mm512_mul_ps(a, _mm512_loadu_ps(norm + i));
            b = _mm512_mul_ps(b, _mm512_loadu_ps(norm + half + i));
        }
        if (cosine) {
            const __m512 c = _mm512_loadu_ps(cosine + i), s = _mm512_loadu_ps(sine + i);
            const __m512 turned = _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c));
            b = _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c));
            a = turned;
        }
        store_bf16(to + i, a);
        store_bf16(to + half + i, b);
    }
}

// Queries to `queries`, keys and values to the pool.
inline void place_heads(const Model& model, const Layer& layer, const Step& step, const Pool& pool, const float* projected, bf16* queries) {
    const int64_t d = model.head_dim, heads = model.heads, kv_heads = model.kv_heads, half = d / 2;
    const int64_t columns = layer.qkv.n;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.token_count; ++token) {
        const float* from = projected + token * columns;
        const float* cosine = layer.uses_rope ? model.cosine + step.positions[token] * half : nullptr;
        const float* sine = layer.uses_rope ? model.sine + step.positions[token] * half : nullptr;
        for (int64_t head = 0; head < heads; ++head)
            turn_head(model, from + head * d, layer.query_norm, cosine, sine, model.query_scale, queries + (token * heads + head) * d);
        const int64_t page = step.slots[token] / pool.page_size, offset = step.slots[token] % pool.page_size;
        for (int64_t head = 0; head < kv_heads; ++head) {
            turn_head(model, from + (heads + head) * d, layer.key_norm, cosine, sine, 1.f, const_cast<bf16*>(pool.key_block(page, head, offset)));
            bf16* values = const_cast<bf16*>(pool.value_block(page, head, offset)) + offset % TILE;
            const float* value = from + (heads + kv_heads + head) * d;
            alignas(64) bf16 rounded[TILE];
            for (int64_t i = 0; i < d; i += TILE) {
                store_bf16(rounded, _mm512_loadu_ps(value + i));
                for (int64_t j = 0; j < TILE; ++j) values[(i + j) * TILE] = rounded[j];
            }
        }
    }
}

struct Work { int64_t row, head, first; };

inline void attend(const Model& model, const Layer& layer, const Step& step, const Pool& pool, const std::vector<Work>& work, const bf16* queries, bf16* output) {
    static thread_local std::vector<float> scratch;
    Attention attention{pool, nullptr, step.pages, step.own_slots, step.masks, step.positions, queries, output, model.heads, layer.window};
    use_attention_tiles();
#pragma omp for schedule(dynamic, 4)
    for (size_t index = 0; index < work.size(); ++index) {
        attention.row = step.rows + work[index].row;
        attention.block(work[index].head, work[index].first, scratch);
    }
    _tile_release();
}

inline std::vector<Work> attention_work(const Model& model, const Step& step) {
    std::vector<Work> work;
    const int64_t group = model.heads / model.kv_heads;
    for (int64_t row = 0; row < step.row_count; ++row)
        for (int64_t first = 0; first < step.rows[row].query_len * group; first += TILE)
            for (int64_t head = 0; head < model.kv_heads; ++head) work.push_back({row, head, first});
    return work;
}

// residual += x W^T
inline void add_product(const Rows& x, const Linear& w, int64_t columns, float* residual) {
    linear(x, w, [=](int64_t row, int64_t column, __m512 low, __m512 high) {
        float* at = residual + row * columns + column;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), low));
        if (column + TILE < columns) _mm512_storeu_ps(at + TILE, _mm512_add_ps(_mm512_loadu_ps(at + TILE), high));
    });
}

inline __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.f), e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_div_ps(_mm512_mul_ps(x, _mm512_mask_blend_ps(positive, e, one)), _mm512_add_ps(one, e));
}

void run(const Model& model, const Step& step) {
    static Scratch scratch;  // one engine loop per process
    const int64_t tokens = step.token_count, hidden = model.hidden, middle = model.middle, widest = std::max(hidden, std::max(middle, model.heads * model.head_dim));
    const int64_t attended_size = model.heads * model.head_dim;
    float* residual = scratch.residual.take(tokens, hidden);
    float* projected = scratch.projected.take(tokens, model.layers[0].qkv.n);
    GroupScale* scales = scratch.scales.take(tokens, widest / INT4_GROUP);
    float* product = scratch.product.take(tokens, std::max(middle, attended_size));
    bf16* queries = scratch.queries.take(tokens, attended_size);
    bf16* attended = scratch.attended.take(padded(tokens), attended_size);
    uint8_t* rows = scratch.rows.take(padded(tokens), widest * 2);
    const std::vector<Work> work = attention_work(model, step);
#pragma omp parallel num_threads(static_cast<int>(step.threads))
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t i = 0; i < hidden; i += TILE)
                _mm512_storeu_ps(residual + token * hidden + i, load_bf16(model.embedding + step.tokens[token] * hidden + i));
        for (int64_t index = 0; index < model.count; ++index) {
            const Layer& layer = model.layers[index];
            const Pool pool{model.keys + index * model.layer_elements, model.values + index * model.layer_elements, model.kv_heads, model.page_size, model.head_dim};
            Rows x = norm_rows(residual, tokens, hidden, layer.input_norm, model.epsilon, layer.qkv, rows, scales);
            const int64_t columns = layer.qkv.n;
            linear(x, layer.qkv, [=](int64_t row, int64_t column, __m512 low, __m512 high) {
                _mm512_storeu_ps(projected + row * columns + column, low);
                _mm512_storeu_ps(projected + row * columns + column + TILE, high);
            });
            place_heads(model, layer, step, pool, projected, queries);
            attend(model, layer, step, pool, work, queries, attended);
            int64_t m = tokens;
            if (index + 1 == model.count) {  // nothing behind it is needed of the other tokens
                m = step.output_count;
#pragma omp single
                for (int64_t row = 0; row < m; ++row) {  // ascending: no row is overwritten before it is read
                    std::memmove(residual + row * hidden, residual + step.outputs[row] * hidden, sizeof(float) * hidden);
                    std::memmove(attended + row * attended_size, attended + step.outputs[row] * attended_size, sizeof(bf16) * attended_size);
                }
            }
            x = {reinterpret_cast<const uint8_t*>(attended), nullptr, m};
            if (layer.output.format != BF16) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < m * attended_size; i += TILE) _mm512_storeu_ps(product + i, load_bf16(attended + i));
                x = norm_rows(product, m, attended_size, nullptr, 0.f, layer.output, rows, scales);
            }
            add_product(x, layer.output, hidden, residual);
            x = norm_rows(residual, m, hidden, layer.mlp_norm, model.epsilon, layer.gate_up, rows, scales);
            linear(x, layer.gate_up, [=](int64_t row, int64_t column, __m512 gate, __m512 up) {
                _mm512_storeu_ps(product + row * middle + column / 2, _mm512_mul_ps(silu(gate), up));
            });
            x = norm_rows(product, m, middle, nullptr, 0.f, layer.down, rows, scales);
            add_product(x, layer.down, hidden, residual);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step.output_count; ++row)
            put_bf16(residual + row * hidden, inverse_rms(residual + row * hidden, hidden, model.epsilon), model.final_norm, hidden, step.result + row * hidden);
    }
}

void run_linear(const Linear& w, const bf16* x, int64_t m, int64_t columns, bf16* result, int64_t threads) {
    static Buffer<float> wide;
    static Buffer<GroupScale> scales;
    static Buffer<uint8_t> rows;
    float* widened = wide.take(m, w.k);
    GroupScale* row_scales = scales.take(m, w.groups());
    uint8_t* to = rows.take(padded(m), w.row_bytes());
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m * w.k; i += TILE) _mm512_storeu_ps(widened + i, load_bf16(x + i));
        const Rows from = norm_rows(widened, m, w.k, nullptr, 0.f, w, to, row_scales);
        linear(from, w, [=](int64_t row, int64_t column, __m512 low, __m512 high) {
            bf16* at = result + row * columns + column;
            const int64_t left = columns - column;
            const __m512 parts[2] = {low, high};
            for (int half = 0; half < 2; ++half) {
                const int64_t count = std::min<int64_t>(TILE, left - half * TILE);
                if (count <= 0) return;
                _mm256_mask_storeu_epi16(at + half * TILE, static_cast<__mmask16>((1u << count) - 1), round_bf16(parts[half]));
            }
        });
    }
}

}  // namespace shoplm

extern "C" {

// 0 where the system lets this process use tiles (Linux asks for a permission: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
int shoplm_allow_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 0 : 1; }

void shoplm_step(const shoplm::Model* model, const shoplm::Step* step) { shoplm::run(*model, *step); }

void shoplm_linear(const shoplm::Linear* w, const void* x, int64_t m, int64_t columns, void* result, int64_t threads) {
    shoplm::run_linear(*w, static_cast<const shoplm::bf16*>(x), m, columns, static_cast<shoplm::bf16*>(result), threads);
}
}
