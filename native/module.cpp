// The Python bindings: they convert and call, and do nothing else. Contexts and models arrive as the addresses that
// llama_cpp's ctypes bindings hold.
#include "decode_at.h"
#include "errors.h"
#include "join.h"
#include "llama_cache.h"
#include "llama_model.h"
#include "rows.h"

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

using PySpan         = std::tuple<llama_seq_id, llama_pos, llama_pos, llama_pos>;  // seq, p0, p1, to
using PyCoefficients = nb::ndarray<nb::numpy, const float, nb::shape<-1, -1, 4>, nb::c_contig, nb::device::cpu>;
using PyRows         = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;
using PyConstRows    = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PyLines        = nb::ndarray<nb::numpy, const float, nb::shape<2, -1>, nb::c_contig, nb::device::cpu>;  // a, b
using PyCorrection   = std::vector<std::tuple<PyLines, PyLines>>;                                             // K, V
using PyPositions    = std::vector<llama_pos>;

llama_context * as_context(uintptr_t address) {
    if (!address) {
        throw pyps::InputError("the context is closed");
    }
    return reinterpret_cast<llama_context *>(address);
}

const llama_model * as_model(uintptr_t address) {
    return reinterpret_cast<const llama_model *>(address);
}

// An array that owns the rows.
PyRows as_array(pyps::Rows rows) {
    uint8_t *   data = rows.data.release();
    nb::capsule owner(data, [](void * p) noexcept { delete[] static_cast<uint8_t *>(p); });
    return PyRows(data, { rows.n, rows.size }, owner);
}

pyps::ConstRows as_rows(const PyConstRows & array) {
    return { array.shape(0), array.shape(1), array.data() };
}

// Calls f while other Python threads run.
template <typename F> auto without_gil(F && f) {
    nb::gil_scoped_release release;
    return f();
}

uint32_t join(uintptr_t                     src,
              uintptr_t                     dst,
              const std::vector<PySpan> &   py_spans,
              llama_seq_id                  dst_seq,
              const std::vector<bool> &     rotates,
              std::optional<PyCoefficients> affine,
              const PyCorrection &          py_correction,
              std::optional<bool>           together) {
    const auto lines = [](const PyLines & l) { return pyps::Lines{ l.data(), l.data() + l.shape(1), l.shape(1) }; };
    pyps::Correction correction;
    for (const auto & [k, v] : py_correction) {
        correction.push_back({ lines(k), lines(v) });
    }
    std::vector<pyps::Span> spans;
    for (const auto & [seq, p0, p1, to] : py_spans) {
        spans.push_back({ seq, p0, p1, to });
    }
    pyps::Coefficients coefficients;
    if (affine) {
        static_assert(sizeof(pyps::Affine) == 4 * sizeof(float));
        coefficients.data     = reinterpret_cast<const pyps::Affine *>(affine->data());
        coefficients.n_spans  = affine->shape(0);
        coefficients.n_layers = affine->shape(1);
    }
    return without_gil([&] {
        return pyps::join(as_context(src), as_context(dst), spans, dst_seq, rotates, coefficients, correction,
                          together);
    });
}

void decode_at(uintptr_t address, llama_seq_id seq, const std::vector<std::tuple<llama_token, llama_pos>> & tokens) {
    std::vector<pyps::Entry> entries;
    for (const auto & [token, pos] : tokens) {
        entries.push_back({ pos, token });
    }
    without_gil([&] { pyps::decode_at(as_context(address), seq, std::move(entries)); });
}

std::tuple<PyPositions, std::vector<int64_t>, PyRows, PyRows> read_layer(uintptr_t    ctx,
                                                                         llama_seq_id seq,
                                                                         size_t       layer) {
    pyps::LayerCells contents = without_gil([&] { return pyps::read(as_context(ctx), seq, layer); });
    return { std::move(contents.positions), std::move(contents.cells), as_array(std::move(contents.rows.k)),
             as_array(std::move(contents.rows.v)) };
}

std::tuple<PyPositions, std::vector<std::tuple<PyRows, PyRows>>> read_span(uintptr_t    ctx,
                                                                           llama_seq_id seq,
                                                                           llama_pos    p0,
                                                                           llama_pos    p1) {
    pyps::SpanRows span = without_gil([&] { return pyps::read_span(as_context(ctx), seq, p0, p1); });
    std::vector<std::tuple<PyRows, PyRows>> layers;
    for (pyps::LayerRows & rows : span.layers) {
        layers.emplace_back(as_array(std::move(rows.k)), as_array(std::move(rows.v)));
    }
    return { std::move(span.positions), std::move(layers) };
}

void write_span(uintptr_t                                                 ctx,
                llama_seq_id                                              seq,
                const PyPositions &                                       positions,
                const std::vector<std::tuple<PyConstRows, PyConstRows>> & rows) {
    std::vector<pyps::ConstLayerRows> layers;
    for (const auto & [k, v] : rows) {
        layers.push_back({ as_rows(k), as_rows(v) });
    }
    without_gil([&] { pyps::write_span(as_context(ctx), seq, positions, layers); });
}

size_t n_layers(uintptr_t ctx) {
    return pyps::Memory(as_context(ctx)).n_layers();
}

size_t n_cells(uintptr_t ctx, llama_seq_id seq) {
    return pyps::Memory(as_context(ctx)).n_cells(seq);
}

std::vector<int64_t> hadamard(uintptr_t ctx) {
    return pyps::Memory(as_context(ctx)).hadamards();
}

std::string why_not_joinable(uintptr_t model) {
    return pyps::why_not_joinable(as_model(model));
}

nb::bytes norms(uintptr_t model) {
    const std::string bytes = pyps::norms(as_model(model));
    return nb::bytes(bytes.data(), bytes.size());
}

std::tuple<double, double, double> work(uintptr_t model) {
    const pyps::Work work = pyps::work(as_model(model));
    return { work.layers, work.logits, work.bytes };
}

bool is_causal(uintptr_t model) {
    return pyps::is_causal(as_model(model));
}

uint32_t long_context(uintptr_t model) {
    return pyps::long_context(as_model(model));
}

// Raises the exceptions of pyps/errors.py, where they are documented. llama.cpp throws std::runtime_error, too.
void translate(const std::exception_ptr & p, void *) {
    const char * name;
    std::string  text;
    try {
        std::rethrow_exception(p);
    } catch (const pyps::RefusedError & e) {
        name = "RefusedError";
        text = e.what();
    } catch (const pyps::InputError & e) {
        name = "InputError";
        text = e.what();
    } catch (const std::runtime_error & e) {
        name = "EngineError";
        text = e.what();
    }
    nb::object type = nb::module_::import_("pyps.errors").attr(name);
    PyErr_SetString(type.ptr(), text.c_str());
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Join the KV caches of llama.cpp contexts. pyps.engine wraps it; this is not a public interface.";

    nb::register_exception_translator(translate);

    m.attr("llama_cpp_version") = PYPS_LLAMA_CPP_VERSION;

    m.def("join", &join, "src"_a, "dst"_a, "spans"_a, "dst_seq"_a, "rotates"_a, "affine"_a = nb::none(),
          "correction"_a = PyCorrection(), "together"_a = nb::none(),
          "Place spans (seq, p0, p1, to) of context src in sequence dst_seq of dst; return the number of cells.\n\n"
          "rotates [layers]: whether RoPE turns a layer's keys. affine: float32 [spans, layers, 4], rows of\n"
          "(a_k, b_k, a_v, b_v); None for the identity. correction: a list of (K, V) for each layer, float32 [2,\n"
          "channels] each, rows a and b; empty for none. together: whether all spans are moved at once; None for\n"
          "what suits the device. All or nothing.");
    m.def("decode_at", &decode_at, "ctx"_a, "seq"_a, "tokens"_a,
          "Compute tokens (id, position) at any positions of a sequence, without logits. All or nothing.\n\n"
          "Each attends to what is not behind its position, joined cells and the other tokens.");
    m.def("read", &read_layer, "ctx"_a, "seq"_a, "layer"_a,
          "Return (positions [n], rows [n], K bytes [n, row], V bytes [n, row]) of a sequence in one layer.\n\n"
          "They are ordered by position; a row is stream * cells + cell.");
    m.def("read_span", &read_span, "ctx"_a, "seq"_a, "p0"_a, "p1"_a,
          "Return (positions [n], (K bytes [n, row], V bytes [n, row]) of each layer) of positions [p0, p1).");
    m.def("write_span", &write_span, "ctx"_a, "seq"_a, "positions"_a, "rows"_a,
          "Give a sequence new cells with these contents, as read_span returned them. All or nothing.");
    m.def("n_layers", &n_layers, "ctx"_a,
          "Return the number of attention layers with a KV cache: the mapper's layers.");
    m.def("n_cells", &n_cells, "ctx"_a, "seq"_a,
          "Return the number of cells that a sequence takes, in the cache where it takes most.");
    m.def("hadamard", &hadamard, "ctx"_a,
          "Return the sizes of the Hadamard matrices that K and V of each cache are multiplied by; 0 for none.");
    m.def("why_not_joinable", &why_not_joinable, "model"_a,
          "Return why the caches of this model cannot be joined, or nothing.");
    m.def("norms", &norms, "model"_a, "Return the values of the model's norms, as bytes.");
    m.def("work", &work, "model"_a,
          "Return (elements in all layers, elements for the logits, bytes of both) of the matrices that a token is "
          "multiplied with.");
    m.def("is_causal", &is_causal, "model"_a, "Return False for models that read in both directions.");
    m.def("long_context", &long_context, "model"_a,
          "Return above how many cells for each sequence LongRoPE's long factors apply; 0 if the model has none.");
}
