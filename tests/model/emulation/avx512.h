// Vectors of 64 bytes, as the compiler's own types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

using Int32 = int32_t __attribute__((vector_size(64)));
using Uint32 = uint32_t __attribute__((vector_size(64)));
using Uint16 = uint16_t __attribute__((vector_size(64)));
using HalfUint16 = uint16_t __attribute__((vector_size(32)));
constexpr Int32 BITS = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

[[noreturn]] inline void fault(const char* why) {
    std::fprintf(stderr, "the hardware would fault: %s\n", why);
    std::abort();
}

template <class To>
inline To get(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
inline const void* aligned(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 64) fault("an address is not aligned to 64 bytes");
    return at;
}

// No templates: as arguments of theirs, the compiler's types may no longer alias others.
inline __m256 half(const __m512& x, int which) { return reinterpret_cast<const __m256*>(&x)[which]; }
inline __m256i half(const __m512i& x, int which) { return reinterpret_cast<const __m256i*>(&x)[which]; }
inline __m128i half(const __m256i& x, int which) { return reinterpret_cast<const __m128i*>(&x)[which]; }
inline __m512 join(__m256 low, __m256 high) {
    __m512 whole;
    reinterpret_cast<__m256*>(&whole)[0] = low;
    reinterpret_cast<__m256*>(&whole)[1] = high;
    return whole;
}
inline __m512i join(__m256i low, __m256i high) {
    return reinterpret_cast<__m512i>(join(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)));
}

inline __mmask16 lanes(Int32 yes) {
    const auto signs = reinterpret_cast<__m512>(yes);
    return static_cast<__mmask16>(_mm256_movemask_ps(half(signs, 0)) | _mm256_movemask_ps(half(signs, 1)) << 8);
}
inline Int32 chosen(__mmask16 mask) { return (BITS & static_cast<int32_t>(mask)) != 0; }

inline __m512 fused(__m512 a, __m512 b, __m512 c) {  // a b + c, rounded once
    return join(_mm256_fmadd_ps(half(a, 0), half(b, 0), half(c, 0)), _mm256_fmadd_ps(half(a, 1), half(b, 1), half(c, 1)));
}

// Of 8 lanes: the first and the second of pairs of bf16.
inline __m256 first_of_pairs(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of_pairs(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000)))); }

// Of 8 lanes: sums + four products of bytes for each, exactly: those of `w` signed or not, those of `x` signed.
template <bool SIGNED>
inline __m256i add_bytes(__m256i sums, __m256i w, __m256i x) {
    const __m256i even = SIGNED ? _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8) : _mm256_and_si256(w, _mm256_set1_epi16(255));
    const __m256i odd = SIGNED ? _mm256_srai_epi16(w, 8) : _mm256_srli_epi16(w, 8);
    const __m256i of_even = _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(of_even, _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8))));
}

}  // namespace emulated

namespace shoplm {

using namespace emulated;

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float x) { return join(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline __m512i _mm512_set1_epi32(int32_t x) { return join(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
inline __m512i _mm512_set1_epi8(int8_t x) { return join(_mm256_set1_epi8(x), _mm256_set1_epi8(x)); }
template <class... Numbers>
inline __m512i _mm512_set_epi32(Numbers... from_the_last) {
    const int32_t numbers[16] = {from_the_last...};
    Int32 result;
    for (int i = 0; i < 16; ++i) result[i] = numbers[15 - i];
    return reinterpret_cast<__m512i>(result);
}

inline __m512 _mm512_loadu_ps(const void* from) { return get<__m512>(from); }
inline __m512i _mm512_loadu_si512(const void* from) { return get<__m512i>(from); }
inline __m512 _mm512_load_ps(const void* from) { return get<__m512>(aligned(from)); }
inline __m512i _mm512_load_si512(const void* from) { return get<__m512i>(aligned(from)); }
inline void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
inline void _mm512_store_ps(void* to, __m512 x) { aligned(to); std::memcpy(to, &x, sizeof x); }
inline void _mm512_store_si512(void* to, __m512i x) { aligned(to); std::memcpy(to, &x, sizeof x); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
    HalfUint16 result{};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) result[i] = static_cast<const uint16_t*>(from)[i];
    return reinterpret_cast<__m256i>(result);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
    if (mask == ~__mmask32{0}) return _mm512_loadu_si512(from);
    Uint16 result{};
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) result[i] = static_cast<const uint16_t*>(from)[i];
    return reinterpret_cast<__m512i>(result);
}
inline void _mm512_mask_storeu_epi16(void* to, __mmask32 mask, __m512i x) {
    const auto numbers = reinterpret_cast<Uint16>(x);
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) static_cast<uint16_t*>(to)[i] = numbers[i];
}
inline __m512i _mm512_i32gather_epi32(__m512i at, const void* from, int scale) {
    Int32 index = reinterpret_cast<Int32>(at), result;
    for (int i = 0; i < 16; ++i) result[i] = get<int32_t>(static_cast<const char*>(from) + int64_t{index[i]} * scale);
    return reinterpret_cast<__m512i>(result);
}
inline __m512 _mm512_i32gather_ps(__m512i at, const void* from, int scale) {
    return reinterpret_cast<__m512>(_mm512_i32gather_epi32(at, from, scale));
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return fused(a, b, c); }
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return fused(-a, b, c); }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // of a NaN and a number, the second
inline __m512 _mm512_abs_ps(__m512 x) { return reinterpret_cast<__m512>(reinterpret_cast<Uint32>(x) & 0x7FFFFFFF); }
inline __m512 _mm512_roundscale_ps(__m512 x, int how) {  // to whole numbers
    if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) std::abort();
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return join(_mm256_round_ps(half(x, 0), nearest), _mm256_round_ps(half(x, 1), nearest));
}
inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) {  // x 2^floor(n)
    for (int i = 0; i < 16; ++i) x[i] = static_cast<float>(x[i] * std::exp2(std::floor(static_cast<double>(n[i]))));
    return x;
}
inline float _mm512_reduce_add_ps(__m512 x) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
inline float _mm512_reduce_max_ps(__m512 x) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    if (how == _CMP_GE_OQ) return lanes(a >= b);
    if (how == _CMP_NEQ_UQ) return lanes(a != b);
    std::abort();
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) { return chosen(mask) ? yes : no; }
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) { return chosen(mask) ? x : __m512{}; }

inline __m512i _mm512_castps_si512(__m512 x) { return reinterpret_cast<__m512i>(x); }
inline __m512 _mm512_castsi512_ps(__m512i x) { return reinterpret_cast<__m512>(x); }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned by) { return reinterpret_cast<__m512i>(reinterpret_cast<Uint32>(x) << by); }
inline __m512i _mm512_srli_epi16(__m512i x, unsigned by) { return reinterpret_cast<__m512i>(reinterpret_cast<Uint16>(x) >> by); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return join(_mm256_sub_epi32(half(a, 0), half(b, 0)), _mm256_sub_epi32(half(a, 1), half(b, 1))); }
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return join(_mm256_mullo_epi32(half(a, 0), half(b, 0)), _mm256_mullo_epi32(half(a, 1), half(b, 1))); }
inline __mmask16 _mm512_cmple_epi32_mask(__m512i a, __m512i b) { return lanes(reinterpret_cast<Int32>(a) <= reinterpret_cast<Int32>(b)); }
inline __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) { return lanes(reinterpret_cast<Int32>(a) > reinterpret_cast<Int32>(b)); }
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
    return join(_mm256_max_epi32(half(a, 0), half(b, 0)), _mm256_max_epi32(half(a, 1), half(b, 1)));
}
inline int32_t _mm512_reduce_max_epi32(__m512i x) {
    const auto numbers = reinterpret_cast<Int32>(x);
    int32_t most = numbers[0];
    for (int i = 1; i < 16; ++i) most = numbers[i] > most ? numbers[i] : most;
    return most;
}
inline int32_t _mm512_reduce_add_epi32(__m512i x) {
    const auto numbers = reinterpret_cast<Uint32>(x);
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += numbers[i];
    return static_cast<int32_t>(sum);
}

inline __m512 _mm512_cvtepi32_ps(__m512i x) { return __builtin_convertvector(reinterpret_cast<Int32>(x), __m512); }
inline __m512i _mm512_cvtps_epi32(__m512 x) { return join(_mm256_cvtps_epi32(half(x, 0)), _mm256_cvtps_epi32(half(x, 1))); }
inline __m512i _mm512_cvtepu16_epi32(__m256i x) { return join(_mm256_cvtepu16_epi32(half(x, 0)), _mm256_cvtepu16_epi32(half(x, 1))); }
inline __m512i _mm512_cvtepi8_epi32(__m128i x) { return join(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))); }
inline __m128i _mm512_cvtsepi32_epi8(__m512i x) {
    const __m256i both = _mm256_packs_epi32(half(x, 0), half(x, 1));
    const __m256i in_order = _mm256_permute4x64_epi64(both, _MM_SHUFFLE(3, 1, 2, 0));
    return _mm_packs_epi16(half(in_order, 0), half(in_order, 1));
}
inline __m512 _mm512_cvtph_ps(__m256i x) { return join(_mm256_cvtph_ps(half(x, 0)), _mm256_cvtph_ps(half(x, 1))); }
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {  // to the nearest, ties to even; denormals are 0
    const auto bits = reinterpret_cast<Uint32>(x), high = bits >> 16;
    auto rounded = (bits + 0x7FFF + (high & 1)) >> 16;
    rounded = (bits & 0x7F800000) == 0 ? high & 0x8000 : rounded;
    rounded = x != x ? high | 0x40 : rounded;
    const auto wide = reinterpret_cast<__m512i>(rounded);
    const __m256i both = _mm256_packus_epi32(half(wide, 0), half(wide, 1));
    return reinterpret_cast<__m256bh>(_mm256_permute4x64_epi64(both, _MM_SHUFFLE(3, 1, 2, 0)));
}

inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    const auto of = [](__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); };
    return reinterpret_cast<__m512bh>(join(of(low), of(high)));
}

inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    const auto pairs = reinterpret_cast<__m512i>(a), others = reinterpret_cast<__m512i>(b);
    auto of_half = [&](int which) {
        const __m256i x = half(pairs, which), y = half(others, which);
        return _mm256_fmadd_ps(first_of_pairs(x), first_of_pairs(y), _mm256_fmadd_ps(second_of_pairs(x), second_of_pairs(y), half(sums, which)));
    };
    return join(of_half(0), of_half(1));
}
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    return join(add_bytes<false>(half(sums, 0), half(a, 0), half(b, 0)),
                add_bytes<false>(half(sums, 1), half(a, 1), half(b, 1)));
}

}  // namespace shoplm
