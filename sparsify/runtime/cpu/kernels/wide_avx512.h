// packed24, many tokens, AVX-512: tokens lie across the vectors, so that a pruned weight costs nothing.
//
// 16 lie across each of up to four vectors, or 8 across half of one. A weight meets those of a vector in one instruction,
// which reads the inputs that it belongs to. bfloat16 takes two weights at a time: of four columns a row keeps two, that is
// one of six pairs, and `across` lays out all six. A dense product takes twice as many instructions. Float takes one weight
// at a time, one of four columns. Either way a step is a number of 32 bits (a pair, or a float), told to all lanes, and the
// place of its inputs.
#pragma once
#include "avx512.h"
#include "calls.h"

#include <type_traits>
#ifdef SPARSIFY_X86

#define MEMBER inline __attribute__((always_inline))

namespace wide {

const i64 ROWS = 128;          // whose sums lie in the second cache while `across` passes through the first
const i64 MOST = 64;           // tokens at a time
// How many lie across of so many tokens.
INLINE int lanes_of(i64 tokens) { return tokens <= 8 ? 8 : tokens >= MOST ? (int)MOST : (int)((tokens + 15) / 16 * 16); }
// Columns at a time: their inputs, six pairs of every four or the four themselves, fill much of the first cache.
INLINE i64 columns_at_once(int lanes) { return lanes <= 16 ? 512 : lanes == 32 ? 256 : 128; }
// How many places there are for the inputs of four columns, and how many steps.
INLINE i64 places(bool pairs) { return pairs ? 6 : 4; }
INLINE i64 steps(bool pairs) { return pairs ? 1 : 2; }
// Bytes of what `across` writes, and of the sums of a thread.
INLINE i64 across_bytes(bool pairs, i64 columns, int lanes) { return columns / 4 * places(pairs) * lanes * 4; }
INLINE i64 sum_bytes(int lanes) { return ROWS * lanes * 4; }

T512 INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// 32 bfloat16 numbers of a row of x, or 16 numbers as floats; zeros where `left` columns have ended.
template <int KIND> T512 INLINE __m512i inputs(const void* x, i64 at, i64 left) {
  if (KIND == BF16) {
    const __mmask32 here = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    return _mm512_maskz_loadu_epi16(here, (const u16*)x + at);
  }
  const __mmask16 here = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
  if (KIND == F32) return _mm512_castps_si512(_mm512_maskz_loadu_ps(here, (const float*)x + at));
  return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, (const u16*)x + at)));
}

// A vector, or half of it, of what lies across at place `place`.
T512 INLINE void lay(u32* out, i64 place, int lanes, int v, __m512i x) {
  u32* here = out + place * lanes + v * 16;
  if (lanes == 8) _mm256_store_si256((__m256i*)here, _mm512_castsi512_si256(x));
  else _mm512_store_si512(here, x);
}

// x [tokens, width] as [columns / 4, places, lanes]: bfloat16 the pairs (0,1) (0,2) (1,2) (0,3) (1,3) (2,3) of every four
// columns, float the four columns. Tokens that there are not are zeros.
template <int KIND> T512 static void across(const void* x, i64 tokens, i64 width, i64 columns, int lanes, u32* out) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  const int step = KIND == BF16 ? 32 : 16;
  for (int v = 0; v * 16 < lanes; v++)
    for (i64 k = 0; k < columns; k += step) {
      __m512i r[16];
      UNROLL for (int t = 0; t < 16; t++) {
        const i64 token = v * 16 + t;
        r[t] = token < tokens ? inputs<KIND>(x, token * width + k, width - k) : _mm512_setzero_si512();
      }
      transpose(r);
      if (KIND != BF16) {
        for (int c = 0; c < 16; c++) lay(out, k + c, lanes, v, r[c]);
        continue;
      }
      for (int g = 0; g < 8; g++) {
        const __m512i a = r[2 * g], b = r[2 * g + 1], b0 = _mm512_slli_epi32(b, 16), b1 = _mm512_andnot_si512(low, b);
        const __m512i a0 = _mm512_and_si512(a, low), a1 = _mm512_srli_epi32(a, 16);
        const __m512i pairs[6] = {a, _mm512_or_si512(a0, b0), _mm512_or_si512(a1, b0), _mm512_or_si512(a0, b1),
                                  _mm512_or_si512(a1, b1), b};
        for (int p = 0; p < 6; p++) lay(out, (k / 4 + g) * 6 + p, lanes, v, pairs[p]);
      }
    }
}

// Where the inputs of each step of `columns` columns (a multiple of 64) lie, in units of 8 bytes.
template <bool PAIRS, int L> T512 INLINE void places_of(const u8* codes, i64 columns, u16* out) {
  // What a code of docs/format.md means: the pair that `across` has at that place; those that mean none are the first.
  const __m128i pair = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 3, 4, 5, 0), four = _mm_set1_epi8(15);
  const __m256i group = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i of_pair = _mm256_mullo_epi16(group, _mm256_set1_epi16(6));
  const __m256i of_column = _mm256_slli_epi16(_mm256_srli_epi16(group, 1), 2);
  for (i64 k = 0; k < columns; k += 64) {   // 16 groups
    const __m128i c = _mm_loadl_epi64((const __m128i*)(codes + k / 8));
    const __m128i n = _mm_unpacklo_epi8(_mm_and_si128(c, four), _mm_and_si128(_mm_srli_epi16(c, 4), four));
    if (PAIRS) {
      const __m256i at = _mm256_add_epi16(of_pair, _mm256_set1_epi16((short)(k / 4 * 6)));
      const __m256i place = _mm256_add_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(pair, n)), at);
      _mm256_storeu_si256((__m256i*)(out + k / 4), _mm256_mullo_epi16(place, _mm256_set1_epi16(L / 2)));
    } else {
      const __m128i first = _mm_and_si128(n, _mm_set1_epi8(3)), second = _mm_and_si128(_mm_srli_epi16(n, 2), _mm_set1_epi8(3));
      const __m128i both[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
      for (int h = 0; h < 2; h++) {
        const __m256i at = _mm256_add_epi16(of_column, _mm256_set1_epi16((short)(k + 32 * h)));
        const __m256i place = _mm256_add_epi16(_mm256_cvtepu8_epi16(both[h]), at);
        _mm256_storeu_si256((__m256i*)(out + k / 2 + 16 * h), _mm256_mullo_epi16(place, _mm256_set1_epi16(L / 2)));
      }
    }
  }
}

// A vector of 16 lanes, or half of one.
template <bool PAIRS> struct Whole {
  typedef __m512 Sum;
  static const int LANES = 16;
  T512 static MEMBER Sum zero() { return _mm512_setzero_ps(); }
  T512 static MEMBER Sum load(const float* p) { return _mm512_load_ps(p); }
  T512 static MEMBER void store(float* p, Sum sum) { _mm512_store_ps(p, sum); }
  T512 static MEMBER Sum plus(Sum sum, u32 number, const u8* x) {
    const __m512i all = _mm512_set1_epi32((int)number), xs = _mm512_load_si512(x);
    if (PAIRS) return _mm512_dpbf16_ps(sum, (__m512bh)all, (__m512bh)xs);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(all), _mm512_castsi512_ps(xs), sum);
  }
};

template <bool PAIRS> struct Half {
  typedef __m256 Sum;
  static const int LANES = 8;
  T512 static MEMBER Sum zero() { return _mm256_setzero_ps(); }
  T512 static MEMBER Sum load(const float* p) { return _mm256_load_ps(p); }
  T512 static MEMBER void store(float* p, Sum sum) { _mm256_store_ps(p, sum); }
  T512 static MEMBER Sum plus(Sum sum, u32 number, const u8* x) {
    const __m256i all = _mm256_set1_epi32((int)number), xs = _mm256_load_si256((const __m256i*)x);
    if (PAIRS) return _mm256_dpbf16_ps(sum, (__m256bh)all, (__m256bh)xs);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(all), _mm256_castsi256_ps(xs), sum);
  }
};

// The steps of R rows over some columns: `count` of each, added to the sums of the columns before.
template <class Vector, int L, int R>
T512 INLINE void add(const u32_anywhere* const* numbers, const u16 (*at)[256], i64 count, const u8* x, float* sums, bool first) {
  const int V = L / Vector::LANES, N = Vector::LANES;
  typename Vector::Sum sum[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) sum[r][v] = first ? Vector::zero() : Vector::load(sums + r * L + v * N);
#pragma GCC unroll 2
  for (i64 i = 0; i < count; i++)
    UNROLL for (int r = 0; r < R; r++) {
      const u8* here = x + 8 * (u64)at[r][i];
      UNROLL for (int v = 0; v < V; v++) sum[r][v] = Vector::plus(sum[r][v], numbers[r][i], here + 4 * N * v);
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) Vector::store(sums + r * L + v * N, sum[r][v]);
}

// Sums of up to 16 rows [rows, lanes] to y [tokens, all rows], with the bias.
template <int KIND> T512 static void write(const float* sums, int lanes, i64 rows, const void* bias, i64 row, void* y, i64 all, i64 tokens) {
  const __mmask16 here = (__mmask16)((1u << rows) - 1);
  __m512 add = _mm512_setzero_ps();
  if (bias && KIND == F32) add = _mm512_maskz_loadu_ps(here, (const float*)bias + row);
  else if (bias) {
    const __m256i b = _mm256_maskz_loadu_epi16(here, (const u16*)bias + row);
    add = KIND == F16 ? _mm512_cvtph_ps(b) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
  }
  const __mmask16 those = (__mmask16)(lanes == 8 ? 0xff : 0xffff);
  for (int v = 0; v * 16 < lanes; v++) {
    __m512i m[16];
    UNROLL for (int r = 0; r < 16; r++)
      m[r] = r < rows ? _mm512_maskz_loadu_epi32(those, sums + r * lanes + v * 16) : _mm512_setzero_si512();
    transpose(m);
    UNROLL for (int t = 0; t < 16; t++) {
      if (v * 16 + t >= tokens) continue;
      __m512 sum = _mm512_castsi512_ps(m[t]);
      if (bias) sum = _mm512_add_ps(sum, add);
      const i64 at = (v * 16 + t) * all + row;
      if (KIND == F32) _mm512_mask_storeu_ps((float*)y + at, here, sum);
      else if (KIND == F16) _mm256_mask_storeu_epi16((u16*)y + at, here, _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
      else _mm256_mask_storeu_epi16((u16*)y + at, here, (__m256i)_mm512_cvtneps_pbh(sum));
    }
  }
}

// The weights of a packed24 matrix of floating-point numbers as steps.
template <int KIND> struct Numbers {
  static const bool PAIRS = KIND == BF16;
  static const int STEP = KIND == F32 ? 4 : 2;   // bytes of a value
  const Matrix& w;

  MEMBER const u8* codes(i64 row, i64 k) const { return w.meta + row * (w.columns / 8) + k / 8; }
  MEMBER const u8* values(i64 row, i64 k) const { return (const u8*)w.values + (row * w.columns + k) / 2 * STEP; }
  MEMBER i64 bytes(i64 columns) const { return columns / 2 * STEP; }

  // Those of `columns` columns from k on: where they lie, or in `buffer`.
  T512 MEMBER const u32_anywhere* steps(i64 row, i64 k, i64 columns, u32* buffer) const {
    const u8* here = values(row, k);
    if (KIND != F16) return (const u32_anywhere*)here;
    for (i64 i = 0; i < columns / 2; i += 16)
      _mm512_storeu_ps((float*)buffer + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(here + 2 * i))));
    return buffer;
  }
};

// y of the tokens in `x` (as `across` wrote them), rows [from, to) of `rows`. `scratch`: sum_bytes.
template <int KIND, int L, class Weights>
T512 static void rows_of(const Weights& w, i64 columns, const u32* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from,
                         i64 to, u8* scratch) {
  const bool PAIRS = Weights::PAIRS;
  typedef typename std::conditional<L == 8, Half<PAIRS>, Whole<PAIRS>>::type Vector;
  const int R = L == 8 ? 8 : L == 16 ? 4 : 2;
  const i64 piece = columns_at_once(L);
  float* sums = (float*)scratch;
  u16 at[R][256];
  u32 buffer[R][256];
  for (i64 block = from; block < to; block += ROWS) {
    const i64 end = block + ROWS < to ? block + ROWS : to;
    for (i64 k = 0; k < columns; k += piece) {
      const i64 here = columns - k < piece ? columns - k : piece;
      const u8* xs = (const u8*)x + across_bytes(PAIRS, k, L);
      for (i64 n = block; n < end; n += R) {
        const u32_anywhere* numbers[R];
        UNROLL for (int r = 0; r < R; r++) {
          const i64 row = n + r < end ? n + r : end - 1;
          places_of<PAIRS, L>(w.codes(row, k), here, at[r]);
          numbers[r] = w.steps(row, k, here, buffer[r]);
          // Rows lie too far apart for the hardware to foresee: what this row's next piece needs, or the row's of the
          // next block, is asked for now.
          const bool more = k + piece < columns;
          const i64 next = more ? row : row + ROWS < to ? row + ROWS : row, at_next = more ? k + piece : 0;
          const u8* v = w.values(next, at_next);
          for (i64 b = 0; b < w.bytes(piece); b += 64) ask(v + b);
          ask(w.codes(next, at_next));
        }
        add<Vector, L, R>(numbers, at, here / 4 * steps(PAIRS), xs, sums + (n - block) * L, k == 0);
      }
    }
    for (i64 n = block; n < end; n += 16)
      write<KIND>(sums + (n - block) * L, L, end - n < 16 ? end - n : 16, bias, n, y, rows, tokens);
  }
}

template <int KIND, class Weights>
T512 static void rows_of(int lanes, const Weights& w, i64 columns, const u32* x, const void* bias, void* y, i64 tokens, i64 rows,
                         i64 from, i64 to, u8* scratch) {
  if (lanes == 8) rows_of<KIND, 8>(w, columns, x, bias, y, tokens, rows, from, to, scratch);
  else if (lanes == 16) rows_of<KIND, 16>(w, columns, x, bias, y, tokens, rows, from, to, scratch);
  else if (lanes == 32) rows_of<KIND, 32>(w, columns, x, bias, y, tokens, rows, from, to, scratch);
  else if (lanes == 48) rows_of<KIND, 48>(w, columns, x, bias, y, tokens, rows, from, to, scratch);
  else rows_of<KIND, 64>(w, columns, x, bias, y, tokens, rows, from, to, scratch);
}

// y [tokens, rows] = x [tokens, width] Wᵀ + bias, x and y as they are given, W of `columns` columns.
struct Product {
  i64 columns, width;
  const void *x, *bias;
  void* y;
  i64 tokens, rows;
  int threads;

  // False where memory ran out.
  template <int KIND, class Weights> bool run(const Weights& w) const {
    const i64 size = KIND == F32 ? 4 : 2;
    const Buffer inputs(across_bytes(KIND == BF16, columns, lanes_of(tokens)));
    if (!inputs.at) return false;
    for (i64 m = 0; m < tokens; m += MOST) {
      const int lanes = lanes_of(tokens - m);
      const i64 count = tokens - m < MOST ? tokens - m : MOST;
      u8* out = (u8*)y + m * rows * size;
      across<KIND>((const u8*)x + m * width * size, count, width, columns, lanes, (u32*)inputs.at);
      const bool enough = over_rows(rows, threads, sum_bytes(lanes), [&](i64 from, i64 to, u8* scratch) {
        rows_of<KIND>(lanes, w, columns, (const u32*)inputs.at, bias, out, count, rows, from, to, scratch);
      });
      if (!enough) return false;
    }
    return true;
  }
};

}   // namespace wide
#endif
