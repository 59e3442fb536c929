#include "join.h"

#include "errors.h"
#include "layer_graph.h"

#include <limits>

namespace pyps {

namespace {

void check(const Memory &            src,
           const Memory &            dst,
           const std::vector<Span> & spans,
           llama_seq_id              dst_seq,
           const std::vector<bool> & rotates,
           const Coefficients &      coefficients,
           const Correction &        correction);
void compute(const Job &               job,
             const Memory &            memory,
             const std::vector<bool> & rotates,
             const Coefficients &      coefficients);

}  // namespace

uint32_t join(llama_context *           ctx_src,
              llama_context *           ctx_dst,
              const std::vector<Span> & spans,
              llama_seq_id              dst_seq,
              const std::vector<bool> & rotates,
              const Coefficients &      coefficients,
              const Correction &        correction,
              std::optional<bool>       together) {
    Memory src(ctx_src);
    Memory dst(ctx_dst);
    check(src, dst, spans, dst_seq, rotates, coefficients, correction);
    src.settle();
    dst.settle();

    std::vector<Job> jobs;
    for (size_t c = 0; c < src.caches().size(); ++c) {
        jobs.push_back(plan(src.caches()[c], dst.caches()[c], spans, dst_seq, coefficients, correction, together));
    }
    try {
        for (const Job & job : jobs) {
            compute(job, dst, rotates, coefficients);
        }
    } catch (...) {
        for (Job & job : jobs) {
            job.dst.zero(job.reservation);
        }
        throw;
    }
    for (Job & job : jobs) {
        job.dst.commit(job.reservation);
    }
    return jobs[0].reservation.cells.size();
}

namespace {

ggml_backend_sched_ptr make_sched(const Memory & memory, size_t graph_size);
void                   set_n_threads(ggml_backend_sched_t sched, int n_threads);
void                   check_supported(ggml_backend_sched_t sched, ggml_cgraph * gf);

// Throws InputError if the request cannot be fulfilled, whatever the sequences hold.
void check(const Memory &            src,
           const Memory &            dst,
           const std::vector<Span> & spans,
           llama_seq_id              dst_seq,
           const std::vector<bool> & rotates,
           const Coefficients &      coefficients,
           const Correction &        correction) {
    const size_t n_layers = src.n_layers();
    if (coefficients && (coefficients.n_spans != spans.size() || coefficients.n_layers != n_layers)) {
        throw InputError("the mapper's coefficients must be [" + std::to_string(spans.size()) + ", " +
                         std::to_string(n_layers) + ", 4], a row for each span and layer");
    }
    if (!correction.empty() && correction.size() != n_layers) {
        throw InputError("the correction has " + std::to_string(correction.size()) + " layers; this model has " +
                         std::to_string(n_layers));
    }
    if (src.model() != dst.model()) {
        throw InputError("the two contexts belong to different models: caches can only be joined within one model");
    }
    for (size_t c = 0; c < src.caches().size(); ++c) {
        const auto & from = src.caches()[c].layers();
        const auto & to   = dst.caches()[c].layers();
        for (size_t i = 0; i < from.size(); ++i) {
            if (!correction.empty()) {
                const LayerCorrection & c = correction[from[i].number];
                if (c.k.n != (size_t) from[i].n_embd_k || c.v.n != (size_t) from[i].n_embd_v) {
                    throw InputError("the correction of layer " + std::to_string(from[i].number) + " must have " +
                                     std::to_string(from[i].n_embd_k) + " channels for K and " +
                                     std::to_string(from[i].n_embd_v) + " for V");
                }
            }
            if (!(from[i].rope == to[i].rope)) {
                throw InputError(
                    "the two contexts encode positions differently (RoPE base, scaling or frequency factors, which "
                    "may depend on the context size): create both with the same RoPE settings");
            }
        }
    }
    if (rotates.size() != n_layers) {
        throw InputError("the list of layers that RoPE turns has " + std::to_string(rotates.size()) +
                         " entries; this model has " + std::to_string(n_layers) + " layers with K and V");
    }
    dst.check_seq(dst_seq);
    for (const Span & s : spans) {
        src.check_seq(s.seq);
        if (s.to < 0) {
            throw InputError("a span cannot be placed at a negative position (" + std::to_string(s.to) + ")");
        }
        if (s.to + ((int64_t) s.p1 - s.p0) > std::numeric_limits<llama_pos>::max()) {
            throw InputError("a span cannot be placed at position " + std::to_string(s.to) + ": positions end there");
        }
    }
}

// Moves the data of all layers of one pair of caches. memory is that of the destination. Throws EngineError if the
// computation failed or was aborted, InputError if a device cannot do it.
void compute(const Job &               job,
             const Memory &            memory,
             const std::vector<bool> & rotates,
             const Coefficients &      coefficients) {
    const size_t n_layers = job.src.layers().size();
    // On a CPU, a graph for each layer keeps the F32 intermediates small enough for its cache.
    const size_t at_once    = job.one_graph ? n_layers : 1;
    size_t       graph_size = 64;
    for (const Piece & p : job.pieces) {
        graph_size += at_once * LayerGraph::max_nodes(p);
    }
    ggml_backend_sched_ptr sched = make_sched(memory, 2 * graph_size);
    for (size_t first = 0; first < n_layers; first += at_once) {
        ggml_context_ptr ctx = make_context(2 * graph_size, ggml_graph_overhead_custom(graph_size, /*grads*/ false));
        ggml_cgraph *    gf  = ggml_new_graph_custom(ctx.get(), graph_size, /*grads*/ false);
        for (size_t i = first; i < first + at_once; ++i) {
            const Layer & from       = job.src.layers()[i];
            const Layer & to         = job.dst.layers()[i];
            const auto *  correction = job.corrections.empty() ? nullptr : &job.corrections[i];
            LayerGraph    layer(ctx.get(), gf, job, from, to, coefficients, correction, rotates[from.number]);
            for (const Piece & p : job.pieces) {
                layer.move_k(p);
                layer.move_v(p);
            }
        }
        check_supported(sched.get(), gf);
        ggml_backend_sched_reset(sched.get());
        if (!ggml_backend_sched_alloc_graph(sched.get(), gf) ||
            ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
            throw EngineError("the join was aborted or could not be computed; the destination is as it was");
        }
    }
}

// Makes a scheduler over the context's backends. The context's own will not do: llama.cpp keeps its last decode graph
// for reuse, and another graph allocated there would leave that one's inputs at stale addresses.
ggml_backend_sched_ptr make_sched(const Memory & memory, size_t graph_size) {
    ggml_backend_sched_t                    own = memory.sched();
    std::vector<ggml_backend_t>             backends;
    std::vector<ggml_backend_buffer_type_t> types;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(own); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(own, i));
        types.push_back(ggml_backend_sched_get_buffer_type(own, backends.back()));
    }
    set_n_threads(own, memory.n_threads());
    return ggml_backend_sched_ptr(ggml_backend_sched_new(backends.data(), types.data(), backends.size(), graph_size,
                                                         /*parallel*/ false, /*op_offload*/ false));
}

// ggml's CPU backend keeps the number of threads of the context that used it last.
void set_n_threads(ggml_backend_sched_t sched, int n_threads) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t     backend = ggml_backend_sched_get_backend(sched, i);
        ggml_backend_dev_t dev     = ggml_backend_get_device(backend);
        ggml_backend_reg_t reg     = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
        if (!reg) {
            continue;
        }
        auto * set =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set) {
            set(backend, n_threads);
        }
    }
}

// Throws InputError if a device holds part of the cache and cannot do to it what the graph asks for: ggml would abort.
void check_supported(ggml_backend_sched_t sched, ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node   = ggml_graph_node(gf, i);
        ggml_tensor * stored = node->view_src ? node->view_src : node;
        if (!stored->buffer) {
            continue;  // any backend may compute it
        }
        ggml_backend_buffer_type_t type      = ggml_backend_buffer_get_type(stored->buffer);
        bool                       supported = false;
        for (int b = 0; b < ggml_backend_sched_get_n_backends(sched); ++b) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(sched, b);
            supported =
                supported || (ggml_backend_supports_buft(backend, type) && ggml_backend_supports_op(backend, node));
        }
        if (!supported) {
            throw InputError(std::string("this device (") + ggml_backend_buft_name(type) + ") cannot join caches of " +
                             ggml_type_name(stored->type) + ": it has no " + ggml_op_desc(node) +
                             " for them; choose another KV type");
        }
    }
}

}  // namespace

}  // namespace pyps
