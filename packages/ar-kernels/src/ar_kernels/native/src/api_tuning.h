// The entry points of tuning; see api.h.
#pragma once
#include "api.h"

#ifdef __cplusplus
extern "C" {
#endif

// A float element of few bits: its largest magnitude, its smallest normal one, and 1.5 times two to
// the digits of float32 that it lacks.
typedef struct {
  float maximum, least, large;
} ar_element;

// Groups that share a scale, their values side by side.
typedef struct {
  const void* x;           // [groups][size]
  int64_t groups, size;
  int64_t dtype;           // of x and y: 0 fp32, 2 bf16
  int64_t rule;            // 0: power of two at most largest / 2^top; 1: at least largest / maximum;
                           // 2: E4M3 nearest to largest * whole / maximum, over whole
  int64_t top;
  float whole;
  ar_element element;
  void* y;
  uint8_t* inside;         // [groups][size], 1: not clamped; or null
} ar_groups;

// A weight behind float values. Without `zero`: scale * element(value * (1 + growth) / scale); with
// it: scale * (code(value) - zero), codes from 0 to element.maximum. Pointers of one value a group.
typedef struct {
  float* value;            // [groups][size]
  int64_t groups, size;
  const float *scale, *growth, *zero;  // growth and zero may be null
  ar_element element;
  int64_t dtype;           // of matrix: 0 fp32, 2 bf16
  void* matrix;            // [groups][size]: the weight, or its gradient
} ar_latent;

// A step of Adam; moments are changed. No moments: values stay.
typedef struct {
  const float* slope;      // of codes: what a group's gradient is times
  float *first, *second;   // [groups][size], or null
  const float* unit;       // [groups][size]: times `size`; or null
  float size, keep_first, keep_second, correction, tiny;
  float* sums;             // [3][groups]: gradient times element (or code - zero), passed gradient
                           // times steps, passed gradient times value; or null
} ar_adam;

typedef struct {
  const void *mine, *theirs;  // [rows][columns]
  int64_t rows, columns;
  int64_t dtype;           // of mine, theirs and grad: 0 fp32, 2 bf16
  void* grad;              // softmax(mine) - softmax(theirs)
  float* parts;            // [rows][3]: mean of theirs - mine, each less its largest, under theirs;
                           // sums of exponentials of mine and of theirs less their largest
} ar_logits;

// Scores of queries and keys, query i seeing keys up to i + keys - queries.
typedef struct {
  void* scores;            // [rows][keys], rows those of queries 0, 1, ... again and again; changed
  const void* weights;     // [rows][keys]: their softmax, and `scores` its gradient; or null
  int64_t rows, queries, keys;  // at most 1024 keys
  int64_t dtype;           // 0 fp32, 2 bf16
  float scale;
} ar_scores;

// The gradient of an RMS norm, all contiguous.
typedef struct {
  const void *x, *weight, *grad;  // [rows][columns], [columns], [rows][columns]
  int64_t rows, columns;   // columns a multiple of 16
  int64_t dtype;           // 0 fp32, 2 bf16; of all but to_weight
  int64_t form;            // that of ar_norm_input
  double epsilon;
  void* to_x;              // [rows][columns]
  float* to_weight;        // [parts of 64 rows][columns], to be added up
} ar_norm_grad;

// Groups rounded to elements; the scale is found here.
AR_API int32_t ar_fake_quant(const ar_runtime*, const ar_groups*);
// y = x * inside.
AR_API int32_t ar_mask(const ar_runtime*, const void* x, const uint8_t* inside, int64_t dtype,
                       int64_t count, void* y);
// Writes the weight of a latent to its matrix.
AR_API int32_t ar_make(const ar_runtime*, const ar_latent*);
// Moves a latent against the gradient in its matrix; the size of a group is a multiple of 16.
AR_API int32_t ar_move(const ar_runtime*, const ar_latent*, const ar_adam*);
// The divergence of rows of logits and its gradient.
AR_API int32_t ar_diverge(const ar_runtime*, const ar_logits*);
// Scores become softmax(scale * scores); or, with weights, their gradient that of the scores.
AR_API int32_t ar_soften(const ar_runtime*, const ar_scores*);
AR_API int32_t ar_norm_back(const ar_runtime*, const ar_norm_grad*);

#ifdef __cplusplus
}
#endif
