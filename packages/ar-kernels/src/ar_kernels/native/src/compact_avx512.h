// The bytes of compact weights by AVX512.
#pragma once
#include "v512.h"

#include "compact_product.h"

namespace ar {
namespace {

struct Bytes512 {
  using V = V512;
  using I = __m512i;

  static AR_INLINE I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static AR_INLINE I table(const uint8_t* sixteen) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static AR_INLINE I look_up(I table, I codes) { return _mm512_shuffle_epi8(table, codes); }
  // low (0) or high (1) halves of bytes
  template <int HALF>
  static AR_INLINE I four(I v) {
    return _mm512_and_si512(HALF ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
  }
  // a, and of b what the mask has
  static AR_INLINE I with(I a, I b, int mask) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(char(mask)), 0xf8);
  }
  static AR_INLINE I first(I low, I high) { return _mm512_unpacklo_epi8(low, high); }
  static AR_INLINE I second(I low, I high) { return _mm512_unpackhi_epi8(low, high); }
  static AR_INLINE V::F low_halves(I v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static AR_INLINE V::F high_halves(I v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
  }
};

}  // namespace
}  // namespace ar
