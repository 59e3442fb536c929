#include "rows.h"

#include <cstring>

namespace pyps {

namespace {

// Cells that lie side by side: [from, from + n) of the list, from cell `index` of `stream` on.
struct Run {
    size_t   from, n;
    uint32_t stream, index;
};

template <typename At> std::vector<Run> runs(size_t n, At at) {
    std::vector<Run> found;
    for (size_t i = 0; i < n; ++i) {
        const auto [stream, index] = at(i);
        if (!found.empty() && found.back().stream == stream && found.back().index + found.back().n == index) {
            found.back().n++;
        } else {
            found.push_back({ i, 1, stream, index });
        }
    }
    return found;
}

// to [n_cols, n_rows] <- from [n_rows, n_cols], elements of `size` bytes (2 or 4: quantised V is never transposed)
void transpose(uint8_t * to, const uint8_t * from, size_t n_rows, size_t n_cols, size_t size) {
    for (size_t i = 0; i < n_rows; ++i) {
        for (size_t j = 0; j < n_cols; ++j) {
            std::memcpy(to + (j * n_rows + i) * size, from + (i * n_cols + j) * size, size);
        }
    }
}

// Where channel j of a run begins in a transposed V.
size_t channel(const Cache & cache, const Layer & l, const Run & run, int64_t j) {
    return run.stream * l.v->nb[2] + (j * cache.n_cells() + run.index) * ggml_type_size(l.v->type);
}

}  // namespace

size_t k_row_size(const Layer & l) {
    return l.k->nb[1];
}

size_t v_row_size(const Layer & l) {
    return ggml_row_size(l.v->type, l.n_embd_v);
}

void read_rows(const Cache & cache, const Layer & l, const std::vector<Cell> & cells, uint8_t * k, uint8_t * v) {
    const size_t         k_row = k_row_size(l), v_row = v_row_size(l), size = ggml_type_size(l.v->type);
    std::vector<uint8_t> channels;
    for (const Run & run : runs(cells.size(), [&](size_t i) { return std::pair(cells[i].stream, cells[i].index); })) {
        ggml_backend_tensor_get(l.k, k + run.from * k_row, run.stream * l.k->nb[2] + run.index * k_row, run.n * k_row);
        if (!cache.v_transposed()) {
            ggml_backend_tensor_get(l.v, v + run.from * v_row, run.stream * l.v->nb[2] + run.index * v_row,
                                    run.n * v_row);
            continue;
        }
        channels.resize(run.n * v_row);
        for (int64_t j = 0; j < l.n_embd_v; ++j) {
            ggml_backend_tensor_get(l.v, &channels[j * run.n * size], channel(cache, l, run, j), run.n * size);
        }
        transpose(v + run.from * v_row, channels.data(), l.n_embd_v, run.n, size);
    }
}

void write_rows(const Cache & cache, const Layer & l, const Reservation & r, const uint8_t * k, const uint8_t * v) {
    const size_t         k_row = k_row_size(l), v_row = v_row_size(l), size = ggml_type_size(l.v->type);
    std::vector<uint8_t> channels;
    for (const Run & run : runs(r.index.size(), [&](size_t i) { return std::pair(r.stream, r.index[i]); })) {
        ggml_backend_tensor_set(l.k, k + run.from * k_row, run.stream * l.k->nb[2] + run.index * k_row, run.n * k_row);
        if (!cache.v_transposed()) {
            ggml_backend_tensor_set(l.v, v + run.from * v_row, run.stream * l.v->nb[2] + run.index * v_row,
                                    run.n * v_row);
            continue;
        }
        channels.resize(run.n * v_row);
        transpose(channels.data(), v + run.from * v_row, run.n, l.n_embd_v, size);
        for (int64_t j = 0; j < l.n_embd_v; ++j) {
            ggml_backend_tensor_set(l.v, &channels[j * run.n * size], channel(cache, l, run, j), run.n * size);
        }
    }
}

}  // namespace pyps
