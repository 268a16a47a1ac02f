// Products of one row of bf16 with integers of 2 to 4 bits, by products of bytes (AVX512-VNNI).
//
// Bytes are multiplied four at a time where bf16 numbers are by two, and a code needs little more
// than a mask to become a byte: codes higher up in a byte are summed apart, and their sum is shifted
// at the end. Nothing is looked up.
//
// For that, the inputs of a segment are whole numbers of a power of two, up to 2^15, of which the
// largest has 15 bits. bf16 has 8, so inputs down to 1/128 of the largest one (at 3 bits 1/64) are
// exact; smaller ones differ by at most 2^-15 (2^-14) of it. Each is 256 * high + low, two signed
// bytes; the one number that would need a third loses 1/32640. Sums of products are exact: below
// 2^31 for a segment of 128 inputs.
#include "digits.h"

namespace ar {
namespace {

template <int BITS>
void prepare_bits(const Job& job) {
  const Format& f = job.format;
  const uint16_t* x = static_cast<const uint16_t*>(job.x);
  uint8_t* out = static_cast<uint8_t*>(job.packed);
  Digits* segment = job.digits;
  segments(f, [&](const Segment& s) {
    const int64_t first = s.unit / 2, last = (s.unit + s.units) / 2;
    __m512i most = _mm512_setzero_si512();
    for (int64_t b = first; b < last; ++b)
      most = _mm512_max_epu16(most, _mm512_and_si512(inputs(x, f.columns, b), absolute()));
    const Unit unit = unit_of(most);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t b = first; b < last; ++b)
      sum = _mm512_add_epi32(sum, split<BITS>(inputs(x, f.columns, b), unit.inverse, out + 64 * b));
    *segment++ = Digits{unit.size, float(_mm512_reduce_add_epi32(sum))};
  });
}

template <int BITS>
void multiply_bits(const Job& job, int64_t begin, int64_t end) {
  const float first = reinterpret_cast<const float*>(job.blob)[0];
  for (int64_t strip = begin; strip < end; ++strip) {
    alignas(64) float sums[kTile * kStrip];  // as many as `finish` may read
    memset(sums, 0, kStrip * sizeof(float));
    const Record rec = record(job, strip);
    const Digits* segment = job.digits;
    segments(job.format, [&](const Segment& s) AR_FORCED {
      Sums acc;
      for (int c = 0; c < 4; ++c)
        for (int part = 0; part < 2; ++part)
          acc.high[c][part] = acc.low[c][part] = _mm512_setzero_si512();
      const uint8_t* x = static_cast<const uint8_t*>(job.packed);
      for (int64_t b = s.unit / 2; b < (s.unit + s.units) / 2; ++b)
        add_block<BITS>(rec.codes + b * 4 * 64 * BITS, x + 64 * b, &acc);
      add_segment<BITS>(rec, s.group, *segment++, first, acc, sums);
    });
    finish<V512>(job, strip, 0, 1, sums);
  }
}

}  // namespace

void prepare_digits(const Job& job) {
  switch (job.format.bits) {
    case 2: return prepare_bits<2>(job);
    case 3: return prepare_bits<3>(job);
    default: return prepare_bits<4>(job);
  }
}

void multiply_digits(const Job& job, int64_t begin, int64_t end) {
  switch (job.format.bits) {
    case 2: return multiply_bits<2>(job, begin, end);
    case 3: return multiply_bits<3>(job, begin, end);
    default: return multiply_bits<4>(job, begin, end);
  }
}

}  // namespace ar
