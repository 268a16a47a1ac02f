// Products in float32 by AVX2.
#include "v256.h"

#include "compact_avx2.h"
#include "digits_avx2.h"
#include "kernel_simd.h"
#include "steps.h"

namespace ar {

static constexpr ByCompact kCompact = {compact_parted<V256>, compact_product<CompactFloats<Bytes256>>};

static constexpr Steps kSteps = {widen<V256>,  float_product<V256, Dots<V256>>, norm<V256>,
                                 attend<V256>, pair<V256>,          turn<V256>,
                                 &kCompact};

extern const ByDigits kDigitsAvx2 = {prepare_digits<Pairs>, multiply_digits<Pairs>};

extern const Kernels kAvx2 = {"avx2",         {1, 1, 1},    4, 0, 4, &kDigitsAvx2,
                              prepare<V256>,  multiply<V256>, expand<V256>, read_all<V256>,
                              &kSteps};

}  // namespace ar
