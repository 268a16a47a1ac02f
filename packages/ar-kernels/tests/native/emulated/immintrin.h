// The AVX512 operations that our kernels use, lane by lane, so that processors without AVX512 can
// check those kernels: found before the compiler's own header, which it includes. emulate.py uses it.
#pragma once
#include_next <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <type_traits>

#define AR_CALLED __attribute__((noinline)) inline  // or compiling takes minutes

namespace emulated {

template <class T>
struct Lanes {
  static constexpr int N = 64 / sizeof(T);
  T at[N];
};

template <class T, class V>
Lanes<T> in(V v) {
  static_assert(sizeof(V) == 64, "a whole register");
  Lanes<T> out;
  memcpy(&out, &v, 64);
  return out;
}

template <class V, class T>
V out(const T& lanes) {
  V v;
  static_assert(sizeof(V) == sizeof(T), "as many bytes");
  memcpy(&v, &lanes, sizeof(V));
  return v;
}

// fn(i) for every lane of type T.
template <class V, class T, class Fn>
V make(Fn fn) {
  Lanes<T> lanes;
  for (int i = 0; i < Lanes<T>::N; ++i) lanes.at[i] = T(fn(i));
  return out<V>(lanes);
}

template <class T, class V, class Fn>
V map(V a, Fn fn) {
  const auto x = in<T>(a);
  return make<V, T>([&](int i) { return fn(x.at[i]); });
}

template <class T, class V, class Fn>
V map(V a, V b, Fn fn) {
  const auto x = in<T>(a), y = in<T>(b);
  return make<V, T>([&](int i) { return fn(x.at[i], y.at[i]); });
}

template <class T>
T read(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
T aligned(const void* p) {
  if (uintptr_t(p) % 64) __builtin_trap();
  return read<T>(p);
}

template <class V>
void write(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

template <class Mask, class T, class V, class Fn>
AR_CALLED Mask mask(V a, V b, Fn fn) {
  const auto x = in<T>(a), y = in<T>(b);
  uint64_t bits = 0;
  for (int i = 0; i < Lanes<T>::N; ++i) bits |= uint64_t(fn(x.at[i], y.at[i])) << i;
  return Mask(bits);
}

template <class T, class V>
AR_CALLED V two_tables(V low, __m512i index, V high) {
  using Index = typename std::conditional<sizeof(T) == 4, uint32_t,
                                          typename std::conditional<sizeof(T) == 2, uint16_t,
                                                                    uint8_t>::type>::type;
  constexpr unsigned N = Lanes<T>::N;
  const auto a = in<T>(low), b = in<T>(high);
  const auto at = in<Index>(index);
  return make<V, T>([&](int i) {
    const unsigned j = at.at[i] % (2 * N);
    return j < N ? a.at[j] : b.at[j - N];
  });
}

template <bool HIGH>
AR_CALLED __m512i unpack(__m512i a, __m512i b) {
  const auto x = in<uint8_t>(a), y = in<uint8_t>(b);
  return make<__m512i, uint8_t>([&](int i) {
    const int from = i / 16 * 16 + (HIGH ? 8 : 0) + i % 16 / 2;
    return i % 2 ? y.at[from] : x.at[from];
  });
}

inline float from_bf16(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  return read<float>(&bits);
}

// As the instructions for bf16 see a float: subnormal ones are zero.
inline float flushed(float v) { return fabsf(v) < 0x1p-126f ? copysignf(0.0f, v) : v; }

inline uint16_t to_bf16(float v) {
  const uint32_t bits = read<uint32_t>(&v);
  if (v != v) return uint16_t(bits >> 16 | 64);
  if (flushed(v) == 0) return uint16_t(bits >> 16 & 0x8000);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulated

namespace emulated {

using I = __m512i;
using F = __m512;

AR_CALLED I set8(char v) { return make<I, int8_t>([&](int) { return v; }); }
AR_CALLED I set16(short v) { return make<I, int16_t>([&](int) { return v; }); }
AR_CALLED I set32(int v) { return make<I, int32_t>([&](int) { return v; }); }
AR_CALLED F set_float(float v) { return make<F, float>([&](int) { return v; }); }
AR_CALLED I ternary(I a, I b, I c, int table) {
  const auto x = in<uint64_t>(a), y = in<uint64_t>(b), z = in<uint64_t>(c);
  return make<I, uint64_t>([&](int i) {
    uint64_t bits = 0;
    for (int j = 0; j < 64; ++j) {
      const int k = int(x.at[i] >> j & 1) << 2 | int(y.at[i] >> j & 1) << 1 | int(z.at[i] >> j & 1);
      bits |= uint64_t(table >> k & 1) << j;
    }
    return bits;
  });
}
AR_CALLED __m256i narrow(__m512 v) {
  const auto x = in<float>(v);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = to_bf16(x.at[i]);
  return read<__m256i>(out);
}
AR_CALLED F dot_bf16(F sum, __m512bh a, __m512bh b) {
  const auto s = in<float>(sum);
  const auto x = in<uint16_t>(a), y = in<uint16_t>(b);
  const auto product = [&](int i, float to) {  // one rounding, the odd half first
    return flushed(fmaf(flushed(from_bf16(x.at[i])), flushed(from_bf16(y.at[i])), to));
  };
  return make<F, float>([&](int i) { return product(2 * i, product(2 * i + 1, flushed(s.at[i]))); });
}
AR_CALLED I dot_bytes(I sum, I a, I b) {
  const auto s = in<int32_t>(sum);
  const auto x = in<uint8_t>(a);
  const auto y = in<int8_t>(b);
  return make<I, int32_t>([&](int i) {
    int32_t out = s.at[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) out += int32_t(x.at[j]) * y.at[j];
    return out;
  });
}
AR_CALLED I shuffle(I a, I by) {
  const auto x = in<uint8_t>(a), at = in<uint8_t>(by);
  return make<I, uint8_t>([&](int i) {
    return at.at[i] & 0x80 ? 0 : x.at[i / 16 * 16 + (at.at[i] & 15)];
  });
}
AR_CALLED F look_up(I at, F table) {
  const auto x = in<float>(table);
  const auto by = in<uint32_t>(at);
  return make<F, float>([&](int i) { return x.at[by.at[i] & 15]; });
}
AR_CALLED I look_up(I at, I table) {
  const auto x = in<uint16_t>(table), by = in<uint16_t>(at);
  return make<I, uint16_t>([&](int i) { return x.at[by.at[i] & 31]; });
}
template <class T, class V>
AR_CALLED V choose(uint32_t some, V yes, V no) {
  const auto x = in<T>(yes), y = in<T>(no);
  return make<V, T>([&](int i) { return some >> i & 1 ? x.at[i] : y.at[i]; });
}
AR_CALLED F product(F a, F b) { return map<float>(a, b, [](float x, float y) { return x * y; }); }
AR_CALLED F difference(F a, F b) { return map<float>(a, b, [](float x, float y) { return x - y; }); }
template <class T, class V>
AR_CALLED V sum(V a, V b) {
  return map<T>(a, b, [](T x, T y) { return x + y; });
}
AR_CALLED I both(I a, I b) { return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; }); }
AR_CALLED I either(I a, I b) { return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; }); }
AR_CALLED I larger(I a, I b) { return map<int32_t>(a, b, [](int x, int y) { return x > y ? x : y; }); }
template <class T>
AR_CALLED I up(I v, uint64_t n) {
  return map<T>(v, [n](T x) { return n < 8 * sizeof(T) ? T(x << n) : T(0); });
}
template <class T>
AR_CALLED I down(I v, uint64_t n) {
  const uint64_t most = 8 * sizeof(T) - 1;  // signs fill what is left, zeros where there is none
  return map<T>(v, [=](T x) { return n <= most ? T(x >> n) : T(T(-1) < 0 ? x >> most : 0); });
}
AR_CALLED float total(F v) {
  const auto x = in<float>(v);
  float half[8], sum = 0;
  for (int i = 0; i < 8; ++i) half[i] = x.at[i] + x.at[i + 8];
  for (int n = 4; n; n /= 2)
    for (int i = 0; i < n; ++i) half[i] += half[i + n];
  return sum + half[0];
}
template <int SCALE>
AR_CALLED F gather(I at, const void* from) {
  const auto by = in<int32_t>(at);
  return make<F, float>([&](int i) {
    return read<float>(static_cast<const char*>(from) + SCALE * int64_t(by.at[i]));
  });
}
AR_CALLED I some_of(__mmask32 some, const void* from) {
  return make<I, uint16_t>([&](int i) {
    return some >> i & 1 ? read<uint16_t>(static_cast<const char*>(from) + 2 * i) : uint16_t(0);
  });
}
template <class From, class To, class V>
AR_CALLED I widened(V v) {
  From x[sizeof(V) / sizeof(From)];
  memcpy(x, &v, sizeof v);
  return make<I, To>([&](int i) { return x[i]; });
}
template <class From, class To, class V>
AR_CALLED V narrowed(I v) {
  const auto x = in<From>(v);
  To out[Lanes<From>::N];
  for (int i = 0; i < Lanes<From>::N; ++i) out[i] = To(x.at[i]);
  return read<V>(out);
}
AR_CALLED F halves_as_floats(__m256i v) {
  __m256 half[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  return read<F>(half);
}
template <int MODE>
AR_CALLED __m256i floats_as_halves(F v) {
  __m256 half[2];
  memcpy(half, &v, 64);
  const __m128i out[2] = {_mm256_cvtps_ph(half[0], MODE), _mm256_cvtps_ph(half[1], MODE)};
  return read<__m256i>(out);
}
AR_CALLED I four_times(__m128i v) {
  const __m128i all[4] = {v, v, v, v};
  return read<I>(all);
}
AR_CALLED F as_floats(I v) {
  const auto x = in<int32_t>(v);
  return make<F, float>([&](int i) { return float(x.at[i]); });
}
AR_CALLED F multiply_add(F a, F b, F c) {
  const auto x = in<float>(a), y = in<float>(b), z = in<float>(c);
  return make<F, float>([&](int i) { return fmaf(x.at[i], y.at[i], z.at[i]); });
}
template <int KIND>
AR_CALLED __mmask16 unordered(F a, F b) {
  static_assert(KIND == _CMP_UNORD_Q, "the one comparison in use");
  return mask<__mmask16, float>(a, b, [](float x, float y) { return x != x || y != y; });
}
template <int KINDS>
AR_CALLED __mmask16 infinite(F v) {
  static_assert(KINDS == 0x18, "both infinities");
  return mask<__mmask16, float>(v, v, [](float x, float) { return std::isinf(x); });
}
AR_CALLED uint64_t count_of(__m128i v) { return read<uint64_t>(&v); }

}  // namespace emulated

#define _mm512_add_epi16 emulated::sum<uint16_t>
#define _mm512_add_epi32 emulated::sum<uint32_t>
#define _mm512_add_ps emulated::sum<float>
#define _mm512_and_si512 emulated::both
#define _mm512_broadcast_i32x4 emulated::four_times
#define _mm512_castps_si512(v) emulated::read<__m512i>(&static_cast<const __m512&>(v))
#define _mm512_castsi512_ps(v) emulated::read<__m512>(&static_cast<const __m512i&>(v))
#define _mm512_cmp_ps_mask(a, b, kind) emulated::unordered<kind>(a, b)
#define _mm512_cmplt_epi32_mask(a, b) \
  emulated::mask<__mmask16, int32_t>(a, b, [](int32_t x, int32_t y) { return x < y; })
#define _mm512_cvtepi16_epi8 emulated::narrowed<uint16_t, uint8_t, __m256i>
#define _mm512_cvtepi32_epi16 emulated::narrowed<uint32_t, uint16_t, __m256i>
#define _mm512_cvtepi32_ps emulated::as_floats
#define _mm512_cvtepu16_epi32 emulated::widened<uint16_t, uint32_t, __m256i>
#define _mm512_cvtepu8_epi32 emulated::widened<uint8_t, uint32_t, __m128i>
#define _mm512_cvtneps_pbh emulated::narrow
#define _mm512_cvtph_ps emulated::halves_as_floats
#define _mm512_cvtps_ph(v, mode) emulated::floats_as_halves<mode>(v)
#define _mm512_dpbf16_ps emulated::dot_bf16
#define _mm512_dpbusd_epi32 emulated::dot_bytes
#define _mm512_fmadd_ps emulated::multiply_add
#define _mm512_fpclass_ps_mask(v, kinds) emulated::infinite<kinds>(v)
#define _mm512_i32gather_ps(at, from, scale) emulated::gather<scale>(at, from)
#define _mm512_load_si512(p) emulated::aligned<__m512i>(p)
#define _mm512_loadu_ps(p) emulated::read<__m512>(p)
#define _mm512_loadu_si512(p) emulated::read<__m512i>(p)
#define _mm512_mask_blend_ps(some, no, yes) emulated::choose<float>(some, yes, no)
#define _mm512_mask_mov_epi32(no, some, yes) emulated::choose<int32_t>(some, yes, no)
#define _mm512_mask_mul_ps(no, some, a, b) emulated::choose<float>(some, emulated::product(a, b), no)
#define _mm512_maskz_loadu_epi16 emulated::some_of
#define _mm512_maskz_sub_ps(some, a, b) \
  emulated::choose<float>(some, emulated::difference(a, b), emulated::set_float(0))
#define _mm512_max_epi32 emulated::larger
#define _mm512_mul_ps emulated::product
#define _mm512_or_si512 emulated::either
#define _mm512_permutex2var_epi16 emulated::two_tables<uint16_t>
#define _mm512_permutex2var_epi8 emulated::two_tables<uint8_t>
#define _mm512_permutex2var_ps emulated::two_tables<float>
#define _mm512_permutexvar_epi16 emulated::look_up
#define _mm512_permutexvar_ps emulated::look_up
#define _mm512_reduce_add_ps emulated::total
#define _mm512_set1_epi16 emulated::set16
#define _mm512_set1_epi32 emulated::set32
#define _mm512_set1_epi8 emulated::set8
#define _mm512_set1_ps emulated::set_float
#define _mm512_setzero_ps() emulated::set_float(0)
#define _mm512_setzero_si512() emulated::set32(0)
#define _mm512_shuffle_epi8 emulated::shuffle
#define _mm512_sll_epi32(v, n) emulated::up<uint32_t>(v, emulated::count_of(n))
#define _mm512_slli_epi16 emulated::up<uint16_t>
#define _mm512_slli_epi32 emulated::up<uint32_t>
#define _mm512_srai_epi16 emulated::down<int16_t>
#define _mm512_srl_epi32(v, n) emulated::down<uint32_t>(v, emulated::count_of(n))
#define _mm512_srli_epi16 emulated::down<uint16_t>
#define _mm512_srli_epi32 emulated::down<uint32_t>
#define _mm512_store_si512(p, v) (emulated::aligned<__m512i>(p), emulated::write(p, v))
#define _mm512_storeu_ps emulated::write
#define _mm512_sub_ps emulated::difference
#define _mm512_ternarylogic_epi32 emulated::ternary
#define _mm512_test_epi32_mask(a, b) \
  emulated::mask<__mmask16, uint32_t>(a, b, [](uint32_t x, uint32_t y) { return (x & y) != 0; })
#define _mm512_unpackhi_epi8 emulated::unpack<true>
#define _mm512_unpacklo_epi8 emulated::unpack<false>
