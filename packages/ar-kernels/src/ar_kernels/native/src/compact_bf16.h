// Products with compact weights by pairs (AVX512-BF16): to the bit those of dots_bf16.h, but for
// outliers and the last columns of a row.
#pragma once
#include "compact_avx512.h"

namespace ar {
namespace {

struct CompactPairs : CompactFloats<Bytes512> {
  using W = Bytes512;

  template <int ROWS>
  static AR_INLINE void add(const uint8_t* block, const Exponents& e, const CompactJob& job,
                            int64_t k, Sums<ROWS>& sums) {
    const uint16_t* x = static_cast<const uint16_t*>(job.ready) + k;
    const int64_t depth = job.blocks * kCompactColumns;
    const __m512i codes = W::load(block + 128);
    const auto one = [&](int run, __m512i w) AR_FORCED {
      for (int m = 0; m < ROWS; ++m) {
        const auto seen = __m512bh(_mm512_loadu_si512(x + m * depth + 32 * run));
        sums.acc[run][m] = _mm512_dpbf16_ps(sums.acc[run][m], __m512bh(w), seen);
      }
    };
    fetch_floats(block + 128);
    unrolled<0, 2>([&](auto half) AR_FORCED {
      constexpr int H = decltype(half)::value;
      fetch_floats(block + 64 * H);
      const __m512i rest = W::load(block + 64 * H), code = W::four<H>(codes);
      const __m512i high = W::with(W::look_up(e.high, code), rest, 0x80);
      const __m512i low = W::with(W::look_up(e.low, code), rest, 0x7f);
      one(2 * H, W::first(low, high));
      one(2 * H + 1, W::second(low, high));
    });
  }
};

// Rows of x with zeros behind them.
void compact_padded(const CompactJob& job) {
  const int64_t depth = job.blocks * kCompactColumns;
  for (int64_t m = 0; m < job.rows; ++m) {
    uint16_t* out = static_cast<uint16_t*>(job.ready) + m * depth;
    memcpy(out, static_cast<const uint16_t*>(job.x) + m * job.x_stride, job.columns * 2);
    memset(out + job.columns, 0, (depth - job.columns) * 2);
  }
}

}  // namespace
}  // namespace ar
