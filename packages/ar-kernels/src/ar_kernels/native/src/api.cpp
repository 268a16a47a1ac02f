#include "api.h"

#include "crew.h"
#include "pack.h"
#include "products.h"

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
static bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static bool has_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && has_vnni();
}

const Kernels* kernels(int64_t isa) {
  __builtin_cpu_init();
  if (isa == 0) return &kPortable;
  if (isa == 1) return has_avx2() ? &kAvx2 : nullptr;
  if (isa == 2) return has_vnni() ? &kAvx512Vnni : has_avx512() ? &kAvx512 : nullptr;
  if (isa == 3) return has_bf16() ? &kAvx512Bf16 : nullptr;
  return nullptr;
}
#else
const Kernels* kernels(int64_t isa) { return isa == 0 ? &kPortable : nullptr; }
#endif

namespace {

constexpr int64_t kAbi = 6;

void prepare(const ar_runtime* rt, const Kernels& k, const Inputs& inputs, uint8_t* memory,
             Job* job) {
  place(inputs, memory, job);
  const int64_t tile_work = kTile * job->format.blocks * kDepth;
  parallel(rt, input_tiles(*job), ceil_div(kWorthAThread * 4, tile_work),
           [&](int64_t b, int64_t e) { prepare_tiles(k, *job, b, e); });
}

// A tile of rows, which every thread prepares for itself: the others wake meanwhile.
int32_t multiply_tile(const ar_runtime* rt, const Kernels& k, const Job& job) {
  const Inputs inputs = inputs_of(k, job);
  int32_t status = kOk;
  Ranges ranges;
  parallel(rt, job.format.strips, ceil_div(kWorthAThread, strip_work(job)),
           [&](int64_t b, int64_t e) {
             Scratch scratch;
             uint8_t* memory = static_cast<uint8_t*>(scratch.get(inputs.all()));
             if (memory == nullptr) {
               __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
               return;
             }
             Job mine = job;
             place(inputs, memory, &mine);
             fetch_first(job, b);
             prepare_tiles(k, mine, 0, 1);
             ranges.work(b, e, [&](int64_t strip) { multiply_strips(k, mine, strip, strip + 1); });
           });
  return status;
}

int32_t multiply(const ar_runtime* rt, const Kernels& k, const Format& f, const uint8_t* blob,
                 const uint8_t* first, const ar_product* p) {
  if (p->rows == 0) return kOk;
  Job job = job_of(k, f, blob, first, p);
  if (input_tiles(job) == 1) return multiply_tile(rt, k, job);
  const Inputs inputs = inputs_of(k, job);
  Scratch scratch;
  uint8_t* memory = static_cast<uint8_t*>(scratch.get(inputs.all()));
  if (memory == nullptr) return kNoMemory;
  prepare(rt, k, inputs, memory, &job);
  parallel(rt, f.strips, ceil_div(kWorthAThread, strip_work(job)),
           [&](int64_t b, int64_t e) {
             fetch_first(job, b);
             multiply_strips(k, job, b, e);
           });
  return kOk;
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
  sizes[3] = f.chunk;
  sizes[4] = f.lead;
  sizes[5] = f.chunk_groups;
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

int32_t ar_multiply_bound(const ar_bound* b, const void* x, int64_t rows, void* y) {
  if (b == nullptr || b->runtime == nullptr || b->weight == nullptr) return kBadFormat;
  const int64_t* meta = b->weight->meta;
  if (meta == nullptr || rows < 0 || rows >= int64_t(1) << 31) return kBadInput;
  const int64_t width = width_of(b->dtype);
  const ar_product product{x,        rows * meta[1] * width, rows, meta[1],
                           b->dtype, nullptr,                y,    rows * meta[0] * width};
  return ar_multiply(b->runtime, b->weight, &product);
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
