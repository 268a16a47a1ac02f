// Products of one row of floats with E4M3 by AVX2: fp16 has all its values, and there is an operation
// that widens fp16.
//
// Codes lie as bytes, 16 for four features: two neighbouring inputs of each, then the two behind
// them. Unpacked to words, 32 bytes become 8 features times two inputs, twice.
#pragma once
#include "v256.h"

#include "fetch.h"
#include "kernel_f32.h"

namespace ar {
namespace {

constexpr int kTogether = 2;  // vectors of 8 features: a line of codes
constexpr int kPasses = kStrip / 8 / kTogether;
constexpr int kRegisters = 8;  // of a block's codes

// Calls fn(Int<register>, Int<vector>, codes) for registers [BEGIN, END) of a segment's blocks,
// in the order of memory, with begin(block, pass) and finish(pass) around the calls of a pass.
template <int BEGIN, int END, class Begin, class Fn, class Finish>
AR_INLINE void each_vector(const Record& rec, const Segment& s, Begin&& begin, Fn&& fn,
                           Finish&& finish) {
  constexpr int kLines = END - BEGIN;
  for (int64_t b = s.unit / 2; b < (s.unit + s.units + 1) / 2; ++b) {
    const uint8_t* codes = block_of(rec, s, 2 * b);
    const uint8_t* lines = codes + kRegister * BEGIN;
    for (int pass = 0; pass < kPasses; ++pass) {
      begin(b, pass);
      unrolled<BEGIN, END>([&](auto reg) AR_FORCED {
        unrolled<0, kTogether>([&](auto vector) AR_FORCED {
          constexpr int R = decltype(reg)::value, i = decltype(vector)::value;
          fetch_one<kLines, kLines * kTogether, (R - BEGIN) * kTogether + i>(lines);
          fn(reg, vector, V256::words(codes + kRegister * R, i));
        });
      });
      finish(pass);
      codes += 64;
      lines += 64 * kLines;
    }
  }
}

template <int BEGIN, int END>
AR_INLINE void add_e4m3(const Job& job, const Record& rec, const Segment& s, float* sums) {
  using F = __m256;
  using I = __m256i;
  F totals[kPasses * kTogether][2], acc[kTogether][2];  // of four features, even and odd inputs
  for (auto& pair : totals) pair[0] = pair[1] = V256::zero();
  const float* x = nullptr;
  const auto begin = [&](int64_t b, int pass) AR_FORCED {
    x = static_cast<const float*>(job.packed) + kDepth * b;
    asm("" : "+r"(x));  // read anew: there is no room to keep them
    memcpy(acc, totals[pass * kTogether], sizeof(acc));
  };
  const auto add = [&](auto reg, auto vector, I codes) AR_FORCED {
    constexpr int R = decltype(reg)::value, i = decltype(vector)::value;
    const auto add_words = [&](I words, const float* pair) AR_FORCED {
      const I half = V256::halves(words);
      double both;
      memcpy(&both, pair, sizeof(both));
      const F inputs = _mm256_castpd_ps(_mm256_set1_pd(both));
      acc[i][0] = V256::fma(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), inputs, acc[i][0]);
      acc[i][1] = V256::fma(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), inputs, acc[i][1]);
    };
    const I zero = _mm256_setzero_si256();
    add_words(_mm256_unpacklo_epi8(zero, codes), x + 4 * R);
    add_words(_mm256_unpackhi_epi8(zero, codes), x + 4 * R + 2);
  };
  each_vector<BEGIN, END>(rec, s, begin, add, [&](int pass) AR_FORCED {
    memcpy(totals[pass * kTogether], acc, sizeof(acc));
  });
  F found[1][kPasses * kTogether];
  for (int v = 0; v < kPasses * kTogether; ++v) {
    const __m256d both = _mm256_castps_pd(_mm256_hadd_ps(totals[v][0], totals[v][1]));
    const F in_order = _mm256_castpd_ps(_mm256_permute4x64_pd(both, 0xd8));
    found[0][v] = V256::mul(in_order, V256::set(256.0f));
  }
  flush<V256, 1, kPasses * kTogether>(rec, s.group, 0, group_sums(job, s, 0, 1), found, sums);
}

void multiply_e4m3(const Job& job, int64_t begin, int64_t end) {
  constexpr int kHalf = kRegisters / 2;
  for (int64_t strip = begin; strip < end; ++strip) {
    alignas(64) float sums[kTile * kStrip];  // as many as `finish` may read
    memset(sums, 0, kStrip * sizeof(float));
    const Record rec = record(job, strip);
    segments(job.format, [&](const Segment& s) AR_FORCED {
      if (s.units > 1) add_e4m3<0, kRegisters>(job, rec, s, sums);
      else if (s.unit & 1) add_e4m3<kHalf, kRegisters>(job, rec, s, sums);
      else add_e4m3<0, kHalf>(job, rec, s, sums);
    });
    finish<V256>(job, strip, 0, 1, sums);
  }
}

}  // namespace
}  // namespace ar
