#include "llama_cache.h"

#include "errors.h"
#include "llama_model.h"

// llama.cpp's internal headers, of the version that CMakeLists.txt finds
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <utility>

namespace pyps {

struct Cache::Impl {
    llama_kv_cache * kv;
    bool             sliding;
    ggml_context_ptr views;  // holds the views that lead to V's storage, and two inputs that nothing computes
};

std::vector<Run> runs(const std::vector<Cell> & cells) {
    return runs(cells, cells);
}

std::vector<Run> runs(const std::vector<Cell> & a, const std::vector<Cell> & b) {
    const auto follows = [](const Cell & next, const Cell & cell) {
        return next.stream == cell.stream && next.index == cell.index + 1;
    };
    std::vector<Run> split;
    for (size_t i = 0; i < a.size(); ++i) {
        if (i > 0 && follows(a[i], a[i - 1]) && follows(b[i], b[i - 1])) {
            split.back().n++;
        } else {
            split.push_back({ i, 1 });
        }
    }
    return split;
}

namespace {

// Cells of one stream, as llama.cpp wants to be told which ones a batch is to fill.
llama_kv_cache::slot_info make_slot(const std::vector<Cell> & cells) {
    llama_kv_cache::slot_info slot;
    slot.resize(1);
    slot.s0      = cells.front().stream;
    slot.s1      = slot.s0;
    slot.strm[0] = slot.s0;
    for (const Cell & cell : cells) {
        slot.idxs[0].push_back(cell.index);
    }
    return slot;
}

// The entries of the cells as a batch of one sequence without outputs. It points to seq.
llama_ubatch make_ubatch(llama_seq_id & seq, const std::vector<Cell> & cells) {
    llama_batch_allocr balloc(/*n_pos_per_embd*/ 1);
    llama_ubatch       ubatch = balloc.ubatch_reserve(cells.size(), 1);
    ubatch.seq_id_unq[0]      = seq;
    ubatch.seq_idx[0]         = -1;
    ubatch.seq_idx[seq]       = 0;
    for (size_t i = 0; i < cells.size(); ++i) {
        ubatch.token[i]    = cells[i].entry.token;
        ubatch.pos[i]      = cells[i].entry.pos;
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &seq;
    }
    return ubatch;
}

// llama_context::n_outputs, which is private. An explicit instantiation may name it, and hands it out.
template <auto member> struct Hands {
    friend uint32_t & n_outputs(llama_context & ctx) { return ctx.*member; }
};

uint32_t & n_outputs(llama_context & ctx);
template struct Hands<&llama_context::n_outputs>;

}  // namespace

Cache::Cache(llama_context * ctx, llama_kv_cache * kv, bool sliding) : impl_(std::make_unique<Impl>()) {
    const llama_model & model = ctx->get_model();
    impl_->kv                 = kv;
    impl_->sliding            = sliding;

    const auto ids = kv->get_layer_ids();
    impl_->views.reset(ggml_init({ (ids.size() + 2) * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true }));
    if (!impl_->views) {
        throw std::bad_alloc();
    }

    // The view of every stream of the whole cache has V's storage as its view_src.
    llama_kv_cache::slot_info all;
    all.s0 = 0;
    all.s1 = kv->get_n_stream() - 1;

    const auto & hp = model.hparams;
    const auto & cp = ctx->get_cparams();
    for (const uint32_t il : ids) {
        const ggml_tensor * v = kv->get_v(impl_->views.get(), il, kv->get_size(), all);
        Layer               layer;
        layer.number = 0;
        for (uint32_t i = 0; i < il; ++i) {
            layer.number += hp.has_kv(i);
        }
        layer.k = kv->get_k_storage(il);
        layer.v = v->view_src;
        // The context's setting for flash attention does not tell: the layout is fixed before "auto" is resolved.
        layer.v_transposed    = v->nb[1] > v->nb[2];
        layer.head_dim        = hp.n_embd_head_k(il);
        layer.n_embd_k        = hp.n_embd_k_gqa(il);
        layer.n_embd_v        = hp.n_embd_v_gqa(il);
        layer.rope.n_rot      = hp.n_rot(il);
        layer.rope.type       = hp.rope_type;
        layer.rope.n_ctx_orig = cp.n_ctx_orig_yarn;
        layer.rope.freq_base  = model.get_rope_freq_base(cp, il);
        layer.rope.freq_scale = model.get_rope_freq_scale(cp, il);
        layer.rope.ext_factor = cp.yarn_ext_factor;
        layer.rope.beta_fast  = cp.yarn_beta_fast;
        layer.rope.beta_slow  = cp.yarn_beta_slow;
        layer.rope.factors    = model.get_rope_factors(cp, il);
        layers_.push_back(layer);
    }

    // The inputs that llama.cpp's own graphs would use tell the sizes. They are null where nothing is rotated.
    if (const ggml_tensor * rot = kv->build_input_k_rot(impl_->views.get())) {
        k_hadamard_ = rot->ne[0];
    }
    if (const ggml_tensor * rot = kv->build_input_v_rot(impl_->views.get())) {
        v_hadamard_ = rot->ne[0];
    }
}

Cache::~Cache()                 = default;
Cache::Cache(Cache &&) noexcept = default;

uint32_t Cache::n_cells() const {
    return impl_->kv->get_size();
}

void Cache::fill_hadamard(ggml_tensor * t) const {
    impl_->kv->set_input_k_rot(t);  // llama.cpp looks up matrices of K and of V by their size in one table
}

std::vector<Cell> Cache::cells(llama_seq_id seq, llama_pos p0, llama_pos p1) const {
    if (p0 < 0 || p1 <= p0) {
        throw InputError("the range [" + std::to_string(p0) + ", " + std::to_string(p1) + ") holds no positions");
    }
    auto cells = all_cells(seq);
    if (cells.empty()) {
        throw InputError("sequence " + std::to_string(seq) + " is empty: there is nothing to join");
    }
    const llama_pos   first = cells.front().entry.pos;
    const llama_pos   last  = cells.back().entry.pos;
    const std::string range = "the range [" + std::to_string(p0) + ", " + std::to_string(p1) + ") ";
    std::string       has =
        "sequence " + std::to_string(seq) + " has positions " + std::to_string(first) + " to " + std::to_string(last);
    if (impl_->sliding) {
        has += " in its layers with a sliding window (a context made with swa_full keeps all of them)";
    }
    if (p0 < first || p1 - 1 > last) {
        throw InputError(range + "is outside the sequence: " + has);
    }
    const auto outside = [&](const Cell & c) { return c.entry.pos < p0 || c.entry.pos >= p1; };
    cells.erase(std::remove_if(cells.begin(), cells.end(), outside), cells.end());

    llama_pos next = p0;
    for (const Cell & c : cells) {
        if (c.entry.pos > next) {
            break;
        }
        next = c.entry.pos + 1;
    }
    if (next != p1) {
        throw InputError(range + "has a gap at position " + std::to_string(next) + ": " + has);
    }
    return cells;
}

std::vector<Cell> Cache::all_cells(llama_seq_id seq) const {
    const auto &   kv_cells = impl_->kv->get_cells(seq);
    const uint32_t stream   = impl_->kv->get_stream(seq);

    std::vector<Cell> cells;
    cells.reserve(kv_cells.seq_pos_get(seq).size());
    for (const auto & [pos, index] : kv_cells.seq_pos_get(seq)) {
        cells.push_back({ stream, index, { pos, kv_cells.ext_get(index).tok } });
    }
    return cells;
}

Reservation Cache::reserve(llama_seq_id seq, const std::vector<Entry> & entries) const {
    const auto &   kv_cells = impl_->kv->get_cells(seq);
    const uint32_t stream   = impl_->kv->get_stream(seq);
    const uint32_t n        = entries.size();
    const uint32_t n_free   = kv_cells.size() - kv_cells.get_used();
    if (n == 0) {
        throw InputError("there is nothing to join");
    }
    if (n > n_free) {
        throw InputError(std::to_string(n) + " more cells are needed; this context has " + std::to_string(n_free) +
                         " free of " + std::to_string(kv_cells.size()) + ": make it larger (n_ctx)");
    }
    Reservation reservation;
    reservation.seq = seq;
    auto & cells    = reservation.cells;
    // llama_kv_cache::find_slot will not do: where there is a sliding window, it also offers used cells that are out of
    // sight.
    for (uint32_t i = 0; i < kv_cells.size() && cells.size() < n; ++i) {
        if (kv_cells.is_empty(i)) {
            cells.push_back({ stream, i, entries[cells.size()] });
        } else if (kv_cells.size() - kv_cells.used_max_p1() >= n) {
            cells.clear();  // there is room for all of them side by side, further on
        }
    }
    return reservation;
}

void Cache::commit(const Reservation & reservation) {
    llama_seq_id seq = reservation.seq;
    impl_->kv->apply_ubatch(make_slot(reservation.cells), make_ubatch(seq, reservation.cells));
}

void Cache::release(const Reservation & reservation) {
    // by cell: several cells of a sequence may share a position
    auto & kv_cells = const_cast<llama_kv_cells &>(impl_->kv->get_cells(reservation.seq));
    for (const Cell & cell : reservation.cells) {
        if (!kv_cells.is_empty(cell.index)) {
            kv_cells.rm(cell.index);
        }
    }
    zero(reservation);
}

void Cache::zero(const Reservation & reservation) {
    for (const Layer & l : layers_) {
        for (const Cell & cell : reservation.cells) {
            ggml_backend_tensor_memset(l.k, 0, l.k_offset(cell), l.k_row_size());
            if (!l.v_transposed) {
                ggml_backend_tensor_memset(l.v, 0, l.v_offset(cell), l.v_row_size());
                continue;
            }
            for (int64_t channel = 0; channel < l.n_embd_v; ++channel) {
                ggml_backend_tensor_memset(l.v, 0, l.v_offset(cell, channel), ggml_type_size(l.v->type));
            }
        }
    }
}

Memory::Memory(llama_context * ctx) : ctx_(ctx) {
    if (const auto reason = why_not_joinable(model()); !reason.empty()) {
        throw RefusedError(reason);
    }
    if (auto * kv = dynamic_cast<llama_kv_cache *>(ctx->get_memory())) {
        caches_.emplace_back(ctx, kv, false);
    } else if (auto * both = dynamic_cast<llama_kv_cache_iswa *>(ctx->get_memory())) {
        caches_.emplace_back(ctx, both->get_base(), false);
        caches_.emplace_back(ctx, both->get_swa(), true);
    } else {
        throw RefusedError(refusal(model(), "this context has no KV cache that pyps knows"));
    }
}

const llama_model * Memory::model() const {
    return &ctx_->get_model();
}

ggml_backend_sched_t Memory::sched() const {
    return ctx_->get_sched();
}

int Memory::n_threads() const {
    return ctx_->n_threads_batch();
}

size_t Memory::n_layers() const {
    size_t n = 0;
    for (const Cache & cache : caches_) {
        n += cache.layers().size();
    }
    return n;
}

size_t Memory::n_cells(llama_seq_id seq) const {
    check_seq(seq);
    size_t n = 0;
    for (const Cache & cache : caches_) {
        n = std::max(n, cache.all_cells(seq).size());
    }
    return n;
}

std::vector<int64_t> Memory::hadamards() const {
    std::vector<int64_t> sizes;
    for (const Cache & cache : caches_) {
        sizes.insert(sizes.end(), { cache.k_hadamard(), cache.v_hadamard() });
    }
    return sizes;
}

void Memory::settle() {
    ctx_->memory_update(false);
    ctx_->synchronize();
}

void Memory::decode(llama_seq_id seq, const std::vector<Entry> & entries) {
    std::vector<Reservation> reservations;
    for (const Cache & cache : caches_) {
        reservations.push_back(cache.reserve(seq, entries));
    }
    // One memory context for all batches, as llama.cpp's decode has it.
    std::vector<llama_ubatch>                           ubatches;
    std::vector<std::vector<llama_kv_cache::slot_info>> slots(caches_.size());
    for (size_t first = 0; first < entries.size(); first += ctx_->n_ubatch()) {
        const size_t last = std::min(first + ctx_->n_ubatch(), entries.size());
        for (size_t c = 0; c < caches_.size(); ++c) {
            const auto &            all = reservations[c].cells;
            const std::vector<Cell> cells(all.begin() + first, all.begin() + last);
            slots[c].push_back(make_slot(cells));
            if (c == 0) {
                ubatches.push_back(make_ubatch(seq, cells));
            }
        }
    }
    std::unique_ptr<llama_memory_context_i> batches;
    if (caches_.size() == 1) {
        auto * kv = static_cast<llama_kv_cache *>(ctx_->get_memory());
        batches   = std::make_unique<llama_kv_cache_context>(kv, slots[0], ubatches);
    } else {
        auto * both = static_cast<llama_kv_cache_iswa *>(ctx_->get_memory());
        batches     = std::make_unique<llama_kv_cache_iswa_context>(both, slots[0], slots[1], ubatches);
    }

    ctx_->sched_reserve();
    uint32_t &     outputs = n_outputs(*ctx_);
    const uint32_t before  = std::exchange(outputs, 0);  // the graph has as many as the batch
    ggml_status    status  = GGML_STATUS_SUCCESS;
    do {
        ctx_->process_ubatch(batches->get_ubatch(), LLM_GRAPH_TYPE_DEFAULT, batches.get(), status);
    } while (status == GGML_STATUS_SUCCESS && batches->next());
    ctx_->synchronize();
    outputs = before;
    if (status != GGML_STATUS_SUCCESS) {
        for (size_t c = 0; c < caches_.size(); ++c) {
            caches_[c].release(reservations[c]);
        }
        throw EngineError("the tokens could not be computed (status " + std::to_string(status) +
                          "); the sequence is as it was");
    }
}

void Memory::check_seq(llama_seq_id seq) const {
    if (seq < 0 || (uint32_t) seq >= ctx_->n_seq_max()) {
        throw InputError("sequence " + std::to_string(seq) + " does not exist: this context has sequences 0 to " +
                         std::to_string(ctx_->n_seq_max() - 1));
    }
}

}  // namespace pyps
