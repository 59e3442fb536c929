// llama.cpp's KV caches, seen through the few things a join needs.
//
// cache.cpp is the one file that includes llama.cpp's internal headers. They change with every release:
// when the pinned llama-cpp-python moves, this interface stays and cache.cpp is what has to follow.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class llama_kv_cache;

namespace pyps {

// Something the caller asked for is wrong or does not fit; the text says what to change.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// This model or this cache cannot be joined at all; the text names the architecture and the reason.
struct Refusal : InputError {
    using InputError::InputError;
};

// RoPE of one layer, as arguments for ggml_rope_ext. Two contexts whose keys are to be mixed must agree on it.
struct Rope {
    int           n_rot;  // channels of each head that are rotated; the rest pass through
    int           type;   // GGML_ROPE_TYPE_*
    int           n_ctx_orig;
    float         freq_base, freq_scale, ext_factor, beta_fast, beta_slow;
    ggml_tensor * factors;  // per-frequency divisors [n_rot/2], or null

    bool operator==(const Rope & o) const {
        return n_rot == o.n_rot && type == o.type && n_ctx_orig == o.n_ctx_orig && freq_base == o.freq_base &&
               freq_scale == o.freq_scale && ext_factor == o.ext_factor && beta_fast == o.beta_fast &&
               beta_slow == o.beta_slow && factors == o.factors;
    }
};

// One attention layer's storage. K rows are cells: [n_embd_k, n_cells, n_streams]. V has the same shape when it is
// not transposed; when it is (flash attention off), each stream holds [n_cells, n_embd_v] instead, cells innermost.
struct Layer {
    size_t        number;  // among all layers with K and V, from 0: what the mapper goes by
    ggml_tensor * k;
    ggml_tensor * v;
    int64_t       head_dim;  // of K
    int64_t       n_embd_k;  // all K heads
    int64_t       n_embd_v;  // all V heads
    Rope          rope;
};

struct Cell {
    uint32_t    stream;
    uint32_t    index;  // within the stream
    llama_pos   pos;
    llama_token token;  // what llama.cpp noted beside the cell, LLAMA_TOKEN_NULL for none
};

// Empty cells chosen for new entries of one sequence. Nothing is marked used until Cache::commit.
struct Reservation {
    llama_seq_id          seq;
    std::vector<Cell>     entries;  // position and token of each
    uint32_t              stream;
    std::vector<uint32_t> index;    // the cell of each
};

// One llama_kv_cache: some of a model's layers, and cells of their own.
class Cache {
  public:
    Cache(llama_context * ctx, llama_kv_cache * kv, bool sliding);
    ~Cache();
    Cache(Cache &&) noexcept;

    const std::vector<Layer> & layers() const { return layers_; }
    uint32_t                   n_cells() const;  // of each stream
    bool                       v_transposed() const { return v_transposed_; }

    // Quantised caches hold every block of this many channels multiplied by a Hadamard matrix (symmetric, orthogonal:
    // its own inverse), which spreads outliers; 0: stored as it is. Decided by llama.cpp for K and V of each cache.
    int64_t k_hadamard() const { return k_hadamard_; }
    int64_t v_hadamard() const { return v_hadamard_; }

    // Fills an F32 [n, n] tensor in host memory, n being k_hadamard() or v_hadamard().
    void fill_hadamard(ggml_tensor * t) const;

    // The cells of seq with positions in [p0, p1), ordered by position. Several cells may share a position (a joined
    // sequence); every position must have one. Throws InputError, with the range the sequence has.
    std::vector<Cell> cells(llama_seq_id seq, llama_pos p0, llama_pos p1) const;

    // All cells of seq, ordered by position; may be empty.
    std::vector<Cell> all_cells(llama_seq_id seq) const;

    // Finds empty cells for entries of seq, side by side if possible. Throws InputError with the numbers.
    Reservation reserve(llama_seq_id seq, std::vector<Cell> entries) const;
    void        commit(const Reservation & reservation);

    // Overwrites the data of reserved cells with zeros: attention reads free cells too, under the mask, and a NaN left
    // there would spread.
    void zero(const Reservation & reservation);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
    std::vector<Layer>    layers_;
    bool                  v_transposed_ = false;
    int64_t               k_hadamard_   = 0;
    int64_t               v_hadamard_   = 0;
};

// What a context remembers: one cache, or two where some layers have a sliding window.
class Memory {
  public:
    // Throws Refusal when the context's memory is not attention caches that this project can re-encode.
    explicit Memory(llama_context * ctx);

    std::vector<Cache> &       caches() { return caches_; }
    const std::vector<Cache> & caches() const { return caches_; }
    const void *               model() const;
    ggml_backend_sched_t       sched() const;
    int                        n_threads() const;
    size_t                     n_layers() const;  // with K and V, in all caches

    // Carries out what llama.cpp has queued (shifts, copies between streams) and waits for its computation. A queued
    // copy would otherwise overwrite cells placed after it was asked for.
    void settle();

    // Throws InputError for a sequence that this context does not have: llama.cpp would abort.
    void check_seq(llama_seq_id seq) const;

  private:
    llama_context *    ctx_;
    std::vector<Cache> caches_;
};

// False for models that read in both directions: embeddings, diffusion.
bool is_causal(const llama_model * model);

// LongRoPE: a context with more cells a sequence than this turns keys by other frequency factors than a smaller one. 0 if
// the model has one set of factors, or none.
uint32_t long_context(const llama_model * model);

// The values of all weights whose name ends with "norm.weight", in the order of the names: they are the same in every
// quantisation of a model, and differ between models.
std::string norms(const llama_model * model);

// Elements of the matrices that one token is multiplied with, in all layers and for its logits, and bytes of both.
struct Work {
    double layers, logits, bytes;
};

Work work(const llama_model * model);

// Empty, or why a model of this kind cannot be joined. Needs no context.
std::string why_not_joinable(const llama_model * model);

}  // namespace pyps
