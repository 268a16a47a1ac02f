// What a decoding step needs beside products with packed weights, for any vector type V: products
// of a few rows with a float weight, norms, and the attention of one new token.
#pragma once
#include "exponential.h"
#include "fetch.h"

namespace ar {
namespace {

constexpr int kHeadsAtOnce = 4;
constexpr int kVectorsAtOnce = 4;

// Calls fn(Int<dtype>).
template <class Fn>
AR_INLINE void with_type(int dtype, Fn&& fn) {
  if (dtype == kF32) return fn(Int<kF32>{});
  if (dtype == kF16) return fn(Int<kF16>{});
  return fn(Int<kBF16>{});
}

AR_INLINE const uint8_t* place_of(const void* p, int dtype, int64_t element) {
  return static_cast<const uint8_t*>(p) + element * (dtype == kF32 ? 4 : 2);
}

// The last values of a row, zeros behind them.
template <class V, int TYPE>
AR_INLINE typename V::F read_last(const uint8_t* row, int64_t at, int64_t count) {
  constexpr int width = TYPE == kF32 ? 4 : 2;
  uint8_t some[V::N * 4] = {};
  memcpy(some, row + at * width, count * width);
  return V::read(some, TYPE, 0);
}

// Products of features with rows of x, in float32.
template <class V>
struct Dots {
  // sums[row][0..count) = products of `count` features from `feature` on with all rows of x.
  template <int TYPE, int ROWS>
  static AR_INLINE void add(const FloatJob& job, int64_t feature, int count, float (*sums)[16]);
};

template <class V>
template <int TYPE, int ROWS>
AR_INLINE void Dots<V>::add(const FloatJob& job, int64_t feature, int count, float (*sums)[16]) {
  constexpr int width = TYPE == kF32 ? 4 : 2;
  constexpr int kSets = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // sums that do not wait for each other
  const int64_t step = kSets * V::N, whole = job.columns / step * step;
  // one feature after the other: the weight is then one stream of memory
  for (int i = 0; i < count; ++i) {
    const uint8_t* w = place_of(job.w, TYPE, (feature + i) * job.columns);
    typename V::F acc[kSets][ROWS];
    for (auto& set : acc)
      for (auto& one : set) one = V::zero();
    const auto add = [&](int set, typename V::F one, int64_t k) AR_FORCED {
      for (int m = 0; m < ROWS; ++m)
        acc[set][m] = V::fma(one, V::load(job.wide + m * job.depth + k), acc[set][m]);
    };
    for (int64_t k = 0; k < whole; k += step) {
      for (int64_t byte = 0; byte < step * width; byte += 64)
        fetch_floats(w + k * width + byte);
      for (int set = 0; set < kSets; ++set)
        add(set, V::read(w, TYPE, k + set * V::N), k + set * V::N);
    }
    for (int64_t k = whole; k < job.columns; k += V::N) {
      const int64_t left = job.columns - k;
      add(0, left < V::N ? read_last<V, TYPE>(w, k, left) : V::read(w, TYPE, k), k);
    }
    for (int m = 0; m < ROWS; ++m) {
      for (int set = 1; set < kSets; ++set) acc[0][m] = V::add(acc[0][m], acc[set][m]);
      sums[m][i] = V::sum(acc[0][m]);
    }
  }
}

// Features [begin * 16, end * 16) of y: dots(feature, count, sums) gives those of up to 16.
template <class V, int TYPE, int ROWS, class JOB, class DOTS>
AR_INLINE void each_16(const JOB& job, int64_t begin, int64_t end, DOTS&& dots) {
  constexpr int width = TYPE == kF32 ? 4 : 2;
  for (int64_t at = begin * 16; at < end * 16 && at < job.features; at += 16) {
    const int64_t count = job.features - at < 16 ? job.features - at : 16;
    float sums[ROWS][16] = {};
    dots(at, int(count), sums);
    for (int m = 0; m < ROWS; ++m) {
      for (int64_t n = 0; job.bias && n < count; ++n) sums[m][n] += job.bias[at + n];
      uint8_t out[16 * 4];
      for (int n = 0; n < 16; n += V::N) V::write(out, TYPE, n, V::load(sums[m] + n));
      memcpy(static_cast<uint8_t*>(job.y) + (m * job.features + at) * width, out, count * width);
    }
  }
}

template <class V, class DOTS>
void float_product(const FloatJob& job, int64_t begin, int64_t end) {
  with_type(job.dtype, [&](auto type) {
    unrolled<1, kFloatRows + 1>([&](auto rows) {
      constexpr int TYPE = decltype(type)::value, ROWS = decltype(rows)::value;
      if (job.rows != ROWS) return;
      each_16<V, TYPE, ROWS>(job, begin, end, [&](int64_t at, int count, float (*sums)[16]) {
        DOTS::template add<TYPE, ROWS>(job, at, count, sums);
      });
    });
  });
}

// Rows of x as float32 in `wide`, zeros behind them.
template <class V>
void widen(const FloatJob& job) {
  with_type(job.dtype, [&](auto type) {
    constexpr int TYPE = decltype(type)::value;
    for (int64_t m = 0; m < job.rows; ++m) {
      const uint8_t* row = place_of(job.x, TYPE, m * job.x_stride);
      float* out = job.wide + m * job.depth;
      for (int64_t k = 0; k < job.depth; k += V::N) {
        const int64_t left = job.columns - k;
        if (left >= V::N) V::store(out + k, V::read(row, TYPE, k));
        else if (left > 0) V::store(out + k, read_last<V, TYPE>(row, k, left));
        else V::store(out + k, V::zero());
      }
    }
  });
}

// Rows [begin, end): x / root mean square, times the weight; columns are a multiple of 16.
template <class V>
void norm(const NormJob& job, int64_t begin, int64_t end) {
  with_type(job.dtype, [&](auto type) {
    constexpr int TYPE = decltype(type)::value;
    const auto one = V::set(1.0f);
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* x = place_of(job.x, TYPE, r * job.x_stride);
      uint8_t* y = const_cast<uint8_t*>(place_of(job.y, TYPE, r * job.columns));
      auto squares = V::zero();
      for (int64_t k = 0; k < job.columns; k += V::N) {
        const auto v = V::read(x, TYPE, k);
        squares = V::fma(v, v, squares);
      }
      const auto scale =
          V::set(1.0f / __builtin_sqrtf(V::sum(squares) / float(job.columns) + job.epsilon));
      for (int64_t k = 0; k < job.columns; k += V::N) {
        const auto w = V::read(job.weight, TYPE, k);
        auto v = V::mul(V::read(x, TYPE, k), scale);
        if (job.form == kNormRoundsFirst) {
          V::write(y, TYPE, k, v);
          v = V::mul(V::read(y, TYPE, k), w);
        } else {
          v = V::mul(v, job.form == kNormAddsOne ? V::add(w, one) : w);
        }
        V::write(y, TYPE, k, v);
      }
    }
  });
}

// Scores become weights that sum to one; all zeros where nothing may be seen.
AR_INLINE void soften(float* scores, int64_t length, const uint8_t* mask) {
  constexpr float kLeast = -3.0e38f;
  if (mask)
    for (int64_t s = 0; s < length; ++s) scores[s] = mask[s] ? scores[s] : kLeast;
  float most = kLeast;
  for (int64_t s = 0; s < length; ++s) most = scores[s] > most ? scores[s] : most;
  float sums[16] = {};
  int64_t s = 0;
  for (; s + 16 <= length; s += 16)
    for (int i = 0; i < 16; ++i) {
      const float e = exponential(scores[s + i] - most);
      scores[s + i] = e;
      sums[i] += e;
    }
  for (; s < length; ++s) sums[0] += scores[s] = exponential(scores[s] - most);
  if (mask)
    for (int64_t i = 0; i < length; ++i) scores[i] = mask[i] ? scores[i] : 0.0f;
  float sum = 0;
  for (float one : sums) sum += one;
  const float inverse = most > kLeast ? 1.0f / sum : 0.0f;
  for (int64_t i = 0; i < length; ++i) scores[i] *= inverse;
}

// Heads [head, head + HEADS) of one sequence, which share keys and values.
template <class V, int TYPE, int HEADS>
void attend_heads(const AttentionJob& job, int64_t b, int64_t head) {
  const int64_t shared = head / (job.heads / job.kv_heads), width = job.width;
  const uint8_t* k = place_of(job.k, TYPE, b * job.k_stride[0] + shared * job.k_stride[1]);
  const uint8_t* v = place_of(job.v, TYPE, b * job.v_stride[0] + shared * job.v_stride[1]);
  float q[HEADS][kMostWidth];
  float* scores[HEADS];
  for (int h = 0; h < HEADS; ++h) {
    const uint8_t* at = place_of(job.q, TYPE, b * job.q_stride[0] + (head + h) * job.q_stride[1]);
    for (int64_t d = 0; d < width; d += V::N)
      V::store(q[h] + d, V::mul(V::read(at, TYPE, d), V::set(job.scale)));
    scores[h] = job.scores + (b * job.heads + head + h) * job.length;
  }
  for (int64_t s = 0; s < job.length; ++s) {
    const uint8_t* row = place_of(k, TYPE, s * job.k_stride[2]);
    typename V::F acc[HEADS];
    for (auto& one : acc) one = V::zero();
    for (int64_t d = 0; d < width; d += V::N) {
      const auto one = V::read(row, TYPE, d);
      for (int h = 0; h < HEADS; ++h) acc[h] = V::fma(one, V::load(q[h] + d), acc[h]);
    }
    for (int h = 0; h < HEADS; ++h) scores[h][s] = V::sum(acc[h]);
  }
  for (int h = 0; h < HEADS; ++h) {
    const int64_t at = b * job.mask_stride[0] + (head + h) * job.mask_stride[1];
    soften(scores[h], job.length, job.mask ? job.mask + at : nullptr);
  }
  const auto mix = [&](auto vectors, int64_t d) {
    constexpr int VECTORS = decltype(vectors)::value;
    typename V::F acc[HEADS][VECTORS];
    for (auto& row : acc)
      for (auto& one : row) one = V::zero();
    for (int64_t s = 0; s < job.length; ++s) {
      const uint8_t* row = place_of(v, TYPE, s * job.v_stride[2]);
      for (int i = 0; i < VECTORS; ++i) {
        const auto one = V::read(row, TYPE, d + i * V::N);
        for (int h = 0; h < HEADS; ++h)
          acc[h][i] = V::fma(one, V::set(scores[h][s]), acc[h][i]);
      }
    }
    for (int h = 0; h < HEADS; ++h)
      for (int i = 0; i < VECTORS; ++i) {
        const int64_t at = (b * job.heads + head + h) * width + d + i * V::N;
        V::write(job.y, TYPE, at, acc[h][i]);
      }
  };
  int64_t d = 0;
  for (; d + kVectorsAtOnce * V::N <= width; d += kVectorsAtOnce * V::N)
    mix(Int<kVectorsAtOnce>{}, d);
  for (; d < width; d += V::N) mix(Int<1>{}, d);
}

// Tasks [begin, end): each is `job.task_heads` heads of one sequence that share keys and values.
template <class V>
void attend(const AttentionJob& job, int64_t begin, int64_t end) {
  with_type(job.dtype, [&](auto type) {
    const int64_t per = job.heads / job.task_heads;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / per, first = t % per * job.task_heads;
      for (int64_t h = 0; h < job.task_heads; h += kHeadsAtOnce)
        unrolled<1, kHeadsAtOnce + 1>([&](auto heads) {
          constexpr int HEADS = decltype(heads)::value;
          const int64_t left = job.task_heads - h;
          if ((left < kHeadsAtOnce ? left : kHeadsAtOnce) == HEADS)
            attend_heads<V, decltype(type)::value, HEADS>(job, b, first + h);
        });
    }
  });
}

// x / (1 + e^-x), by way of e^-|x|.
AR_INLINE float silu(float x) {
  const float e = exponential(x < 0 ? x : -x);
  return x * (x < 0 ? e : 1.0f) / (1.0f + e);
}

template <class V>
void pair(const PairJob& job, int64_t begin, int64_t end) {
  with_type(job.dtype, [&](auto type) {
    constexpr int TYPE = decltype(type)::value;
    for (int64_t at = begin * 16; at < end * 16; at += V::N) {
      auto a = V::read(job.a, TYPE, at);
      const auto b = V::read(job.b, TYPE, at);
      if (job.gates) {
        float some[V::N];
        V::store(some, a);
        for (auto& one : some) one = silu(one);
        a = V::mul(V::load(some), b);
      } else {
        a = V::add(a, b);
      }
      V::write(job.y, TYPE, at, a);
    }
  });
}

template <class V>
void turn(const TurnJob& job, int64_t begin, int64_t end) {
  with_type(job.dtype, [&](auto type) {
    constexpr int TYPE = decltype(type)::value;
    const int64_t half = job.width / 2;
    for (int64_t h = begin; h < end; ++h) {
      const int64_t angle = h / job.heads * job.width, x = h * job.width;
      for (int64_t d = 0; d < half; d += V::N) {
        const auto first = V::read(job.x, TYPE, x + d), second = V::read(job.x, TYPE, x + half + d);
        const auto minus = V::sub(V::zero(), V::read(job.sin, TYPE, angle + d));
        const auto low = V::fma(second, minus, V::mul(first, V::read(job.cos, TYPE, angle + d)));
        const auto high = V::fma(first, V::read(job.sin, TYPE, angle + half + d),
                                 V::mul(second, V::read(job.cos, TYPE, angle + half + d)));
        V::write(job.x, TYPE, x + d, low);
        V::write(job.x, TYPE, x + half + d, high);
      }
    }
  });
}

}  // namespace
}  // namespace ar
