// Products by bytes, four at a time into sums of 32 bits (AVX512 with VNNI).
#include "v512.h"

#include "digits.h"

namespace ar {
namespace {

struct Vnni {
  using V = V512;
  using I = __m512i;
  static constexpr int kTogether = 4;  // vectors of features
  static constexpr bool kPairs = false;

  struct Inputs {
    I high, low;
  };
  struct Total {
    I high, low;
  };
  struct Sums : Total {
    void begin(const Total& total) { Total::operator=(total); }
    AR_INLINE void add(I codes, const Inputs& x) {
      high = _mm512_dpbusd_epi32(high, codes, x.high);
      low = _mm512_dpbusd_epi32(low, codes, x.low);
    }
    AR_INLINE void close(Total* total) { *total = *this; }
  };
  static void clear(Total* total) { total->high = total->low = _mm512_setzero_si512(); }
  static AR_INLINE V::F floats(const Total& total) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(total.high, 8), total.low));
  }

  static AR_INLINE I table(const uint8_t* sixteen) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static AR_INLINE I look_up(I table, I codes) { return _mm512_shuffle_epi8(table, codes); }
  static AR_INLINE I load(const uint8_t* p) {
    I v = _mm512_loadu_si512(p);
    V::pin(&v);
    return v;
  }
  static AR_INLINE I keep(I v, int mask) {
    return _mm512_and_si512(v, _mm512_set1_epi16(short(mask)));
  }
  // a, and of b what the mask has
  static AR_INLINE I with(I a, I b, int mask) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi16(short(mask)), 0xf8);
  }
  template <int N>
  static AR_INLINE I right(I v) {
    return N ? _mm512_srli_epi16(v, N) : v;
  }
  template <int N>
  static AR_INLINE I left(I v) {
    return _mm512_slli_epi16(v, N);
  }
  static AR_INLINE I quad(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }

  static AR_INLINE Inputs inputs(const uint8_t* p) { return Inputs{quad(p), quad(p + kDepth)}; }

  static AR_INLINE void split(const int16_t* number, const Order& order, uint8_t* out) {
    const I all = _mm512_permutexvar_epi16(_mm512_load_si512(order.from),
                                           _mm512_load_si512(number));
    const I high = _mm512_srai_epi16(_mm512_add_epi16(all, _mm512_set1_epi16(128)), 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kDepth), _mm512_cvtepi16_epi8(all));
  }
};

}  // namespace

extern const ByDigits kDigitsVnni = {prepare_digits<Vnni>, multiply_digits<Vnni>};

}  // namespace ar
