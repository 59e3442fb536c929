// The types of weights: how 32 of them become bytes, and where their scales are. The blocks are ggml's (ggml-common.h).
//
// Each type has
//   values   of one block of the file: 32, or 256 for the K types, with a scale for each 32 or 16 of them
//   size     of that block in bytes
//   rows     that are interleaved: 1, or 8 where ggml has repacked them on loading (ggml-cpu/repack.cpp)
//   columns  from which on ours are faster than ggml's own
//   halves   whether each 16 values have a scale of their own, instead of each 32
//   bits     of an unsigned weight, which tells how many products fit into 16 bits
//   offset   that makes it unsigned: weight = scale * (byte - offset)
//   minimum  whether a minimum is added: weight = scale * byte + minimum
//   bytes()  32 weights of a block, the part-th of it; or of 8 interleaved rows the octet-th 8 weights of that part, of
//            rows 0 to 3 or 4 to 7
//   scales() the scales of the block, or of the 8 blocks
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pyps::kernels {
namespace {

// The scales of a block of R rows: those of a row are written one by one, those of all rows read at once, and not
// right away, since a load of what has just been written in pieces waits for the cache.
template <int R, int n_scales, int n_minima> struct RawScales {
    uint16_t d[R];                             // f16: the block's scale
    uint16_t m[R];                             // f16: its minimum, or the scale of its minima
    int8_t   scale[n_scales][R];               // K types: the scale of each group
    uint8_t  min[n_minima ? n_minima : 1][R];  // and of each minimum
};

inline uint16_t load16(const uint8_t * p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

inline __m256i load_nibbles(const uint8_t * p) {  // 16 bytes: low nibbles first, then high ones
    const __m128i x = _mm_loadu_si128((const __m128i *) p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(x, 4), x), _mm256_set1_epi8(15));
}

inline __m256i fifth_bits(const uint8_t * p) {  // 32 bits become bytes of 16 or 0
    int bits;
    memcpy(&bits, p, 4);
    const __m256i order = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i which = _mm256_set1_epi64x(0x8040201008040201);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), order);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, which), which), _mm256_set1_epi8(16));
}

struct Simple {  // one f16 scale a block
    static constexpr int             values = 32, rows = 1, columns = 1;
    static constexpr bool            halves  = false;
    static constexpr bool            minimum = false;
    template <class Raw> static void scales(const uint8_t * block, Raw & raw, int r) { raw.d[r] = load16(block); }
};

struct SimpleMinimum : Simple {  // and a minimum
    static constexpr bool            minimum = true;
    static constexpr int             offset  = 0;
    template <class Raw> static void scales(const uint8_t * block, Raw & raw, int r) {
        raw.d[r] = load16(block);
        raw.m[r] = load16(block + 2);
    }
};

struct Q8_0 : Simple {
    static constexpr int type = 8, size = 34, bits = 8, offset = 128;
    static __m256i       bytes(const uint8_t * block, int) {
        return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) (block + 2)), _mm256_set1_epi8(-128));
    }
};

struct Q4_0 : Simple {
    static constexpr int type = 2, size = 18, bits = 4, offset = 8;
    static __m256i       bytes(const uint8_t * block, int) { return load_nibbles(block + 2); }
};

struct Q4_1 : SimpleMinimum {
    static constexpr int type = 3, size = 20, bits = 4;
    static __m256i       bytes(const uint8_t * block, int) { return load_nibbles(block + 4); }
};

struct Q5_0 : Simple {
    static constexpr int type = 6, size = 22, bits = 5, offset = 16;
    static __m256i       bytes(const uint8_t * block, int) {
        return _mm256_or_si256(load_nibbles(block + 6), fifth_bits(block + 2));
    }
};

struct Q5_1 : SimpleMinimum {
    static constexpr int type = 7, size = 24, bits = 5;
    static __m256i       bytes(const uint8_t * block, int) {
        return _mm256_or_si256(load_nibbles(block + 8), fifth_bits(block + 4));
    }
};

struct IQ4_NL : Simple {
    static constexpr int type = 20, size = 18, bits = 8, offset = 128;
    static __m256i       values_of_nibbles() {  // plus 128
        return _mm256_broadcastsi128_si256(
            _mm_setr_epi8(1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15));
    }
    static __m256i bytes(const uint8_t * block, int) {
        return _mm256_shuffle_epi8(values_of_nibbles(), load_nibbles(block + 2));
    }
};

struct FourBitScales {  // of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes
    static constexpr int             values = 256, rows = 1, columns = 2;
    static constexpr bool            halves  = false;
    static constexpr bool            minimum = true;
    static constexpr int             offset  = 0;
    template <class Raw> static void scales(const uint8_t * block, Raw & raw, int r) {
        raw.d[r]          = load16(block);
        raw.m[r]          = load16(block + 2);
        const uint8_t * s = block + 4;
        for (int j = 0; j < 4; ++j) {
            raw.scale[j][r]     = int8_t(s[j] & 63);
            raw.min[j][r]       = s[j + 4] & 63;
            raw.scale[j + 4][r] = int8_t((s[j + 8] & 15) | (s[j] >> 6) << 4);
            raw.min[j + 4][r]   = uint8_t(s[j + 8] >> 4 | (s[j + 4] >> 6) << 4);
        }
    }
};

// 32 bytes hold the low nibbles of one part and the high nibbles of the next
inline __m256i part_of_nibbles(const uint8_t * p, int part) {
    const __m256i x = _mm256_loadu_si256((const __m256i *) (p + part / 2 * 32));
    return _mm256_and_si256(part % 2 ? _mm256_srli_epi16(x, 4) : x, _mm256_set1_epi8(15));
}

struct Q4_K : FourBitScales {
    static constexpr int type = 12, size = 144, bits = 4;
    static __m256i       bytes(const uint8_t * block, int part) { return part_of_nibbles(block + 16, part); }
};

struct Q5_K : FourBitScales {
    static constexpr int type = 13, size = 176, bits = 5;
    static __m256i       bytes(const uint8_t * block, int part) {
        const __m256i high = _mm256_loadu_si256((const __m256i *) (block + 16));  // bit `part` of each byte
        const __m256i bit = _mm256_and_si256(_mm256_srl_epi16(high, _mm_cvtsi32_si128(part)), _mm256_set1_epi8(1));
        return _mm256_or_si256(part_of_nibbles(block + 48, part), _mm256_slli_epi16(bit, 4));
    }
};

struct Q6_K {
    static constexpr int  type = 14, size = 210, bits = 6, offset = 32, values = 256, rows = 1, columns = 2;
    static constexpr bool halves = true, minimum = false;
    static __m256i        bytes(const uint8_t * block, int part) {
        // 128 values are four parts: part p has nibbles of 32 bytes, p / 2 says which nibble, and bits 2p of `high`
        const int     p    = part % 4;
        const __m256i low  = _mm256_loadu_si256((const __m256i *) (block + part / 4 * 64 + p % 2 * 32));
        const __m256i high = _mm256_loadu_si256((const __m256i *) (block + 128 + part / 4 * 32));
        const __m256i four = _mm256_and_si256(p / 2 ? _mm256_srli_epi16(low, 4) : low, _mm256_set1_epi8(15));
        const __m256i two = _mm256_and_si256(_mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * p)), _mm256_set1_epi8(3));
        return _mm256_or_si256(four, _mm256_slli_epi16(two, 4));
    }
    template <class Raw> static void scales(const uint8_t * block, Raw & raw, int r) {
        raw.d[r] = load16(block + 208);
        for (int j = 0; j < 16; ++j) {
            raw.scale[j][r] = int8_t(block[192 + j]);
        }
    }
};

// 8 bytes of each of 4 rows; nibble: 0 for the low ones, 1 for the high ones
inline __m256i load_octets(const uint8_t * p, int nibble) {
    const __m256i x = _mm256_loadu_si256((const __m256i *) p);
    return _mm256_and_si256(nibble ? _mm256_srli_epi16(x, 4) : x, _mm256_set1_epi8(15));
}

struct Simple8 : Simple {  // 8 scales, then the first 8 bytes of all rows, then the other 8
    static constexpr int             rows = 8, columns = 2, size = 18;
    template <class Raw> static void scales(const uint8_t * block, Raw & raw, int r) { memcpy(raw.d + r, block, 16); }
    static __m256i                   nibbles(const uint8_t * block, int octet, int half) {
        return load_octets(block + 16 + octet % 2 * 64 + half * 32, octet / 2);
    }
};

struct Q4_0x8 : Simple8 {
    static constexpr int type = 2, bits = 4, offset = 8;
    static __m256i       bytes(const uint8_t * block, int, int octet, int half) {
        return _mm256_xor_si256(nibbles(block, octet, half), _mm256_set1_epi8(8));  // ggml has made them signed
    }
};

struct IQ4_NLx8 : Simple8 {
    static constexpr int type = 20, bits = 8, offset = 128;
    static __m256i       bytes(const uint8_t * block, int, int octet, int half) {
        return _mm256_shuffle_epi8(IQ4_NL::values_of_nibbles(), nibbles(block, octet, half));
    }
};

struct Q4_Kx8 : FourBitScales {
    static constexpr int type = 12, size = 144, bits = 4, rows = 8;
    static __m256i       bytes(const uint8_t * block, int part, int octet, int half) {
        return load_octets(block + 128 + (part / 2 * 4 + octet) * 64 + half * 32, part % 2);
    }
    // each part has the scales and minima of 8 rows, packed as those of the 8 parts of a row are
    template <class Raw> static void scales(const uint8_t * block, Raw & raw, int r) {
        memcpy(raw.d + r, block, 16);
        memcpy(raw.m + r, block + 16, 16);
        for (int part = 0; part < 8; ++part) {
            const uint8_t * s = block + 32 + 12 * part;
            for (int j = 0; j < 4; ++j) {
                raw.scale[part][r + j]     = int8_t(s[j] & 63);
                raw.min[part][r + j]       = s[j + 4] & 63;
                raw.scale[part][r + j + 4] = int8_t((s[j + 8] & 15) | (s[j] >> 6) << 4);
                raw.min[part][r + j + 4]   = uint8_t(s[j + 8] >> 4 | (s[j + 4] >> 6) << 4);
            }
        }
    }
};

}  // namespace
}  // namespace pyps::kernels
