// Products in float32 by AVX2.
#include "v256.h"

#include "kernel_simd.h"

namespace ar {

extern const Kernels kAvx2 = {"avx2",         {1, 1, 1},    4, 0, prepare<V256>,
                              multiply<V256>, expand<V256>, read_all<V256>};

}  // namespace ar
