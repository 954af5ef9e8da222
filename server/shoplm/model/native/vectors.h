// Sixteen floats at a time: one register of AVX-512, or two of AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace shoplm {

using bf16 = uint16_t;
constexpr int LANES = 16;

#ifdef SHOPLM_AVX512

using Activation = bf16;  // of attention's queries and results, and of x where W is bf16
using Floats = __m512;
using Integers = int32_t __attribute__((vector_size(64)));  // as __m512i, GCC would copy sums in every step of a loop

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats to_floats(Integers x) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }        // a b + c
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats round_whole(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
// The larger of `most` and |x|, by their bits: a NaN is larger than all numbers. `most` has no sign.
inline Floats larger_magnitude(Floats most, Floats x) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), _mm512_castps_si512(magnitude(x))));
}
inline int32_t largest_bits(Floats x) { return _mm512_reduce_max_epi32(_mm512_castps_si512(x)); }
// `yes` where x >= 0, else `no`.
inline Floats where_positive(Floats x, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), no, yes);
}
// x where `mark` differs from `from`, as a NaN does, else 0.
inline Floats keep_unless_equal(Floats x, Floats mark, Floats from) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(mark, from, _CMP_NEQ_UQ), x);
}

inline Floats load_bf16(const bf16* from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Floats load_fp16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats load_numbers(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline __m256i round_bf16(Floats x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline Integers no_integers() { return Integers{}; }
inline Integers round_integers(Floats x) { return reinterpret_cast<Integers>(_mm512_cvtps_epi32(x)); }
inline Integers add_integers(Integers a, Integers b) { return a + b; }
inline int32_t sum_integers(Integers x) { return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x)); }
inline void store_integers(int8_t* to, Integers x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(reinterpret_cast<__m512i>(x)));
}

#else

using Activation = float;
struct Floats { __m256 low, high; };
struct Integers { __m256i low, high; };  // 32 bits each

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats splat(float x) {
    const __m256 both = _mm256_set1_ps(x);
    return {both, both};
}
inline Floats to_floats(Integers x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x.low); _mm256_storeu_ps(to + 8, x.high); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats magnitude(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats round_whole(Floats x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, nearest), _mm256_round_ps(x.high, nearest)};
}
inline __m256 times_power(__m256 x, __m256 n) {  // -127 < n < 128
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats times_power(Floats x, Floats n) { return {times_power(x.low, n.low), times_power(x.high, n.high)}; }
inline float sum(Floats x) {
    __m256 both = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats x) {
    __m256 both = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats larger_magnitude(Floats most, Floats x) {
    const Floats size = magnitude(x);
    return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most.low), _mm256_castps_si256(size.low))),
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most.high), _mm256_castps_si256(size.high)))};
}
inline int32_t largest_bits(Floats x) {
    const __m256i both = _mm256_max_epi32(_mm256_castps_si256(x.low), _mm256_castps_si256(x.high));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1))));
}
inline Floats where_positive(Floats x, Floats yes, Floats no) {
    const __m256 none = _mm256_setzero_ps();
    return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(x.low, none, _CMP_GE_OQ)),
            _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(x.high, none, _CMP_GE_OQ))};
}
inline Floats keep_unless_equal(Floats x, Floats mark, Floats from) {
    return {_mm256_and_ps(x.low, _mm256_cmp_ps(mark.low, from.low, _CMP_NEQ_UQ)),
            _mm256_and_ps(x.high, _mm256_cmp_ps(mark.high, from.high, _CMP_NEQ_UQ))};
}

inline __m256 load_bf16_half(const bf16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats load_bf16(const bf16* from) { return {load_bf16_half(from), load_bf16_half(from + 8)}; }
inline Floats load_fp16(const uint16_t* from) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline __m256 load_bytes_half(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Floats load_numbers(const int8_t* from) { return {load_bytes_half(from), load_bytes_half(from + 8)}; }
inline __m256i round_bf16_half(__m256 x) {  // to the nearest, ties to even; in the low 16 bits
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}
inline __m256i round_bf16(Floats x) {
    const __m256i packed = _mm256_packus_epi32(round_bf16_half(x.low), round_bf16_half(x.high));
    return _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
}

inline Integers no_integers() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Integers round_integers(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Integers add_integers(Integers a, Integers b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline int32_t sum_integers(Integers x) {
    const __m256i both = _mm256_add_epi32(x.low, x.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1))));
}
inline void store_integers(int8_t* to, Integers x) {
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1)));
}

#endif

inline float largest_magnitude(Floats x) {  // of what `larger_magnitude` has found; NaN where there was one
    const int32_t bits = largest_bits(x);
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline Floats load_numbers(const bf16* from) { return load_bf16(from); }
inline Floats load_numbers(const float* from) { return load(from); }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store_bf16(bf16* to, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_bf16(x)); }

// Numbers of activations: bf16 where tiles multiply them, else floats.
inline Floats load_activations(const float* from) { return load(from); }
inline Floats load_activations(const bf16* from) { return load_bf16(from); }
inline void store_activations(float* to, Floats x) { store(to, x); }
inline void store_activations(bf16* to, Floats x) { store_bf16(to, x); }

// e^x for x <= 0, NaN of NaN, relative error below 2e-6: 2^n * 2^f with |f| <= 1/2, 2^f by its Taylor polynomial.
inline Floats exponential(Floats x) {
    const Floats scaled = larger(splat(-126.f), multiply(x, splat(1.44269504f)));
    const Floats whole = round_whole(scaled);
    const Floats f = subtract(scaled, whole);
    Floats y = splat(1.54035304e-4f);
    for (float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
        y = multiply_add(y, f, splat(factor));
    return times_power(y, whole);
}

inline Floats silu(Floats x) {
    const Floats one = splat(1.f), e = exponential(subtract(zero(), magnitude(x)));
    return divide(multiply(x, where_positive(x, one, e)), add(one, e));
}

// Four bytes, or numbers that fill as many, to each of the lanes.
inline Integers splat_bytes(const void* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
#ifdef SHOPLM_AVX512
    return reinterpret_cast<Integers>(_mm512_set1_epi32(four));
#else
    const __m256i lanes = _mm256_set1_epi32(four);
    return {lanes, lanes};
#endif
}

template <class T>
class Buffer {  // grows, never shrinks; 64-byte aligned
  public:
    T* take(int64_t rows, int64_t columns) {
        const size_t bytes = static_cast<size_t>(rows * columns) * sizeof(T) + 64;
        if (bytes > memory_.size()) memory_ = std::vector<uint8_t>(bytes);
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
    }

  private:
    std::vector<uint8_t> memory_;
};

}  // namespace shoplm
