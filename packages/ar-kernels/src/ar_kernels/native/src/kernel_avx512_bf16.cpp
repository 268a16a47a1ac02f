// Products of bf16 pairs, summed in float32 (AVX512-BF16 and VBMI).
//
// Every code is a whole number or a small float that bf16 holds exactly, so a table turns codes
// into weights and the scale meets the float32 sum of its group. A row of fp16 or fp32 is two or
// three rows of bf16 that add up to it exactly; they share the decoding.
//
// For a row or two of bf16, narrow integers are read in place: with the upper bits of 128.0 around
// it, a code at bit r of a lane is the number 128 + 2^r * code, one operation away. Inputs are
// divided by 2^r beforehand, and what the 128 add is subtracted from the sum of each group.
#include "v512.h"

#include "dots_bf16.h"
#include "kernel_f32.h"

namespace ar {
namespace {

using V = V512;

constexpr int kInPlaceRows = 2;

struct Tables {
  __m512i t[4];  // lanes of 2 to 6 bits: t[0], t[1]; bytes: low halves of 0-63, 64-127, then high
};

void tables(const Format& f, const uint8_t* blob, Tables* out) {
  const float* values = reinterpret_cast<const float*>(blob);
  alignas(64) uint16_t half[128];
  for (int i = 0; i < 128; i += 16)
    _mm256_store_si256(reinterpret_cast<__m256i*>(half + i), V::to_bf16(V::load(values + i)));
  if (f.bits < 8) {
    out->t[0] = _mm512_load_si512(half);
    out->t[1] = _mm512_load_si512(half + 32);
    return;
  }
  alignas(64) uint8_t bytes[4][64];
  for (int i = 0; i < 128; ++i) {
    bytes[i / 64][i % 64] = uint8_t(half[i]);
    bytes[2 + i / 64][i % 64] = uint8_t(half[i] >> 8);
  }
  for (int i = 0; i < 4; ++i) out->t[i] = _mm512_load_si512(bytes[i]);
}

AR_INLINE __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Lanes with a field of fewer than 8 bits at their bottom, anything above.
template <int BITS, int F>
AR_INLINE __m512i lanes(const uint8_t* block) {
  constexpr Place at = place(BITS, F);
  if constexpr (!is_spread(BITS, F)) {
    return _mm512_srli_epi16(load(block + 64 * at.reg), at.shift);
  } else if constexpr (BITS == 6) {
    constexpr int i = F - whole_fields(6);
    const __m512i low = _mm512_srli_epi16(load(block + 64 * i), 12);
    const __m512i other = load(block + 64 * (4 + i / 2));
    const __m512i high = _mm512_srli_epi16(other, i & 1 ? 10 : 8);
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(0x0f), 0xe4);  // c ? a : b
  } else {
    __m512i out = _mm512_srli_epi16(load(block), 15);
    unrolled<1, BITS>([&](auto j) {
      constexpr int bit = decltype(j)::value;
      const __m512i one = _mm512_srli_epi16(load(block + 64 * bit), 15 - bit);
      out = _mm512_ternarylogic_epi32(out, one, _mm512_set1_epi16(1 << bit), 0xf8);  // a | b & c
    });
    return out;
  }
}

// The weights of a field: pairs of inputs for 16 features.
template <int BITS, int F>
AR_INLINE __m512bh weights(const uint8_t* block, const Tables& t) {
  if constexpr (BITS <= 5) {
    return __m512bh(_mm512_permutexvar_epi16(lanes<BITS, F>(block), t.t[0]));
  } else if constexpr (BITS == 6) {
    return __m512bh(_mm512_permutex2var_epi16(t.t[0], lanes<BITS, F>(block), t.t[1]));
  } else {
    const __m512i codes = load(block + 64 * (F / 2));
    const __m512i low = _mm512_permutex2var_epi8(t.t[0], codes, t.t[1]);
    __m512i high = _mm512_permutex2var_epi8(t.t[2], codes, t.t[3]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(char(0x80)), 0xf8);
    return __m512bh(F & 1 ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high));
  }
}

// How far a field's lanes are shifted before its code is read in place, and the bit where it then
// begins: it must end below bit 7, and fields share shifts where they can.
constexpr int in_place_shift(int bits, int field) {
  if (is_spread(bits, field)) return 0;
  const int at = place(bits, field).shift;
  return bits == 4 ? at : at / 6 * 6;
}

constexpr int in_place_bit(int bits, int field) {
  return is_spread(bits, field) ? 0 : place(bits, field).shift - in_place_shift(bits, field);
}

template <int BITS, int F>
AR_INLINE __m512bh in_place(const uint8_t* block) {
  constexpr int shift = in_place_shift(BITS, F), bit = in_place_bit(BITS, F);
  __m512i v;
  if constexpr (is_spread(BITS, F)) v = lanes<BITS, F>(block);
  else v = load(block + 64 * place(BITS, F).reg);
  if constexpr (shift > 0) v = _mm512_srli_epi16(v, shift);
  const __m512i mask = _mm512_set1_epi16(short(((1 << BITS) - 1) << bit));
  return __m512bh(_mm512_ternarylogic_epi32(v, mask, _mm512_set1_epi16(0x4300), 0xea));
}

AR_INLINE __m512 dot(__m512 acc, __m512bh w, uint32_t pair) {
  return _mm512_dpbf16_ps(acc, w, __m512bh(_mm512_set1_epi32(int(pair))));
}

// Sums of fields [BEGIN, BEGIN + 8) of the four blocks of a strip.
template <int BITS, int ROWS, int SETS, bool IN_PLACE, int BEGIN>
AR_INLINE void add_half(const uint8_t* block, const uint32_t* x, const Tables& t,
                        __m512 (&acc)[SETS][ROWS][4]) {
  const auto step = [&](auto f, auto c) AR_FORCED {
    constexpr int F = decltype(f)::value, C = decltype(c)::value;
    __m512bh w;
    if constexpr (IN_PLACE) w = in_place<BITS, F>(block + C * 64 * BITS);
    else w = weights<BITS, F>(block + C * 64 * BITS, t);
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
  constexpr int64_t kBytes = 4 * 64 * BITS;
  const Record rec = record(job, strip);
  const uint32_t* x = static_cast<const uint32_t*>(job.packed);
  segments(job.format, [&](const Segment& s) AR_FORCED {
    __m512 acc[SETS][ROWS][4];
    for (auto& set : acc)
      for (auto& row : set)
        for (auto& one : row) one = _mm512_setzero_ps();
    for (int64_t u = s.unit; u < s.unit + s.units; ++u) {
      const uint8_t* block = rec.codes + u / 2 * kBytes;
      const uint32_t* pairs = x + u / 2 * kFields * ROWS;
      if (u & 1) {
        add_half<BITS, ROWS, SETS, IN_PLACE, 8>(block, pairs, t, acc);
      } else {
        // the hardware does not follow a stream from one page to the next
        for (int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(block + 4 * kBytes + i, _MM_HINT_T0);
        add_half<BITS, ROWS, SETS, IN_PLACE, 0>(block, pairs, t, acc);
      }
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

// Writes the weights of a run of inputs as panel[pair of inputs][64 features].
template <int BITS>
void decode_pairs(const Record& rec, int64_t unit, int64_t units, const Tables& t, uint32_t* panel) {
  const auto add = [&](auto half, const uint8_t* block) AR_FORCED {
    constexpr int BEGIN = 8 * decltype(half)::value;
    for (int c = 0; c < 4; ++c)
      unrolled<BEGIN, BEGIN + 8>([&](auto f) AR_FORCED {
        constexpr int F = decltype(f)::value;
        const __m512bh w = weights<BITS, F>(block + c * 64 * BITS, t);
        _mm512_store_si512(panel + (F - BEGIN) * kStrip + c * kBlock, __m512i(w));
      });
  };
  for (int64_t u = unit; u < unit + units; ++u, panel += kUnit / 2 * kStrip) {
    const uint8_t* block = rec.codes + u / 2 * 4 * 64 * BITS;
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
    const __m512 scale = V::scales(rec.scale, rec.scales + group * kStrip + c * kBlock);
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

template <int BITS>
void many_rows_bf16(const Job& job, int64_t begin, int64_t end, const Tables& t) {
  const Format& f = job.format;
  const int64_t pairs = f.blocks * kFields;
  alignas(64) uint32_t panel[kSegment / 2 * kStrip];
  alignas(64) float sums[kTilesAtOnce * kTile * kStrip];
  // small groups would interrupt the sums too often
  const bool folds = f.group && f.group < kSegment && scales_fold(f, job.blob);
  Format runs = f;
  if (folds) runs.group = 0;
  tile_runs(job, [&](int64_t t0, int64_t tiles, int64_t row, int64_t rows) {
    for (int64_t strip = begin; strip < end; ++strip) {
      Record rec = record(job, strip);
      const Record scaled = rec;
      if (folds) rec.scale = kScaleNone;
      memset(sums, 0, sizeof(float) * kStrip * rows * job.pieces);
      segments(runs, [&](const Segment& s) {
        decode_pairs<BITS>(rec, s.unit, s.units, t, panel);
        for (int64_t u = 0; folds && u < s.units; ++u) {
          const int64_t group = (s.unit + u) * kUnit / f.group;  // inputs past the last are zeros
          fold(scaled, group < f.groups ? group : f.groups - 1, panel + u * kUnit / 2 * kStrip);
        }
        for (int64_t i = 0; i < tiles; ++i) {
          const int n = tile_rows(job, t0 + i);
          const uint32_t* x = static_cast<const uint32_t*>(job.packed) + (t0 + i) * kTile * pairs +
                              s.unit * (kUnit / 2) * n;
          const float* x_sums = group_sums(job, s, t0 + i, n);
          float* out = sums + i * kTile * kStrip;
          unrolled<1, kTile + 1>([&](auto r) {
            constexpr int ROWS = decltype(r)::value;
            if (n == ROWS)
              tile_bf16<ROWS>(rec, s.group, s.units * (kUnit / 2), panel, x, x_sums, out);
          });
        }
      });
      finish<V>(job, strip, row, rows, sums);
    }
  });
}

template <int BITS>
void multiply_bits(const Job& job, int64_t begin, int64_t end) {
  Tables t;
  tables(job.format, job.blob, &t);
  const int64_t rows = job.rows * job.pieces;
  if (rows > kTile) return many_rows_bf16<BITS>(job, begin, end, t);
  for (int64_t strip = begin; strip < end; ++strip) {
    alignas(64) float sums[kTile * kStrip] = {};
    unrolled<1, kTile + 1>([&](auto r) {
      constexpr int ROWS = decltype(r)::value;
      if (rows != ROWS) return;
      if constexpr (BITS <= 4 && ROWS <= kInPlaceRows)
        if (job.bases) return few_rows_bf16<BITS, ROWS, true>(job, strip, t, sums);
      few_rows_bf16<BITS, ROWS, false>(job, strip, t, sums);
    });
    finish<V>(job, strip, 0, job.rows, sums);
  }
}

void multiply_bf16(const Job& job, int64_t begin, int64_t end) {
  switch (job.format.bits) {
    case 2: return multiply_bits<2>(job, begin, end);
    case 3: return multiply_bits<3>(job, begin, end);
    case 4: return multiply_bits<4>(job, begin, end);
    case 5: return multiply_bits<5>(job, begin, end);
    case 6: return multiply_bits<6>(job, begin, end);
    default: return multiply_bits<8>(job, begin, end);
  }
}

// What the inputs of one half of a block are multiplied by where codes are read in place.
struct Powers {
  __m512 of[2];
};

template <int BITS>
Powers in_place_powers() {
  alignas(64) float power[32];
  unrolled<0, 16>([&](auto f) {
    constexpr int F = decltype(f)::value;
    power[2 * F] = power[2 * F + 1] = 1.0f / (1 << in_place_bit(BITS, F));
  });
  return Powers{{V::load(power), V::load(power + 16)}};
}

Powers powers(int bits) {
  return bits == 2 ? in_place_powers<2>() : bits == 3 ? in_place_powers<3>() : in_place_powers<4>();
}

// Rows of x as packed[tile][pair of inputs][virtual row], and the sums of virtual rows over groups.
void prepare_bf16(const Job& job, int64_t begin, int64_t end) {
  const Format& f = job.format;
  const int64_t depth = f.blocks * kDepth, pairs = depth / 2;
  const int64_t per = kTile / job.pieces;
  const Powers power = powers(f.bits);
  // without zero points, the table begins with minus the one of all groups
  const float zero = f.zero ? 0.0f : -reinterpret_cast<const float*>(job.blob)[0];
  for (int64_t t = begin; t < end; ++t) {
    const int n = tile_rows(job, t);
    if (job.bases) memset(job.bases + t * kTile * f.groups, 0, sizeof(float) * n * f.groups);
    uint32_t* out = static_cast<uint32_t*>(job.packed) + t * kTile * pairs;
    float* sums = job.sums ? job.sums + t * kTile * f.groups : nullptr;
    if (sums) memset(sums, 0, sizeof(float) * n * f.groups);
    for (int m = 0; m < n; m += job.pieces) {
      const int64_t row = (t * per + m / job.pieces) * job.x_stride;
      for (int64_t k = 0; k < depth; k += kUnit) {
        const int64_t left = f.columns - k;
        __m512 rest;
        if (left >= kUnit) {
          rest = V::read(job.x, job.dtype, row + k);
        } else {
          const int width = job.dtype == kF32 ? 4 : 2;
          uint8_t last[kUnit * 4] = {};
          if (left > 0)
            memcpy(last, static_cast<const uint8_t*>(job.x) + (row + k) * width, left * width);
          rest = V::read(last, job.dtype, 0);
        }
        if (job.bases) {
          const __m512 small = _mm512_mul_ps(rest, power.of[k / kUnit & 1]);
          if (k / f.group < f.groups)
            job.bases[t * kTile * f.groups + k / f.group * n + m] +=
                V::sum(V::fma(V::set(zero), rest, V::mul(V::set(128.0f), small)));
          if (sums && k / f.group < f.groups) sums[k / f.group * n + m] += V::sum(rest);
          rest = small;
        }
        for (int p = 0; p < job.pieces; ++p) {
          const __m256i half = __m256i(_mm512_cvtneps_pbh(rest));
          const __m512 piece = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
          // infinity is one piece: what is left of it would be no number
          const __mmask16 whole = _mm512_fpclass_ps_mask(piece, 0x18);
          rest = _mm512_maskz_sub_ps(__mmask16(~whole), rest, piece);
          alignas(32) uint32_t eight[8];
          _mm256_store_si256(reinterpret_cast<__m256i*>(eight), half);
          for (int i = 0; i < 8; ++i) out[(k / 2 + i) * n + m + p] = eight[i];
          if (sums && !job.bases && k / f.group < f.groups)
            sums[k / f.group * n + m + p] += V::sum(piece);
        }
      }
    }
  }
}

}  // namespace

static constexpr Steps kSteps = {widen<V>,  float_product<V, DotsOfPairs>, norm<V>,
                                 attend<V>, pair<V>,                       turn<V>};

extern const Kernels kAvx512Bf16 = {"avx512_bf16", {3, 2, 1}, 4, kInPlaceRows,
                                    prepare_bf16,  multiply_bf16, expand_avx512, read_all<V>,
                                    &kSteps};

}  // namespace ar
