#include "join.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

namespace pyps {

namespace {

// Cells that lie side by side both where they come from and where they go.
struct Run {
    uint32_t stream;  // of the source
    uint32_t src, dst, n;
};

// One span among the cells of a piece.
struct Part {
    uint32_t  n;  // cells
    llama_pos delta;
};

// Cells that are moved together: those of one span; on a GPU, where starting a kernel costs more than its work, those of
// all spans. Its tensors are inputs of every layer's graph.
struct Piece {
    size_t                first_span;
    std::vector<Part>     parts;       // one after the other
    uint32_t              n;           // cells
    std::vector<Cell>     src;         // [n]
    std::vector<uint32_t> dst;         // cell numbers within the stream, [n]
    std::vector<Run>      runs;
    std::vector<uint32_t> dst_run_ends;
    ggml_tensor *         src_rows;    // I32 [n], stream*n_cells + cell
    ggml_tensor *         dst_rows;    // I64 [n]
    ggml_tensor *         shift;       // I32 [1], the delta of the one part; or [n], of each cell
    ggml_tensor *         src_rel;     // I32 [n], cell - lowest cell; only where V is gathered from transposed storage
};

std::vector<Run> find_runs(const std::vector<Cell> & src, const std::vector<uint32_t> & dst) {
    std::vector<Run> runs;
    for (size_t i = 0; i < src.size(); ++i) {
        const Run * last = runs.empty() ? nullptr : &runs.back();
        if (last && src[i].stream == last->stream && src[i].index == last->src + last->n &&
            dst[i] == last->dst + last->n) {
            runs.back().n++;
        } else {
            runs.push_back({ src[i].stream, src[i].index, dst[i], 1 });
        }
    }
    return runs;
}

// Ends of the runs of cells that lie side by side in the destination, wherever they come from.
std::vector<uint32_t> find_run_ends(const std::vector<uint32_t> & dst) {
    std::vector<uint32_t> ends;
    for (uint32_t i = 1; i <= dst.size(); ++i) {
        if (i == dst.size() || dst[i] != dst[i - 1] + 1) {
            ends.push_back(i);
        }
    }
    return ends;
}

bool by_index(const Cell & a, const Cell & b) {
    return a.index < b.index;
}

// Hadamard matrices F32 [n, n] of quantised caches (see Cache::k_hadamard), or null.
struct Hadamards {
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;
};

// What a join does in one pair of caches. A model with sliding windows has two pairs, each with cells of its own.
struct Job {
    const Cache &      src;
    Cache &            dst;
    std::vector<Piece> pieces;
    Reservation        reservation;
    bool               one_graph;  // for all layers, as it is better for a GPU

    Hadamards               src_hadamards, dst_hadamards;
    ggml_context_ptr        inputs_ctx;
    ggml_backend_buffer_ptr inputs;
};

// Adds what moves one layer to a graph.
class LayerGraph {
  public:
    LayerGraph(ggml_context * ctx, ggml_cgraph * gf, const Job & job, bool rotates, size_t n_layers) :
        ctx_(ctx), gf_(gf), rotates_(rotates), n_layers_(n_layers), src_(job.src), dst_(job.dst),
        dst_stream_(job.reservation.stream), src_h_(job.src_hadamards), dst_h_(job.dst_hadamards) {}

    // affine: of the piece's first span in this layer, n_layers apart from the next span's; or null.

    // K of one piece. Rows are cells in either cache, so one gather and one scatter serve every arrangement of cells.
    void move_k(const Layer & ls, const Layer & ld, const Piece & p, const Affine * affine) {
        ggml_tensor * k = ggml_get_rows(ctx_, all_rows(ls.k), p.src_rows);  // F32 [n_embd_k, n]
        // what is neither turned nor mapped may stay in the Hadamard domain if it goes to a cache of the same
        const bool moves = std::any_of(p.parts.begin(), p.parts.end(), [](const Part & x) { return x.delta != 0; });
        const bool turns = moves && rotates_;
        const bool plain = turns || affine || src_.k_hadamard() != dst_.k_hadamard();
        if (plain) {
            k = hadamard(k, src_h_.k);
        }
        if (turns) {
            // Every cell of a span turns by the same angle: as heads of one token, cos and sin are computed once.
            const Rope &  r        = ls.rope;
            const int64_t n_shifts = p.shift->ne[0];
            const int64_t n_heads  = ls.n_embd_k / ls.head_dim * p.n / n_shifts;
            ggml_tensor * rows     = ggml_reshape_3d(ctx_, k, ls.head_dim, n_heads, n_shifts);
            // With YaRN, ggml multiplies by 1 + 0.1*ln(1/freq_scale) (ggml-cpu/ops.cpp: rope_yarn). The keys carry
            // their magnitude already: cancel it.
            const float attn_factor = r.ext_factor == 0.0f ? 1.0f : 1.0f / (1.0f + 0.1f * logf(1.0f / r.freq_scale));
            rows = ggml_rope_ext_inplace(ctx_, rows, p.shift, r.factors, r.n_rot, r.type, r.n_ctx_orig, r.freq_base,
                                         r.freq_scale, r.ext_factor, attn_factor, r.beta_fast, r.beta_slow);
            k    = ggml_reshape_2d(ctx_, rows, ls.n_embd_k, p.n);
        }
        k = mapped(k, p, affine, &Affine::a_k, &Affine::b_k);
        if (plain) {
            k = hadamard(k, dst_h_.k);
        }
        add(ggml_set_rows(ctx_, all_rows(ld.k), k, p.dst_rows));
    }

    void move_v(const Layer & ls, const Layer & ld, const Piece & p, const Affine * affine) {
        if (!src_.v_transposed()) {
            ggml_tensor * v     = ggml_get_rows(ctx_, all_rows(ls.v), p.src_rows);  // F32 [n_embd_v, n]
            const bool    plain = affine || src_.v_hadamard() != dst_.v_hadamard();
            store_v(ld, p, plain ? hadamard(mapped_v(hadamard(v, src_h_.v), p, affine), dst_h_.v) : v);
        } else if (dst_.v_transposed() && few(p.runs)) {
            copy_v_runs(ls, ld, p, affine);
        } else {
            store_v(ld, p, hadamard(mapped_v(gather_transposed_v(ls, p), p, affine), dst_h_.v));
        }
    }

    // Upper bound of the nodes and leafs that one piece adds to the graph of a layer.
    static size_t max_nodes(const Piece & p) {
        return 64 + 6 * std::min<size_t>(p.runs.size(), max_runs) + 3 * p.dst_run_ends.size() + 4 * p.parts.size();
    }

  private:
    // A span in more runs than this is moved row by row: with a unified cache, lock-step branches alternate cells.
    static constexpr size_t max_runs = 32;

    static bool few(const std::vector<Run> & runs) { return runs.size() <= max_runs; }

    void add(ggml_tensor * t) { ggml_build_forward_expand(gf_, t); }

    // x [n_embd, n]: a*x + b of every part's rows, with the part's own a and b.
    ggml_tensor * mapped(ggml_tensor * x, const Piece & p, const Affine * affine, float Affine::* a, float Affine::* b) {
        if (!affine) {
            return x;
        }
        for (size_t i = 0, row = 0; i < p.parts.size();) {
            const Affine & first = affine[i * n_layers_];
            uint32_t       n     = p.parts[i++].n;
            for (; i < p.parts.size(); ++i) {
                const Affine & next = affine[i * n_layers_];
                if (next.*a != first.*a || next.*b != first.*b) {
                    break;
                }
                n += p.parts[i].n;
            }
            if (n == p.n) {
                return ggml_scale_bias_inplace(ctx_, x, first.*a, first.*b);
            }
            // nodes are computed in the order in which they are added: before whatever reads x
            ggml_tensor * rows = ggml_view_2d(ctx_, x, x->ne[0], n, x->nb[1], row * x->nb[1]);
            add(ggml_scale_bias_inplace(ctx_, rows, first.*a, first.*b));
            row += n;
        }
        return x;
    }

    ggml_tensor * mapped_v(ggml_tensor * v, const Piece & p, const Affine * affine) {
        return mapped(v, p, affine, &Affine::a_v, &Affine::b_v);
    }

    // F32 [n_embd, n], each block of channels multiplied by the matrix; null leaves it alone.
    ggml_tensor * hadamard(ggml_tensor * x, ggml_tensor * matrix) {
        if (!matrix) {
            return x;
        }
        const int64_t n = matrix->ne[0];
        ggml_tensor * y = ggml_mul_mat(ctx_, matrix, ggml_reshape_2d(ctx_, x, n, ggml_nelements(x) / n));
        ggml_mul_mat_set_hint(y, GGML_HINT_SRC0_IS_HADAMARD);
        return ggml_reshape_2d(ctx_, y, x->ne[0], x->ne[1]);
    }

    // [n_embd, n_cells, n_streams] -> [n_embd, n_cells*n_streams]
    ggml_tensor * all_rows(ggml_tensor * t) { return ggml_reshape_2d(ctx_, t, t->ne[0], t->ne[1] * t->ne[2]); }

    // Cells [first, first + n) of transposed V: [n, n_embd_v], cells innermost.
    ggml_tensor * cells_of_v(const Layer & l, uint32_t stream, uint32_t first, uint32_t n) {
        const size_t size = ggml_type_size(l.v->type);
        return ggml_view_2d(ctx_, l.v, n, l.n_embd_v, l.v->ne[1] * size, stream * l.v->nb[2] + first * size);
    }

    // Transposed to transposed, the usual case on a CPU: whole runs, without turning anything around.
    void copy_v_runs(const Layer & ls, const Layer & ld, const Piece & p, const Affine * affine) {
        for (const Run & r : p.runs) {
            ggml_tensor * from = cells_of_v(ls, r.stream, r.src, r.n);
            ggml_tensor * to   = cells_of_v(ld, dst_stream_, r.dst, r.n);
            if (affine) {
                from = mapped_v(ggml_cast(ctx_, from, GGML_TYPE_F32), p, affine);
            }
            if (from->type != to->type) {
                // converting and scattering at once is ggml's slow path (element by element): two steps are faster
                from = ggml_cast(ctx_, from, to->type);
            }
            add(ggml_cpy(ctx_, from, to));
        }
    }

    // F32 [n_embd_v, n] from transposed storage: the range that covers the span is turned around, then picked from.
    ggml_tensor * gather_transposed_v(const Layer & l, const Piece & p) {
        const auto [lo, hi] = std::minmax_element(p.src.begin(), p.src.end(), by_index);
        ggml_tensor * range = cells_of_v(l, lo->stream, lo->index, hi->index - lo->index + 1);
        return ggml_get_rows(ctx_, ggml_cont(ctx_, ggml_transpose(ctx_, range)), p.src_rel);
    }

    // v: F32 [n_embd_v, n]
    void store_v(const Layer & l, const Piece & p, ggml_tensor * v) {
        if (!dst_.v_transposed()) {
            add(ggml_set_rows(ctx_, all_rows(l.v), v, p.dst_rows));
            return;
        }
        if (l.v->type != GGML_TYPE_F32) {
            v = ggml_cast(ctx_, v, l.v->type);
        }
        v = ggml_cont(ctx_, ggml_transpose(ctx_, v));  // [n, n_embd_v]
        // free cells are rarely scattered
        uint32_t begin = 0;
        for (const uint32_t end : p.dst_run_ends) {
            ggml_tensor * run = ggml_view_2d(ctx_, v, end - begin, l.n_embd_v, v->nb[1], begin * v->nb[0]);
            add(ggml_cpy(ctx_, run, cells_of_v(l, dst_stream_, p.dst[begin], end - begin)));
            begin = end;
        }
    }

    ggml_context * ctx_;
    ggml_cgraph *  gf_;
    bool           rotates_;
    size_t         n_layers_;
    const Cache &  src_;
    const Cache &  dst_;
    uint32_t       dst_stream_;
    Hadamards      src_h_, dst_h_;
};

// ggml's CPU backend keeps the number of threads of whoever used it last.
void set_n_threads(ggml_backend_sched_t sched, int n_threads) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t     backend = ggml_backend_sched_get_backend(sched, i);
        ggml_backend_dev_t dev     = ggml_backend_get_device(backend);
        ggml_backend_reg_t reg     = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
        if (!reg) {
            continue;
        }
        auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set) {
            set(backend, n_threads);
        }
    }
}

// A scheduler over the context's backends. Never the context's own: llama.cpp keeps its last decode graph for reuse, and
// a graph of ours allocated there would leave that one's inputs at stale addresses.
ggml_backend_sched_ptr make_sched(const Memory & memory, size_t graph_size) {
    ggml_backend_sched_t                    theirs = memory.sched();
    std::vector<ggml_backend_t>             backends;
    std::vector<ggml_backend_buffer_type_t> types;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(theirs); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(theirs, i));
        types.push_back(ggml_backend_sched_get_buffer_type(theirs, backends.back()));
    }
    set_n_threads(theirs, memory.n_threads());
    return ggml_backend_sched_ptr(ggml_backend_sched_new(backends.data(), types.data(), backends.size(), graph_size,
                                                         /*parallel*/ false, /*op_offload*/ false));
}

ggml_context_ptr make_context(size_t n_tensors, size_t extra = 0) {
    ggml_context_ptr ctx(ggml_init({ n_tensors * ggml_tensor_overhead() + extra, nullptr, /*no_alloc*/ true }));
    if (!ctx) {
        throw std::bad_alloc();
    }
    return ctx;
}

bool on_host(const Cache & cache) {
    const auto & layers = cache.layers();
    return std::all_of(layers.begin(), layers.end(),
                       [](const Layer & l) { return ggml_backend_buffer_is_host(l.k->buffer); });
}

// Resolves the spans to cells and finds the cells they go to. Nothing is changed yet.
Job make_job(const Cache & src, Cache & dst, const std::vector<Span> & spans, llama_seq_id dst_seq,
             std::optional<bool> together) {
    const bool one_graph = together.value_or(!on_host(dst));
    // transposed V is moved span by span
    const bool one_piece = one_graph && !src.v_transposed() && !dst.v_transposed();

    std::vector<Piece> pieces;
    std::vector<Cell>  entries;
    for (size_t i = 0; i < spans.size(); ++i) {
        const Span & s     = spans[i];
        const auto   cells = src.cells(s.seq, s.p0, s.p1);
        const Part   part  = { (uint32_t) cells.size(), s.to - s.p0 };
        if (pieces.empty() || !one_piece) {
            pieces.emplace_back();
            pieces.back().first_span = i;
        }
        Piece & p = pieces.back();
        p.parts.push_back(part);
        p.n += part.n;
        for (const Cell & c : cells) {
            p.src.push_back(c);
            entries.push_back({ 0, 0, c.pos + part.delta, c.token });
        }
    }
    Reservation reservation = dst.reserve(dst_seq, std::move(entries));

    auto next = reservation.index.begin();
    for (Piece & p : pieces) {
        p.dst.assign(next, next + p.n);
        next += p.n;
        p.runs         = find_runs(p.src, p.dst);
        p.dst_run_ends = find_run_ends(p.dst);
    }
    return { src, dst, std::move(pieces), std::move(reservation), one_graph, {}, {}, nullptr, nullptr };
}

Hadamards make_hadamards(ggml_context * ctx, const Cache & cache) {
    Hadamards h;
    if (const int64_t n = cache.k_hadamard()) {
        h.k = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n);
    }
    if (const int64_t n = cache.v_hadamard()) {
        h.v = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n);
    }
    return h;
}

// The index tensors and matrices of a job, on the host and filled; the graph of every layer reads the same ones.
void make_inputs(Job & job) {
    job.inputs_ctx     = make_context(4 * job.pieces.size() + 4);
    ggml_context * ctx = job.inputs_ctx.get();
    for (Piece & p : job.pieces) {
        p.src_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.n);
        p.dst_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, p.n);
        p.shift    = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.parts.size() == 1 ? 1 : p.n);
        p.src_rel  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.n);
    }
    job.src_hadamards = make_hadamards(ctx, job.src);
    job.dst_hadamards = make_hadamards(ctx, job.dst);
    job.inputs.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    if (!job.inputs) {
        throw std::bad_alloc();
    }
    for (ggml_tensor * t : { job.src_hadamards.k, job.src_hadamards.v }) {
        if (t) {
            job.src.fill_hadamard(t);
        }
    }
    for (ggml_tensor * t : { job.dst_hadamards.k, job.dst_hadamards.v }) {
        if (t) {
            job.dst.fill_hadamard(t);
        }
    }
    for (Piece & p : job.pieces) {
        const uint32_t       lowest = std::min_element(p.src.begin(), p.src.end(), by_index)->index;
        std::vector<int32_t> src_rows(p.n), src_rel(p.n), shift;
        std::vector<int64_t> dst_rows(p.n);
        for (uint32_t i = 0; i < p.n; ++i) {
            src_rows[i] = (int32_t) ((int64_t) p.src[i].stream * job.src.n_cells() + p.src[i].index);
            src_rel[i]  = (int32_t) (p.src[i].index - lowest);
            dst_rows[i] = (int64_t) job.reservation.stream * job.dst.n_cells() + p.dst[i];
        }
        ggml_backend_tensor_set(p.src_rows, src_rows.data(), 0, ggml_nbytes(p.src_rows));
        ggml_backend_tensor_set(p.src_rel, src_rel.data(), 0, ggml_nbytes(p.src_rel));
        ggml_backend_tensor_set(p.dst_rows, dst_rows.data(), 0, ggml_nbytes(p.dst_rows));
        for (const Part & part : p.parts) {
            shift.insert(shift.end(), part.n, part.delta);
        }
        ggml_backend_tensor_set(p.shift, shift.data(), 0, ggml_nbytes(p.shift));
    }
}

// Throws InputError if a device has part of the cache and cannot do to it what the graph asks for: ggml would abort.
void check_supported(ggml_backend_sched_t sched, ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node   = ggml_graph_node(gf, i);
        ggml_tensor * stored = node->view_src ? node->view_src : node;
        if (!stored->buffer) {
            continue;  // it may be computed anywhere
        }
        ggml_backend_buffer_type_t type  = ggml_backend_buffer_get_type(stored->buffer);
        bool                       found = false;
        for (int b = 0; b < ggml_backend_sched_get_n_backends(sched); ++b) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(sched, b);
            found = found || (ggml_backend_supports_buft(backend, type) && ggml_backend_supports_op(backend, node));
        }
        if (!found) {
            throw InputError(std::string("this device (") + ggml_backend_buft_name(type) + ") cannot join caches of " +
                             ggml_type_name(stored->type) + ": it has no " + ggml_op_desc(node) +
                             " for them; choose another KV type");
        }
    }
}

// Moves the data of all layers of one pair of caches. Throws std::runtime_error if the computation failed or was aborted,
// InputError if a device cannot do it.
void compute(const Job & job, const Memory & memory, const std::vector<bool> & rotates, const Affine * affine) {
    const size_t n_layers = job.src.layers().size();
    // On a CPU a graph a layer keeps the f32 intermediates small enough for its cache.
    const size_t at_once    = job.one_graph ? n_layers : 1;
    size_t       graph_size = 64;
    for (const Piece & p : job.pieces) {
        graph_size += at_once * LayerGraph::max_nodes(p);
    }
    ggml_backend_sched_ptr sched = make_sched(memory, 2 * graph_size);
    for (size_t first = 0; first < n_layers; first += at_once) {
        ggml_context_ptr ctx = make_context(2 * graph_size, ggml_graph_overhead_custom(graph_size, false));
        ggml_cgraph *    gf  = ggml_new_graph_custom(ctx.get(), graph_size, false);
        for (size_t i = first; i < first + at_once; ++i) {
            const Layer & from = job.src.layers()[i];
            const Layer & to   = job.dst.layers()[i];
            LayerGraph    layer(ctx.get(), gf, job, rotates[from.number], rotates.size());
            for (const Piece & p : job.pieces) {
                const Affine * a = affine ? &affine[p.first_span * rotates.size() + from.number] : nullptr;
                layer.move_k(from, to, p, a);
                layer.move_v(from, to, p, a);
            }
        }
        check_supported(sched.get(), gf);
        ggml_backend_sched_reset(sched.get());
        if (!ggml_backend_sched_alloc_graph(sched.get(), gf) ||
            ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("the join was aborted or could not be computed; the destination is as it was");
        }
    }
}

void check_compatible(const Memory & src, const Memory & dst) {
    if (src.model() != dst.model()) {
        throw InputError("the two contexts belong to different models: caches can only be joined within one model");
    }
    for (size_t c = 0; c < src.caches().size(); ++c) {
        const auto & from = src.caches()[c].layers();
        const auto & to   = dst.caches()[c].layers();
        for (size_t i = 0; i < from.size(); ++i) {
            if (!(from[i].rope == to[i].rope)) {
                throw InputError(
                    "the two contexts encode positions differently (RoPE base, scaling or frequency factors, which "
                    "may depend on the context size): create both with the same RoPE settings");
            }
        }
    }
}

}  // namespace

uint32_t join(llama_context * ctx_src, llama_context * ctx_dst, const std::vector<Span> & spans, llama_seq_id dst_seq,
              const std::vector<bool> & rotates, const Affine * affine, std::optional<bool> together) {
    Memory src(ctx_src);
    Memory dst(ctx_dst);
    check_compatible(src, dst);
    if (rotates.size() != src.n_layers()) {
        throw InputError("the list of layers that RoPE turns has " + std::to_string(rotates.size()) +
                         " entries; this model has " + std::to_string(src.n_layers()) + " layers with K and V");
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
    src.settle();
    dst.settle();

    std::vector<Job> jobs;
    for (size_t c = 0; c < src.caches().size(); ++c) {
        jobs.push_back(make_job(src.caches()[c], dst.caches()[c], spans, dst_seq, together));
    }
    for (Job & job : jobs) {
        make_inputs(job);
    }
    try {
        for (const Job & job : jobs) {
            compute(job, dst, rotates, affine);
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
    return jobs[0].reservation.index.size();
}

}  // namespace pyps
