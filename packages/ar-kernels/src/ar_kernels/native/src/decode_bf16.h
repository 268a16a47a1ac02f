// Codes become pairs of bf16 weights in registers (AVX512 with VBMI): by a table, or read in place.
#pragma once
#include "v512.h"

namespace ar {
namespace {

using V = V512;

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

// The register of codes that holds a field which is not spread.
constexpr int register_of(int bits, int field) { return bits == 8 ? field / 2 : place(bits, field).reg; }

// The register of codes of field F, which stays that of the fields before where they share it.
template <int BITS, int F, int BEGIN>
AR_INLINE void next_line(const uint8_t* block, __m512i* line) {
  constexpr bool is_first = F == BEGIN || register_of(BITS, F) != register_of(BITS, F - 1);
  if constexpr (!is_spread(BITS, F) && is_first) {
    *line = load(block + kRegister * register_of(BITS, F));
    V512::pin(line);
  }
}

// Lanes with a field of fewer than 8 bits at their bottom, anything above.
template <int BITS, int F>
AR_INLINE __m512i lanes(const uint8_t* block, __m512i line) {
  if constexpr (!is_spread(BITS, F)) {
    return _mm512_srli_epi16(line, place(BITS, F).shift);
  } else if constexpr (BITS == 6) {
    constexpr int i = F - whole_fields(6);
    const __m512i low = _mm512_srli_epi16(load(block + kRegister * i), 12);
    const __m512i other = load(block + kRegister * (4 + i / 2));
    const __m512i high = _mm512_srli_epi16(other, i & 1 ? 10 : 8);
    return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(0x0f), 0xe4);  // c ? a : b
  } else {
    __m512i out = _mm512_srli_epi16(load(block), 15);
    unrolled<1, BITS>([&](auto j) {
      constexpr int bit = decltype(j)::value;
      const __m512i one = _mm512_srli_epi16(load(block + kRegister * bit), 15 - bit);
      out = _mm512_ternarylogic_epi32(out, one, _mm512_set1_epi16(1 << bit), 0xf8);  // a | b & c
    });
    return out;
  }
}

// The weights of a field: pairs of inputs for 16 features.
template <int BITS, int F>
AR_INLINE __m512bh weights(const uint8_t* block, __m512i line, const Tables& t) {
  if constexpr (BITS <= 5) {
    return __m512bh(_mm512_permutexvar_epi16(lanes<BITS, F>(block, line), t.t[0]));
  } else if constexpr (BITS == 6) {
    return __m512bh(_mm512_permutex2var_epi16(t.t[0], lanes<BITS, F>(block, line), t.t[1]));
  } else {
    const __m512i low = _mm512_permutex2var_epi8(t.t[0], line, t.t[1]);
    __m512i high = _mm512_permutex2var_epi8(t.t[2], line, t.t[3]);
    high = _mm512_ternarylogic_epi32(high, line, _mm512_set1_epi8(char(0x80)), 0xf8);
    return __m512bh(F & 1 ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high));
  }
}

template <int BITS, int F>
AR_INLINE __m512bh weights(const uint8_t* block, const Tables& t) {
  __m512i line = _mm512_setzero_si512();
  if constexpr (!is_spread(BITS, F)) line = load(block + kRegister * register_of(BITS, F));
  return weights<BITS, F>(block, line, t);
}

// How far a field's lanes are shifted before its code is read in place, and the bit where it then
// begins: it must end below bit 7, and fields share shifts where they can.
constexpr int in_place_shift(int bits, int field) {
  if (is_spread(bits, field)) return 0;
  const int at = place(bits, field).shift;
  return bits >= 4 ? at : at / 6 * 6;
}

constexpr int in_place_bit(int bits, int field) {
  return is_spread(bits, field) ? 0 : place(bits, field).shift - in_place_shift(bits, field);
}

template <int BITS, int F>
AR_INLINE __m512bh in_place(const uint8_t* block, __m512i line) {
  constexpr int shift = in_place_shift(BITS, F), bit = in_place_bit(BITS, F);
  __m512i v = line;
  if constexpr (is_spread(BITS, F)) v = lanes<BITS, F>(block, line);
  if constexpr (shift > 0) v = _mm512_srli_epi16(v, shift);
  const __m512i mask = _mm512_set1_epi16(short(((1 << BITS) - 1) << bit));
  return __m512bh(_mm512_ternarylogic_epi32(v, mask, _mm512_set1_epi16(0x4300), 0xea));
}

AR_INLINE __m512 dot(__m512 acc, __m512bh w, uint32_t pair) {
  return _mm512_dpbf16_ps(acc, w, __m512bh(_mm512_set1_epi32(int(pair))));
}

}  // namespace
}  // namespace ar
