#include "llama_model.h"

// llama.cpp's internal headers, of the version that CMakeLists.txt finds
#include "llama-model.h"

#include <map>

namespace pyps {

namespace {

// Only attention caches whose keys carry their position as a rotation can be joined. Whether llama_hparams tells the
// truth about that rotation cannot be seen here (for layers without positions it does not): pyps/engine/positions.py
// tries it.
std::string why_not(const llama_model & model) {
    const auto & hp = model.hparams;
    if (llm_arch_is_recurrent(model.arch)) {
        return "it keeps a recurrent state, which cannot be split into spans";
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return "part of its memory is a recurrent state, which cannot be split into spans";
    }
    if (hp.is_mla()) {
        return "it uses multi-head latent attention (MLA), whose V is part of K";
    }
    if (hp.rope_type == LLAMA_ROPE_TYPE_MROPE || hp.rope_type == LLAMA_ROPE_TYPE_IMROPE || hp.n_pos_per_embd() > 1) {
        return "it uses multi-dimensional positions (M-RoPE)";
    }
    if (hp.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return "its positions are not rotary (RoPE), so keys cannot be moved";
    }
    if (hp.swa_type != LLAMA_SWA_TYPE_NONE && hp.swa_type != LLAMA_SWA_TYPE_STANDARD) {
        return "its attention is cut into chunks by absolute position, so keys that have moved would be seen by others";
    }
    return "";
}

}  // namespace

std::string why_not_joinable(const llama_model * model) {
    const std::string reason = why_not(*model);
    return reason.empty() ? "" : refusal(model, reason);
}

std::string refusal(const llama_model * model, const std::string & reason) {
    return "caches of '" + model->arch_name() + "' models cannot be joined: " + reason;
}

std::string norms(const llama_model * model) {
    static const std::string             suffix = "norm.weight";
    std::map<std::string, ggml_tensor *> weights;  // in the order of the names
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0) {
            weights[name] = tensor;
        }
    }
    std::string bytes;
    for (const auto & [name, tensor] : weights) {
        const size_t at = bytes.size();
        bytes.resize(at + ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, &bytes[at], 0, ggml_nbytes(tensor));
    }
    return bytes;
}

Work work(const llama_model * model) {
    const auto & hp = model->hparams;
    Work         sum;
    const auto   add = [&](const ggml_tensor * t, double share, double & elements) {
        elements += share * ggml_nelements(t);
        sum.bytes += share * ggml_nbytes(t);
    };
    for (const auto & [name, tensor] : model->tensors_by_name) {
        if (name.rfind("blk.", 0) == 0 && tensor->ne[1] > 1) {
            // The experts of a mixture are one tensor, [columns, rows, experts], and a token uses some of them.
            const bool   experts = tensor->ne[2] > 1 && hp.n_expert > 0;
            const double used    = experts ? hp.n_expert_used(std::stoul(name.substr(4))) : 1;
            add(tensor, experts ? used / hp.n_expert : 1, sum.layers);
        }
    }
    if (const ggml_tensor * output = model->output ? model->output : model->tok_embd) {
        add(output, 1, sum.logits);
    }
    return sum;
}

bool is_causal(const llama_model * model) {
    return model->hparams.causal_attn;
}

uint32_t long_context(const llama_model * model) {
    return !model->layers.empty() && model->layers[0].rope_long ? model->hparams.n_ctx_orig_yarn : 0;
}

}  // namespace pyps
