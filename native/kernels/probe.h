// Single nodes, computed by ggml's CPU backend as it would within a model: for the tests, and to see that the hook works.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyps::kernels {

// Throws EngineError if ggml cannot compute it.
//
// weights [rows][k] of a ggml_type; columns: f32, up to three dimensions of columns of k values each, with the bytes
// from one to the next. Returns f32 [columns][rows].
struct ProductProbe {
    int                    type;
    int64_t                k, rows;
    const uint8_t *        weights;
    const float *          columns;
    std::array<int64_t, 3> n;       // innermost first
    std::array<size_t, 3>  stride;  // bytes
    int                    threads;
    bool                   repacked = false;  // whether ggml repacks the weights, as it does when it loads a model

    std::vector<float> run() const;
};

// q [streams][tokens][heads][dk] f32; k, v [streams][cells][kv_heads][row] of their types; mask [streams][tokens][cells]
// f16 or null; sinks [heads] f32 or null. Returns f32 [streams][tokens][heads][dv].
struct AttentionProbe {
    int64_t          streams, tokens, heads, kv_heads, cells, dk, dv;
    const float *    q;
    int              k_type, v_type;
    const uint8_t *  k;
    const uint8_t *  v;
    const uint16_t * mask;
    const float *    sinks;
    float            scale, bias, cap;
    int              threads;

    std::vector<float> run() const;
};

}  // namespace pyps::kernels
