// The loops of tuning.h in plain C++: each including file compiles them for its instruction set,
// without contracting products and sums, so that all give what torch's separate operations give.
#pragma once
#include "exponential.h"
#include "tuning.h"

namespace ar {
namespace {

constexpr int kLanes = 16;
constexpr uint32_t kExponent = 0x7f800000, kMagnitude = 0x7fffffff;

AR_INLINE float magnitude(float v) { return float_of(bits_of(v) & kMagnitude); }

// Values of a type; reading and writing loops become vector instructions.
struct Single {
  using T = float;
  static constexpr uint32_t kMost = kMagnitude;
  static AR_INLINE float get(T v) { return v; }
  static AR_INLINE T put(float v) { return v; }
  static AR_INLINE uint32_t most(T v) { return bits_of(v) & kMagnitude; }
  static AR_INLINE float as_float(uint32_t most) { return float_of(most); }
};

struct Brain {
  using T = uint16_t;
  static AR_INLINE float get(T v) { return float_of(uint32_t(v) << 16); }
  static AR_INLINE T put(float v) {
    const uint32_t u = bits_of(v), up = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return T((u & kMagnitude) > kExponent ? 0x7fc0 : up);
  }
  static AR_INLINE T most(T v) { return v & 0x7fff; }
  static AR_INLINE float as_float(uint32_t most) { return float_of(most << 16); }
};

// Calls fn(type): fp32 or bf16.
template <class Fn>
AR_INLINE void with_values(int dtype, Fn&& fn) {
  if (dtype == kF32) return fn(Single{});
  return fn(Brain{});
}

AR_INLINE float rounded(float v, const Element& e) {
  float c = v < -e.maximum ? -e.maximum : v;  // no number stays none
  c = c > e.maximum ? e.maximum : c;
  const float below = float_of(bits_of(c) & kExponent);
  const float large = (below < e.least ? e.least : below) * e.large;
  const float r = (c + large) - large;
  return float_of((bits_of(r) & kMagnitude) | (bits_of(c) & ~kMagnitude));
}

// floor(log2(v)) for v > 0, finite.
AR_INLINE int exponent_of(float v) {
  const uint32_t bits = bits_of(v);
  if (bits >> 23) return int(bits >> 23) - 127;
  return (31 - __builtin_clz(bits)) - 149;
}

AR_INLINE float power_of_two(int exponent) {  // those that E8M0 holds
  if (exponent > 127) exponent = 127;
  return exponent > -127 ? float_of(uint32_t(exponent + 127) << 23) : float_of(0x400000);
}

AR_INLINE float step_of(const GroupJob& job, float most) {
  if (job.rule == kBlockOfTensor) {
    float block = most * job.whole / job.element.maximum;
    block = block < 0x1p-9f ? 0x1p-9f : block;
    return rounded(block, Element{448.0f, 0x1p-6f, 0x1.8p20f}) / job.whole;  // E4M3
  }
  if (most == 0) return 1.0f;
  if (bits_of(most) >= kExponent) return most;
  if (job.rule == kPowerBelow) return power_of_two(exponent_of(most) - job.top);
  const float wanted = most / job.element.maximum;
  if (wanted == 0) return 1.0f;
  const int exponent = exponent_of(wanted);
  // exactly a power of two, or to the next one
  const bool exact = power_of_two(exponent) == wanted ||
                     (bits_of(wanted) < 0x800000 && (bits_of(wanted) & (bits_of(wanted) - 1)) == 0);
  return power_of_two(exact ? exponent : exponent + 1);
}

template <class TYPE, int SIZE>
AR_INLINE void fake_quant_groups(const GroupJob& job, int64_t begin, int64_t end) {
  using T = typename TYPE::T;
  const int64_t size = SIZE ? SIZE : job.size;
  const Element element = job.element;
  for (int64_t g = begin; g < end; ++g) {
    const T* x = static_cast<const T*>(job.x) + g * size;
    T* y = static_cast<T*>(job.y) + g * size;
    auto most = TYPE::most(x[0]);  // bits of magnitudes are in their order, no number above all
    for (int64_t i = 1; i < size; ++i) most = TYPE::most(x[i]) > most ? TYPE::most(x[i]) : most;
    const float step = step_of(job, TYPE::as_float(most));
    if (job.inside) {
      uint8_t* inside = job.inside + g * size;
      for (int64_t i = 0; i < size; ++i) {
        const float v = TYPE::get(x[i]) / step;
        inside[i] = magnitude(v) <= element.maximum;
        y[i] = TYPE::put(rounded(v, element) * step);
      }
    } else {
      for (int64_t i = 0; i < size; ++i)
        y[i] = TYPE::put(rounded(TYPE::get(x[i]) / step, element) * step);
    }
  }
}

void fake_quant(const GroupJob& job, int64_t begin, int64_t end) {
  with_values(job.dtype, [&](auto type) {
    using TYPE = decltype(type);
    if (job.size == 16) fake_quant_groups<TYPE, 16>(job, begin, end);
    else if (job.size == 32) fake_quant_groups<TYPE, 32>(job, begin, end);
    else fake_quant_groups<TYPE, 0>(job, begin, end);
  });
}

void mask(const MaskJob& job, int64_t begin, int64_t end) {
  with_values(job.dtype, [&](auto type) {
    using TYPE = decltype(type);
    using T = typename TYPE::T;
    const T* x = static_cast<const T*>(job.x);
    T* y = static_cast<T*>(job.y);
    for (int64_t i = begin; i < end; ++i)
      y[i] = TYPE::put(TYPE::get(x[i]) * float(job.inside[i]));
  });
}

AR_INLINE float code_of(float v, float most) {
  const float r = (v + 12582912.0f) - 12582912.0f;  // rounded to a whole number
  const float c = r < 0 ? 0 : r;
  return c > most ? most : c;
}

void make(const LatentJob& job, int64_t begin, int64_t end) {
  with_values(job.dtype, [&](auto type) {
    using TYPE = decltype(type);
    using T = typename TYPE::T;
    const Element element = job.element;
    for (int64_t g = begin; g < end; ++g) {
      const float* v = job.value + g * job.size;
      T* out = static_cast<T*>(job.matrix) + g * job.size;
      const float scale = job.scale[g];
      if (job.zero) {
        const float zero = job.zero[g];
        for (int64_t i = 0; i < job.size; ++i)
          out[i] = TYPE::put((code_of(v[i], element.maximum) - zero) * scale);
      } else {
        const float growth = job.growth ? job.growth[g] : 0.0f;
        for (int64_t i = 0; i < job.size; ++i)
          out[i] = TYPE::put(rounded((v[i] + v[i] * growth) / scale, element) * scale);
      }
    }
  });
}

// Adam on the values of `kLanes` gradients.
AR_INLINE void step_lanes(const MoveJob& job, int64_t at, const float* grad) {
  float* value = job.latent.value + at;
  float *first = job.first + at, *second = job.second + at;
  for (int i = 0; i < kLanes; ++i) {
    const float m = first[i] + (1 - job.keep_first) * (grad[i] - first[i]);
    const float s = second[i] * job.keep_second + (1 - job.keep_second) * (grad[i] * grad[i]);
    const float root = __builtin_sqrtf(s * job.correction) + job.tiny;
    first[i] = m;
    second[i] = s;
    const float size = job.unit ? job.unit[at + i] * job.size : job.size;
    value[i] -= m / root * size;
  }
}

AR_INLINE float total(const float* lanes) {
  float out = 0;
  for (int i = 0; i < kLanes; ++i) out += lanes[i];
  return out;
}

template <class TYPE, bool CODES>
AR_INLINE void move_groups(const MoveJob& job, int64_t begin, int64_t end) {
  using T = typename TYPE::T;
  const LatentJob& latent = job.latent;
  const Element element = latent.element;
  for (int64_t g = begin; g < end; ++g) {
    const float scale = latent.scale[g], growth = latent.growth ? latent.growth[g] : 0.0f;
    const float zero = CODES ? latent.zero[g] : 0.0f, slope = CODES ? job.slope[g] : 0.0f;
    float elements[kLanes] = {}, steps[kLanes] = {}, values[kLanes] = {};
    for (int64_t at = g * latent.size; at < (g + 1) * latent.size; at += kLanes) {
      const T* given = static_cast<const T*>(latent.matrix) + at;
      const float* value = latent.value + at;
      float grad[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const float v = value[i], one = TYPE::get(given[i]);
        if constexpr (CODES) {
          const float code = code_of(v, element.maximum);
          elements[i] += (code - zero) * one;
          const bool inside = code == (v + 12582912.0f) - 12582912.0f;
          grad[i] = inside ? one * slope : 0.0f;
        } else {
          const float s = (v + v * growth) / scale;
          const float passed = magnitude(s) <= element.maximum ? one : 0.0f;
          elements[i] += one * rounded(s, element);
          steps[i] += passed * s;
          values[i] += passed * v;
          grad[i] = passed + passed * growth;
        }
      }
      if (job.first) step_lanes(job, at, grad);
    }
    if (job.sums) {
      job.sums[g] = total(elements);
      job.sums[job.groups + g] = total(steps);
      job.sums[2 * job.groups + g] = total(values);
    }
  }
}

void move(const MoveJob& job, int64_t begin, int64_t end) {
  with_values(job.latent.dtype, [&](auto type) {
    using TYPE = decltype(type);
    if (job.latent.zero) move_groups<TYPE, true>(job, begin, end);
    else move_groups<TYPE, false>(job, begin, end);
  });
}

// The largest of a row; the order of comparisons makes it vectors.
template <class TYPE>
AR_INLINE float largest(const typename TYPE::T* row, int64_t count) {
  float most[kLanes];
  for (float& one : most) one = TYPE::get(row[0]);
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const float v = TYPE::get(row[k + i]);
      most[i] = v > most[i] ? v : most[i];
    }
  for (; k < count; ++k) most[0] = TYPE::get(row[k]) > most[0] ? TYPE::get(row[k]) : most[0];
  for (float one : most) most[0] = one > most[0] ? one : most[0];
  return most[0];
}

void diverge(const DivergenceJob& job, int64_t begin, int64_t end, float* scratch) {
  with_values(job.dtype, [&](auto type) {
    using TYPE = decltype(type);
    using T = typename TYPE::T;
    const int64_t count = job.columns, whole = count / kLanes * kLanes;
    float *__restrict q = scratch, *__restrict p = scratch + count;
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(job.mine) + r * count;
      const T* y = static_cast<const T*>(job.theirs) + r * count;
      const float x_most = largest<TYPE>(x, count), y_most = largest<TYPE>(y, count);
      for (int64_t k = 0; k < count; ++k) {
        q[k] = exponential(TYPE::get(x[k]) - x_most);
        p[k] = exponential(TYPE::get(y[k]) - y_most);
      }
      float mine[kLanes] = {}, theirs[kLanes] = {}, mean[kLanes] = {};
      for (int64_t k = 0; k < whole; k += kLanes)
        for (int i = 0; i < kLanes; ++i) {
          const float apart = (TYPE::get(y[k + i]) - y_most) - (TYPE::get(x[k + i]) - x_most);
          mine[i] += q[k + i];
          theirs[i] += p[k + i];
          mean[i] += p[k + i] * apart;
        }
      for (int64_t k = whole; k < count; ++k) {
        mine[0] += q[k];
        theirs[0] += p[k];
        mean[0] += p[k] * ((TYPE::get(y[k]) - y_most) - (TYPE::get(x[k]) - x_most));
      }
      const float x_sum = total(mine), y_sum = total(theirs);
      job.parts[3 * r] = total(mean) / y_sum;
      job.parts[3 * r + 1] = x_sum;
      job.parts[3 * r + 2] = y_sum;
      const float of_x = 1 / x_sum, of_y = 1 / y_sum;
      T* __restrict grad = static_cast<T*>(job.grad) + r * count;
      for (int64_t k = 0; k < count; ++k) grad[k] = TYPE::put(q[k] * of_x - p[k] * of_y);
    }
  });
}

}  // namespace
}  // namespace ar

#include "tuning_rows.h"

namespace ar {
namespace {

constexpr Tuning kLoops = {fake_quant, mask, make, move, diverge, soften, norm_back};

}  // namespace
}  // namespace ar
