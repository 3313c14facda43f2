// 8- and 4-bit weights with AVX2: a row is decoded to int8 in the first cache, and every token meets it there.
#pragma once
#include "avx2.h"
#include "few.h"
#ifdef SPARSIFY_X86

// Where each of eight places finds its value among those packed, for each byte of a mask and for each byte of packed24's
// codes; 0x80 gives zero.
struct Places {
  alignas(8) u8 bits[256][8], pairs[256][8];
  Places() {
    for (int byte = 0; byte < 256; byte++) {
      for (int j = 0, count = 0; j < 8; j++) bits[byte][j] = byte >> j & 1 ? (u8)count++ : 0x80;
      for (int j = 0; j < 8; j++) pairs[byte][j] = 0x80;
      for (int i = 0; i < 4; i++) pairs[byte][i / 2 * 4 + (byte >> 2 * i & 3)] = (u8)i;
    }
  }
};
static const Places places;

// 4-bit values as int8, two for each of 16 bytes.
T256 INLINE void nibbles_avx2(const u8* v, u8* out) {
  const __m256i eight = _mm256_set1_epi8(8), low = _mm256_set1_epi8(15);
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)v));
  const __m256i u = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), low);
  _mm256_store_si256((__m256i*)out, _mm256_sub_epi8(_mm256_xor_si256(u, eight), eight));
}

// As decode(). What is read beyond the values of a bitmask's block lies in those after it, or in the padding.
T256 INLINE void decode_avx2(const Few& w, i64 row, i64 block, i64& at, i8* out) {
  const u8* v = w.values + at;
  alignas(32) u8 held[80];
  if (w.bits == 4) {
    nibbles_avx2(v, held);
    if (w.layout != PACKED24) nibbles_avx2(v + 16, held + 32);
    v = held;
  }
  if (w.layout == DENSE) {
    memcpy(out, v, 64);
    at += 8 * w.bits;
  } else if (w.layout == PACKED24) {
    const u8* codes = w.codes + row * (w.columns / 8) + block * 8;
    const __m128i second = _mm_set_epi64x(0x0404040404040404, 0);   // whose four values come after the first four
    UNROLL for (int i = 0; i < 4; i++) {
      const __m128i place = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)places.pairs[codes[2 * i]]),
                                               _mm_loadl_epi64((const __m128i*)places.pairs[codes[2 * i + 1]]));
      const __m128i eight = _mm_loadl_epi64((const __m128i*)(v + 8 * i));
      _mm_storeu_si128((__m128i*)(out + 16 * i), _mm_shuffle_epi8(eight, _mm_or_si128(place, second)));
    }
    at += 4 * w.bits;
  } else {
    const u64 mask = block_mask(w, row, block);
    for (int i = 0; i < 64; i += 8) {
      const u64 bits = mask >> i & 255;
      const __m128i place = _mm_loadl_epi64((const __m128i*)places.bits[bits]);
      _mm_storel_epi64((__m128i*)(out + i), _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)v), place));
      v += __builtin_popcountll(bits);
    }
    at += block_bytes(w, __builtin_popcountll(mask));
  }
}

T256 static void decode_row_avx2(const Few& w, i64 row, i8* out) {
  i64 at = first_byte(w, row);
  for (i64 b = 0; b < w.columns / 64; b++) decode_avx2(w, row, b, at, out + b * 64);
  if (w.layout == BITMASK) row_ends(w, row, at);
}

T256 static void floats_avx2(int kind, const void* x, i64 count, i64 padded, float* out) {
  i64 k = 0;
  if (kind == F16)
    for (; k + 8 <= count; k += 8)
      _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const u16*)x + k))));
  const i64 size = kind == F32 ? 4 : 2;
  to_floats(kind, (const u8*)x + k * size, count - k, padded - k, out + k);
}

T256 static bool quantise_avx2(const float* x, i64 columns, i64 group, i8* q, float* scales) {
  return quantise(x, columns, group, q, scales);
}

template <int M>
T256 INLINE void dot_avx2(const Few& w, const Quantised& x, i64 token, const i8* row, const float* own, float* sums) {
  const i64 group = shared(w);
  __m256 sum[M];
  UNROLL for (int m = 0; m < M; m++) sum[m] = _mm256_setzero_ps();
  for (i64 k = 0, g = 0; k < w.columns; k += group, g++) {
    __m256i dot[M];
    UNROLL for (int m = 0; m < M; m++) dot[m] = _mm256_setzero_si256();
    for (i64 j = k; j < k + group; j += 32) {
      // vpmaddubsw wants one side unsigned: the other takes its signs. Two products are 2 · 128 · 127 at most, and fit.
      const __m256i ws = _mm256_loadu_si256((const __m256i*)(row + j)), size = _mm256_abs_epi8(ws);
      UNROLL for (int m = 0; m < M; m++) {
        const __m256i xs = _mm256_loadu_si256((const __m256i*)(x.q + (token + m) * x.stride + j));
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(xs, ws));
        dot[m] = _mm256_add_epi32(dot[m], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
    }
    UNROLL for (int m = 0; m < M; m++) {
      const __m256 factor = _mm256_set1_ps(own[g] * x.scales[(token + m) * x.scale_stride + g]);
      sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m]), factor, sum[m]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) sums[m] = sum8(sum[m]);
}

// ---- packed24: the values stay packed, and x is picked for them

// What a group of columns adds, in eight lanes of which each has the sum of eight columns of 64: so that the decoded and the
// packed way, which runs where tokens are few, give the same bits.
// `block(b, out)` gives M of them; `factors` lie `stride` apart.
template <int M, class Block>
T256 INLINE void groups_avx2(const Few& w, const float* factors, i64 stride, float* sums, Block block) {
  __m256 sum[M];
  __m256i one[M], two[M];
  UNROLL for (int m = 0; m < M; m++) sum[m] = _mm256_setzero_ps();
  const i64 group = shared(w), blocks = w.columns / 64;
  const int shift = __builtin_ctzll((u64)group);   // a division takes longer
  for (i64 b = 0; b < blocks; b++) {
    block(b, one);
    if (group > 64) {
      block(++b, two);
      UNROLL for (int m = 0; m < M; m++) one[m] = _mm256_add_epi32(one[m], two[m]);
    }
    UNROLL for (int m = 0; m < M; m++) {
      const float* f = factors + m * stride + (b * 64 >> shift);
      const __m256 factor = group == 32 ? _mm256_set_m128(_mm_set1_ps(f[1]), _mm_set1_ps(f[0])) : _mm256_broadcast_ss(f);
      sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(one[m]), factor, sum[m]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) sums[m] = sum8(sum[m]);
}

// Of 64 columns of a decoded row, with M tokens.
template <int M> T256 INLINE void decoded_block(const i8* row, const i8* x, i64 stride, __m256i* out) {
  __m256i ws[2], size[2];
  UNROLL for (int h = 0; h < 2; h++) {
    ws[h] = _mm256_load_si256((const __m256i*)(row + 32 * h));
    size[h] = _mm256_abs_epi8(ws[h]);
  }
  UNROLL for (int m = 0; m < M; m++) {
    __m256i dot[2];
    UNROLL for (int h = 0; h < 2; h++) {
      const __m256i xs = _mm256_loadu_si256((const __m256i*)(x + m * stride + 32 * h));
      dot[h] = _mm256_madd_epi16(_mm256_maddubs_epi16(size[h], _mm256_sign_epi8(xs, ws[h])), _mm256_set1_epi16(1));
    }
    out[m] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(dot[0], dot[1]), 0xd8);
  }
}

// Four planes of a token for each 64 columns: plane p holds x[4g + p] twice for each group g of four columns, once for each of
// the group's two values.
T256 static void planes_avx2(const i8* q, i64 columns, i8* planes) {
  const __m128i pick[2] = {_mm_setr_epi8(0, 0, 4, 4, 8, 8, 12, 12, 1, 1, 5, 5, 9, 9, 13, 13),
                           _mm_setr_epi8(2, 2, 6, 6, 10, 10, 14, 14, 3, 3, 7, 7, 11, 11, 15, 15)};
  for (i64 k = 0; k < columns; k += 16) {
    const __m128i x = _mm_loadu_si128((const __m128i*)(q + k));
    i8* out = planes + k / 64 * 128 + k % 64 / 2;
    UNROLL for (int h = 0; h < 2; h++) {
      const __m128i two = _mm_shuffle_epi8(x, pick[h]);
      _mm_storel_epi64((__m128i*)(out + 64 * h), two);
      _mm_storeh_pi((__m64*)(out + 64 * h + 32), _mm_castsi128_ps(two));
    }
  }
}

// Of 64 columns as they are packed: each of 32 values takes of the four planes the one that its two bits of the code name.
template <int BITS> T256 INLINE __m256i packed_block(const u8* v, const u8* codes, const i8* planes) {
  i64 eight;
  memcpy(&eight, codes, 8);
  // Four times each byte of the codes: its four places of two bits are the four values that follow each other.
  const __m256i spread = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707);
  const __m256i code = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), spread);
  const __m256i low = _mm256_set1_epi32(0x40100401), high = _mm256_set1_epi32((int)0x80200802);
  const __m256i odd = _mm256_cmpeq_epi8(_mm256_and_si256(code, low), low);
  const __m256i late = _mm256_cmpeq_epi8(_mm256_and_si256(code, high), high);
  const __m256i* p = (const __m256i*)planes;
  const __m256i first = _mm256_blendv_epi8(_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1), odd);
  const __m256i second = _mm256_blendv_epi8(_mm256_loadu_si256(p + 2), _mm256_loadu_si256(p + 3), odd);
  const __m256i xs = _mm256_blendv_epi8(first, second, late);
  __m256i pairs;
  if (BITS == 4) {
    // Values as 0 … 15, which is 8 too much: eight times x is taken off again. Both pairs fit in 16 bits.
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)v)), offset = _mm256_set1_epi8(8);
    const __m256i u = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
    pairs = _mm256_sub_epi16(_mm256_maddubs_epi16(_mm256_xor_si256(u, offset), xs), _mm256_maddubs_epi16(offset, xs));
  } else {
    const __m256i ws = _mm256_loadu_si256((const __m256i*)v);
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(ws), _mm256_sign_epi8(xs, ws));
  }
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

template <int BITS> T256 INLINE void packed_row(const Few& w, i64 row, const i8* planes, const float* factors, float* sum) {
  const u8 *v = w.values + first_byte(w, row), *codes = w.codes + row * (w.columns / 8);
  groups_avx2<1>(w, factors, 0, sum, [=](i64 b, __m256i* out) T256 {
    out[0] = packed_block<BITS>(v + b * 4 * BITS, codes + b * 8, planes + b * 128);
  });
}

template <int M>
T256 INLINE void decoded_row(const Few& w, const i8* row, const i8* q, i64 x_stride, const float* factors, i64 stride, float* sums) {
  groups_avx2<M>(w, factors, stride, sums,
                 [=](i64 b, __m256i* out) T256 { decoded_block<M>(row + b * 64, q + b * 64, x_stride, out); });
}

// As few_avx2, of packed24. `scratch` holds a row as int8, its scales, and these times those of four tokens.
T256 static void few24_avx2(const Few& w, const Quantised& x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to,
                            u8* scratch) {
  i8* row = (i8*)scratch;
  const i64 size = w.kind == F32 ? 4 : 2, groups = w.columns / shared(w), stride = (groups + 7) / 8 * 8;
  float *own = (float*)(scratch + w.columns), *factors = own + stride;
  for (i64 n = from; n < to; n++) {
    if (w.group) floats_avx2(w.kind, (const u8*)w.scales + n * w.scale_count * size, w.scale_count, groups, own);
    else for (i64 g = 0; g < groups; g++) own[g] = 1.0f;
    const float last = w.group ? 1.0f : load(w.kind, w.scales, n);
    if (!x.planes) decode_row_avx2(w, n, row);
    for (i64 m = 0; m < tokens; m += m + 4 <= tokens ? 4 : 1) {
      float sums[4];
      const int count = m + 4 <= tokens ? 4 : 1;
      for (int i = 0; i < count; i++) {
        const float* scales = x.scales + (m + i) * x.scale_stride;
        for (i64 g = 0; g < groups; g++) factors[i * stride + g] = own[g] * scales[g];   // vectorised
      }
      const i8* q = x.q + m * x.stride;
      if (x.planes) {
        const i8* planes = x.planes + m * 2 * w.columns;
        if (w.bits == 4) packed_row<4>(w, n, planes, factors, sums);
        else packed_row<8>(w, n, planes, factors, sums);
      } else if (count == 4) decoded_row<4>(w, row, q, x.stride, factors, stride, sums);
      else decoded_row<1>(w, row, q, x.stride, factors, stride, sums);
      for (int i = 0; i < count; i++) {
        const float s = sums[i] * last;
        store(w.kind, y, (m + i) * rows + n, bias ? s + load(w.kind, bias, n) : s);
      }
    }
  }
}

// `scratch` holds a row as int8, and its scales as float.
T256 static void few_avx2(const Few& w, const Quantised& x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to,
                          u8* scratch) {
  if (w.layout == PACKED24) return few24_avx2(w, x, bias, y, tokens, rows, from, to, scratch);
  i8* row = (i8*)scratch;
  float* own = (float*)(scratch + w.columns);
  const i64 size = w.kind == F32 ? 4 : 2, groups = w.columns / shared(w);
  for (i64 n = from; n < to; n++) {
    decode_row_avx2(w, n, row);
    if (w.group) floats_avx2(w.kind, (const u8*)w.scales + n * w.scale_count * size, w.scale_count, groups, own);
    else for (i64 g = 0; g < groups; g++) own[g] = 1.0f;
    const float last = w.group ? 1.0f : load(w.kind, w.scales, n);
    for (i64 m = 0; m < tokens; m += m + 4 <= tokens ? 4 : 1) {
      float sums[4];
      const int count = m + 4 <= tokens ? 4 : 1;
      if (count == 4) dot_avx2<4>(w, x, m, row, own, sums);
      else dot_avx2<1>(w, x, m, row, own, sums);
      for (int i = 0; i < count; i++) {
        const float s = sums[i] * last;
        store(w.kind, y, (m + i) * rows + n, bias ? s + load(w.kind, bias, n) : s);
      }
    }
  }
}

// Numbers as to_bf16() has them, in the lower halves.
T256 INLINE __m256i bf16_avx2(__m256 v) {
  const __m256i u = _mm256_castps_si256(v), half = _mm256_srli_epi32(u, 16), odd = _mm256_and_si256(half, _mm256_set1_epi32(1));
  const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(near, _mm256_or_si256(half, _mm256_set1_epi32(0x40)), nan);
}

// A decoded row as weights: float, rounded to the dtype of the scales.
T256 static void weights_avx2(const Few& w, i64 n, const i8* row, float* out) {
  for (i64 k = 0; k < w.columns; k += 8) {
    const __m256 scale = _mm256_set1_ps(scale_of(w, n, k));
    const __m256 f = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + k))));
    __m256 v = _mm256_fmadd_ps(f, scale, _mm256_setzero_ps());
    if (w.kind == F16) v = _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    if (w.kind == BF16) v = _mm256_castsi256_ps(_mm256_slli_epi32(bf16_avx2(v), 16));
    _mm256_storeu_ps(out + k, v);
  }
}

template <int M> T256 INLINE void exact_dot_avx2(const float* row, const float* x, i64 columns, float* sums) {
  __m256 sum[M][2];
  UNROLL for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
  for (i64 k = 0; k < columns; k += 16)
    UNROLL for (int u = 0; u < 2; u++) {
      const __m256 ws = _mm256_loadu_ps(row + k + 8 * u);
      UNROLL for (int m = 0; m < M; m++)
        sum[m][u] = _mm256_fmadd_ps(ws, _mm256_loadu_ps(x + m * columns + k + 8 * u), sum[m][u]);
    }
  UNROLL for (int m = 0; m < M; m++) sums[m] = sum8(_mm256_add_ps(sum[m][0], sum[m][1]));
}

// `scratch` holds a row as int8, and as float.
T256 static void few_exact_avx2(const Few& w, const float* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to,
                                u8* scratch) {
  i8* row = (i8*)scratch;
  float* weights = (float*)(scratch + w.columns);
  for (i64 n = from; n < to; n++) {
    decode_row_avx2(w, n, row);
    weights_avx2(w, n, row, weights);
    for (i64 m = 0; m < tokens; m += m + 4 <= tokens ? 4 : 1) {
      float sums[4];
      const int count = m + 4 <= tokens ? 4 : 1;
      if (count == 4) exact_dot_avx2<4>(weights, x + m * w.columns, w.columns, sums);
      else exact_dot_avx2<1>(weights, x + m * w.columns, w.columns, sums);
      for (int i = 0; i < count; i++)
        store(w.kind, y, (m + i) * rows + n, bias ? sums[i] + load(w.kind, bias, n) : sums[i]);
    }
  }
}

// As unpack_few_scalar, with `scratch` as above.
T256 static void unpack_few_avx2(const Few& w, i64 n, void* out, u8* scratch) {
  i8* row = (i8*)scratch;
  float* weights = (float*)(scratch + w.columns);
  decode_row_avx2(w, n, row);
  weights_avx2(w, n, row, weights);
  i64 k = 0;
  if (w.kind == F16)
    for (; k + 8 <= w.width; k += 8)
      _mm_storeu_si128((__m128i*)((u16*)out + k), _mm256_cvtps_ph(_mm256_loadu_ps(weights + k), _MM_FROUND_TO_NEAREST_INT));
  else if (w.kind == BF16)
    for (; k + 8 <= w.width; k += 8) {
      // Rounded already: their upper halves.
      const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(_mm256_loadu_ps(weights + k)), 16);
      const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
      _mm_storeu_si128((__m128i*)((u16*)out + k), eight);
    }
  for (; k < w.width; k++) store(w.kind, out, k, weights[k]);
}
#endif
