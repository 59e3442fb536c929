// MUL_MAT nodes of ggml, computed by ours.
#pragma once

#include "kernels.h"

struct ggml_compute_params;
struct ggml_tensor;

namespace pyps::kernels {

// Whether these kernels can compute the node, and are faster.
bool can_multiply(const Kernels & kernels, const ggml_tensor * op);

// Whether ggml has repacked these weights on loading.
bool is_repacked(const ggml_tensor * weights);

// Bytes of scratch memory that the node needs with up to n_threads.
size_t multiply_scratch(const Kernels & kernels, const ggml_tensor * op, int n_threads);

// One thread's part of the node.
void multiply(const Kernels & kernels, const ggml_compute_params * params, ggml_tensor * op);

}  // namespace pyps::kernels
