// ggml's CPU backend has a list of "extra buffer types" and asks each, before it computes a node, whether it has a
// kernel for it (ggml/src/ggml-cpu/traits.cpp). The first is ggml's own, for weights that it has repacked. Its `context`
// is the object that is asked: we put ours there, which asks that one about everything that is not for us. That is one
// store of a pointer: threads that compute meanwhile see the one object or the other.
//
// Who computes a node is decided when its graph is planned (work_size), on one thread, and noted in the node (`extra`,
// which the CPU backend uses for weights only). All threads then do as noted (compute_forward), even if other kernels
// are chosen meanwhile.
#include "hook.h"

#include "../errors.h"
#include "attention_node.h"
#include "kernels.h"
#include "product_node.h"

#include "traits.h"

#include <algorithm>
#include <atomic>

namespace pyps::kernels {

extern const Kernels avx2, avxvnni, avx512vnni;  // as far as they were compiled

namespace {

struct Choice {
    const Kernels * kernels;
    bool (*runs_here)();
};

const std::vector<Choice> & choices() {
    static const std::vector<Choice> all = {
#ifdef PYPS_AVX512VNNI
        { &avx512vnni,
          [] {
              return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
          } },
#endif
#ifdef PYPS_AVXVNNI
        { &avxvnni,
          [] {
              return __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("avx2") &&
                     __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
          } },
#endif
#ifdef PYPS_AVX2
        { &avx2,
          [] {
              return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
          } },
#endif
    };
    return all;
}

const Choice * find(const std::string & name) {
    for (const Choice & choice : choices()) {
        if (choice.kernels->name == name) {
            return &choice;
        }
    }
    return nullptr;
}

std::atomic<const Kernels *> current{ nullptr };
std::atomic<uint64_t>        n_computed{ 0 };

// The kernels that a node was planned for; null if ggml computes it.
const Kernels * planned(const ggml_tensor * op) {
    for (const Choice & choice : choices()) {
        if (choice.kernels == op->extra) {
            return choice.kernels;
        }
    }
    return nullptr;
}

template <bool (*can)(const Kernels &, const ggml_tensor *),
          size_t (*scratch)(const Kernels &, const ggml_tensor *, int),
          void (*compute)(const Kernels &, const ggml_compute_params *, ggml_tensor *)>
struct Traits : ggml::cpu::tensor_traits {
    ggml::cpu::extra_buffer_type * next;

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        const Kernels * kernels = current.load(std::memory_order_relaxed);
        const bool      ours    = kernels && can(*kernels, op);
        if (ours || planned(op)) {
            const_cast<ggml_tensor *>(op)->extra = ours ? const_cast<Kernels *>(kernels) : nullptr;
        }
        if (ours) {
            size = scratch(*kernels, op, n_threads);
            return true;
        }
        auto * others = next->get_tensor_traits(op);
        return others && others->work_size(n_threads, op, size);
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Kernels * kernels = planned(op);
        if (!kernels || params->use_ref) {
            auto * others = next->get_tensor_traits(op);
            return others && others->compute_forward(params, op);
        }
        compute(*kernels, params, op);
        if (params->ith == 0) {
            n_computed.fetch_add(1, std::memory_order_relaxed);
        }
        return true;
    }
};

bool in_extra_buffer(const ggml_tensor * t) {
    const auto & extras = ggml_backend_cpu_get_extra_buffer_types();
    return t->buffer && std::find(extras.begin(), extras.end(), t->buffer->buft) != extras.end();
}

class Hook : public ggml::cpu::extra_buffer_type {
  public:
    explicit Hook(ggml::cpu::extra_buffer_type * next) : next_(next) { product_.next = attention_.next = next; }

    bool supports_op(ggml_backend_dev_t device, const ggml_tensor * op) override {
        return next_->supports_op(device, op);
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_MUL_MAT && (is_repacked(op->src[0]) || !in_extra_buffer(op->src[0]))) {
            return &product_;
        }
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return &attention_;
        }
        return next_->get_tensor_traits(op);
    }

  private:
    ggml::cpu::extra_buffer_type *                   next_;  // what stood here before
    Traits<can_multiply, multiply_scratch, multiply> product_;
    Traits<can_attend, attend_scratch, attend>       attention_;
};

}  // namespace

void install() {
    static const bool installed = [] {
        const auto & extras = ggml_backend_cpu_get_extra_buffer_types();
        if (extras.empty() || !extras[0] || !extras[0]->context) {
            throw EngineError("this build of ggml has no extra buffer types (GGML_CPU_REPACK), where it would ask");
        }
        // the hook stays for as long as the process does
        extras[0]->context = new Hook((ggml::cpu::extra_buffer_type *) extras[0]->context);
        return true;
    }();
    (void) installed;
}

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const Choice & choice : choices()) {
        all.push_back(choice.kernels->name);
    }
    return all;
}

bool runs_here(const std::string & name) {
    const Choice * choice = find(name);
    return choice && choice->runs_here();
}

std::vector<std::string> types(const std::string & name) {
    std::vector<std::string> all;
    if (const Choice * choice = find(name)) {
        for (int i = 0; i < choice->kernels->n_products; ++i) {
            if (choice->kernels->products[i].repacked) {
                continue;  // of a type that is there as it lies in files, too
            }
            all.push_back(ggml_type_name(ggml_type(choice->kernels->products[i].type)));
        }
    }
    return all;
}

void use(const std::string & name) {
    if (!name.empty() && !runs_here(name)) {
        throw InputError("this CPU cannot run the kernels '" + name + "'");
    }
    current.store(name.empty() ? nullptr : find(name)->kernels);
}

std::string in_use() {
    const Kernels * kernels = current.load();
    return kernels ? kernels->name : "";
}

uint64_t computed() {
    return n_computed.load();
}

}  // namespace pyps::kernels
