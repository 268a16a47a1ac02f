// Entry points for what a decoding step needs beside packed weights.
#include "runtime.h"

using namespace ar;

namespace {

constexpr int64_t kMost = int64_t(1) << 31;
constexpr int64_t kManyTasks = 8;  // from here on, heads that share keys stay together

bool in_range(int64_t n) { return n > 0 && n < kMost; }

bool are_strides(const int64_t* strides, int count) {
  for (int i = 0; i < count; ++i)
    if (strides[i] < 0) return false;
  return true;
}

bool is_type(int64_t dtype) { return dtype >= 0 && dtype <= kBF16; }

}  // namespace

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
  if (n == nullptr || !is_type(n->dtype) || n->rows < 0 || n->rows >= kMost ||
      !in_range(n->columns) || n->columns % 16 || n->form < 0 || n->form > kNormPlain)
    return kBadInput;
  if (n->rows == 0) return kOk;
  if (n->x == nullptr || n->weight == nullptr || n->stride < 0 || n->stride >= kMost ||
      n->x_bytes < ((n->rows - 1) * n->stride + n->columns) * width_of(n->dtype))
    return kBadInput;
  if (n->y == nullptr) return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  const NormJob job{n->x,    n->stride, n->columns,        int(n->dtype), int(n->form),
                    n->weight, float(n->epsilon), n->y};
  parallel(rt, n->rows, ceil_div(kWorthAThread, n->columns),
           [&](int64_t b, int64_t e) { k->steps->norm(job, b, e); });
  return kOk;
}

int32_t ar_attend(const ar_runtime* rt, const ar_attention* a) {
  if (a == nullptr || !is_type(a->dtype) || a->q == nullptr || a->k == nullptr ||
      a->v == nullptr || !in_range(a->sequences) || !in_range(a->heads) ||
      !in_range(a->kv_heads) || !in_range(a->length) || !in_range(a->width))
    return kBadInput;
  if (a->width % 16 || a->width > kMostWidth || a->heads % a->kv_heads ||
      !are_strides(a->q_stride, 2) || !are_strides(a->k_stride, 3) ||
      !are_strides(a->v_stride, 3) || !are_strides(a->mask_stride, 2))
    return kBadInput;
  if (a->y == nullptr) return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  AttentionJob job{};
  job.q = a->q;
  job.k = a->k;
  job.v = a->v;
  job.heads = a->heads;
  job.kv_heads = a->kv_heads;
  job.length = a->length;
  job.width = a->width;
  for (int i = 0; i < 3; ++i) {
    job.k_stride[i] = a->k_stride[i];
    job.v_stride[i] = a->v_stride[i];
    if (i == 2) break;
    job.q_stride[i] = a->q_stride[i];
    job.mask_stride[i] = a->mask_stride[i];
  }
  job.mask = a->mask;
  job.dtype = int(a->dtype);
  job.scale = float(a->scale);
  job.y = a->y;
  // keys are read once for all heads that share them, unless that leaves threads without work
  const bool together = a->sequences * a->kv_heads >= kManyTasks;
  job.task_heads = together ? a->heads / a->kv_heads : 1;
  Scratch scratch;
  job.scores = static_cast<float*>(scratch.get(a->sequences * a->heads * a->length * 4));
  if (job.scores == nullptr) return kNoMemory;
  const int64_t work = 2 * job.task_heads * a->length * a->width;
  parallel(rt, a->sequences * a->heads / job.task_heads, ceil_div(kWorthAThread, work),
           [&](int64_t b, int64_t e) { k->steps->attend(job, b, e); });
  return kOk;
}

static int32_t pair(const ar_runtime* rt, PairJob job, int64_t dtype, int64_t count) {
  if (job.a == nullptr || job.b == nullptr || !is_type(dtype) || count < 0 || count % 16)
    return kBadInput;
  if (job.y == nullptr) return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  job.dtype = int(dtype);
  parallel(rt, count / 16, kWorthAThread / 16,
           [&](int64_t b, int64_t e) { k->steps->pair(job, b, e); });
  return kOk;
}

int32_t ar_gate(const ar_runtime* rt, const void* gate, const void* up, int64_t dtype,
                int64_t count, void* y) {
  return pair(rt, PairJob{gate, up, 0, true, y}, dtype, count);
}

int32_t ar_add(const ar_runtime* rt, const void* a, const void* b, int64_t dtype, int64_t count,
               void* y) {
  return pair(rt, PairJob{a, b, 0, false, y}, dtype, count);
}

int32_t ar_turn(const ar_runtime* rt, void* x, const void* cos, const void* sin, int64_t dtype,
                int64_t sequences, int64_t heads, int64_t width) {
  if (cos == nullptr || sin == nullptr || !is_type(dtype) || !in_range(sequences) ||
      !in_range(heads) || !in_range(width) || width % 32)
    return kBadInput;
  if (x == nullptr) return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  const TurnJob job{x, cos, sin, int(dtype), heads, width};
  parallel(rt, sequences * heads, ceil_div(kWorthAThread, width),
           [&](int64_t b, int64_t e) { k->steps->turn(job, b, e); });
  return kOk;
}
