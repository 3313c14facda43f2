// AVX-512 with BF16 and VBMI2 (Zen 4, Sapphire Rapids and later). bfloat16 products are vdpbf16ps: sums in float, subnormal
// bfloat16 numbers count as zero. Everything else is float arithmetic.
#pragma once
#include "common.h"
#ifdef SPARSIFY_X86
#define T512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,fma,f16c,popcnt,bmi,bmi2")))

// On Zen 4 vpexpand waits for the old value of its destination even where it zeroes what the mask leaves out: a freshly
// zeroed register (free) makes it and the product after it 2.4 cycles instead of 6.4.
T512 INLINE __m512i fresh_zero() { __m512i z; __asm__("vpxor %x0,%x0,%x0" : "=x"(z)); return z; }
T512 INLINE __m512i expand16(u32 mask, const void* p) {
  return _mm512_mask_expand_epi16(fresh_zero(), mask, _mm512_loadu_si512(p));
}
T512 INLINE __m512 expand32(u32 mask, const float* p) {
  return _mm512_castsi512_ps(_mm512_mask_expand_epi32(fresh_zero(), (__mmask16)mask, _mm512_loadu_si512(p)));
}
T512 INLINE void prefetch(const void* p, int distance) {
  if (distance) _mm_prefetch((const char*)p + distance, _MM_HINT_T0);
}

// ---- what a step of the two arithmetics is: 64 columns of bfloat16, 32 columns of float

struct Pair { __m512 lo, hi; };   // 32 floats

// Sixteen-bit values as float.
template <int KIND> T512 INLINE __m512 widen512(__m256i halves) {
  if (KIND == BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  return _mm512_cvtph_ps(halves);
}

T512 INLINE __m512i to_bf16_512(__m512 f) {   // as to_bf16: vcvtneps2bf16 makes subnormal numbers zero
  const __m512i u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000)), 16);
}

template <int KIND> T512 INLINE Pair expand_floats(u32 mask, const void* values, i64& at) {
  if (KIND == F32) {
    const float* v = (const float*)values + at;
    int low = __builtin_popcount(mask & 0xffff);
    at += __builtin_popcount(mask);
    return {expand32(mask & 0xffff, v), expand32(mask >> 16, v + low)};
  }
  __m512i w = expand16(mask, (const u16*)values + at);
  at += __builtin_popcount(mask);
  return {widen512<KIND>(_mm512_castsi512_si256(w)), widen512<KIND>(_mm512_extracti64x4_epi64(w, 1))};
}

// ---- bitmask, few tokens: R rows and M tokens at a time, U sums for each pair of them

template <int KIND, bool PAIRS, int M>
T512 static void of_mask(const Matrix& w, const void* x, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  // One row's sums would wait for each other, had it one for each token; several rows' do not.
  const int R = M == 1 ? 1 : M <= 4 ? 4 : 2, U = M > 1 ? 1 : KIND == F32 ? 8 : 4, SIZE = KIND == F32 ? 4 : 2;
  const bool ASK = R > 1;   // one row is foreseen by the hardware
  const i64 K = w.columns, G = K / 32;
  for (i64 n = from; n < to; n += R) {
    i64 at[R];
    const u32_anywhere* bits[R];
    __m512 sum[R][M][U];
    UNROLL for (int r = 0; r < R; r++) {
      const i64 row = n + r < to ? n + r : to - 1;
      at[r] = w.rowptr[row];
      bits[r] = w.mask + row * G;
      UNROLL for (int m = 0; m < M; m++) UNROLL for (int u = 0; u < U; u++) sum[r][m][u] = _mm512_setzero_ps();
    }
    const i64 last = n + R < to ? n + R : to, ahead = ahead_of((w.rowptr[last] - w.rowptr[n]) * SIZE);
    const char* next = (const char*)w.values + w.rowptr[n] * SIZE + ahead;
    const char* next_bits = (const char*)bits[0] + 2 * R * G * 4;
    auto step = [&](int u, i64 g) T512 {
      Pair part[R];
      __m512i pairs[R];
      if (ASK && g * R % 16 == 0) ask(next_bits + g * R * 4);
      UNROLL for (int r = 0; r < R; r++) {
        const i64 before = at[r];
        if (PAIRS) {
          pairs[r] = expand16(bits[r][g], (const u16*)w.values + at[r]);
          at[r] += __builtin_popcount(bits[r][g]);
        } else
          part[r] = expand_floats<KIND>(bits[r][g], w.values, at[r]);
        next += (at[r] - before) * SIZE;
        if (ASK && (SIZE == 4 || r % 2 == 0)) ask(next);
      }
      UNROLL for (int m = 0; m < M; m++) {
        if (PAIRS) {
          const __m512bh xs = (__m512bh)_mm512_loadu_si512((const u16*)x + m * w.stride + g * 32);
          UNROLL for (int r = 0; r < R; r++) sum[r][m][u] = _mm512_dpbf16_ps(sum[r][m][u], (__m512bh)pairs[r], xs);
        } else {
          const float* in = (const float*)x + m * w.stride + g * 32;
          const __m512 x0 = _mm512_loadu_ps(in), x1 = _mm512_loadu_ps(in + 16);
          UNROLL for (int r = 0; r < R; r++) {
            sum[r][m][u] = _mm512_fmadd_ps(part[r].lo, x0, sum[r][m][u]);
            sum[r][m][(u + 1) % U] = _mm512_fmadd_ps(part[r].hi, x1, sum[r][m][(u + 1) % U]);
          }
        }
      }
    };
    i64 g = 0;
    for (; g + U <= G; g += U) UNROLL for (int u = 0; u < U; u++) step(u, g + u);
    for (; g < G; g++) step(0, g);
    UNROLL for (int r = 0; r < R; r++)
      if (n + r < to) {
        row_ends(w, n + r, at[r]);
        UNROLL for (int m = 0; m < M; m++) {
          UNROLL for (int u = 1; u < U; u++) sum[r][m][0] = _mm512_add_ps(sum[r][m][0], sum[r][m][u]);
          const float s = _mm512_reduce_add_ps(sum[r][m][0]);
          store(w.given, y, m * rows + n + r, bias ? s + load(w.given, bias, n + r) : s);
        }
      }
  }
}

// ---- dense, one token: what a kernel of the same care reaches on weights that were not pruned

T512 static void dense_bf16(const u16* w, const u16* x, const void* bias, void* y, i64 K, i64 from, i64 to) {
  for (i64 n = from; n < to; n++) {
    const u16* row = w + n * K;
    __m512 sum[4];
    UNROLL for (int u = 0; u < 4; u++) sum[u] = _mm512_setzero_ps();
    i64 k = 0;
    for (; k + 128 <= K; k += 128)
      UNROLL for (int u = 0; u < 4; u++)
        sum[u] = _mm512_dpbf16_ps(sum[u], (__m512bh)_mm512_loadu_si512(row + k + 32 * u),
                                  (__m512bh)_mm512_loadu_si512(x + k + 32 * u));
    for (; k < K; k += 32) {
      __mmask32 left = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
      sum[0] = _mm512_dpbf16_ps(sum[0], (__m512bh)_mm512_maskz_loadu_epi16(left, row + k),
                                (__m512bh)_mm512_maskz_loadu_epi16(left, x + k));
    }
    float s = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
    store(BF16, y, n, bias ? s + load(BF16, bias, n) : s);
  }
}

template <int KIND>
T512 static void dense_float(const void* w, const float* x, const void* bias, void* y, i64 K, i64 from, i64 to) {
  auto part = [&](i64 i, __mmask16 left) T512 {
    if (KIND == F32) return _mm512_maskz_loadu_ps(left, (const float*)w + i);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(left, (const u16*)w + i));
  };
  for (i64 n = from; n < to; n++) {
    __m512 sum[4];
    UNROLL for (int u = 0; u < 4; u++) sum[u] = _mm512_setzero_ps();
    i64 k = 0;
    for (; k + 64 <= K; k += 64)
      UNROLL for (int u = 0; u < 4; u++)
        sum[u] = _mm512_fmadd_ps(part(n * K + k + 16 * u, 0xffff), _mm512_loadu_ps(x + k + 16 * u), sum[u]);
    for (; k < K; k += 16) {
      __mmask16 left = (__mmask16)(K - k >= 16 ? 0xffff : (1u << (K - k)) - 1);
      sum[0] = _mm512_fmadd_ps(part(n * K + k, left), _mm512_maskz_loadu_ps(left, x + k), sum[0]);
    }
    float s = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
    store(KIND, y, n, bias ? s + load(KIND, bias, n) : s);
  }
}

// ---- many tokens: four rows are unpacked, BLOCK columns at a time, and meet all tokens while they are in the first cache

// The masks of `words` * 32 columns of one row, as row_mask gives them, 512 columns at a time.
T512 static void row_mask512(const Matrix& w, i64 row, i64 word, i64 words, u32* out) {
  if (w.mask) { memcpy(out, w.mask + row * (w.columns / 32) + word, words * 4); return; }
  alignas(16) u8 low[16], high[16];
  for (int code = 0; code < 16; code++) {
    low[code] = (u8)(1 << (code & 3) | 1 << (code >> 2));
    high[code] = (u8)(low[code] << 4);
  }
  const __m512i lows = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)low));
  const __m512i highs = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)high));
  const __m512i four = _mm512_set1_epi8(15);
  const u8* meta = w.meta + row * (w.columns / 8) + word * 4;
  for (i64 i = 0; i < words * 4; i += 64) {
    __mmask64 here = words * 4 - i >= 64 ? ~0ull : (1ull << (words * 4 - i)) - 1;
    __m512i m = _mm512_maskz_loadu_epi8(here, meta + i);
    __m512i bits = _mm512_or_si512(_mm512_shuffle_epi8(lows, _mm512_and_si512(m, four)),
                                   _mm512_shuffle_epi8(highs, _mm512_and_si512(_mm512_srli_epi16(m, 4), four)));
    _mm512_mask_storeu_epi8((u8*)out + i, here, bits);
  }
}

// Both return how many values they read. HALF: packed24, where every 32 columns have 16 values and nothing lies after the
// last; a bitmask has PADDING to read into.
template <bool HALF> T512 INLINE i64 unpack_bits512(const u16* values, const u32* mask, i64 words, u16* out) {
  i64 at = 0;
  for (i64 g = 0; g < words; g++) {
    __m512i v = HALF ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(values + at))) : _mm512_loadu_si512(values + at);
    _mm512_storeu_si512(out + g * 32, _mm512_mask_expand_epi16(fresh_zero(), mask[g], v));
    at += HALF ? 16 : __builtin_popcount(mask[g]);
  }
  return at;
}

template <int KIND, bool HALF>
T512 INLINE i64 unpack_floats512(const void* values, const u32* mask, i64 words, float* out) {
  i64 at = 0;
  for (i64 g = 0; g < words * 2; g++) {
    __mmask16 bits = (__mmask16)(mask[g / 2] >> (g % 2 * 16));
    __m512 v;
    if (KIND == F32 && HALF) v = _mm512_castps256_ps512(_mm256_loadu_ps((const float*)values + at));
    else if (KIND == F32) v = _mm512_loadu_ps((const float*)values + at);
    else if (HALF) v = widen512<KIND>(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)((const u16*)values + at))));
    else v = widen512<KIND>(_mm256_loadu_si256((const __m256i*)((const u16*)values + at)));
    v = _mm512_castsi512_ps(_mm512_mask_expand_epi32(fresh_zero(), bits, _mm512_castps_si512(v)));
    _mm512_storeu_ps(out + g * 16, v);
    at += HALF ? 8 : __builtin_popcount(bits);
  }
  return at;
}

// One row back to dense, bit for bit; returns how many values it had.
template <class T> T512 static i64 unpack_row512(const Matrix& w, i64 row, const T* values, u32* mask, T* out) {
  const i64 words = w.columns / 32;
  row_mask512(w, row, 0, words, mask);
  if (sizeof(T) == 2 && w.mask) return unpack_bits512<false>((const u16*)values, mask, words, (u16*)out);
  if (sizeof(T) == 2) return unpack_bits512<true>((const u16*)values, mask, words, (u16*)out);
  if (w.mask) return unpack_floats512<F32, false>(values, mask, words, (float*)out);
  return unpack_floats512<F32, true>(values, mask, words, (float*)out);
}

// What comes next is asked for while the sums of what is here are taken: no hardware prefetcher follows four rows in pieces.
struct Ahead {
  const char* at[4];
  i64 lines, done;
  T512 inline __attribute__((always_inline)) void some(i64 count) {
    for (; count > 0 && done < lines * 4; count--, done++) _mm_prefetch(at[done & 3] + (done >> 2) * 64, _MM_HINT_T0);
  }
};

// Sums of R unpacked rows and M tokens over `columns`, added to those of the columns before.
template <int R, int M>
T512 INLINE void tile_bf16(const u16* part, const u16* x, i64 stride, i64 columns, __m512* sums,
                            Ahead& ahead, i64 pace) {
  __m512 sum[R][M];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sum[r][m] = sums[r * M + m];
  for (i64 k = 0; k < columns; k += 32) {
    ahead.some(pace);
    __m512bh rows[R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = (__m512bh)_mm512_load_si512(part + r * BLOCK + k);
    UNROLL for (int m = 0; m < M; m++) {
      __m512bh xs = (__m512bh)_mm512_loadu_si512(x + m * stride + k);
      UNROLL for (int r = 0; r < R; r++) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], rows[r], xs);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sums[r * M + m] = sum[r][m];
}

template <int R, int M>
T512 INLINE void tile_float(const float* part, const float* x, i64 stride, i64 columns, __m512* sums,
                            Ahead& ahead, i64 pace) {
  __m512 sum[R][M];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sum[r][m] = sums[r * M + m];
  for (i64 k = 0; k < columns; k += 16) {
    ahead.some(pace);
    __m512 rows[R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = _mm512_load_ps(part + r * BLOCK + k);
    UNROLL for (int m = 0; m < M; m++) {
      __m512 xs = _mm512_loadu_ps(x + m * stride + k);
      UNROLL for (int r = 0; r < R; r++) sum[r][m] = _mm512_fmadd_ps(rows[r], xs, sum[r][m]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sums[r * M + m] = sum[r][m];
}

// `scratch` holds 4 unpacked rows of BLOCK columns, the mask of as many, and 4 vectors per token. PAIRS: bfloat16 products, of
// x that is bfloat16 too; else x is float.
template <int KIND, bool HALF, bool PAIRS>
T512 static void many512(const Matrix& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from,
                         i64 to, u8* scratch) {
  const int R = 4, M = 4;
  const i64 K = w.columns, size = PAIRS ? 2 : 4, stored = KIND == F32 ? 4 : 2;
  u8* part = scratch;
  u32* mask = (u32*)(scratch + R * BLOCK * size);
  __m512* sums = (__m512*)(scratch + R * BLOCK * size + BLOCK / 8);
  const i64 tail = tokens - tokens % M;
  for (i64 n = from; n < to; n += R) {
    i64 at[R];
    for (int r = 0; r < R; r++) at[r] = first_value(w, n + r < to ? n + r : to - 1);
    for (i64 i = 0; i < R * tokens; i++) sums[i] = _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += BLOCK) {
      i64 columns = K - k < BLOCK ? K - k : BLOCK, words = columns / 32;
      Ahead ahead;
      ahead.done = ahead.lines = 0;
      for (int r = 0; r < R; r++) {
        row_mask512(w, n + r < to ? n + r : to - 1, k / 32, words, mask);
        const u8* values = (const u8*)w.values + at[r] * stored;
        i64 count = PAIRS ? unpack_bits512<HALF>((const u16*)values, mask, words, (u16*)part + r * BLOCK)
                                 : unpack_floats512<KIND, HALF>(values, mask, words, (float*)part + r * BLOCK);
        at[r] += count;
        // As many values as this block had, of the same row or, after its last block, of the row four further on.
        ahead.lines = count * stored / 64 > ahead.lines ? count * stored / 64 : ahead.lines;
        bool last = k + BLOCK >= K;
        i64 next = last ? (n + R + r < to ? first_value(w, n + R + r) : at[r]) : at[r];
        ahead.at[r] = (const char*)w.values + next * stored;
      }
      i64 steps = (tokens + M - 1) / M * (columns / (PAIRS ? 32 : 16)), pace = ahead.lines * 4 / steps + 1;
      i64 m = 0;
      for (; m + M <= tokens; m += M) {
        if (PAIRS) tile_bf16<R, M>((u16*)part, (const u16*)x + m * w.stride + k, w.stride, columns, sums + m * R, ahead, pace);
        else tile_float<R, M>((float*)part, (const float*)x + m * w.stride + k, w.stride, columns, sums + m * R, ahead, pace);
      }
      for (; m < tokens; m++) {
        if (PAIRS) tile_bf16<R, 1>((u16*)part, (const u16*)x + m * w.stride + k, w.stride, columns, sums + m * R, ahead, pace);
        else tile_float<R, 1>((float*)part, (const float*)x + m * w.stride + k, w.stride, columns, sums + m * R, ahead, pace);
      }
    }
    for (int r = 0; w.mask && r < R && n + r < to; r++) row_ends(w, n + r, at[r]);
    for (i64 m = 0; m < tokens; m++)
      for (int r = 0; r < R && n + r < to; r++) {
        __m512 sum = m < tail ? sums[m / M * M * R + r * M + m % M] : sums[m * R + r];
        float s = _mm512_reduce_add_ps(sum);
        store(w.given, y, m * rows + n + r, bias ? s + load(w.given, bias, n + r) : s);
      }
  }
}
#endif
