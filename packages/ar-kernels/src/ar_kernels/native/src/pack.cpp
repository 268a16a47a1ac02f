#include "pack.h"

#include "lanes.h"

namespace ar {
namespace {

// Integers of 8 bits are stored as sign and magnitude of code - 127.5: two halves of one table.
inline uint32_t to_stored(const Format& f, uint32_t code) {
  if (f.bits != 8 || f.kind != kInteger) return code;
  return code & 0x80 ? code ^ 0x80 : 0xff - code;
}

inline uint32_t from_stored(const Format& f, uint32_t stored) {
  if (f.bits != 8 || f.kind != kInteger) return stored;
  return stored & 0x80 ? 0xff - stored : stored ^ 0x80;
}

template <class Fn>
void with_bits(int bits, Fn&& fn) {
  switch (bits) {
    case 2: return fn(pack_lane<2>, unpack_lane<2>);
    case 3: return fn(pack_lane<3>, unpack_lane<3>);
    case 4: return fn(pack_lane<4>, unpack_lane<4>);
    case 5: return fn(pack_lane<5>, unpack_lane<5>);
    default: return fn(pack_lane<6>, unpack_lane<6>);
  }
}

}  // namespace

void pack_strips(const Format& f, const uint8_t* codes, uint8_t* first, int64_t begin,
                 int64_t end) {
  const uint32_t mask = (1u << f.bits) - 1;
  with_bits(f.bits, [&](auto pack, auto) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t b = 0; b < f.blocks; ++b)
        for (int c = 0; c < 4; ++c) {
          uint8_t* out = first + s * f.record + block_at(f, b) + 64 * c;
          for (int lane = 0; lane < 32; ++lane) {
            const int64_t row = s * kStrip + c * kBlock + lane / 2;
            uint32_t code[kFields];
            const int64_t column = b * kDepth + (lane & 1);
            const int64_t left = row < f.rows ? f.columns - column : 0;
            const uint8_t* at = codes + row * f.columns + column;
            if (left >= 2 * kFields - 1)
              for (int i = 0; i < kFields; ++i) code[i] = at[2 * i] & mask;
            else
              for (int i = 0; i < kFields; ++i) code[i] = 2 * i < left ? at[2 * i] & mask : 0;
            if (f.bits == 8)
              for (auto& one : code) one = to_stored(f, one);
            if (f.bits == 8) pack_lane_8(code, lane, out);
            else pack(code, out + 2 * lane);
          }
        }
    }
  });
}

void unpack_strips(const Format& f, const uint8_t* first, uint8_t* codes, int64_t begin,
                   int64_t end) {
  with_bits(f.bits, [&](auto, auto unpack) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t b = 0; b < f.blocks; ++b)
        for (int c = 0; c < 4; ++c) {
          const uint8_t* in = first + s * f.record + block_at(f, b) + 64 * c;
          for (int lane = 0; lane < 32; ++lane) {
            const int64_t row = s * kStrip + c * kBlock + lane / 2;
            if (row >= f.rows) continue;
            uint32_t code[kFields];
            if (f.bits == 8) unpack_lane_8(in, lane, code);
            else unpack(in + 2 * lane, code);
            for (int i = 0; i < kFields; ++i) {
              const int64_t column = b * kDepth + 2 * i + (lane & 1);
              if (column < f.columns)
                codes[row * f.columns + column] = uint8_t(from_stored(f, code[i]));
            }
          }
        }
    }
  });
}

}  // namespace ar
