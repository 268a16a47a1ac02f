// Attention and norms of tuning.h; included by tuning_loops.h.
#pragma once

namespace ar {
namespace {

// Query i sees keys up to i, counted from the last of both.
template <class TYPE>
AR_INLINE void soften_row(const ScoresJob& job, typename TYPE::T* scores, int64_t seen) {
  float e[kMostKeys];
  const float most = largest<TYPE>(scores, seen) * job.scale;
  for (int64_t k = 0; k < seen; ++k) e[k] = exponential(TYPE::get(scores[k]) * job.scale - most);
  float lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= seen; k += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] += e[k + i];
  for (; k < seen; ++k) lanes[0] += e[k];
  const float inverse = 1 / total(lanes);
  for (k = 0; k < seen; ++k) scores[k] = TYPE::put(e[k] * inverse);
  memset(scores + seen, 0, size_t(job.keys - seen) * sizeof(*scores));
}

// The gradient of the weights becomes that of the scores before they were scaled.
template <class TYPE>
AR_INLINE void harden_row(const ScoresJob& job, typename TYPE::T* grad,
                          const typename TYPE::T* weights, int64_t seen) {
  float lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= seen; k += kLanes)
    for (int i = 0; i < kLanes; ++i)
      lanes[i] += TYPE::get(grad[k + i]) * TYPE::get(weights[k + i]);
  for (; k < seen; ++k) lanes[0] += TYPE::get(grad[k]) * TYPE::get(weights[k]);
  const float mean = total(lanes);
  for (k = 0; k < seen; ++k)
    grad[k] = TYPE::put((TYPE::get(grad[k]) - mean) * TYPE::get(weights[k]) * job.scale);
  memset(grad + seen, 0, size_t(job.keys - seen) * sizeof(*grad));
}

void soften(const ScoresJob& job, int64_t begin, int64_t end) {
  with_values(job.dtype, [&](auto type) {
    using TYPE = decltype(type);
    using T = typename TYPE::T;
    for (int64_t r = begin; r < end; ++r) {
      T* scores = static_cast<T*>(job.scores) + r * job.keys;
      const int64_t seen = r % job.queries + 1 + job.keys - job.queries;
      if (job.weights == nullptr) soften_row<TYPE>(job, scores, seen);
      else
        harden_row<TYPE>(job, scores, static_cast<const T*>(job.weights) + r * job.keys, seen);
    }
  });
}

template <class TYPE>
AR_INLINE void norm_back_row(const NormBackJob& job, int64_t r, float* to_weight) {
  using T = typename TYPE::T;
  const int64_t count = job.columns;
  const T* x = static_cast<const T*>(job.x) + r * count;
  const T* grad = static_cast<const T*>(job.grad) + r * count;
  const T* weight = static_cast<const T*>(job.weight);
  T* __restrict out = static_cast<T*>(job.to_x) + r * count;
  const float more = job.form == kNormAddsOne ? 1.0f : 0.0f;
  float squares[kLanes] = {}, dots[kLanes] = {};
  for (int64_t k = 0; k < count; k += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const float v = TYPE::get(x[k + i]);
      squares[i] += v * v;
      dots[i] += v * (TYPE::get(grad[k + i]) * (TYPE::get(weight[k + i]) + more));
    }
  const float size = float(count);
  const float scale = 1.0f / __builtin_sqrtf(total(squares) / size + job.epsilon);
  const float along = total(dots) * scale * scale / size;
  const bool rounds = job.form == kNormRoundsFirst;
  for (int64_t k = 0; k < count; ++k) {
    const float v = TYPE::get(x[k]), g = TYPE::get(grad[k]);
    out[k] = TYPE::put(scale * (g * (TYPE::get(weight[k]) + more) - v * along));
    const float n = v * scale;
    to_weight[k] += g * (rounds ? TYPE::get(TYPE::put(n)) : n);
  }
}

void norm_back(const NormBackJob& job, int64_t begin, int64_t end) {
  with_values(job.dtype, [&](auto type) {
    for (int64_t part = begin; part < end; ++part) {
      float* to_weight = job.to_weight + part * job.columns;
      memset(to_weight, 0, size_t(job.columns) * 4);
      const int64_t first = part * kNormRows, left = job.rows - first;
      for (int64_t r = first; r < first + (left < kNormRows ? left : kNormRows); ++r)
        norm_back_row<decltype(type)>(job, r, to_weight);
    }
  });
}

}  // namespace
}  // namespace ar
