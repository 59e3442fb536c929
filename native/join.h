// The join: spans of several sequences, re-encoded, mapped and placed side by side in one sequence.
#pragma once

#include "cache.h"

#include <optional>
#include <vector>

namespace pyps {

// Positions [p0, p1) of sequence seq in the source, to be placed from position `to` on.
struct Span {
    llama_seq_id seq;
    llama_pos    p0, p1;
    llama_pos    to;
};

// What the cache mapper does to one span in one layer: K <- a_k*K + b_k, V <- a_v*V + b_v.
struct Affine {
    float a_k, b_k, a_v, b_v;
};

// Places the spans in sequence dst_seq of dst, in the order given; src and dst are contexts of one model, or the same
// context. `rotates` says for each layer whether its keys carry their position (SmolLM3's every fourth does not);
// `affine` is [n_spans][n_layers], or null for the identity. All or nothing: on any exception dst is as it was. Returns
// the number of cells placed. `together`: all spans and layers in one graph of few large steps, as is best where starting
// a step is dear (a GPU), and not a graph a layer with steps a span; unset for what suits where the destination lies.
//
// Throws InputError (what was asked for cannot be), Refusal (the model's cache cannot be joined) and
// std::runtime_error (the computation failed or was aborted).
uint32_t join(llama_context * src, llama_context * dst, const std::vector<Span> & spans, llama_seq_id dst_seq,
              const std::vector<bool> & rotates, const Affine * affine, std::optional<bool> together);

}  // namespace pyps
