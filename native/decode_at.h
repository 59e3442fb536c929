// Reading again: tokens computed at any positions of a sequence, which llama_decode takes only at its end.
#pragma once

#include "llama_cache.h"

#include <vector>

namespace pyps {

// Computes tokens at their positions in sequence seq, in the order of their positions: each attends to every cell of the
// sequence that is not behind it, be it joined, decoded or computed by this call. No logits are computed, and those of
// the last llama_decode stay. All or nothing: on any exception the sequence is as it was.
//
// Throws InputError (a token or position that cannot be, no room), RefusedError (as a join) and EngineError (the
// computation failed or was aborted).
void decode_at(llama_context * ctx, llama_seq_id seq, std::vector<Entry> entries);

}  // namespace pyps
