// Codes as bytes, and inputs as two bytes each (AVX512 with VNNI): see kernel_digits.cpp.
//
// The inputs of a block of 32 lie as 8 quads of high bytes and then 8 of low ones, in the order in
// which masks find their codes: a quad's bytes belong to the low and high byte of the lane of the
// even input, then to those of the odd one (see Place).
#pragma once
#include "common.h"
#include "fetch.h"
#include "v512.h"

namespace ar {
namespace {

constexpr int kQuads = 8;  // of a block

// The field whose code is byte 0 or 1 (within a lane) of a quad.
constexpr int field_of(int bits, int quad, int byte) {
  if (bits == 2) return 8 * (quad / 4) + quad % 4 + 4 * byte;
  if (bits == 4) return 4 * (quad / 2) + quad % 2 + 2 * byte;
  // 3 bits, five fields to a register: 0 and 3, 1 and 4 by masks; 2 of three registers by shifts
  if (quad < 6) return 5 * (quad / 2) + quad % 2 + 3 * byte;
  return quad == 6 ? 2 + 5 * byte : byte ? 15 : 12;
}

// Codes of 3 bits in the upper byte of a lane are a bit higher up than those in the lower one: their
// inputs are halved.
constexpr bool is_halved(int bits, int quad, int byte) { return bits == 3 && quad < 6 && byte; }

// Where the 32 inputs of a block go, and which of them, in their own order, are halved.
struct Order {
  alignas(64) uint16_t from[32];
  uint32_t halved;
};

template <int BITS>
constexpr Order order() {
  Order out{};
  for (int i = 0; i < 32; ++i) {
    const int quad = i / 4, byte = i & 1, odd = i >> 1 & 1;
    const int input = 2 * field_of(BITS, quad, byte) + odd;
    out.from[i] = uint16_t(input);
    if (is_halved(BITS, quad, byte)) out.halved |= 1u << input;
  }
  return out;
}

template <int BITS>
constexpr Order kOrder = order<BITS>();

// The inputs of block `b`, zeros behind the last.
AR_INLINE __m512i inputs(const uint16_t* x, int64_t columns, int64_t b) {
  const int64_t left = columns - b * kDepth;
  if (left >= kDepth) return _mm512_loadu_si512(x + b * kDepth);
  return _mm512_maskz_loadu_epi16(left > 0 ? (1u << left) - 1 : 0, x + b * kDepth);
}

AR_INLINE __m512i absolute() { return _mm512_set1_epi16(0x7fff); }

struct Unit {
  float size, inverse;
};

// The unit in which the largest of some bf16 magnitudes has 15 bits. It is no number where one of
// them is none, or infinite.
AR_INLINE Unit unit_of(__m512i magnitudes) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(magnitudes),
                                        _mm512_extracti64x4_epi64(magnitudes, 1));
  const __m128i quarter =
      _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // there is a smallest of eight, so the largest is the complement of the complements' smallest
  const __m128i ones = _mm_set1_epi32(-1);
  const int least = _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0);
  const uint32_t most = 0xffffu & ~uint32_t(least);
  if (most >= 0x7f80) {
    const float none = __builtin_nanf("");
    return Unit{none, none};
  }
  const uint32_t exponent = most >> 7 > 30 ? most >> 7 : 30;  // the inverse must be finite
  const uint32_t size = (exponent - 14) << 23, inverse = (268 - exponent) << 23;
  Unit out;
  memcpy(&out.size, &size, 4);
  memcpy(&out.inverse, &inverse, 4);
  return out;
}

// Sixteen inputs as whole numbers; halved ones are even.
AR_INLINE __m512i whole(__m256i x, __m512 inverse) {
  const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  // 255/128 * 2^14 would be 127.5 * 256
  return _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(wide, inverse)),
                          _mm512_set1_epi32(32639));
}

// Writes the bytes of a block's inputs and returns sums of what they stand for.
template <int BITS>
AR_INLINE __m512i split(__m512i x, float inverse, uint8_t* out) {
  constexpr uint32_t halved = kOrder<BITS>.halved;
  const __m512 one = _mm512_set1_ps(inverse), half = _mm512_set1_ps(0.5f * inverse);
  const __m512i low = whole(_mm512_castsi512_si256(x), _mm512_mask_mov_ps(one, halved & 0xffff, half));
  const __m512i high =
      whole(_mm512_extracti64x4_epi64(x, 1), _mm512_mask_mov_ps(one, halved >> 16, half));
  const __m512i sum =
      _mm512_add_epi32(_mm512_mask_add_epi32(low, halved & 0xffff, low, low),
                       _mm512_mask_add_epi32(high, halved >> 16, high, high));
  const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)),
                                         _mm512_cvtepi32_epi16(high), 1);
  const __m512i ordered =
      _mm512_permutexvar_epi16(_mm512_load_si512(kOrder<BITS>.from), all);
  const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(ordered, _mm512_set1_epi16(128)), 8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(upper));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), _mm512_cvtepi16_epi8(ordered));
  return sum;
}

// Sums of a segment for 64 features: of codes at the bottom of their bytes, and of those above,
// which count 2^bits times as much.
struct Sums {
  __m512i high[4][2], low[4][2];
};

AR_INLINE __m512i quad(const uint8_t* x, int i) {
  int32_t four;
  memcpy(&four, x + 4 * i, 4);
  return _mm512_set1_epi32(four);
}

AR_INLINE __m512i keep(__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi16(short(mask))); }

// a, and of b what the mask has.
AR_INLINE __m512i with(__m512i a, __m512i b, int mask) {
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi16(short(mask)), 0xf8);
}

// The bytes of quad Q of a block of codes.
template <int BITS, int Q>
AR_INLINE __m512i bytes(const uint8_t* block) {
  const auto reg = [&](int r) AR_FORCED { return _mm512_loadu_si512(block + 64 * r); };
  if constexpr (BITS == 4) {
    return keep(reg(Q / 2), Q & 1 ? 0xf0f0 : 0x0f0f);
  } else if constexpr (BITS == 2) {
    const __m512i v = Q & 2 ? _mm512_srli_epi16(reg(Q / 4), 4) : reg(Q / 4);
    return keep(v, Q & 1 ? 0x0c0c : 0x0303);
  } else if constexpr (Q < 6) {
    return keep(reg(Q / 2), Q & 1 ? 0x7038 : 0x0e07);
  } else if constexpr (Q == 6) {
    return with(keep(_mm512_srli_epi16(reg(0), 6), 7), _mm512_slli_epi16(reg(1), 2), 0x0700);
  } else {
    __m512i out = keep(_mm512_srli_epi16(reg(2), 6), 7);
    out = with(out, _mm512_srli_epi16(reg(0), 7), 0x0100);
    out = with(out, _mm512_srli_epi16(reg(1), 6), 0x0200);
    return with(out, _mm512_srli_epi16(reg(2), 5), 0x0400);
  }
}

// Adds the products of a strip's block of codes and of inputs.
template <int BITS>
AR_INLINE void add_block(const uint8_t* codes, const uint8_t* x, Sums* acc) {
  unrolled<0, kQuads>([&](auto q) AR_FORCED {
    constexpr int Q = decltype(q)::value, P = BITS == 3 && Q >= 6 ? 0 : Q % 2;
    const __m512i high = quad(x, Q), low = quad(x, kQuads + Q);
    unrolled<0, 4>([&](auto block) AR_FORCED {
      constexpr int C = decltype(block)::value;
      fetch<BITS, 32, 4 * Q + C>(codes);
      const __m512i w = bytes<BITS, Q>(codes + C * 64 * BITS);
      acc->high[C][P] = _mm512_dpbusd_epi32(acc->high[C][P], w, high);
      acc->low[C][P] = _mm512_dpbusd_epi32(acc->low[C][P], w, low);
    });
  });
}

// sums[feature] += scale * (sum of a segment - zero * sum of its inputs).
template <int BITS>
AR_INLINE void add_segment(const Record& rec, int64_t group, const Digits& x, float first,
                           const Sums& acc, float* sums) {
  const __m512 size = _mm512_set1_ps(x.size), all = _mm512_set1_ps(x.sum);
  for (int c = 0; c < 4; ++c) {
    const auto sum = [&](int part) AR_FORCED {
      return _mm512_add_epi32(_mm512_slli_epi32(acc.high[c][part], 8), acc.low[c][part]);
    };
    const __m512i total = _mm512_add_epi32(sum(0), _mm512_srai_epi32(sum(1), BITS));
    const int64_t at = group * kStrip + c * kBlock;
    __m512 zero = _mm512_set1_ps(rec.zero_bias - first);
    if (rec.zeros) zero = _mm512_add_ps(zero, V512::bytes_as_floats(rec.zeros + at));
    const __m512 scale = _mm512_mul_ps(V512::scales(rec.scale, rec.scales + at * rec.width), size);
    const __m512 value = _mm512_fnmadd_ps(zero, all, _mm512_cvtepi32_ps(total));
    float* out = sums + c * kBlock;
    _mm512_store_ps(out, _mm512_fmadd_ps(scale, value, _mm512_load_ps(out)));
  }
}

}  // namespace
}  // namespace ar
