// Products in float32 by AVX512.
#include "v512.h"

#include "compact_avx512.h"
#include "kernel_simd.h"
#include "steps.h"

namespace ar {

void expand_avx512(const Job& job, int64_t origin, int64_t begin, int64_t end) {
  expand<V512>(job, origin, begin, end);
}

static constexpr ByCompact kCompact = {compact_parted<V512>, compact_product<CompactFloats<Bytes512>>};

static constexpr Steps kSteps = {widen<V512>,  float_product<V512, Dots<V512>>, norm<V512>,
                                 attend<V512>, pair<V512>,          turn<V512>,
                                 &kCompact};

// VNNI came with later processors than the rest.
static constexpr Kernels with_digits(const ByDigits* digits) {
  return Kernels{"avx512",      {1, 1, 1},      4,     0, 4, 1, digits, nullptr, prepare<V512>,
                 multiply<V512>, expand_avx512, read_all<V512>, &kSteps};
}

extern const Kernels kAvx512 = with_digits(&kDigitsAvx2);
extern const Kernels kAvx512Vnni = with_digits(&kDigitsVnni);

}  // namespace ar
