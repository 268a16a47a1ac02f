// The entry points: plain C, no state, no exceptions. Every function that returns int32_t returns
// a Status; sizes are checked before anything is read or written.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AR_API __attribute__((visibility("default")))

// Runs fn(begin, end, context) over parts of [begin, end) on a pool of threads; the signature of
// libtorch_cpu's torch_parallel_for.
typedef int32_t (*ar_parallel)(int64_t begin, int64_t end, int64_t grain,
                               void (*fn)(int64_t, int64_t, void*), void* context);

typedef struct {
  ar_parallel parallel;  // null: one thread
  int64_t isa;           // 0 portable, 1 AVX2, 2 AVX512, 3 AVX512-BF16
} ar_runtime;

typedef struct {
  const int64_t* meta;   // 8 integers, see format.h
  const uint8_t* blob;
  int64_t bytes;         // of the blob
} ar_weight;

typedef struct {
  const void* x;
  int64_t x_bytes;       // readable from x on
  int64_t rows, stride;  // of x; stride in elements
  int64_t dtype;         // 0 fp32, 1 fp16, 2 bf16; of x and y
  const float* bias;     // [rows of the weight] or null
  void* y;               // [rows of x][rows of the weight], contiguous
  int64_t y_bytes;
} ar_product;

// What stays the same from one product of a weight to the next.
typedef struct {
  const ar_runtime* runtime;
  const ar_weight* weight;
  int64_t dtype;         // of x and y
} ar_bound;

// A weight of plain floats, [features][columns] without gaps, in the type of the product.
typedef struct {
  const void* values;
  int64_t bytes, features, columns;
} ar_floats;

// bf16 values in 12 bits without loss, as ar_compact made them; compact.h has the layout.
typedef struct {
  const uint8_t* blob;
  int64_t bytes, features, columns, outliers;
} ar_compact_weight;

typedef struct {
  const void* x;
  int64_t x_bytes;       // readable from x on
  int64_t rows, columns, stride;
  int64_t dtype;         // of x, weight and y
  int64_t form;          // 0: rounded, then times the weight; 1: times 1 + weight; 2: times weight
  const void* weight;    // [columns]
  double epsilon;
  void* y;               // [rows][columns], contiguous
} ar_norm_input;

// One query for each head; strides in elements: of sequences, heads, tokens. Keys and values reach
// as far as lengths and strides say; values lie side by side within a head.
typedef struct {
  const void *q, *k, *v;
  int64_t dtype;         // of q, k, v and y
  int64_t sequences, heads, kv_heads, length, width;
  int64_t q_stride[2], k_stride[3], v_stride[3];
  const uint8_t* mask;   // bytes, 0: not seen; a token's next to the last one's; or null
  int64_t mask_stride[2];
  double scale;
  void* y;               // [sequences][heads][width], contiguous
} ar_attention;

// `count` values, a multiple of 16.
typedef struct {
  const void *a, *b;
  int64_t dtype, count;
  void* y;
} ar_pair;

// Turns the halves of each head in place: x * cos + (-second half, first half) * sin, with cos and
// sin [sequences][width]; x [sequences][heads][width], the width a multiple of 32.
typedef struct {
  void* x;
  const void *cos, *sin;
  int64_t dtype, sequences, heads, width;
} ar_turn;

// Writes x [sequences][heads][width] to where sequences and heads are y_stride elements apart.
typedef struct {
  const void* x;
  int64_t dtype, sequences, heads, width;
  void* y;
  int64_t y_stride[2];
} ar_copy;

// One of a row of calls. `what` by kind: 0: `count` (up to 4) ar_weight, and `with` as many
// ar_product of the same x; 1: ar_norm_input; 2: ar_attention; 3: ar_pair, y = a / (1 + e^-a) * b;
// 4: ar_pair, y = a + b; 5: ar_turn; 6: ar_copy.
typedef struct {
  int64_t kind;
  const void* what;
  const void* with;
  int64_t count;
} ar_call;

AR_API int64_t ar_abi(void);
// Tells whether this processor runs an instruction set.
AR_API int32_t ar_runs(int64_t isa);
AR_API const char* ar_isa_name(int64_t isa);
// Bytes of a blob, of its records and of their chunks (see format.h): sizes[0..5] = all, header, record,
// chunk, what lies before a chunk's codes; and how many groups a chunk has.
AR_API int32_t ar_sizes(const int64_t* meta, int64_t* sizes);
AR_API int32_t ar_pack(const ar_runtime*, const int64_t* meta, const uint8_t* codes,
                       int64_t codes_bytes, uint8_t* blob, int64_t bytes);
AR_API int32_t ar_unpack(const ar_runtime*, const ar_weight*, uint8_t* codes, int64_t codes_bytes);
AR_API int32_t ar_multiply(const ar_runtime*, const ar_weight*, const ar_product*);
// The same without a bias, for x [rows][columns of the weight] and y without gaps, whose sizes the
// caller answers for.
AR_API int32_t ar_multiply_bound(const ar_bound*, const void* x, int64_t rows, void* y);
// Rows [offsets[e], offsets[e + 1]) of x times weight e.
AR_API int32_t ar_multiply_experts(const ar_runtime*, const ar_weight*, const ar_product*,
                                   const int64_t* offsets, int64_t count);
// Writes features [begin, end) of a weight as out[end - begin][columns]; begin is a multiple of 64.
AR_API int32_t ar_expand(const ar_runtime*, const ar_weight*, int64_t begin, int64_t end,
                         int64_t dtype, void* out, int64_t out_bytes);
// The product with a float weight, for at most 4 rows of x.
AR_API int32_t ar_multiply_floats(const ar_runtime*, const ar_floats*, const ar_product*);
// Bytes of a compact weight, or -1 where there is none of that shape.
AR_API int64_t ar_compact_bytes(int64_t features, int64_t columns, int64_t outliers);
// Counts outliers of bf16 values up to and with each of features [begin, end), after those before;
// kBadRange where a value is not finite.
AR_API int32_t ar_compact_ends(const ar_runtime*, const ar_floats*, int64_t begin, int64_t end,
                               uint32_t* ends);
// Writes features [begin, end), of which the first range comes first.
AR_API int32_t ar_compact(const ar_runtime*, const ar_floats*, int64_t begin, int64_t end,
                          const uint32_t* ends, uint8_t* blob, int64_t bytes);
// The product with a compact weight, for at most 4 rows of x, in bf16.
AR_API int32_t ar_multiply_compact(const ar_runtime*, const ar_compact_weight*, const ar_product*);
// Rows of x divided by their root mean square, times a weight; columns are a multiple of 16.
AR_API int32_t ar_norm(const ar_runtime*, const ar_norm_input*);
// Softmax attention of one token; the width of a head is a multiple of 16, at most 512.
AR_API int32_t ar_attend(const ar_runtime*, const ar_attention*);
// A row of calls, each after those before it, checked some dozens at a time. `threads` is how many
// are expected; any number will do.
AR_API int32_t ar_run(const ar_runtime*, const ar_call*, int64_t count, int64_t threads);
// Reads a buffer with every thread; what the memory gives.
AR_API int32_t ar_read(const ar_runtime*, const uint8_t* buffer, int64_t bytes, float* out);

#ifdef __cplusplus
}
#endif
