// The bytes of compact weights by AVX2.
#pragma once
#include "v256.h"

#include "compact_product.h"

namespace ar {
namespace {

struct Bytes256 {
  using V = V256;
  using I = __m256i;

  static AR_INLINE I load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static AR_INLINE I table(const uint8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static AR_INLINE I look_up(I table, I codes) { return _mm256_shuffle_epi8(table, codes); }
  // low (0) or high (1) halves of bytes
  template <int HALF>
  static AR_INLINE I four(I v) {
    return _mm256_and_si256(HALF ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
  }
  // a, and of b what the mask has
  static AR_INLINE I with(I a, I b, int mask) {
    return _mm256_or_si256(a, _mm256_and_si256(b, _mm256_set1_epi8(char(mask))));
  }
  static AR_INLINE I first(I low, I high) { return _mm256_unpacklo_epi8(low, high); }
  static AR_INLINE I second(I low, I high) { return _mm256_unpackhi_epi8(low, high); }
  static AR_INLINE V::F low_halves(I v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static AR_INLINE V::F high_halves(I v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))));
  }
};

}  // namespace
}  // namespace ar
