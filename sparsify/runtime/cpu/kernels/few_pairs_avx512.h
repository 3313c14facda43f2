// packed24 with 4-bit values, few tokens: two rows at a time, one in each half of a vector, for one token this kernel is bound
// by instructions and not by memory.
//
// Bytes hold two values: of 128 columns of two rows the low nibbles are one vector and the high ones another, of the same lanes,
// so that both are summed before scales meet them. Weights are multiplied as 16 times what they are, x by its code plus 128;
// what that adds is 128 times the sum of the weights, which all tokens share.
#pragma once
#include "few_avx512.h"
#ifdef SPARSIFY_X86

template <int M>
TFEW static void pairs512(const Few& w, const Quantised& x, i64 token, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  const i64 K = w.columns, per = shared(w) / 8, groups = K / shared(w);   // per: steps that sixteen scales last for
  const i8* q = x.q + token * x.stride;
  const float* factors = x.scales + token * x.scale_stride;
  // Value i of a row's step is in column 4 (i / 2) + its code: four bits of codes for each byte of values.
  alignas(64) u8 first[64], shifts[2][64];
  alignas(64) u64 words[8];
  alignas(64) i32 lanes[16][16];
  for (int j = 0; j < 64; j++) {
    const int byte = j % 32;
    first[j] = (u8)(4 * byte);
    shifts[0][j] = (u8)(4 * byte % 64);
    shifts[1][j] = (u8)(shifts[0][j] + 2);
    words[j / 8] = (u64)(j / 32 * 2 + byte / 16);
  }
  for (i64 s = 0; s < per; s++)
    for (int l = 0; l < 16; l++) lanes[s][l] = x.lanes[s * 16 + l] + (l < 8 ? 0 : 16);   // the second row's scales
  const __m512i place = _mm512_load_si512(first), word = _mm512_load_si512(words);
  const __m512i even = _mm512_load_si512(shifts[0]), odd = _mm512_load_si512(shifts[1]);
  const __m512i three = _mm512_set1_epi8(3), high = _mm512_set1_epi8((char)0xf0), point = _mm512_set1_epi8((char)128);
  for (i64 n = from; n < to; n += 2) {
    const i64 next = n + 1 < to ? n + 1 : n;
    const u8 *v0 = w.values + first_byte(w, n), *v1 = w.values + first_byte(w, next);
    const u8 *c0 = w.codes + n * (K / 8), *c1 = w.codes + next * (K / 8);
    // In the order in which they lie, both rows' values one after the other, and their codes.
    const u8 *soon = v0 + ahead_of(K / 2), *codes_soon = c0 + ahead_of(K / 4);
    __m512 sum[M];
    UNROLL for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();
    i64 k = 0;
    for (i64 g = 0; g < groups; g += 16) {
      __m512 scale[M][2];
      const __m512 own0 = scales512(w, n, g), own1 = scales512(w, next, g);
      UNROLL for (int m = 0; m < M; m++) {
        const __m512 factor = _mm512_loadu_ps(factors + m * x.scale_stride + g);
        scale[m][0] = _mm512_mul_ps(own0, factor);
        scale[m][1] = _mm512_mul_ps(own1, factor);
      }
      const i64 stop = k + per * WIDE < K ? k + per * WIDE : K;
      const i32* lane = lanes[0];
      for (; k < stop; k += WIDE, lane += 16, v0 += 32, v1 += 32, c0 += 16, c1 += 16) {
        ask(soon);
        if (k % (2 * WIDE) == 0) ask(codes_soon + k / 4);
        soon += 64;
        const __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)v0)),
                                               _mm256_loadu_si256((const __m256i*)v1), 1);
        const __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)c0)),
                                                      _mm_loadu_si128((const __m128i*)c1), 1);
        const __m512i meta = _mm512_permutexvar_epi64(word, _mm512_castsi256_si512(codes));
        const __m512i a = _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(even, meta), three, place, 0xEA);   // (a & b) | c
        const __m512i b = _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(odd, meta), three, place, 0xEA);
        const __m512i wa = _mm512_and_si512(_mm512_slli_epi16(two, 4), high), wb = _mm512_and_si512(two, high);
        const __m512i added = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), point, wa), point, wb);
        UNROLL for (int m = 0; m < M; m++) {
          const i8* xs = q + m * x.stride + k;
          const __m512i x0 = _mm512_loadu_si512(xs), x1 = _mm512_loadu_si512(xs + 64);
          __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_permutex2var_epi8(x0, a, x1), wa);
          dot = _mm512_dpbusd_epi32(dot, _mm512_permutex2var_epi8(x0, b, x1), wb);
          const __m512 factor = _mm512_permutex2var_ps(scale[m][0], _mm512_load_si512(lane), scale[m][1]);
          sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(dot, added)), factor, sum[m]);
        }
      }
    }
    UNROLL for (int r = 0; r < 2; r++) {
      if (n + r >= to) break;
      const float last = (w.group ? 1.0f : load(w.kind, w.scales, n + r)) * 0.0625f;
      UNROLL for (int m = 0; m < M; m++) {
        const __m256 half = r ? _mm512_extractf32x8_ps(sum[m], 1) : _mm512_castps512_ps256(sum[m]);
        const float s = sum8(half) * last;
        store(w.kind, y, (token + m) * rows + n + r, bias ? s + load(w.kind, bias, n + r) : s);
      }
    }
  }
}
#endif
