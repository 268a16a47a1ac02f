// Products of plain bf16 weights by pairs (AVX512-BF16): one operation for 64 bytes of weights, where
// widening them takes six.
#pragma once
#include "steps.h"
#include "v512.h"

namespace ar {
namespace {

struct DotsOfPairs {
  template <int TYPE, int ROWS>
  static AR_INLINE void add(const FloatJob& job, int64_t feature, int count, float (*sums)[16]) {
    if constexpr (TYPE != kBF16) {
      return Dots<V512>::add<TYPE, ROWS>(job, feature, count, sums);
    } else {
      constexpr int kSets = ROWS == 1 ? 4 : 2;  // sums that do not wait for each other
      const uint16_t* x = static_cast<const uint16_t*>(job.x);
      for (int i = 0; i < count; ++i) {
        const uint16_t* w = static_cast<const uint16_t*>(job.w) + (feature + i) * job.columns;
        __m512 acc[kSets][ROWS];
        for (auto& set : acc)
          for (auto& one : set) one = _mm512_setzero_ps();
        const auto add = [&](int set, int64_t k, __mmask32 some) AR_FORCED {
          const auto one = __m512bh(_mm512_maskz_loadu_epi16(some, w + k));
          for (int m = 0; m < ROWS; ++m) {
            const auto seen = _mm512_maskz_loadu_epi16(some, x + m * job.x_stride + k);
            acc[set][m] = _mm512_dpbf16_ps(acc[set][m], one, __m512bh(seen));
          }
        };
        int64_t k = 0;
        for (; k + 32 * kSets <= job.columns; k += 32 * kSets)
          for (int set = 0; set < kSets; ++set) {
            fetch_floats(w + k + 32 * set);
            add(set, k + 32 * set, __mmask32(-1));
          }
        for (; k < job.columns; k += 32) {
          const int64_t left = job.columns - k;
          add(0, k, left >= 32 ? __mmask32(-1) : __mmask32((1u << left) - 1));
        }
        for (int m = 0; m < ROWS; ++m) {
          for (int set = 1; set < kSets; ++set) acc[0][m] = _mm512_add_ps(acc[0][m], acc[set][m]);
          sums[m][i] = V512::sum(acc[0][m]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace ar
