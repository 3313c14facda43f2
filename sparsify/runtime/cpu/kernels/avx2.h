// AVX2 with FMA: x is float whatever the dtype of the values, and sums are.
#pragma once
#include "common.h"
#ifdef SPARSIFY_X86
#define T256 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))

// For each byte of a mask: where each of eight places finds its value among those packed, or none.
struct Tables {
  alignas(32) u8 halves[256][16];   // byte indices for 16-bit values; 0x80 gives zero
  alignas(32) i32 words[256][8];
  alignas(32) i32 kept[256][8];
  Tables() {
    for (int mask = 0; mask < 256; mask++)
      for (int j = 0, count = 0; j < 8; j++) {
        bool bit = mask >> j & 1;
        halves[mask][2 * j] = bit ? (u8)(2 * count) : 0x80;
        halves[mask][2 * j + 1] = bit ? (u8)(2 * count + 1) : 0x80;
        words[mask][j] = bit ? count : 0;
        kept[mask][j] = bit ? -1 : 0;
        count += bit;
      }
  }
};
static const Tables tables;

T256 static i64 count_bits_avx2(const u32_anywhere* mask, i64 words) {
  i64 bits = 0;
  for (i64 i = 0; i < words; i++) bits += __builtin_popcount(mask[i]);
  return bits;
}

T256 INLINE float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Sixteen-bit values as float.
template <int KIND> T256 INLINE __m256 widen(__m128i halves) {
  if (KIND == BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  return _mm256_cvtph_ps(halves);
}

// Eight columns of which `mask` says which have a value. Reads eight values, of which the last ones may be of no use.
template <int KIND> T256 INLINE __m256 expand8(const void* values, i64 at, unsigned mask) {
  if (KIND == F32) {
    __m256 v = _mm256_loadu_ps((const float*)values + at);
    v = _mm256_permutevar8x32_ps(v, _mm256_load_si256((const __m256i*)tables.words[mask]));
    return _mm256_and_ps(v, _mm256_load_ps((const float*)tables.kept[mask]));
  }
  __m128i v = _mm_loadu_si128((const __m128i*)((const u16*)values + at));
  return widen<KIND>(_mm_shuffle_epi8(v, _mm_load_si128((const __m128i*)tables.halves[mask])));
}

template <int KIND, int M>
T256 static void mask_avx2(const Matrix& w, const float* x, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  const i64 K = w.columns, bytes = K / 8, SIZE = KIND == F32 ? 4 : 2;
  for (i64 n = from; n < to; n++) {
    const u8* mask = (const u8*)w.mask + n * bytes;
    i64 at = w.rowptr[n];
    __m256 sum[M][2];
    UNROLL for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
    for (i64 b = 0; b < bytes; b += 2) {
      if (KIND == F32 || b % 4 == 0) ask((const char*)w.values + at * SIZE + AHEAD);
      UNROLL for (int u = 0; u < 2; u++) {
        unsigned bits = mask[b + u];
        __m256 part = expand8<KIND>(w.values, at, bits);
        at += __builtin_popcount(bits);
        UNROLL for (int m = 0; m < M; m++)
          sum[m][u] = _mm256_fmadd_ps(part, _mm256_loadu_ps(x + m * w.stride + (b + u) * 8), sum[m][u]);
      }
    }
    row_ends(w, n, at);
    UNROLL for (int m = 0; m < M; m++) {
      float s = sum8(_mm256_add_ps(sum[m][0], sum[m][1]));
      store(w.given, y, m * rows + n, bias ? s + load(w.given, bias, n) : s);
    }
  }
}

// Eight values meet sixteen columns. vpermilps picks inside each group of four and reads two bits of each control word, so
// the metadata needs a broadcast and a shift. Lanes after the permutation hold groups 0, 2 | 1, 3.
template <int KIND, int M>
T256 static void pair_avx2(const Matrix& w, const float* x, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  const __m256i shift = _mm256_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14);
  const __m256i shift_high = _mm256_add_epi32(shift, _mm256_set1_epi32(16));
  const i64 K = w.columns, G = K / 32, SIZE = KIND == F32 ? 4 : 2;
  for (i64 n = from; n < to; n++) {
    const u8* meta = w.meta + n * (K / 8);
    __m256 sum[M][2];
    UNROLL for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
    for (i64 g = 0; g < G; g++) {
      i32 word;
      memcpy(&word, meta + g * 4, 4);
      __m256i codes = _mm256_set1_epi32(word);
      if (KIND == F32 || g % 2 == 0) ask((const char*)w.values + (n * (K / 2) + g * 16) * SIZE + AHEAD);
      if (g % 16 == 0) ask(meta + g * 4 + AHEAD / 4);
      UNROLL for (int u = 0; u < 2; u++) {
        __m256i column = _mm256_srlv_epi32(codes, u ? shift_high : shift);
        i64 i = n * (K / 2) + g * 16 + 8 * u;
        __m256 part;
        if (KIND == F32)
          part = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_loadu_pd((const double*)((const float*)w.values + i)), 0xD8));
        else
          part = widen<KIND>(_mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)((const u16*)w.values + i)), 0xD8));
        UNROLL for (int m = 0; m < M; m++) {
          const float* xs = x + m * w.stride + g * 32 + 16 * u;
          __m256 low = _mm256_permutevar_ps(_mm256_loadu_ps(xs), column);
          __m256 high = _mm256_permutevar_ps(_mm256_loadu_ps(xs + 8), column);
          sum[m][u] = _mm256_fmadd_ps(part, _mm256_blend_ps(low, high, 0xCC), sum[m][u]);
        }
      }
    }
    UNROLL for (int m = 0; m < M; m++) {
      float s = sum8(_mm256_add_ps(sum[m][0], sum[m][1]));
      store(w.given, y, m * rows + n, bias ? s + load(w.given, bias, n) : s);
    }
  }
}

template <int KIND>
T256 static void dense_avx2(const void* w, const float* x, const void* bias, void* y, i64 K, i64 from, i64 to) {
  auto part = [&](i64 i) T256 {
    if (KIND == F32) return _mm256_loadu_ps((const float*)w + i);
    return widen<KIND>(_mm_loadu_si128((const __m128i*)((const u16*)w + i)));
  };
  for (i64 n = from; n < to; n++) {
    __m256 sum[4];
    UNROLL for (int u = 0; u < 4; u++) sum[u] = _mm256_setzero_ps();
    i64 k = 0;
    for (; k + 32 <= K; k += 32)
      UNROLL for (int u = 0; u < 4; u++)
        sum[u] = _mm256_fmadd_ps(part(n * K + k + 8 * u), _mm256_loadu_ps(x + k + 8 * u), sum[u]);
    float s = sum8(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
    for (; k < K; k++) s += load(KIND, w, n * K + k) * load(F32, x, k);
    store(KIND, y, n, bias ? s + load(KIND, bias, n) : s);
  }
}

template <int R, int M> T256 INLINE void tile_avx2(const float* part, const float* x, i64 stride, i64 columns, __m256* sums) {
  __m256 sum[R][M];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sum[r][m] = sums[r * M + m];
  for (i64 k = 0; k < columns; k += 8) {
    __m256 rows[R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = _mm256_load_ps(part + r * BLOCK + k);
    UNROLL for (int m = 0; m < M; m++) {
      __m256 xs = _mm256_loadu_ps(x + m * stride + k);
      UNROLL for (int r = 0; r < R; r++) sum[r][m] = _mm256_fmadd_ps(rows[r], xs, sum[r][m]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sums[r * M + m] = sum[r][m];
}

// As many512 does, three rows by four tokens.
template <int KIND>
T256 static void many_avx2(const Matrix& w, const float* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from,
                           i64 to, u8* scratch) {
  const int R = 3, M = 4;
  const i64 K = w.columns, size = KIND == F32 ? 4 : 2;
  float* part = (float*)scratch;
  u32* mask = (u32*)(part + R * BLOCK);
  __m256* sums = (__m256*)(mask + BLOCK / 32);
  const i64 tail = tokens - tokens % M;
  for (i64 n = from; n < to; n += R) {
    i64 at[R];
    for (int r = 0; r < R; r++) at[r] = first_value(w, n + r < to ? n + r : to - 1);
    for (i64 i = 0; i < R * tokens; i++) sums[i] = _mm256_setzero_ps();
    for (i64 k = 0; k < K; k += BLOCK) {
      i64 columns = K - k < BLOCK ? K - k : BLOCK, words = columns / 32;
      for (int r = 0; r < R; r++) {
        row_mask(w, n + r < to ? n + r : to - 1, k / 32, words, mask);
        const u8* bytes = (const u8*)mask;
        for (i64 b = 0; b < words * 4; b++) {
          __m256 eight;
          if (at[r] + 8 <= w.readable) {
            eight = expand8<KIND>(w.values, at[r], bytes[b]);
          } else {   // the end of packed24, which is not padded
            u32 end[8] = {};
            memcpy(end, (const u8*)w.values + at[r] * size, (w.readable - at[r]) * size);
            eight = expand8<KIND>(end, 0, bytes[b]);
          }
          _mm256_store_ps(part + r * BLOCK + b * 8, eight);
          at[r] += __builtin_popcount(bytes[b]);
        }
      }
      i64 m = 0;
      for (; m < tail; m += M) tile_avx2<R, M>(part, x + m * w.stride + k, w.stride, columns, sums + m * R);
      for (; m < tokens; m++) tile_avx2<R, 1>(part, x + m * w.stride + k, w.stride, columns, sums + m * R);
    }
    for (int r = 0; w.mask && r < R && n + r < to; r++) row_ends(w, n + r, at[r]);
    for (i64 m = 0; m < tokens; m++)
      for (int r = 0; r < R && n + r < to; r++) {
        float s = sum8(m < tail ? sums[m / M * M * R + r * M + m % M] : sums[m * R + r]);
        store(w.given, y, m * rows + n + r, bias ? s + load(w.given, bias, n + r) : s);
      }
  }
}
#endif
