// AVX2, and with it AVX-VNNI where the file is compiled for that: 8 rows in the lanes of a register.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pyps::kernels {
namespace {

struct Lanes {
    static constexpr int n       = 8;
    static constexpr int columns = 4;
#ifdef __AVXVNNI__
    static constexpr bool signed8 = false;
#else
    static constexpr bool signed8 = true;  // the sum of two products of 255 and 127 does not fit into 16 bits
#endif

    using F = __m256;
    using I = __m256i;

    static F       load(const float * p) { return _mm256_loadu_ps(p); }
    static F       set(float x) { return _mm256_set1_ps(x); }
    static I       set(int x) { return _mm256_set1_epi32(x); }
    static I       load(const uint8_t * p) { return _mm256_load_si256((const __m256i *) p); }
    static F       zero() { return _mm256_setzero_ps(); }
    static void    store(float * p, F x) { _mm256_storeu_ps(p, x); }
    static F       mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F       fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F       to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static F       from_half(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
    static __m128i load_bytes(const void * p) { return _mm_loadl_epi64((const __m128i *) p); }
    static F       from_signed(__m128i bytes) { return to_float(_mm256_cvtepi8_epi32(bytes)); }
    static F       from_unsigned(__m128i bytes) { return to_float(_mm256_cvtepu8_epi32(bytes)); }

    static F from_bf16(const uint16_t * p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
    }
    static F     max(F a, F b) { return _mm256_max_ps(a, b); }
    static F     add(F a, F b) { return _mm256_add_ps(a, b); }
    static float sum_of(F x) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
    static float max_of(F x) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
    }
    static F hide(F x, F y) {
        const F none = _mm256_set1_ps(-INFINITY);
        return _mm256_blendv_ps(x, none, _mm256_cmp_ps(y, none, _CMP_EQ_OQ));
    }
    static F first(F x, int count) {
        const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x,
                                _mm256_castsi256_ps(_mm256_cmpgt_epi32(set(count), lane)));
    }
    static F zero_below(F y, F x, F limit) {
        const F inside = _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y);
        return _mm256_blendv_ps(inside, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
    static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale(F x, F n) {  // n from -126 to 127
        return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set(127)), 23)));
    }

    template <typename Row> static void transpose_floats(Row && row, float * out, int stride) {
        F t[2][4];
        for (int half = 0; half < 2; ++half) {
            const F       r0 = row(4 * half), r1 = row(4 * half + 1), r2 = row(4 * half + 2), r3 = row(4 * half + 3);
            const __m256d a0 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)),
                          a1 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
            const __m256d b0 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)),
                          b1 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
            t[half][0]       = _mm256_castpd_ps(_mm256_unpacklo_pd(a0, b0));
            t[half][1]       = _mm256_castpd_ps(_mm256_unpackhi_pd(a0, b0));
            t[half][2]       = _mm256_castpd_ps(_mm256_unpacklo_pd(a1, b1));
            t[half][3]       = _mm256_castpd_ps(_mm256_unpackhi_pd(a1, b1));
        }
#pragma GCC unroll 16
        for (int k = 0; k < 4; ++k) {
            store(out + k * stride, _mm256_permute2f128_ps(t[0][k], t[1][k], 0x20));
            store(out + (k + 4) * stride, _mm256_permute2f128_ps(t[0][k], t[1][k], 0x31));
        }
    }

    template <int bits, int count> static I dot(const I * w, const int8_t * a, I sum) {
        I four[count];
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) {
            int x;
            memcpy(&x, a + 4 * k, 4);
            four[k] = _mm256_set1_epi32(x);
        }
#ifdef __AVXVNNI__
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) {
            sum = _mm256_dpbusd_avx_epi32(sum, w[k], four[k]);
        }
#else
        // pairs are summed in 16 bits: of 4-bit weights 8 times, of 5-bit ones 4 times, of 6-bit ones twice
        constexpr int most     = bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
        constexpr int together = most < count ? most : count;
#pragma GCC unroll 8
        for (int k = 0; k < count; k += together) {
            I pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
            for (int j = k; j < k + together; ++j) {
                // 8 bits are signed: the sign moves over to the column, -128 becomes an unsigned 128
                const I p = bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(four[j], w[j]))
                                      : _mm256_maddubs_epi16(w[j], four[j]);
                pairs     = j == k ? p : _mm256_add_epi16(pairs, p);
            }
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
#endif
        return sum;
    }

    template <typename Row> static void transpose(Row && row, uint8_t * out) {
        I t[2][4];
        for (int half = 0; half < 2; ++half) {
            I z[4];
#pragma GCC unroll 16
            for (int i = 0; i < 4; ++i) {
                z[i] = row(4 * half + i);
            }
            const I a0 = _mm256_unpacklo_epi32(z[0], z[1]), a1 = _mm256_unpackhi_epi32(z[0], z[1]);
            const I b0 = _mm256_unpacklo_epi32(z[2], z[3]), b1 = _mm256_unpackhi_epi32(z[2], z[3]);
            t[half][0] = _mm256_unpacklo_epi64(a0, b0);
            t[half][1] = _mm256_unpackhi_epi64(a0, b0);
            t[half][2] = _mm256_unpacklo_epi64(a1, b1);
            t[half][3] = _mm256_unpackhi_epi64(a1, b1);
        }
#pragma GCC unroll 16
        for (int k = 0; k < 4; ++k) {
            _mm256_store_si256((I *) (out + 32 * k), _mm256_permute2x128_si256(t[0][k], t[1][k], 0x20));
            _mm256_store_si256((I *) (out + 32 * (k + 4)), _mm256_permute2x128_si256(t[0][k], t[1][k], 0x31));
        }
    }

    template <typename Octets> static void split(Octets && octets, uint8_t * first, uint8_t * second) {
        const F a = _mm256_castsi256_ps(octets(0, 0)), b = _mm256_castsi256_ps(octets(0, 1));
        const I even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));  // rows 0, 1, 4, 5, 2, 3, 6, 7
        const I odd  = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
        _mm256_store_si256((I *) first, _mm256_permute4x64_epi64(even, 0xd8));
        _mm256_store_si256((I *) second, _mm256_permute4x64_epi64(odd, 0xd8));
    }
};

}  // namespace
}  // namespace pyps::kernels
