// The exponential of a float by a polynomial, in operations that become vectors.
#pragma once
#include "common.h"

namespace ar {
namespace {

// e^x for x <= 0; relative error below 2e-7.
AR_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // a whole number in its last bits
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + (127u << 23));
}

}  // namespace
}  // namespace ar
