// Loops that the threads of a step share, one after another. A thread never waits for another one that has taken no part
// of a loop: where others use the machine's cores, too, whoever runs goes on alone, and who comes back skips what is done.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace shoplm {

struct alignas(64) Loop { std::atomic<int64_t> taken{0}, done{0}; };

// One thread's view. All threads have the same loops in the same order, and nothing but loops writes what others read.
class Crew {
  public:
    Crew(Loop* loops, int64_t threads) : loop_(loops), threads_(threads) {}

    // body(i) for each i < count, by parts of `part`, on whichever threads; returns when all is done.
    template <class Body>
    void each(int64_t count, int64_t part, const Body& body) {
        Loop& loop = *loop_++;
        while (loop.taken.load(std::memory_order_relaxed) < count) {
            const int64_t begin = loop.taken.fetch_add(part, std::memory_order_relaxed), end = std::min(begin + part, count);
            if (begin >= count) break;
            for (int64_t i = begin; i < end; ++i) body(i);
            loop.done.fetch_add(end - begin, std::memory_order_release);
        }
        for (int64_t waits = 0; loop.done.load(std::memory_order_acquire) < count; ++waits)
            if (waits < MOST_SPINS) _mm_pause();
            else sched_yield();
    }
    // As `each`, by parts that share the loop evenly: for bodies that take equally long.
    template <class Body>
    void divide(int64_t count, const Body& body) { each(count, std::max<int64_t>(1, (count + threads_ - 1) / threads_), body); }

    int64_t threads() const { return threads_; }

  private:
    static constexpr int64_t MOST_SPINS = 2000;  // some tens of microseconds, as a thread's part takes at most

    Loop* loop_;
    int64_t threads_;
};

// What a step's loops need; used again by the next step.
class Loops {
  public:
    Loop* take(int64_t count) {
        if (count > size_) loops_ = std::make_unique<Loop[]>(size_ = count);
        for (int64_t i = 0; i < count; ++i) {
            loops_[i].taken.store(0, std::memory_order_relaxed);
            loops_[i].done.store(0, std::memory_order_relaxed);
        }
        return loops_.get();
    }

  private:
    std::unique_ptr<Loop[]> loops_;
    int64_t size_ = 0;
};

}  // namespace shoplm
