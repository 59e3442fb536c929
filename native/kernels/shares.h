// How the threads of a node share its memory and its work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pyps::kernels {

constexpr size_t kLine = 64;  // bytes of a cache line

inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Hands out pieces of memory, each on lines of its own. With no memory it tells how much is needed.
class Scratch {
  public:
    explicit Scratch(void * memory) : begin_((uintptr_t) memory), at_(align(begin_)) {}

    template <typename T> T * take(int64_t n) {
        T * piece = (T *) at_;
        at_       = align(at_ + n * sizeof(T));
        return piece;
    }

    // Bytes, wherever the memory begins.
    size_t used() const { return at_ - begin_ + kLine; }

  private:
    static uintptr_t align(uintptr_t p) { return (p + kLine - 1) / kLine * kLine; }

    uintptr_t begin_, at_;
};

// The n shares of a node's work. Every thread has a range of its own, since what lies side by side in memory is fetched
// ahead; whoever is done with that helps the others.
class Shares {
  public:
    Shares(Scratch & scratch, int64_t n, int n_threads) :
        n_(n),
        n_threads_(n_threads),
        next_(scratch.take<Next>(n_threads)) {}

    // The first share of a thread's own range.
    int64_t first(int thread) const { return n_ * thread / n_threads_; }

    // Every thread calls this before the barrier.
    void open(int thread) { next_[thread].share.store(first(thread), std::memory_order_relaxed); }

    // Calls work(begin, end) for up to `together` shares, until all are taken.
    template <typename Work> void work(int thread, int64_t together, Work && work) {
        for (int i = 0; i < n_threads_; ++i) {
            const int     whose = (thread + i) % n_threads_;
            const int64_t end   = first(whose + 1);
            for (;;) {
                const int64_t begin = next_[whose].share.fetch_add(together, std::memory_order_relaxed);
                if (begin >= end) {
                    break;
                }
                work(begin, std::min(begin + together, end));
            }
        }
    }

  private:
    struct alignas(kLine) Next {
        std::atomic<int64_t> share;
    };

    int64_t n_;
    int     n_threads_;
    Next *  next_;
};

}  // namespace pyps::kernels
