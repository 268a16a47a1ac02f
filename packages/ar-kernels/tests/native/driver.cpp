// Runs every entry point on buffers of exactly the size they need, for every instruction set,
// width, kind and many shapes, against products computed here in double. Built with sanitizers by
// sanitize.py. Prints what differs; returns how many did.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include "../../src/ar_kernels/native/src/api.h"

namespace {

struct Shape { int64_t rows, columns, group; };
constexpr Shape kShapes[] = {{1, 1, 0},    {3, 33, 0},   {64, 32, 32},  {65, 96, 96},
                             {80, 80, 16}, {17, 144, 16}, {130, 320, 32}, {66, 512, 256}};
constexpr int kBits[] = {2, 3, 4, 5, 6, 8};
constexpr int64_t kCounts[] = {0, 1, 2, 3, 5, 7, 16, 19, 100};
int failures = 0;

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }
float value() { return float(int(next() % 2001) - 1000) / 500.0f; }

void expect(bool good, const char* what, int64_t isa, int bits, const Shape& s, int64_t count) {
  if (good) return;
  ++failures;
  printf("%s: isa %d, %d bits, %dx%d group %d, %d rows\n", what, int(isa), bits, int(s.rows),
         int(s.columns), int(s.group), int(count));
}

// A buffer whose end is the end of an allocation, so that a byte too far is seen.
template <class T>
std::vector<T> exactly(size_t n) {
  std::vector<T> v(n);
  v.shrink_to_fit();
  return v;
}

double as_double(const std::vector<uint8_t>& bytes, size_t i, int dtype) {
  if (dtype == 0) {
    float v;
    memcpy(&v, bytes.data() + 4 * i, 4);
    return v;
  }
  uint16_t h;
  memcpy(&h, bytes.data() + 2 * i, 2);
  if (dtype == 2) {
    const uint32_t u = uint32_t(h) << 16;
    float v;
    memcpy(&v, &u, 4);
    return v;
  }
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double magnitude =
      exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}

// Small multiples of 1/8, which every type holds exactly.
void put(std::vector<uint8_t>& bytes, size_t i, int dtype, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  if (dtype == 0) {
    memcpy(bytes.data() + 4 * i, &u, 4);
    return;
  }
  uint16_t h = uint16_t(u >> 16);
  if (dtype == 1) {
    const uint32_t rest = u & 0x7fffffff;
    h = rest ? uint16_t((u >> 16 & 0x8000) | ((rest - (112u << 23)) >> 13)) : uint16_t(0);
  }
  memcpy(bytes.data() + 2 * i, &h, 2);
}

// The value of a code of E4M3 without its sign.
float e4m3(int code) {
  const int exponent = code >> 3, mantissa = code & 7;
  return exponent ? ldexpf(float(8 + mantissa), exponent - 10) : ldexpf(float(mantissa), -9);
}

struct Case {
  int64_t isa;
  int bits, kind;  // 0: integers, 1: E4M3, 2: a table
  bool zero;
  Shape shape;
  int64_t experts;
};

// Where a group's float32 scale and its zero point for one of 64 features lie in a record.
int64_t scale_at(const int64_t* sizes, int64_t group, int64_t feature) {
  return 256 + group / sizes[5] * sizes[3] + group % sizes[5] * 256 + 4 * feature;
}

int64_t zero_at(const int64_t* sizes, int64_t group, int64_t feature) {
  const int64_t scales = sizes[5] * 256;
  return 256 + group / sizes[5] * sizes[3] + scales + group % sizes[5] * 64 + feature;
}

void run(const Case& c) {
  const ar_runtime runtime{nullptr, c.isa};
  const Shape& s = c.shape;
  const int64_t scale = s.group ? 3 : 0;
  const int64_t meta[8] = {s.rows, s.columns, s.group, c.bits, c.kind, scale, c.zero, c.experts};
  int64_t sizes[6];
  expect(ar_sizes(meta, sizes) == 0, "sizes", c.isa, c.bits, s, 0);
  auto blob = exactly<uint8_t>(sizes[0]);
  float header[129] = {};
  const int entries = c.bits == 8 ? 128 : 1 << c.bits;
  const int lowest = c.bits == 8 ? 0 : c.kind == 0 ? (c.zero ? 0 : entries / 2) : entries / 3;
  for (int i = 0; i < 128; ++i)
    header[i] = c.kind == 1   ? e4m3(i)
                : c.kind == 2 ? float(i % entries - lowest) / 4
                : c.bits == 8 ? i + 0.5f : float(i % entries - lowest);
  header[128] = c.zero ? 1.0f : 0.0f;
  memcpy(blob.data(), header, sizeof header);
  const int64_t strips = (s.rows + 63) / 64;
  const int64_t groups = s.group ? (s.columns + s.group - 1) / s.group : 0;
  for (int64_t i = 0; i < strips * c.experts; ++i) {
    uint8_t* at = blob.data() + sizes[1] + i * sizes[2];
    for (int n = 0; n < 64; ++n) {
      const float factor = 0.5f + n / 64.0f;
      memcpy(at + 4 * n, &factor, 4);
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t n = 0; n < 64; ++n) {
        const float v = value();
        memcpy(at + scale_at(sizes, g, n), &v, 4);
        if (c.zero) at[zero_at(sizes, g, n)] = uint8_t(next() % 8);
      }
  }
  auto codes = exactly<uint8_t>(s.rows * s.columns * c.experts);
  for (auto& code : codes) code = uint8_t(next() & ((1u << c.bits) - 1));
  expect(ar_pack(&runtime, meta, codes.data(), codes.size(), blob.data(), blob.size()) == 0,
         "pack", c.isa, c.bits, s, 0);
  const ar_weight weight{meta, blob.data(), int64_t(blob.size())};
  auto back = exactly<uint8_t>(codes.size());
  expect(ar_unpack(&runtime, &weight, back.data(), back.size()) == 0 && back == codes, "unpack",
         c.isa, c.bits, s, 0);

  auto dense = exactly<double>(codes.size());
  for (int64_t e = 0; e < c.experts; ++e)
    for (int64_t n = 0; n < s.rows; ++n)
      for (int64_t k = 0; k < s.columns; ++k) {
        const uint32_t code = codes[(e * s.rows + n) * s.columns + k];
        double v = c.bits < 8 ? header[code] : code & 128 ? -header[code & 127] : header[code];
        if (c.bits == 8 && c.kind == 0) v = code - 127.5;
        const uint8_t* at = blob.data() + sizes[1] + (e * strips + n / 64) * sizes[2];
        float factor, group_scale = 1;
        memcpy(&factor, at + 4 * (n % 64), 4);
        if (s.group) {
          memcpy(&group_scale, at + scale_at(sizes, k / s.group, n % 64), 4);
          if (c.zero) v -= at[zero_at(sizes, k / s.group, n % 64)] + 1.0;
        }
        dense[(e * s.rows + n) * s.columns + k] = v * factor * group_scale;
      }
  if (c.experts == 1)
    for (int dtype = 0; dtype < 3; ++dtype) {
      const int width = dtype ? 2 : 4;
      auto out = exactly<uint8_t>(s.rows * s.columns * width);
      expect(ar_expand(&runtime, &weight, 0, s.rows, dtype, out.data(), out.size()) == 0, "expand",
             c.isa, c.bits, s, 0);
      bool good = true;
      for (size_t i = 0; i < dense.size(); ++i)
        good &= fabs(as_double(out, i, dtype) - dense[i]) <= 0.005 * fabs(dense[i]) + 1e-4;
      expect(good, "expanded values", c.isa, c.bits, s, 0);
    }
  for (const int64_t count : kCounts)
    for (int dtype = 0; dtype < 3; ++dtype) {
      const int width = dtype ? 2 : 4;
      const int64_t stride = s.columns + 3;
      auto x = exactly<uint8_t>(count ? ((count - 1) * stride + s.columns) * width : 0);
      for (int64_t i = 0; i < int64_t(x.size()) / width; ++i)
        put(x, i, dtype, float(int(next() % 17) - 8) / 8);
      auto bias = exactly<float>(s.rows * c.experts);
      for (auto& b : bias) b = value();
      auto y = exactly<uint8_t>(count * s.rows * width);
      const ar_product product{x.data(), int64_t(x.size()), count, stride, dtype,
                               bias.data(), y.data(), int64_t(y.size())};
      auto offsets = exactly<int64_t>(c.experts + 1);
      for (int64_t e = 0; e <= c.experts; ++e) offsets[e] = e == 1 ? count / 3 : count * e / c.experts;
      offsets[c.experts] = count;
      const int32_t status =
          c.experts == 1 ? ar_multiply(&runtime, &weight, &product)
                         : ar_multiply_experts(&runtime, &weight, &product, offsets.data(),
                                               int64_t(offsets.size()));
      expect(status == 0, "multiply", c.isa, c.bits, s, count);
      bool good = true;
      for (int64_t m = 0; m < count; ++m) {
        int64_t e = 0;
        while (m >= offsets[e + 1]) ++e;
        for (int64_t n = 0; n < s.rows; ++n) {
          double sum = bias[e * s.rows + n], size = fabs(sum);
          for (int64_t k = 0; k < s.columns; ++k) {
            const double term = as_double(x, m * stride + k, dtype) *
                                dense[(e * s.rows + n) * s.columns + k];
            sum += term;
            size += fabs(term);
          }
          const double found = as_double(y, m * s.rows + n, dtype);
          good &= fabs(found - sum) <= (dtype ? 0.005 : 2e-5) * fabs(sum) + 2e-4 * size + 1e-4;
        }
      }
      expect(good, "product", c.isa, c.bits, s, count);
    }
  // one byte less than needed is refused, not read
  const ar_weight less{meta, blob.data(), int64_t(blob.size()) - 1};
  expect(ar_unpack(&runtime, &less, back.data(), back.size()) != 0, "short blob", c.isa, c.bits, s, 0);
  expect(ar_unpack(&runtime, &weight, back.data(), back.size() - 1) != 0, "short codes", c.isa,
         c.bits, s, 0);
}

std::vector<uint8_t> some(int64_t count, int dtype) {
  auto out = exactly<uint8_t>(count * (dtype ? 2 : 4));
  for (int64_t i = 0; i < count; ++i) put(out, i, dtype, float(int(next() % 17) - 8) / 8);
  return out;
}

// Half a step of bf16 is 2^-8 of a number at most.
bool near(double found, double wanted, double size, int dtype, int roundings = 1) {
  const double share = dtype ? 0.004 * roundings : 2e-5;
  return fabs(found - wanted) <= share * fabs(wanted) + 2e-5 * size + 1e-5;
}

void run_floats(int64_t isa, int dtype, int64_t features, int64_t columns, int64_t rows) {
  const ar_runtime runtime{nullptr, isa};
  const auto w = some(features * columns, dtype), x = some(rows * columns, dtype);
  auto y = exactly<uint8_t>(rows * features * (dtype ? 2 : 4));
  auto bias = exactly<float>(features);
  for (auto& b : bias) b = value();
  const ar_floats weight{w.data(), int64_t(w.size()), features, columns};
  const ar_product product{x.data(), int64_t(x.size()), rows, columns, dtype,
                           bias.data(), y.data(), int64_t(y.size())};
  bool good = ar_multiply_floats(&runtime, &weight, &product) == 0;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < features; ++n) {
      double sum = bias[n], size = fabs(sum);
      for (int64_t k = 0; k < columns; ++k) {
        const double term = as_double(x, m * columns + k, dtype) *
                            as_double(w, n * columns + k, dtype);
        sum += term;
        size += fabs(term);
      }
      good &= near(as_double(y, m * features + n, dtype), sum, size, dtype);
    }
  expect(good, "float product", isa, dtype, Shape{features, columns, 0}, rows);
  const ar_floats less{w.data(), int64_t(w.size()) - 1, features, columns};
  expect(ar_multiply_floats(&runtime, &less, &product) != 0, "short floats", isa, dtype,
         Shape{features, columns, 0}, rows);
}

void run_compact(int64_t isa, int64_t features, int64_t columns, int64_t rows) {
  const ar_runtime runtime{nullptr, isa};
  auto w = some(features * columns, 2);
  const auto x = some(rows * columns, 2);
  for (int64_t i = 0; i < features * columns; i += 7) w[2 * i + 1] = uint8_t(w[2 * i + 1] & 0x9f);
  auto y = exactly<uint8_t>(rows * features * 2);
  auto ends = exactly<uint32_t>(features);
  const ar_floats floats{w.data(), int64_t(w.size()), features, columns};
  const int64_t half = features / 2;
  bool good = ar_compact_ends(&runtime, &floats, 0, half, ends.data()) == 0 &&
              ar_compact_ends(&runtime, &floats, half, features, ends.data()) == 0;
  const int64_t outliers = ends[features - 1];
  auto blob = exactly<uint8_t>(ar_compact_bytes(features, columns, outliers));
  const int64_t bytes = int64_t(blob.size());
  good &= ar_compact(&runtime, &floats, 0, half, ends.data(), blob.data(), bytes) == 0 &&
          ar_compact(&runtime, &floats, half, features, ends.data(), blob.data(), bytes) == 0;
  const ar_compact_weight weight{blob.data(), bytes, features, columns, outliers};
  const ar_product product{x.data(), int64_t(x.size()), rows, columns, 2, nullptr, y.data(),
                           int64_t(y.size())};
  good &= ar_multiply_compact(&runtime, &weight, &product) == 0;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < features; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double term = as_double(x, m * columns + k, 2) * as_double(w, n * columns + k, 2);
        sum += term;
        size += fabs(term);
      }
      good &= near(as_double(y, m * features + n, 2), sum, size, 2);
    }
  const ar_compact_weight less{blob.data(), bytes - 1, features, columns, outliers};
  good &= ar_multiply_compact(&runtime, &less, &product) != 0;
  good &= ar_compact(&runtime, &floats, 0, features, ends.data(), blob.data(), bytes - 1) != 0;
  for (auto& b : blob) b = uint8_t(next());  // whatever a blob says, no byte beyond it is read
  good &= ar_multiply_compact(&runtime, &weight, &product) == 0;
  w[1] = 0x7f, w[0] = 0x80;  // infinity
  good &= ar_compact_ends(&runtime, &floats, 0, features, ends.data()) != 0;
  expect(good, "compact", isa, 16, Shape{features, columns, 0}, rows);
}

void run_norm(int64_t isa, int dtype, int64_t rows, int64_t columns, int64_t form) {
  const ar_runtime runtime{nullptr, isa};
  const int64_t stride = columns + 5;
  const auto x = some((rows - 1) * stride + columns, dtype), w = some(columns, dtype);
  auto y = exactly<uint8_t>(rows * columns * (dtype ? 2 : 4));
  const ar_norm_input input{x.data(), int64_t(x.size()), rows,     columns, stride,
                            dtype,    form,              w.data(), 1e-5,    y.data()};
  bool good = ar_norm(&runtime, &input) == 0;
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t k = 0; k < columns; ++k) squares += pow(as_double(x, r * stride + k, dtype), 2);
    for (int64_t k = 0; k < columns; ++k) {
      const double wanted = as_double(x, r * stride + k, dtype) / sqrt(squares / columns + 1e-5) *
                            (as_double(w, k, dtype) + (form == 1));
      const int roundings = form == 0 ? 2 : 1;
      good &= near(as_double(y, r * columns + k, dtype), wanted, 1, dtype, roundings);
    }
  }
  expect(good, "norm", isa, dtype, Shape{rows, columns, 0}, form);
}

void run_attention(int64_t isa, int dtype, int64_t heads, int64_t shared, int64_t length,
                   int64_t width, bool masked) {
  const ar_runtime runtime{nullptr, isa};
  const auto q = some(heads * width, dtype);
  const auto k = some(shared * length * width, dtype), v = some(shared * length * width, dtype);
  auto mask = exactly<uint8_t>(length);
  for (auto& one : mask) one = next() % 3 != 0;
  mask[0] = 1;
  auto y = exactly<uint8_t>(heads * width * (dtype ? 2 : 4));
  const int64_t of_head = length * width;
  const ar_attention input{
      q.data(), k.data(), v.data(), dtype, 1, heads, shared, length, width, {heads * width, width},
      {shared * of_head, of_head, width}, {shared * of_head, of_head, width},
      masked ? mask.data() : nullptr, {0, 0}, 0.25, y.data()};
  bool good = ar_attend(&runtime, &input) == 0;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t base = h / (heads / shared) * of_head;
    std::vector<double> weight(length);
    double sum = 0;
    for (int64_t s = 0; s < length; ++s) {
      double score = 0;
      for (int64_t d = 0; d < width; ++d)
        score += as_double(q, h * width + d, dtype) * as_double(k, base + s * width + d, dtype);
      weight[s] = masked && !mask[s] ? 0 : exp(0.25 * score);
      sum += weight[s];
    }
    for (int64_t d = 0; d < width; ++d) {
      double wanted = 0;
      for (int64_t s = 0; s < length; ++s)
        wanted += weight[s] / sum * as_double(v, base + s * width + d, dtype);
      good &= near(as_double(y, h * width + d, dtype), wanted, 1, dtype);
    }
  }
  expect(good, "attention", isa, dtype, Shape{heads, length, width}, shared);
}

void run_pairs(int64_t isa, int dtype, int64_t heads, int64_t width) {
  const ar_runtime runtime{nullptr, isa};
  const int64_t count = heads * width;
  const auto a = some(count, dtype), b = some(count, dtype), cos = some(width, dtype),
             sin = some(width, dtype);
  auto gated = exactly<uint8_t>(a.size()), sum = exactly<uint8_t>(a.size()), turned = a;
  turned.shrink_to_fit();
  // copied with a gap of one head behind each
  auto copied = exactly<uint8_t>(a.size() * 2 - width * (dtype ? 2 : 4));
  const ar_pair gate{a.data(), b.data(), dtype, count, gated.data()};
  const ar_pair add{a.data(), b.data(), dtype, count, sum.data()};
  const ar_turn turn{turned.data(), cos.data(), sin.data(), dtype, 1, heads, width};
  const ar_copy copy{turned.data(), dtype, 1, heads, width, copied.data(), {0, 2 * width}};
  const ar_call calls[] = {{3, &gate, nullptr, 0}, {4, &add, nullptr, 0}, {5, &turn, nullptr, 0},
                           {6, &copy, nullptr, 0}};
  bool good = ar_run(&runtime, calls, 4, 1) == 0;
  for (int64_t i = 0; i < count; ++i) {
    const double x = as_double(a, i, dtype), y = as_double(b, i, dtype);
    const int64_t d = i % width, half = width / 2;
    const double other = d < half ? -as_double(a, i + half, dtype) : as_double(a, i - half, dtype);
    good &= near(as_double(gated, i, dtype), x / (1 + exp(-x)) * y, 1, dtype);
    good &= near(as_double(sum, i, dtype), x + y, 1, dtype);
    good &= near(as_double(turned, i, dtype),
                 x * as_double(cos, d, dtype) + other * as_double(sin, d, dtype), 1, dtype);
    good &= as_double(copied, i / width * 2 * width + d, dtype) == as_double(turned, i, dtype);
  }
  const ar_call strange{7, &gate, nullptr, 0};
  good &= ar_run(&runtime, &strange, 1, 1) != 0 && ar_run(&runtime, calls, -1, 1) != 0;
  std::vector<ar_call> many(150, calls[1]);
  good &= ar_run(&runtime, many.data(), 150, 1) == 0;
  expect(good, "pairs", isa, dtype, Shape{heads, width, 0}, 0);
}

// Parts in threads of their own, or all of them in this one.
int32_t in_threads(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*),
                   void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain)
    threads.emplace_back(fn, i, i + grain < end ? i + grain : end, context);
  for (auto& thread : threads) thread.join();
  return 0;
}

int32_t in_turn(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*),
                void* context) {
  for (int64_t i = begin; i < end; i += grain) fn(i, i + grain < end ? i + grain : end, context);
  return 0;
}

// A thread for every unit, more than share what is left.
int32_t in_singles(int64_t begin, int64_t end, int64_t, void (*fn)(int64_t, int64_t, void*),
                   void* context) {
  return in_threads(begin, end, 1, fn, context);
}

void run_several(int64_t isa, int64_t rows) {
  const ar_runtime alone_runtime{nullptr, isa};
  const int64_t metas[3][8] = {{4500, 96, 32, 4, 0, 3, 0, 1}, {64, 96, 32, 4, 0, 3, 0, 1},
                               {17, 96, 96, 3, 0, 3, 0, 1}};
  std::vector<uint8_t> blobs[3], alone[3], together[3];
  const auto x = some(rows * 96, 2), weight = some(96, 2);
  auto normed = exactly<uint8_t>(x.size());
  ar_weight weights[3];
  ar_product products[3];
  const ar_norm_input norm{x.data(), int64_t(x.size()), rows, 96, 96, 2, 2, weight.data(), 1e-6,
                           normed.data()};
  bool good = ar_norm(&alone_runtime, &norm) == 0;
  for (int i = 0; i < 3; ++i) {
    int64_t sizes[6];
    good &= ar_sizes(metas[i], sizes) == 0;
    blobs[i] = exactly<uint8_t>(sizes[0]);
    for (auto& byte : blobs[i]) byte = uint8_t(next() % 60);
    float header[129] = {};
    for (int j = 0; j < 128; ++j) header[j] = float(j % 16 - 8);
    memcpy(blobs[i].data(), header, sizeof header);
    alone[i] = exactly<uint8_t>(rows * metas[i][0] * 2);
    weights[i] = ar_weight{metas[i], blobs[i].data(), int64_t(blobs[i].size())};
    products[i] = ar_product{normed.data(), int64_t(normed.size()), rows, 96, 2, nullptr,
                             alone[i].data(), int64_t(alone[i].size())};
    good &= ar_multiply(&alone_runtime, weights + i, products + i) == 0;
    for (const ar_parallel parallel : {ar_parallel(nullptr), ar_parallel(in_threads),
                                       ar_parallel(in_turn), ar_parallel(in_singles)}) {
      const ar_runtime runtime{parallel, isa};
      const ar_bound bound{&runtime, weights + i, 2};
      auto again = exactly<uint8_t>(alone[i].size());
      good &= ar_multiply_bound(&bound, normed.data(), rows, again.data()) == 0 && again == alone[i];
    }
  }
  const ar_call calls[] = {{1, &norm, nullptr, 0}, {0, weights, products, 3}};
  for (const ar_parallel parallel : {ar_parallel(nullptr), ar_parallel(in_threads),
                                     ar_parallel(in_turn)})
    for (const int64_t threads : {1, 2, 5, 100}) {
      const ar_runtime runtime{parallel, isa};
      for (int i = 0; i < 3; ++i) {
        together[i] = exactly<uint8_t>(alone[i].size());
        products[i].y = together[i].data();
      }
      memset(normed.data(), 0, normed.size());
      good &= ar_run(&runtime, calls, 2, threads) == 0;
      for (int i = 0; i < 3; ++i) good &= alone[i] == together[i];
    }
  const ar_call five{0, weights, products, 5};
  good &= ar_run(&alone_runtime, &five, 1, 1) != 0;
  products[1].x = x.data();
  good &= ar_run(&alone_runtime, calls + 1, 1, 1) != 0;
  expect(good, "several", isa, 4, Shape{4500, 96, 32}, rows);
}

void run_steps(int64_t isa) {
  for (const int64_t rows : {1, 2, 4, 9}) run_several(isa, rows);
  for (int dtype = 0; dtype < 3; ++dtype)
    for (const int64_t heads : {1, 5})
      for (const int64_t width : {32, 96, 128}) run_pairs(isa, dtype, heads, width);
  for (int64_t rows = 1; rows <= 4; ++rows)
    for (const int64_t columns : {1, 77, 128, 300})
      for (const int64_t features : {1, 4, 19, 64}) run_compact(isa, features, columns, rows);
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int64_t rows = 1; rows <= 4; ++rows)
      for (const int64_t columns : {1, 15, 16, 77, 256})
        for (const int64_t features : {1, 4, 19, 64}) run_floats(isa, dtype, features, columns, rows);
    for (int64_t form = 0; form < 3; ++form)
      for (const int64_t columns : {16, 80, 128}) run_norm(isa, dtype, 3, columns, form);
    for (const bool masked : {false, true})
      for (const int64_t length : {1, 15, 16, 37})
        for (const int64_t width : {16, 80, 128}) {
          run_attention(isa, dtype, 6, 2, length, width, masked);
          run_attention(isa, dtype, 10, 1, length, width, masked);
          run_attention(isa, dtype, 16, 8, length, width, masked);
        }
  }
}

}  // namespace

#include "tuning_cases.h"

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !strcmp(argv[1], "quick");
  for (int64_t isa = 0; isa < 4; ++isa) {
    if (!ar_runs(isa)) {
      printf("isa %d does not run here\n", int(isa));
      continue;
    }
    const int before = failures;
    for (const int bits : kBits)
      for (const Shape& shape : kShapes)
        for (const bool zero : {false, true}) {
          if (zero && !shape.group) continue;
          if (quick && bits != 4 && bits != 3) continue;
          run(Case{isa, bits, bits == 8 && !zero ? 2 : 0, zero, shape, 1});
          run(Case{isa, bits, 2, zero, shape, 3});
          if (bits == 8) run(Case{isa, bits, 1, zero, shape, 1});
        }
    auto buffer = exactly<uint8_t>(5000);
    const ar_runtime runtime{nullptr, isa};
    float sum = 0;
    expect(ar_read(&runtime, buffer.data(), buffer.size(), &sum) == 0 && sum == 0, "read", isa, 0,
           kShapes[0], 0);
    run_steps(isa);
    run_tuning(isa);
    printf("%s: %d failures\n", ar_isa_name(isa), failures - before);
  }
  return failures != 0;
}
