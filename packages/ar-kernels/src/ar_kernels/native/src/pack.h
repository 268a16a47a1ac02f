// Codes [rows][columns], one byte each, into the records of a blob and back.
#pragma once
#include "format.h"

namespace ar {

// Both work on strips [begin, end) of one weight whose first record is given.
void pack_strips(const Format& f, const uint8_t* codes, uint8_t* first, int64_t begin, int64_t end);
void unpack_strips(const Format& f, const uint8_t* first, uint8_t* codes, int64_t begin,
                   int64_t end);

}  // namespace ar
