// Vectors of 16 floats in plain C++, for processors without the others; the operations of v512.h
// that have to do with floats.
#pragma once
#include <string.h>

#include "common.h"

namespace ar {
namespace {

struct V1 {
  static constexpr int N = 16;
  static constexpr int kBlocksAtOnce(int) { return 1; }
  struct F { float v[N]; };

  template <class Fn>
  static F each(Fn fn) {
    F out;
    for (int i = 0; i < N; ++i) out.v[i] = fn(i);
    return out;
  }
  static F zero() { return set(0.0f); }
  static F set(float v) { return each([&](int) { return v; }); }
  static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, F v) { memcpy(p, v.v, sizeof v.v); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static float sum(F v) {
    float out = 0;
    for (int i = 0; i < N; ++i) out += v.v[i];
    return out;
  }

  static F read(const void* p, int dtype, int64_t at) {
    if (dtype == kF32) return load(static_cast<const float*>(p) + at);
    const uint16_t* h = static_cast<const uint16_t*>(p) + at;
    if (dtype == kF16) return each([&](int i) { return half(h[i]); });
    return each([&](int i) { return float_of(uint32_t(h[i]) << 16); });
  }

  static void write(void* p, int dtype, int64_t at, F v) {
    if (dtype == kF32) return store(static_cast<float*>(p) + at, v);
    uint16_t* h = static_cast<uint16_t*>(p) + at;
    for (int i = 0; i < N; ++i) h[i] = dtype == kF16 ? to_half(v.v[i]) : to_bf16(v.v[i]);
  }

  static F scales(int kind, const uint8_t* p) {
    switch (kind) {
      case kScaleF16: return read(p, kF16, 0);
      case kScaleF32: return read(p, kF32, 0);
      case kScaleBF16: return read(p, kBF16, 0);
      case kScaleE8M0: return each([&](int i) {
        return float_of(p[i] ? uint32_t(p[i]) << 23 : 0x400000);
      });
      case kScaleE4M3: return each([&](int i) { return small(p[i], 7); });
      case kScaleUE5M3: return each([&](int i) { return small(p[i], 15); });
      default: return set(1.0f);
    }
  }

  static F bytes_as_floats(const uint8_t* p) { return each([&](int i) { return float(p[i]); }); }

 private:
  static float small(uint32_t v, int bias) {
    if (v < 8) return float(v) * (bias == 7 ? 0x1p-9f : 0x1p-17f);
    return float_of((v << 20) + (uint32_t(127 - bias) << 23));
  }

  static float half(uint32_t h) {
    const uint32_t sign = (h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float magnitude = rest < 0x400 ? float(rest) * 0x1p-24f
                                         : float_of((rest << 13) + (uint32_t(127 - 15) << 23));
    return float_of(sign | bits_of(magnitude));
  }

  static uint16_t to_bf16(float v) {
    const uint32_t u = bits_of(v);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }

  static uint16_t to_half(float v) {
    const uint32_t u = bits_of(v), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds beyond the largest
    if (rest < 0x38800000) {  // subnormal: the addition rounds to units of 2^-24
      return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    }
    const uint32_t up = rest + 0xfff + (rest >> 13 & 1);
    return uint16_t(sign | ((up - (uint32_t(127 - 15) << 23)) >> 13));
  }
};

}  // namespace
}  // namespace ar
