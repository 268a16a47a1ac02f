// What the entry points share: instruction sets, threads and memory.
#pragma once
#include <stdlib.h>

#include "api.h"
#include "kernels.h"

namespace ar {

// The kernels of an instruction set, null where this processor lacks it.
const Kernels* kernels(int64_t isa);

namespace {

constexpr int64_t kWorthAThread = 1 << 15;  // multiplications; a thread takes 2 to 5 us to wake

template <class Fn>
void call(int64_t begin, int64_t end, void* context) {
  (*static_cast<Fn*>(context))(begin, end);
}

template <class Fn>
void parallel(const ar_runtime* rt, int64_t n, int64_t grain, Fn&& fn) {
  if (n <= 0) return;
  if (rt->parallel == nullptr || n <= grain) return fn(int64_t(0), n);
  rt->parallel(0, n, grain, call<Fn>, &fn);
}

int width_of(int64_t dtype) { return dtype == kF32 ? 4 : 2; }

// Memory that goes away with its scope; on the stack where it is small.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(memory_); }
  void* get(int64_t bytes) {
    memory_ = aligned_alloc(64, size_t(ceil_div(bytes, 64) * 64));
    return memory_;
  }

 private:
  void* memory_ = nullptr;
};

}  // namespace
}  // namespace ar
