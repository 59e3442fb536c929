// The plan of a join: which cells are moved where, and in which groups. Making one changes nothing.
#pragma once

#include "llama_cache.h"

#include "ggml-cpp.h"

#include <optional>
#include <vector>

namespace pyps {

// Positions [p0, p1) of sequence seq in the source, to be placed from position `to` on.
struct Span {
    llama_seq_id seq;
    llama_pos    p0;
    llama_pos    p1;
    llama_pos    to;
};

// What the cache mapper does to one span in one layer: K <- a_k*K + b_k, V <- a_v*V + b_v.
struct Affine {
    float a_k;
    float b_k;
    float a_v;
    float b_v;
};

// The mapper's coefficients for every span in every layer, or none for the identity. The caller owns the data.
struct Coefficients {
    const Affine * data     = nullptr;  // [n_spans, n_layers]
    size_t         n_spans  = 0;
    size_t         n_layers = 0;

    explicit operator bool() const { return data; }

    const Affine & at(size_t span, size_t layer) const { return data[span * n_layers + layer]; }
};

// A line for each channel: x <- a*x + b. The caller owns the data.
struct Lines {
    const float * a = nullptr;  // [n]
    const float * b = nullptr;  // [n]
    size_t        n = 0;
};

// What is done to one layer of every span, channel by channel; to K where it would be at position 0.
struct LayerCorrection {
    Lines k;
    Lines v;
};

// The correction of every layer with K and V [n_layers], or none.
using Correction = std::vector<LayerCorrection>;

// What K or V goes through on its way from one cache to the other:
//
//            leaves src's        is turned    is corrected,    enters dst's
//            Hadamard domain     by RoPE      is mapped        Hadamard domain
//   stored        no                no            no               no
//   plain         yes               no            yes              yes
//   turned        yes               yes           yes              yes
//
// "Corrected" depends on whether there is a correction, "mapped" on whether there are coefficients, a Hadamard domain on
// whether the cache has one. With a correction, K is turned back to position 0, corrected there, and turned again.
enum class Path { stored, plain, turned };

// One span among the cells of a piece.
struct Part {
    uint32_t  n_cells;
    llama_pos delta;  // how many positions it moves
};

// Cells that are moved together, n of them: those of one span; or those of all spans on a GPU, where starting a kernel
// costs more than its work. Its tensors are inputs of every layer's graph.
struct Piece {
    size_t            first_span = 0;
    std::vector<Part> parts;     // one after the other, those of consecutive spans
    std::vector<Cell> src;       // [n]
    std::vector<Cell> dst;       // [n]
    std::vector<Run>  dst_runs;  // of cells that lie side by side in the destination
    std::vector<Run>  runs;      // of cells that lie side by side in the source and in the destination

    Path k       = Path::stored;  // in layers whose keys carry their position
    Path k_still = Path::stored;  // in layers whose keys do not
    Path v       = Path::stored;
    bool v_runs  = false;  // V is copied run by run, from transposed to transposed storage

    ggml_tensor * src_rows = nullptr;  // I32 [n], Cache::row of each cell
    ggml_tensor * dst_rows = nullptr;  // I64 [n]
    ggml_tensor * shift    = nullptr;  // I32 [1], the delta of the only part; or [n], of each cell
    ggml_tensor * back = nullptr;  // I32 [n], from each cell's position to 0; null without a correction. `shift` then
                                   // leads from 0 to its new position
    ggml_tensor * src_rel = nullptr;  // I32 [n], cell - lowest cell; null unless V is gathered from transposed storage
};

// Hadamard matrices F32 [n, n] of quantised caches (see Cache::k_hadamard), or null.
struct Hadamards {
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;
};

// A LayerCorrection on its way into a graph: F32 [n_embd].
struct CorrectionTensors {
    ggml_tensor * a_k = nullptr;
    ggml_tensor * b_k = nullptr;
    ggml_tensor * a_v = nullptr;
    ggml_tensor * b_v = nullptr;
};

// What a join does in one pair of caches. A model with sliding windows has two pairs, each with cells of its own.
struct Job {
    Job(const Cache & src, Cache & dst) : src(src), dst(dst) {}

    const Cache &      src;
    Cache &            dst;
    std::vector<Piece> pieces;
    Reservation        reservation;
    bool               one_graph = false;  // for all layers, as is better on a GPU

    std::vector<CorrectionTensors> corrections;  // of each layer of src, or none

    Hadamards               src_hadamards;
    Hadamards               dst_hadamards;
    ggml_context_ptr        inputs_ctx;
    ggml_backend_buffer_ptr inputs;
};

// Resolves the spans to cells, reserves the cells that they go to, and fills the inputs of the graphs. `together` and
// the exceptions are those of join.
Job plan(const Cache &             src,
         Cache &                   dst,
         const std::vector<Span> & spans,
         llama_seq_id              dst_seq,
         const Coefficients &      coefficients,
         const Correction &        correction,
         std::optional<bool>       together);

// A ggml context for so many tensors without data, and so many other bytes.
ggml_context_ptr make_context(size_t n_tensors, size_t n_bytes = 0);

}  // namespace pyps
