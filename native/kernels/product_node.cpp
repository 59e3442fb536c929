#include "product_node.h"

#include "shares.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <cstring>

namespace pyps::kernels {

namespace {

constexpr size_t kTiled = 640 << 10;  // bytes a thread, more than ggml's own tiled products ask for

struct ProductScratch {
    Shares   panels;
    float ** out;  // [columns]
    Columns  columns;
    size_t   size;

    ProductScratch(const Kernels & kernels, Scratch scratch, const ggml_tensor * op, int n_threads) :
        panels(scratch, divide_up(op->src[0]->ne[1], kernels.panel), n_threads) {
        const int64_t n = ggml_nrows(op->src[1]), blocks = op->src[1]->ne[0] / kBlock;
        out            = scratch.take<float *>(n);
        columns.q      = scratch.take<int8_t>(n * blocks * kBlock);
        columns.scale  = scratch.take<float>(n * blocks);
        columns.sum    = scratch.take<float>(n * blocks);
        columns.offset = scratch.take<int32_t>(n * blocks * 2);
        columns.n      = int(n);
        columns.blocks = blocks;
        size           = scratch.used();
    }
};

const Product * find_product(const Kernels & kernels, const ggml_tensor * op) {
    return kernels.product(op->src[0]->type, is_repacked(op->src[0]));
}

// Column c of a tensor, counted over all dimensions but the first.
float * column(const ggml_tensor * t, int64_t c) {
    const int64_t i1 = c % t->ne[1], i2 = c / t->ne[1] % t->ne[2], i3 = c / t->ne[1] / t->ne[2];
    return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

}  // namespace

bool is_repacked(const ggml_tensor * weights) {
    // by its name: the buffer type itself is not exported. On x86 it interleaves 8 rows, 8 bytes of each.
    return weights->buffer && strcmp(ggml_backend_buft_name(weights->buffer->buft), "CPU_REPACK") == 0;
}

bool can_multiply(const Kernels & kernels, const ggml_tensor * op) {
    const ggml_tensor *w = op->src[0], *x = op->src[1];
    const Product *    product = find_product(kernels, op);
    return product && ggml_nrows(x) >= product->min_columns && w->ne[2] == 1 && w->ne[3] == 1 &&
           w->nb[0] == ggml_type_size(w->type) && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) &&
           ggml_nrows(x) < INT32_MAX / kBlock && op->type == GGML_TYPE_F32 && op->nb[0] == sizeof(float);
}

size_t multiply_scratch(const Kernels & kernels, const ggml_tensor * op, int n_threads) {
    // no less than ggml would need itself, which may have to compute this after all (use_ref)
    const auto * traits = ggml_get_type_traits_cpu(op->src[0]->type);
    const size_t own    = ggml_row_size(traits->vec_dot_type, ggml_nelements(op->src[1])) + kTiled * n_threads;
    return std::max(own, ProductScratch(kernels, Scratch(nullptr), op, n_threads).size);
}

void multiply(const Kernels & kernels, const ggml_compute_params * params, ggml_tensor * op) {
    const int       ith = params->ith, nth = params->nth;
    const Product & product = *find_product(kernels, op);
    const Weights   weights{ (const char *) op->src[0]->data, op->src[0]->nb[1], op->src[0]->ne[1] };
    ProductScratch  scratch(kernels, Scratch(params->wdata), op, nth);
    const Columns & columns = scratch.columns;

    scratch.panels.open(ith);
    // the first panel is on its way while the columns are quantised
    const size_t panel_size = kernels.panel * weights.stride;
    const char * panel      = weights.data + scratch.panels.first(ith) * panel_size;
    for (size_t line = 0; line < panel_size; line += kLine) {
        __builtin_prefetch(panel + line);
    }
    for (int c = 0; c < columns.n; ++c) {
        kernels.quantise(column(op->src[1], c), columns, c, columns.blocks * ith / nth,
                         columns.blocks * (ith + 1) / nth, product);
    }
    for (int c = ith; c < columns.n; c += nth) {
        scratch.out[c] = column(op, c);
    }
    ggml_barrier(params->threadpool);

    const int64_t n_panels = divide_up(weights.rows, kernels.panel);
    scratch.panels.work(ith, std::max<int64_t>(n_panels / (nth * 8), 1), [&](int64_t begin, int64_t end) {
        product.multiply(weights, columns, begin * kernels.panel, std::min(end * kernels.panel, weights.rows),
                         scratch.out);
    });
}

}  // namespace pyps::kernels
