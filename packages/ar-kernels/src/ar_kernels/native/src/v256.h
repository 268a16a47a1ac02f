// Vectors of 8 floats (AVX2, FMA, F16C); the same operations as v512.h.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "format.h"

namespace ar {
namespace {

struct V256 {
  static constexpr int N = 8;
  static constexpr bool kHasPairs = true;  // `e4m3` for two inputs at once
  static constexpr int kBlocksAtOnce(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
  using F = __m256;
  using I = __m256i;

  struct Tables { __m256 t[2]; const float* values; };

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }

  // Has a value there, as it is, when the code says so: compilers order sums as they like.
  static void pin(I* v) { asm volatile("" : "+x"(*v)); }

  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static F read(const void* p, int dtype, int64_t at) {
    if (dtype == kF32) return load(static_cast<const float*>(p) + at);
    const void* q = static_cast<const uint16_t*>(p) + at;
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(q));
    if (dtype == kF16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }

  static void write(void* p, int dtype, int64_t at, F v) {
    if (dtype == kF32) return store(static_cast<float*>(p) + at, v);
    void* q = static_cast<uint16_t*>(p) + at;
    const __m128i h = dtype == kF16 ? _mm256_cvtps_ph(v, 0) : to_bf16(v);
    _mm_storeu_si128(static_cast<__m128i*>(q), h);
  }

  static F scales(int kind, const uint8_t* p) {
    if (kind == kScaleF16) return read(p, kF16, 0);
    if (kind == kScaleF32) return read(p, kF32, 0);
    if (kind == kScaleBF16) return read(p, kBF16, 0);
    if (kind == kScaleNone) return set(1.0f);
    if (kind == kScaleE4M3) return e4m3(p);
    const I v = bytes(p);
    if (kind == kScaleE8M0) {
      const I bits = _mm256_max_epi32(_mm256_slli_epi32(v, 23), _mm256_set1_epi32(0x400000));
      return _mm256_castsi256_ps(bits);
    }
    return ue5m3(v);
  }

  static F bytes_as_floats(const uint8_t* p) { return _mm256_cvtepi32_ps(bytes(p)); }

  static void tables(const float* values, Tables* t) {
    t->values = values;
    for (int i = 0; i < 2; ++i) t->t[i] = load(values + 8 * i);
  }

  static I words(const uint8_t* reg, int part) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(reg + 32 * part));
  }
  static I shift(I v, int n) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(n)); }
  static I shift_up(I v, int n) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(n)); }
  static I keep(I v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi32(mask)); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }

  static I codes8(const uint8_t* reg, int part, int odd_field, int parity) {
    const int b = 8 * odd_field + parity;
    const __m128i one = _mm_setr_epi8(char(b), -1, -1, -1, char(b + 2), -1, -1, -1, char(b + 4),
                                      -1, -1, -1, char(b + 6), -1, -1, -1);
    return _mm256_shuffle_epi8(words(reg, part), _mm256_broadcastsi128_si256(one));
  }

  // The values of one field of E4M3, by way of fp16, which has them times 2^-8.
  static void e4m3(const uint8_t* reg, int part, int odd_field, F* even, F* odd) {
    const int b = 8 * odd_field;
    const __m128i one = _mm_setr_epi8(-1, char(b), -1, char(b + 2), -1, char(b + 4), -1, char(b + 6),
                                      -1, char(b + 1), -1, char(b + 3), -1, char(b + 5), -1,
                                      char(b + 7));
    const I all = _mm256_shuffle_epi8(words(reg, part), _mm256_broadcastsi128_si256(one));
    const I half = _mm256_permute4x64_epi64(halves(all), 0xd8);
    *even = mul(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), set(256.0f));
    *odd = mul(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), set(256.0f));
  }
  // fp16 with 2^-8 times the values of E4M3 in the upper bytes of words.
  static I halves(I v) {
    return _mm256_and_si256(_mm256_srai_epi16(v, 1), _mm256_set1_epi16(short(0xbfff)));
  }

  template <int BITS, int KIND>
  static F lookup(I v, const Tables& t) {
    if constexpr (BITS <= 3) {
      return _mm256_permutevar8x32_ps(t.t[0], v);
    } else if constexpr (BITS == 4) {
      const F low = _mm256_permutevar8x32_ps(t.t[0], v);
      const F high = _mm256_permutevar8x32_ps(t.t[1], v);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(v, 28)));
    } else if constexpr (BITS < 8) {
      return _mm256_i32gather_ps(t.values, keep(v, (1 << BITS) - 1), 4);
    } else {
      const I magnitude = keep(v, 0x7f);
      F out;
      if constexpr (KIND == kInteger) {
        out = add(_mm256_cvtepi32_ps(magnitude), set(0.5f));
      } else {
        out = _mm256_i32gather_ps(t.values, magnitude, 4);
      }
      const I sign = _mm256_slli_epi32(keep(v, 0x80), 24);
      return _mm256_castsi256_ps(either(_mm256_castps_si256(out), sign));
    }
  }

 private:
  static __m128i to_bf16(F v) {
    const I u = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    I up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    up = _mm256_srli_epi32(up, 16);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    const I pairs = _mm256_packus_epi32(up, up);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
  }

  static I bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  // E4M3 without signs.
  static F e4m3(const uint8_t* p) {
    const __m128i words = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return mul(_mm256_cvtph_ps(_mm_slli_epi16(words, 7)), set(256.0f));
  }

  // Not by way of subnormal floats, which a processor may be told to treat as zero.
  static F ue5m3(I v) {
    const I bits = _mm256_add_epi32(_mm256_slli_epi32(v, 20), _mm256_set1_epi32((127 - 15) << 23));
    const F low = mul(_mm256_cvtepi32_ps(v), set(0x1p-17f));
    const F is_low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), v));
    return _mm256_blendv_ps(_mm256_castsi256_ps(bits), low, is_low);
  }
};

}  // namespace
}  // namespace ar
