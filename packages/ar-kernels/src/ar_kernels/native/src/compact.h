// bf16 weights in 12 bits each, without loss.
//
// The exponents of a row of weights are few: sixteen powers of two below the largest hold all but
// one in thousands. So a weight is a byte of its sign and mantissa and a code of four bits: 0 for an
// exponent of zero (zeros and subnormal numbers), else what the row's base lacks to its exponent.
// What is smaller than that is a zero here and stands in a list, which a product adds at its end.
//
// A blob, its parts beginning at multiples of 64 bytes:
//   uint8_t  bases[features]
//   uint32_t ends[features]      outliers of all rows up to and with each
//   Outlier  outliers[]
//   uint8_t  rows[features][blocks][192]   of 128 columns, zeros behind the last
// A block is the bytes of columns 0 to 63 and of 64 to 127, ordered such that a vector's unpacking
// with its exponents gives runs of neighbours, and the codes of both: low and high halves of bytes.
#pragma once
#include <stdint.h>

#include "format.h"

namespace ar {

constexpr int kCompactColumns = 128, kCompactBlock = 192;

struct Outlier {
  uint32_t column;
  float value;
};

struct Compact {
  int64_t features, columns, blocks, count;  // count: of outliers
  int64_t ends_at, outliers_at, rows_at, bytes;
};

inline Compact compact(int64_t features, int64_t columns, int64_t count) {
  const auto whole = [](int64_t bytes) { return ceil_div(bytes, 64) * 64; };
  Compact c{features, columns, ceil_div(columns, kCompactColumns), count, 0, 0, 0, 0};
  c.ends_at = whole(features);
  c.outliers_at = c.ends_at + whole(features * 4);
  c.rows_at = c.outliers_at + whole(count * int64_t(sizeof(Outlier)));
  c.bytes = c.rows_at + features * c.blocks * kCompactBlock;
  return c;
}

// Place of the byte of a column among 64.
constexpr int compact_place(int column) {
  const int half = column % 32;
  return 16 * (half / 8) + half % 8 + (column >= 32 ? 8 : 0);
}

struct CompactJob {
  const uint8_t* bases;
  const uint32_t* ends;
  const Outlier* outliers;
  const uint8_t* codes;
  int64_t features, columns, blocks, count;
  const void* x;     // bf16
  int64_t x_stride, rows;
  const float* bias;
  void* y;           // bf16 [rows][features]
  void* ready;       // x as the kernel reads it, [rows][blocks * 128], of 4 bytes at most
};

}  // namespace ar
