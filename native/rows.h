// K and V of cells as rows of bytes, one row for each cell, out of a cache and into it: branches on disk consist of
// them. Rows are as the cache stores them, quantised types included, but V is never transposed.
#pragma once

#include "llama_cache.h"

#include <memory>
#include <vector>

namespace pyps {

// Bytes [n, size], one row for each of n cells.
struct Rows {
    size_t                     n    = 0;
    size_t                     size = 0;
    std::unique_ptr<uint8_t[]> data;
};

// Bytes [n, size] in memory of the caller, which are only read.
struct ConstRows {
    size_t          n;
    size_t          size;
    const uint8_t * data;
};

struct LayerRows {
    Rows k;
    Rows v;
};

struct ConstLayerRows {
    ConstRows k;
    ConstRows v;
};

// A sequence in one layer, ordered by position.
struct LayerCells {
    std::vector<llama_pos> positions;  // [n]
    std::vector<int64_t>   cells;      // [n], Cache::row of each
    LayerRows              rows;
};

// Positions [p0, p1) of a sequence in all layers, ordered by position.
struct SpanRows {
    std::vector<llama_pos> positions;  // [n]
    std::vector<LayerRows> layers;     // [n_layers]
};

// Both throw InputError for a sequence, range or layer that does not exist, and RefusedError as Memory does.
LayerCells read(llama_context * ctx, llama_seq_id seq, size_t layer);
SpanRows   read_span(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1);

// Gives a sequence new cells at these positions [n], with these contents [n_layers]: all of them or none. Throws
// InputError if the contents do not fit the model or the context has no room.
void write_span(llama_context *                     ctx,
                llama_seq_id                        seq,
                const std::vector<llama_pos> &      positions,
                const std::vector<ConstLayerRows> & layers);

}  // namespace pyps
