// Products of a strip with few and with many rows of bf16 pairs (AVX512-BF16).
#pragma once
#include "decode_bf16.h"
#include "fetch.h"
#include "kernel_f32.h"

namespace ar {
namespace {

constexpr int kInPlaceRows = 2;
constexpr int kAheadOfMany = 4096;  // bytes of codes fetched ahead where rows are many
constexpr int kFetches = 64;         // of a block: a field and 16 features

// Sums of fields [BEGIN, BEGIN + 8) of the four blocks of a strip.
template <int BITS, int ROWS, int SETS, bool IN_PLACE, int BEGIN>
AR_INLINE void add_half(const uint8_t* block, const uint32_t* x, const Tables& t,
                        __m512 (&acc)[SETS][ROWS][4]) {
  __m512i line[4];
  const auto step = [&](auto f, auto c) AR_FORCED {
    constexpr int F = decltype(f)::value, C = decltype(c)::value;
    fetch<BITS, kFetches, 4 * F + C>(block);
    next_line<BITS, F, BEGIN>(block + C * 64, line + C);
    __m512bh w;
    if constexpr (IN_PLACE) w = in_place<BITS, F>(block + C * 64, line[C]);
    else w = weights<BITS, F>(block + C * 64, line[C], t);
    for (int m = 0; m < ROWS; ++m)
      acc[F % SETS][m][C] = dot(acc[F % SETS][m][C], w, x[F * ROWS + m]);
  };
  // with few sums, neighbours in the code must not wait for each other
  if constexpr (ROWS <= 2) {
    unrolled<BEGIN, BEGIN + 8>(
        [&](auto f) AR_FORCED { unrolled<0, 4>([&](auto c) AR_FORCED { step(f, c); }); });
  } else {
    unrolled<0, 4>([&](auto c) AR_FORCED {
      unrolled<BEGIN, BEGIN + 8>([&](auto f) AR_FORCED { step(f, c); });
    });
  }
}

template <int BITS, int ROWS, bool IN_PLACE>
void few_rows_bf16(const Job& job, int64_t strip, const Tables& t, float* sums) {
  constexpr int SETS = ROWS <= 2 ? 2 : 1;
  const Record rec = record(job, strip);
  const uint32_t* x = static_cast<const uint32_t*>(job.packed);
  segments(job.format, [&](const Segment& s) AR_FORCED {
    __m512 acc[SETS][ROWS][4];
    for (auto& set : acc)
      for (auto& row : set)
        for (auto& one : row) one = _mm512_setzero_ps();
    for (int64_t u = s.unit; u < s.unit + s.units; ++u) {
      const uint8_t* block = block_of(rec, s, u);
      const uint32_t* pairs = x + u / 2 * kFields * ROWS;
      if (u & 1) add_half<BITS, ROWS, SETS, IN_PLACE, 8>(block, pairs, t, acc);
      else add_half<BITS, ROWS, SETS, IN_PLACE, 0>(block, pairs, t, acc);
    }
    if constexpr (SETS == 2)
      for (int m = 0; m < ROWS; ++m)
        for (int c = 0; c < 4; ++c) acc[0][m][c] = _mm512_add_ps(acc[0][m][c], acc[1][m][c]);
    if constexpr (IN_PLACE)
      for (int m = 0; m < ROWS && s.first; ++m) {
        const __m512 base = _mm512_set1_ps(job.bases[s.group * ROWS + m]);
        for (int c = 0; c < 4; ++c) acc[0][m][c] = _mm512_sub_ps(acc[0][m][c], base);
      }
    const float* x_sums = group_sums(job, s, 0, ROWS);
    flush<V, ROWS, 4>(rec, s.group, 0, x_sums, acc[0], sums);
  });
}

// Writes the weights of a run of inputs, of any groups, as panel[pair of inputs][64 features].
template <int BITS>
void decode_pairs(const Format& f, const uint8_t* strip, const Segment& s, const Tables& t,
                  uint32_t* panel) {
  const auto add = [&](auto half, const uint8_t* block) AR_FORCED {
    constexpr int BEGIN = 8 * decltype(half)::value;
    for (int c = 0; c < 4; ++c)
      unrolled<BEGIN, BEGIN + 8>([&](auto f) AR_FORCED {
        constexpr int F = decltype(f)::value;
        const __m512bh w = weights<BITS, F>(block + c * 64, t);
        _mm512_store_si512(panel + (F - BEGIN) * kStrip + c * kBlock, __m512i(w));
      });
  };
  for (int64_t u = s.unit; u < s.unit + s.units; ++u, panel += kUnit / 2 * kStrip) {
    const uint8_t* block = strip + block_at(f, u / 2);
    if (u & 1) add(Int<1>{}, block);
    else add(Int<0>{}, block);
  }
}

// Tells whether weights times the scales of their groups are bf16 numbers: scales of a byte have a
// significand of 4 bits at most (1 for powers of two), so those of the table's values decide.
bool scales_fold(const Format& f, const uint8_t* blob) {
  if (f.zero || zero_bias(f, blob) != 0 || scale_bytes(f.scale) != 1) return false;
  if (f.scale == kScaleE8M0) return true;
  for (int i = 0; i < 128; ++i) {
    uint32_t bits;
    memcpy(&bits, blob + 4 * i, 4);
    if (bits & 0xfffff) return false;
  }
  return true;
}

// Multiplies the weights of one unit of inputs in a panel by the scales of their group.
AR_INLINE void fold(const Record& rec, int64_t group, uint32_t* panel) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  for (int c = 0; c < 4; ++c) {
    const __m512 scale = V::scales(rec.scale, rec.scales(group) + c * kBlock);
    for (int i = 0; i < kUnit / 2; ++i) {
      uint32_t* at = panel + i * kStrip + c * kBlock;
      const __m512i w = _mm512_load_si512(at);
      const __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(w, high)), scale);
      const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), scale);
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
      _mm512_store_si512(at, _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), high, low, 0xea));
    }
  }
}

template <int ROWS>
void tile_bf16(const Record& rec, int64_t group, int64_t pairs, const uint32_t* panel,
               const uint32_t* x, const float* x_sums, float* sums) {
  __m512 acc[ROWS][4];
  for (auto& row : acc)
    for (auto& one : row) one = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh w[4];
    for (int c = 0; c < 4; ++c) w[c] = __m512bh(_mm512_load_si512(panel + k * kStrip + c * kBlock));
    for (int m = 0; m < ROWS; ++m)
      for (int c = 0; c < 4; ++c) acc[m][c] = dot(acc[m][c], w[c], x[k * ROWS + m]);
  }
  flush<V, ROWS, 4>(rec, group, 0, x_sums, acc, sums);
}

// Tiles of one strip that are multiplied together.
struct Run {
  const Job& job;
  const Tables& tables;
  int64_t first, tiles;
  float* sums;

  // Inputs of tile `i` from a unit on.
  const uint32_t* x(int64_t i, int64_t unit, int rows) const {
    const int64_t pairs = job.format.blocks * kFields;
    return static_cast<const uint32_t*>(job.packed) + (first + i) * kTile * pairs +
           unit * (kUnit / 2) * rows;
  }
};

// A segment of all tiles by way of a panel; scaled: where the scales are that its weights take.
template <int BITS>
void by_panel(const Run& run, const Record& rec, const Segment& s, const Record* scaled) {
  const Format& f = run.job.format;
  alignas(64) uint32_t panel[kSegment / 2 * kStrip];
  const auto* strip = reinterpret_cast<const uint8_t*>(rec.factors);
  decode_pairs<BITS>(f, strip, s, run.tables, panel);
  for (int64_t u = 0; scaled && u < s.units; ++u) {
    const int64_t group = (s.unit + u) * kUnit / f.group;  // inputs past the last are zeros
    fold(*scaled, group < f.groups ? group : f.groups - 1, panel + u * kUnit / 2 * kStrip);
  }
  for (int64_t i = 0; i < run.tiles; ++i) {
    const int n = tile_rows(run.job, run.first + i);
    const float* x_sums = group_sums(run.job, s, run.first + i, n);
    float* out = run.sums + i * kTile * kStrip;
    unrolled<1, kTile + 1>([&](auto r) {
      constexpr int ROWS = decltype(r)::value;
      if (n != ROWS) return;
      const uint32_t* x = run.x(i, s.unit, n);
      tile_bf16<ROWS>(rec, s.group, s.units * (kUnit / 2), panel, x, x_sums, out);
    });
  }
}

// Sums of fields [BEGIN, BEGIN + 8) of blocks [C, C + BLOCKS) for a whole tile and MORE rows.
template <int BITS, int MORE, int C, int BLOCKS, int BEGIN>
AR_INLINE void add_rows(const uint8_t* block, const uint32_t* x, const uint32_t* more,
                        const Tables& t, __m512 (&acc)[kTile + MORE][BLOCKS]) {
  unrolled<BEGIN, BEGIN + 8>([&](auto f) AR_FORCED {
    constexpr int F = decltype(f)::value;
    __m512bh w[BLOCKS];
    unrolled<0, BLOCKS>([&](auto c) AR_FORCED {
      constexpr int line = line_at(BITS, kFetches, 4 * F + C + decltype(c)::value);
      if constexpr (line >= 0) _mm_prefetch(block + kAheadOfMany + 64 * line, _MM_HINT_T0);
      w[c] = weights<BITS, F>(block + (C + c) * 64, t);
    });
    for (int m = 0; m < kTile + MORE; ++m) {
      const uint32_t one = m < kTile ? x[F * kTile + m] : more[F * MORE + m - kTile];
      for (int c = 0; c < BLOCKS; ++c) acc[m][c] = dot(acc[m][c], w[c], one);
    }
  });
}

// A segment of blocks [C, C + BLOCKS) for tile `i` and the MORE rows of the next one.
template <int BITS, int MORE, int C, int BLOCKS>
AR_INLINE void add_blocks(const Run& run, const Record& rec, const Segment& s, int64_t i) {
  __m512 acc[kTile + MORE][BLOCKS];
  for (auto& row : acc)
    for (auto& one : row) one = _mm512_setzero_ps();
  const uint32_t *x = run.x(i, 0, kTile), *more = run.x(i + 1, 0, MORE);
  for (int64_t u = s.unit; u < s.unit + s.units; ++u) {
    const uint8_t* block = block_of(rec, s, u);
    const uint32_t *at = x + u / 2 * kFields * kTile, *next = more + u / 2 * kFields * MORE;
    if (u & 1) add_rows<BITS, MORE, C, BLOCKS, 8>(block, at, next, run.tables, acc);
    else add_rows<BITS, MORE, C, BLOCKS, 0>(block, at, next, run.tables, acc);
  }
  float x_sums[kTile + MORE];
  const float* of_tile = group_sums(run.job, s, run.first + i, kTile);
  if (of_tile) {
    memcpy(x_sums, of_tile, kTile * 4);
    if constexpr (MORE > 0)
      memcpy(x_sums + kTile, group_sums(run.job, s, run.first + i + 1, MORE), MORE * 4);
  }
  flush<V, kTile + MORE, BLOCKS>(rec, s.group, C * kBlock, of_tile ? x_sums : nullptr, acc,
                                 run.sums + i * kTile * kStrip);
}

// A segment of all tiles with weights decoded in registers; the first tile of several is whole.
template <int BITS>
void in_registers(const Run& run, const Record& rec, const Segment& s) {
  if (run.tiles & 1) add_blocks<BITS, 0, 0, 4>(run, rec, s, 0);
  for (int64_t i = run.tiles & 1; i < run.tiles; i += 2) {
    const int n = tile_rows(run.job, run.first + i + 1);
    unrolled<1, kTile + 1>([&](auto r) {
      constexpr int MORE = decltype(r)::value;
      if (n != MORE) return;
      add_blocks<BITS, MORE, 0, 2>(run, rec, s, i);
      add_blocks<BITS, MORE, 2, 2>(run, rec, s, i);
    });
  }
}

template <int BITS>
void many_rows_bf16(const Job& job, int64_t begin, int64_t end, const Tables& t) {
  const Format& f = job.format;
  alignas(64) float sums[kTilesAtOnce * kTile * kStrip];
  // small groups interrupt the sums, once for each row; folding their scales costs the same for all
  const bool folds = f.group && f.group < kSegment && job.rows * job.pieces > f.group * 3 / 4 &&
                     scales_fold(f, job.blob);
  Format segmented = f;
  if (folds) segmented.group = 0;
  tile_runs(job, [&](int64_t first, int64_t tiles, int64_t row, int64_t rows) {
    const Run run{job, t, first, tiles, sums};
    const bool is_part = rows * job.pieces < kTile;
    for (int64_t strip = begin; strip < end; ++strip) {
      Record rec = record(job, strip);
      const Record scaled = rec;
      if (folds) rec.scale = kScaleNone;
      memset(sums, 0, sizeof(float) * kStrip * rows * job.pieces);
      segments(segmented, [&](const Segment& s) {
        if (folds || is_part) by_panel<BITS>(run, rec, s, folds ? &scaled : nullptr);
        else in_registers<BITS>(run, rec, s);
      });
      finish<V>(job, strip, row, rows, sums);
    }
  });
}

}  // namespace
}  // namespace ar
