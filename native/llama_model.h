// What a join and its user need to know of a llama.cpp model.
//
// The llama_* files are the only ones that include llama.cpp's internal headers. Those headers change with every
// release: when the pinned llama-cpp-python moves, the interfaces in llama_*.h stay, and llama_*.cpp have to follow.
#pragma once

#include "llama.h"

#include <cstdint>
#include <string>

namespace pyps {

// Empty, or why the caches of this model cannot be joined. It needs no context.
std::string why_not_joinable(const llama_model * model);

// The sentence that says that this model's caches cannot be joined for this reason.
std::string refusal(const llama_model * model, const std::string & reason);

// The values of all weights whose name ends with "norm.weight", in the order of the names: they are the same in every
// quantisation of a model, and differ between models.
std::string norms(const llama_model * model);

// Elements of the matrices that one token is multiplied with, in all layers and for its logits, and bytes of both.
struct Work {
    double layers = 0;
    double logits = 0;
    double bytes  = 0;
};

Work work(const llama_model * model);

// False for models that read in both directions: embeddings, diffusion.
bool is_causal(const llama_model * model);

// With LongRoPE, a context with more cells for each sequence than this turns keys by other frequency factors than a
// smaller one does. 0 if the model has one set of factors, or none.
uint32_t long_context(const llama_model * model);

}  // namespace pyps
