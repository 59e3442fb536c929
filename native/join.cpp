#include "join.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>

namespace pyps {

namespace {

// Cells that lie side by side both where they come from and where they go.
struct Run {
    uint32_t src, dst, n;
};

// One span with its cells resolved. Its tensors are inputs of every layer's graph.
struct Piece {
    uint32_t              n;           // cells
    llama_pos             delta;
    uint32_t              src_stream;
    std::vector<uint32_t> src, dst;    // cell numbers within their streams, [n]
    std::vector<Run>      runs;
    uint32_t              n_dst_runs;
    ggml_tensor *         src_rows;    // I32 [n], stream*n_cells + cell
    ggml_tensor *         dst_rows;    // I64 [n]
    ggml_tensor *         shift;       // I32 [1], delta
    ggml_tensor *         src_rel;     // I32 [n], cell - lowest cell; only where V is gathered from transposed storage
};

std::vector<Run> find_runs(const std::vector<uint32_t> & src, const std::vector<uint32_t> & dst) {
    std::vector<Run> runs;
    for (uint32_t i = 0; i < src.size(); ++i) {
        if (!runs.empty() && src[i] == runs.back().src + runs.back().n && dst[i] == runs.back().dst + runs.back().n) {
            runs.back().n++;
        } else {
            runs.push_back({ src[i], dst[i], 1 });
        }
    }
    return runs;
}

// Hadamard matrices F32 [n, n] of quantised caches (see Cache::k_hadamard), or null.
struct Hadamards {
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;
};

// Builds the graph that moves one layer. A graph a layer keeps the f32 intermediates small enough for the CPU's cache.
class LayerGraph {
  public:
    LayerGraph(ggml_context * ctx, ggml_cgraph * gf, const Cache & src, const Cache & dst, uint32_t dst_stream,
               const Hadamards & src_hadamards, const Hadamards & dst_hadamards) :
        ctx_(ctx), gf_(gf), src_(src), dst_(dst), dst_stream_(dst_stream), src_h_(src_hadamards),
        dst_h_(dst_hadamards) {}

    // K of one span. Rows are cells in either cache, so one gather and one scatter serve every arrangement of cells.
    void move_k(const Layer & ls, const Layer & ld, const Piece & p, const Affine * affine) {
        ggml_tensor * k = ggml_get_rows(ctx_, all_rows(ls.k), p.src_rows);  // F32 [n_embd_k, n]
        // what is neither turned nor mapped may stay in the Hadamard domain if it goes to a cache of the same
        const bool turns = p.delta != 0 && ls.rotates;
        const bool plain = turns || affine || src_.k_hadamard() != dst_.k_hadamard();
        if (plain) {
            k = hadamard(k, src_h_.k);
        }
        if (turns) {
            // Every cell of a span turns by the same angle: as heads of one token, cos and sin are computed once.
            const Rope &  r    = ls.rope;
            ggml_tensor * rows = ggml_reshape_3d(ctx_, k, ls.head_dim, ls.n_embd_k / ls.head_dim * p.n, 1);
            // With YaRN, ggml multiplies by 1 + 0.1*ln(1/freq_scale) (ggml-cpu/ops.cpp: rope_yarn). The keys carry
            // their magnitude already: cancel it.
            const float attn_factor = r.ext_factor == 0.0f ? 1.0f : 1.0f / (1.0f + 0.1f * logf(1.0f / r.freq_scale));
            rows = ggml_rope_ext_inplace(ctx_, rows, p.shift, r.factors, r.n_rot, r.type, r.n_ctx_orig, r.freq_base,
                                         r.freq_scale, r.ext_factor, attn_factor, r.beta_fast, r.beta_slow);
            k    = ggml_reshape_2d(ctx_, rows, ls.n_embd_k, p.n);
        }
        if (affine) {
            k = ggml_scale_bias_inplace(ctx_, k, affine->a_k, affine->b_k);
        }
        if (plain) {
            k = hadamard(k, dst_h_.k);
        }
        add(ggml_set_rows(ctx_, all_rows(ld.k), k, p.dst_rows));
    }

    void move_v(const Layer & ls, const Layer & ld, const Piece & p, const Affine * affine) {
        if (!src_.v_transposed()) {
            ggml_tensor * v     = ggml_get_rows(ctx_, all_rows(ls.v), p.src_rows);  // F32 [n_embd_v, n]
            const bool    plain = affine || src_.v_hadamard() != dst_.v_hadamard();
            store_v(ld, p, plain ? hadamard(scaled(hadamard(v, src_h_.v), affine), dst_h_.v) : v);
        } else if (dst_.v_transposed() && few(p.runs)) {
            copy_v_runs(ls, ld, p, affine);
        } else {
            store_v(ld, p, hadamard(scaled(gather_transposed_v(ls, p), affine), dst_h_.v));
        }
    }

    // Upper bound of the nodes and leafs that one span adds to a graph.
    static size_t max_nodes(const Piece & p) {
        return 64 + 6 * std::min<size_t>(p.runs.size(), max_runs) + 3 * p.n_dst_runs;
    }

  private:
    // A span in more runs than this is moved row by row: with a unified cache, lock-step branches alternate cells.
    static constexpr size_t max_runs = 32;

    static bool few(const std::vector<Run> & runs) { return runs.size() <= max_runs; }

    void add(ggml_tensor * t) { ggml_build_forward_expand(gf_, t); }

    ggml_tensor * scaled(ggml_tensor * v, const Affine * affine) {
        return affine ? ggml_scale_bias_inplace(ctx_, v, affine->a_v, affine->b_v) : v;
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
            ggml_tensor * from = cells_of_v(ls, p.src_stream, r.src, r.n);
            ggml_tensor * to   = cells_of_v(ld, dst_stream_, r.dst, r.n);
            if (affine) {
                from = scaled(ggml_cast(ctx_, from, GGML_TYPE_F32), affine);
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
        const auto [lo, hi] = std::minmax_element(p.src.begin(), p.src.end());
        ggml_tensor * range = cells_of_v(l, p.src_stream, *lo, *hi - *lo + 1);
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
        // free cells are rarely scattered: a run here is a run in the destination only
        for (uint32_t i = 0; i < p.n;) {
            uint32_t n = 1;
            while (i + n < p.n && p.dst[i + n] == p.dst[i] + n) {
                ++n;
            }
            ggml_tensor * part = ggml_view_2d(ctx_, v, n, l.n_embd_v, v->nb[1], i * v->nb[0]);
            add(ggml_cpy(ctx_, part, cells_of_v(l, dst_stream_, p.dst[i], n)));
            i += n;
        }
    }

    ggml_context * ctx_;
    ggml_cgraph *  gf_;
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
ggml_backend_sched_ptr make_sched(const Cache & cache, size_t graph_size) {
    ggml_backend_sched_t                    theirs = cache.sched();
    std::vector<ggml_backend_t>             backends;
    std::vector<ggml_backend_buffer_type_t> types;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(theirs); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(theirs, i));
        types.push_back(ggml_backend_sched_get_buffer_type(theirs, backends.back()));
    }
    set_n_threads(theirs, cache.n_threads());
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

// Hadamard tensors for what a cache holds, without data yet.
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

// Gives the tensors of ctx memory on the host and fills those of the pieces and the matrices; every layer's graph reads
// the same ones.
ggml_backend_buffer_ptr make_inputs(ggml_context * ctx, std::vector<Piece> & pieces, const Cache & src,
                                    const Cache & dst, const Hadamards & src_hadamards,
                                    const Hadamards & dst_hadamards, const Reservation & reservation) {
    for (Piece & p : pieces) {
        p.src_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.n);
        p.dst_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, p.n);
        p.shift    = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
        p.src_rel  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.n);
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    if (!buffer) {
        throw std::bad_alloc();
    }
    for (const auto & [cache, hadamards] : { std::pair(&src, src_hadamards), std::pair(&dst, dst_hadamards) }) {
        for (ggml_tensor * t : { hadamards.k, hadamards.v }) {
            if (t) {
                cache->fill_hadamard(t);
            }
        }
    }
    for (Piece & p : pieces) {
        const uint32_t       lowest = *std::min_element(p.src.begin(), p.src.end());
        std::vector<int32_t> src_rows(p.n), src_rel(p.n);
        std::vector<int64_t> dst_rows(p.n);
        for (uint32_t i = 0; i < p.n; ++i) {
            src_rows[i] = (int32_t) ((int64_t) p.src_stream * src.n_cells() + p.src[i]);
            src_rel[i]  = (int32_t) (p.src[i] - lowest);
            dst_rows[i] = (int64_t) reservation.stream * dst.n_cells() + p.dst[i];
        }
        ggml_backend_tensor_set(p.src_rows, src_rows.data(), 0, ggml_nbytes(p.src_rows));
        ggml_backend_tensor_set(p.src_rel, src_rel.data(), 0, ggml_nbytes(p.src_rel));
        ggml_backend_tensor_set(p.dst_rows, dst_rows.data(), 0, ggml_nbytes(p.dst_rows));
        ggml_backend_tensor_set(p.shift, &p.delta, 0, sizeof(p.delta));
    }
    return buffer;
}

void check_compatible(const Cache & src, const Cache & dst) {
    if (src.model() != dst.model()) {
        throw InputError("the two contexts belong to different models: caches can only be joined within one model");
    }
    for (size_t i = 0; i < src.layers().size(); ++i) {
        if (!(src.layers()[i].rope == dst.layers()[i].rope)) {
            throw InputError(
                "the two contexts encode positions differently (RoPE base, scaling or frequency factors, which may "
                "depend on the context size): create both with the same RoPE settings");
        }
    }
}

}  // namespace

uint32_t join(llama_context * ctx_src, llama_context * ctx_dst, const std::vector<Span> & spans, llama_seq_id dst_seq,
              const Affine * affine) {
    Cache src(ctx_src);
    Cache dst(ctx_dst);
    check_compatible(src, dst);
    src.settle();
    dst.settle();

    std::vector<Piece> pieces;
    std::vector<Cell>  entries;
    for (const Span & s : spans) {
        if (s.to < 0) {
            throw InputError("a span cannot be placed at a negative position (" + std::to_string(s.to) + ")");
        }
        const auto cells = src.cells(s.seq, s.p0, s.p1);
        Piece      p{};
        p.n          = cells.size();
        p.delta      = s.to - s.p0;
        p.src_stream = cells[0].stream;
        for (const Cell & c : cells) {
            p.src.push_back(c.index);
            entries.push_back({ 0, 0, c.pos + p.delta, c.token });
        }
        pieces.push_back(std::move(p));
    }

    const Reservation reservation = dst.reserve(dst_seq, entries);

    size_t   graph_size = 64;
    uint32_t first      = 0;
    for (Piece & p : pieces) {
        p.dst.assign(reservation.index.begin() + first, reservation.index.begin() + first + p.n);
        first += p.n;
        p.runs       = find_runs(p.src, p.dst);
        p.n_dst_runs = find_runs(p.dst, p.dst).size();
        graph_size += LayerGraph::max_nodes(p);
    }

    ggml_context_ptr inputs_ctx    = make_context(4 * pieces.size() + 4);
    const Hadamards  src_hadamards = make_hadamards(inputs_ctx.get(), src);
    const Hadamards  dst_hadamards = make_hadamards(inputs_ctx.get(), dst);
    ggml_backend_buffer_ptr inputs =
        make_inputs(inputs_ctx.get(), pieces, src, dst, src_hadamards, dst_hadamards, reservation);
    ggml_backend_sched_ptr  sched      = make_sched(dst, 2 * graph_size);

    const size_t n_layers = src.layers().size();
    for (size_t il = 0; il < n_layers; ++il) {
        ggml_context_ptr ctx = make_context(2 * graph_size, ggml_graph_overhead_custom(graph_size, false));
        ggml_cgraph *    gf  = ggml_new_graph_custom(ctx.get(), graph_size, false);
        LayerGraph       layer(ctx.get(), gf, src, dst, reservation.stream, src_hadamards, dst_hadamards);
        for (size_t i = 0; i < pieces.size(); ++i) {
            const Affine * a = affine ? &affine[i * n_layers + il] : nullptr;
            layer.move_k(src.layers()[il], dst.layers()[il], pieces[i], a);
            layer.move_v(src.layers()[il], dst.layers()[il], pieces[i], a);
        }
        ggml_backend_sched_reset(sched.get());
        const bool ok = ggml_backend_sched_alloc_graph(sched.get(), gf) &&
                        ggml_backend_sched_graph_compute(sched.get(), gf) == GGML_STATUS_SUCCESS;
        if (!ok) {
            dst.zero(reservation);
            throw std::runtime_error("the join was aborted or could not be computed (layer " + std::to_string(il) +
                                     "); the destination is as it was");
        }
    }

    dst.commit(reservation);
    return entries.size();
}

}  // namespace pyps
