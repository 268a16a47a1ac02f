// Entry points for bf16 weights in 12 bits (compact.h).
#include <string.h>

#include "step_jobs.h"

using namespace ar;

namespace {

constexpr int kCodes = 16, kNotFinite = 0xff;

inline float float_of_bf16(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint32_t exponent(uint16_t v) { return v >> 7 & 0xff; }

// What is taken from a row's exponents to become codes.
inline uint32_t base_of(const uint16_t* row, int64_t columns) {
  uint32_t most = 0;
  for (int64_t k = 0; k < columns; ++k) most = exponent(row[k]) > most ? exponent(row[k]) : most;
  return most < kCodes ? 0 : most - (kCodes - 1);
}

inline bool is_outlier(uint16_t v, uint32_t base) { return exponent(v) && exponent(v) <= base; }

int32_t check_floats(const ar_floats* w, int64_t begin, int64_t end) {
  if (w == nullptr || w->values == nullptr || !in_range(w->features) || !in_range(w->columns) ||
      w->bytes != w->features * w->columns * 2)
    return kBadBlob;
  return begin >= 0 && begin <= end && end <= w->features ? kOk : kBadRange;
}

// A row as blocks.
void write_row(const uint16_t* row, int64_t columns, uint32_t base, uint8_t* blocks) {
  for (int64_t k = 0; k < columns; k += 8) {  // neighbours
    const int column = int(k % kCompactColumns), shift = column / 64 * 4;
    uint8_t* block = blocks + k / kCompactColumns * kCompactBlock;
    uint8_t* rest = block + column / 64 * 64 + compact_place(column % 64);
    uint8_t* codes = block + 128 + compact_place(column % 64);
    const int count = int(columns - k < 8 ? columns - k : 8);
    for (int i = 0; i < count; ++i) {
      const uint32_t v = row[k + i], e = exponent(row[k + i]);
      const bool kept = e == 0 || e > base;
      rest[i] = kept ? uint8_t(v >> 8 & 0x80) | uint8_t(v & 0x7f) : 0;
      codes[i] |= uint8_t((e > base ? e - base : 0) << shift);
    }
  }
}

// The outliers of a row; no more than there is room for.
void write_outliers(const uint16_t* row, int64_t columns, uint32_t base, Outlier* to,
                    const Outlier* last) {
  for (int64_t k = 0; k < columns && to < last; ++k)
    if (is_outlier(row[k], base)) {
      to->column = uint32_t(k);
      to->value = float_of_bf16(row[k]);
      ++to;
    }
}

}  // namespace

int64_t ar_compact_bytes(int64_t features, int64_t columns, int64_t outliers) {
  if (!in_range(features) || !in_range(columns) || outliers < 0 || outliers >= kMost) return -1;
  return compact(features, columns, outliers).bytes;
}

int32_t ar_compact_ends(const ar_runtime* rt, const ar_floats* w, int64_t begin, int64_t end,
                        uint32_t* ends) {
  if (const int32_t bad = check_floats(w, begin, end)) return bad;
  if (ends == nullptr) return kBadOutput;
  const uint16_t* values = static_cast<const uint16_t*>(w->values);
  parallel(rt, end - begin, ceil_div(kWorthAThread, w->columns), [&](int64_t b, int64_t e) {
    for (int64_t r = begin + b; r < begin + e; ++r) {
      const uint16_t* row = values + r * w->columns;
      const uint32_t base = base_of(row, w->columns);
      uint32_t count = 0;
      for (int64_t k = 0; k < w->columns; ++k) count += is_outlier(row[k], base);
      ends[r] = base + kCodes - 1 == kNotFinite ? UINT32_MAX : count;
    }
  });
  uint64_t sum = begin ? ends[begin - 1] : 0;
  for (int64_t r = begin; r < end; ++r) {
    if (ends[r] == UINT32_MAX || (sum += ends[r]) >= uint64_t(kMost)) return kBadRange;
    ends[r] = uint32_t(sum);
  }
  return kOk;
}

int32_t ar_compact(const ar_runtime* rt, const ar_floats* w, int64_t begin, int64_t end,
                   const uint32_t* ends, uint8_t* blob, int64_t bytes) {
  if (const int32_t bad = check_floats(w, begin, end)) return bad;
  if (ends == nullptr || blob == nullptr) return kBadBlob;
  const Compact c = compact(w->features, w->columns, ends[w->features - 1]);
  if (bytes != c.bytes) return kBadBlob;
  const uint16_t* values = static_cast<const uint16_t*>(w->values);
  uint32_t* own = reinterpret_cast<uint32_t*>(blob + c.ends_at);
  auto* outliers = reinterpret_cast<Outlier*>(blob + c.outliers_at);
  if (begin == 0) memset(blob, 0, size_t(c.rows_at));
  parallel(rt, end - begin, ceil_div(kWorthAThread, w->columns), [&](int64_t b, int64_t e) {
    for (int64_t r = begin + b; r < begin + e; ++r) {
      const uint16_t* row = values + r * w->columns;
      uint8_t* to = blob + c.rows_at + r * c.blocks * kCompactBlock;
      memset(to, 0, size_t(c.blocks * kCompactBlock));
      blob[r] = uint8_t(base_of(row, w->columns));
      own[r] = ends[r];
      write_row(row, w->columns, blob[r], to);
      write_outliers(row, w->columns, blob[r], outliers + (r ? ends[r - 1] : 0), outliers + ends[r]);
    }
  });
  return kOk;
}

int32_t ar_multiply_compact(const ar_runtime* rt, const ar_compact_weight* w, const ar_product* p) {
  if (w == nullptr || w->blob == nullptr) return kBadBlob;
  if (ar_compact_bytes(w->features, w->columns, w->outliers) != w->bytes) return kBadBlob;
  const Compact c = compact(w->features, w->columns, w->outliers);
  if (p == nullptr || p->dtype != kBF16 || p->rows < 0 || p->rows > kFloatRows) return kBadInput;
  if (p->rows == 0) return kOk;
  if (p->x == nullptr || p->stride < 0 || p->stride >= kMost ||
      p->x_bytes < ((p->rows - 1) * p->stride + c.columns) * 2)
    return kBadInput;
  if (p->y == nullptr || p->y_bytes != p->rows * c.features * 2) return kBadOutput;
  const Kernels* k = kernels(rt->isa);
  if (k == nullptr) return kBadIsa;
  CompactJob job{};
  job.bases = w->blob;
  job.ends = reinterpret_cast<const uint32_t*>(w->blob + c.ends_at);
  job.outliers = reinterpret_cast<const Outlier*>(w->blob + c.outliers_at);
  job.codes = w->blob + c.rows_at;
  job.features = c.features;
  job.columns = c.columns;
  job.blocks = c.blocks;
  job.count = c.count;
  job.x = p->x;
  job.x_stride = p->stride;
  job.rows = p->rows;
  job.bias = p->bias;
  job.y = p->y;
  Scratch scratch;
  job.ready = scratch.get(job.rows * job.blocks * kCompactColumns * 4);
  if (job.ready == nullptr) return kNoMemory;
  const ByCompact& by = *k->steps->compact;
  by.prepare(job);
  const int64_t work = 16 * job.blocks * kCompactColumns * job.rows;
  parallel(rt, ceil_div(job.features, 16), ceil_div(kWorthAThread, work),
           [&](int64_t b, int64_t e) { by.multiply(job, b, e); });
  return kOk;
}
