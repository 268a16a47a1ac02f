// Products of a few rows of bf16 with a compact weight, for any way C of reading a block.
#pragma once
#include "compact.h"
#include "steps.h"

namespace ar {
namespace {

// sums[row][0..count) = products of `count` features from `feature` on with all rows of x.
template <class C, int ROWS>
AR_INLINE void compact_dots(const CompactJob& job, int64_t feature, int count, float (*sums)[16]) {
  for (int i = 0; i < count; ++i) {
    const int64_t row = feature + i;
    const uint8_t* block = job.codes + row * job.blocks * kCompactBlock;
    const typename C::Exponents exponents = C::exponents(job.bases[row]);
    typename C::template Sums<ROWS> acc;
    acc.clear();
    for (int64_t b = 0; b < job.blocks; ++b, block += kCompactBlock)
      C::add(block, exponents, job, b * kCompactColumns, acc);
    for (int m = 0; m < ROWS; ++m) sums[m][i] = acc.total(m);
    const int64_t end = job.ends[row] < job.count ? job.ends[row] : job.count;
    for (int64_t o = row ? job.ends[row - 1] : 0; o < end; ++o) {
      const Outlier& one = job.outliers[o];
      for (int m = 0; m < ROWS && one.column < job.columns; ++m) {
        const uint16_t x = static_cast<const uint16_t*>(job.x)[m * job.x_stride + one.column];
        sums[m][i] += one.value * float_of(uint32_t(x) << 16);
      }
    }
  }
}

// Features [begin * 16, end * 16) of y.
template <class C>
void compact_product(const CompactJob& job, int64_t begin, int64_t end) {
  unrolled<1, kFloatRows + 1>([&](auto rows) {
    constexpr int ROWS = decltype(rows)::value;
    if (job.rows != ROWS) return;
    each_16<typename C::V, kBF16, ROWS>(job, begin, end, [&](int64_t at, int count, float (*sums)[16]) {
      compact_dots<C, ROWS>(job, at, count, sums);
    });
  });
}

// Rows of x in float32: of each run of 2 N columns those of even place and those of odd, which is
// how halves of 32-bit lanes become floats.
template <class V>
void compact_parted(const CompactJob& job) {
  float* out = static_cast<float*>(job.ready);
  for (int64_t m = 0; m < job.rows; ++m) {
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + m * job.x_stride;
    for (int64_t k = 0; k < job.blocks * kCompactColumns; k += 2 * V::N)
      for (int i = 0; i < 2 * V::N; ++i, ++out) {
        const int64_t from = k + i % V::N * 2 + i / V::N;
        *out = from < job.columns ? float_of(uint32_t(x[from]) << 16) : 0.0f;
      }
  }
}

// Weights as floats, by way of W: what bytes a vector has.
template <class W>
struct CompactFloats {
  using V = typename W::V;
  using I = typename W::I;
  struct Exponents { I high, low; };  // bytes of a bf16 number

  template <int ROWS>
  struct Sums {
    typename V::F acc[4][ROWS];
    void clear() {
      for (auto& set : acc)
        for (auto& one : set) one = V::zero();
    }
    float total(int m) const {
      return V::sum(V::add(V::add(acc[0][m], acc[1][m]), V::add(acc[2][m], acc[3][m])));
    }
  };

  static AR_INLINE Exponents exponents(uint8_t base) {
    alignas(16) uint8_t high[16] = {}, low[16] = {};
    for (int c = 1; c < 16; ++c) {
      const uint8_t e = uint8_t(base + c);
      high[c] = e >> 1;
      low[c] = uint8_t(e << 7);
    }
    return Exponents{W::table(high), W::table(low)};
  }

  // 2 N columns, those of even place in the low halves of lanes.
  template <int ROWS>
  static AR_INLINE void add_run(I run, const float* x, int64_t depth, int set, Sums<ROWS>& sums) {
    const typename V::F even = W::low_halves(run), odd = W::high_halves(run);
    for (int m = 0; m < ROWS; ++m) {
      sums.acc[set][m] = V::fma(even, V::load(x + m * depth), sums.acc[set][m]);
      sums.acc[set + 1][m] = V::fma(odd, V::load(x + m * depth + V::N), sums.acc[set + 1][m]);
    }
  }

  template <int ROWS>
  static AR_INLINE void add(const uint8_t* block, const Exponents& e, const CompactJob& job,
                            int64_t k, Sums<ROWS>& sums) {
    constexpr int kParts = 64 / int(sizeof(I)), kRun = 2 * V::N;
    const float* x = static_cast<const float*>(job.ready) + k;
    const int64_t depth = job.blocks * kCompactColumns;
    unrolled<0, 3>([&](auto line) AR_FORCED { fetch_floats(block + 64 * decltype(line)::value); });
    unrolled<0, 2 * kParts>([&](auto part) AR_FORCED {
      constexpr int P = decltype(part)::value, kHalf = P / kParts, kPart = P % kParts;
      const I rest = W::load(block + kHalf * 64 + kPart * sizeof(I));
      const I codes = W::template four<kHalf>(W::load(block + 128 + kPart * sizeof(I)));
      const I high = W::with(W::look_up(e.high, codes), rest, 0x80);
      const I low = W::with(W::look_up(e.low, codes), rest, 0x7f);
      const float* at = x + kHalf * 64 + kPart * kRun;
      add_run<ROWS>(W::first(low, high), at, depth, 0, sums);
      add_run<ROWS>(W::second(low, high), at + 32, depth, 2, sums);
    });
  }
};

}  // namespace
}  // namespace ar
