// Products of activations with packed weights on CPUs: y[tokens, rows] = x[tokens, columns] Wᵀ + bias.
//
// docs/format.md describes the layouts. Instruction sets are chosen at run time; this file is compiled without -march. Rows are
// shared out among threads and each is summed by one of them in one order, so the number of threads changes no bit.
#include "common.h"
#include "scalar.h"
#include "avx2.h"
#include "avx512.h"

#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif
#ifndef SPARSIFY_SOURCE
#define SPARSIFY_SOURCE "unknown"
#endif

namespace {

struct Buffer {   // aligned for whole vectors; null where there is no memory
  u8* at;
  explicit Buffer(i64 bytes) : at(nullptr) {
    void* p = nullptr;
    if (bytes && posix_memalign(&p, 64, (size_t)bytes) == 0) at = (u8*)p;
  }
  ~Buffer() { free(at); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// Calls f(from, to, scratch) over all rows; false where memory ran out. A piece is a multiple of 12 rows: kernels take 3 or 4.
template <class F> bool over_rows(i64 rows, int threads, i64 scratch_bytes, F f) {
  bool enough = true;
#if defined(_OPENMP)
  if (threads > 1) {
    i64 piece = (rows + threads * 4 - 1) / (threads * 4);
    piece = (piece + 11) / 12 * 12;
    i64 pieces = (rows + piece - 1) / piece;
#pragma omp parallel num_threads(threads)
    {
      Buffer scratch(scratch_bytes);
      if (scratch_bytes && !scratch.at) {
#pragma omp atomic write
        enough = false;
      }
      // No thread waits for one that is slow or busy elsewhere.
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < pieces; i++)
        if (scratch.at || !scratch_bytes) f(i * piece, (i + 1) * piece < rows ? (i + 1) * piece : rows, scratch.at);
    }
    return enough;
  }
#endif
  (void)threads;
  Buffer scratch(scratch_bytes);
  if (scratch_bytes && !scratch.at) return false;
  f((i64)0, rows, scratch.at);
  return enough;
}

// Rows in fours, so that a piece of the weights stays in the first cache while all tokens pass over it.
template <class F4, class F2, class F1> inline void few_tokens(i64 tokens, i64 from, i64 to, F4 four, F2 two, F1 one) {
  for (i64 start = from; start < to; start += 4) {
    i64 stop = tokens == 1 || start + 4 > to ? to : start + 4, m = 0;
    for (; m + 4 <= tokens; m += 4) four(m, start, stop);
    for (; m + 2 <= tokens; m += 2) two(m, start, stop);
    if (m < tokens) one(m, start, stop);
    if (stop == to) return;
  }
}

#define OFFSET(p, m) ((char*)(p) + (m) * rows * size)

#ifdef SPARSIFY_X86
template <int KIND>
bool linear_avx512(const Matrix& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, int threads,
                   i64 few) {
  const i64 size = KIND == F32 ? 4 : 2, part = KIND == BF16 ? 2 : 4;
  const i64 scratch = tokens <= few ? 0 : 4 * BLOCK * part + BLOCK / 8 + 4 * 64 * tokens;
  return over_rows(rows, threads, scratch, [&](i64 from, i64 to, u8* buffer) {
    if (tokens > few && w.mask) return many512<KIND, false>(w, x, bias, y, tokens, rows, from, to, buffer);
    if (tokens > few) return many512<KIND, true>(w, x, bias, y, tokens, rows, from, to, buffer);
    if (KIND == BF16) {
      const u16* in = (const u16*)x;
      if (w.mask)
        few_tokens(tokens, from, to,
            [&](i64 m, i64 a, i64 b) { mask_bf16<4, 4, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { mask_bf16<4, 2, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { mask_bf16<1, 1, 4, 0>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); });
      else
        few_tokens(tokens, from, to,
            [&](i64 m, i64 a, i64 b) { pair_bf16<4, 4, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { pair_bf16<1, 2, 2, 1024>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { pair_bf16<1, 1, 4, 0>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); });
    } else {
      const int FLOAT = KIND == BF16 ? F32 : KIND;   // the other branch is never instantiated with BF16
      const float* in = (const float*)x;
      if (w.mask)
        few_tokens(tokens, from, to,
            [&](i64 m, i64 a, i64 b) { mask_float<FLOAT, 4, 4, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { mask_float<FLOAT, 4, 2, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { mask_float<FLOAT, 1, 1, 8, 0>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); });
      else
        few_tokens(tokens, from, to,
            [&](i64 m, i64 a, i64 b) { pair_float<FLOAT, 4, 4, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { pair_float<FLOAT, 4, 2, 1, 512>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); },
            [&](i64 m, i64 a, i64 b) { pair_float<FLOAT, 1, 1, KIND == F32 ? 8 : 4, 0>(w, in + m * w.stride, bias, OFFSET(y, m), rows, a, b); });
    }
  });
}

template <int KIND>
bool linear_avx2(const Matrix& w, const float* x, const void* bias, void* y, i64 tokens, i64 rows, int threads, i64 few) {
  const i64 size = KIND == F32 ? 4 : 2;
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

int linear(int isa, int kind, Matrix w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 width,
           i64 few, int threads) {
  if (w.columns % UNIT || width > w.columns || width <= w.columns - UNIT || kind < 0 || kind > 2) return 1;
  if (rows * w.columns * tokens < (1 << 16)) threads = 1;   // less work than it takes to wake a thread
  const bool as_float = !(isa == AVX512 && kind == BF16);
  const i64 size = as_float || kind == F32 ? 4 : 2;
  // Tokens a power of two apart would all lie in the same lines of the first cache, and the weights' rows with them.
  const bool spread = tokens > 2 && w.columns * size % 1024 == 0;
  const bool copy = spread || width != w.columns || (as_float && kind != F32);
  w.stride = spread ? w.columns + 64 / size : w.columns;
  Buffer buffer(copy ? tokens * w.stride * size : 0);
  if (copy && tokens && !buffer.at) return 2;
  const void* in = prepared(kind, as_float, x, tokens, width, w.stride, buffer);
  bool done = false;
#ifdef SPARSIFY_X86
  if (isa == AVX512)
    done = kind == F32    ? linear_avx512<F32>(w, in, bias, y, tokens, rows, threads, few)
           : kind == BF16 ? linear_avx512<BF16>(w, in, bias, y, tokens, rows, threads, few)
                          : linear_avx512<F16>(w, in, bias, y, tokens, rows, threads, few);
  else if (isa == AVX2) {
    const float* f = (const float*)in;
    done = kind == F32    ? linear_avx2<F32>(w, f, bias, y, tokens, rows, threads, few)
           : kind == BF16 ? linear_avx2<BF16>(w, f, bias, y, tokens, rows, threads, few)
                          : linear_avx2<F16>(w, f, bias, y, tokens, rows, threads, few);
  } else
#endif
    done = over_rows(rows, threads, w.columns * 4 + w.columns / 8, [&](i64 from, i64 to, u8* scratch) {
      linear_scalar(kind, w, (const float*)in, bias, y, tokens, rows, from, to, (float*)scratch);
    });
  return done ? 0 : 2;
}

template <class T> void unpack_rows(int isa, const Matrix& w, i64 first, i64 from, i64 to, T* out, u32* mask) {
  const i64 K = w.columns, words = K / 32;
  for (i64 n = from; n < to; n++) {
    const T* values = (const T*)w.values + first_value(w, first + n);
#ifdef SPARSIFY_X86
    if (isa == AVX512) { unpack_row512(w, first + n, values, mask, out + n * K); continue; }
#endif
    (void)isa;
    row_mask(w, first + n, 0, words, mask);
    unpack_bits(values, mask, words, out + n * K);
  }
}

}   // namespace

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

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

// Each returns 0, or 1 for sizes that the layout does not have, or 2 where memory ran out. Up to `few` tokens are multiplied
// with weights that stay packed; more with rows unpacked into a buffer.
EXPORT int sparsify_linear_24(int isa, int kind, const void* values, const u8* meta, const void* x, const void* bias, void* y,
                       i64 tokens, i64 rows, i64 width, i64 columns, i64 few, int threads) {
  return linear(isa, kind, Matrix{values, meta, nullptr, nullptr, columns, rows * columns / 2, columns}, x, bias, y, tokens, rows, width, few, threads);
}

EXPORT int sparsify_linear_bitmask(int isa, int kind, const void* values, i64 count, const u32* mask, const i64* rowptr,
                                   const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 width, i64 columns,
                                   i64 few, int threads) {
  if (rowptr[0] < 0 || rowptr[rows] < rowptr[0] || rowptr[rows] + PADDING > count) return 1;
  return linear(isa, kind, Matrix{values, nullptr, mask, rowptr, columns, rowptr[rows] + PADDING, columns}, x, bias, y, tokens, rows,
                width, few, threads);
}

// One token, dense weights [rows, columns].
EXPORT int sparsify_linear_dense(int isa, int kind, const void* w, const void* x, const void* bias, void* y, i64 rows,
                          i64 columns, int threads) {
#ifdef SPARSIFY_X86
  if (isa == SCALAR || kind < 0 || kind > 2) return 1;
  if (rows * columns < (1 << 16)) threads = 1;
  const bool as_float = !(isa == AVX512 && kind == BF16);
  Buffer buffer(as_float && kind != F32 ? columns * 4 : 0);
  if (as_float && kind != F32 && !buffer.at) return 2;
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
  return 0;
#else
  return 1;
#endif
}

// Where each row of a mask begins in its values, and where the last one ends: starts[rows + 1].
EXPORT void sparsify_row_starts(int isa, const u32* mask, i64 rows, i64 words, i64* starts) {
  starts[0] = 0;
  for (i64 n = 0; n < rows; n++) {
#ifdef SPARSIFY_X86
    if (isa > SCALAR) { starts[n + 1] = starts[n] + count_bits_avx2(mask + n * words, words); continue; }
#endif
    (void)isa;
    i64 bits = 0;
    for (i64 i = 0; i < words; i++) bits += __builtin_popcount(mask[n * words + i]);
    starts[n + 1] = starts[n] + bits;
  }
}

// Whether every nibble of packed24 is two ascending positions.
EXPORT int sparsify_check_24(const u8* meta, i64 count) {
  u8 wrong = 0;
  for (i64 i = 0; i < count; i++) {
    u8 m = meta[i];
    wrong |= (u8)((m & 3) >= (m >> 2 & 3)) | (u8)((m >> 4 & 3) >= (m >> 6));
  }
  return !wrong;
}

// Rows [first, first + count) back to dense [count, columns], bit for bit. `size`: bytes of a value, 2 or 4.
EXPORT int sparsify_unpack(int isa, int size, const void* values, const u8* meta, const u32* mask, const i64* rowptr, void* out,
                    i64 first, i64 count, i64 columns, int threads) {
  if (columns % UNIT || (size != 2 && size != 4)) return 1;
  Matrix w{values, meta, mask, rowptr, columns, 0, columns};
  bool done = over_rows(count, threads, columns / 8, [&](i64 from, i64 to, u8* scratch) {
    if (size == 2) unpack_rows(isa, w, first, from, to, (u16*)out, (u32*)scratch);
    else unpack_rows(isa, w, first, from, to, (u32*)out, (u32*)scratch);
  });
  return done ? 0 : 2;
}
}
