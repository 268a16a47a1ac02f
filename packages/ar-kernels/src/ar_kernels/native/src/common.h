// What the kernels of all instruction sets share. Local to the including file, as the vectors are.
#pragma once
#include <string.h>

#include <type_traits>

#include "kernels.h"

#define AR_FORCED __attribute__((always_inline))
#define AR_INLINE AR_FORCED inline

namespace ar {
namespace {

template <int N>
using Int = std::integral_constant<int, N>;

// Calls fn(Int<BEGIN>) ... fn(Int<END - 1>): loops whose counter is a constant.
template <int BEGIN, int END, class Fn>
AR_INLINE void unrolled(Fn&& fn) {
  if constexpr (BEGIN < END) {
    fn(Int<BEGIN>{});
    unrolled<BEGIN + 1, END>(fn);
  }
}

AR_INLINE float float_of(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

AR_INLINE uint32_t bits_of(float v) {
  uint32_t out;
  memcpy(&out, &v, sizeof out);
  return out;
}

// A run of inputs that share a scale, in units of 16.
struct Segment {
  int64_t unit, units, group, chunk;
  bool first;  // of its group: the one to which the sum of the group's inputs belongs
};

// Calls fn(segment) for runs of at most kSegment inputs. Runs are whole blocks of 32 inputs, except
// for groups of 16, whose runs are halves of blocks.
template <class Fn>
AR_INLINE void segments(const Format& f, Fn&& fn) {
  if (f.group == kUnit) {
    for (int64_t u = 0; u < f.groups; ++u) fn(Segment{u, 1, u, u / 2, true});
    return;
  }
  const int64_t size = f.group ? f.group / kDepth : f.blocks;
  constexpr int64_t step = kSegment / kDepth;
  for (int64_t begin = 0, g = 0; begin < f.blocks; begin += size, ++g) {
    const int64_t end = begin + size < f.blocks ? begin + size : f.blocks;
    for (int64_t b = begin; b < end; b += step)
      fn(Segment{2 * b, 2 * (b + step < end ? step : end - b), g, g, b == begin});
  }
}

struct Record {
  const float* factors;   // of each feature
  const uint8_t* chunks;  // see Format
  int64_t chunk, lead, block;  // bytes
  int scale, width, pairs;  // kind and bytes of a scale; 1: a chunk has two groups
  bool has_zeros;
  float zero_bias;

  // The scales of a group, [64].
  AR_INLINE const uint8_t* scales(int64_t group) const {
    return chunks + (group >> pairs) * chunk + (group & pairs) * kStrip * width;
  }
  // Its zero points, [64]; null where there are none.
  AR_INLINE const uint8_t* zeros(int64_t group) const {
    if (!has_zeros) return nullptr;
    return chunks + (group >> pairs) * chunk + kStrip * ((width << pairs) + (group & pairs));
  }
  // The first block of a segment, [registers][4][64]; the others follow.
  AR_INLINE const uint8_t* codes(const Segment& s) const {
    return chunks + (s.chunk + 1) * lead + s.unit / 2 * block;
  }
};

// The block of a unit of a segment.
AR_INLINE const uint8_t* block_of(const Record& rec, const Segment& s, int64_t unit) {
  return rec.codes(s) + (unit / 2 - s.unit / 2) * rec.block;
}

AR_INLINE Record record(const Job& job, int64_t strip) {
  const Format& f = job.format;
  const uint8_t* at = job.first + strip * f.record;
  return Record{reinterpret_cast<const float*>(at), at + kFactors, f.chunk, f.lead, block_bytes(f),
                f.scale, scale_bytes(f.scale), f.chunk_groups == 2, f.zero != 0,
                zero_bias(f, job.blob)};
}

// sums[row][64] of a strip become y: pieces of a row are added, then times the factor of each
// feature, plus bias, in the type of y.
template <class V>
AR_INLINE void finish(const Job& job, int64_t strip, int64_t row, int64_t rows, const float* sums) {
  const int64_t at = strip * kStrip;
  const int64_t count = job.format.rows - at < kStrip ? job.format.rows - at : kStrip;
  const float* factors = record(job, strip).factors;
  const int width = job.dtype == kF32 ? 4 : 2;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* out = static_cast<uint8_t*>(job.y) + ((row + r) * job.y_stride + at) * width;
    for (int64_t n = 0; n < count; n += V::N) {
      typename V::F v = V::load(sums + r * job.pieces * kStrip + n);
      for (int p = 1; p < job.pieces; ++p)
        v = V::add(v, V::load(sums + (r * job.pieces + p) * kStrip + n));
      v = V::mul(v, V::load(factors + n));
      if (count - n >= V::N) {
        if (job.bias) v = V::add(v, V::load(job.bias + at + n));
        V::write(out, job.dtype, n, v);
      } else {
        float bias[V::N] = {};
        if (job.bias) memcpy(bias, job.bias + at + n, (count - n) * 4);
        uint8_t last[V::N * 4];
        V::write(last, job.dtype, 0, V::add(v, V::load(bias)));
        memcpy(out + n * width, last, (count - n) * width);
      }
    }
  }
}

// Calls fn(first tile, tiles, first row of x, rows of x) for runs of tiles that are multiplied
// together.
template <class Fn>
AR_INLINE void tile_runs(const Job& job, Fn&& fn) {
  const int64_t tiles = ceil_div(job.rows * job.pieces, kTile), per = kTile / job.pieces;
  for (int64_t t = 0; t < tiles; t += kTilesAtOnce) {
    const int64_t n = tiles - t < kTilesAtOnce ? tiles - t : kTilesAtOnce;
    const int64_t row = t * per, left = job.rows - row;
    fn(t, n, row, left < n * per ? left : n * per);
  }
}

// The sums of a tile's inputs over the group of a segment, null where they play no part.
AR_INLINE const float* group_sums(const Job& job, const Segment& s, int64_t tile, int rows) {
  if (job.sums == nullptr || !s.first) return nullptr;
  return job.sums + tile * kTile * job.format.groups + s.group * rows;
}

AR_INLINE int tile_rows(const Job& job, int64_t tile) {
  const int64_t left = job.rows * job.pieces - tile * kTile;
  return int(left < kTile ? left : kTile);
}

}  // namespace
}  // namespace ar
