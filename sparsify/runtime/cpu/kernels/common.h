// Types, conversions and helpers that every instruction set shares. No header of torch or Python is used: the library
// is a plain C ABI, so one build serves every version of both.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define SPARSIFY_X86 1
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;
typedef int64_t i64;
// The same wherever they lie: a tensor over a file's bytes need not be aligned.
typedef float f32_anywhere __attribute__((aligned(1), may_alias));
typedef u16 u16_anywhere __attribute__((aligned(1), may_alias));
typedef u32 u32_anywhere __attribute__((aligned(1), may_alias));
typedef i64 i64_anywhere __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum Kind { F32 = 0, BF16 = 1, F16 = 2 };   // dtype of values, and of x, bias and y
enum Isa { SCALAR = 0, AVX2 = 1, AVX512 = 2 };
const i64 UNIT = 64;     // columns are padded to a multiple of this many
const i64 PADDING = 64;   // values after the last one of a bitmask
const i64 BLOCK = 1024;   // columns that are unpacked at a time where many tokens share the unpacking

// The hardware foresees too little of what is read once and passed through arithmetic on the way: asked for this far ahead,
// in the order in which it lies and into the second cache (the first has too few places for lines that are on their way),
// weights come from memory in half to nine tenths of the time, measured.
const i64 AHEAD = 8192;
INLINE void ask(const void* at) { __builtin_prefetch(at, 0, 2); }
// The same of several rows side by side, whose `bytes` lie one after another.
INLINE i64 ahead_of(i64 bytes) { return 2 * bytes > AHEAD ? 2 * bytes : AHEAD; }

// One matrix [rows, columns], columns a multiple of UNIT, in either layout.
struct Matrix {
  const void* values;
  const u8* meta;       // packed24: a nibble per group of four columns; else null
  const u32_anywhere* mask;     // bitmask: a bit per column; else null
  const i64_anywhere* rowptr;   // bitmask: the first value of each row, and the end of the last
  i64 columns;
  i64 readable;         // values that there are, padding included
  i64 stride;           // of x, from one token to the next
  i32* apart;           // set where the starts do not count the mask
  int given;            // dtype of x, bias and y: that of the values, or F32
};

// Called where the values of a bitmask's row ended, before `at`: that is where the next row's begin.
INLINE void row_ends(const Matrix& w, i64 row, i64 at) {
  if (at != w.rowptr[row + 1]) __atomic_store_n(w.apart, 1, __ATOMIC_RELAXED);
}

INLINE float from_bf16(u16 b) { u32 u = (u32)b << 16; float f; memcpy(&f, &u, 4); return f; }

INLINE u16 to_bf16(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (u16)((u >> 16) | 0x40);   // NaN stays NaN
  return (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);   // to nearest, ties to even
}

INLINE float from_f16(u16 h) {
  u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023, u;
  if (exponent == 31) u = sign | 0x7f800000 | fraction << 13;
  else if (exponent) u = sign | (exponent + 112) << 23 | fraction << 13;
  else if (!fraction) u = sign;
  else {
    exponent = 113;
    while (!(fraction & 1024)) { fraction <<= 1; exponent--; }
    u = sign | exponent << 23 | (fraction & 1023) << 13;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

INLINE u16 to_f16(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  u32 sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return (u16)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (u16)(sign | 0x7c00);   // rounds past the largest number
  if (rest < 0x33000001) return (u16)sign;   // rounds to zero
  u32 exponent = rest >> 23, fraction = (rest & 0x7fffff) | 0x800000;
  u32 shift = exponent > 112 ? 13 : 126 - exponent;
  u32 kept = fraction >> shift, lost = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
  if (lost > half || (lost == half && (kept & 1))) kept++;
  return (u16)(sign | (exponent > 112 ? kept + ((exponent - 113) << 10) : kept));
}

INLINE float load(int kind, const void* p, i64 i) {
  if (kind == F32) return ((const f32_anywhere*)p)[i];
  return kind == BF16 ? from_bf16(((const u16_anywhere*)p)[i]) : from_f16(((const u16_anywhere*)p)[i]);
}

INLINE void store(int kind, void* p, i64 i, float f) {
  if (kind == F32) ((f32_anywhere*)p)[i] = f;
  else ((u16_anywhere*)p)[i] = kind == BF16 ? to_bf16(f) : to_f16(f);
}

// Where the values of a row begin.
INLINE i64 first_value(const Matrix& w, i64 row) { return w.mask ? w.rowptr[row] : row * (w.columns / 2); }

// A bit per column of `words` * 32 columns from `word` on, of one row. A nibble idx0 | idx1 << 2 sets two of four bits.
INLINE void row_mask(const Matrix& w, i64 row, i64 word, i64 words, u32* out) {
  if (w.mask) { memcpy(out, w.mask + row * (w.columns / 32) + word, words * 4); return; }
  const u8* meta = w.meta + row * (w.columns / 8) + word * 4;
  u8* bytes = (u8*)out;
  for (i64 i = 0; i < words * 4; i++) {
    u8 m = meta[i];
    bytes[i] = (u8)(1 << (m & 3) | 1 << (m >> 2 & 3) | 16 << (m >> 4 & 3) | 16 << (m >> 6));
  }
}
