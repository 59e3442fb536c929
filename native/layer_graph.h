// The part of a ggml graph that moves one layer's K and V from cache to cache.
#pragma once

#include "plan.h"

namespace pyps {

class LayerGraph {
  public:
    // from and to: the same layer in the source and in the destination. correction: null for none. rotates: whether its
    // keys carry their position.
    LayerGraph(ggml_context *            ctx,
               ggml_cgraph *             gf,
               const Job &               job,
               const Layer &             from,
               const Layer &             to,
               const Coefficients &      coefficients,
               const CorrectionTensors * correction,
               bool                      rotates);

    void move_k(const Piece & p);
    void move_v(const Piece & p);

    // Upper bound of the nodes and leafs that one piece adds to the graph of a layer.
    static size_t max_nodes(const Piece & p);

  private:
    void          add(ggml_tensor * t);
    ggml_tensor * turned(ggml_tensor * k, ggml_tensor * shift);
    ggml_tensor * corrected(ggml_tensor * x, ggml_tensor * a, ggml_tensor * b);
    ggml_tensor * mapped(ggml_tensor * x, const Piece & p, float Affine::* a, float Affine::* b);
    ggml_tensor * mapped_v(ggml_tensor * v, const Piece & p);
    ggml_tensor * hadamard(ggml_tensor * x, ggml_tensor * matrix);
    ggml_tensor * all_rows(ggml_tensor * t);
    ggml_tensor * cells_of_v(const Layer & l, const Cell & first, uint32_t n);
    ggml_tensor * gather_transposed_v(const Piece & p);
    void          copy_v_runs(const Piece & p);
    void          store_v(const Piece & p, ggml_tensor * v);

    ggml_context *            ctx_;
    ggml_cgraph *             gf_;
    const Layer &             from_;
    const Layer &             to_;
    const Hadamards           src_hadamards_;
    const Hadamards           dst_hadamards_;
    const Coefficients &      coefficients_;
    const CorrectionTensors * correction_;
    const bool                rotates_;
};

}  // namespace pyps
