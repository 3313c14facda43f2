// Matrices of 8- and 4-bit integers with a scale for each group of columns: what every instruction set shares, and the path
// that runs anywhere. docs/format.md describes the layouts.
//
// Two ways to a product. Quantised: x becomes int8 too, each group of columns of each token with a scale of its own, and
// the sums of a group are exact integers. Exact: the weights become floating-point numbers, one row or a piece of it at a
// time, and x stays what it is.
#pragma once
#include "common.h"

typedef int8_t i8;

enum FewLayout { PACKED24 = 0, BITMASK = 1, DENSE = 2 };
const i64 WIDE = 128;         // columns are padded to a multiple of this many: what one step of AVX-512 takes
const i64 WHOLE_ROW = 128;    // columns of x that share a scale where the weights have one for the whole row
const i64 FEW24 = 2;          // up to so many tokens AVX2 picks x for packed24's values; for more it decodes these
const u32 LARGE = 191u << 23; // 2^64: of larger x, products of scales might overflow where the product itself does not

// One matrix [rows, columns].
struct Few {
  int kind, layout, bits;       // of the scales; FewLayout; 8 or 4
  i64 group;                    // columns that share a scale; 0: the whole row does
  const u8* values;
  const u8* codes;              // packed24: a nibble per four columns; bitmask: a bit per column; else null
  const i64_anywhere* starts;   // bitmask: the first byte of each row's values, and the end of the last; else null
  const void* scales;
  i64 columns, width;           // padded, and those that there are
  i64 bytes;                    // of the values
  i64 scale_count;              // of a row
  i32* apart;                   // set where the starts do not count the mask
};

// x as the kernels want it. `step` is 128 columns.
struct Quantised {
  i8* q;            // [tokens, stride]
  float* scales;    // [tokens, scale_stride]
  i8* planes;       // x for each of packed24's two values of a group; null where these are decoded, and without AVX2
  i32* base;        // what the sums of a step begin with: [tokens, steps, lanes], AVX-512 only
  i32* lanes;       // which of 16 scales each lane of a step takes: AVX-512 only
  i64 stride, scale_stride, base_stride;   // from one token to the next
};

// Columns of x that share a scale.
INLINE i64 shared(const Few& w) { return w.group ? w.group : WHOLE_ROW; }

// Bytes that the values of `columns` whole columns take in a row, where that is always the same.
INLINE i64 value_bytes(int layout, int bits, i64 columns) { return (layout == PACKED24 ? columns / 2 : columns) * bits / 8; }

// Where the values of a row begin.
INLINE i64 first_byte(const Few& w, i64 row) {
  return w.layout == BITMASK ? w.starts[row] : row * value_bytes(w.layout, w.bits, w.columns);
}

INLINE void row_ends(const Few& w, i64 row, i64 at) {
  if (at != w.starts[row + 1]) __atomic_store_n(w.apart, 1, __ATOMIC_RELAXED);
}

// A bit for each of 64 columns that has a value.
INLINE u64 block_mask(const Few& w, i64 row, i64 block) {
  if (w.layout == DENSE) return ~(u64)0;
  u64 word;
  memcpy(&word, w.codes + row * (w.columns / 8) + block * 8, 8);
  if (w.layout == BITMASK) return word;
  u64 mask = 0;
  for (int i = 0; i < 64; i += 8) {
    u64 m = word >> i & 255;
    mask |= (u64)(1 << (m & 3) | 1 << (m >> 2 & 3) | 16 << (m >> 4 & 3) | 16 << (m >> 6)) << i;
  }
  return mask;
}

INLINE i64 block_bytes(const Few& w, i64 kept) { return w.bits == 8 ? kept : (kept + 1) / 2; }

// 64 columns of a row as int8, zeros put in; `at` moves on to the values of the next 64.
static void decode(const Few& w, i64 row, i64 block, i64& at, i8* out) {
  const u64 mask = block_mask(w, row, block);
  const u8* values = w.values + at;
  i64 kept = 0;
  for (int j = 0; j < 64; j++) {
    i8 value = 0;
    if (mask >> j & 1) {
      if (w.bits == 8) value = (i8)values[kept];
      else value = (i8)(((values[kept / 2] >> (kept % 2 * 4) & 15) ^ 8) - 8);   // two's complement
      kept++;
    }
    out[j] = value;
  }
  at += block_bytes(w, kept);
}

// A whole row as int8.
static void decode_row(const Few& w, i64 row, i8* out) {
  i64 at = first_byte(w, row);
  for (i64 b = 0; b < w.columns / 64; b++) decode(w, row, b, at, out + b * 64);
  if (w.layout == BITMASK) row_ends(w, row, at);
}

INLINE float rounded(int kind, float f) {
  return kind == F32 ? f : kind == BF16 ? from_bf16(to_bf16(f)) : from_f16(to_f16(f));
}

// A weight before it is rounded. A zero is +0.0 whatever the sign of its scale.
INLINE float weight(float scale, i8 integer) { return scale * integer + 0.0f; }

// The scale of column k: that of a row's padding is the last one's, its integers are zeros.
INLINE float scale_of(const Few& w, i64 row, i64 k) {
  const i64 g = w.group ? k >> __builtin_ctzll((u64)w.group) : 0;   // a division takes longer
  return load(w.kind, w.scales, row * w.scale_count + (g < w.scale_count ? g : w.scale_count - 1));
}

// ---- x

// `count` numbers as float, and zeros after them up to `padded`.
INLINE void to_floats(int kind, const void* x, i64 count, i64 padded, float* out) {
  if (kind == F32) memcpy(out, x, count * 4);
  else if (kind == BF16) for (i64 k = 0; k < count; k++) out[k] = from_bf16(((const u16_anywhere*)x)[k]);   // vectorised
  else for (i64 k = 0; k < count; k++) out[k] = from_f16(((const u16_anywhere*)x)[k]);
  memset(out + count, 0, (padded - count) * 4);
}

// One token: int8 and the scales of its groups. False where it cannot be: NaN, infinity, or very large numbers.
INLINE bool quantise(const float* x, i64 columns, i64 group, i8* q, float* scales) {
  for (i64 from = 0; from < columns; from += group) {
    const i64 to = from + group;
    u32 most = 0;   // as bits, which are in the order of the numbers and of which NaN is the largest
    for (i64 k = from; k < to; k++) {
      u32 u;
      memcpy(&u, x + k, 4);
      u &= 0x7fffffff;
      most = u > most ? u : most;
    }
    if (most >= LARGE) return false;
    float top;
    memcpy(&top, &most, 4);
    const float lift = top < 0x1p-100f ? 0x1p100f : 1.0f;   // or else 127 / top overflows
    const float inverse = most ? 127.0f / (top * lift) : 0.0f;
    // Adding 1.5 · 2^23 leaves no place for a fraction: that rounds to nearest, ties to even, and is vectorised.
    for (i64 k = from; k < to; k++) q[k] = (i8)(i32)((x[k] * lift * inverse + 12582912.0f) - 12582912.0f);
    scales[from / group] = top / 127.0f;
  }
  return true;
}

// ---- products, one row at a time: sums in double

static void few_scalar(const Few& w, const Quantised& x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to,
                       u8* scratch) {
  const i64 group = shared(w);
  i8* row = (i8*)scratch;
  for (i64 n = from; n < to; n++) {
    decode_row(w, n, row);
    for (i64 m = 0; m < tokens; m++) {
      double sum = bias ? load(w.kind, bias, n) : 0.0;
      for (i64 k = 0; k < w.columns; k += group) {
        i32 dot = 0;
        for (i64 j = k; j < k + group; j++) dot += row[j] * x.q[m * x.stride + j];
        sum += (double)dot * scale_of(w, n, k) * x.scales[m * x.scale_stride + k / group];
      }
      store(w.kind, y, m * rows + n, (float)sum);
    }
  }
}

static void few_exact_scalar(const Few& w, const float* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to,
                             u8* scratch) {
  i8* row = (i8*)scratch;
  for (i64 n = from; n < to; n++) {
    decode_row(w, n, row);
    for (i64 m = 0; m < tokens; m++) {
      double sum = bias ? load(w.kind, bias, n) : 0.0;
      for (i64 k = 0; k < w.columns; k++)
        sum += (double)rounded(w.kind, weight(scale_of(w, n, k), row[k])) * x[m * w.columns + k];
      store(w.kind, y, m * rows + n, (float)sum);
    }
  }
}

// A row back to dense, `width` columns in the dtype of the scales.
static void unpack_few_scalar(const Few& w, i64 n, void* out, u8* scratch) {
  i8* row = (i8*)scratch;
  decode_row(w, n, row);
  for (i64 k = 0; k < w.width; k++) store(w.kind, out, k, weight(scale_of(w, n, k), row[k]));
}
