// Codes fetched before they are multiplied by a row or a few.
//
// A core that multiplies looks less far ahead than one that only reads, so lines are asked for by
// hand, between the products: a block's lines at once fill the queue of misses. And they are asked for
// twice: far ahead into the second-level cache, as lines on their way to the first would take all its
// places, and from there shortly before (docs/log.md has what each distance gives).
#pragma once
#include "common.h"

namespace ar {
namespace {

constexpr int kFar = 24576, kNear = 12288;  // bytes
constexpr int kFarOfFloats = 10240, kNearOfFloats = 4096;  // where lines need little decoding

// The line to ask for at one of so many steps, or -1.
constexpr int line_at(int lines, int steps, int step) {
  const int line = step * lines / steps;
  return line != (step + 1) * lines / steps ? line : -1;
}

// in assembly: compilers move their own prefetches to the front of what is unrolled
template <int FAR, int NEAR>
AR_INLINE void fetch_line(const void* at) {
  const char* line = static_cast<const char*>(at);
  asm volatile("prefetcht1 %0" ::"m"(line[FAR]));
  asm volatile("prefetcht0 %0" ::"m"(line[NEAR]));
}

AR_INLINE void fetch_floats(const void* at) { fetch_line<kFarOfFloats, kNearOfFloats>(at); }

// Asks for one of so many lines at one of so many steps, where it is due.
template <int LINES, int STEPS, int STEP>
AR_INLINE void fetch_one(const uint8_t* codes) {
  constexpr int line = line_at(LINES, STEPS, STEP);
  if constexpr (line >= 0) fetch_line<kFar, kNear>(codes + 64 * line);
}

template <int BITS, int STEPS, int STEP>
AR_INLINE void fetch(const uint8_t* codes) {
  fetch_one<4 * BITS, STEPS, STEP>(codes);
}

}  // namespace
}  // namespace ar
