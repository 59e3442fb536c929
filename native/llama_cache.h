// llama.cpp's KV caches, seen through the few things that a join needs.
//
// The llama_* files are the only ones that include llama.cpp's internal headers. Those headers change with every
// release: when the pinned llama-cpp-python moves, the interfaces in llama_*.h stay, and llama_*.cpp have to follow.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <vector>

class llama_kv_cache;

namespace pyps {

// RoPE of one layer, as arguments for ggml_rope_ext. Two contexts whose keys are to be mixed must agree on it.
struct Rope {
    int           n_rot;  // channels of each head that are rotated; the rest pass through
    int           type;   // GGML_ROPE_TYPE_*
    int           n_ctx_orig;
    float         freq_base;
    float         freq_scale;
    float         ext_factor;
    float         beta_fast;
    float         beta_slow;
    ggml_tensor * factors;  // divisors of the frequencies [n_rot/2], or null

    bool operator==(const Rope & o) const {
        return n_rot == o.n_rot && type == o.type && n_ctx_orig == o.n_ctx_orig && freq_base == o.freq_base &&
               freq_scale == o.freq_scale && ext_factor == o.ext_factor && beta_fast == o.beta_fast &&
               beta_slow == o.beta_slow && factors == o.factors;
    }
};

// What llama.cpp notes beside a cell.
struct Entry {
    llama_pos   pos;
    llama_token token;  // LLAMA_TOKEN_NULL for none
};

// A place for K and V of one token, in every layer of a cache.
struct Cell {
    uint32_t stream;
    uint32_t index;  // within the stream
    Entry    entry;
};

// Orders cells of one stream as they lie in the cache.
inline bool by_index(const Cell & a, const Cell & b) {
    return a.index < b.index;
}

// Cells [first, first + n) of a list; they lie side by side in one stream of the cache.
struct Run {
    size_t first;
    size_t n;
};

// Splits a list of cells into as few runs as possible.
std::vector<Run> runs(const std::vector<Cell> & cells);

// The same for two lists of equal length: the cells of a run lie side by side in both caches.
std::vector<Run> runs(const std::vector<Cell> & a, const std::vector<Cell> & b);

// The storage of one attention layer.
struct Layer {
    size_t        number;        // among all layers with K and V, from 0: the mapper's number of the layer
    ggml_tensor * k;             // [n_embd_k, n_cells, n_streams]
    ggml_tensor * v;             // [n_embd_v, n_cells, n_streams]; if transposed, each stream is [n_cells, n_embd_v]
    bool          v_transposed;  // cells are innermost, as they are without flash attention
    int64_t       head_dim;      // of K
    int64_t       n_embd_k;      // of all K heads
    int64_t       n_embd_v;      // of all V heads
    Rope          rope;

    // Bytes of K and V of one cell, as the cache stores them: quantised types included.
    size_t k_row_size() const { return k->nb[1]; }

    size_t v_row_size() const { return ggml_row_size(v->type, n_embd_v); }

    // Bytes between two channels of transposed V.
    size_t v_channel_stride() const { return v->ne[1] * ggml_type_size(v->type); }

    // Byte offsets of a cell, and for transposed V of its value in one channel.
    //
    // llama.cpp pads transposed V to the widest layer of the model ([TAG_V_CACHE_VARIABLE] in llama-kv-cache.cpp), so
    // v->ne[0] and v->nb[1] say nothing about this layer. Only v->nb[2] is a valid stride: it takes one stream, padding
    // included, to the next.
    size_t k_offset(const Cell & cell) const { return cell.stream * k->nb[2] + cell.index * k->nb[1]; }

    size_t v_offset(const Cell & cell, int64_t channel = 0) const {
        return cell.stream * v->nb[2] + (v_transposed
                                             ? channel * v_channel_stride() + cell.index * ggml_type_size(v->type)
                                             : cell.index * v->nb[1]);
    }
};

// Empty cells that were chosen for new entries of one sequence. They become used with Cache::commit.
struct Reservation {
    llama_seq_id      seq = 0;
    std::vector<Cell> cells;  // all in the stream of the sequence
};

// One llama_kv_cache: some of a model's layers, and cells of their own.
class Cache {
  public:
    Cache(llama_context * ctx, llama_kv_cache * kv, bool sliding);
    ~Cache();
    Cache(Cache &&) noexcept;

    const std::vector<Layer> & layers() const { return layers_; }

    uint32_t n_cells() const;  // of each stream

    bool v_transposed() const { return !layers_.empty() && layers_.front().v_transposed; }

    // The number of a cell among those of all streams.
    int64_t row(const Cell & cell) const { return (int64_t) cell.stream * n_cells() + cell.index; }

    // Quantised caches hold every block of this many channels multiplied by a Hadamard matrix (symmetric, orthogonal:
    // its own inverse), which spreads outliers. 0 if the cache holds K or V as they are. llama.cpp decides it for K and
    // V of each cache.
    int64_t k_hadamard() const { return k_hadamard_; }

    int64_t v_hadamard() const { return v_hadamard_; }

    // Fills an F32 [n, n] tensor in host memory, n being k_hadamard() or v_hadamard().
    void fill_hadamard(ggml_tensor * t) const;

    // The cells of seq with positions in [p0, p1), ordered by position. Several cells may share a position (a joined
    // sequence); every position must have one. Throws InputError, with the range that the sequence has.
    std::vector<Cell> cells(llama_seq_id seq, llama_pos p0, llama_pos p1) const;

    // All cells of seq, ordered by position; there may be none.
    std::vector<Cell> all_cells(llama_seq_id seq) const;

    // Chooses empty cells for entries of seq, side by side if possible. Throws InputError with the numbers.
    Reservation reserve(llama_seq_id seq, const std::vector<Entry> & entries) const;

    // Gives the reserved cells their entries, as llama_kv_cache::state_read_meta does it. llama.cpp's apply_ubatch
    // evicts what a cell holds, so only empty cells may come here.
    void commit(const Reservation & reservation);

    // Empties reserved cells, whether they have their entries yet or not, and their data.
    void release(const Reservation & reservation);

    // Overwrites the data of reserved cells with zeros: attention reads free cells too, under the mask, and a NaN that
    // is left there would spread.
    void zero(const Reservation & reservation);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
    std::vector<Layer>    layers_;
    int64_t               k_hadamard_ = 0;
    int64_t               v_hadamard_ = 0;
};

// What a context remembers: one cache, or two where some layers have a sliding window.
class Memory {
  public:
    // Throws RefusedError if the context's memory is anything but attention caches that can be joined.
    explicit Memory(llama_context * ctx);

    std::vector<Cache> & caches() { return caches_; }

    const std::vector<Cache> & caches() const { return caches_; }

    const llama_model *  model() const;
    ggml_backend_sched_t sched() const;
    int                  n_threads() const;
    size_t               n_layers() const;                 // with K and V, in all caches
    size_t               n_cells(llama_seq_id seq) const;  // of the cache where the sequence takes most
    std::vector<int64_t> hadamards() const;                // k_hadamard() and v_hadamard() of every cache

    // Carries out what llama.cpp has queued (shifts, copies between streams) and waits for its computation. A queued
    // copy would otherwise overwrite cells that are placed after the call that queued it.
    void settle();

    // Computes tokens at any positions of seq, in batches of the context's n_ubatch. Each attends to every cell of the
    // sequence that is not behind its own position: those that were there, those of its own batch, and those of the
    // batches before. No logits are computed. All or nothing. Needs settle(). Throws InputError without room for them,
    // EngineError if the computation failed or was aborted.
    void decode(llama_seq_id seq, const std::vector<Entry> & entries);

    // Throws InputError for a sequence that this context does not have: llama.cpp would abort.
    void check_seq(llama_seq_id seq) const;

  private:
    llama_context *    ctx_;
    std::vector<Cache> caches_;
};

}  // namespace pyps
