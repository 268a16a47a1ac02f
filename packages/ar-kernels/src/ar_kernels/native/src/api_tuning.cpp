// Entry points for what tuning a model asks for beside products.
#include "api_tuning.h"

#include <atomic>

#include "runtime.h"
#include "tuning.h"

using namespace ar;

namespace {

constexpr int64_t kMost = int64_t(1) << 40;
constexpr int64_t kValuesAThread = 1 << 14;

bool in_range(int64_t n) { return n > 0 && n < kMost; }

bool is_type(int64_t dtype) { return dtype == kF32 || dtype == kBF16; }

bool is_element(const ar_element& e) { return e.maximum > 0 && e.least > 0 && e.large > 0; }

Element element_of(const ar_element& e) { return Element{e.maximum, e.least, e.large}; }

// The loops of an instruction set, null where this processor lacks it.
const Tuning* tuning(int64_t isa) {
  if (kernels(isa) == nullptr) return nullptr;
#if defined(__x86_64__) && !defined(AR_PORTABLE_ONLY)
  if (isa >= 2) return &kTuningAvx512;
  if (isa == 1) return &kTuningAvx2;
#endif
  return &kTuningPortable;
}

bool opens(const ar_latent* l, LatentJob* job) {
  if (l == nullptr || l->value == nullptr || l->scale == nullptr || l->matrix == nullptr ||
      !in_range(l->groups) || !in_range(l->size) || !is_type(l->dtype))
    return false;
  if (l->zero != nullptr ? l->growth != nullptr || !(l->element.maximum > 0)
                         : !is_element(l->element))
    return false;
  *job = LatentJob{l->value, l->size, l->scale, l->growth, l->zero, element_of(l->element),
                   int(l->dtype), l->matrix};
  return true;
}

}  // namespace

int32_t ar_fake_quant(const ar_runtime* rt, const ar_groups* g) {
  if (g == nullptr || !is_type(g->dtype) || g->groups < 0 || g->groups >= kMost ||
      !in_range(g->size) || g->rule < kPowerBelow || g->rule > kBlockOfTensor ||
      !is_element(g->element))
    return kBadInput;
  if (g->groups == 0) return kOk;
  if (g->x == nullptr) return kBadInput;
  if (g->y == nullptr) return kBadOutput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  const GroupJob job{g->x,     g->size,  int(g->dtype),          int(g->rule),
                     int(g->top), g->whole, element_of(g->element), g->y, g->inside};
  parallel(rt, g->groups, ceil_div(kValuesAThread, g->size),
           [&](int64_t b, int64_t e) { t->fake_quant(job, b, e); });
  return kOk;
}

int32_t ar_mask(const ar_runtime* rt, const void* x, const uint8_t* inside, int64_t dtype,
                int64_t count, void* y) {
  if (!is_type(dtype) || count < 0 || count >= kMost) return kBadInput;
  if (count == 0) return kOk;
  if (x == nullptr || inside == nullptr) return kBadInput;
  if (y == nullptr) return kBadOutput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  const MaskJob job{x, inside, int(dtype), y};
  parallel(rt, count, kValuesAThread, [&](int64_t b, int64_t e) { t->mask(job, b, e); });
  return kOk;
}

int32_t ar_make(const ar_runtime* rt, const ar_latent* latent) {
  LatentJob job;
  if (!opens(latent, &job)) return kBadInput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  parallel(rt, latent->groups, ceil_div(kValuesAThread, latent->size),
           [&](int64_t b, int64_t e) { t->make(job, b, e); });
  return kOk;
}

int32_t ar_move(const ar_runtime* rt, const ar_latent* latent, const ar_adam* a) {
  MoveJob job{};
  if (!opens(latent, &job.latent) || latent->size % 16) return kBadInput;
  if (a == nullptr || (a->first == nullptr) != (a->second == nullptr) ||
      (a->first == nullptr && a->sums == nullptr) ||
      (latent->zero != nullptr && a->slope == nullptr))
    return kBadInput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  job.slope = a->slope;
  job.first = a->first;
  job.second = a->second;
  job.unit = a->unit;
  job.size = a->size;
  job.keep_first = a->keep_first;
  job.keep_second = a->keep_second;
  job.correction = a->correction;
  job.tiny = a->tiny;
  job.sums = a->sums;
  job.groups = latent->groups;
  parallel(rt, latent->groups, ceil_div(kValuesAThread, latent->size),
           [&](int64_t b, int64_t e) { t->move(job, b, e); });
  return kOk;
}

int32_t ar_diverge(const ar_runtime* rt, const ar_logits* l) {
  if (l == nullptr || !is_type(l->dtype) || l->rows < 0 || l->rows >= kMost ||
      !in_range(l->columns))
    return kBadInput;
  if (l->rows == 0) return kOk;
  if (l->mine == nullptr || l->theirs == nullptr) return kBadInput;
  if (l->grad == nullptr || l->parts == nullptr) return kBadOutput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  const DivergenceJob job{l->mine, l->theirs, l->columns, int(l->dtype), l->grad, l->parts};
  std::atomic<bool> failed{false};
  parallel(rt, l->rows, ceil_div(kValuesAThread, l->columns), [&](int64_t b, int64_t e) {
    Scratch scratch;
    float* memory = static_cast<float*>(scratch.get(l->columns * 8));
    if (memory == nullptr) failed = true;
    else t->diverge(job, b, e, memory);
  });
  return failed ? kNoMemory : kOk;
}

int32_t ar_soften(const ar_runtime* rt, const ar_scores* s) {
  if (s == nullptr || !is_type(s->dtype) || s->rows < 0 || s->rows >= kMost ||
      !in_range(s->queries) || s->keys < s->queries || s->keys > kMostKeys)
    return kBadInput;
  if (s->rows == 0) return kOk;
  if (s->scores == nullptr) return kBadOutput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  const ScoresJob job{s->scores, s->weights, s->queries, s->keys, s->scale, int(s->dtype)};
  parallel(rt, s->rows, ceil_div(kValuesAThread, s->keys),
           [&](int64_t b, int64_t e) { t->soften(job, b, e); });
  return kOk;
}

int32_t ar_norm_back(const ar_runtime* rt, const ar_norm_grad* n) {
  if (n == nullptr || !is_type(n->dtype) || n->rows < 0 || n->rows >= kMost ||
      !in_range(n->columns) || n->columns % 16 || n->form < 0 || n->form > kNormPlain)
    return kBadInput;
  if (n->rows == 0) return kOk;
  if (n->x == nullptr || n->weight == nullptr || n->grad == nullptr) return kBadInput;
  if (n->to_x == nullptr || n->to_weight == nullptr) return kBadOutput;
  const Tuning* t = tuning(rt->isa);
  if (t == nullptr) return kBadIsa;
  const NormBackJob job{n->x,          n->weight,    n->grad,           n->rows, n->columns,
                        int(n->dtype), int(n->form), float(n->epsilon), n->to_x, n->to_weight};
  parallel(rt, ceil_div(n->rows, kNormRows), ceil_div(kValuesAThread, kNormRows * n->columns),
           [&](int64_t b, int64_t e) { t->norm_back(job, b, e); });
  return kOk;
}
