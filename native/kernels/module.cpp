// The Python bindings of the kernels: they convert and call, and do nothing else.
#include "../errors.h"
#include "hook.h"
#include "probe.h"

#include "ggml.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, size_t n>
using Array  = nb::ndarray<nb::numpy, const T, nb::ndim<n>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float, nb::ndim<4>>;

Result as_array(std::vector<float> values, std::array<size_t, 4> shape) {
    auto *      kept = new std::vector<float>(std::move(values));
    nb::capsule owner(kept, [](void * p) noexcept { delete static_cast<std::vector<float> *>(p); });
    return Result(kept->data(), 4, shape.data(), owner);
}

// ggml would abort on what does not fit.
void check(bool fits, const char * what) {
    if (!fits) {
        throw pyps::InputError(std::string("the sizes of a node do not fit: ") + what);
    }
}

int64_t width(int type, size_t bytes) {
    check(type >= 0 && type < GGML_TYPE_COUNT && ggml_type_size(ggml_type(type)) > 0, "type");
    check(bytes > 0 && bytes % ggml_type_size(ggml_type(type)) == 0, "row");
    return int64_t(bytes / ggml_type_size(ggml_type(type))) * ggml_blck_size(ggml_type(type));
}

Result multiply(int                                              type,
                Array<uint8_t, 2>                                weights,
                nb::ndarray<nb::numpy, const float, nb::ndim<4>> x,
                int                                              threads,
                bool                                             repacked) {
    const int64_t k = width(type, weights.shape(1));
    check(int64_t(x.shape(3)) == k && x.stride(3) == 1 && x.size() > 0 && weights.shape(0) > 0, "columns");
    check(threads >= 1 && threads <= 512, "threads");
    pyps::kernels::ProductProbe probe{ type,    k,       int64_t(weights.shape(0)), weights.data(), x.data(), {}, {},
                                       threads, repacked };
    for (int i = 0; i < 3; ++i) {
        probe.n[i]      = int64_t(x.shape(2 - i));
        probe.stride[i] = size_t(x.stride(2 - i)) * sizeof(float);
    }
    std::vector<float> out;
    {
        nb::gil_scoped_release release;
        out = probe.run();
    }
    return as_array(std::move(out), { x.shape(0), x.shape(1), x.shape(2), weights.shape(0) });
}

Result attend(Array<float, 4>                   q,
              int                               k_type,
              Array<uint8_t, 4>                 k,
              int                               v_type,
              Array<uint8_t, 4>                 v,
              std::optional<Array<uint16_t, 3>> mask,
              std::optional<Array<float, 1>>    sinks,
              float                             scale,
              float                             bias,
              float                             cap,
              int                               threads) {
    const size_t  streams = q.shape(0), tokens = q.shape(1), heads = q.shape(2), cells = k.shape(1);
    const int64_t dk = width(k_type, k.shape(3)), dv = width(v_type, v.shape(3));
    check(q.size() > 0 && cells > 0 && int64_t(q.shape(3)) == dk && k.shape(0) == streams, "k");
    check(v.shape(0) == streams && v.shape(1) == cells && v.shape(2) == k.shape(2), "v");
    check(k.shape(2) > 0 && heads % k.shape(2) == 0, "heads");
    check(!mask || (mask->shape(0) == streams && mask->shape(1) == tokens && mask->shape(2) == cells), "mask");
    check(mask || bias == 0.0f, "a bias without a mask");
    check(!sinks || sinks->shape(0) == heads, "sinks");
    check(threads >= 1 && threads <= 512, "threads");
    const pyps::kernels::AttentionProbe probe{ int64_t(streams),
                                               int64_t(tokens),
                                               int64_t(heads),
                                               int64_t(k.shape(2)),
                                               int64_t(cells),
                                               dk,
                                               dv,
                                               q.data(),
                                               k_type,
                                               v_type,
                                               k.data(),
                                               v.data(),
                                               mask ? mask->data() : nullptr,
                                               sinks ? sinks->data() : nullptr,
                                               scale,
                                               bias,
                                               cap,
                                               threads };
    std::vector<float>                  out;
    {
        nb::gil_scoped_release release;
        out = probe.run();
    }
    return as_array(std::move(out), { streams, tokens, heads, size_t(dv) });
}

// Raises the exceptions of pyps/errors.py.
void translate(const std::exception_ptr & p, void *) {
    try {
        std::rethrow_exception(p);
    } catch (const pyps::InputError & e) {
        PyErr_SetString(nb::module_::import_("pyps.errors").attr("InputError").ptr(), e.what());
    } catch (const pyps::EngineError & e) {
        PyErr_SetString(nb::module_::import_("pyps.errors").attr("EngineError").ptr(), e.what());
    }
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Kernels for ggml's CPU backend. pyps.engine.kernels wraps it; this is not a public interface.";

    nb::register_exception_translator(translate);

    m.def("install", &pyps::kernels::install, "Stand in front of ggml's own choice of kernels, in this process.");
    m.def("names", &pyps::kernels::names, "Return the names of all kernels that were compiled, best first.");
    m.def("runs_here", &pyps::kernels::runs_here, "name"_a, "Return whether this CPU can run them.");
    m.def("types", &pyps::kernels::types, "name"_a, "Return the names of the weights' types that they multiply.");
    m.def("use", &pyps::kernels::use, "name"_a, "Use these for what is computed from now on; '' for ggml's own.");
    m.def("in_use", &pyps::kernels::in_use, "Return the name of those in use; '' for ggml's own.");
    m.def("computed", &pyps::kernels::computed, "Return how many nodes ours have computed in this process.");
    m.def("multiply", &multiply, "type"_a, "weights"_a, "x"_a, "threads"_a, "repacked"_a = false,
          "Return x [a, b, c, k] times weights (bytes [rows, row] of a ggml type, repacked as for a model or not):\n"
          "float32 [a, b, c, rows].");
    m.def("attend", &attend, "q"_a, "k_type"_a, "k"_a, "v_type"_a, "v"_a, "mask"_a = nb::none(), "sinks"_a = nb::none(),
          "scale"_a = 1.0f, "bias"_a = 0.0f, "cap"_a = 0.0f, "threads"_a = 1,
          "Return the flash attention of q [streams, tokens, heads, dk] over k and v (bytes [streams, cells, heads, "
          "row]\n"
          "of ggml types), with a mask (f16 bits [streams, tokens, cells]) and sinks [heads].");
}
