// Compact weights in plain C++.
#pragma once
#include "v1.h"

#include "compact_product.h"

namespace ar {
namespace {

struct CompactPlain {
  using V = V1;
  struct Exponents { uint32_t base; };

  template <int ROWS>
  struct Sums {
    float of[ROWS];
    void clear() { memset(of, 0, sizeof of); }
    float total(int m) const { return of[m]; }
  };

  static Exponents exponents(uint8_t base) { return Exponents{base}; }

  template <int ROWS>
  static void add(const uint8_t* block, Exponents e, const CompactJob& job, int64_t k,
                  Sums<ROWS>& sums) {
    const float* x = static_cast<const float*>(job.ready) + k;
    const int64_t depth = job.blocks * kCompactColumns;
    for (int column = 0; column < kCompactColumns; ++column) {
      const int half = column / 64, at = compact_place(column % 64);
      const uint32_t code = block[128 + at] >> (4 * half) & 15, rest = block[64 * half + at];
      const uint32_t exponent = code ? (e.base + code) & 0xff : 0;
      const float w = float_of((rest & 0x80) << 24 | exponent << 23 | (rest & 0x7f) << 16);
      const int parted = column / 32 * 32 + column % 2 * 16 + column % 32 / 2;
      for (int m = 0; m < ROWS; ++m) sums.of[m] += w * x[m * depth + parted];
    }
  }
};

}  // namespace
}  // namespace ar
