// Products of bf16 pairs, summed in float32 (AVX512-BF16 and VBMI).
//
// Every code is a whole number or a small float that bf16 holds exactly, so a table turns codes
// into weights and the scale meets the float32 sum of its group. A row of fp16 or fp32 is two or
// three rows of bf16 that add up to it exactly; they share the decoding.
//
// For a row or two of bf16 (one of 2 and 3 bits is for digits.h), integers of up to 6 bits are read
// in place: with the upper bits of 128.0 around it, a code at bit r of a lane is the number
// 128 + 2^r * code, one operation away. Inputs are divided by 2^r beforehand, and what the 128 add is
// subtracted from the sum of each group.
//
// For many rows, the weights of two blocks are decoded in registers for the rows of two tiles: the
// lookups run beside the products, where a panel in memory would wait for them and be read again.
#include "compact_bf16.h"
#include "dots_bf16.h"
#include "rows_bf16.h"

namespace ar {
namespace {

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
      if constexpr (BITS <= 6 && ROWS <= kInPlaceRows)
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

// 16 inputs of a row from k on, zeros behind the last.
AR_INLINE __m512 inputs_at(const Job& job, int64_t row, int64_t k) {
  const int64_t left = job.format.columns - k;
  if (left >= kUnit) return V::read(job.x, job.dtype, row + k);
  const int width = job.dtype == kF32 ? 4 : 2;
  uint8_t last[kUnit * 4] = {};
  if (left > 0)
    memcpy(last, static_cast<const uint8_t*>(job.x) + (row + k) * width, left * width);
  return V::read(last, job.dtype, 0);
}

AR_INLINE __m256i as_bf16(__m512 v) { return __m256i(_mm512_cvtneps_pbh(v)); }

// Eight pairs of inputs, `n` places apart.
AR_INLINE void put_pairs(__m256i pairs, int n, uint32_t* out) {
  if (n == 1) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pairs);
  alignas(32) uint32_t eight[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(eight), pairs);
  for (int i = 0; i < 8; ++i) out[i * n] = eight[i];
}

// A row of bf16 as virtual row m of n, for codes read in place where `bases` is given.
void prepare_one(const Job& job, int64_t row, int n, int m, const Powers& power, uint32_t* out,
                 float* sums, float* bases) {
  const Format& f = job.format;
  const int64_t depth = f.blocks * kDepth, group = f.group ? f.group : depth;
  // without zero points, the table begins with minus the one of all groups
  const __m512 zero = V::set(f.zero ? 0.0f : -reinterpret_cast<const float*>(job.blob)[0]);
  for (int64_t begin = 0, g = 0; begin < depth; begin += group, ++g) {
    __m512 sum = V::zero(), base = V::zero();
    const int64_t end = begin + group < depth ? begin + group : depth;
    for (int64_t k = begin; k < end; k += kUnit) {
      __m512 x = inputs_at(job, row, k);
      sum = V::add(sum, x);
      if (bases) {
        const __m512 small = V::mul(x, power.of[k / kUnit & 1]);
        base = V::fma(zero, x, V::fma(V::set(128.0f), small, base));
        x = small;
      }
      put_pairs(as_bf16(x), n, out + k / 2 * n + m);
    }
    if (g >= f.groups) continue;  // zeros behind the last input
    if (sums) sums[g * n + m] = V::sum(sum);
    if (bases) bases[g * n + m] = V::sum(base);
  }
}

// A row as several virtual rows from m of n on, that add up to it.
void prepare_pieces(const Job& job, int64_t row, int n, int m, uint32_t* out, float* sums) {
  const Format& f = job.format;
  for (int64_t k = 0; k < f.blocks * kDepth; k += kUnit) {
    __m512 rest = inputs_at(job, row, k);
    for (int p = 0; p < job.pieces; ++p) {
      const __m256i half = as_bf16(rest);
      const __m512 piece = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      // infinity is one piece: what is left of it would be no number
      const __mmask16 whole = _mm512_fpclass_ps_mask(piece, 0x18);
      rest = _mm512_maskz_sub_ps(__mmask16(~whole), rest, piece);
      put_pairs(half, n, out + k / 2 * n + m + p);
      if (sums && k / f.group < f.groups) sums[k / f.group * n + m + p] += V::sum(piece);
    }
  }
}

// Rows of x as packed[tile][pair of inputs][virtual row], and the sums of virtual rows over groups.
void prepare_bf16(const Job& job, int64_t begin, int64_t end) {
  const Format& f = job.format;
  const int64_t pairs = f.blocks * kDepth / 2;
  const int64_t per = kTile / job.pieces;
  const Powers power = powers(f.bits);
  for (int64_t t = begin; t < end; ++t) {
    const int n = tile_rows(job, t);
    uint32_t* out = static_cast<uint32_t*>(job.packed) + t * kTile * pairs;
    float* sums = job.sums ? job.sums + t * kTile * f.groups : nullptr;
    float* bases = job.bases ? job.bases + t * kTile * f.groups : nullptr;
    if (sums) memset(sums, 0, sizeof(float) * n * f.groups);
    for (int m = 0; m < n; m += job.pieces) {
      const int64_t row = (t * per + m / job.pieces) * job.x_stride;
      if (job.pieces == 1) prepare_one(job, row, n, m, power, out, sums, bases);
      else prepare_pieces(job, row, n, m, out, sums);
    }
  }
}

}  // namespace

// Codes of 4 bits are read as fast in place, and inputs stay what they are.
static constexpr int kDigitBits = 3;

static constexpr ByCompact kCompact = {compact_padded, compact_product<CompactPairs>};

static constexpr Steps kSteps = {widen<V>,  float_product<V, DotsOfPairs>, norm<V>,
                                 attend<V>, pair<V>,                       turn<V>,
                                 &kCompact};

extern const Kernels kAvx512Bf16 = {"avx512_bf16", {3, 2, 1}, 4, kInPlaceRows, kDigitBits, 1, &kDigitsVnni, nullptr,
                                    prepare_bf16,  multiply_bf16, expand_avx512, read_all<V>,
                                    &kSteps};

}  // namespace ar
