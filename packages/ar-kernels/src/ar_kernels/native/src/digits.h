// Products of one row of bf16 with integers of 2 to 4 bits, or with values of 4 bits that are whole
// numbers of a unit, by products of bytes (Kernels::digit_bits tells how many bits where; decision
// 0026).
//
// Bytes are multiplied four at a time where bf16 numbers are by two and floats one by one, and a
// code needs little more than a mask to become a byte. Only values that are no integers are looked up,
// as bytes (whole.h).
//
// For that, the inputs of a segment are whole numbers of a power of two, up to 2^15, of which the
// largest has 15 bits. bf16 has 8, so inputs down to 1/128 of the largest one (at 3 bits 1/64) are
// exact; smaller ones differ by at most 2^-15 (2^-14) of it. Each is 256 * high + low, two signed
// bytes; the one number that would need a third loses 1/32640. Sums of products are exact: below
// 2^31 for a segment of 128 inputs.
//
// The inputs of a block of 32 lie as 8 quads of high bytes and then 8 of low ones, in the order in
// which masks find their codes: a quad's bytes belong to the low and high byte of the lane of the
// even input, then to those of the odd one (see Place).
#pragma once
#include "fetch.h"
#include "whole.h"

namespace ar {
namespace {

constexpr int kQuads = 8;  // of a block

// The field whose code is byte 0 or 1 (within a lane) of a quad.
constexpr int field_of(int bits, int quad, int byte) {
  if (bits == 2) return 8 * (quad / 4) + quad % 4 + 4 * byte;
  if (bits == 4) return 4 * (quad / 2) + quad % 2 + 2 * byte;
  // 3 bits, five fields to a register: 0 and 3, 1 and 4 by a mask; 2 of three registers together
  if (quad < 6) return 5 * (quad / 2) + quad % 2 + 3 * byte;
  return quad == 6 ? 2 + 5 * byte : byte ? 15 : 12;
}

// Codes of 3 bits in the upper byte of a lane are a bit higher up than those in the lower one: their
// inputs are halved.
constexpr bool is_halved(int bits, int quad, int byte) { return bits == 3 && quad < 6 && byte; }

// Which input of a block each byte belongs to, and what an input is multiplied by beforehand.
struct Order {
  alignas(64) uint16_t from[kDepth];
  float share[kDepth];
};

template <int BITS>
constexpr Order order() {
  Order out{};
  for (int i = 0; i < kDepth; ++i) {
    const int quad = i / 4, byte = i & 1, odd = i >> 1 & 1;
    const int input = 2 * field_of(BITS, quad, byte) + odd;
    out.from[i] = uint16_t(input);
    out.share[input] = is_halved(BITS, quad, byte) ? 0.5f : 1.0f;
  }
  return out;
}

template <int BITS>
constexpr Order kOrder = order<BITS>();

struct Unit {
  float size, inverse;
};

// The unit in which a bf16 magnitude, given by its bits, has 15 bits. Its size is no number where
// the magnitude is none, or infinite.
inline Unit unit_of(uint32_t most) {
  if (most >= 0x7f80) return Unit{__builtin_nanf(""), 0.0f};
  const uint32_t exponent = most >> 7 > 30 ? most >> 7 : 30;  // the inverse must be finite
  return Unit{float_of((exponent - 14) << 23), float_of((268 - exponent) << 23)};
}

inline uint16_t most_of(const uint16_t* x, int count) {
  uint16_t most = 0;
  for (int i = 0; i < count; ++i) {
    const uint16_t magnitude = x[i] & 0x7fff;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// Writes inputs [BEGIN, BEGIN + COUNT) of a block as whole numbers and returns the sum of what they
// stand for.
template <int BITS, int BEGIN, int COUNT>
inline int32_t round_inputs(const uint16_t* x, float inverse, int16_t* out) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
  constexpr const float* share = kOrder<BITS>.share + BEGIN;
  uint32_t wide[COUNT];
  float value[COUNT];
  for (int i = 0; i < COUNT; ++i) wide[i] = uint32_t(x[BEGIN + i]) << 16;
  memcpy(value, wide, sizeof(value));
  for (int i = 0; i < COUNT; ++i) value[i] = value[i] * (inverse * share[i]) + kShift;
  int32_t number[COUNT], sum = 0;
  memcpy(number, value, sizeof(value));
  for (int i = 0; i < COUNT; ++i) {
    int32_t n = number[i] - 0x4b400000;
    n = n > 32639 ? 32639 : n < -32640 ? -32640 : n;  // 255/128 * 2^14 would be 127.5 * 256
    out[BEGIN + i] = int16_t(n);
    sum += share[i] == 0.5f ? 2 * n : n;
  }
  return sum;
}

// The segments of a block whose halves are groups.
template <class D, int BITS>
void prepare_halves(const uint16_t* x, uint8_t* out, Digits* segment) {
  alignas(64) int16_t number[kDepth];
  const Unit low = unit_of(most_of(x, kUnit)), high = unit_of(most_of(x + kUnit, kUnit));
  const int32_t sum = round_inputs<BITS, 0, kUnit>(x, low.inverse, number);
  segment[0] = Digits{low.size, float(sum)};
  segment[1] = Digits{high.size, float(round_inputs<BITS, kUnit, kUnit>(x, high.inverse, number))};
  D::split(number, kOrder<BITS>, out);
}

template <class D, int BITS>
void prepare_digits(const Job& job) {
  const Format& f = job.format;
  const uint16_t* x = static_cast<const uint16_t*>(job.x);
  uint8_t* out = static_cast<uint8_t*>(job.packed);
  Digits* segment = job.digits;
  uint16_t last[kDepth] = {};  // of the inputs, and zeros
  const int64_t whole = f.columns / kDepth;
  if (whole < f.blocks) memcpy(last, x + whole * kDepth, (f.columns - whole * kDepth) * 2);
  const auto inputs = [&](int64_t b) { return b < whole ? x + b * kDepth : last; };
  if (f.group == kUnit) {
    for (int64_t b = 0; b < f.blocks; ++b)
      prepare_halves<D, BITS>(inputs(b), out + 2 * kDepth * b, segment + 2 * b);
    return;
  }
  segments(f, [&](const Segment& s) {
    const int64_t first = s.unit / 2, end = (s.unit + s.units) / 2;
    uint16_t most = 0;
    for (int64_t b = first; b < end; ++b) {
      const uint16_t size = most_of(inputs(b), kDepth);
      most = size > most ? size : most;
    }
    const Unit unit = unit_of(most);
    int32_t sum = 0;
    for (int64_t b = first; b < end; ++b) {
      alignas(64) int16_t number[kDepth];
      sum += round_inputs<BITS, 0, kDepth>(inputs(b), unit.inverse, number);
      D::split(number, kOrder<BITS>, out + 2 * kDepth * b);
    }
    *segment++ = Digits{unit.size, float(sum)};
  });
}

// The register of codes that is read for the first time at quad Q, or -1.
constexpr int register_at(int bits, int quad) {
  const int per = bits == 2 ? 4 : 2;
  return quad % per == 0 && quad / per < bits ? quad / per : -1;
}

// The bytes of quad Q, out of a block's registers of codes.
template <class D, int BITS, int Q>
AR_INLINE typename D::I bytes(const typename D::I (&reg)[BITS]) {
  if constexpr (BITS == 4) {
    return D::keep(D::template right<4 * (Q % 2)>(reg[Q / 2]), 0x0f0f);
  } else if constexpr (BITS == 2) {
    return D::keep(D::template right<2 * (Q % 4)>(reg[Q / 4]), 0x0303);
  } else if constexpr (Q < 6) {
    return D::keep(D::template right<3 * (Q % 2)>(reg[Q / 2]), 0x0e07);
  } else if constexpr (Q == 6) {
    return D::with(D::keep(D::template right<6>(reg[0]), 7), D::template left<2>(reg[1]), 0x0700);
  } else {
    auto out = D::keep(D::template right<6>(reg[2]), 7);
    out = D::with(out, D::template right<7>(reg[0]), 0x0100);
    out = D::with(out, D::template right<6>(reg[1]), 0x0200);
    return D::with(out, D::template right<5>(reg[2]), 0x0400);
  }
}

// What all products with a weight share.
template <class D>
struct Weight {
  Whole whole;             // what bytes stand for
  typename D::I bytes;     // of codes, where they are looked up
};

template <class D, bool TABLE>
Weight<D> weight_of(const Job& job) {
  const float* table = reinterpret_cast<const float*>(job.blob);
  Weight<D> w{{1.0f, table[0]}, {}};
  if constexpr (TABLE) {
    w.whole = whole_of(table);
    uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = uint8_t((table[i] - w.whole.base) / w.whole.unit);
    w.bytes = D::table(bytes);
  }
  return w;
}

// sums[feature] += scale * (what bytes times whole numbers gave - zero * their sum).
template <class V>
AR_INLINE void add_scaled(const Record& rec, const Segment& s, const Digits& x, const Whole& whole,
                          const typename V::F (&found)[kStrip / V::N], float* sums) {
  const uint8_t *scales = rec.scales(s.group), *zeros = rec.zeros(s.group);
  const auto sum = V::set(x.sum), unit = V::set(x.size * whole.unit);
  const auto bias = V::set((rec.zero_bias - whole.base) / whole.unit);
  const auto add = [&](int v, typename V::F zero) AR_FORCED {
    float* to = sums + v * V::N;
    const auto scale = V::mul(V::scales(rec.scale, scales + v * V::N * rec.width), unit);
    V::store(to, V::fma(scale, V::sub(found[v], V::mul(zero, sum)), V::load(to)));
  };
  if (zeros == nullptr) {
    for (int v = 0; v < kStrip / V::N; ++v) add(v, bias);
  } else {
    for (int v = 0; v < kStrip / V::N; ++v)
      add(v, V::add(bias, V::bytes_as_floats(zeros + v * V::N)));
  }
}

// Adds a segment's products: quads [BEGIN, END) of its blocks. Blocks are read in the order of memory;
// of one, D multiplies as many vectors of features together as it has registers for.
template <class D, int BITS, bool TABLE, int BEGIN, int END>
AR_INLINE void add_segment(const Job& job, const Record& rec, const Segment& s, const Digits& x,
                           const Weight<D>& w, float* sums) {
  using V = typename D::V;
  constexpr int kVectors = kStrip / V::N, kPasses = kVectors / D::kTogether;
  constexpr int kLines = 4 * BITS * (END - BEGIN) / (kQuads * kPasses);
  constexpr int kSteps = (END - BEGIN) * D::kTogether;
  typename D::Total totals[kVectors];
  for (auto& one : totals) D::clear(&one);
  const int64_t first = s.unit / 2, end = (s.unit + s.units + 1) / 2;
  for (int64_t b = first; b < end; ++b) {
    const uint8_t* codes = block_of(rec, s, 2 * b);
    const uint8_t* lines = codes + kRegister * BITS * BEGIN / kQuads;
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint8_t* digits = static_cast<const uint8_t*>(job.packed) + 2 * kDepth * b;
      if constexpr (kPasses > 1) asm("" : "+r"(digits));  // read anew: there is no room to keep them
      typename D::Sums acc[D::kTogether];
      for (int i = 0; i < D::kTogether; ++i) acc[i].begin(totals[pass * D::kTogether + i]);
      typename D::I reg[D::kTogether][BITS];
      unrolled<BEGIN, END>([&](auto quad) AR_FORCED {
        constexpr int Q = decltype(quad)::value;
        const auto high = D::quad(digits + 4 * Q), low = D::quad(digits + kDepth + 4 * Q);
        unrolled<0, D::kTogether>([&](auto vector) AR_FORCED {
          constexpr int i = decltype(vector)::value, R = register_at(BITS, Q);
          fetch_one<kLines, kSteps, (Q - BEGIN) * D::kTogether + i>(lines);
          if constexpr (R >= 0) reg[i][R] = D::load(codes + kRegister * R + i * V::N * 4);
          auto found = bytes<D, BITS, Q>(reg[i]);
          if constexpr (TABLE) found = D::look_up(w.bytes, found);
          acc[i].add(found, high, low);
          constexpr bool is_full = TABLE && Q % 4 == 3;  // see kMostByte
          if constexpr (is_full || Q == END - 1) acc[i].close(totals + pass * D::kTogether + i);
        });
      });
      codes += D::kTogether * V::N * 4;
      lines += 64 * kLines;
    }
  }
  typename V::F found[kVectors];
  for (int v = 0; v < kVectors; ++v) found[v] = D::floats(totals[v]);
  add_scaled<V>(rec, s, x, w.whole, found, sums);
}

template <class D, int BITS, bool TABLE>
void multiply_digits(const Job& job, int64_t begin, int64_t end) {
  const Weight<D> w = weight_of<D, TABLE>(job);
  for (int64_t strip = begin; strip < end; ++strip) {
    alignas(64) float sums[kTile * kStrip];  // as many as `finish` may read
    memset(sums, 0, kStrip * sizeof(float));
    const Record rec = record(job, strip);
    const Digits* segment = job.digits;
    segments(job.format, [&](const Segment& s) AR_FORCED {
      const Digits& x = *segment++;
      if (BITS != 4 || s.units > 1) add_segment<D, BITS, TABLE, 0, kQuads>(job, rec, s, x, w, sums);
      else if (s.unit & 1) add_segment<D, BITS, TABLE, kQuads / 2, kQuads>(job, rec, s, x, w, sums);
      else add_segment<D, BITS, TABLE, 0, kQuads / 2>(job, rec, s, x, w, sums);
    });
    finish<typename D::V>(job, strip, 0, 1, sums);
  }
}

template <class D>
void prepare_digits(const Job& job) {
  switch (job.format.bits) {
    case 2: return prepare_digits<D, 2>(job);
    case 3: return prepare_digits<D, 3>(job);
    default: return prepare_digits<D, 4>(job);
  }
}

template <class D>
void multiply_digits(const Job& job, int64_t begin, int64_t end) {
  if (job.format.kind == kTable) return multiply_digits<D, 4, true>(job, begin, end);
  switch (job.format.bits) {
    case 2: return multiply_digits<D, 2, false>(job, begin, end);
    case 3: return multiply_digits<D, 3, false>(job, begin, end);
    default: return multiply_digits<D, 4, false>(job, begin, end);
  }
}

}  // namespace
}  // namespace ar
