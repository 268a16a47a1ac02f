// How a weight lies in memory: what Python describes, what every kernel reads.
//
// A blob is a header and then one record for every strip of 64 output features ("rows" of the
// weight, "columns" of the product; here always: features). A record holds everything that a strip
// needs in the order in which it is needed: the factors of its features, then the scales, zero points
// and codes of one group after the other (see Format::chunk). So a thread streams through one range of
// memory, line by line, which is what processors fetch best (docs/log.md), and weights that share
// their input are joined by joining their records.
#pragma once
#include <stdint.h>

namespace ar {

constexpr int kStrip = 64;         // features of a strip
constexpr int kBlock = 16;         // features of a block: four blocks make a strip
constexpr int kDepth = 32;         // inputs that one block of codes covers
constexpr int kUnit = 16;          // the finest group
constexpr int kFields = 16;        // input pairs of a block
constexpr int kHeader = 1024;      // bytes: 128 table values, the bias of the zero points
constexpr int kZeroBias = 128;     // its place in the header, in floats
constexpr int kSegment = 128;      // inputs summed before they meet their scale
constexpr int kRegister = 256;     // bytes of a strip's block from one register of codes to the next
constexpr int kMeta = 8;           // integers that describe a weight

enum Kind { kInteger = 0, kE4M3 = 1, kTable = 2 };  // whole numbers, E4M3, any table
enum Scale { kScaleNone, kScaleF16, kScaleBF16, kScaleF32, kScaleE8M0, kScaleE4M3, kScaleUE5M3 };
enum DType { kF32 = 0, kF16 = 1, kBF16 = 2 };

enum Status {
  kOk = 0,
  kBadFormat = 1,    // meta is not a format
  kBadBlob = 2,      // blob of another size than the format asks
  kBadInput = 3,     // x too small for its shape, or a bad type
  kBadOutput = 4,    // output too small
  kBadIsa = 5,       // this processor cannot run it
  kNoMemory = 6,
  kBadRange = 7,     // rows, features or offsets outside of the weight
};

struct Format {
  int64_t rows, columns;  // O and I of the weight
  int64_t group;          // inputs that share a scale; 0: only the factor of each feature
  int bits, kind, scale, zero;
  int64_t strips, blocks, groups;  // derived: strips of features, blocks of inputs, groups
  // derived: a chunk is a group (two where they have 16 inputs, all inputs where there are none): the
  // scales of its groups, their zero points, its blocks of codes. `lead`: bytes before the codes.
  int64_t chunk_groups, chunk_blocks, lead, chunk;
  int64_t record, bytes;  // derived: of a strip, of all
};

constexpr int64_t kFactors = kStrip * 4;  // bytes at the front of a record

inline int64_t block_bytes(const Format& f) { return int64_t(kRegister) * f.bits; }

inline int scale_bytes(int kind) {
  switch (kind) {
    case kScaleNone: return 0;
    case kScaleF16: case kScaleBF16: return 2;
    case kScaleF32: return 4;
    default: return 1;
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a block's codes begin in a record.
inline int64_t block_at(const Format& f, int64_t block) {
  return kFactors + (block / f.chunk_blocks + 1) * f.lead + block * block_bytes(f);
}

// Reads rows, columns, group, bits, kind, scale, zero, weights (how many of that shape follow one
// another). Returns false where no kernel reads such a format.
inline bool read_format(const int64_t* meta, Format* f) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (meta == nullptr) return false;
  for (int i = 0; i < kMeta; ++i)
    if (meta[i] < 0 || meta[i] >= kMost) return false;
  f->rows = meta[0]; f->columns = meta[1]; f->group = meta[2];
  f->bits = int(meta[3]); f->kind = int(meta[4]); f->scale = int(meta[5]); f->zero = int(meta[6]);
  const int64_t weights = meta[7];
  const int b = f->bits;
  if (f->rows < 1 || f->columns < 1 || weights < 1 || f->kind > kTable || f->scale > kScaleUE5M3)
    return false;
  if (!(b == 2 || b == 3 || b == 4 || b == 5 || b == 6 || b == 8)) return false;
  if (f->kind == kE4M3 && b != 8) return false;
  if (f->zero > 1 || f->group % kUnit || (f->group % kDepth && f->group != kUnit)) return false;
  if ((f->group == 0) != (f->scale == kScaleNone) || (f->group == 0 && f->zero)) return false;
  if (f->group > ceil_div(f->columns, kUnit) * kUnit + kDepth) return false;
  f->strips = ceil_div(f->rows, kStrip);
  f->blocks = ceil_div(f->columns, kDepth);
  f->groups = f->group ? ceil_div(f->columns, f->group) : 0;
  f->chunk_groups = f->group == 0 ? 0 : f->group == kUnit ? 2 : 1;
  f->chunk_blocks = f->group == 0 ? f->blocks : f->group == kUnit ? 1 : f->group / kDepth;
  f->lead = f->chunk_groups * kStrip * (scale_bytes(f->scale) + f->zero);
  f->chunk = f->lead + f->chunk_blocks * block_bytes(*f);
  f->record = kFactors + ceil_div(f->blocks, f->chunk_blocks) * f->lead + f->blocks * block_bytes(*f);
  f->bytes = kHeader + f->record * f->strips * weights;
  return f->record < (int64_t(1) << 40) && f->bytes > 0;
}

// Place of a code of fewer than 8 bits within a block: 16-bit lane 2 * feature + (input & 1),
// register and shift by field = input / 2. The registers of a strip's four blocks alternate, so that
// fields are read in the order of memory. Codes of 3, 5 and 6 bits leave spare bits on top of
// each lane, which together hold the last fields.
struct Place { int reg, shift; };

constexpr int whole_fields(int bits) { return 16 / bits * bits < 16 ? 16 / bits * bits : 16; }

constexpr Place place(int bits, int field) {
  const int per = 16 / bits;
  return Place{field / per, bits * (field % per)};
}

constexpr bool is_spread(int bits, int field) { return field >= whole_fields(bits); }

// Codes of 8 bits are bytes; unpacking the low and the high halves of each 16 bytes with zeros
// (or with a table's other half) gives the lanes of an even and of an odd field.
constexpr int byte_place(int lane, int field) {
  return kRegister * (field / 2) + 16 * (lane / 8) + 8 * (field & 1) + lane % 8;
}

}  // namespace ar
