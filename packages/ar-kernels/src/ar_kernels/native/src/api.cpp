#include "api.h"

#include <string.h>

#include "pack.h"
#include "runtime.h"

namespace ar {

#if defined(__x86_64__) && !defined(AR_PORTABLE_ONLY)
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static bool has_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

const Kernels* kernels(int64_t isa) {
  __builtin_cpu_init();
  if (isa == 0) return &kPortable;
  if (isa == 1) return has_avx2() ? &kAvx2 : nullptr;
  if (isa == 2) return has_avx512() ? &kAvx512 : nullptr;
  if (isa == 3) return has_bf16() ? &kAvx512Bf16 : nullptr;
  return nullptr;
}
#else
const Kernels* kernels(int64_t isa) { return isa == 0 ? &kPortable : nullptr; }
#endif

namespace {

constexpr int64_t kAbi = 2;
constexpr int64_t kSeveral = 4;  // most weights of one call

struct Weights {
  Format format;
  int64_t count;
};

int32_t open(const ar_weight* w, Weights* out) {
  if (w == nullptr || !read_format(w->meta, &out->format)) return kBadFormat;
  out->count = w->meta[7];
  return w->blob != nullptr && w->bytes == out->format.bytes ? kOk : kBadBlob;
}

int32_t check(const Format& f, const ar_product* p) {
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

Job job_of(const Kernels& k, const Format& f, const uint8_t* blob, const uint8_t* first,
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
  int64_t packed, sums, bases;
  int64_t all() const { return ceil_div(packed + sums + bases, 64) * 64; }
};

Inputs inputs_of(const Kernels& k, const Job& job) {
  const Format& f = job.format;
  const int64_t virtual_rows = job.rows * job.pieces, tiles = ceil_div(virtual_rows, kTile);
  const bool needs_sums = f.zero || zero_bias(f, job.blob) != 0;
  const bool in_place = f.kind == kInteger && f.bits <= 4 && f.groups && job.pieces == 1 &&
                        virtual_rows <= k.in_place_rows;
  const int64_t of_groups = tiles * kTile * f.groups * 4;
  return Inputs{ceil_div(tiles * kTile * f.blocks * kDepth * k.element, 64) * 64,
                needs_sums ? of_groups : 0, in_place ? of_groups : 0};
}

void prepare(const ar_runtime* rt, const Kernels& k, const Inputs& inputs, uint8_t* memory,
             Job* job) {
  job->packed = memory;
  job->sums = inputs.sums ? reinterpret_cast<float*>(memory + inputs.packed) : nullptr;
  job->bases =
      inputs.bases ? reinterpret_cast<float*>(memory + inputs.packed + inputs.sums) : nullptr;
  const int64_t tile_work = kTile * job->format.blocks * kDepth;
  parallel(rt, ceil_div(job->rows * job->pieces, kTile), ceil_div(kWorthAThread * 4, tile_work),
           [&](int64_t b, int64_t e) { k.prepare(*job, b, e); });
}

int64_t strip_work(const Job& job) {
  return kStrip * job.format.blocks * kDepth * job.rows * job.pieces;
}

int32_t multiply(const ar_runtime* rt, const Kernels& k, const Format& f, const uint8_t* blob,
                 const uint8_t* first, const ar_product* p) {
  if (p->rows == 0) return kOk;
  Job job = job_of(k, f, blob, first, p);
  const Inputs inputs = inputs_of(k, job);
  Scratch scratch;
  uint8_t* memory = static_cast<uint8_t*>(scratch.get(inputs.all()));
  if (memory == nullptr) return kNoMemory;
  prepare(rt, k, inputs, memory, &job);
  parallel(rt, f.strips, ceil_div(kWorthAThread, strip_work(job)),
           [&](int64_t b, int64_t e) { k.multiply(job, b, e); });
  return kOk;
}

// Tells whether what was prepared for one product serves another of the same x.
bool share_inputs(const Job& a, const Job& b) {
  const Format &f = a.format, &g = b.format;
  return f.columns == g.columns && f.group == g.group && f.bits == g.bits && f.kind == g.kind &&
         f.zero == g.zero && memcmp(a.blob, b.blob, kHeader) == 0;
}

}  // namespace
}  // namespace ar

using namespace ar;

int64_t ar_abi(void) { return kAbi; }

int32_t ar_runs(int64_t isa) { return kernels(isa) != nullptr; }

const char* ar_isa_name(int64_t isa) {
  const Kernels* k = kernels(isa);
  return k == nullptr ? "" : k->name;
}

int32_t ar_sizes(const int64_t* meta, int64_t* sizes) {
  Format f;
  if (!read_format(meta, &f)) return kBadFormat;
  sizes[0] = f.bytes;
  sizes[1] = kHeader;
  sizes[2] = f.record;
  sizes[3] = f.scales_at;
  sizes[4] = f.zeros_at;
  sizes[5] = f.codes_at;
  return kOk;
}

int32_t ar_pack(const ar_runtime* rt, const int64_t* meta, const uint8_t* codes,
                int64_t codes_bytes, uint8_t* blob, int64_t bytes) {
  const ar_weight given{meta, blob, bytes};
  Weights w;
  if (const int32_t bad = open(&given, &w)) return bad;
  const Format& f = w.format;
  if (codes == nullptr || codes_bytes != f.rows * f.columns * w.count) return kBadInput;
  for (int64_t i = 0; i < w.count; ++i) {
    const uint8_t* from = codes + i * f.rows * f.columns;
    uint8_t* first = blob + kHeader + i * f.strips * f.record;
    parallel(rt, f.strips, 1, [&](int64_t b, int64_t e) { pack_strips(f, from, first, b, e); });
  }
  return kOk;
}

int32_t ar_unpack(const ar_runtime* rt, const ar_weight* weight, uint8_t* codes,
                  int64_t codes_bytes) {
  Weights w;
  if (const int32_t bad = open(weight, &w)) return bad;
  const Format& f = w.format;
  if (codes == nullptr || codes_bytes != f.rows * f.columns * w.count) return kBadOutput;
  for (int64_t i = 0; i < w.count; ++i) {
    const uint8_t* first = weight->blob + kHeader + i * f.strips * f.record;
    uint8_t* to = codes + i * f.rows * f.columns;
    parallel(rt, f.strips, 1, [&](int64_t b, int64_t e) { unpack_strips(f, first, to, b, e); });
  }
  return kOk;
}

int32_t ar_multiply(const ar_runtime* rt, const ar_weight* weight, const ar_product* product) {
  Weights w;
  if (const int32_t bad = open(weight, &w)) return bad;
  if (w.count != 1) return kBadFormat;
  if (const int32_t bad = check(w.format, product)) return bad;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  return multiply(rt, *k, w.format, weight->blob, weight->blob + kHeader, product);
}

int32_t ar_multiply_several(const ar_runtime* rt, const ar_weight* weights,
                            const ar_product* products, int64_t count) {
  if (count < 1 || count > kSeveral || weights == nullptr || products == nullptr) return kBadRange;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  Job jobs[kSeveral];
  int64_t places[kSeveral + 1] = {}, ends[kSeveral], strips = 0;
  for (int64_t i = 0; i < count; ++i) {
    const ar_product &p = products[i], &q = products[0];
    Weights w;
    if (const int32_t bad = open(weights + i, &w)) return bad;
    if (w.count != 1) return kBadFormat;
    if (const int32_t bad = check(w.format, &p)) return bad;
    if (p.x != q.x || p.rows != q.rows || p.stride != q.stride || p.dtype != q.dtype)
      return kBadInput;
    jobs[i] = job_of(*k, w.format, weights[i].blob, weights[i].blob + kHeader, &p);
    places[i + 1] = places[i] + inputs_of(*k, jobs[i]).all();
    ends[i] = strips += w.format.strips;
  }
  if (products[0].rows == 0) return kOk;
  Scratch scratch;
  uint8_t* memory = static_cast<uint8_t*>(scratch.get(places[count]));
  if (memory == nullptr) return kNoMemory;
  for (int64_t i = 0; i < count; ++i) {
    if (i && share_inputs(jobs[i], jobs[0])) {
      jobs[i].packed = jobs[0].packed;
      jobs[i].sums = jobs[0].sums;
      jobs[i].bases = jobs[0].bases;
    } else {
      prepare(rt, *k, inputs_of(*k, jobs[i]), memory + places[i], jobs + i);
    }
  }
  parallel(rt, strips, ceil_div(kWorthAThread, strip_work(jobs[0])), [&](int64_t b, int64_t e) {
    for (int64_t i = 0, first = 0; i < count; first = ends[i++]) {
      const int64_t from = b > first ? b : first, to = e < ends[i] ? e : ends[i];
      if (from < to) k->multiply(jobs[i], from - first, to - first);
    }
  });
  return kOk;
}

int32_t ar_multiply_experts(const ar_runtime* rt, const ar_weight* weight,
                            const ar_product* product, const int64_t* offsets, int64_t count) {
  Weights w;
  if (const int32_t bad = open(weight, &w)) return bad;
  if (const int32_t bad = check(w.format, product)) return bad;
  if (offsets == nullptr || count != w.count + 1 || offsets[0] != 0) return kBadRange;
  for (int64_t e = 0; e < w.count; ++e)
    if (offsets[e + 1] < offsets[e]) return kBadRange;
  if (offsets[w.count] != product->rows) return kBadRange;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  const Format& f = w.format;
  const int width = width_of(product->dtype);
  for (int64_t e = 0; e < w.count; ++e) {
    ar_product part = *product;
    part.rows = offsets[e + 1] - offsets[e];
    part.x = static_cast<const uint8_t*>(product->x) + offsets[e] * product->stride * width;
    part.y = static_cast<uint8_t*>(product->y) + offsets[e] * f.rows * width;
    part.bias = product->bias == nullptr ? nullptr : product->bias + e * f.rows;
    const uint8_t* first = weight->blob + kHeader + e * f.strips * f.record;
    if (const int32_t bad = multiply(rt, *k, f, weight->blob, first, &part)) return bad;
  }
  return kOk;
}

int32_t ar_expand(const ar_runtime* rt, const ar_weight* weight, int64_t begin, int64_t end,
                  int64_t dtype, void* out, int64_t out_bytes) {
  Weights w;
  if (const int32_t bad = open(weight, &w)) return bad;
  const Format& f = w.format;
  if (w.count != 1 || dtype < 0 || dtype > kBF16) return kBadInput;
  if (begin < 0 || begin % kStrip || end < begin || end > f.rows) return kBadRange;
  if (out == nullptr || out_bytes != (end - begin) * f.columns * width_of(dtype))
    return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  Job job{};
  job.format = f;
  job.format.rows = end;  // what lies beyond is not written
  job.blob = weight->blob;
  job.first = weight->blob + kHeader;
  job.y = out;
  job.y_stride = f.columns;
  job.dtype = int(dtype);
  const int64_t first = begin / kStrip;
  parallel(rt, ceil_div(end, kStrip) - first, 1,
           [&](int64_t b, int64_t e) { k->expand(job, first, first + b, first + e); });
  return kOk;
}

int32_t ar_read(const ar_runtime* rt, const uint8_t* buffer, int64_t bytes, float* out) {
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  if (buffer == nullptr || bytes < 0 || out == nullptr) return kBadInput;
  constexpr int64_t kPart = 1 << 20;
  float sums[64] = {};
  parallel(rt, ceil_div(bytes, kPart), 1, [&](int64_t b, int64_t e) {
    const int64_t last = e * kPart < bytes ? e * kPart : bytes;
    sums[b % 64] = k->read(buffer + b * kPart, last - b * kPart);
  });
  *out = 0;
  for (float s : sums) *out += s;
  return kOk;
}
