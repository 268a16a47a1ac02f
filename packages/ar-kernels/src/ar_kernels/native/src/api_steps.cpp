// Entry points for what a decoding step needs beside packed weights.
#include "step_jobs.h"

using namespace ar;

int32_t ar_multiply_floats(const ar_runtime* rt, const ar_floats* w, const ar_product* p) {
  if (p == nullptr || !is_type(p->dtype) || p->rows < 0 || p->rows > kFloatRows) return kBadInput;
  const int width = width_of(p->dtype);
  if (w == nullptr || w->values == nullptr || !in_range(w->features) || !in_range(w->columns) ||
      w->bytes != w->features * w->columns * width)
    return kBadBlob;
  if (p->rows == 0) return kOk;
  if (p->x == nullptr || p->stride < 0 || p->stride >= kMost ||
      p->x_bytes < ((p->rows - 1) * p->stride + w->columns) * width)
    return kBadInput;
  if (p->y == nullptr || p->y_bytes != p->rows * w->features * width) return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  FloatJob job{};
  job.w = w->values;
  job.features = w->features;
  job.columns = w->columns;
  job.x = p->x;
  job.x_stride = p->stride;
  job.rows = p->rows;
  job.dtype = int(p->dtype);
  job.bias = p->bias;
  job.y = p->y;
  job.depth = ceil_div(w->columns, 16) * 16;
  Scratch scratch;
  job.wide = static_cast<float*>(scratch.get(job.rows * job.depth * 4));
  if (job.wide == nullptr) return kNoMemory;
  k->steps->widen(job);
  parallel(rt, ceil_div(job.features, 16), ceil_div(kWorthAThread, 16 * job.depth * job.rows),
           [&](int64_t b, int64_t e) { k->steps->product(job, b, e); });
  return kOk;
}

int32_t ar_norm(const ar_runtime* rt, const ar_norm_input* n) {
  NormJob job;
  if (const int32_t bad = job_of(n, &job)) return bad;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  parallel(rt, n->rows, ceil_div(kWorthAThread, n->columns),
           [&](int64_t b, int64_t e) { k->steps->norm(job, b, e); });
  return kOk;
}

int32_t ar_attend(const ar_runtime* rt, const ar_attention* a) {
  AttentionJob job;
  if (const int32_t bad = job_of(a, &job)) return bad;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  Scratch scratch;
  job.scores = static_cast<float*>(scratch.get(score_bytes(*a)));
  if (job.scores == nullptr) return kNoMemory;
  parallel(rt, tasks(*a, job), grain(job),
           [&](int64_t b, int64_t e) { k->steps->attend(job, b, e); });
  return kOk;
}
