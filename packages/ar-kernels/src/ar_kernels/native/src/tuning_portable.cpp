// What tuning asks for, in plain C++.
#include "tuning_loops.h"

namespace ar {

extern const Tuning kTuningPortable = kLoops;

}  // namespace ar
