// What a decoding step needs beside packed weights: what entry points are given becomes jobs.
#pragma once
#include "runtime.h"

namespace ar {
namespace {

constexpr int64_t kMost = int64_t(1) << 31;
constexpr int64_t kManyTasks = 8;  // from here on, heads that share keys stay together

inline bool in_range(int64_t n) { return n > 0 && n < kMost; }

inline bool are_strides(const int64_t* strides, int count) {
  for (int i = 0; i < count; ++i)
    if (strides[i] < 0) return false;
  return true;
}

inline bool is_type(int64_t dtype) { return dtype >= 0 && dtype <= kBF16; }

inline int32_t job_of(const ar_norm_input* n, NormJob* job) {
  if (n == nullptr || !is_type(n->dtype) || n->rows < 0 || n->rows >= kMost ||
      !in_range(n->columns) || n->columns % 16 || n->form < 0 || n->form > kNormPlain)
    return kBadInput;
  if (n->rows == 0) return kOk;
  if (n->x == nullptr || n->weight == nullptr || n->stride < 0 || n->stride >= kMost ||
      n->x_bytes < ((n->rows - 1) * n->stride + n->columns) * width_of(n->dtype))
    return kBadInput;
  if (n->y == nullptr) return kBadOutput;
  *job = NormJob{n->x,      n->stride, n->columns,        int(n->dtype), int(n->form),
                 n->weight, float(n->epsilon), n->y};
  return kOk;
}

// All but the memory for scores.
inline int32_t job_of(const ar_attention* a, AttentionJob* job) {
  if (a == nullptr || !is_type(a->dtype) || a->q == nullptr || a->k == nullptr ||
      a->v == nullptr || !in_range(a->sequences) || !in_range(a->heads) ||
      !in_range(a->kv_heads) || !in_range(a->length) || !in_range(a->width))
    return kBadInput;
  if (a->width % 16 || a->width > kMostWidth || a->heads % a->kv_heads ||
      !are_strides(a->q_stride, 2) || !are_strides(a->k_stride, 3) ||
      !are_strides(a->v_stride, 3) || !are_strides(a->mask_stride, 2))
    return kBadInput;
  if (a->y == nullptr) return kBadOutput;
  *job = AttentionJob{};
  job->q = a->q;
  job->k = a->k;
  job->v = a->v;
  job->heads = a->heads;
  job->kv_heads = a->kv_heads;
  job->length = a->length;
  job->width = a->width;
  for (int i = 0; i < 3; ++i) {
    job->k_stride[i] = a->k_stride[i];
    job->v_stride[i] = a->v_stride[i];
    if (i == 2) break;
    job->q_stride[i] = a->q_stride[i];
    job->mask_stride[i] = a->mask_stride[i];
  }
  job->mask = a->mask;
  job->dtype = int(a->dtype);
  job->scale = float(a->scale);
  job->y = a->y;
  // keys are read once for all heads that share them, unless that leaves threads without work
  const bool together = a->sequences * a->kv_heads >= kManyTasks;
  job->task_heads = together ? a->heads / a->kv_heads : 1;
  return kOk;
}

inline int64_t score_bytes(const ar_attention& a) {
  return a.sequences * a.heads * a.length * int64_t(sizeof(float));
}

inline int64_t tasks(const ar_attention& a, const AttentionJob& job) {
  return a.sequences * a.heads / job.task_heads;
}

// Tasks of attention that are worth a thread.
inline int64_t grain(const AttentionJob& job) {
  return ceil_div(kWorthAThread, 2 * job.task_heads * job.length * job.width);
}

inline int32_t job_of(const ar_pair* p, bool gates, PairJob* job) {
  if (p == nullptr || p->a == nullptr || p->b == nullptr || !is_type(p->dtype) || p->count < 0 ||
      p->count >= kMost || p->count % 16)
    return kBadInput;
  if (p->y == nullptr) return kBadOutput;
  *job = PairJob{p->a, p->b, int(p->dtype), gates, p->y};
  return kOk;
}

inline int32_t job_of(const ar_turn* t, TurnJob* job) {
  if (t == nullptr || t->cos == nullptr || t->sin == nullptr || !is_type(t->dtype) ||
      !in_range(t->sequences) || !in_range(t->heads) || !in_range(t->width) || t->width % 32)
    return kBadInput;
  if (t->x == nullptr) return kBadOutput;
  *job = TurnJob{t->x, t->cos, t->sin, int(t->dtype), t->heads, t->width};
  return kOk;
}

inline int32_t check(const ar_copy* c) {
  if (c == nullptr || c->x == nullptr || !is_type(c->dtype) || !in_range(c->sequences) ||
      !in_range(c->heads) || !in_range(c->width) || !are_strides(c->y_stride, 2))
    return kBadInput;
  return c->y == nullptr ? kBadOutput : kOk;
}

}  // namespace
}  // namespace ar
