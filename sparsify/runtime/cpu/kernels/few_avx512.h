// 8- and 4-bit weights with AVX-512: vpdpbusd sums products of unsigned and signed bytes by fours.
//
// A step is 128 columns. Bytes are made unsigned by adding a zero point, and what that adds is taken off by what a sum
// begins with: of dense weights and bitmasks, whose integers are the unsigned ones, that is known once for each token; of
// packed24, where x is, it is a product of 128 with the weights that all tokens share.
#pragma once
#include "avx512.h"
#include "few.h"
#include "wide_avx512.h"
#ifdef SPARSIFY_X86
#define TFEW __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,fma,f16c,popcnt,bmi,bmi2")))

// Vectors of 64 weights that a step has, and which of the 128 columns the first weight of lane `lane` is of.
INLINE constexpr int halves(int layout, int bits) { return layout == BITMASK || (layout == DENSE && bits == 8) ? 2 : 1; }
INLINE int first_column(int layout, int bits, int half, int lane) {
  if (halves(layout, bits) == 2) return half * 64 + lane * 4;
  return layout == PACKED24 && bits == 4 ? lane % 8 * 16 : lane * 8;   // first values in the low half, second in the high
}

// ---- x

TFEW static bool quantise512(const float* x, i64 columns, i64 group, i8* q, float* scales) {
  return quantise(x, columns, group, q, scales);
}

// One token's int8, in place, in the order and with the zero point that its products take; `base` as in Quantised.
TFEW static void arrange512(const Few& w, i8* q, i32* base) {
  alignas(64) u8 even[64];
  for (int j = 0; j < 64; j++) even[j] = (u8)(2 * j);
  const __m512i evens = _mm512_load_si512(even), odds = _mm512_or_si512(evens, _mm512_set1_epi8(1));
  const __m512i zero = _mm512_setzero_si512(), sign = _mm512_set1_epi8((char)128);
  const __m512i point = _mm512_set1_epi8((char)(w.bits == 8 ? 128 : 8));
  for (i64 k = 0; k < w.columns; k += WIDE, q += WIDE) {
    __m512i a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + 64);
    if (w.layout == PACKED24) {
      a = _mm512_xor_si512(a, sign);
      b = _mm512_xor_si512(b, sign);
    } else if (w.layout == DENSE && w.bits == 4) {
      __m512i c = _mm512_permutex2var_epi8(a, evens, b);
      b = _mm512_permutex2var_epi8(a, odds, b);
      a = c;
      _mm512_store_si512(base, _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, point, a), point, b)));
      base += 16;
    } else {
      _mm512_store_si512(base, _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, point, a)));
      _mm512_store_si512(base + 16, _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, point, b)));
      base += 32;
    }
    _mm512_storeu_si512(q, a);
    _mm512_storeu_si512(q + 64, b);
  }
}

// Sixteen scales of a row from `g` on, zeros past its end; ones where the row has one scale, which its sum is multiplied by.
TFEW INLINE __m512 scales512(const Few& w, i64 row, i64 g) {
  if (!w.group) return _mm512_set1_ps(1.0f);
  const i64 left = w.scale_count - g, at = row * w.scale_count + g;
  const __mmask16 here = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
  if (w.kind == F32) return _mm512_maskz_loadu_ps(here, (const float*)w.scales + at);
  const __m256i halves = _mm256_maskz_loadu_epi16(here, (const u16*)w.scales + at);
  if (w.kind == BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  return _mm512_cvtph_ps(halves);
}

// ---- few tokens: R rows and M tokens at a time (packed24 of 4 bits: few_pairs_avx512.h)

template <int LAYOUT, int BITS, int R, int M>
TFEW static void few512(const Few& w, const Quantised& x, i64 token, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  const int H = halves(LAYOUT, BITS);
  const i64 K = w.columns, per = shared(w) / 8, groups = K / shared(w);   // per: steps that sixteen scales last for
  const i8* q = x.q + token * x.stride;
  const float* factors = x.scales + token * x.scale_stride;
  const i32* base = x.base + token * x.base_stride;
  // Bits 2 j and 2 j + 1 of the codes of a step say which of four columns value j is of: that is its place in x less
  // 4 (j / 2).
  alignas(64) u8 first[64], shifts[64];
  alignas(64) u64 words[8];
  for (int j = 0; j < 64; j++) {
    first[j] = (u8)(j / 2 * 4);
    shifts[j] = (u8)(2 * j % 64);
    words[j / 8] = j / 32;
  }
  const __m512i place = _mm512_load_si512(first), shift = _mm512_load_si512(shifts), word = _mm512_load_si512(words);
  const __m512i three = _mm512_set1_epi8(3), low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const __m512i sign = _mm512_set1_epi8((char)128);
  const __m512i offset = _mm512_set1_epi32(512);   // 4 · 128: the complement of a byte is one less than its negative
  for (i64 n = from; n < to; n += R) {
    const u8 *v[R], *codes[R];
    __m512 sum[R][M], scale[R][M];
    UNROLL for (int r = 0; r < R; r++) {
      const i64 row = n + r < to ? n + r : to - 1;
      v[r] = w.values + first_byte(w, row);
      codes[r] = w.codes + row * (K / 8);
      UNROLL for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    }
    i64 k = 0;
    const i32* begin = base;
    for (i64 g = 0; g < groups; g += 16) {
      UNROLL for (int r = 0; r < R; r++) {
        const __m512 own = scales512(w, n + r < to ? n + r : to - 1, g);
        UNROLL for (int m = 0; m < M; m++) scale[r][m] = _mm512_mul_ps(own, _mm512_loadu_ps(factors + m * x.scale_stride + g));
      }
      const i64 stop = k + per * WIDE < K ? k + per * WIDE : K;
      const i32* lanes = x.lanes;
      for (; k < stop; k += WIDE, begin += 16 * H, lanes += 16 * H) {
        __m512i part[R][2], start[R], columns[R];
        UNROLL for (int r = 0; r < R; r++) {
          // Measured: dense weights of one row come soonest unasked, 4-bit ones of several rows by asking the first cache for
          // more, and those of one row beside a mask; all others by asking the second.
          if (BITS == 4 && (LAYOUT == DENSE ? M > 1 : M == 1)) prefetch(v[r], 4096);
          else if (LAYOUT != DENSE || M > 1) {
            if (BITS == 8 || k % (2 * WIDE) == 0) ask(v[r] + 2048 * BITS);
            if (LAYOUT == PACKED24 && k % (4 * WIDE) == 0) ask(codes[r] + 4096);
          }
          if (LAYOUT == PACKED24) {
            const __m128i meta = _mm_loadu_si128((const __m128i*)codes[r]);
            columns[r] = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi64(word, _mm512_castsi128_si512(meta)));
            columns[r] = _mm512_ternarylogic_epi64(columns[r], three, place, 0xEA);   // (a & b) | c
            part[r][0] = _mm512_loadu_si512(v[r]);
            start[r] = _mm512_dpbusd_epi32(offset, sign, _mm512_xor_si512(part[r][0], _mm512_set1_epi8(-1)));
            v[r] += 8 * BITS;
            codes[r] += 16;
          } else if (LAYOUT == DENSE && BITS == 8) {
            part[r][0] = _mm512_xor_si512(_mm512_loadu_si512(v[r]), sign);
            part[r][1] = _mm512_xor_si512(_mm512_loadu_si512(v[r] + 64), sign);
            v[r] += 128;
          } else if (LAYOUT == DENSE) {
            const __m512i two = _mm512_loadu_si512(v[r]);
            part[r][0] = _mm512_ternarylogic_epi64(two, low, eight, 0x6A);   // (a & b) ^ c
            part[r][1] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(two, 4), low, eight, 0x6A);
            v[r] += 64;
          } else {
            UNROLL for (int h = 0; h < 2; h++) {
              u64 mask;
              memcpy(&mask, codes[r] + 8 * h, 8);
              const i64 kept = _mm_popcnt_u64(mask);
              __m512i held;
              if (BITS == 8) held = _mm512_loadu_si512(v[r]);
              else {
                held = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)v[r]));
                held = _mm512_ternarylogic_epi64(held, _mm512_slli_epi16(held, 4), low, 0xA8);   // (a | b) & c
              }
              v[r] += BITS == 8 ? kept : (kept + 1) / 2;
              part[r][h] = _mm512_xor_si512(_mm512_mask_expand_epi8(fresh_zero(), mask, held), BITS == 8 ? sign : eight);
            }
            codes[r] += 16;
          }
        }
        UNROLL for (int m = 0; m < M; m++) {
          const i8* xs = q + m * x.stride + k;
          const __m512i x0 = _mm512_loadu_si512(xs), x1 = _mm512_loadu_si512(xs + 64);
          UNROLL for (int h = 0; h < H; h++) {
            const __m512i all = LAYOUT == PACKED24 ? offset : _mm512_load_si512(begin + m * x.base_stride + 16 * h);
            UNROLL for (int r = 0; r < R; r++) {
              __m512i dot;
              if (LAYOUT == PACKED24) dot = _mm512_dpbusd_epi32(start[r], _mm512_permutex2var_epi8(x0, columns[r], x1), part[r][0]);
              else dot = _mm512_dpbusd_epi32(all, part[r][h], h ? x1 : x0);
              if (LAYOUT == DENSE && BITS == 4) dot = _mm512_dpbusd_epi32(dot, part[r][1], x1);
              const __m512 factor = _mm512_permutexvar_ps(_mm512_load_si512(lanes + 16 * h), scale[r][m]);
              sum[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sum[r][m]);
            }
          }
        }
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      if (n + r >= to) break;
      if (LAYOUT == BITMASK) row_ends(w, n + r, v[r] - w.values);
      const float last = w.group ? 1.0f : load(w.kind, w.scales, n + r);
      UNROLL for (int m = 0; m < M; m++) {
        const float s = _mm512_reduce_add_ps(sum[r][m]) * last;
        store(w.kind, y, (token + m) * rows + n + r, bias ? s + load(w.kind, bias, n + r) : s);
      }
    }
  }
}

template <int LAYOUT, int BITS>
TFEW static void few_tokens512(const Few& w, const Quantised& x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to) {
  few_tokens(tokens, from, to, [&](i64 m, i64 a, i64 b) { few512<LAYOUT, BITS, 2, 4>(w, x, m, bias, y, rows, a, b); },
             [&](i64 m, i64 a, i64 b) { few512<LAYOUT, BITS, 2, 2>(w, x, m, bias, y, rows, a, b); },
             [&](i64 m, i64 a, i64 b) { few512<LAYOUT, BITS, 1, 1>(w, x, m, bias, y, rows, a, b); });
}

// ---- exact: the weights as floating-point numbers

// Of each 16-bit lane's low byte the two nibbles, low one first, as int8.
T512 INLINE __m512i nibbles512(__m512i v) {
  const __m512i eight = _mm512_set1_epi8(8);
  const __m512i u = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(15));
  return _mm512_sub_epi8(_mm512_xor_si512(u, eight), eight);
}
T512 INLINE __m512i nibbles512(const void* p) {   // of 32 bytes
  return nibbles512(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)));
}

// As block_mask() of packed24.
TFEW INLINE u64 pair_mask512(const u8* codes) {
  const __m128i bits = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8), four = _mm_set1_epi8(15);
  const __m128i m = _mm_loadl_epi64((const __m128i*)codes);
  const __m128i low = _mm_shuffle_epi8(bits, _mm_and_si128(m, four));
  const __m128i high = _mm_shuffle_epi8(bits, _mm_and_si128(_mm_srli_epi16(m, 4), four));
  return (u64)_mm_cvtsi128_si64(_mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

// As decode().
TFEW INLINE __m512i decode512(const Few& w, i64 row, i64 block, i64& at) {
  if (w.layout == DENSE) {
    const u8* v = w.values + at;
    at += 64 * w.bits / 8;
    return w.bits == 8 ? _mm512_loadu_si512(v) : nibbles512(v);
  }
  const u64 mask = w.layout == PACKED24 ? pair_mask512(w.codes + row * (w.columns / 8) + block * 8) : block_mask(w, row, block);
  const u8* v = w.values + at;
  __m512i held;
  if (w.layout == BITMASK) held = w.bits == 8 ? _mm512_loadu_si512(v) : nibbles512(v);
  else if (w.bits == 8) held = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)v));   // nothing lies after the last
  else held = nibbles512(_mm512_castsi256_si512(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)v))));
  at += block_bytes(w, _mm_popcnt_u64(mask));
  return _mm512_mask_expand_epi8(fresh_zero(), mask, held);
}

// Sixteen weights to out[at …], as they are stored in KIND; FLOATS: as products take them, float or bfloat16.
template <int KIND, bool FLOATS> T512 INLINE void put512(__m512 f, void* out, i64 at, __mmask16 here) {
  if (KIND == F32) return _mm512_mask_storeu_ps((float*)out + at, here, f);
  // vdpbf16ps takes subnormal numbers for zero: the conversion that does so too is good enough for it, and shorter.
  if (KIND == BF16 && FLOATS) return _mm256_mask_storeu_epi16((u16*)out + at, here, (__m256i)_mm512_cvtneps_pbh(f));
  if (KIND == BF16) return _mm256_mask_storeu_epi16((u16*)out + at, here, _mm512_cvtepi32_epi16(to_bf16_512(f)));
  const __m256i half = _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  if (FLOATS) _mm512_mask_storeu_ps((float*)out + at, here, _mm512_cvtph_ps(half));
  else _mm256_mask_storeu_epi16((u16*)out + at, here, half);
}

// Columns [from, from + count) of a row, of which the first `stored` are stored; `at` as in decode().
template <int KIND, bool FLOATS>
TFEW static void weights512(const Few& w, i64 row, i64 from, i64 count, i64 stored, i64& at, void* out) {
  for (i64 k = 0; k < count; k += 64) {
    const __m512i all = decode512(w, row, (from + k) / 64, at);
    alignas(64) i8 part[64];
    _mm512_store_si512(part, all);
    __m512 scale = _mm512_setzero_ps();
    UNROLL for (int j = 0; j < 64; j += 16) {
      if (j % 32 == 0) scale = _mm512_set1_ps(scale_of(w, row, from + k + j));
      const i64 left = stored - k - j;
      const __mmask16 here = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
      const __m512 f = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i*)(part + j))));
      put512<KIND, FLOATS>(_mm512_fmadd_ps(f, scale, _mm512_setzero_ps()), out, k + j, here);
    }
  }
}

template <int KIND> TFEW static void unpack_few512(const Few& w, i64 row, void* out) {
  i64 at = first_byte(w, row);
  weights512<KIND, false>(w, row, 0, w.columns, w.width, at, out);
  if (w.layout == BITMASK) row_ends(w, row, at);
}

// As many512: `scratch` holds 4 rows of BLOCK columns, and 4 vectors per token.
template <int KIND>
TFEW static void few_exact512(const Few& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to,
                              u8* scratch) {
  const int R = 4, M = 4;
  const i64 K = w.columns, size = KIND == BF16 ? 2 : 4;
  __m512* sums = (__m512*)(scratch + R * BLOCK * size);
  const i64 tail = tokens - tokens % M;
  Ahead none;
  none.done = none.lines = 0;
  for (i64 n = from; n < to; n += R) {
    i64 at[R];
    for (int r = 0; r < R; r++) at[r] = first_byte(w, n + r < to ? n + r : to - 1);
    for (i64 i = 0; i < R * tokens; i++) sums[i] = _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += BLOCK) {
      const i64 columns = K - k < BLOCK ? K - k : BLOCK;
      for (int r = 0; r < R; r++)
        weights512<KIND, true>(w, n + r < to ? n + r : to - 1, k, columns, columns, at[r], scratch + r * BLOCK * size);
      for (i64 m = 0; m < tokens; m += m < tail ? M : 1) {
        if (KIND == BF16) {
          const u16* in = (const u16*)x + m * K + k;
          if (m < tail) tile_bf16<R, M>((const u16*)scratch, in, K, columns, sums + m * R, none, 0);
          else tile_bf16<R, 1>((const u16*)scratch, in, K, columns, sums + m * R, none, 0);
        } else {
          const float* in = (const float*)x + m * K + k;
          if (m < tail) tile_float<R, M>((const float*)scratch, in, K, columns, sums + m * R, none, 0);
          else tile_float<R, 1>((const float*)scratch, in, K, columns, sums + m * R, none, 0);
        }
      }
    }
    for (int r = 0; w.layout == BITMASK && r < R && n + r < to; r++) row_ends(w, n + r, at[r]);
    for (i64 m = 0; m < tokens; m++)
      for (int r = 0; r < R && n + r < to; r++) {
        const float s = _mm512_reduce_add_ps(m < tail ? sums[m / M * M * R + r * M + m % M] : sums[m * R + r]);
        store(KIND, y, m * rows + n + r, bias ? s + load(KIND, bias, n + r) : s);
      }
  }
}

// ---- many tokens of packed24: the weights as wide_avx512.h takes them, floating-point numbers rounded as in weights512()

template <int KIND, int BITS> struct Scaled {
  static const bool PAIRS = KIND == BF16;
  const Few& w;

  MEMBER const u8* codes(i64 row, i64 k) const { return w.codes + row * (w.columns / 8) + k / 8; }
  MEMBER const u8* values(i64 row, i64 k) const { return w.values + (row * w.columns + k) / 2 * BITS / 8; }
  MEMBER i64 bytes(i64 columns) const { return columns / 2 * BITS / 8; }

  T512 MEMBER const u32_anywhere* steps(i64 row, i64 k, i64 columns, u32* buffer) const {
    for (i64 i = 0; i < columns; i += 32) {   // 16 values of one scale
      const u8* here = values(row, k + i);
      __m128i held;
      if (BITS == 8) held = _mm_loadu_si128((const __m128i*)here);
      else held = _mm512_castsi512_si128(nibbles512(_mm512_castsi128_si512(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)here)))));
      const __m512 f = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(held)), scale = _mm512_set1_ps(scale_of(w, row, k + i));
      put512<KIND, true>(_mm512_fmadd_ps(f, scale, _mm512_setzero_ps()), buffer, i / 2, 0xffff);
    }
    return buffer;
  }
};
#endif
