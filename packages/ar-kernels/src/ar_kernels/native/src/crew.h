// Work in shifts, done by as many threads as come.
//
// Waking threads costs microseconds, and a decoding step has a dozen parts that wait for each
// other, so one set of threads goes through all of them. Each thread has a share of every shift,
// takes pieces of its own first and then of others' shares. A thread waits only for pieces that a
// running thread has taken: whoever comes, late or never, nobody waits for him.
//
// Ranges are for what is no shift: threads come with a range each, and help each other to the end.
#pragma once
#include <sched.h>

#include <atomic>

#include "runtime.h"

namespace ar {
namespace {

struct Shift {
  int64_t units, grain;  // pieces of `grain` units; units of one piece or less stay together
  int64_t before;        // units of all shifts before
};

// What is left of one thread's share of one shift: [begin, end) in the halves of a word.
struct alignas(64) Share {
  std::atomic<uint64_t> range;

  void hold(int64_t begin, int64_t end) {
    range.store(uint64_t(begin) << 32 | uint64_t(end), std::memory_order_relaxed);
  }

  // Takes a piece from the front of what is left, or from its back.
  bool take(int64_t grain, bool front, int64_t* begin, int64_t* end) {
    uint64_t seen = range.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = int64_t(seen >> 32), last = int64_t(seen & 0xffffffff);
      if (first >= last) return false;
      const int64_t n = last - first < grain ? last - first : grain;
      const uint64_t left = front ? uint64_t(first + n) << 32 | uint64_t(last)
                                  : uint64_t(first) << 32 | uint64_t(last - n);
      if (!range.compare_exchange_weak(seen, left, std::memory_order_relaxed)) continue;
      *begin = front ? first : last - n;
      *end = *begin + n;
      return true;
    }
  }
};

class Crew {
 public:
  // `shares` has room for shifts x workers.
  Crew(const Shift* shifts, int64_t count, int64_t workers, Share* shares)
      : shifts_(shifts), count_(count), workers_(workers), shares_(shares) {
    for (int64_t s = 0; s < count; ++s)
      for (int64_t w = 0; w < workers; ++w)
        share(s, w).hold(shifts[s].units * w / workers, shifts[s].units * (w + 1) / workers);
  }

  // Calls fn(shift, begin, end) until every piece is taken; from each thread once.
  template <class Fn>
  void work(Fn&& fn) {
    const int64_t me = arrived_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t s = 0; s < count_; ++s) {
      wait(shifts_[s].before);
      for (int64_t i = 0; i < workers_; ++i) {
        Share& from = share(s, (me + i) % workers_);
        int64_t begin, end;
        while (from.take(shifts_[s].grain, i == 0, &begin, &end)) {
          fn(s, begin, end);
          done_.fetch_add(end - begin, std::memory_order_release);
        }
      }
    }
  }

 private:
  Share& share(int64_t shift, int64_t worker) { return shares_[shift * workers_ + worker]; }

  void wait(int64_t units) const {
    for (int64_t i = 0; done_.load(std::memory_order_acquire) < units; ++i) {
      if (i < kSpins) rest();
      else sched_yield();
    }
  }

  static void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int64_t kSpins = 1 << 12;  // then others may have our place

  const Shift* shifts_;
  int64_t count_, workers_;
  Share* shares_;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
};

class Ranges {
 public:
  // Calls fn(unit) for every unit of a thread's range, then for what is left of those of others. That
  // of a thread that comes late is not touched before it comes.
  template <class Fn>
  void work(int64_t begin, int64_t end, Fn&& fn) {
    const int64_t me = arrived_.fetch_add(1, std::memory_order_relaxed);
    if (me >= kShared) {
      for (int64_t unit = begin; unit < end; ++unit) fn(unit);
      return;
    }
    shares_[me].hold(begin, end);
    drain(shares_[me], true, fn);
    const int64_t all = arrived_.load(std::memory_order_relaxed);
    for (int64_t i = 0; i < all && i < kShared; ++i) drain(shares_[i], false, fn);
  }

 private:
  template <class Fn>
  static void drain(Share& from, bool front, Fn&& fn) {
    int64_t begin, end;
    while (from.take(1, front, &begin, &end)) fn(begin);
  }

  static constexpr int64_t kShared = 64;  // ranges; those of more threads are not shared

  Share shares_[kShared] = {};
  std::atomic<int64_t> arrived_{0};
};

}  // namespace
}  // namespace ar
