#include "probe.h"

#include "../errors.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cstring>
#include <memory>

namespace pyps::kernels {

namespace {

using Context = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

Context make_context() {
    const size_t size = 16 * ggml_tensor_overhead() + ggml_graph_overhead_custom(16, false);
    Context      context(ggml_init({ size, nullptr, /* no_alloc = */ true }), ggml_free);
    if (!context) {
        throw EngineError("ggml cannot make a context");
    }
    return context;
}

using Buffer = std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)>;

ggml_backend_buffer_type_t repacking_buffer_type() {
    ggml_backend_dev_t device = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    const auto         get    = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = get ? get(device) : nullptr; type && *type; ++type) {
        if (strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) {
            return *type;
        }
    }
    throw EngineError("this build of ggml repacks no weights");
}

std::vector<float> compute(ggml_context * context, ggml_tensor * op, int threads) {
    std::vector<float> out(ggml_nelements(op));
    op->data            = out.data();
    ggml_cgraph * graph = ggml_new_graph_custom(context, 16, false);
    ggml_build_forward_expand(graph, op);
    ggml_cplan           plan = ggml_graph_plan(graph, threads, nullptr);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) {
        throw EngineError("ggml could not compute a node");
    }
    return out;
}

ggml_tensor * make_tensor(ggml_context *         context,
                          int                    type,
                          std::array<int64_t, 4> n,
                          std::array<size_t, 3>  stride,
                          const void *           data) {
    ggml_tensor * t = ggml_new_tensor(context, ggml_type(type), 4, n.data());
    t->data         = const_cast<void *>(data);
    for (int i = 0; i < 3; ++i) {
        t->nb[i + 1] = stride[i];
    }
    return t;
}

}  // namespace

std::vector<float> ProductProbe::run() const {
    const Context context = make_context();
    const size_t  row     = ggml_row_size(ggml_type(type), k);
    ggml_tensor * w = make_tensor(context.get(), type, { k, rows, 1, 1 }, { row, row * rows, row * rows }, weights);
    Buffer        buffer(nullptr, ggml_backend_buffer_free);
    if (repacked) {
        buffer.reset(ggml_backend_buft_alloc_buffer(repacking_buffer_type(), row * rows));
        w->data = nullptr;
        if (!buffer || ggml_backend_tensor_alloc(buffer.get(), w, ggml_backend_buffer_get_base(buffer.get())) ||
            !w->extra) {
            throw EngineError("ggml does not repack such weights");
        }
        ggml_backend_tensor_set(w, weights, 0, row * rows);
    }
    ggml_tensor * x = make_tensor(context.get(), GGML_TYPE_F32, { k, n[0], n[1], n[2] }, stride, columns);
    return compute(context.get(), ggml_mul_mat(context.get(), w, x), threads);
}

std::vector<float> AttentionProbe::run() const {
    const Context context = make_context();
    const auto    cache   = [&](int type, int64_t width, const uint8_t * data) {
        const size_t row = ggml_row_size(ggml_type(type), width), cell = row * kv_heads;
        return make_tensor(context.get(), type, { width, cells, kv_heads, streams }, { cell, row, cell * cells }, data);
    };
    const size_t  head = dk * sizeof(float), half = sizeof(ggml_fp16_t);
    ggml_tensor * queries = make_tensor(context.get(), GGML_TYPE_F32, { dk, tokens, heads, streams },
                                        { head * heads, head, head * heads * tokens }, q);
    ggml_tensor * m       = mask ? make_tensor(context.get(), GGML_TYPE_F16, { cells, tokens, 1, streams },
                                               { half * cells, half * cells * tokens, half * cells * tokens }, mask)
                                 : nullptr;
    ggml_tensor * op =
        ggml_flash_attn_ext(context.get(), queries, cache(k_type, dk, k), cache(v_type, dv, v), m, scale, bias, cap);
    if (sinks) {
        ggml_tensor * s = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, heads);
        s->data         = const_cast<float *>(sinks);
        ggml_flash_attn_ext_add_sinks(op, s);
    }
    return compute(context.get(), op, threads);
}

}  // namespace pyps::kernels
