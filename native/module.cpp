// Python bindings. Contexts and models arrive as the addresses that llama_cpp's ctypes bindings hold.
#include "cache.h"
#include "join.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

llama_context * as_context(uintptr_t address) {
    if (!address) {
        throw pyps::InputError("the context is closed");
    }
    return reinterpret_cast<llama_context *>(address);
}

using Coefficients = nb::ndarray<const float, nb::shape<-1, -1, 4>, nb::c_contig, nb::device::cpu>;
using Bytes        = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;

uint32_t join_spans(uintptr_t src, uintptr_t dst,
              const std::vector<std::tuple<llama_seq_id, llama_pos, llama_pos, llama_pos>> & spans,
              llama_seq_id dst_seq, const std::vector<bool> & rotates, std::optional<Coefficients> affine) {
    llama_context *         from = as_context(src);
    llama_context *         to   = as_context(dst);
    std::vector<pyps::Span> parts;
    for (const auto & [seq, p0, p1, pos] : spans) {
        parts.push_back({ seq, p0, p1, pos });
    }
    static_assert(sizeof(pyps::Affine) == 4 * sizeof(float));
    const pyps::Affine * coefficients = nullptr;
    if (affine) {
        const size_t n_layers = pyps::Memory(from).n_layers();
        if (affine->shape(0) != parts.size() || affine->shape(1) != n_layers) {
            throw pyps::InputError("the mapper's coefficients must be [" + std::to_string(parts.size()) + ", " +
                                   std::to_string(n_layers) + ", 4], a row for each span and layer");
        }
        coefficients = reinterpret_cast<const pyps::Affine *>(affine->data());
    }
    nb::gil_scoped_release release;
    return pyps::join(from, to, parts, dst_seq, rotates, coefficients);
}

Bytes make_bytes(size_t rows, size_t row_size) {
    auto *      data = new uint8_t[rows * row_size];
    nb::capsule owner(data, [](void * p) noexcept { delete[] static_cast<uint8_t *>(p); });
    return Bytes(data, { rows, row_size }, owner);
}

using Cells = std::tuple<std::vector<llama_pos>, std::vector<int64_t>, Bytes, Bytes>;

Cells read_layer(const pyps::Cache & cache, const pyps::Layer & l, llama_seq_id seq) {
    const auto          cells = cache.all_cells(seq);
    const size_t        size  = ggml_type_size(l.v->type);  // of an element; used where V is transposed
    const size_t        v_row = ggml_row_size(l.v->type, l.n_embd_v);

    std::vector<llama_pos> pos;
    std::vector<int64_t>   rows;
    Bytes                  k = make_bytes(cells.size(), l.k->nb[1]);
    Bytes                  v = make_bytes(cells.size(), v_row);
    for (size_t i = 0; i < cells.size(); ++i) {
        const auto & c = cells[i];
        pos.push_back(c.pos);
        rows.push_back((int64_t) c.stream * cache.n_cells() + c.index);
        ggml_backend_tensor_get(l.k, k.data() + i * l.k->nb[1], c.stream * l.k->nb[2] + c.index * l.k->nb[1],
                                l.k->nb[1]);
        uint8_t * to = v.data() + i * v_row;
        if (!cache.v_transposed()) {
            ggml_backend_tensor_get(l.v, to, c.stream * l.v->nb[2] + c.index * l.v->nb[1], v_row);
            continue;
        }
        for (int64_t j = 0; j < l.n_embd_v; ++j) {
            ggml_backend_tensor_get(l.v, to + j * size,
                                    c.stream * l.v->nb[2] + (j * cache.n_cells() + c.index) * size, size);
        }
    }
    return { pos, rows, k, v };
}

Cells read_cells(uintptr_t address, llama_seq_id seq, size_t layer) {
    pyps::Memory memory(as_context(address));
    memory.check_seq(seq);
    memory.settle();
    for (const pyps::Cache & cache : memory.caches()) {
        for (const pyps::Layer & l : cache.layers()) {
            if (l.number == layer) {
                return read_layer(cache, l, seq);
            }
        }
    }
    throw pyps::InputError("there is no layer " + std::to_string(layer));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Joins the KV caches of llama.cpp contexts. Wrapped by pyps.context; not a public interface.";

    // our exceptions live in Python, where they are documented
    nb::register_exception_translator([](const std::exception_ptr & p, void *) {
        const char * name;
        std::string  text;
        try {
            std::rethrow_exception(p);
        } catch (const pyps::Refusal & e) {
            name = "RefusedError";
            text = e.what();
        } catch (const pyps::InputError & e) {
            name = "InputError";
            text = e.what();
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::runtime_error & e) {
            name = "EngineError";
            text = e.what();
        }
        nb::object type = nb::module_::import_("pyps.errors").attr(name);
        PyErr_SetString(type.ptr(), text.c_str());
    });

    m.attr("llama_cpp_version") = PYPS_LLAMA_CPP_VERSION;

    m.def("join", &join_spans, "src"_a, "dst"_a, "spans"_a, "dst_seq"_a, "rotates"_a, "affine"_a = nb::none(),
          "Place spans (seq, p0, p1, to) of context src in sequence dst_seq of context dst; returns the cells placed. "
          "rotates [layers]: whether RoPE turns a layer's keys. affine: float32 [spans, layers, 4] (a_k, b_k, a_v, b_v), "
          "None for the identity. All or nothing.");
    m.def(
        "why_not_joinable",
        [](uintptr_t model) { return pyps::why_not_joinable(reinterpret_cast<const llama_model *>(model)); }, "model"_a,
        "Empty, or why the caches of this model cannot be joined.");
    m.def(
        "norms",
        [](uintptr_t model) {
            const std::string bytes = pyps::norms(reinterpret_cast<const llama_model *>(model));
            return nb::bytes(bytes.data(), bytes.size());
        },
        "model"_a, "The values of the model's norms, as bytes.");
    m.def(
        "is_causal", [](uintptr_t model) { return pyps::is_causal(reinterpret_cast<const llama_model *>(model)); },
        "model"_a, "False for models that read in both directions.");
    m.def(
        "long_context",
        [](uintptr_t model) { return pyps::long_context(reinterpret_cast<const llama_model *>(model)); }, "model"_a,
        "Cells a sequence above which LongRoPE's long factors apply; 0 if the model has none.");
    m.def(
        "n_layers", [](uintptr_t ctx) { return pyps::Memory(as_context(ctx)).n_layers(); }, "ctx"_a,
        "Attention layers with a KV cache: the mapper's layer count.");
    m.def("read", &read_cells, "ctx"_a, "seq"_a, "layer"_a,
          "(positions [n], rows [n], K bytes [n, row], V bytes [n, row]) of a sequence in one layer, ordered by "
          "position; a row is stream * cells + cell. Slow: for tests and for looking.");
}
