// What an instruction set offers: avx2.cpp, avxvnni.cpp and avx512vnni.cpp each compile the same templates into a
// Kernels of their own, and the nodes (product_node.cpp, attention_node.cpp) call the one that was chosen.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyps::kernels {

constexpr int kBlock = 32;  // values that weights and columns quantise together

// The columns of a product, quantised: int8 with a scale a block, as ggml does it, except that the scale stays f32.
// The blocks of all columns lie side by side, since a product goes through all columns before it goes on to the next
// block of weights.
struct Columns {
    int8_t *  q;       // [blocks][n][kBlock]
    float *   scale;   // [blocks][n]
    float *   sum;     // [blocks][n], of the block's quantised values, times the scale: what a weight's minimum adds
    int32_t * offset;  // [blocks][groups][n], minus the sum of the q of a group times the offset of the weights
    int       n;
    int64_t   blocks;
};

// A matrix of weights: rows at equal distances.
struct Weights {
    const char * data;
    size_t       stride;  // bytes from row to row
    int64_t      rows;
};

// How one type of weights is multiplied.
struct Product {
    int  type;         // a ggml_type
    bool repacked;     // as ggml has repacked it: the blocks of 8 rows side by side
    int  min_columns;  // with fewer, ggml's own are as fast or faster
    int  offset;       // what has been added to every weight to make it unsigned
    int  groups;       // of a block of weights that have a scale each: 1 or 2
    // Multiplies the rows [begin, end) by all columns; out[c] is where column c of the result begins.
    void (*multiply)(const Weights & weights, const Columns & columns, int64_t begin, int64_t end, float * const * out);
};

constexpr int kMaxRows = 64;  // rows of queries, of one head of K and V, that are computed together
constexpr int kCells   = 32;  // cells that are read at once

// Attention of some tokens over the cells [begin, end) of a stream, with all heads. A head of K and V has
// n_tokens * group rows of queries: row t * group + g is that of token t and of head g of the group.
struct Attention {
    int n_tokens;
    int n_heads;  // of K and V
    int group;    // heads of queries that share one of K and V

    const char * q;     // f32 [dk]
    const char * k;     // [dk]
    const char * v;     // [dv]
    const char * mask;  // f16 [cells], added to the scores; null for none

    size_t q_token, q_head, k_cell, k_head, v_cell, v_head, mask_token, mask_head;  // bytes from one to the next

    int           k_type, v_type;  // ggml_types
    int           dk, dv;
    int64_t       begin, end;
    float         scale;
    float         cap;    // if not 0, a score is cap * tanh(score); the scale is divided by it already
    const float * slope;  // [n_heads * group], what the mask is multiplied by (ALiBi); null for 1
};

// What has been read of some cells, for one row of queries: enough to go on, or to be merged with other cells.
struct Partial {
    float   max;  // of the scores; -infinity if no cell was seen
    float   sum;  // of exp(score - max)
    float * v;    // [dv], the sum of exp(score - max) * v
};

// Floats that attend() needs beside its partials.
constexpr int64_t attention_scratch(int64_t dk, int64_t dv) {
    return kCells * (dk + dv + kMaxRows);
}

struct Kernels {
    const char *    name;
    int             panel;  // rows that are multiplied together: begin of multiply() is a multiple of it
    const Product * products;
    int             n_products;

    // Quantises the blocks [begin, end) of column c.
    void (*quantise)(const float *   x,
                     const Columns & columns,
                     int             c,
                     int64_t         begin,
                     int64_t         end,
                     const Product & product);
    // Reads the cells. partials: [n_heads][rows]; scratch: [attention_scratch(dk, dv)], aligned to 64 bytes.
    void (*attend)(const Attention & attention, Partial * partials, float * scratch);
    // Merges what has been read of n parts of the cells into the result [dv]; sink: a score without a value, or null.
    void (*merge)(const Partial * partials, int n, int dv, const float * sink, float * out);

    const Product * product(int type, bool repacked) const {
        for (int i = 0; i < n_products; ++i) {
            if (products[i].type == type && products[i].repacked == repacked) {
                return &products[i];
            }
        }
        return nullptr;
    }
};

}  // namespace pyps::kernels
