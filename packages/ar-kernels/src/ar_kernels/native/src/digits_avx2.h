// Products by bytes by AVX2: pairs into sums of 16 bits, and a block's sums into 32. Codes of 5 bits
// and more become words, and pairs of their products sums of 32.
#pragma once
#include "v256.h"

#include "digits.h"
#include "kernel_simd.h"

namespace ar {
namespace {

struct Pairs {
  using V = V256;
  using I = __m256i;
  using Total = I;
  static constexpr int kTogether = 2;    // vectors of features: 16 registers hold no more
  static constexpr bool kPairs = true;   // of rows, too

  struct Inputs {
    I high, low;
  };

  // Eight products of a code (at most 15, or 14 and 7) and a byte fit in 16 bits, twice over.
  struct Sums {
    I high, low;
    void begin(const Total&) { high = low = _mm256_setzero_si256(); }
    AR_INLINE void add(I codes, const Inputs& x) {
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes, x.high));
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes, x.low));
      V::pin(&high);  // or compilers add at the end, and what waits goes to memory
      V::pin(&low);
    }
    AR_INLINE void close(Total* total) {
      const I sum = _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                                     _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
      *total = _mm256_add_epi32(*total, sum);
      high = low = _mm256_setzero_si256();
    }
  };
  static void clear(Total* total) { *total = _mm256_setzero_si256(); }
  static AR_INLINE V::F floats(const Total& total) { return _mm256_cvtepi32_ps(total); }

  static AR_INLINE I table(const uint8_t* sixteen) {
    const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen));
    return _mm256_broadcastsi128_si256(one);
  }
  static AR_INLINE I look_up(I table, I codes) { return _mm256_shuffle_epi8(table, codes); }

  static AR_INLINE I load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const I*>(p));
  }
  static AR_INLINE I keep(I v, int mask) {
    return _mm256_and_si256(v, _mm256_set1_epi16(short(mask)));
  }
  static AR_INLINE I with(I a, I b, int mask) { return _mm256_or_si256(a, keep(b, mask)); }
  template <int N>
  static AR_INLINE I right(I v) {
    return N ? _mm256_srli_epi16(v, N) : v;
  }
  template <int N>
  static AR_INLINE I left(I v) {
    return _mm256_slli_epi16(v, N);
  }
  static AR_INLINE I quad(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static AR_INLINE Inputs inputs(const uint8_t* p) { return Inputs{quad(p), quad(p + kDepth)}; }

  static AR_INLINE void split(const int16_t* number, const Order& order, uint8_t* out) {
    for (int i = 0; i < kDepth; ++i) {
      const int n = number[order.from[i]];
      out[i] = uint8_t((n + 128) >> 8);
      out[kDepth + i] = uint8_t(n);
    }
  }
};

struct Words {
  using V = V256;
  using I = __m256i;
  using Total = I;
  static constexpr int kTogether = 2;
  static constexpr bool kPairs = true;

  struct Inputs {
    I pair;
  };
  struct Sums {
    I sum;
    void begin(const Total& total) { sum = total; }
    AR_INLINE void add(I codes, const Inputs& x) {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x.pair));
      V::pin(&sum);
    }
    AR_INLINE void close(Total* total) { *total = sum; }
  };
  static void clear(Total* total) { *total = _mm256_setzero_si256(); }
  static AR_INLINE V::F floats(const Total& total) { return _mm256_cvtepi32_ps(total); }

  // A register has 16 bytes for four features: two neighbouring inputs of each, then the two behind
  // them. Unpacked, 32 are two inputs of 8 features, twice. Stored is a sign and how far from it: c
  // for c >= 0, -1 - c below.
  static AR_INLINE I load(const uint8_t* p) { return Pairs::load(p); }
  template <int SECOND>
  static AR_INLINE I words(I codes) {
    const I negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), codes);
    const I c = _mm256_xor_si256(codes, _mm256_and_si256(negative, _mm256_set1_epi8(0x7f)));
    return SECOND ? _mm256_unpackhi_epi8(c, negative) : _mm256_unpacklo_epi8(c, negative);
  }
  // Of fewer bits, a field has two neighbouring inputs of each feature as it lies.
  template <int BITS, int FIELD>
  static AR_INLINE I field_words(const uint8_t* block) {
    constexpr int mask = (1 << BITS) - 1;
    return V::keep(field<V, BITS, FIELD>(block, 0), mask << 16 | mask);
  }
  static AR_INLINE Inputs inputs(const uint8_t* p) { return Inputs{Pairs::quad(p)}; }
  static void split(const int16_t* number, const Order&, uint8_t* out) {
    memcpy(out, number, 2 * kDepth);
  }
};

}  // namespace
}  // namespace ar
