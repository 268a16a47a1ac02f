// Products in float32 by AVX2.
#include "v256.h"

#include "compact_avx2.h"
#include "digits_avx2.h"
#include "e4m3_avx2.h"
#include "kernel_simd.h"
#include "steps.h"

namespace ar {

static constexpr ByCompact kCompact = {compact_parted<V256>, compact_product<CompactFloats<Bytes256>>};

static constexpr Steps kSteps = {widen<V256>,  float_product<V256, Dots<V256>>, norm<V256>,
                                 attend<V256>, pair<V256>,          turn<V256>,
                                 &kCompact};

extern const ByDigits kDigitsAvx2 = {prepare_digits<Pairs>, multiply_digits<Pairs>};
constexpr int kDigitRows = 32;  // from there on panels of floats are as fast

static void multiply_words(const Job& job, int64_t begin, int64_t end) {
  switch (job.format.bits) {
    case 5: return multiply_digits<Words, 5, false>(job, begin, end);
    case 6: return multiply_digits<Words, 6, false>(job, begin, end);
    default: return multiply_digits<Words, 8, false>(job, begin, end);
  }
}

static constexpr ByDigits kWords = {prepare_digits<Words, 8>, multiply_words};

static void multiply_avx2(const Job& job, int64_t begin, int64_t end) {
  if (job.rows == 1 && job.format.kind == kE4M3) return multiply_e4m3(job, begin, end);
  multiply<V256>(job, begin, end);
}

extern const Kernels kAvx2 = {"avx2",         {1, 1, 1},     4, 0, 4, kDigitRows, &kDigitsAvx2, &kWords,
                              prepare<V256>,  multiply_avx2, expand<V256>, read_all<V256>,
                              &kSteps};

}  // namespace ar
