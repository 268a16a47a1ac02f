// What tuning a model asks for beside products; jobs are checked by the entry points.
#pragma once
#include <stdint.h>

namespace ar {

// A float element: its largest magnitude, its smallest normal one, and what times the power of two
// below a value leaves, added and taken away, multiples of the spacing of its binade.
struct Element {
  float maximum, least, large;
};

enum ScaleRule { kPowerBelow = 0, kPowerAbove = 1, kBlockOfTensor = 2 };

// Groups of `size` values that share a scale, side by side.
struct GroupJob {
  const void* x;
  int64_t size;
  int dtype, rule;
  int top;         // exponent of the largest element
  float whole;     // scale of the tensor, where the rule has one
  Element element;
  void* y;
  uint8_t* inside; // 1: not clamped; or null
};

struct MaskJob {
  const void* x;
  const uint8_t* inside;
  int dtype;
  void* y;
};

// A weight in motion: `scale * element` behind a float weight, or `scale * (code - zero)` behind a
// float code.
struct LatentJob {
  float* value;         // [groups][size]
  int64_t size;
  const float* scale;   // of each group
  const float* growth;  // of each group, null: none; what is rounded is value * (1 + growth)
  const float* zero;    // of each group; null: float elements
  Element element;      // of codes, the largest alone
  int dtype;            // of `matrix`
  void* matrix;         // the weight that is made, or its gradient
};

// One step of Adam along the gradient of a latent.
struct MoveJob {
  LatentJob latent;
  const float* slope;   // of codes: what the gradient is times, for each group
  float *first, *second;  // moments; null: values stay
  const float* unit;    // step size of each value over `size`; null: 1
  float size;           // step size over the correction of the first moment
  float keep_first, keep_second, correction;  // decays; one over the correction of the second
  float tiny;
  float* sums;          // [3][groups]: of grad * element, of passed * steps, of passed * value
  int64_t groups;
};

// Rows of logits; theirs stays, the gradient of mine is softmax(mine) - softmax(theirs).
struct DivergenceJob {
  const void *mine, *theirs;
  int64_t columns;
  int dtype;
  void* grad;
  float* parts;  // [rows][3]: mean difference under theirs, and both sums of exponentials
};

constexpr int64_t kMostKeys = 1024;

// Rows of scores of queries 0, 1, ... in turn, or of gradients of their softmax, changed in place.
struct ScoresJob {
  void* scores;
  const void* weights;  // softmax of the scores; null: `scores` becomes it
  int64_t queries, keys;
  float scale;
  int dtype;
};

constexpr int64_t kNormRows = 64;  // of a part, whose gradients of the weight are summed

// The gradient of an RMS norm; forms are those of kernels.h.
struct NormBackJob {
  const void *x, *weight, *grad;
  int64_t rows, columns;
  int dtype, form;
  float epsilon;
  void* to_x;
  float* to_weight;  // [parts][columns]
};

struct Tuning {
  void (*fake_quant)(const GroupJob&, int64_t begin, int64_t end);  // groups
  void (*mask)(const MaskJob&, int64_t begin, int64_t end);         // values
  void (*make)(const LatentJob&, int64_t begin, int64_t end);       // groups
  void (*move)(const MoveJob&, int64_t begin, int64_t end);         // groups
  // rows; `scratch` holds 2 * columns floats
  void (*diverge)(const DivergenceJob&, int64_t begin, int64_t end, float* scratch);
  void (*soften)(const ScoresJob&, int64_t begin, int64_t end);     // rows
  void (*norm_back)(const NormBackJob&, int64_t begin, int64_t end);  // parts
};

extern const Tuning kTuningPortable;
extern const Tuning kTuningAvx2;
extern const Tuning kTuningAvx512;

}  // namespace ar
