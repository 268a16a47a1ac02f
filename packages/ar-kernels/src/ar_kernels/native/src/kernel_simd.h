// Decoding in registers for vector types with integers (V256, V512), and products in float32 that
// use it: for a row or two codes are used as they are decoded, for more a panel is made of them.
#pragma once
#include "kernel_f32.h"

namespace ar {
namespace {

constexpr int kFewRows = 2;

// A field of all features of a part of a block: even inputs in the low, odd ones in the high half
// of each word; bits above a code may be anything.
template <class V, int BITS, int F>
AR_INLINE typename V::I field(const uint8_t* block, int part) {
  constexpr Place at = place(BITS, F);
  if constexpr (!is_spread(BITS, F)) {
    return V::shift(V::words(block + kRegister * at.reg, part), at.shift);
  } else if constexpr (BITS == 6) {
    constexpr int i = F - whole_fields(6);
    const auto low = V::shift(V::words(block + kRegister * i, part), 12);
    const auto high = V::shift(V::words(block + kRegister * (4 + i / 2), part), 12 + 2 * (i & 1));
    return V::either(V::keep(low, 0x000f000f), V::shift_up(V::keep(high, 0x00030003), 4));
  } else {
    auto out = V::keep(V::shift(V::words(block, part), 15), 0x00010001);
    unrolled<1, BITS>([&](auto j) {
      constexpr int bit = decltype(j)::value;
      const auto one = V::keep(V::shift(V::words(block + kRegister * bit, part), 15), 0x00010001);
      out = V::either(out, V::shift_up(one, bit));
    });
    return out;
  }
}

// The values of the two inputs of a field.
template <class V, int BITS, int KIND, int F>
AR_INLINE void values(const uint8_t* block, int part, const typename V::Tables& t,
                      typename V::F* even, typename V::F* odd) {
  if constexpr (KIND == kE4M3 && V::kHasPairs) {
    V::e4m3(block + kRegister * (F / 2), part, F & 1, even, odd);
  } else if constexpr (BITS == 8) {
    const uint8_t* reg = block + kRegister * (F / 2);
    *even = V::template lookup<BITS, KIND>(V::codes8(reg, part, F & 1, 0), t);
    *odd = V::template lookup<BITS, KIND>(V::codes8(reg, part, F & 1, 1), t);
  } else {
    const auto words = field<V, BITS, F>(block, part);
    *even = V::template lookup<BITS, KIND>(words, t);
    *odd = V::template lookup<BITS, KIND>(V::shift(words, 16), t);
  }
}

template <class V, int BITS, int KIND, int ROWS>
void few_rows(const Job& job, int64_t strip, const typename V::Tables& t, float* sums) {
  constexpr int CB = V::kBlocksAtOnce(ROWS), PARTS = kBlock / V::N, VECTORS = CB * PARTS;
  const Record rec = record(job, strip);
  const float* x = static_cast<const float*>(job.packed);
  for (int first = 0; first < 4; first += CB) {
    segments(job.format, [&](const Segment& s) AR_FORCED {
      typename V::F acc[ROWS][VECTORS];
      for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v) acc[m][v] = V::zero();
      const auto add = [&](auto half, int64_t u) AR_FORCED {
        constexpr int BEGIN = 8 * decltype(half)::value;
        const uint8_t* block = block_of(rec, s, u) + first * 64;
        const float* xb = x + u / 2 * kDepth * ROWS;
        unrolled<BEGIN, BEGIN + 8>([&](auto f) AR_FORCED {
          constexpr int F = decltype(f)::value;
          for (int v = 0; v < VECTORS; ++v) {
            typename V::F even, odd;
            values<V, BITS, KIND, F>(block + v / PARTS * 64, v % PARTS, t, &even, &odd);
            for (int m = 0; m < ROWS; ++m) {
              acc[m][v] = V::fma(even, V::set(xb[2 * F * ROWS + m]), acc[m][v]);
              acc[m][v] = V::fma(odd, V::set(xb[(2 * F + 1) * ROWS + m]), acc[m][v]);
            }
          }
        });
      };
      for (int64_t u = s.unit; u < s.unit + s.units; ++u) {
        if (u & 1) add(Int<1>{}, u);
        else add(Int<0>{}, u);
      }
      const float* x_sums = group_sums(job, s, 0, ROWS);
      flush<V, ROWS, VECTORS>(rec, s.group, first * kBlock, x_sums, acc, sums);
    });
  }
}

template <class V, int BITS, int KIND>
void decode(const Record& rec, const float* table, const Segment& s, float* panel) {
  constexpr int PARTS = kBlock / V::N;
  typename V::Tables t;
  V::tables(table, &t);
  const auto add = [&](auto half, const uint8_t* block, float* out) AR_FORCED {
    constexpr int BEGIN = 8 * decltype(half)::value;
    unrolled<BEGIN, BEGIN + 8>([&](auto f) AR_FORCED {
      constexpr int F = decltype(f)::value;
      for (int part = 0; part < PARTS; ++part) {
        typename V::F even, odd;
        values<V, BITS, KIND, F>(block, part, t, &even, &odd);
        float* to = out + 2 * (F - BEGIN) * kStrip + part * V::N;
        V::store(to, even);
        V::store(to + kStrip, odd);
      }
    });
  };
  for (int64_t u = s.unit; u < s.unit + s.units; ++u, panel += kUnit * kStrip)
    for (int c = 0; c < 4; ++c) {
      const uint8_t* block = block_of(rec, s, u) + c * 64;
      if (u & 1) add(Int<1>{}, block, panel + c * kBlock);
      else add(Int<0>{}, block, panel + c * kBlock);
    }
}

// Calls fn(Int<BITS>, Int<KIND>) for a format.
template <class Fn>
AR_INLINE void with_format(const Format& f, Fn&& fn) {
  switch (f.bits) {
    case 2: return fn(Int<2>{}, Int<kTable>{});
    case 3: return fn(Int<3>{}, Int<kTable>{});
    case 4: return fn(Int<4>{}, Int<kTable>{});
    case 5: return fn(Int<5>{}, Int<kTable>{});
    case 6: return fn(Int<6>{}, Int<kTable>{});
    default: break;
  }
  if (f.kind == kInteger) return fn(Int<8>{}, Int<kInteger>{});
  if (f.kind == kE4M3) return fn(Int<8>{}, Int<kE4M3>{});
  return fn(Int<8>{}, Int<kTable>{});
}

template <class V>
void multiply(const Job& job, int64_t begin, int64_t end) {
  with_format(job.format, [&](auto bits, auto kind) {
    constexpr int BITS = decltype(bits)::value, KIND = decltype(kind)::value;
    if (job.rows > kFewRows) return many_rows<V>(job, begin, end, decode<V, BITS, KIND>);
    typename V::Tables t;
    V::tables(reinterpret_cast<const float*>(job.blob), &t);
    for (int64_t strip = begin; strip < end; ++strip) {
      alignas(64) float sums[kFewRows * kStrip] = {};
      if (job.rows == 1) few_rows<V, BITS, KIND, 1>(job, strip, t, sums);
      else few_rows<V, BITS, KIND, 2>(job, strip, t, sums);
      finish<V>(job, strip, 0, job.rows, sums);
    }
  });
}

template <class V>
void expand(const Job& job, int64_t origin, int64_t begin, int64_t end) {
  with_format(job.format, [&](auto bits, auto kind) {
    expand_with<V>(job, origin, begin, end, decode<V, decltype(bits)::value, decltype(kind)::value>);
  });
}

}  // namespace
}  // namespace ar
