// Products with packed weights: what entry points are given becomes jobs, and the memory they need.
#pragma once
#include <string.h>

#include "runtime.h"
#include "whole.h"

namespace ar {
namespace {

constexpr int64_t kSeveral = 4;       // most weights of one call
constexpr int64_t kFirstBytes = 8192;  // of a range: fetches between products ask for later ones

struct Weights {
  Format format;
  int64_t count;
};

inline int32_t open(const ar_weight* w, Weights* out) {
  if (w == nullptr || !read_format(w->meta, &out->format)) return kBadFormat;
  out->count = w->meta[7];
  return w->blob != nullptr && w->bytes == out->format.bytes ? kOk : kBadBlob;
}

inline int32_t check(const Format& f, const ar_product* p) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (p == nullptr || p->dtype < 0 || p->dtype > kBF16 || p->rows < 0 || p->rows >= kMost)
    return kBadInput;
  if (p->rows == 0) return kOk;
  if (p->x == nullptr || p->stride < 0 || p->stride >= kMost) return kBadInput;
  const int width = width_of(p->dtype);
  if (p->x_bytes < ((p->rows - 1) * p->stride + f.columns) * width) return kBadInput;
  if (p->y == nullptr || p->y_bytes != p->rows * f.rows * width) return kBadOutput;
  return kOk;
}

inline Job job_of(const Kernels& k, const Format& f, const uint8_t* blob, const uint8_t* first,
           const ar_product* p) {
  Job job{};
  job.format = f;
  job.blob = blob;
  job.first = first;
  job.x = p->x;
  job.x_stride = p->stride;
  job.rows = p->rows;
  job.dtype = int(p->dtype);
  job.pieces = k.pieces[p->dtype];
  job.bias = p->bias;
  job.y = p->y;
  job.y_stride = f.rows;
  return job;
}

// Bytes of a product's inputs as the kernels read them.
struct Inputs {
  int64_t packed, sums, bases, digits;
  int64_t all() const { return ceil_div(packed + sums + bases + digits, 64) * 64; }
};

// Tells whether a product's inputs become whole numbers (digits.h).
inline bool in_digits(const Kernels& k, const Job& job) {
  const Format& f = job.format;
  if (job.rows > k.digit_rows || job.dtype != kBF16) return false;
  if (f.bits > 4) return f.kind == kInteger && k.words;
  if (f.bits > k.digit_bits || (f.group == kUnit && f.bits != 4)) return false;
  if (f.kind == kInteger) return true;
  return f.bits == 4 && whole_of(reinterpret_cast<const float*>(job.blob)).unit != 0;
}

inline Inputs inputs_of(const Kernels& k, const Job& job) {
  const Format& f = job.format;
  const int64_t virtual_rows = job.rows * job.pieces, tiles = ceil_div(virtual_rows, kTile);
  if (in_digits(k, job)) {
    const int64_t segments = f.group == kUnit ? 2 * f.blocks : f.blocks;
    const int64_t rows = padded_rows(job.rows);
    return Inputs{rows * f.blocks * 64, 0, 0, rows * segments * int64_t(sizeof(Digits))};
  }
  const bool needs_sums = f.zero || zero_bias(f, job.blob) != 0;
  const bool in_place = f.kind == kInteger && f.bits <= 6 && f.groups && job.pieces == 1 &&
                        virtual_rows <= k.in_place_rows;
  const int64_t of_groups = tiles * kTile * f.groups * 4;
  return Inputs{ceil_div(tiles * kTile * f.blocks * kDepth * k.element, 64) * 64,
                needs_sums ? of_groups : 0, in_place ? of_groups : 0, 0};
}

// Tells a job where its prepared inputs lie.
inline void place(const Inputs& inputs, uint8_t* memory, Job* job) {
  job->packed = memory;
  job->digits = inputs.digits ? reinterpret_cast<Digits*>(memory + inputs.packed) : nullptr;
  job->sums = inputs.sums ? reinterpret_cast<float*>(memory + inputs.packed) : nullptr;
  job->bases =
      inputs.bases ? reinterpret_cast<float*>(memory + inputs.packed + inputs.sums) : nullptr;
}

inline const ByDigits& digits_of(const Kernels& k, const Job& job) {
  return job.format.bits > 4 ? *k.words : *k.digits;
}

inline void prepare_tiles(const Kernels& k, const Job& job, int64_t begin, int64_t end) {
  if (job.digits) digits_of(k, job).prepare(job, begin, end);
  else k.prepare(job, begin, end);
}

inline void fetch_first(const Job& job, int64_t strip) {
  const uint8_t* first = job.first + strip * job.format.record;
  for (int64_t i = 0; i < kFirstBytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

inline void multiply_strips(const Kernels& k, const Job& job, int64_t begin, int64_t end) {
  if (job.digits) digits_of(k, job).multiply(job, begin, end);
  else k.multiply(job, begin, end);
}

inline int64_t input_tiles(const Job& job) { return ceil_div(job.rows * job.pieces, kTile); }

inline int64_t strip_work(const Job& job) {
  return kStrip * job.format.blocks * kDepth * job.rows * job.pieces;
}

// Tells whether what was prepared for one product serves another of the same x.
inline bool share_inputs(const Job& a, const Job& b) {
  const Format &f = a.format, &g = b.format;
  return f.columns == g.columns && f.group == g.group && f.bits == g.bits && f.kind == g.kind &&
         f.zero == g.zero && memcmp(a.blob, b.blob, kHeader) == 0;
}

}  // namespace
}  // namespace ar
