// Products in float32 for any vector type V: a run of inputs of a strip is decoded once into a
// panel [input][64], which all tiles of rows then read.
#pragma once
#include "common.h"

namespace ar {
namespace {

// sums[row][feature] += scale * (acc - zero * sum of x) for vectors of features from `at` on.
template <class V, int ROWS, int VECTORS>
AR_INLINE void flush(const Record& rec, int64_t group, int at, const float* x_sums,
                     typename V::F (&acc)[ROWS][VECTORS], float* sums) {
  const uint8_t *scales = rec.scales(group), *zeros = rec.zeros(group);
  for (int v = 0; v < VECTORS; ++v) {
    const int n = at + v * V::N;
    const auto scale = V::scales(rec.scale, scales + n * rec.width);
    auto zero = V::set(rec.zero_bias);
    if (zeros) zero = V::add(zero, V::bytes_as_floats(zeros + n));
    for (int m = 0; m < ROWS; ++m) {
      auto a = acc[m][v];
      if (x_sums) a = V::sub(a, V::mul(zero, V::set(x_sums[m])));
      float* out = sums + m * kStrip + n;
      V::store(out, V::fma(scale, a, V::load(out)));
    }
  }
}

// Writes the values of a segment of a strip as panel[input][64].
using Decode = void (*)(const Record&, const float* table, const Segment&, float* panel);

template <class V, int ROWS>
void tile(const Record& rec, int64_t group, int64_t inputs, const float* panel, const float* x,
          const float* x_sums, float* sums) {
  constexpr int VECTORS = V::N == 16 && ROWS * 4 <= 24 && V::kBlocksAtOnce(6) == 4 ? 4 : 16 / V::N;
  for (int at = 0; at < kStrip; at += VECTORS * V::N) {
    typename V::F acc[ROWS][VECTORS];
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < VECTORS; ++v) acc[m][v] = V::zero();
    for (int64_t k = 0; k < inputs; ++k) {
      typename V::F w[VECTORS];
      for (int v = 0; v < VECTORS; ++v) w[v] = V::load(panel + k * kStrip + at + v * V::N);
      for (int m = 0; m < ROWS; ++m) {
        const auto one = V::set(x[k * ROWS + m]);
        for (int v = 0; v < VECTORS; ++v) acc[m][v] = V::fma(w[v], one, acc[m][v]);
      }
    }
    flush<V, ROWS, VECTORS>(rec, group, at, x_sums, acc, sums);
  }
}

template <class V>
void many_rows(const Job& job, int64_t begin, int64_t end, Decode decode) {
  const Format& f = job.format;
  const int64_t depth = f.blocks * kDepth;
  const float* table = reinterpret_cast<const float*>(job.blob);
  alignas(64) float panel[kSegment * kStrip];
  alignas(64) float sums[kTilesAtOnce * kTile * kStrip];
  tile_runs(job, [&](int64_t t0, int64_t tiles, int64_t row, int64_t rows) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const Record rec = record(job, strip);
      memset(sums, 0, sizeof(float) * kStrip * rows * job.pieces);
      segments(f, [&](const Segment& s) {
        decode(rec, table, s, panel);
        for (int64_t i = 0; i < tiles; ++i) {
          const int n = tile_rows(job, t0 + i);
          const float* x = static_cast<const float*>(job.packed) + (t0 + i) * kTile * depth +
                           s.unit * kUnit * n;
          const float* x_sums = group_sums(job, s, t0 + i, n);
          float* out = sums + i * kTile * kStrip;
          unrolled<1, kTile + 1>([&](auto r) {
            constexpr int ROWS = decltype(r)::value;
            if (n == ROWS) tile<V, ROWS>(rec, s.group, s.units * kUnit, panel, x, x_sums, out);
          });
        }
      });
      finish<V>(job, strip, row, rows, sums);
    }
  });
}

// Rows of x as packed[tile][input][row of the tile], zeros behind the last input, and their sums
// over groups.
template <class V>
void prepare(const Job& job, int64_t begin, int64_t end) {
  const Format& f = job.format;
  const int64_t depth = f.blocks * kDepth;
  for (int64_t t = begin; t < end; ++t) {
    const int n = tile_rows(job, t);
    float* out = static_cast<float*>(job.packed) + t * kTile * depth;
    for (int m = 0; m < n; ++m) {
      const int64_t row = (t * kTile + m) * job.x_stride;
      float one[V::N];
      for (int64_t k = 0; k < depth; k += V::N) {
        const int64_t left = f.columns - k;
        if (left >= V::N) {
          V::store(one, V::read(job.x, job.dtype, row + k));
        } else {
          const int width = job.dtype == kF32 ? 4 : 2;
          uint8_t last[V::N * 4] = {};
          if (left > 0)
            memcpy(last, static_cast<const uint8_t*>(job.x) + (row + k) * width, left * width);
          V::store(one, V::read(last, job.dtype, 0));
        }
        for (int i = 0; i < V::N; ++i) out[(k + i) * n + m] = one[i];
      }
      if (!job.sums) continue;
      for (int64_t g = 0; g < f.groups; ++g) {
        const int64_t last = (g + 1) * f.group < depth ? (g + 1) * f.group : depth;
        float sum = 0;
        for (int64_t k = g * f.group; k < last; ++k) sum += out[k * n + m];
        job.sums[t * kTile * f.groups + g * n + m] = sum;
      }
    }
  }
}

// Features [begin * 64, end * 64) as rows of y, scaled.
template <class V>
void expand_with(const Job& job, int64_t origin, int64_t begin, int64_t end, Decode decode) {
  const Format& f = job.format;
  const float* table = reinterpret_cast<const float*>(job.blob);
  alignas(64) float panel[kSegment * kStrip];
  const int width = job.dtype == kF32 ? 4 : 2;
  for (int64_t strip = begin; strip < end; ++strip) {
    const Record rec = record(job, strip);
    const int64_t count =
        f.rows - strip * kStrip < kStrip ? f.rows - strip * kStrip : int64_t(kStrip);
    segments(f, [&](const Segment& s) {
      decode(rec, table, s, panel);
      float scale[kStrip], zero[kStrip];
      const uint8_t *scales = rec.scales(s.group), *zeros = rec.zeros(s.group);
      for (int n = 0; n < kStrip; n += V::N) {
        const auto v = V::scales(rec.scale, scales + n * rec.width);
        V::store(scale + n, V::mul(v, V::load(rec.factors + n)));
        auto z = V::set(rec.zero_bias);
        if (zeros) z = V::add(z, V::bytes_as_floats(zeros + n));
        V::store(zero + n, z);
      }
      const int64_t at = s.unit * kUnit;
      const int64_t inputs = f.columns - at < s.units * kUnit ? f.columns - at : s.units * kUnit;
      for (int64_t n = 0; n < count; ++n) {
        float row[kSegment];
        for (int64_t k = 0; k < inputs; ++k)
          row[k] = (panel[k * kStrip + n] - zero[n]) * scale[n];
        const int64_t feature = (strip - origin) * kStrip + n;
        uint8_t* out = static_cast<uint8_t*>(job.y) + (feature * job.y_stride + at) * width;
        for (int64_t k = 0; k < inputs; k += V::N) {
          uint8_t some[V::N * 4];
          V::write(some, job.dtype, 0, V::load(row + k));
          memcpy(out + k * width, some, (inputs - k < V::N ? inputs - k : V::N) * width);
        }
      }
    });
  }
}

// Reads memory and returns something of it, so that the reads are not left out.
template <class V>
float read_all(const uint8_t* p, int64_t bytes) {
  typename V::F acc[8];
  for (auto& a : acc) a = V::zero();
  constexpr int64_t step = 8 * V::N * 4;
  for (int64_t i = 0; i + step <= bytes; i += step) {
    for (int v = 0; v < 8; ++v) {
      if (v * V::N * 4 % 64 == 0) __builtin_prefetch(p + i + v * V::N * 4 + 6144, 0, 2);
      acc[v] = V::add(acc[v], V::load(reinterpret_cast<const float*>(p + i) + v * V::N));
    }
  }
  auto all = acc[0];
  for (int v = 1; v < 8; ++v) all = V::add(all, acc[v]);
  return V::sum(all);
}

}  // namespace
}  // namespace ar
