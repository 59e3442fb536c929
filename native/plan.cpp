#include "plan.h"

#include <algorithm>
#include <new>

namespace pyps {

namespace {

void resolve(Job & job, const std::vector<Span> & spans, llama_seq_id dst_seq);
void choose_paths(const Job & job, Piece & p, bool maps);
void make_inputs(Job & job);
void fill_inputs(const Job & job, const Piece & p);

bool on_host(const Cache & cache) {
    const auto & layers = cache.layers();
    return std::all_of(layers.begin(), layers.end(),
                       [](const Layer & l) { return ggml_backend_buffer_is_host(l.k->buffer); });
}

}  // namespace

Job plan(const Cache &             src,
         Cache &                   dst,
         const std::vector<Span> & spans,
         llama_seq_id              dst_seq,
         const Coefficients &      coefficients,
         std::optional<bool>       together) {
    Job job(src, dst);
    job.one_graph = together.value_or(!on_host(dst));
    resolve(job, spans, dst_seq);
    for (Piece & p : job.pieces) {
        choose_paths(job, p, (bool) coefficients);
    }
    make_inputs(job);
    return job;
}

ggml_context_ptr make_context(size_t n_tensors, size_t n_bytes) {
    ggml_context_ptr ctx(ggml_init({ n_tensors * ggml_tensor_overhead() + n_bytes, nullptr, /*no_alloc*/ true }));
    if (!ctx) {
        throw std::bad_alloc();
    }
    return ctx;
}

namespace {

// Turns the spans into pieces, with the cells that they come from and go to.
void resolve(Job & job, const std::vector<Span> & spans, llama_seq_id dst_seq) {
    // Transposed V is moved span by span.
    const bool one_piece = job.one_graph && !job.src.v_transposed() && !job.dst.v_transposed();

    std::vector<Entry> entries;
    for (size_t i = 0; i < spans.size(); ++i) {
        const Span & s     = spans[i];
        const auto   cells = job.src.cells(s.seq, s.p0, s.p1);
        const Part   part  = { (uint32_t) cells.size(), s.to - s.p0 };
        if (job.pieces.empty() || !one_piece) {
            job.pieces.emplace_back();
            job.pieces.back().first_span = i;
        }
        Piece & p = job.pieces.back();
        p.parts.push_back(part);
        for (const Cell & c : cells) {
            p.src.push_back(c);
            entries.push_back({ c.entry.pos + part.delta, c.entry.token });
        }
    }
    job.reservation = job.dst.reserve(dst_seq, entries);

    auto next = job.reservation.cells.begin();
    for (Piece & p : job.pieces) {
        p.dst.assign(next, next + p.src.size());
        next += p.src.size();
        p.dst_runs = runs(p.dst);
        p.runs     = runs(p.src, p.dst);
    }
}

// maps: whether there are coefficients.
void choose_paths(const Job & job, Piece & p, bool maps) {
    const bool moves = std::any_of(p.parts.begin(), p.parts.end(), [](const Part & x) { return x.delta != 0; });
    // What is neither turned nor mapped may stay in the Hadamard domain if it goes to a cache of the same.
    const bool k_plain = maps || job.src.k_hadamard() != job.dst.k_hadamard();
    const bool v_plain = maps || job.src.v_hadamard() != job.dst.v_hadamard();

    p.k_still = k_plain ? Path::plain : Path::stored;
    p.k       = moves ? Path::turned : p.k_still;
    p.v       = v_plain ? Path::plain : Path::stored;

    // A piece in more runs than this is moved row by row: in a unified cache, branches in lock step alternate cells.
    constexpr size_t max_runs = 32;
    p.v_runs                  = job.src.v_transposed() && job.dst.v_transposed() && p.runs.size() <= max_runs;
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

void fill_hadamards(const Hadamards & h, const Cache & cache) {
    for (ggml_tensor * t : { h.k, h.v }) {
        if (t) {
            cache.fill_hadamard(t);
        }
    }
}

// Makes the index tensors and matrices of a job, in host memory. The graph of every layer reads the same ones.
void make_inputs(Job & job) {
    constexpr size_t tensors_per_piece = 4;
    constexpr size_t matrices          = 4;
    job.inputs_ctx                     = make_context(tensors_per_piece * job.pieces.size() + matrices);
    ggml_context * ctx                 = job.inputs_ctx.get();
    for (Piece & p : job.pieces) {
        const int64_t n = p.src.size();
        p.src_rows      = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        p.dst_rows      = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        p.shift         = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.parts.size() == 1 ? 1 : n);
        if (job.src.v_transposed() && !p.v_runs) {
            p.src_rel = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        }
    }
    job.src_hadamards = make_hadamards(ctx, job.src);
    job.dst_hadamards = make_hadamards(ctx, job.dst);
    job.inputs.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    if (!job.inputs) {
        throw std::bad_alloc();
    }
    fill_hadamards(job.src_hadamards, job.src);
    fill_hadamards(job.dst_hadamards, job.dst);
    for (const Piece & p : job.pieces) {
        fill_inputs(job, p);
    }
}

void fill_inputs(const Job & job, const Piece & p) {
    std::vector<int32_t> src_rows;
    std::vector<int64_t> dst_rows;
    std::vector<int32_t> shift;
    for (const Cell & c : p.src) {
        src_rows.push_back((int32_t) job.src.row(c));
    }
    for (const Cell & c : p.dst) {
        dst_rows.push_back(job.dst.row(c));
    }
    for (const Part & part : p.parts) {
        shift.insert(shift.end(), part.n_cells, part.delta);
    }
    ggml_backend_tensor_set(p.src_rows, src_rows.data(), 0, ggml_nbytes(p.src_rows));
    ggml_backend_tensor_set(p.dst_rows, dst_rows.data(), 0, ggml_nbytes(p.dst_rows));
    ggml_backend_tensor_set(p.shift, shift.data(), 0, ggml_nbytes(p.shift));
    if (p.src_rel) {
        const uint32_t       lowest = std::min_element(p.src.begin(), p.src.end(), by_index)->index;
        std::vector<int32_t> src_rel;
        for (const Cell & c : p.src) {
            src_rel.push_back((int32_t) (c.index - lowest));
        }
        ggml_backend_tensor_set(p.src_rel, src_rel.data(), 0, ggml_nbytes(p.src_rel));
    }
}

}  // namespace

}  // namespace pyps
