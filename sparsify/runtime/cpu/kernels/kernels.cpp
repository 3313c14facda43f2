// Products of activations with packed weights on CPUs: y[tokens, rows] = x[tokens, columns] Wᵀ + bias.
//
// docs/format.md describes the layouts. Instruction sets are chosen at run time; this file is compiled without -march. Rows are
// shared out among threads and each is summed by one of them in one order, so the number of threads changes no bit.
#include "common.h"
#include "scalar.h"
#include "avx2.h"
#include "avx512.h"
#include "pairs_avx512.h"
#include "wide_avx512.h"
#include "calls.h"
#ifdef SPARSIFY_X86
#include <cpuid.h>
#endif

#ifndef SPARSIFY_SOURCE
#define SPARSIFY_SOURCE "unknown"
#endif

namespace {

#define OFFSET(p, m) ((char*)(p) + (m) * rows * size)

#ifdef SPARSIFY_X86
// PAIRS: bfloat16 products of x that is bfloat16 too; else x is float.
template <int KIND, bool PAIRS>
bool linear_avx512(const Matrix& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, int threads,
                   i64 few) {
  const i64 size = w.given == F32 ? 4 : 2, part = PAIRS ? 2 : 4;
  const i64 scratch = tokens <= few ? 0 : 4 * BLOCK * part + BLOCK / 8 + 4 * 64 * tokens;
  return over_rows(rows, threads, scratch, [&](i64 from, i64 to, u8* buffer) {
    if (tokens > few && w.mask) return many512<KIND, false, PAIRS>(w, x, bias, y, tokens, rows, from, to, buffer);
    if (tokens > few) return many512<KIND, true, PAIRS>(w, x, bias, y, tokens, rows, from, to, buffer);
    pairs::product<KIND, PAIRS>(w, x, bias, y, tokens, rows, from, to);
  });
}

template <int KIND>
bool linear_avx2(const Matrix& w, const float* x, const void* bias, void* y, i64 tokens, i64 rows, int threads, i64 few) {
  const i64 size = w.given == F32 ? 4 : 2;
  const i64 scratch = tokens <= few ? 0 : 3 * BLOCK * 4 + BLOCK / 8 + 3 * 32 * tokens;
  return over_rows(rows, threads, scratch, [&](i64 from, i64 to, u8* buffer) {
    if (tokens > few) return many_avx2<KIND>(w, x, bias, y, tokens, rows, from, to, buffer);
    if (w.mask)
      few_tokens(tokens, from, to,
          [&](i64 m, i64 a, i64 b) { mask_avx2<KIND, 4>(w, x + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
          [&](i64 m, i64 a, i64 b) { mask_avx2<KIND, 2>(w, x + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
          [&](i64 m, i64 a, i64 b) { mask_avx2<KIND, 1>(w, x + m * w.stride, bias, OFFSET(y, m), rows, a, b); });
    else
      few_tokens(tokens, from, to,
          [&](i64 m, i64 a, i64 b) { pair_avx2<KIND, 4>(w, x + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
          [&](i64 m, i64 a, i64 b) { pair_avx2<KIND, 2>(w, x + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
          [&](i64 m, i64 a, i64 b) { pair_avx2<KIND, 1>(w, x + m * w.stride, bias, OFFSET(y, m), rows, a, b); });
  });
}
#endif

#ifdef SPARSIFY_X86
// bfloat16 weights as float.
struct Widened : wide::Numbers<F16> {
  explicit Widened(const Matrix& w) : wide::Numbers<F16>{w} {}

  T512 MEMBER const u32_anywhere* steps(i64 row, i64 k, i64 columns, u32* buffer) const {
    const u8* here = values(row, k);
    for (i64 i = 0; i < columns / 2; i += 16)
      _mm512_storeu_ps((float*)buffer + i, widen512<BF16>(_mm256_loadu_si256((const __m256i*)(here + 2 * i))));
    return buffer;
  }
};

bool linear_wide(int kind, const Matrix& w, const wide::Product& p) {
  if (w.given == F32 && kind == BF16) return p.run<F32>(Widened{w});
  if (w.given == F32 && kind == F16) return p.run<F32>(wide::Numbers<F16>{w});
  if (kind == F32) return p.run<F32>(wide::Numbers<F32>{w});
  return kind == BF16 ? p.run<BF16>(wide::Numbers<BF16>{w}) : p.run<F16>(wide::Numbers<F16>{w});
}
#endif

// x as the kernels want it: padded to the matrix's columns, `stride` apart, and float where they calculate in float.
const void* prepared(int kind, bool as_float, const void* x, i64 tokens, i64 width, i64 stride, const Buffer& buffer) {
  const i64 size = kind == F32 || as_float ? 4 : 2;
  if (!buffer.at) return x;
  for (i64 m = 0; m < tokens; m++) {
    u8* row = buffer.at + m * stride * size;
    if (as_float && kind != F32)
      for (i64 k = 0; k < width; k++) ((float*)row)[k] = load(kind, x, m * width + k);
    else
      memcpy(row, (const u8*)x + m * width * size, width * size);
    memset(row + width * size, 0, (stride - width) * size);
  }
  return buffer.at;
}

// ---- what callers may get wrong, looked at before a pointer moves

// Whether values and codes are as many as a matrix [rows, columns] has.
bool is_matrix(const Matrix& w, Given values, Given codes, i64 starts, i64 rows) {
  if (rows < 0 || w.columns < UNIT || w.columns % UNIT || w.columns > MOST_COLUMNS) return false;
  if (codes.count / (w.columns / 8) != rows || !codes.is(rows * (w.columns / 8))) return false;
  return w.mask ? starts == rows + 1 && w.rowptr && values.count >= PADDING && values.at : values.is(rows * (w.columns / 2));
}

// Whether every row of [from, to) stays among the values, whatever its mask. A row that begins a whole row's length before
// their end does; in the few after that the mask's bits are counted.
bool stays_inside(int isa, const Matrix& w, i64 from, i64 to) {
  if (!w.mask) return true;
  const i64 end = w.readable - PADDING, words = w.columns / 32;
  i64 last = to;
  for (; last > from && (w.rowptr[last - 1] < 0 || w.rowptr[last - 1] > end - w.columns); last--) {
    const i64 start = w.rowptr[last - 1];
    if (start < 0 || start > end || count_bits(isa, w.mask + (last - 1) * words, words) > end - start) return false;
  }
#ifdef SPARSIFY_X86
  if (isa > SCALAR) return !beyond_avx2(w.rowptr + from, last - from, end - w.columns);
#endif
  return !beyond(w.rowptr + from, last - from, end - w.columns);
}

// `kind` is the dtype of the values, `w.given` that of x, bias and y.
int linear(int isa, int kind, Matrix w, Given values, Given codes, i64 starts, Given x, Given bias, void* y, i64 rows,
           i64 width, i64 few, int threads) {
  if (kind < F32 || kind > F16 || isa < SCALAR || isa > AVX512 || !is_matrix(w, values, codes, starts, rows)) return SIZES;
  if (w.given != kind && w.given != F32) return SIZES;
  if (x.count % width || !x.is(x.count)) return SIZES;
  if (bias.count >= 0 && !bias.is(rows)) return SIZES;
  if (!stays_inside(isa, w, 0, rows)) return STARTS;
  const i64 tokens = x.count / width;
  if ((double)rows * (double)w.columns * (double)tokens < (1 << 16)) threads = 1;   // less work than it takes to wake a thread
#ifdef SPARSIFY_X86
  // Where x is permuted to the values nothing meets a weight that was pruned; but zero times NaN or infinity is NaN.
  const bool across = !w.mask && isa == AVX512 && tokens > few;
  if (!w.mask && isa > SCALAR && (across || tokens <= few) && !finite_avx2(w.given, x.at, x.count)) few = 0;
  else if (across && rows) {
    return linear_wide(kind, w, wide::Product{w.columns, width, x.at, bias.at, y, tokens, rows, threads}) ? DONE : MEMORY;
  }
#endif
  i32 apart = 0;
  w.apart = &apart;
  const bool as_float = !(isa == AVX512 && w.given == BF16);
  const i64 size = as_float ? 4 : 2;
  // Tokens a power of two apart would all lie in the same lines of the first cache, and the weights' rows with them.
  const bool spread = tokens > 2 && w.columns * size % 1024 == 0;
  const bool copy = spread || width != w.columns || (as_float && w.given != F32);
  w.stride = spread ? w.columns + 64 / size : w.columns;
  Buffer buffer(copy ? tokens * w.stride * size : 0);
  if (copy && tokens && !buffer.at) return MEMORY;
  const void* in = prepared(w.given, as_float, x.at, tokens, width, w.stride, buffer);
  bool done = false;
#ifdef SPARSIFY_X86
  if (isa == AVX512)
    done = kind == F32   ? linear_avx512<F32, false>(w, in, bias.at, y, tokens, rows, threads, few)
           : kind == F16 ? linear_avx512<F16, false>(w, in, bias.at, y, tokens, rows, threads, few)
           : as_float    ? linear_avx512<BF16, false>(w, in, bias.at, y, tokens, rows, threads, few)
                         : linear_avx512<BF16, true>(w, in, bias.at, y, tokens, rows, threads, few);
  else if (isa == AVX2) {
    const float* f = (const float*)in;
    done = kind == F32    ? linear_avx2<F32>(w, f, bias.at, y, tokens, rows, threads, few)
           : kind == BF16 ? linear_avx2<BF16>(w, f, bias.at, y, tokens, rows, threads, few)
                          : linear_avx2<F16>(w, f, bias.at, y, tokens, rows, threads, few);
  } else
#endif
    done = over_rows(rows, threads, w.columns * 4 + w.columns / 8, [&](i64 from, i64 to, u8* scratch) {
      linear_scalar(kind, w, (const float*)in, bias.at, y, tokens, rows, from, to, (float*)scratch);
    });
  return !done ? MEMORY : apart ? STARTS : DONE;
}

template <class T> void unpack_rows(int isa, const Matrix& w, i64 first, i64 from, i64 to, T* out, u32* mask) {
  (void)isa;
  const i64 K = w.columns, words = K / 32;
  for (i64 n = from; n < to; n++) {
    const i64 at = first_value(w, first + n);
    const T* values = (const T*)w.values + at;
    i64 count;
#ifdef SPARSIFY_X86
    if (isa == AVX512) count = unpack_row512(w, first + n, values, mask, out + n * K);
    else
#endif
    {
      row_mask(w, first + n, 0, words, mask);
      count = unpack_bits(values, mask, words, out + n * K);
    }
    if (w.mask) row_ends(w, first + n, at + count);
  }
}

Matrix matrix(int given, const void* values, i64 count, const void* codes, const i64* starts, i64 columns) {
  // A mask of no rows lies nowhere, and is a mask all the same.
  const void* mask = codes ? codes : starts;
  return {values, starts ? nullptr : (const u8*)codes, starts ? (const u32_anywhere*)mask : nullptr, starts, columns,
          count, columns, nullptr, given};
}

}   // namespace

extern "C" {

// The hash of the sources that this was built from.
EXPORT const char* sparsify_source() { return SPARSIFY_SOURCE; }

// The best instruction set of this machine.
EXPORT int sparsify_isa() {
#ifdef SPARSIFY_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return SCALAR;
}

// Each returns an Answer. `count`s are of numbers, of codes of bytes; `starts` is null for packed24; a `bias_count` below
// zero says that there is none. The columns are those of x, `width`, padded. Up to `few` tokens are multiplied with weights
// that stay packed; more with rows unpacked into a buffer.
EXPORT int sparsify_linear(int isa, int kind, const void* values, i64 value_count, const void* codes, i64 code_bytes,
                           const i64* starts, i64 start_count, const void* x, i64 x_count, const void* bias, i64 bias_count,
                           void* y, i64 rows, i64 width, i64 few, int threads) {
  if (width < 1 || width > MOST_COLUMNS) return SIZES;
  const i64 columns = (width + UNIT - 1) / UNIT * UNIT;
  return linear(isa, kind, matrix(kind, values, value_count, codes, starts, columns), Given{values, value_count},
                Given{codes, code_bytes}, start_count, Given{x, x_count}, Given{bias, bias_count}, y, rows, width, few, threads);
}

// The same of x, bias and y in float32, whatever the values are.
EXPORT int sparsify_linear_float(int isa, int kind, const void* values, i64 value_count, const void* codes, i64 code_bytes,
                                 const i64* starts, i64 start_count, const void* x, i64 x_count, const void* bias,
                                 i64 bias_count, void* y, i64 rows, i64 width, i64 few, int threads) {
  if (width < 1 || width > MOST_COLUMNS) return SIZES;
  const i64 columns = (width + UNIT - 1) / UNIT * UNIT;
  return linear(isa, kind, matrix(F32, values, value_count, codes, starts, columns), Given{values, value_count},
                Given{codes, code_bytes}, start_count, Given{x, x_count}, Given{bias, bias_count}, y, rows, width, few, threads);
}

// One token, dense weights [rows, columns].
EXPORT int sparsify_linear_dense(int isa, int kind, const void* w, i64 w_count, const void* x, i64 x_count, const void* bias,
                                 i64 bias_count, void* y, i64 rows, i64 columns, int threads) {
#ifdef SPARSIFY_X86
  if (isa <= SCALAR || isa > AVX512 || kind < F32 || kind > F16 || columns < 1 || rows < 0) return SIZES;
  if (w_count / columns != rows || !Given{w, w_count}.is(rows * columns) || !Given{x, x_count}.is(columns)) return SIZES;
  if (bias_count >= 0 && !Given{bias, bias_count}.is(rows)) return SIZES;
  if (w_count < (1 << 16)) threads = 1;
  const bool as_float = !(isa == AVX512 && kind == BF16);
  Buffer buffer(as_float && kind != F32 ? columns * 4 : 0);
  if (as_float && kind != F32 && !buffer.at) return MEMORY;
  const void* in = prepared(kind, as_float, x, 1, columns, columns, buffer);
  over_rows(rows, threads, 0, [&](i64 from, i64 to, u8*) {
    const float* f = (const float*)in;
    if (isa == AVX512) {
      if (kind == BF16) dense_bf16((const u16*)w, (const u16*)in, bias, y, columns, from, to);
      else if (kind == F32) dense_float<F32>(w, f, bias, y, columns, from, to);
      else dense_float<F16>(w, f, bias, y, columns, from, to);
    } else if (kind == F32) dense_avx2<F32>(w, f, bias, y, columns, from, to);
    else if (kind == BF16) dense_avx2<BF16>(w, f, bias, y, columns, from, to);
    else dense_avx2<F16>(w, f, bias, y, columns, from, to);
  });
  return DONE;
#else
  return SIZES;
#endif
}

// Whether torch's products of bfloat16 have tiles (AMX), which no vector keeps up with where tokens are many.
EXPORT int sparsify_tiles() {
#ifdef SPARSIFY_X86
  u32 a, b, c, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) return d >> 22 & 1;
#endif
  return 0;
}

// Where each row of a mask [rows, words] begins in its values, and where the last one ends: starts[rows + 1].
EXPORT int sparsify_row_starts(int isa, const void* mask, i64 mask_bytes, i64 rows, i64 words, i64* starts) {
  if (rows < 0 || words < 0 || (words && mask_bytes / words / 4 != rows) || !Given{mask, mask_bytes}.is(rows * words * 4))
    return SIZES;
  starts[0] = 0;
  for (i64 n = 0; n < rows; n++)
    starts[n + 1] = starts[n] + count_bits(isa, (const u32_anywhere*)mask + n * words, words);
  return DONE;
}

// Whether every nibble of packed24 is two ascending positions.
EXPORT int sparsify_check_24(const u8* meta, i64 count) {
  if (!Given{meta, count}.is(count)) return 0;
  u8 wrong = 0;
  for (i64 i = 0; i < count; i++) {
    u8 m = meta[i];
    wrong |= (u8)((m & 3) >= (m >> 2 & 3)) | (u8)((m >> 4 & 3) >= (m >> 6));
  }
  return !wrong;
}

// Rows [first, first + count) of `rows` back to dense [count, columns], bit for bit. `size`: bytes of a value, 2 or 4.
EXPORT int sparsify_unpack(int isa, int size, const void* values, i64 value_count, const void* codes, i64 code_bytes,
                           const i64* starts, i64 start_count, void* out, i64 out_count, i64 rows, i64 columns, i64 first,
                           i64 count, int threads) {
  Matrix w = matrix(F32, values, value_count, codes, starts, columns);
  if ((size != 2 && size != 4) || !is_matrix(w, Given{values, value_count}, Given{codes, code_bytes}, start_count, rows))
    return SIZES;
  if (first < 0 || count < 0 || count > rows || first > rows - count || out_count / columns < count || (count && !out)) return SIZES;
  if (!stays_inside(isa, w, first, first + count)) return STARTS;
  i32 apart = 0;
  w.apart = &apart;
  bool done = over_rows(count, threads, columns / 8, [&](i64 from, i64 to, u8* scratch) {
    if (size == 2) unpack_rows(isa, w, first, from, to, (u16*)out, (u32*)scratch);
    else unpack_rows(isa, w, first, from, to, (u32*)out, (u32*)scratch);
  });
  return !done ? MEMORY : apart ? STARTS : DONE;
}
}
