// K and V of cells as rows of bytes, one row a cell, out of a cache and into it: what branches on disk are made of.
#pragma once

#include "cache.h"

namespace pyps {

// Bytes of a cell's K and V in this layer. Quantised types included: rows are as the cache stores them.
size_t k_row_size(const Layer & l);
size_t v_row_size(const Layer & l);

// Copies the cells' rows to k [cells.size(), k_row_size] and v [cells.size(), v_row_size], V never transposed.
void read_rows(const Cache & cache, const Layer & l, const std::vector<Cell> & cells, uint8_t * k, uint8_t * v);

// The way back, into the cells of a reservation, in the order of its entries.
void write_rows(const Cache & cache, const Layer & l, const Reservation & r, const uint8_t * k, const uint8_t * v);

}  // namespace pyps
