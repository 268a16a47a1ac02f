// Vectors of 16 floats (AVX512 F, BW, DQ, VL). Everything is local to the including file: templates
// shared by files with other machine flags would be merged by the linker.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "format.h"

namespace ar {
namespace {

struct V512 {
  static constexpr int N = 16;
  static constexpr bool kHasPairs = false;
  static constexpr int kBlocksAtOnce(int) { return 4; }
  using F = __m512;
  using I = __m512i;

  struct Tables { __m512 t[4]; const float* values; };

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }

  // Keeps what was loaded in a register: compilers read memory at each use, and loads are dear.
  static void pin([[maybe_unused]] I* v) {
#ifndef AR_EMULATED
    asm volatile("" : "+v"(*v));
#endif
  }

  static float sum(F v) { return _mm512_reduce_add_ps(v); }

  // 16 values of a type, as floats
  static F read(const void* p, int dtype, int64_t at) {
    if (dtype == kF32) return load(static_cast<const float*>(p) + at);
    const void* q = static_cast<const uint16_t*>(p) + at;
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(q));
    if (dtype == kF16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }

  static __m256i to_bf16(F v) {
    const I u = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }

  static void write(void* p, int dtype, int64_t at, F v) {
    if (dtype == kF32) return store(static_cast<float*>(p) + at, v);
    void* q = static_cast<uint16_t*>(p) + at;
    const __m256i h = dtype == kF16 ? _mm512_cvtps_ph(v, 0) : to_bf16(v);
    _mm256_storeu_si256(static_cast<__m256i*>(q), h);
  }

  // 16 group scales
  static F scales(int kind, const uint8_t* p) {
    if (kind == kScaleF16) return read(p, kF16, 0);
    if (kind == kScaleF32) return read(p, kF32, 0);
    if (kind == kScaleBF16) return read(p, kBF16, 0);
    if (kind == kScaleNone) return set(1.0f);
    const I v = bytes(p);
    if (kind == kScaleE8M0) {  // 2^-127 is a subnormal float
      const I bits = _mm512_max_epi32(_mm512_slli_epi32(v, 23), _mm512_set1_epi32(0x400000));
      return _mm512_castsi512_ps(bits);
    }
    return kind == kScaleE4M3 ? small<7>(v) : small<15>(v);
  }

  static F bytes_as_floats(const uint8_t* p) { return _mm512_cvtepi32_ps(bytes(p)); }

  static void tables(const float* values, Tables* t) {
    t->values = values;
    for (int i = 0; i < 4; ++i) t->t[i] = load(values + 16 * i);
  }

  // The words of features 16 * block + N * part ... of a register of a block.
  static I words(const uint8_t* reg, int) { return _mm512_loadu_si512(reg); }
  static I shift(I v, int n) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n)); }
  static I shift_up(I v, int n) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(n)); }
  static I keep(I v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi32(mask)); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }

  // The codes of 8 bits of one field and parity, one in each lane.
  static I codes8(const uint8_t* reg, int, int odd_field, int parity) {
    const int b = 8 * odd_field + parity;
    const __m128i one = _mm_setr_epi8(char(b), -1, -1, -1, char(b + 2), -1, -1, -1, char(b + 4),
                                      -1, -1, -1, char(b + 6), -1, -1, -1);
    return _mm512_shuffle_epi8(_mm512_loadu_si512(reg), _mm512_broadcast_i32x4(one));
  }

  // The values of codes; bits above those of the code may be anything, except for 8 bits.
  template <int BITS, int KIND>
  static F lookup(I v, const Tables& t) {
    if constexpr (BITS <= 4) {
      return _mm512_permutexvar_ps(v, t.t[0]);  // narrow tables are repeated
    } else if constexpr (BITS == 5) {
      return _mm512_permutex2var_ps(t.t[0], v, t.t[1]);
    } else if constexpr (BITS == 6) {
      const __mmask16 high = _mm512_test_epi32_mask(v, _mm512_set1_epi32(32));
      const F low = _mm512_permutex2var_ps(t.t[0], v, t.t[1]);
      return _mm512_mask_blend_ps(high, low, _mm512_permutex2var_ps(t.t[2], v, t.t[3]));
    } else {
      const I magnitude = keep(v, 0x7f);
      F out;
      if constexpr (KIND == kInteger) {
        out = add(_mm512_cvtepi32_ps(magnitude), set(0.5f));
      } else if constexpr (KIND == kE4M3) {
        out = small<7>(magnitude);
      } else {
        out = _mm512_i32gather_ps(magnitude, t.values, 4);
      }
      const I sign = _mm512_slli_epi32(keep(v, 0x80), 24);
      return _mm512_castsi512_ps(either(_mm512_castps_si512(out), sign));
    }
  }

 private:
  static I bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // Non-negative floats of three bits of mantissa. Not by way of subnormal floats, which a
  // processor may be told to treat as zero.
  template <int BIAS>
  static F small(I v) {
    const I bits = _mm512_add_epi32(_mm512_slli_epi32(v, 20), _mm512_set1_epi32((127 - BIAS) << 23));
    const F normal = _mm512_castsi512_ps(bits);
    const __mmask16 low = _mm512_cmplt_epi32_mask(v, _mm512_set1_epi32(8));
    const F unit = set(BIAS == 7 ? 0x1p-9f : 0x1p-17f);
    return _mm512_mask_mul_ps(normal, low, _mm512_cvtepi32_ps(v), unit);
  }
};

}  // namespace
}  // namespace ar
