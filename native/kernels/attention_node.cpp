#include "attention_node.h"

#include "shares.h"

#include "ggml-cpu-impl.h"

#include <cmath>
#include <cstring>

namespace pyps::kernels {

namespace {

constexpr int    kMaxParts = 64;       // of the cells of a stream
constexpr int    kMinCells = 128;      // of a part: fewer are not worth the merging
constexpr size_t kGgmls    = 1 << 20;  // bytes a thread, more than ggml's own flash attention asks for

// How a node is cut: a share has some tokens and some cells of one stream, and all heads.
struct Cut {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    int64_t            group;                 // heads of queries that share one of K and V
    int64_t            tokens, cells;         // of a share, at most
    int64_t            n_tokens, n_cells, n;  // shares along the tokens, along the cells, in all
    float              scale, bias, cap;

    Cut(const ggml_tensor * op, int n_threads) :
        q(op->src[0]),
        k(op->src[1]),
        v(op->src[2]),
        mask(op->src[3]),
        sinks(op->src[4]),
        group(q->ne[2] / k->ne[2]) {
        memcpy(&scale, op->op_params, sizeof(float));
        memcpy(&bias, op->op_params + 1, sizeof(float));
        memcpy(&cap, op->op_params + 2, sizeof(float));
        scale = cap != 0.0f ? scale / cap : scale;
        // even shares of tokens, few enough for their rows to be computed together
        tokens   = divide_up(q->ne[1], divide_up(q->ne[1], kMaxRows / group));
        n_tokens = divide_up(q->ne[1], tokens);
        // and parts of the cells, if that is not enough for all threads
        const int64_t wanted = divide_up(2 * n_threads, n_tokens * q->ne[3]);
        const int64_t parts  = std::min({ wanted, divide_up(k->ne[1], kMinCells), int64_t(kMaxParts) });
        cells                = divide_up(divide_up(k->ne[1], parts), kCells) * kCells;
        n_cells              = divide_up(k->ne[1], cells);
        n                    = n_tokens * n_cells * q->ne[3];
    }

    // Rows of queries of a share, at most: of one head of K and V, of all.
    int64_t rows() const { return group * tokens; }

    int64_t all_rows() const { return k->ne[2] * rows(); }

    // ALiBi: how steeply a head's scores fall with distance.
    float slope(int64_t head) const {
        const auto n = int64_t(1) << int(floor(log2(q->ne[2])));
        return head < n ? powf(powf(2.0f, -bias / n), head + 1)
                        : powf(powf(2.0f, -bias / 2.0f / n), 2 * (head - n) + 1);
    }
};

struct AttentionScratch {
    Shares    shares;
    float *   slope;     // [heads of queries]
    Partial * partials;  // [shares][all rows]
    float *   v;         // [shares][all rows][dv]
    float *   cells;     // of this thread
    size_t    size;

    AttentionScratch(Scratch scratch, const Cut & cut, int thread, int n_threads) : shares(scratch, cut.n, n_threads) {
        const int64_t dk = cut.k->ne[0], dv = cut.v->ne[0], rows = cut.n * cut.all_rows();
        slope    = scratch.take<float>(cut.q->ne[2]);
        partials = scratch.take<Partial>(rows);
        v        = scratch.take<float>(rows * dv);
        cells    = nullptr;
        for (int i = 0; i < n_threads; ++i) {
            float * piece = scratch.take<float>(attention_scratch(dk, dv));
            cells         = i == thread ? piece : cells;
        }
        size = scratch.used();
    }
};

Attention attention_of(const Cut & cut, int64_t share, const float * slope) {
    const ggml_tensor *q = cut.q, *k = cut.k, *v = cut.v, *mask = cut.mask;
    const int64_t      stream = share / cut.n_cells / cut.n_tokens;
    const int64_t      token  = share / cut.n_cells % cut.n_tokens * cut.tokens;
    const int64_t      cell   = share % cut.n_cells * cut.cells;
    Attention          a;
    a.n_tokens = int(std::min(cut.tokens, q->ne[1] - token));
    a.n_heads  = int(k->ne[2]);
    a.group    = int(cut.group);
    a.q        = (const char *) q->data + token * q->nb[1] + stream * q->nb[3];
    a.k        = (const char *) k->data + stream * k->nb[3];
    a.v        = (const char *) v->data + stream * v->nb[3];
    a.mask     = mask ? (const char *) mask->data + token * mask->nb[1] + stream % mask->ne[3] * mask->nb[3] : nullptr;
    a.q_token  = q->nb[1];
    a.q_head   = q->nb[2];
    a.k_cell   = k->nb[1];
    a.k_head   = k->nb[2];
    a.v_cell   = v->nb[1];
    a.v_head   = v->nb[2];
    a.mask_token = mask ? mask->nb[1] : 0;
    a.mask_head  = mask && mask->ne[2] > 1 ? mask->nb[2] : 0;
    a.k_type     = k->type;
    a.v_type     = v->type;
    a.dk         = int(k->ne[0]);
    a.dv         = int(v->ne[0]);
    a.begin      = cell;
    a.end        = std::min(cell + cut.cells, k->ne[1]);
    a.scale      = cut.scale;
    a.cap        = cut.cap;
    a.slope      = cut.bias > 0.0f ? slope : nullptr;
    return a;
}

// Rows of a cache are read in registers of up to 16 values.
bool can_read(const ggml_tensor * t) {
    const bool type = t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 || t->type == GGML_TYPE_F32 ||
                      t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_Q4_0;
    return type && t->nb[0] == ggml_type_size(t->type) && t->ne[0] % 16 == 0;
}

}  // namespace

bool can_attend(const Kernels &, const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && can_read(k) && can_read(v) &&
           q->ne[2] % k->ne[2] == 0 && q->ne[2] / k->ne[2] <= kMaxRows && v->ne[2] == k->ne[2] &&
           k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] && k->ne[1] > 0 &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(ggml_fp16_t) &&
                      (mask->ne[2] == 1 || mask->ne[2] == q->ne[2]))) &&
           op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

size_t attend_scratch(const Kernels &, const ggml_tensor * op, int n_threads) {
    size_t size = kGgmls * n_threads;       // should ggml have to compute this after all (use_ref)
    for (int n = 1; n <= n_threads; ++n) {  // fewer threads than planned may compute it, and cut it differently
        size = std::max(size, AttentionScratch(Scratch(nullptr), Cut(op, n), 0, n).size);
    }
    return size;
}

void attend(const Kernels & kernels, const ggml_compute_params * params, ggml_tensor * op) {
    const int        ith = params->ith, nth = params->nth;
    const Cut        cut(op, nth);
    AttentionScratch scratch(Scratch(params->wdata), cut, ith, nth);
    const int64_t    dv = cut.v->ne[0], all_rows = cut.all_rows(), n_heads = cut.q->ne[2], n_tokens = cut.q->ne[1];
    scratch.shares.open(ith);
    for (int64_t head = ith; cut.bias > 0.0f && head < n_heads; head += nth) {
        scratch.slope[head] = cut.slope(head);
    }
    ggml_barrier(params->threadpool);

    scratch.shares.work(ith, 1, [&](int64_t share, int64_t) {
        Partial * partials = scratch.partials + share * all_rows;
        for (int64_t i = 0; i < all_rows; ++i) {
            partials[i].v = scratch.v + (share * all_rows + i) * dv;
        }
        kernels.attend(attention_of(cut, share, scratch.slope), partials, scratch.cells);
    });
    ggml_barrier(params->threadpool);

    const int64_t n = n_heads * n_tokens * cut.q->ne[3];
    for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; ++i) {
        const int64_t head = i % n_heads, token = i / n_heads % n_tokens, stream = i / n_heads / n_tokens;
        const int64_t i_tokens = token / cut.tokens, share = (stream * cut.n_tokens + i_tokens) * cut.n_cells;
        // the last tokens may be fewer than those of other shares
        const int64_t rows = std::min(cut.tokens, n_tokens - i_tokens * cut.tokens) * cut.group;
        const int64_t row  = head / cut.group * rows + token % cut.tokens * cut.group + head % cut.group;
        Partial       parts[kMaxParts];
        for (int64_t c = 0; c < cut.n_cells; ++c) {
            parts[c] = scratch.partials[(share + c) * all_rows + row];
        }
        const float * sink = cut.sinks ? (const float *) cut.sinks->data + head : nullptr;
        float *       out  = (float *) ((char *) op->data + head * op->nb[1] + token * op->nb[2] + stream * op->nb[3]);
        kernels.merge(parts, int(cut.n_cells), int(dv), sink, out);
    }
}

}  // namespace pyps::kernels
