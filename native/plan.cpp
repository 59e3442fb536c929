#include "plan.h"

#include <algorithm>
#include <new>

namespace pyps {

namespace {

void resolve(Job & job, const std::vector<Span> & spans, llama_seq_id dst_seq);
void choose_paths(const Job & job, Piece & p, bool maps, bool corrects);
void make_inputs(Job & job, const Correction & correction);
void fill_inputs(const Job & job, const Piece & p);

// From so many spans on, moving them one by one costs more than turning every cell by an angle of its own.
constexpr size_t many_spans = 32;

bool in_rows(const Cache & cache) {
    return !cache.v_transposed();
}

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
         const Correction &        correction,
         std::optional<bool>       together) {
    Job job(src, dst);
    job.one_graph = together.value_or(!on_host(dst) || (spans.size() > many_spans && in_rows(src) && in_rows(dst)));
    resolve(job, spans, dst_seq);
    for (Piece & p : job.pieces) {
        choose_paths(job, p, (bool) coefficients, !correction.empty());
    }
    make_inputs(job, correction);
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

// maps: whether there are coefficients; corrects: whether there is a correction.
void choose_paths(const Job & job, Piece & p, bool maps, bool corrects) {
    const bool moves = std::any_of(p.parts.begin(), p.parts.end(), [](const Part & x) { return x.delta != 0; });
    // What is neither turned nor mapped may stay in the Hadamard domain if it goes to a cache of the same.
    const bool changes = maps || corrects;
    const bool k_plain = changes || job.src.k_hadamard() != job.dst.k_hadamard();
    const bool v_plain = changes || job.src.v_hadamard() != job.dst.v_hadamard();

    p.k_still = k_plain ? Path::plain : Path::stored;
    p.k       = moves || corrects ? Path::turned : p.k_still;
    p.v       = v_plain ? Path::plain : Path::stored;

    // A piece in more runs than this is moved row by row: in a unified cache, branches in lock step alternate cells.
    constexpr size_t max_runs = 32;
    p.v_runs = job.src.v_transposed() && job.dst.v_transposed() && p.runs.size() <= max_runs && !corrects;
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

// Makes the index tensors and matrices of a job, which the graph of every layer reads, and the lines of each layer; in
// host memory.
void make_inputs(Job & job, const Correction & correction) {
    constexpr size_t tensors_per_piece = 5;
    constexpr size_t matrices          = 4;
    const size_t     lines             = correction.empty() ? 0 : 4 * job.src.layers().size();
    job.inputs_ctx                     = make_context(tensors_per_piece * job.pieces.size() + matrices + lines);
    ggml_context * ctx                 = job.inputs_ctx.get();
    for (Piece & p : job.pieces) {
        const int64_t n = p.src.size();
        p.src_rows      = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        p.dst_rows      = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        p.shift         = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, p.parts.size() == 1 && correction.empty() ? 1 : n);
        if (!correction.empty()) {
            p.back = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        }
        if (job.src.v_transposed() && !p.v_runs) {
            p.src_rel = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        }
    }
    for (size_t i = 0; i < job.src.layers().size() && !correction.empty(); ++i) {
        const LayerCorrection & c = correction[job.src.layers()[i].number];
        job.corrections.push_back(
            { ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.k.n), ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.k.n),
              ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.v.n), ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.v.n) });
    }
    job.src_hadamards = make_hadamards(ctx, job.src);
    job.dst_hadamards = make_hadamards(ctx, job.dst);
    job.inputs.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    if (!job.inputs) {
        throw std::bad_alloc();
    }
    for (size_t i = 0; i < job.corrections.size(); ++i) {
        const LayerCorrection &   c = correction[job.src.layers()[i].number];
        const CorrectionTensors & t = job.corrections[i];
        ggml_backend_tensor_set(t.a_k, c.k.a, 0, ggml_nbytes(t.a_k));
        ggml_backend_tensor_set(t.b_k, c.k.b, 0, ggml_nbytes(t.b_k));
        ggml_backend_tensor_set(t.a_v, c.v.a, 0, ggml_nbytes(t.a_v));
        ggml_backend_tensor_set(t.b_v, c.v.b, 0, ggml_nbytes(t.b_v));
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
    if (p.back) {
        std::vector<int32_t> back;
        for (size_t i = 0; i < p.src.size(); ++i) {
            back.push_back(-p.src[i].entry.pos);
            shift.push_back(p.dst[i].entry.pos);
        }
        ggml_backend_tensor_set(p.back, back.data(), 0, ggml_nbytes(p.back));
    } else {
        for (const Part & part : p.parts) {
            shift.insert(shift.end(), part.n_cells, part.delta);
        }
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
