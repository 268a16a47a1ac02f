// Codes of one lane of a block, one by one: packing, unpacking and the portable kernel.
#pragma once
#include <string.h>

#include "format.h"

namespace ar {
namespace {

// One lane (a feature and a parity of inputs) of a block: its 16 codes into 16-bit words of as
// many registers.
template <int BITS>
void pack_lane(const uint32_t* code, uint8_t* to) {
  uint32_t word[BITS] = {};
  for (int f = 0; f < kFields; ++f) {
    if (!is_spread(BITS, f)) {
      const Place at = place(BITS, f);
      word[at.reg] |= code[f] << at.shift;
    } else if (BITS == 6) {
      const int i = f - whole_fields(6);
      word[i] |= (code[f] & 15) << 12;
      word[4 + i / 2] |= (code[f] >> 4) << (12 + 2 * (i & 1));
    } else {
      for (int j = 0; j < BITS; ++j) word[j] |= (code[f] >> j & 1) << 15;
    }
  }
  for (int j = 0; j < BITS; ++j) {
    const uint16_t half = uint16_t(word[j]);
    memcpy(to + kRegister * j, &half, 2);
  }
}

template <int BITS>
void unpack_lane(const uint8_t* from, uint32_t* code) {
  uint32_t word[BITS];
  for (int j = 0; j < BITS; ++j) {
    uint16_t half;
    memcpy(&half, from + kRegister * j, 2);
    word[j] = half;
  }
  constexpr uint32_t mask = (1 << BITS) - 1;
  for (int f = 0; f < kFields; ++f) {
    if (!is_spread(BITS, f)) {
      const Place at = place(BITS, f);
      code[f] = word[at.reg] >> at.shift & mask;
    } else if (BITS == 6) {
      const int i = f - whole_fields(6);
      code[f] = word[i] >> 12 | (word[4 + i / 2] >> (12 + 2 * (i & 1)) & 3) << 4;
    } else {
      code[f] = 0;
      for (int j = 0; j < BITS; ++j) code[f] |= word[j] >> 15 << j;
    }
  }
}

inline void pack_lane_8(const uint32_t* code, int lane, uint8_t* block) {
  for (int f = 0; f < kFields; ++f) block[byte_place(lane, f)] = uint8_t(code[f]);
}

inline void unpack_lane_8(const uint8_t* block, int lane, uint32_t* code) {
  for (int f = 0; f < kFields; ++f) code[f] = block[byte_place(lane, f)];
}

}  // namespace
}  // namespace ar
