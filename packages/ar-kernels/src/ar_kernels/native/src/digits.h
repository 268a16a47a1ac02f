// Products of rows of bf16 with integers, or with values of 4 bits that are whole numbers of a unit,
// by products of bytes, for 5 bits and more of words (Kernels::digit_bits and digit_rows tell how many
// bits and rows where; decision 0026).
//
// Bytes are multiplied four at a time where bf16 numbers are by two and floats one by one, and a
// code needs little more than a mask to become a byte. Only values that are no integers are looked
// up, as bytes (whole.h).
//
// For that, the inputs of a segment are whole numbers of a power of two, up to 2^15, of which the
// largest has 15 bits. bf16 has 8, so inputs down to 1/128 of the largest one (at 3 bits 1/64) are
// exact; smaller ones differ by at most 2^-15 (2^-14) of it. Each is 256 * high + low, two signed
// bytes; the one number that would need a third loses 1/32640. Sums of products are exact: below
// 2^31 for a segment of 128 inputs.
//
// The inputs of a block of 32 lie as 8 quads of high bytes and then 8 of low ones, in the order in
// which masks find their codes: a quad's bytes belong to the low and high byte of the lane of the
// even input, then to those of the odd one (see Place). To be multiplied with words they lie as they are.
#pragma once
#include "fetch.h"
#include "whole.h"

namespace ar {
namespace {

// Steps in which a block is multiplied: four bytes of each feature, or two words.
constexpr int quads_of(int bits) { return bits > 4 ? 16 : 8; }

constexpr int kRowsAtOnce = 32;  // rows whose sums stay in the first-level cache

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

// The segments of a block whose halves are groups, the second one `next` behind the first.
template <class D, int BITS>
void prepare_halves(const uint16_t* x, uint8_t* out, Digits* segment, int64_t next) {
  alignas(64) int16_t number[kDepth];
  const Unit low = unit_of(most_of(x, kUnit)), high = unit_of(most_of(x + kUnit, kUnit));
  const int32_t sum = round_inputs<BITS, 0, kUnit>(x, low.inverse, number);
  segment[0] = Digits{low.size, float(sum)};
  segment[next] = Digits{high.size, float(round_inputs<BITS, kUnit, kUnit>(x, high.inverse, number))};
  D::split(number, kOrder<BITS>, out);
}

// One row: blocks of `out` and segments are as many rows apart as are prepared.
template <class D, int BITS>
void prepare_row(const Format& f, const uint16_t* x, uint8_t* out, Digits* segment, int64_t rows) {
  const int64_t stride = 2 * kDepth * rows;
  uint16_t last[kDepth] = {};  // of the inputs, and zeros
  const int64_t whole = f.columns / kDepth;
  if (whole < f.blocks) memcpy(last, x + whole * kDepth, (f.columns - whole * kDepth) * 2);
  const auto inputs = [&](int64_t b) { return b < whole ? x + b * kDepth : last; };
  if (f.group == kUnit) {
    for (int64_t b = 0; b < f.blocks; ++b)
      prepare_halves<D, BITS>(inputs(b), out + stride * b, segment + 2 * b * rows, rows);
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
      D::split(number, kOrder<BITS>, out + stride * b);
    }
    *segment = Digits{unit.size, float(sum)};
    segment += rows;
  });
}

// Rows of tiles [begin, end); a row that only fills up a pair is taken for the last one again.
template <class D, int BITS>
void prepare_digits(const Job& job, int64_t begin, int64_t end) {
  const int64_t rows = padded_rows(job.rows), last = end * kTile < rows ? end * kTile : rows;
  for (int64_t row = begin * kTile; row < last; ++row) {
    const int64_t from = row < job.rows ? row : job.rows - 1;
    prepare_row<D, BITS>(job.format, static_cast<const uint16_t*>(job.x) + from * job.x_stride,
                         static_cast<uint8_t*>(job.packed) + 2 * kDepth * row, job.digits + row,
                         rows);
  }
}

// The register of codes that is read for the first time at quad Q, or -1.
constexpr int register_at(int bits, int quad) {
  const int per = bits == 2 ? 4 : 2;  // quads
  return quad % per == 0 && quad / per < bits ? quad / per : -1;
}

// The bytes of quad Q, or its words, out of a block's registers of codes.
template <class D, int BITS, int Q>
AR_INLINE typename D::I bytes(const typename D::I (&reg)[BITS]) {
  if constexpr (BITS == 8) {
    return D::template words<Q % 2>(reg[Q / 2]);
  } else if constexpr (BITS == 4) {
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

template <class D, int BITS, bool TABLE>
Weight<D> weight_of(const Job& job) {
  const float* table = reinterpret_cast<const float*>(job.blob);
  Weight<D> w{{1.0f, BITS == 8 ? 0.5f : table[0]}, {}};
  if constexpr (TABLE) {
    w.whole = whole_of(table);
    uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = uint8_t((table[i] - w.whole.base) / w.whole.unit);
    w.bytes = D::table(bytes);
  }
  return w;
}

// Adds the products of vectors of features with quads [BEGIN, END) of a block of ROWS rows, asking
// for so many lines meanwhile.
template <class D, int BITS, bool TABLE, int BEGIN, int END, int ROWS, int TOGETHER, int LINES>
AR_INLINE void add_block(const uint8_t* codes, const uint8_t* digits, const uint8_t* lines,
                         const Weight<D>& w, typename D::Total* totals) {
  using V = typename D::V;
  constexpr int kVectors = kStrip / V::N, kSteps = (END - BEGIN) * TOGETHER;
  typename D::Sums acc[ROWS][TOGETHER];
  for (int m = 0; m < ROWS; ++m)
    for (int i = 0; i < TOGETHER; ++i) acc[m][i].begin(totals[m * kVectors + i]);
  typename D::I reg[TOGETHER][BITS];
  unrolled<BEGIN, END>([&](auto quad) AR_FORCED {
    constexpr int Q = decltype(quad)::value, R = register_at(BITS, Q);
    typename D::Inputs x[ROWS];
    for (int m = 0; m < ROWS; ++m) x[m] = D::inputs(digits + 2 * kDepth * m + 4 * Q);
    unrolled<0, TOGETHER>([&](auto vector) AR_FORCED {
      constexpr int i = decltype(vector)::value;
      if constexpr (LINES > 0) fetch_one<LINES, kSteps, (Q - BEGIN) * TOGETHER + i>(lines);
      const uint8_t* mine = codes + i * V::N * 4;
      typename D::I found;
      if constexpr (BITS == 5 || BITS == 6) {
        found = D::template field_words<BITS, Q>(mine);
      } else {
        if constexpr (R >= 0) reg[i][R] = D::load(mine + kRegister * R);
        found = bytes<D, BITS, Q>(reg[i]);
      }
      if constexpr (TABLE) found = D::look_up(w.bytes, found);
      for (int m = 0; m < ROWS; ++m) acc[m][i].add(found, x[m]);
      constexpr bool is_full = TABLE && Q % 4 == 3;  // see kMostByte
      if constexpr (is_full || Q == END - 1)
        for (int m = 0; m < ROWS; ++m) acc[m][i].close(totals + m * kVectors + i);
    });
  });
}

// sums[row][feature] += scale * (what was found - zero * sum of the inputs).
template <class D>
AR_INLINE void add_scaled(const Record& rec, const Segment& s, const Digits* x, int64_t rows,
                          const Whole& whole, const typename D::Total* totals, float* sums) {
  using V = typename D::V;
  const uint8_t *scales = rec.scales(s.group), *zeros = rec.zeros(s.group);
  const auto bias = V::set((rec.zero_bias - whole.base) / whole.unit);
  const auto add = [&](int v, typename V::F zero) AR_FORCED {
    const auto scale =
        V::mul(V::scales(rec.scale, scales + v * V::N * rec.width), V::set(whole.unit));
    for (int64_t m = 0; m < rows; ++m) {
      float* to = sums + m * kStrip + v * V::N;
      const auto found = D::floats(totals[m * (kStrip / V::N) + v]);
      const auto value = V::sub(found, V::mul(zero, V::set(x[m].sum)));
      V::store(to, V::fma(V::mul(scale, V::set(x[m].size)), value, V::load(to)));
    }
  };
  if (zeros == nullptr) {
    for (int v = 0; v < kStrip / V::N; ++v) add(v, bias);
  } else {
    const auto each = V::set(1 / whole.unit);
    for (int v = 0; v < kStrip / V::N; ++v)
      add(v, V::fma(V::bytes_as_floats(zeros + v * V::N), each, bias));
  }
}

// Adds a segment's products with `rows` rows from `row` on, ALONE: the only one; quads [BEGIN, END)
// of its blocks. Blocks are read in the order of memory; of one, as many vectors of features are
// multiplied together as there are registers for.
template <class D, int BITS, bool TABLE, bool ALONE, int BEGIN, int END>
AR_INLINE void add_segment(const Job& job, const Record& rec, const Segment& s, const Digits* x,
                           int64_t row, int64_t rows, const Weight<D>& w, float* sums) {
  using V = typename D::V;
  constexpr int kVectors = kStrip / V::N, kTogether = D::kTogether, kWidth = V::N * 4;
  constexpr int kLines = BITS * 4 * (END - BEGIN) * kTogether / (quads_of(BITS) * kVectors);
  const int64_t count = ALONE ? 1 : rows, all = ALONE ? 1 : padded_rows(job.rows);
  typename D::Total totals[(ALONE ? 1 : kRowsAtOnce) * kVectors];
  for (int64_t i = 0; i < count * kVectors; ++i) D::clear(totals + i);
  for (int64_t b = s.unit / 2; b < (s.unit + s.units + 1) / 2; ++b) {
    const uint8_t* codes = block_of(rec, s, 2 * b);
    const uint8_t* lines = codes + kRegister * BITS * BEGIN / quads_of(BITS);
    const uint8_t* inputs = static_cast<const uint8_t*>(job.packed) + 2 * kDepth * (b * all + row);
    for (int v = 0; v < kVectors; v += kTogether) {
      const uint8_t* digits = inputs;
      if constexpr (kTogether < kVectors)
        asm("" : "+r"(digits));  // inputs are read anew: there is no room to keep them
      if constexpr (ALONE) {
        add_block<D, BITS, TABLE, BEGIN, END, 1, kTogether, kLines>(codes, digits, lines, w,
                                                                    totals + v);
      } else {
        for (int line = 0; line < kLines; ++line) fetch_line<kFar, kNear>(lines + 64 * line);
        for (int64_t m = 0; m < count; m += 2)
          add_block<D, BITS, TABLE, BEGIN, END, 2, kTogether, 0>(
              codes, digits + 2 * kDepth * m, nullptr, w, totals + m * kVectors + v);
      }
      codes += kWidth * kTogether;
      lines += 64 * kLines;
    }
  }
  add_scaled<D>(rec, s, x, count, w.whole, totals, sums);
}

template <class D, int BITS, bool TABLE, bool ALONE>
void multiply_rows(const Job& job, const Weight<D>& w, int64_t strip, int64_t row, int64_t rows,
                   float* sums) {
  constexpr int kAll = quads_of(BITS), kHalf = kAll / 2;
  const Record rec = record(job, strip);
  const int64_t all = padded_rows(job.rows);
  const Digits* x = job.digits + row;
  segments(job.format, [&](const Segment& s) AR_FORCED {
    const auto add = [&](auto begin, auto end) AR_FORCED {
      constexpr int BEGIN = decltype(begin)::value, END = decltype(end)::value;
      add_segment<D, BITS, TABLE, ALONE, BEGIN, END>(job, rec, s, x, row, rows, w, sums);
    };
    if (BITS < 4 || s.units > 1) add(Int<0>{}, Int<kAll>{});
    else if (s.unit & 1) add(Int<kHalf>{}, Int<kAll>{});
    else add(Int<0>{}, Int<kHalf>{});
    x += all;
  });
}

template <class D, int BITS, bool TABLE>
void multiply_digits(const Job& job, int64_t begin, int64_t end) {
  const Weight<D> w = weight_of<D, BITS, TABLE>(job);
  alignas(64) float sums[kRowsAtOnce * kStrip];
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t row = 0; row < job.rows; row += kRowsAtOnce) {
      const int64_t left = job.rows - row, rows = left < kRowsAtOnce ? left : kRowsAtOnce;
      memset(sums, 0, padded_rows(rows) * kStrip * sizeof(float));
      if (job.rows == 1) multiply_rows<D, BITS, TABLE, true>(job, w, strip, row, 1, sums);
      else if constexpr (D::kPairs)
        multiply_rows<D, BITS, TABLE, false>(job, w, strip, row, padded_rows(rows), sums);
      finish<typename D::V>(job, strip, row, rows, sums);
    }
}

template <class D>
void prepare_digits(const Job& job, int64_t begin, int64_t end) {
  switch (job.format.bits) {
    case 2: return prepare_digits<D, 2>(job, begin, end);
    case 3: return prepare_digits<D, 3>(job, begin, end);
    default: return prepare_digits<D, 4>(job, begin, end);
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
