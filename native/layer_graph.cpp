#include "layer_graph.h"

#include <algorithm>
#include <cmath>

namespace pyps {

// In all shapes n is the number of the piece's cells.

LayerGraph::LayerGraph(ggml_context *            ctx,
                       ggml_cgraph *             gf,
                       const Job &               job,
                       const Layer &             from,
                       const Layer &             to,
                       const Coefficients &      coefficients,
                       const CorrectionTensors * correction,
                       bool                      rotates) :
    ctx_(ctx),
    gf_(gf),
    from_(from),
    to_(to),
    src_hadamards_(job.src_hadamards),
    dst_hadamards_(job.dst_hadamards),
    coefficients_(coefficients),
    correction_(correction),
    rotates_(rotates) {}

// Rows of K are cells in either cache, so one gather and one scatter serve every arrangement of cells.
void LayerGraph::move_k(const Piece & p) {
    const Path    path = rotates_ ? p.k : p.k_still;
    ggml_tensor * k    = ggml_get_rows(ctx_, all_rows(from_.k), p.src_rows);  // F32 [n_embd_k, n]
    if (path != Path::stored) {
        k = hadamard(k, src_hadamards_.k);
        if (path == Path::turned && correction_) {
            k = turned(k, p.back);
        }
        if (correction_) {
            k = corrected(k, correction_->a_k, correction_->b_k);
        }
        if (path == Path::turned) {
            k = turned(k, p.shift);
        }
        k = mapped(k, p, &Affine::a_k, &Affine::b_k);
        k = hadamard(k, dst_hadamards_.k);
    }
    add(ggml_set_rows(ctx_, all_rows(to_.k), k, p.dst_rows));
}

void LayerGraph::move_v(const Piece & p) {
    if (p.v_runs) {
        copy_v_runs(p);
        return;
    }
    ggml_tensor * v;  // F32 [n_embd_v, n]
    if (from_.v_transposed) {
        v = gather_transposed_v(p);
    } else {
        v = ggml_get_rows(ctx_, all_rows(from_.v), p.src_rows);
    }
    if (p.v != Path::stored) {
        v = hadamard(v, src_hadamards_.v);
        if (correction_) {
            v = corrected(v, correction_->a_v, correction_->b_v);
        }
        v = hadamard(mapped_v(v, p), dst_hadamards_.v);
    }
    store_v(p, v);
}

size_t LayerGraph::max_nodes(const Piece & p) {
    return 80 + (p.v_runs ? 6 * p.runs.size() : 0) + 3 * p.dst_runs.size() + 4 * p.parts.size();
}

// Nodes are computed in the order in which they are added.
void LayerGraph::add(ggml_tensor * t) {
    ggml_build_forward_expand(gf_, t);
}

// k: F32 [n_embd_k, n]; shift: I32 [1], by how many positions all cells turn, or [n], by how many each does.
ggml_tensor * LayerGraph::turned(ggml_tensor * k, ggml_tensor * shift) {
    const Rope & r = from_.rope;
    // Cells that turn by the same angle: taken as heads of one token, their cos and sin are computed once.
    const int64_t n_shifts = shift->ne[0];
    const int64_t n_heads  = from_.n_embd_k / from_.head_dim * k->ne[1] / n_shifts;
    ggml_tensor * heads    = ggml_reshape_3d(ctx_, k, from_.head_dim, n_heads, n_shifts);
    // With YaRN, ggml multiplies by 1 + 0.1*ln(1/freq_scale) (ggml-cpu/ops.cpp: rope_yarn). The keys carry their
    // magnitude already: this cancels it.
    const float attn_factor = r.ext_factor == 0.0f ? 1.0f : 1.0f / (1.0f + 0.1f * logf(1.0f / r.freq_scale));
    heads = ggml_rope_ext_inplace(ctx_, heads, shift, r.factors, r.n_rot, r.type, r.n_ctx_orig, r.freq_base,
                                  r.freq_scale, r.ext_factor, attn_factor, r.beta_fast, r.beta_slow);
    return ggml_reshape_2d(ctx_, heads, k->ne[0], k->ne[1]);
}

// x: F32 [n_embd, n]; a, b: F32 [n_embd]
ggml_tensor * LayerGraph::corrected(ggml_tensor * x, ggml_tensor * a, ggml_tensor * b) {
    return ggml_add_inplace(ctx_, ggml_mul_inplace(ctx_, x, a), b);
}

// x: F32 [n_embd, n]; every part's rows become a*x + b, with the part's own a and b.
ggml_tensor * LayerGraph::mapped(ggml_tensor * x, const Piece & p, float Affine::* a, float Affine::* b) {
    if (!coefficients_) {
        return x;
    }
    for (size_t i = 0, row = 0; i < p.parts.size();) {
        const Affine & first = coefficients_.at(p.first_span + i, from_.number);
        size_t         n     = p.parts[i++].n_cells;
        for (; i < p.parts.size(); ++i) {
            const Affine & next = coefficients_.at(p.first_span + i, from_.number);
            if (next.*a != first.*a || next.*b != first.*b) {
                break;
            }
            n += p.parts[i].n_cells;
        }
        if (n == p.src.size()) {
            return ggml_scale_bias_inplace(ctx_, x, first.*a, first.*b);
        }
        // These rows must be in the graph before whatever reads x.
        ggml_tensor * rows = ggml_view_2d(ctx_, x, x->ne[0], n, x->nb[1], row * x->nb[1]);
        add(ggml_scale_bias_inplace(ctx_, rows, first.*a, first.*b));
        row += n;
    }
    return x;
}

ggml_tensor * LayerGraph::mapped_v(ggml_tensor * v, const Piece & p) {
    return mapped(v, p, &Affine::a_v, &Affine::b_v);
}

// x: F32 [n_embd, n]; each block of channels is multiplied by the matrix. Null leaves x alone.
ggml_tensor * LayerGraph::hadamard(ggml_tensor * x, ggml_tensor * matrix) {
    if (!matrix) {
        return x;
    }
    const int64_t size   = matrix->ne[0];
    ggml_tensor * blocks = ggml_reshape_2d(ctx_, x, size, ggml_nelements(x) / size);
    ggml_tensor * y      = ggml_mul_mat(ctx_, matrix, blocks);
    ggml_mul_mat_set_hint(y, GGML_HINT_SRC0_IS_HADAMARD);
    return ggml_reshape_2d(ctx_, y, x->ne[0], x->ne[1]);
}

// [n_embd, n_cells, n_streams] -> [n_embd, n_cells*n_streams]
ggml_tensor * LayerGraph::all_rows(ggml_tensor * t) {
    return ggml_reshape_2d(ctx_, t, t->ne[0], t->ne[1] * t->ne[2]);
}

// Transposed V of `count` cells side by side: [count, n_embd_v], cells innermost.
ggml_tensor * LayerGraph::cells_of_v(const Layer & l, const Cell & first, uint32_t count) {
    return ggml_view_2d(ctx_, l.v, count, l.n_embd_v, l.v_channel_stride(), l.v_offset(first));
}

// F32 [n_embd_v, n] from transposed storage: the range that covers the span is transposed, then picked from.
ggml_tensor * LayerGraph::gather_transposed_v(const Piece & p) {
    const auto [lo, hi] = std::minmax_element(p.src.begin(), p.src.end(), by_index);
    ggml_tensor * range = cells_of_v(from_, *lo, hi->index - lo->index + 1);
    return ggml_get_rows(ctx_, ggml_cont(ctx_, ggml_transpose(ctx_, range)), p.src_rel);
}

// Copies whole runs from transposed to transposed storage, the usual case on a CPU: nothing has to be transposed.
void LayerGraph::copy_v_runs(const Piece & p) {
    for (const Run & r : p.runs) {
        ggml_tensor * from = cells_of_v(from_, p.src[r.first], r.n);  // [r.n, n_embd_v]
        ggml_tensor * to   = cells_of_v(to_, p.dst[r.first], r.n);    // [r.n, n_embd_v]
        if (coefficients_) {
            from = mapped_v(ggml_cast(ctx_, from, GGML_TYPE_F32), p);
        }
        if (from->type != to->type) {
            // Converting and scattering at once is ggml's slow path (element by element): two steps are faster.
            from = ggml_cast(ctx_, from, to->type);
        }
        add(ggml_cpy(ctx_, from, to));
    }
}

// v: F32 [n_embd_v, n]
void LayerGraph::store_v(const Piece & p, ggml_tensor * v) {
    if (!to_.v_transposed) {
        add(ggml_set_rows(ctx_, all_rows(to_.v), v, p.dst_rows));
        return;
    }
    if (to_.v->type != GGML_TYPE_F32) {
        v = ggml_cast(ctx_, v, to_.v->type);
    }
    v = ggml_cont(ctx_, ggml_transpose(ctx_, v));  // [n, n_embd_v]
    // Free cells are rarely scattered, so there are few runs.
    for (const Run & r : p.dst_runs) {
        ggml_tensor * run = ggml_view_2d(ctx_, v, r.n, to_.n_embd_v, v->nb[1], r.first * v->nb[0]);
        add(ggml_cpy(ctx_, run, cells_of_v(to_, p.dst[r.first], r.n)));
    }
}

}  // namespace pyps
