// Attention of a few queries over a cache: K * q, softmax and V in one go, over 32 cells at a time.
//
// Layout: the rows of queries of all heads that share a head of K and V are computed together, so that K and V are read
// and converted to f32 once. K is transposed in the first cache, one cell in each lane, so that scores are never summed
// across lanes. Sums are f32 throughout (ggml's own sums V in f16). The softmax is that of flash attention: what has
// been summed is scaled down whenever a greater score is met.
// Registers: 4 rows x 2 of scores; 4 rows x 4 of V.
// Bound: for one token a sequence the conversion of K and V, for prompts the multiplications.
#pragma once

#include "ahead.h"
#include "kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

namespace pyps::kernels {
namespace {

constexpr int kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ8_0 = 8, kBF16 = 30;  // ggml_types

// Values [i, i + lanes) of a row of a cache.
template <int type> inline Lanes::F load_values(const char * row, int i) {
    if constexpr (type == kF32) {
        return Lanes::load((const float *) row + i);
    } else if constexpr (type == kF16) {
        return Lanes::from_half((const uint16_t *) row + i);
    } else if constexpr (type == kBF16) {
        return Lanes::from_bf16((const uint16_t *) row + i);
    } else {
        const char * block = row + i / kBlock * (type == kQ8_0 ? 34 : 18);
        uint16_t     d;
        memcpy(&d, block, 2);
        __m128i bytes;
        if constexpr (type == kQ8_0) {
            bytes = Lanes::load_bytes(block + 2 + i % kBlock);
        } else {  // 16 bytes: low nibbles first, then high ones
            bytes = Lanes::load_bytes(block + 2 + i % 16);
            bytes = _mm_and_si128(i % kBlock < 16 ? bytes : _mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
            bytes = _mm_sub_epi8(bytes, _mm_set1_epi8(8));
        }
        return Lanes::mul(Lanes::set(_cvtsh_ss(d)), Lanes::from_signed(bytes));
    }
}

// e^x for x <= 0, to within two units of the last place; 0 below -87.
inline Lanes::F exp_of(Lanes::F x) {
    using L           = Lanes;
    const L::F least  = L::set(-87.0f);
    const L::F inside = L::max(x, least);  // a NaN becomes -87 here and a NaN again below
    const L::F n      = L::round(L::mul(inside, L::set(1.44269504f)));
    // the logarithm of 2 in two parts, the first exact in products with n
    const L::F      r              = L::fma(n, L::set(2.12194440e-4f), L::fma(n, L::set(-0.693359375f), inside));
    L::F            p              = L::set(1.98412698e-4f);
    constexpr float coefficients[] = { 1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 0.166666667f, 0.5f, 1.0f, 1.0f };
    for (const float c : coefficients) {
        p = L::fma(p, r, L::set(c));
    }
    return L::zero_below(L::scale(p, n), x, least);
}

// keys[dk][kCells]
template <int type>
inline void transpose_keys(const Attention & a, const char * k, int count, Ahead & next, float * keys) {
    for (int c = 0; c < kCells; c += Lanes::n) {
        for (int d = 0; d < a.dk; d += Lanes::n) {
            Lanes::transpose_floats(
                [&](int r) {
                    if (r % 2) {
                        next.fetch_line();
                    }
                    const int i = c + r < count ? c + r : count - 1;  // lanes past the last cell get that again
                    return load_values<type>(k + i * a.k_cell, d);
                },
                keys + d * kCells + c, kCells);
        }
    }
}

// values[kCells][dv]
template <int type>
inline void convert_values(const Attention & a, const char * v, int count, uint32_t seen, float * values) {
    for (int c = 0; c < count; ++c) {
        for (int d = 0; d < a.dv; d += Lanes::n) {
            // a cell that no row may see can hold anything, and nothing times infinity is not a number
            const bool any = seen >> c & 1;
            Lanes::store(values + c * a.dv + d, any ? load_values<type>(v + c * a.v_cell, d) : Lanes::zero());
        }
    }
}

template <int type> struct Type {
    static constexpr int value = type;
};

template <typename F> inline void with_type(int type, F && f) {
    switch (type) {
    case kF32:
        return f(Type<kF32>());
    case kF16:
        return f(Type<kF16>());
    case kBF16:
        return f(Type<kBF16>());
    case kQ4_0:
        return f(Type<kQ4_0>());
    default:
        return f(Type<kQ8_0>());
    }
}

// scores[n][kCells] of n rows of queries.
template <int n> inline void score(int dk, const float * const * q, const float * keys, float * scores) {
    using L               = Lanes;
    constexpr int columns = 2;
    for (int c = 0; c < kCells; c += columns * L::n) {
        L::F sum[n][columns];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
#pragma GCC unroll 16
            for (int j = 0; j < columns; ++j) {
                sum[i][j] = L::zero();
            }
        }
        for (int d = 0; d < dk; ++d) {
#pragma GCC unroll 16
            for (int j = 0; j < columns; ++j) {
                const L::F k = L::load(keys + d * kCells + c + j * L::n);
#pragma GCC unroll 16
                for (int i = 0; i < n; ++i) {
                    sum[i][j] = L::fma(k, L::set(q[i][d]), sum[i][j]);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
#pragma GCC unroll 16
            for (int j = 0; j < columns; ++j) {
                L::store(scores + i * kCells + c + j * L::n, sum[i][j]);
            }
        }
    }
}

// Adds the cells' values, weighted, to what has been summed for n rows.
template <int n, int width>
inline void
add_values(int count, const float * values, int dv, int d, const float * scores, Ahead & next, Partial * partials) {
    using L = Lanes;
    L::F sum[n][width];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < width; ++j) {
            sum[i][j] = L::load(partials[i].v + d + j * L::n);
        }
    }
    for (int c = 0; c < count; ++c) {
        next.fetch_line();
        next.fetch_line();
#pragma GCC unroll 16
        for (int j = 0; j < width; ++j) {
            const L::F v = L::load(values + c * dv + d + j * L::n);
#pragma GCC unroll 16
            for (int i = 0; i < n; ++i) {
                sum[i][j] = L::fma(v, L::set(scores[i * kCells + c]), sum[i][j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < width; ++j) {
            L::store(partials[i].v + d + j * L::n, sum[i][j]);
        }
    }
}

template <int n>
inline void add_values(int           count,
                       const float * values,
                       int           dv,
                       const float * scores,
                       Ahead &       next,
                       Partial *     partials) {
    constexpr int width = Lanes::n == 16 ? 4 : 2;
    int           d     = 0;
    for (; d + width * Lanes::n <= dv; d += width * Lanes::n) {
        add_values<n, width>(count, values, dv, d, scores, next, partials);
    }
    for (; d < dv; d += Lanes::n) {
        add_values<n, 1>(count, values, dv, d, scores, next, partials);
    }
}

// Turns a row's scores into weights, and what has been summed with them, if there is a greater score than before.
inline void soften(const Attention & a,
                   const uint16_t *  mask,
                   float             slope,
                   int               count,
                   float *           scores,
                   Partial &         partial) {
    using L   = Lanes;
    L::F most = L::set(-INFINITY);
    for (int c = 0; c < kCells; c += L::n) {
        L::F s = L::mul(L::load(scores + c), L::set(a.scale));
        if (a.cap != 0.0f) {
            float values[L::n];
            L::store(values, s);
            for (float & value : values) {
                value = a.cap * tanhf(value);
            }
            s = L::load(values);
        }
        if (count - c < L::n) {
            s = L::first(s, count - c < 0 ? 0 : count - c);
        }
        if (mask) {
            uint16_t rest[L::n] = {};
            for (int i = 0; count - c < L::n && i < count - c; ++i) {
                rest[i] = mask[c + i];
            }
            const L::F m = L::from_half(count - c < L::n ? rest : mask + c);
            s            = L::hide(L::fma(m, L::set(slope), s), m);
        }
        L::store(scores + c, s);
        most = L::max(s, most);  // a NaN that stands first is lost here, but not in the weights
    }
    const float max = L::max_of(most);
    if (max > partial.max) {
        if (partial.max != -INFINITY) {
            const float factor = expf(partial.max - max);
            partial.sum *= factor;
            for (int d = 0; d < a.dv; d += L::n) {
                L::store(partial.v + d, L::mul(L::load(partial.v + d), L::set(factor)));
            }
        }
        partial.max = max;
    }
    L::F sum = L::zero();
    for (int c = 0; c < kCells; c += L::n) {
        const L::F s = L::load(scores + c);
        // with nothing seen so far all scores are -infinity: so are the differences to 0
        const L::F p = exp_of(L::add(s, L::set(partial.max == -INFINITY ? 0.0f : -partial.max)));
        L::store(scores + c, p);
        sum = L::add(sum, p);
    }
    partial.sum += L::sum_of(sum);
}

inline const uint16_t * mask_of(const Attention & a, int token, int head, int64_t cell) {
    return a.mask ? (const uint16_t *) (a.mask + token * a.mask_token + head * a.mask_head) + cell : nullptr;
}

// One bit for each cell that at least one row may see.
inline uint32_t seen_cells(const Attention & a, int64_t cell, int count) {
    uint32_t seen = a.mask ? 0 : ~0u;
    for (int t = 0; a.mask && t < a.n_tokens; ++t) {
        for (int h = 0; h < (a.mask_head ? a.n_heads * a.group : 1); ++h) {
            const uint16_t * mask = mask_of(a, t, h, cell);
            for (int c = 0; c < count; ++c) {
                seen |= uint32_t(mask[c] != 0xfc00) << c;  // -infinity
            }
        }
    }
    return seen;
}

template <int n = 4>
inline void score_rows(int rows, int dk, const float * const * q, const float * keys, float * scores) {
    if constexpr (n > 0) {
        int r = 0;
        for (; rows - r >= n; r += n) {
            score<n>(dk, q + r, keys, scores + r * kCells);
        }
        score_rows<n - 1>(rows - r, dk, q + r, keys, scores + r * kCells);
    }
}

template <int n = 4>
inline void
add_rows(int rows, int dv, int count, const float * values, const float * scores, Ahead & next, Partial * partials) {
    if constexpr (n > 0) {
        int r = 0;
        for (; rows - r >= n; r += n) {
            add_values<n>(count, values, dv, scores + r * kCells, next, partials + r);
        }
        add_rows<n - 1>(rows - r, dv, count, values, scores + r * kCells, next, partials + r);
    }
}

// Goes through all heads of some cells before it goes on to the next cells: what lies side by side is read together.
void attend(const Attention & a, Partial * partials, float * scratch) {
    const int     rows   = a.n_tokens * a.group;
    float *       keys   = scratch;                 // [dk][kCells]
    float *       values = keys + kCells * a.dk;    // [kCells][dv]
    float *       scores = values + kCells * a.dv;  // [rows][kCells]
    const float * q[kMaxRows];
    for (int i = 0; i < a.n_heads * rows; ++i) {
        partials[i].max = -INFINITY;
        partials[i].sum = 0.0f;
        memset(partials[i].v, 0, sizeof(float) * a.dv);
    }
    for (int64_t cell = a.begin; cell < a.end; cell += kCells) {
        const int64_t  left = a.end - cell, after = left - kCells;
        const int      count = int(left < kCells ? left : kCells);
        const size_t   next  = after < 0 ? 0 : after < kCells ? after : kCells;  // cells of the next round
        const uint32_t seen  = seen_cells(a, cell, count);
        for (int head = 0; seen && head < a.n_heads; ++head) {
            const char * k = a.k + head * a.k_head + cell * a.k_cell;
            const char * v = a.v + head * a.v_head + cell * a.v_cell;
            Partial *    p = partials + head * rows;
            Ahead        next_k(a.k + (cell + kCells) * a.k_cell, next * a.k_cell, head, a.n_heads);
            Ahead        next_v(a.v + (cell + kCells) * a.v_cell, next * a.v_cell, head, a.n_heads);
            with_type(a.k_type, [&](auto type) { transpose_keys<type.value>(a, k, count, next_k, keys); });
            for (int r = 0; r < rows; ++r) {
                q[r] = (const float *) (a.q + r / a.group * a.q_token + (head * a.group + r % a.group) * a.q_head);
            }
            score_rows(rows, a.dk, q, keys, scores);
            for (int r = 0; r < rows; ++r) {
                const int h = head * a.group + r % a.group;
                soften(a, mask_of(a, r / a.group, h, cell), a.slope ? a.slope[h] : 1.0f, count, scores + r * kCells,
                       p[r]);
            }
            with_type(a.v_type, [&](auto type) { convert_values<type.value>(a, v, count, seen, values); });
            add_rows(rows, a.dv, count, values, scores, next_v, p);
            next_k.fetch_rest();
            next_v.fetch_rest();
        }
    }
}

void merge(const Partial * partials, int n, int dv, const float * sink, float * out) {
    using L   = Lanes;
    float max = sink ? *sink : -INFINITY;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        max = partials[i].max > max ? partials[i].max : max;
    }
    float sum = sink ? expf(*sink - max) : 0.0f;
    memset(out, 0, sizeof(float) * dv);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
        // a part whose cells were all hidden has seen nothing; one with a NaN has a sum that is a NaN
        const float factor = partials[i].max == -INFINITY ? (partials[i].sum == 0.0f ? 0.0f : partials[i].sum)
                                                          : expf(partials[i].max - max);
        sum += factor * partials[i].sum;
        for (int d = 0; d < dv; d += L::n) {
            L::store(out + d, L::fma(L::load(partials[i].v + d), L::set(factor), L::load(out + d)));
        }
    }
    const L::F inverse = L::set(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int d = 0; d < dv; d += L::n) {
        L::store(out + d, L::mul(L::load(out + d), inverse));
    }
}

}  // namespace
}  // namespace pyps::kernels
