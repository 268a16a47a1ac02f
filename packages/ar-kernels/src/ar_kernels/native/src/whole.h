// Values that are whole numbers of a unit: value = unit * byte + base.
#pragma once

namespace ar {

struct Whole {
  float unit, base;
};

constexpr float kMostByte = 31;  // so that four products with bytes fit in 16 bits, twice over

// A table of 16 values as whole numbers from 0 to kMostByte; unit 0 where they are none.
inline Whole whole_of(const float* table) {
  float unit = 1e30f, least = table[0], most = table[0];
  for (int i = 0; i < 16; ++i) {
    const float v = table[i], size = v < 0 ? -v : v;
    if (size > 0 && size < unit) unit = size;
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  if (!(most > least && most - least <= kMostByte * unit)) return Whole{0, 0};
  for (int i = 0; i < 16; ++i) {
    const float byte = (table[i] - least) / unit;
    if (!(byte >= 0 && byte <= kMostByte && byte == float(int(byte)))) return Whole{0, 0};
  }
  return Whole{unit, least};
}

}  // namespace ar
