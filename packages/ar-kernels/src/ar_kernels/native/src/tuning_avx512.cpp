// What tuning asks for, in AVX512.
#include "tuning_loops.h"

namespace ar {

extern const Tuning kTuningAvx512 = kLoops;

}  // namespace ar
