#include "rows.h"

#include "errors.h"

#include <cstring>

namespace pyps {

namespace {

// to [n_cols, n_rows] <- from [n_rows, n_cols], elements of `size` bytes (2 or 4: quantised V is never transposed)
void transpose(uint8_t * to, const uint8_t * from, size_t n_rows, size_t n_cols, size_t size) {
    for (size_t i = 0; i < n_rows; ++i) {
        for (size_t j = 0; j < n_cols; ++j) {
            std::memcpy(to + (j * n_rows + i) * size, from + (i * n_cols + j) * size, size);
        }
    }
}

Rows make_rows(size_t n, size_t size) {
    Rows rows;
    rows.n    = n;
    rows.size = size;
    rows.data.reset(new uint8_t[n * size]);
    return rows;
}

// Returns K and V of the cells, in the order of the list.
LayerRows read_rows(const Layer & l, const std::vector<Cell> & cells) {
    LayerRows            rows = { make_rows(cells.size(), l.k_row_size()), make_rows(cells.size(), l.v_row_size()) };
    const size_t         size = ggml_type_size(l.v->type);
    std::vector<uint8_t> channels;  // [n_embd_v, run.n]
    for (const Run & run : runs(cells)) {
        const Cell & first = cells[run.first];
        uint8_t *    k     = rows.k.data.get() + run.first * rows.k.size;
        uint8_t *    v     = rows.v.data.get() + run.first * rows.v.size;
        ggml_backend_tensor_get(l.k, k, l.k_offset(first), run.n * rows.k.size);
        if (!l.v_transposed) {
            ggml_backend_tensor_get(l.v, v, l.v_offset(first), run.n * rows.v.size);
            continue;
        }
        channels.resize(run.n * rows.v.size);
        for (int64_t j = 0; j < l.n_embd_v; ++j) {
            ggml_backend_tensor_get(l.v, &channels[j * run.n * size], l.v_offset(first, j), run.n * size);
        }
        transpose(v, channels.data(), l.n_embd_v, run.n, size);
    }
    return rows;
}

// Writes K and V of the cells, in the order of the list.
void write_rows(const Layer & l, const std::vector<Cell> & cells, const ConstLayerRows & rows) {
    const size_t         size = ggml_type_size(l.v->type);
    std::vector<uint8_t> channels;  // [n_embd_v, run.n]
    for (const Run & run : runs(cells)) {
        const Cell &    first = cells[run.first];
        const uint8_t * k     = rows.k.data + run.first * rows.k.size;
        const uint8_t * v     = rows.v.data + run.first * rows.v.size;
        ggml_backend_tensor_set(l.k, k, l.k_offset(first), run.n * rows.k.size);
        if (!l.v_transposed) {
            ggml_backend_tensor_set(l.v, v, l.v_offset(first), run.n * rows.v.size);
            continue;
        }
        channels.resize(run.n * rows.v.size);
        transpose(channels.data(), v, run.n, l.n_embd_v, size);
        for (int64_t j = 0; j < l.n_embd_v; ++j) {
            ggml_backend_tensor_set(l.v, &channels[j * run.n * size], l.v_offset(first, j), run.n * size);
        }
    }
}

void check_shape(const Layer & l, size_t n, const ConstLayerRows & rows) {
    if (rows.k.n != n || rows.v.n != n || rows.k.size != l.k_row_size() || rows.v.size != l.v_row_size()) {
        throw InputError("K and V of layer " + std::to_string(l.number) + " must be " + std::to_string(n) +
                         " rows of " + std::to_string(l.k_row_size()) + " and of " + std::to_string(l.v_row_size()) +
                         " bytes");
    }
}

std::vector<llama_pos> positions_of(const std::vector<Cell> & cells) {
    std::vector<llama_pos> positions;
    for (const Cell & c : cells) {
        positions.push_back(c.entry.pos);
    }
    return positions;
}

// The memory of a context that has this sequence and is done with what llama.cpp has queued.
Memory settled(llama_context * ctx, llama_seq_id seq) {
    Memory memory(ctx);
    memory.check_seq(seq);
    memory.settle();
    return memory;
}

}  // namespace

LayerCells read(llama_context * ctx, llama_seq_id seq, size_t layer) {
    const Memory memory = settled(ctx, seq);
    for (const Cache & cache : memory.caches()) {
        for (const Layer & l : cache.layers()) {
            if (l.number != layer) {
                continue;
            }
            const auto cells = cache.all_cells(seq);
            LayerCells contents;
            contents.positions = positions_of(cells);
            for (const Cell & c : cells) {
                contents.cells.push_back(cache.row(c));
            }
            contents.rows = read_rows(l, cells);
            return contents;
        }
    }
    throw InputError("there is no layer " + std::to_string(layer));
}

SpanRows read_span(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1) {
    const Memory memory = settled(ctx, seq);
    SpanRows     span;
    span.layers.resize(memory.n_layers());
    for (const Cache & cache : memory.caches()) {
        const auto cells = cache.cells(seq, p0, p1);
        span.positions   = positions_of(cells);
        for (const Layer & l : cache.layers()) {
            span.layers.at(l.number) = read_rows(l, cells);
        }
    }
    return span;
}

void write_span(llama_context *                     ctx,
                llama_seq_id                        seq,
                const std::vector<llama_pos> &      positions,
                const std::vector<ConstLayerRows> & layers) {
    Memory memory = settled(ctx, seq);
    if (layers.size() != memory.n_layers()) {
        throw InputError("there are K and V of " + std::to_string(layers.size()) + " layers; this model has " +
                         std::to_string(memory.n_layers()));
    }
    std::vector<Entry> entries;
    for (const llama_pos pos : positions) {
        if (pos < 0) {
            throw InputError("a cell cannot be at position " + std::to_string(pos));
        }
        entries.push_back({ pos, LLAMA_TOKEN_NULL });
    }
    std::vector<Reservation> reservations;
    for (const Cache & cache : memory.caches()) {
        for (const Layer & l : cache.layers()) {
            check_shape(l, entries.size(), layers[l.number]);
        }
        reservations.push_back(cache.reserve(seq, entries));
    }
    for (size_t c = 0; c < reservations.size(); ++c) {
        Cache & cache = memory.caches()[c];
        for (const Layer & l : cache.layers()) {
            write_rows(l, reservations[c].cells, layers[l.number]);
        }
        cache.commit(reservations[c]);
    }
}

}  // namespace pyps
