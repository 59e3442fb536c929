// Python bindings. Contexts and models arrive as the addresses that llama_cpp's ctypes bindings hold.
#include "cache.h"
#include "join.h"
#include "rows.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
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
              llama_seq_id dst_seq, const std::vector<bool> & rotates, std::optional<Coefficients> affine,
              std::optional<bool> together) {
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
    return pyps::join(from, to, parts, dst_seq, rotates, coefficients, together);
}

Bytes make_bytes(size_t rows, size_t row_size) {
    auto *      data = new uint8_t[rows * row_size];
    nb::capsule owner(data, [](void * p) noexcept { delete[] static_cast<uint8_t *>(p); });
    return Bytes(data, { rows, row_size }, owner);
}

using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Cells      = std::tuple<std::vector<llama_pos>, std::vector<int64_t>, Bytes, Bytes>;
using Rows       = std::vector<std::tuple<Bytes, Bytes>>;
using ConstRows  = std::vector<std::tuple<ConstBytes, ConstBytes>>;

std::tuple<Bytes, Bytes> read_layer(const pyps::Cache & cache, const pyps::Layer & l,
                                    const std::vector<pyps::Cell> & cells) {
    Bytes k = make_bytes(cells.size(), pyps::k_row_size(l));
    Bytes v = make_bytes(cells.size(), pyps::v_row_size(l));
    pyps::read_rows(cache, l, cells, k.data(), v.data());
    return { k, v };
}

Cells read_cells(uintptr_t address, llama_seq_id seq, size_t layer) {
    pyps::Memory memory(as_context(address));
    memory.check_seq(seq);
    memory.settle();
    for (const pyps::Cache & cache : memory.caches()) {
        for (const pyps::Layer & l : cache.layers()) {
            if (l.number != layer) {
                continue;
            }
            const auto             cells = cache.all_cells(seq);
            std::vector<llama_pos> pos;
            std::vector<int64_t>   rows;
            for (const auto & c : cells) {
                pos.push_back(c.pos);
                rows.push_back((int64_t) c.stream * cache.n_cells() + c.index);
            }
            const auto [k, v] = read_layer(cache, l, cells);
            return { pos, rows, k, v };
        }
    }
    throw pyps::InputError("there is no layer " + std::to_string(layer));
}

std::tuple<std::vector<llama_pos>, Rows> read_span(uintptr_t address, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    pyps::Memory memory(as_context(address));
    memory.check_seq(seq);
    memory.settle();
    std::vector<llama_pos>                                pos;
    std::vector<std::optional<std::tuple<Bytes, Bytes>>> found(memory.n_layers());
    for (const pyps::Cache & cache : memory.caches()) {
        const auto cells = cache.cells(seq, p0, p1);
        pos.clear();
        for (const auto & c : cells) {
            pos.push_back(c.pos);
        }
        for (const pyps::Layer & l : cache.layers()) {
            found.at(l.number) = read_layer(cache, l, cells);
        }
    }
    Rows rows;
    for (const auto & layer : found) {
        rows.push_back(layer.value());
    }
    return { pos, rows };
}

void write_span(uintptr_t address, llama_seq_id seq, const std::vector<llama_pos> & pos, const ConstRows & rows) {
    pyps::Memory memory(as_context(address));
    memory.check_seq(seq);
    memory.settle();
    if (rows.size() != memory.n_layers()) {
        throw pyps::InputError("there are K and V of " + std::to_string(rows.size()) + " layers; this model has " +
                               std::to_string(memory.n_layers()));
    }
    std::vector<pyps::Cell> entries;
    for (const llama_pos p : pos) {
        if (p < 0) {
            throw pyps::InputError("a cell cannot be at position " + std::to_string(p));
        }
        entries.push_back({ 0, 0, p, LLAMA_TOKEN_NULL });
    }
    std::vector<pyps::Reservation> reserved;
    for (const pyps::Cache & cache : memory.caches()) {
        for (const pyps::Layer & l : cache.layers()) {
            const auto & [k, v] = rows[l.number];
            if (k.shape(0) != pos.size() || v.shape(0) != pos.size() || k.shape(1) != pyps::k_row_size(l) ||
                v.shape(1) != pyps::v_row_size(l)) {
                throw pyps::InputError("K and V of layer " + std::to_string(l.number) + " must be " +
                                       std::to_string(pos.size()) + " rows of " + std::to_string(pyps::k_row_size(l)) +
                                       " and of " + std::to_string(pyps::v_row_size(l)) + " bytes");
            }
        }
        reserved.push_back(cache.reserve(seq, entries));
    }
    nb::gil_scoped_release release;
    for (size_t c = 0; c < reserved.size(); ++c) {
        pyps::Cache & cache = memory.caches()[c];
        for (const pyps::Layer & l : cache.layers()) {
            const auto & [k, v] = rows[l.number];
            pyps::write_rows(cache, l, reserved[c], k.data(), v.data());
        }
        cache.commit(reserved[c]);
    }
}

std::vector<int64_t> hadamard(uintptr_t address) {
    std::vector<int64_t> sizes;
    const pyps::Memory   memory(as_context(address));
    for (const pyps::Cache & cache : memory.caches()) {
        sizes.insert(sizes.end(), { cache.k_hadamard(), cache.v_hadamard() });
    }
    return sizes;
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
          "together"_a = nb::none(),
          "Place spans (seq, p0, p1, to) of context src in sequence dst_seq of context dst; returns the cells placed. "
          "rotates [layers]: whether RoPE turns a layer's keys. affine: float32 [spans, layers, 4] (a_k, b_k, a_v, b_v), "
          "None for the identity. together: all spans at once; None for what suits the device. All or nothing.");
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
        "work",
        [](uintptr_t model) {
            const pyps::Work w = pyps::work(reinterpret_cast<const llama_model *>(model));
            return std::make_tuple(w.layers, w.logits, w.bytes);
        },
        "model"_a,
        "Elements of the matrices that a token is multiplied with, in all layers and for its logits; bytes of both.");
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
    m.def(
        "n_cells",
        [](uintptr_t ctx, llama_seq_id seq) {
            const pyps::Memory memory(as_context(ctx));
            memory.check_seq(seq);
            size_t most = 0;
            for (const pyps::Cache & cache : memory.caches()) {
                most = std::max(most, cache.all_cells(seq).size());
            }
            return most;
        },
        "ctx"_a, "seq"_a, "Cells that a sequence takes, of the cache where it takes most.");
    m.def("read", &read_cells, "ctx"_a, "seq"_a, "layer"_a,
          "(positions [n], rows [n], K bytes [n, row], V bytes [n, row]) of a sequence in one layer, ordered by "
          "position; a row is stream * cells + cell.");
    m.def("read_span", &read_span, "ctx"_a, "seq"_a, "p0"_a, "p1"_a,
          "(positions [n], (K bytes [n, row], V bytes [n, row]) of each layer) of positions [p0, p1) of a sequence.");
    m.def("write_span", &write_span, "ctx"_a, "seq"_a, "positions"_a, "rows"_a,
          "Gives a sequence new cells with these contents, as read_span returned them. All or nothing.");
    m.def("hadamard", &hadamard, "ctx"_a,
          "Size of the Hadamard matrix that K and V of each cache are multiplied by; 0: stored as they are.");
}
