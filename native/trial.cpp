// A program of its own that does with a model file what pyps is about to do: llama.cpp aborts the process on some
// damaged files, and here it may. Exit code 0 means that a token can be computed, or that llama.cpp refuses the file
// properly.
#include "llama.h"

#include <algorithm>
#include <thread>

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    llama_backend_init();
    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers       = 0;      // a trial must not take the GPU's memory
    mp.use_extra_bufts    = false;  // they are copies of the weights, repacked for this CPU
    llama_model * model   = llama_model_load_from_file(argv[1], mp);
    if (!model) {
        return 0;
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx                = 256;
    cp.n_threads            = std::max(1u, std::thread::hardware_concurrency() / 2);
    llama_context * ctx     = llama_init_from_model(model, cp);
    // Encoders need more than a token, and pyps does not run them.
    if (ctx && llama_get_memory(ctx) && !llama_model_has_encoder(model)) {
        llama_token token = 0;
        llama_decode(ctx, llama_batch_get_one(&token, 1));
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
