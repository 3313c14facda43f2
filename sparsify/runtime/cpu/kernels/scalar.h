// The path that runs anywhere: right, not fast. Sums are taken in double.
#pragma once
#include "common.h"

// `words` * 32 columns of one row as float; returns how many values they held.
INLINE i64 unpack_scalar(int kind, const void* values, i64 at, const u32* mask, i64 words, float* out) {
  i64 start = at;
  for (i64 g = 0; g < words; g++)
    for (int j = 0; j < 32; j++) out[g * 32 + j] = mask[g] >> j & 1 ? load(kind, values, at++) : 0.0f;
  return at - start;
}

// The same with the bits as they are.
template <class T> static i64 unpack_bits(const T* values, const u32* mask, i64 words, T* out) {
  i64 at = 0;
  for (i64 g = 0; g < words; g++)
    for (int j = 0; j < 32; j++) {
      T value = 0;
      if (mask[g] >> j & 1) memcpy(&value, values + at++, sizeof value);
      out[g * 32 + j] = value;
    }
  return at;
}

static void linear_scalar(int kind, const Matrix& w, const float* x, const void* bias, void* y, i64 tokens, i64 rows,
                          i64 from, i64 to, float* scratch) {
  const i64 K = w.columns, words = K / 32;
  u32* mask = (u32*)(scratch + K);
  for (i64 n = from; n < to; n++) {
    row_mask(w, n, 0, words, mask);
    i64 at = first_value(w, n);
    at += unpack_scalar(kind, w.values, at, mask, words, scratch);
    if (w.mask) row_ends(w, n, at);
    for (i64 m = 0; m < tokens; m++) {
      double sum = bias ? load(w.given, bias, n) : 0.0;
      for (i64 k = 0; k < K; k++) sum += (double)scratch[k] * ((const f32_anywhere*)x)[m * w.stride + k];
      store(w.given, y, m * rows + n, (float)sum);
    }
  }
}
