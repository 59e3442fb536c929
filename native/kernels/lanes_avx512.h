// AVX-512 with VNNI: 16 rows in the lanes of a register.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pyps::kernels {
namespace {

struct Lanes {
    static constexpr int  n       = 16;  // rows of a panel, one in each lane
    static constexpr int  columns = 8;   // columns that are multiplied at once: 8 sums, 8 registers of weights
    static constexpr bool signed8 = false;

    using F = __m512;
    using I = __m512i;

    static F       load(const float * p) { return _mm512_loadu_ps(p); }
    static F       set(float x) { return _mm512_set1_ps(x); }
    static I       set(int x) { return _mm512_set1_epi32(x); }
    static I       load(const uint8_t * p) { return _mm512_load_si512(p); }
    static F       zero() { return _mm512_setzero_ps(); }
    static void    store(float * p, F x) { _mm512_storeu_ps(p, x); }
    static F       mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F       fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F       to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static F       from_half(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static __m128i load_bytes(const void * p) { return _mm_loadu_si128((const __m128i *) p); }
    static F       from_signed(__m128i bytes) { return to_float(_mm512_cvtepi8_epi32(bytes)); }
    static F       from_unsigned(__m128i bytes) { return to_float(_mm512_cvtepu8_epi32(bytes)); }

    static F from_bf16(const uint16_t * p) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
    }
    static F     max(F a, F b) { return _mm512_max_ps(a, b); }
    static F     add(F a, F b) { return _mm512_add_ps(a, b); }
    static float sum_of(F x) { return _mm512_reduce_add_ps(x); }
    static float max_of(F x) { return _mm512_reduce_max_ps(x); }
    // x where y is not -infinity, else -infinity
    static F hide(F x, F y) {
        const F none = _mm512_set1_ps(-INFINITY);
        return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(y, none, _CMP_EQ_OQ), none);
    }
    // x in the first `count` lanes, else -infinity
    static F first(F x, int count) {
        return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), __mmask16((1u << count) - 1), x);
    }
    // y where x is not below the limit (a NaN where x is one), else 0
    static F zero_below(F y, F x, F limit) {
        const __mmask16 below = _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ);
        const __mmask16 nan   = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_mask_mov_ps(_mm512_mask_mov_ps(y, below, zero()), nan, x);
    }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // x * 2^n
    static F scale(F x, F n) { return _mm512_scalef_ps(x, n); }

    // Adds the products of `count` registers of unsigned weights, four of a row in each lane, with 4 * count values.
    template <int bits, int count> static I dot(const I * w, const int8_t * a, I sum) {
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) {
            int four;
            memcpy(&four, a + 4 * k, 4);
            sum = _mm512_dpbusd_epi32(sum, w[k], _mm512_set1_epi32(four));
        }
        return sum;
    }

    // Turns 16 values of each of 16 rows into 16 registers: value i of all rows in the i-th, `stride` floats apart.
    template <typename Row> static void transpose_floats(Row && row, float * out, int stride) {
        F t[4][4];
#pragma GCC unroll 16
        for (int quarter = 0; quarter < 4; ++quarter) {
            const F r0 = row(4 * quarter), r1 = row(4 * quarter + 1), r2 = row(4 * quarter + 2),
                    r3       = row(4 * quarter + 3);
            const __m512d a0 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)),
                          a1 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
            const __m512d b0 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)),
                          b1 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
            t[quarter][0]    = _mm512_castpd_ps(_mm512_unpacklo_pd(a0, b0));
            t[quarter][1]    = _mm512_castpd_ps(_mm512_unpackhi_pd(a0, b0));
            t[quarter][2]    = _mm512_castpd_ps(_mm512_unpacklo_pd(a1, b1));
            t[quarter][3]    = _mm512_castpd_ps(_mm512_unpackhi_pd(a1, b1));
        }
        for (int k = 0; k < 4; ++k) {  // lane l of t[quarter][k]: value 4l + k of the quarter's four rows
            const F low0  = _mm512_shuffle_f32x4(t[0][k], t[1][k], 0x44),
                    high0 = _mm512_shuffle_f32x4(t[0][k], t[1][k], 0xee);
            const F low1  = _mm512_shuffle_f32x4(t[2][k], t[3][k], 0x44),
                    high1 = _mm512_shuffle_f32x4(t[2][k], t[3][k], 0xee);
            store(out + (k + 0) * stride, _mm512_shuffle_f32x4(low0, low1, 0x88));
            store(out + (k + 4) * stride, _mm512_shuffle_f32x4(low0, low1, 0xdd));
            store(out + (k + 8) * stride, _mm512_shuffle_f32x4(high0, high1, 0x88));
            store(out + (k + 12) * stride, _mm512_shuffle_f32x4(high0, high1, 0xdd));
        }
    }

    // Turns 32 bytes of each of 16 rows into 8 registers: bytes 4k … 4k + 3 of all rows in the k-th.
    template <typename Row> static void transpose(Row && row, uint8_t * out) {
        I t[2][4];
        for (int half = 0; half < 2; ++half) {
            I z[4];
#pragma GCC unroll 16
            for (int i = 0; i < 4; ++i) {
                z[i] = _mm512_inserti64x4(_mm512_castsi256_si512(row(8 * half + i)), row(8 * half + i + 4), 1);
            }
            const I a0 = _mm512_unpacklo_epi32(z[0], z[1]), a1 = _mm512_unpackhi_epi32(z[0], z[1]);
            const I b0 = _mm512_unpacklo_epi32(z[2], z[3]), b1 = _mm512_unpackhi_epi32(z[2], z[3]);
            t[half][0] = _mm512_unpacklo_epi64(a0, b0);
            t[half][1] = _mm512_unpackhi_epi64(a0, b0);
            t[half][2] = _mm512_unpacklo_epi64(a1, b1);
            t[half][3] = _mm512_unpackhi_epi64(a1, b1);
        }
#pragma GCC unroll 16
        for (int k = 0; k < 4; ++k) {
            _mm512_store_si512(out + 64 * k, _mm512_shuffle_i32x4(t[0][k], t[1][k], 0x88));
            _mm512_store_si512(out + 64 * (k + 4), _mm512_shuffle_i32x4(t[0][k], t[1][k], 0xdd));
        }
    }

    // Takes 8 bytes of each of 16 rows apart into two registers: the first 4 of all rows, and the other 4.
    // octets(g, h): those of rows 8g + 4h … 8g + 4h + 3.
    template <typename Octets> static void split(Octets && octets, uint8_t * first, uint8_t * second) {
        const I a    = _mm512_inserti64x4(_mm512_castsi256_si512(octets(0, 0)), octets(0, 1), 1);
        const I b    = _mm512_inserti64x4(_mm512_castsi256_si512(octets(1, 0)), octets(1, 1), 1);
        const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        _mm512_store_si512(first, _mm512_permutex2var_epi32(a, even, b));
        _mm512_store_si512(second, _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, set(1)), b));
    }
};

}  // namespace
}  // namespace pyps::kernels
