// Products in plain C++.
#include "v1.h"

#include "compact_plain.h"
#include "kernel_f32.h"
#include "lanes.h"
#include "steps.h"

namespace ar {
namespace {

template <int BITS>
void decode(const Record& rec, const float* table, const Segment& s, float* panel) {
  for (int64_t u = s.unit; u < s.unit + s.units; ++u, panel += kUnit * kStrip)
    for (int lane = 0; lane < 2 * kStrip; ++lane) {
      const uint8_t* block = block_of(rec, s, u) + lane / 32 * 64;
      uint32_t code[kFields];
      if constexpr (BITS == 8) unpack_lane_8(block, lane % 32, code);
      else unpack_lane<BITS>(block + 2 * (lane % 32), code);
      for (int i = 0; i < kUnit / 2; ++i) {
        const uint32_t c = code[(u & 1) * kUnit / 2 + i];
        const float value = table[BITS == 8 ? c & 0x7f : c];
        panel[(2 * i + (lane & 1)) * kStrip + lane / 2] = BITS == 8 && c & 0x80 ? -value : value;
      }
    }
}

Decode decoder(int bits) {
  switch (bits) {
    case 2: return decode<2>;
    case 3: return decode<3>;
    case 4: return decode<4>;
    case 5: return decode<5>;
    case 6: return decode<6>;
    default: return decode<8>;
  }
}

void multiply(const Job& job, int64_t begin, int64_t end) {
  many_rows<V1>(job, begin, end, decoder(job.format.bits));
}

void expand(const Job& job, int64_t origin, int64_t begin, int64_t end) {
  expand_with<V1>(job, origin, begin, end, decoder(job.format.bits));
}

}  // namespace

static constexpr ByCompact kCompact = {compact_parted<V1>, compact_product<CompactPlain>};

static constexpr Steps kSteps = {widen<V1>,  float_product<V1, Dots<V1>>, norm<V1>,
                                 attend<V1>, pair<V1>,          turn<V1>,
                                 &kCompact};

extern const Kernels kPortable = {"portable", {1, 1, 1}, 4, 0, 0, 0, nullptr, nullptr,
                                  prepare<V1>, multiply,  expand,   read_all<V1>,
                                  &kSteps};

}  // namespace ar
