// A program of its own that does with a model file what pyps is about to do: llama.cpp aborts the process on some damaged
// files, and here it may. Exit code 0: the file can be loaded, or llama.cpp refuses it properly. Reads no weights.
#include "llama.h"

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }
    llama_backend_init();
    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers       = 0;
    mp.use_extra_bufts    = false;  // repacking for this CPU would read all weights
    llama_model * model   = llama_model_load_from_file(argv[1], mp);
    if (!model) {
        return 0;
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx                = 256;
    llama_free(llama_init_from_model(model, cp));  // builds the graph, computes nothing
    llama_model_free(model);
    return 0;
}
