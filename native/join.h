// The join: spans of several sequences, re-encoded, mapped and placed side by side in one sequence.
#pragma once

#include "plan.h"

#include <optional>
#include <vector>

namespace pyps {

// Places the spans in sequence dst_seq of dst, in the order of the list; src and dst are contexts of one model, or the
// same context. All or nothing: on any exception dst is as it was. Returns the number of cells placed.
//
// rotates:      [n_layers], whether the keys of a layer carry their position (SmolLM3's every fourth layer's do not).
// coefficients: [n_spans, n_layers], or none for the identity.
// correction:   [n_layers], what every channel of K and V goes through before that, or none.
// together:     all spans and layers in one graph of few large steps, as is best where starting a step is dear (a GPU),
//               or a graph for each layer with steps for each span; unset for what suits the place where dst lies.
//
// Throws InputError (the request cannot be fulfilled), RefusedError (the model's cache cannot be joined) and
// EngineError (the computation failed or was aborted).
uint32_t join(llama_context *           src,
              llama_context *           dst,
              const std::vector<Span> & spans,
              llama_seq_id              dst_seq,
              const std::vector<bool> & rotates,
              const Coefficients &      coefficients,
              const Correction &        correction,
              std::optional<bool>       together);

}  // namespace pyps
