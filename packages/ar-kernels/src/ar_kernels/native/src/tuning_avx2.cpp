// What tuning asks for, in AVX2.
#include "tuning_loops.h"

namespace ar {

extern const Tuning kTuningAvx2 = kLoops;

}  // namespace ar
