#include "decode_at.h"

#include "errors.h"

#include <algorithm>

namespace pyps {

void decode_at(llama_context * ctx, llama_seq_id seq, std::vector<Entry> entries) {
    Memory memory(ctx);
    memory.check_seq(seq);
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(memory.model()));
    for (const Entry & entry : entries) {
        if (entry.token < 0 || entry.token >= n_vocab) {
            throw InputError("token " + std::to_string(entry.token) + " does not exist: the vocabulary has " +
                             std::to_string(n_vocab));
        }
        if (entry.pos < 0) {
            throw InputError("a token cannot be at a negative position (" + std::to_string(entry.pos) + ")");
        }
    }
    if (entries.empty()) {
        return;
    }
    // A batch sees the batches before it, and not those after it.
    std::stable_sort(entries.begin(), entries.end(), [](const Entry & a, const Entry & b) { return a.pos < b.pos; });
    memory.settle();
    memory.decode(seq, entries);
}

}  // namespace pyps
