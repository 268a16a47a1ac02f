// The entry points of tuning on buffers of exactly the size they need; included by driver.cpp. That
// values are torch's is checked in test_native_tuning.py: here, that they are what they must be.
#pragma once
#include "../../src/ar_kernels/native/src/api_tuning.h"

namespace {

constexpr ar_element kE2M1{6.0f, 1.0f, 1.5f * 4194304.0f};

void run_groups(int64_t isa, int dtype, int64_t groups, int64_t size) {
  const ar_runtime runtime{nullptr, isa};
  const auto x = some(groups * size, dtype);
  bool good = true;
  for (int64_t rule = 0; rule < 3; ++rule) {
    auto y = exactly<uint8_t>(x.size()), masked = exactly<uint8_t>(x.size());
    auto inside = exactly<uint8_t>(groups * size);
    ar_groups given{x.data(), groups, size,     dtype,        rule, 2, 300.0f, kE2M1,
                    y.data(), inside.data()};
    good &= ar_fake_quant(&runtime, &given) == 0;
    for (int64_t i = 0; i < groups * size; ++i)  // half a step of the coarsest, or clamped
      good &= inside[i] <= 1 && fabs(as_double(y, i, dtype) - as_double(x, i, dtype)) <= 1.0;
    good &= ar_mask(&runtime, x.data(), inside.data(), dtype, groups * size, masked.data()) == 0;
    for (int64_t i = 0; i < groups * size; ++i)
      good &= as_double(masked, i, dtype) == (inside[i] ? as_double(x, i, dtype) : 0.0);
    given.inside = nullptr;
    const auto before = y;
    good &= ar_fake_quant(&runtime, &given) == 0 && y == before;
    given.size = 0;
    good &= ar_fake_quant(&runtime, &given) != 0;
  }
  expect(good, "groups", isa, dtype, Shape{groups, size, size}, 0);
}

void run_latent(int64_t isa, int dtype, int64_t groups, int64_t size, bool codes) {
  const ar_runtime runtime{nullptr, isa};
  const int64_t count = groups * size;
  std::vector<float> values = exactly<float>(count), first = exactly<float>(count),
                     second = exactly<float>(count), unit = exactly<float>(count),
                     scale = exactly<float>(groups), growth = exactly<float>(groups),
                     zero = exactly<float>(groups), sums = exactly<float>(3 * groups);
  for (auto& v : values) v = value();
  for (auto& v : unit) v = 1.0f;
  for (auto& v : scale) v = 0.5f;
  for (auto& v : zero) v = 2.0f;
  auto matrix = exactly<uint8_t>(count * (dtype ? 2 : 4));
  const float* none = nullptr;
  ar_latent latent{values.data(), groups, size, scale.data(), codes ? none : growth.data(),
                   codes ? zero.data() : none, codes ? ar_element{3, 0, 0} : kE2M1, dtype,
                   matrix.data()};
  bool good = ar_make(&runtime, &latent) == 0;
  for (int64_t i = 0; i < count; ++i) {
    const double made = as_double(matrix, i, dtype), v = values[i];
    good &= codes ? made >= -1.0 && made <= 0.5 : fabs(made - v) <= 0.25 + 1e-6;
  }
  const auto grad = some(count, dtype);
  latent.matrix = const_cast<uint8_t*>(grad.data());
  const auto before = values;
  const ar_adam adam{scale.data(), first.data(), second.data(), unit.data(), 0.01f, 0.9f,
                     0.95f,        1.0f,         1e-12f,        sums.data()};
  good &= (ar_move(&runtime, &latent, &adam) == 0) == (size % 16 == 0);
  for (int64_t i = 0; i < count && size % 16 == 0; ++i) {
    const double step = before[i] - values[i], slope = as_double(grad, i, dtype);
    good &= fabs(step) <= 0.01 && step * slope >= 0;  // against the gradient
  }
  expect(good, codes ? "codes" : "latent", isa, dtype, Shape{groups, size, size}, 0);
}

void run_logits(int64_t isa, int dtype, int64_t rows, int64_t columns) {
  const ar_runtime runtime{nullptr, isa};
  const auto mine = some(rows * columns, dtype), theirs = some(rows * columns, dtype);
  auto grad = exactly<uint8_t>(mine.size());
  auto parts = exactly<float>(3 * rows);
  const ar_logits given{mine.data(), theirs.data(), rows, columns, dtype, grad.data(), parts.data()};
  bool good = ar_diverge(&runtime, &given) == 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t k = 0; k < columns; ++k) sum += as_double(grad, r * columns + k, dtype);
    good &= fabs(sum) < 0.02 && parts[3 * r] + log(parts[3 * r + 1] / parts[3 * r + 2]) > -1e-5;
  }
  expect(good, "logits", isa, dtype, Shape{rows, columns, 0}, rows);
}

void run_scores(int64_t isa, int dtype, int64_t turns, int64_t queries, int64_t keys) {
  const ar_runtime runtime{nullptr, isa};
  const int64_t rows = turns * queries;
  auto weights = some(rows * keys, dtype), grad = some(rows * keys, dtype);
  ar_scores given{weights.data(), nullptr, rows, queries, keys, dtype, 0.5f};
  bool good = ar_soften(&runtime, &given) == 0;
  given.scores = grad.data();
  given.weights = weights.data();
  good &= ar_soften(&runtime, &given) == 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0, pull = 0;
    for (int64_t k = 0; k < keys; ++k) {
      const double one = as_double(weights, r * keys + k, dtype);
      const double back = as_double(grad, r * keys + k, dtype);
      sum += one;
      pull += back;
      if (k > r % queries + keys - queries) good &= one == 0 && back == 0;
    }
    good &= fabs(sum - 1) < 0.02 && fabs(pull) < 0.03;
  }
  given.keys = queries - 1;
  good &= ar_soften(&runtime, &given) != 0;
  expect(good, "scores", isa, dtype, Shape{rows, keys, queries}, turns);
}

void run_norm_back(int64_t isa, int dtype, int64_t rows, int64_t columns, int64_t form) {
  const ar_runtime runtime{nullptr, isa};
  const auto x = some(rows * columns, dtype), weight = some(columns, dtype);
  const auto grad = some(rows * columns, dtype);
  auto to_x = exactly<uint8_t>(x.size());
  auto to_weight = exactly<float>((rows + 63) / 64 * columns);
  const ar_norm_grad given{x.data(), weight.data(), grad.data(), rows,        columns,
                           dtype,    form,          1e-9,        to_x.data(), to_weight.data()};
  bool good = ar_norm_back(&runtime, &given) == 0;
  for (int64_t r = 0; r < rows; ++r) {  // the size of x plays no part, so nothing pulls along it
    double along = 0;
    for (int64_t k = 0; k < columns; ++k)
      along += as_double(to_x, r * columns + k, dtype) * as_double(x, r * columns + k, dtype);
    good &= fabs(along) < 0.02 * columns;
  }
  expect(good, "norm back", isa, dtype, Shape{rows, columns, 0}, form);
}

void run_tuning(int64_t isa) {
  for (const int dtype : {0, 2}) {
    for (const int64_t size : {1, 7, 16, 32, 48, 100}) run_groups(isa, dtype, 3, size);
    for (const int64_t size : {5, 16, 32, 80})
      for (const bool codes : {false, true}) run_latent(isa, dtype, 3, size, codes);
    for (const int64_t columns : {1, 15, 16, 33, 300}) run_logits(isa, dtype, 3, columns);
    for (int64_t form = 0; form < 3; ++form)
      for (const int64_t rows : {1, 64, 65}) run_norm_back(isa, dtype, rows, 48, form);
    for (const int64_t queries : {1, 3, 16, 37}) {
      run_scores(isa, dtype, 2, queries, queries);
      run_scores(isa, dtype, 2, queries, queries + 5);
    }
  }
}

}  // namespace
