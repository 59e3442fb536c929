// Memory that will be read next, fetched line by line between computations. All lines at once would fill the buffers in
// which a core waits for memory, and hold up everything else; the hardware alone does not foresee where a matrix's next
// rows or the cells' next heads begin.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace pyps::kernels {
namespace {

class Ahead {
  public:
    // The part-th of n parts of some memory.
    Ahead(const char * begin, size_t size, size_t part, size_t n) :
        at_(begin + size * part / n),
        end_(begin + size * (part + 1) / n) {}

    void fetch_line() {
        if (at_ < end_) {
            _mm_prefetch(at_, _MM_HINT_T0);
            at_ += 64;
        }
    }

    void fetch_rest() {
        while (at_ < end_) {
            fetch_line();
        }
    }

  private:
    const char *at_, *end_;
};

}  // namespace
}  // namespace pyps::kernels
