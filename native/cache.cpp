#include "cache.h"

// llama.cpp's internals, at the version CMakeLists.txt pins
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <map>

namespace pyps {

struct Cache::Impl {
    llama_kv_cache * kv;
    bool             sliding;
    ggml_context_ptr views;  // holds the views through which V's storage is found, and two unused inputs
};

namespace {

// Empty if its caches are of a kind that can be joined: attention caches whose keys carry their position as a rotation.
// Whether llama_hparams tells the truth about that rotation (it does not for layers without positions) is not to be seen
// here; pyps/positions.py tries it.
std::string why_not(const llama_model & model) {
    const auto & hp = model.hparams;
    if (llm_arch_is_recurrent(model.arch)) {
        return "it keeps a recurrent state, which cannot be split into spans";
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return "part of its memory is a recurrent state, which cannot be split into spans";
    }
    if (hp.is_mla()) {
        return "it uses multi-head latent attention (MLA), whose V is part of K";
    }
    if (hp.rope_type == LLAMA_ROPE_TYPE_MROPE || hp.rope_type == LLAMA_ROPE_TYPE_IMROPE || hp.n_pos_per_embd() > 1) {
        return "it uses multi-dimensional positions (M-RoPE)";
    }
    if (hp.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return "its positions are not rotary (RoPE), so keys cannot be moved";
    }
    if (hp.swa_type != LLAMA_SWA_TYPE_NONE && hp.swa_type != LLAMA_SWA_TYPE_STANDARD) {
        return "its attention is cut into chunks by absolute position, so keys that have moved would be seen by others";
    }
    return "";
}

std::string refusal(const llama_model & model, const std::string & reason) {
    return "caches of '" + model.arch_name() + "' models cannot be joined: " + reason;
}

}  // namespace

std::string why_not_joinable(const llama_model * model) {
    const std::string reason = why_not(*model);
    return reason.empty() ? "" : refusal(*model, reason);
}

std::string norms(const llama_model * model) {
    static const std::string suffix = "norm.weight";
    std::map<std::string, ggml_tensor *> found;
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0) {
            found[name] = tensor;
        }
    }
    std::string bytes;
    for (const auto & [name, tensor] : found) {
        const size_t at = bytes.size();
        bytes.resize(at + ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, &bytes[at], 0, ggml_nbytes(tensor));
    }
    return bytes;
}

Work work(const llama_model * model) {
    const auto & h     = model->hparams;
    Work         found = { 0, 0, 0 };
    const auto   add   = [&](const ggml_tensor * t, double share, double & elements) {
        elements += share * ggml_nelements(t);
        found.bytes += share * ggml_nbytes(t);
    };
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (name.rfind("blk.", 0) == 0 && tensor->ne[1] > 1) {
            // of a mixture's experts, [columns, rows, experts], a token uses some
            const bool   experts = tensor->ne[2] > 1 && h.n_expert > 0;
            const double used    = experts ? h.n_expert_used(std::stoul(name.substr(4))) : 1;
            add(tensor, experts ? used / h.n_expert : 1, found.layers);
        }
    }
    if (const ggml_tensor * output = model->output ? model->output : model->tok_embd) {
        add(output, 1, found.logits);
    }
    return found;
}

bool is_causal(const llama_model * model) {
    return model->hparams.causal_attn;
}

uint32_t long_context(const llama_model * model) {
    return !model->layers.empty() && model->layers[0].rope_long ? model->hparams.n_ctx_orig_yarn : 0;
}

Cache::Cache(llama_context * ctx, llama_kv_cache * kv, bool sliding) : impl_(std::make_unique<Impl>()) {
    const llama_model & model = ctx->get_model();
    impl_->kv                 = kv;
    impl_->sliding            = sliding;

    const auto ids = kv->get_layer_ids();
    impl_->views.reset(ggml_init({ (ids.size() + 2) * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true }));
    if (!impl_->views) {
        throw std::bad_alloc();
    }

    // the whole cache, every stream: get_v() then returns a view whose view_src is V's storage
    llama_kv_cache::slot_info all;
    all.s0 = 0;
    all.s1 = kv->get_n_stream() - 1;

    const auto & hp = model.hparams;
    const auto & cp = ctx->get_cparams();
    for (const uint32_t il : ids) {
        Layer         l;
        ggml_tensor * v = kv->get_v(impl_->views.get(), il, kv->get_size(), all);
        // the setting for flash attention does not tell: the layout is fixed before "auto" is resolved
        v_transposed_   = v->nb[1] > v->nb[2];
        l.number        = 0;
        for (uint32_t i = 0; i < il; ++i) {
            l.number += hp.has_kv(i);
        }
        l.k             = kv->get_k_storage(il);
        l.v             = v->view_src;
        l.head_dim      = hp.n_embd_head_k(il);
        l.n_embd_k      = hp.n_embd_k_gqa(il);
        l.n_embd_v      = hp.n_embd_v_gqa(il);
        l.rope          = { (int) hp.n_rot(il),
                            (int) hp.rope_type,
                            (int) cp.n_ctx_orig_yarn,
                            model.get_rope_freq_base(cp, il),
                            model.get_rope_freq_scale(cp, il),
                            cp.yarn_ext_factor,
                            cp.yarn_beta_fast,
                            cp.yarn_beta_slow,
                            model.get_rope_factors(cp, il) };
        layers_.push_back(l);
    }

    // the inputs that llama.cpp's own graphs would use tell the sizes; null where nothing is rotated
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
    impl_->kv->set_input_k_rot(t);  // K's and V's matrices are looked up by their size in one table
}

std::vector<Cell> Cache::all_cells(llama_seq_id seq) const {
    const auto &   cells  = impl_->kv->get_cells(seq);
    const uint32_t stream = impl_->kv->get_stream(seq);

    std::vector<Cell> found;
    found.reserve(cells.seq_pos_get(seq).size());
    for (const auto & [pos, i] : cells.seq_pos_get(seq)) {
        found.push_back({ stream, i, pos, cells.ext_get(i).tok });
    }
    return found;
}

std::vector<Cell> Cache::cells(llama_seq_id seq, llama_pos p0, llama_pos p1) const {
    if (p0 < 0 || p1 <= p0) {
        throw InputError("the range [" + std::to_string(p0) + ", " + std::to_string(p1) + ") holds no positions");
    }
    auto found = all_cells(seq);
    if (found.empty()) {
        throw InputError("sequence " + std::to_string(seq) + " is empty: there is nothing to join");
    }
    std::string has = "sequence " + std::to_string(seq) + " has positions " + std::to_string(found.front().pos) +
                      " to " + std::to_string(found.back().pos);
    if (impl_->sliding) {
        has += " in its layers with a sliding window (a context made with swa_full keeps all of them)";
    }
    const std::string asked = "the range [" + std::to_string(p0) + ", " + std::to_string(p1) + ") ";
    if (p0 < found.front().pos || p1 - 1 > found.back().pos) {
        throw InputError(asked + "is outside the sequence: " + has);
    }
    found.erase(std::remove_if(found.begin(), found.end(), [&](const Cell & c) { return c.pos < p0 || c.pos >= p1; }),
                found.end());

    llama_pos next = p0;
    for (const Cell & c : found) {
        if (c.pos > next) {
            break;
        }
        next = c.pos + 1;
    }
    if (next != p1) {
        throw InputError(asked + "has a gap at position " + std::to_string(next) + ": " + has);
    }
    return found;
}

Reservation Cache::reserve(llama_seq_id seq, std::vector<Cell> entries) const {
    const auto &   cells  = impl_->kv->get_cells(seq);
    const uint32_t n      = entries.size();
    const uint32_t n_free = cells.size() - cells.get_used();
    if (n == 0) {
        throw InputError("there is nothing to join");
    }
    if (n > n_free) {
        throw InputError("the joined spans need " + std::to_string(n) + " cells; this context has " +
                         std::to_string(n_free) + " free of " + std::to_string(cells.size()) +
                         ": make it larger (n_ctx)");
    }
    // Not llama_kv_cache::find_slot: where there is a sliding window it also offers used cells that are out of sight.
    Reservation r{ seq, std::move(entries), impl_->kv->get_stream(seq), {} };
    for (uint32_t i = 0; i < cells.size() && r.index.size() < n; ++i) {
        if (cells.is_empty(i)) {
            r.index.push_back(i);
        } else if (cells.size() - cells.used_max_p1() >= n) {
            r.index.clear();  // there is room for all of them side by side, further on
        }
    }
    return r;
}

void Cache::commit(const Reservation & r) {
    const uint32_t     n = r.index.size();
    llama_batch_allocr balloc(/*n_pos_per_embd*/ 1);
    llama_ubatch       ubatch = balloc.ubatch_reserve(n, 1);
    llama_seq_id       seq    = r.seq;
    ubatch.seq_id_unq[0]      = seq;
    for (uint32_t i = 0; i < n; ++i) {
        ubatch.token[i]    = r.entries[i].token;
        ubatch.pos[i]      = r.entries[i].pos;
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &seq;
    }
    llama_kv_cache::slot_info slot;
    slot.s0   = r.stream;
    slot.s1   = r.stream;
    slot.strm = { (int) r.stream };
    slot.idxs = { r.index };
    impl_->kv->apply_ubatch(slot, ubatch);
}

void Cache::zero(const Reservation & r) {
    for (const Layer & l : layers_) {
        for (const uint32_t i : r.index) {
            ggml_backend_tensor_memset(l.k, 0, r.stream * l.k->nb[2] + i * l.k->nb[1], l.k->nb[1]);
            if (!v_transposed_) {
                ggml_backend_tensor_memset(l.v, 0, r.stream * l.v->nb[2] + i * l.v->nb[1], l.v->nb[1]);
                continue;
            }
            const size_t size = ggml_type_size(l.v->type);
            for (int64_t j = 0; j < l.n_embd_v; ++j) {
                ggml_backend_tensor_memset(l.v, 0, r.stream * l.v->nb[2] + (j * n_cells() + i) * size, size);
            }
        }
    }
}

Memory::Memory(llama_context * ctx) : ctx_(ctx) {
    const llama_model & model = ctx->get_model();
    if (const auto reason = why_not(model); !reason.empty()) {
        throw Refusal(refusal(model, reason));
    }
    if (auto * kv = dynamic_cast<llama_kv_cache *>(ctx->get_memory())) {
        caches_.emplace_back(ctx, kv, false);
    } else if (auto * both = dynamic_cast<llama_kv_cache_iswa *>(ctx->get_memory())) {
        caches_.emplace_back(ctx, both->get_base(), false);
        caches_.emplace_back(ctx, both->get_swa(), true);
    } else {
        throw Refusal(refusal(model, "this context has no KV cache that pyps knows"));
    }
}

const void * Memory::model() const {
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

void Memory::settle() {
    ctx_->memory_update(false);
    ctx_->synchronize();
}

void Memory::check_seq(llama_seq_id seq) const {
    if (seq < 0 || (uint32_t) seq >= ctx_->n_seq_max()) {
        throw InputError("sequence " + std::to_string(seq) + " does not exist: this context has sequences 0 to " +
                         std::to_string(ctx_->n_seq_max() - 1));
    }
}

}  // namespace pyps
