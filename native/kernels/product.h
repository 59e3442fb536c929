// Products of quantised weights with columns.
//
// Layout: a panel is as many rows as a register has lanes, one row in each lane, so nothing is ever summed across
// lanes and a result is stored as it lies in memory. Weights are unpacked to bytes and transposed in the first cache,
// 512 of each row at a time, and then meet all columns: the way from memory and the unpacking are paid once, for
// however many columns. Registers: 8 of weights (32 of each row), the sums of 4 or 8 columns. An instruction multiplies
// 64 weights by 4 values of a column, broadcast; 512 products need 8 of those and 3 for the scale.
// Bound: for few columns the weights' way from memory, from about 16 on the multiplications.
#pragma once

#include "ahead.h"
#include "kernels.h"
#include "weights.h"

namespace pyps::kernels {
namespace {

constexpr int kChunk      = 16;   // blocks that are unpacked at once
constexpr int kMaxColumns = 512;  // that are multiplied before the weights are unpacked again

template <class T> struct Panel {
    static constexpr int groups = T::halves ? 2 : 1;

    alignas(64) uint8_t bytes[kChunk][kBlock * Lanes::n];
    alignas(64) float scale[kChunk * groups][Lanes::n];
    alignas(64) float minimum[T::minimum ? kChunk : 1][Lanes::n];
};

// Unpacks blocks [b, b + count) of the rows, both multiples of what a block of the file has. rows: where each begins, or
// each 8 interleaved ones.
template <class T>
inline void unpack(const uint8_t * const * rows, int64_t b, int count, Ahead & next, Panel<T> & panel) {
    constexpr int                                               parts = T::values / kBlock, groups = Panel<T>::groups;
    RawScales<Lanes::n, parts * groups, T::minimum ? parts : 0> raw[kChunk / parts];
    for (int i = 0; i < count; i += parts) {
        const size_t at = (b + i) / parts * T::size * T::rows;
        for (int r = 0; r < Lanes::n; r += T::rows) {
            T::scales(rows[r / T::rows] + at, raw[i / parts], r);
        }
    }
    for (int i = 0; i < count; ++i) {
        const size_t at   = (b + i) / parts * T::size * T::rows;
        const auto   sign = [](__m256i x) {
            return T::bits == 8 && Lanes::signed8 ? _mm256_xor_si256(x, _mm256_set1_epi8(-128)) : x;
        };
        if constexpr (T::rows == 1) {
            Lanes::transpose(
                [&](int r) {
                    if (r % 4 == 3) {
                        next.fetch_line();
                    }
                    return sign(T::bytes(rows[r] + at, i % parts));
                },
                panel.bytes[i]);
        } else {
            for (int octet = 0; octet < 4; ++octet) {
                next.fetch_line();
                uint8_t * out = panel.bytes[i] + octet * 8 * Lanes::n;
                Lanes::split([&](int g, int half) { return sign(T::bytes(rows[g] + at, i % parts, octet, half)); }, out,
                             out + 4 * Lanes::n);
            }
        }
    }
    for (int i = 0; i < count; i += parts) {
        const auto & block = raw[i / parts];
        const auto   d     = Lanes::from_half(block.d);
        if constexpr (parts == 1) {
            Lanes::store(panel.scale[i], d);
            if constexpr (T::minimum) {
                Lanes::store(panel.minimum[i], Lanes::from_half(block.m));
            }
        } else {
            for (int j = 0; j < parts * groups; ++j) {
                Lanes::store(panel.scale[i * groups + j],
                             Lanes::mul(d, Lanes::from_signed(Lanes::load_bytes(block.scale[j]))));
            }
            if constexpr (T::minimum) {
                const auto m = Lanes::mul(Lanes::from_half(block.m), Lanes::set(-1.0f));
                for (int j = 0; j < parts; ++j) {
                    Lanes::store(panel.minimum[i + j],
                                 Lanes::mul(m, Lanes::from_unsigned(Lanes::load_bytes(block.min[j]))));
                }
            }
        }
    }
}

// Adds the products of a panel's blocks with n columns, of which the first is c, to sums[n][lanes].
template <class T, int n>
inline void multiply_tile(const Panel<T> & panel,
                          int              count,
                          const Columns &  columns,
                          int64_t          b,
                          int              c,
                          Ahead &          next,
                          float *          sums) {
    using L              = Lanes;
    constexpr int groups = Panel<T>::groups, quarter = 8 / groups;
    L::F          sum[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
        sum[j] = L::load(sums + j * L::n);
    }
    for (int i = 0; i < count; ++i) {
        L::I w[8];
#pragma GCC unroll 16
        for (int k = 0; k < 8; ++k) {
            w[k] = L::load(panel.bytes[i] + 4 * L::n * k);
        }
        const int64_t at = (b + i) * columns.n + c;
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) {
            const int8_t * q     = columns.q + (at + j) * kBlock;
            const L::F     scale = L::set(columns.scale[at + j]);
            next.fetch_line();
#pragma GCC unroll 16
            for (int g = 0; g < groups; ++g) {
                L::I whole = L::set(T::minimum ? 0 : columns.offset[((b + i) * groups + g) * columns.n + c + j]);
                whole      = L::template dot<T::bits, quarter>(w + g * quarter, q + g * 4 * quarter, whole);
                sum[j]     = L::fma(L::to_float(whole), L::mul(scale, L::load(panel.scale[i * groups + g])), sum[j]);
            }
            if constexpr (T::minimum) {
                sum[j] = L::fma(L::load(panel.minimum[i]), L::set(columns.sum[at + j]), sum[j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) {
        L::store(sums + j * L::n, sum[j]);
    }
}

// The same with columns [c, last), as many at once as there are registers for.
template <class T, int n = Lanes::columns>
inline void multiply_tiles(const Panel<T> & panel,
                           int              count,
                           const Columns &  columns,
                           int64_t          b,
                           int              c,
                           int              last,
                           Ahead &          next,
                           float *          sums) {
    if constexpr (n > 0) {
        for (; last - c >= n; c += n, sums += n * Lanes::n) {
            multiply_tile<T, n>(panel, count, columns, b, c, next, sums);
        }
        multiply_tiles<T, n - 1>(panel, count, columns, b, c, last, next, sums);
    }
}

template <class T>
void multiply(const Weights & weights, const Columns & columns, int64_t begin, int64_t end, float * const * out) {
    constexpr int parts = T::values / kBlock;
    static_assert(kChunk % parts == 0, "a chunk holds whole blocks of the file");
    Panel<T>          panel;
    alignas(64) float sums[kMaxColumns * Lanes::n];
    for (int64_t row = begin; row < end; row += Lanes::n) {
        const int       n_rows = int(end - row < Lanes::n ? end - row : Lanes::n);
        const uint8_t * rows[Lanes::n / T::rows];
        for (int r = 0; r < Lanes::n; r += T::rows) {  // lanes without a row get the last one again
            const int64_t here = row + (r < n_rows ? r : n_rows - T::rows);
            rows[r / T::rows]  = (const uint8_t *) weights.data + here * weights.stride;
        }
        for (int c = 0; c < columns.n; c += kMaxColumns) {
            const int last = columns.n - c < kMaxColumns ? columns.n : c + kMaxColumns;
            memset(sums, 0, sizeof(float) * (last - c) * Lanes::n);
            for (int64_t b = 0; b < columns.blocks; b += kChunk) {
                const int count = int(columns.blocks - b < kChunk ? columns.blocks - b : kChunk);
                Ahead next((const char *) rows[0] + Lanes::n * weights.stride, Lanes::n * weights.stride, b / kChunk,
                           (columns.blocks + kChunk - 1) / kChunk);
                unpack<T>(rows, b, count, next, panel);
                multiply_tiles<T>(panel, count, columns, b, c, last, next, sums);
                next.fetch_rest();
            }
            for (int i = c; i < last; ++i) {
                memcpy(out[i] + row, sums + (i - c) * Lanes::n, n_rows * sizeof(float));
            }
        }
    }
}

template <class T> constexpr Product product() {
    constexpr int offset = T::bits == 8 && Lanes::signed8 ? 0 : T::offset;
    return { T::type, T::rows > 1, T::columns, offset, T::halves ? 2 : 1, multiply<T> };
}

// Sums of eight lanes.
inline int sum_of(__m256i x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s         = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline float max_of(__m256 x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

// A block with a value that is not finite gets a scale that is not a number, and so does every result that reads it.
void quantise(const float * x, const Columns & columns, int c, int64_t begin, int64_t end, const Product & product) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t b = begin; b < end; ++b) {
        __m256 v[4], most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
#pragma GCC unroll 16
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + b * kBlock + 8 * i);
            most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
            bad  = _mm256_fmadd_ps(v[i], _mm256_setzero_ps(), bad);
        }
        const int64_t at    = b * columns.n + c;
        const float   limit = max_of(most);
        float         scale = limit / 127.0f, inverse = limit > 1e-35f ? 127.0f / limit : 0.0f;
        if (_mm256_movemask_ps(_mm256_cmp_ps(bad, bad, _CMP_UNORD_Q))) {
            scale = __builtin_nanf("");
            for (__m256 & x8 : v) {
                x8 = _mm256_setzero_ps();
            }
        }
        __m256i q[4];
#pragma GCC unroll 16
        for (int i = 0; i < 4; ++i) {
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)));
        }
        // the packs work on each half of a register: the order of fours is put right afterwards
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_storeu_si256((__m256i *) (columns.q + at * kBlock), _mm256_permutevar8x32_epi32(bytes, order));
        const int first = sum_of(_mm256_add_epi32(q[0], q[1])), second = sum_of(_mm256_add_epi32(q[2], q[3]));
        columns.scale[at] = scale;
        columns.sum[at]   = scale * float(first + second);
        if (product.groups == 2) {
            columns.offset[(b * 2 + 0) * columns.n + c] = -product.offset * first;
            columns.offset[(b * 2 + 1) * columns.n + c] = -product.offset * second;
        } else {
            columns.offset[at] = -product.offset * (first + second);
        }
    }
}

constexpr Product kProducts[] = { product<Q8_0>(),   product<Q5_0>(),   product<Q5_1>(),   product<Q4_0>(),
                                  product<Q4_1>(),   product<Q4_K>(),   product<Q5_K>(),   product<Q6_K>(),
                                  product<IQ4_NL>(), product<Q4_0x8>(), product<Q4_Kx8>(), product<IQ4_NLx8>() };

}  // namespace
}  // namespace pyps::kernels
