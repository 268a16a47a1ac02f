// What one instruction set offers, and the work that the entry points hand to it.
#pragma once
#include <stdint.h>

#include "compact.h"
#include "format.h"

namespace ar {

constexpr int kTile = 6;            // virtual rows of a tile: divisible by 1, 2 and 3 pieces
constexpr int kTilesAtOnce = 16;    // tiles whose sums stay in the second-level cache

// What a segment's inputs were divided by to become whole numbers, and the sum of those.
struct Digits {
  float size, sum;
};

struct Job {
  Format format;
  const uint8_t* blob;   // header
  const uint8_t* first;  // record of the first strip
  const void* x;
  int64_t x_stride;      // elements from one row to the next
  int64_t rows;          // rows of x
  int dtype;             // of x and of the output
  int pieces;            // virtual rows for one row of x
  const float* bias;     // one value for each feature, or null
  void* y;
  int64_t y_stride;
  void* packed;          // x as the kernel reads it
  float* sums;           // sums of x over groups, one for each group and virtual row, or null
  float* bases;          // where codes are read in place: what each group adds too much, or null
  Digits* digits;        // where they are whole numbers: one for each segment, or null
};

// What is added to every zero point; weights without groups have neither.
inline float zero_bias(const Format& f, const uint8_t* blob) {
  return f.groups ? reinterpret_cast<const float*>(blob)[kZeroBias] : 0.0f;
}

// Rows that become whole numbers: one, or pairs.
constexpr int64_t padded_rows(int64_t rows) { return rows == 1 ? 1 : (rows + 1) / 2 * 2; }

constexpr int kFloatRows = 4;    // most rows of x for a product with a float weight
constexpr int kMostWidth = 512;  // of an attention head

// A product with a float weight [features][columns] in the type of x.
struct FloatJob {
  const void* w;
  int64_t features, columns;
  const void* x;
  int64_t x_stride, rows;
  int dtype;
  const float* bias;
  void* y;         // [rows][features]
  float* wide;     // x in float32, [rows][depth]
  int64_t depth;   // columns and zeros behind them
};

enum NormForm { kNormRoundsFirst = 0, kNormAddsOne = 1, kNormPlain = 2 };

struct NormJob {
  const void* x;
  int64_t x_stride, columns;
  int dtype, form;
  const void* weight;
  float epsilon;
  void* y;
};

// One query for each head of each sequence; strides of sequences, heads and tokens, in elements.
struct AttentionJob {
  const void *q, *k, *v;
  int64_t heads, kv_heads, length, width;
  int64_t q_stride[2], k_stride[3], v_stride[3], mask_stride[2];
  const uint8_t* mask;  // bytes, 0: not seen; or null
  int dtype;
  float scale;
  float* scores;        // [sequences][heads][length]
  int64_t task_heads;
  void* y;              // [sequences][heads][width]
};

// What is done to each of `count` values: y = silu(a) * b, or a + b.
struct PairJob {
  const void *a, *b;
  int dtype;
  bool gates;
  void* y;
};

struct TurnJob {
  void* x;
  const void *cos, *sin;
  int dtype;
  int64_t heads, width;
};

// Products with weights as compact.h has them.
struct ByCompact {
  void (*prepare)(const CompactJob&);
  void (*multiply)(const CompactJob&, int64_t begin, int64_t end);  // in units of 16 features
};

struct Steps {
  void (*widen)(const FloatJob&);
  void (*product)(const FloatJob&, int64_t begin, int64_t end);  // in units of 16 features
  void (*norm)(const NormJob&, int64_t begin, int64_t end);      // rows
  void (*attend)(const AttentionJob&, int64_t begin, int64_t end);
  void (*pair)(const PairJob&, int64_t begin, int64_t end);      // in units of 16 values
  void (*turn)(const TurnJob&, int64_t begin, int64_t end);      // heads of all sequences
  const ByCompact* compact;
};

// Products where inputs are whole numbers (digits.h).
struct ByDigits {
  void (*prepare)(const Job&, int64_t tile_begin, int64_t tile_end);
  void (*multiply)(const Job&, int64_t strip_begin, int64_t strip_end);
};

struct Kernels {
  const char* name;
  int pieces[3];     // virtual rows for a row of fp32, fp16, bf16
  int element;       // bytes of a packed input of one virtual row
  int in_place_rows; // most rows for which narrow integers are read in place (see Job::bases)
  int digit_bits;    // most bits of integers that rows of bf16 are multiplied by in whole numbers
  int digit_rows;    // most rows
  const ByDigits* digits;
  const ByDigits* words;  // the same for 5 bits and more, or null
  void (*prepare)(const Job&, int64_t tile_begin, int64_t tile_end);
  void (*multiply)(const Job&, int64_t strip_begin, int64_t strip_end);
  // Writes features [strip_begin * 64, ...) to y as rows of `y_stride` values of type `dtype`,
  // feature 0 of y being that of strip `origin`.
  void (*expand)(const Job&, int64_t origin, int64_t strip_begin, int64_t strip_end);
  float (*read)(const uint8_t*, int64_t bytes);
  const Steps* steps;
};

void expand_avx512(const Job&, int64_t origin, int64_t strip_begin, int64_t strip_end);

extern const ByDigits kDigitsAvx2;
extern const ByDigits kDigitsVnni;
extern const Kernels kPortable;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;  // AVX512 as it is, but for digits
extern const Kernels kAvx512Bf16;

}  // namespace ar
