// packed24, few tokens, AVX-512: rows two by two. The inputs of 32 columns of bfloat16, or of 16 of float, fill a vector, and
// one instruction that reads no other brings those of them that both rows kept. Values stay packed. `product` shares out tokens
// and rows of bitmasks (of_mask) too.
#pragma once
#include "avx512.h"
#ifdef SPARSIFY_X86

namespace pairs {

const int MOST = 8;   // tokens at a time
const int P = 2;      // pairs of rows at a time
const i64 HELD = 1 << 17;   // bytes of weights

// A block of rows as it is read: 64 columns, or a unit, of each at a time.
struct Rows {
  const u8 *values[P][2], *codes[P][2];
  const char *next, *next_codes;

  T512 Rows(const Matrix& w, i64 n, i64 to, i64 size) {
    const i64 row_bytes = w.columns / 2 * size, code_bytes = w.columns / 8;
    for (int p = 0; p < P; p++)
      for (int h = 0; h < 2; h++) {
        const i64 row = n + 2 * p + h < to ? n + 2 * p + h : to - 1;
        values[p][h] = (const u8*)w.values + row * row_bytes;
        codes[p][h] = w.meta + row * code_bytes;
      }
    next = (const char*)values[0][0] + ahead_of(2 * P * row_bytes);
    next_codes = (const char*)codes[0][0] + ahead_of(2 * P * row_bytes) * code_bytes / row_bytes;
  }
  template <int SIZE> T512 inline __attribute__((always_inline)) void ask_for(i64 unit) const {
    UNROLL for (int line = 0; line < P * SIZE; line++) ask(next + (unit * P * SIZE + line) * 64);
    if (unit % 2 == 0) ask(next_codes + unit * 2 * P * 8);
  }
  INLINE u64 word(const u8* p) { u64 bits; memcpy(&bits, p, 8); return bits; }
};

// Lanes 0 to 3 of every quarter: of token t the sum of that quarter of its vector, at place t.
T512 INLINE __m512 quarters(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// Rows `row` and the next to y, of which each token's vector holds the sums in its halves. Each is added up in one order.
template <int M> T512 INLINE void write(const Matrix& w, const __m512* sum, const void* bias, void* y, i64 rows, i64 row, i64 to) {
  const __m512 none = _mm512_setzero_ps();
  auto of = [&](int m) T512 { return m < M ? sum[m] : none; };
  const __m512 low = quarters(of(0), of(1), of(2), of(3)), high = M > 4 ? quarters(of(4), of(5), of(6), of(7)) : none;
  // Four tokens of the one row, of the other, and four more tokens of each.
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  const int count = row + 1 < to ? 2 : 1;
  if (bias) {
    const float one = load(w.given, bias, row), other = count > 1 ? load(w.given, bias, row + 1) : 0.0f;
    all = _mm512_add_ps(all, _mm512_mask_mov_ps(_mm512_set1_ps(one), 0xf0f0, _mm512_set1_ps(other)));
  }
  alignas(64) u32 out[16];
  if (w.given == F32) _mm512_store_ps(out, all);
  else if (w.given == BF16) _mm512_store_si512(out, to_bf16_512(all));
  else _mm512_store_si512(out, _mm512_cvtepu16_epi32(_mm512_cvtps_ph(all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
  UNROLL for (int m = 0; m < M; m++)
    for (int h = 0; h < count; h++) {
      const u32 number = out[m / 4 * 8 + h * 4 + m % 4];
      if (w.given == F32) ((u32_anywhere*)y)[m * rows + row + h] = number;
      else ((u16_anywhere*)y)[m * rows + row + h] = (u16)number;
    }
}

// One token, one row at a time: the hardware foresees that, and nothing need be asked for. U sums, which do not wait for each
// other; two vectors of inputs, of which one instruction brings those that the row kept.
template <int U>
T512 static void one_bf16(const Matrix& w, const u16* x, const void* bias, void* y, i64 from, i64 to) {
  // Value j of 32 meets column 4 (j / 2) + its two bits; the multishift brings those to the bottom of word j.
  alignas(64) u16 first[32];
  alignas(64) u8 shifts[64];
  for (int j = 0; j < 32; j++) { first[j] = (u16)(4 * (j / 2)); shifts[2 * j] = shifts[2 * j + 1] = (u8)(2 * j); }
  const __m512i base = _mm512_load_si512(first), shift = _mm512_load_si512(shifts), three = _mm512_set1_epi16(3);
  const i64 K = w.columns, G = K / UNIT;
  for (i64 n = from; n < to; n++) {
    const u16* v = (const u16*)w.values + n * (K / 2);
    const u8* q = w.meta + n * (K / 8);
    __m512 sum[U];
    UNROLL for (int u = 0; u < U; u++) sum[u] = _mm512_setzero_ps();
    auto step = [&](int u, i64 g) T512 {
      const __m512i bits = _mm512_multishift_epi64_epi8(shift, _mm512_set1_epi64((i64)Rows::word(q + g * 8)));
      const __m512i column = _mm512_ternarylogic_epi64(bits, three, base, 0xEA);   // (bits & three) | base
      const __m512i x0 = _mm512_loadu_si512(x + g * 64), x1 = _mm512_loadu_si512(x + g * 64 + 32);
      sum[u] = _mm512_dpbf16_ps(sum[u], (__m512bh)_mm512_loadu_si512(v + g * 32), (__m512bh)_mm512_permutex2var_epi16(x0, column, x1));
    };
    i64 g = 0;
    for (; g + U <= G; g += U) UNROLL for (int u = 0; u < U; u++) step(u, g + u);
    for (; g < G; g++) step(0, g);
    UNROLL for (int u = 1; u < U; u++) sum[0] = _mm512_add_ps(sum[0], sum[u]);
    const float s = _mm512_reduce_add_ps(sum[0]);
    store(BF16, y, n, bias ? s + load(BF16, bias, n) : s);
  }
}

template <int M>
T512 static void of_bf16(const Matrix& w, const u16* x, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  // Value j of 16 meets column 4 (j / 2) + its two bits; the multishift brings those to the bottom of word j.
  alignas(64) u16 first[32];
  alignas(64) u8 shifts[64];
  for (int j = 0; j < 32; j++) {
    first[j] = (u16)(4 * (j % 16 / 2));
    shifts[2 * j] = shifts[2 * j + 1] = (u8)(2 * (j % 16));
  }
  const __m512i base = _mm512_load_si512(first), three = _mm512_set1_epi16(3), low = _mm512_load_si512(shifts);
  const __m512i shift[2] = {low, _mm512_add_epi8(low, _mm512_set1_epi8(32))};
  for (i64 n = from; n < to; n += 2 * P) {
    const Rows r(w, n, to, 2);
    __m512 sum[P][M];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int m = 0; m < M; m++) sum[p][m] = _mm512_setzero_ps();
    for (i64 g = 0; g < w.columns / UNIT; g++) {
      __m512i word[P];
      r.ask_for<2>(g);
      UNROLL for (int p = 0; p < P; p++)
        word[p] = _mm512_mask_set1_epi64(_mm512_set1_epi64((i64)Rows::word(r.codes[p][0] + g * 8)), 0xf0, (i64)Rows::word(r.codes[p][1] + g * 8));
      UNROLL for (int c = 0; c < 2; c++) {
        __m512i column[P], part[P];
        UNROLL for (int p = 0; p < P; p++) {
          const __m256i a = _mm256_loadu_si256((const __m256i*)(r.values[p][0] + g * 64 + c * 32));
          const __m256i b = _mm256_loadu_si256((const __m256i*)(r.values[p][1] + g * 64 + c * 32));
          part[p] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
          column[p] = _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(shift[c], word[p]), three, base, 0xEA);   // (a & b) | c
        }
        UNROLL for (int m = 0; m < M; m++) {
          const __m512i xs = _mm512_loadu_si512(x + m * w.stride + g * 64 + c * 32);
          UNROLL for (int p = 0; p < P; p++)
            sum[p][m] = _mm512_dpbf16_ps(sum[p][m], (__m512bh)part[p], (__m512bh)_mm512_permutexvar_epi16(column[p], xs));
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++)
      if (n + 2 * p < to) write<M>(w, sum[p], bias, y, rows, n + 2 * p, to);
  }
}

template <int KIND, int M>
T512 static void of_float(const Matrix& w, const float* x, const void* bias, void* y, i64 rows, i64 from, i64 to) {
  const int SIZE = KIND == F32 ? 4 : 2;
  alignas(64) u32 first[16], shifts[16];
  for (int j = 0; j < 16; j++) { first[j] = 4 * (j % 8 / 2); shifts[j] = 2 * (j % 8); }
  const __m512i base = _mm512_load_si512(first), three = _mm512_set1_epi32(3), low = _mm512_load_si512(shifts);
  const __m512i shift[2] = {low, _mm512_add_epi32(low, _mm512_set1_epi32(16))};
  for (i64 n = from; n < to; n += 2 * P) {
    const Rows r(w, n, to, SIZE);
    __m512 sum[P][M];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int m = 0; m < M; m++) sum[p][m] = _mm512_setzero_ps();
    for (i64 g = 0; g < w.columns / UNIT; g++) {
      u64 word[P][2];
      r.ask_for<SIZE>(g);
      UNROLL for (int p = 0; p < P; p++) UNROLL for (int h = 0; h < 2; h++) word[p][h] = Rows::word(r.codes[p][h] + g * 8);
      UNROLL for (int c = 0; c < 4; c++) {
        __m512i column[P];
        __m512 part[P];
        UNROLL for (int p = 0; p < P; p++) {
          const u8 *a = r.values[p][0] + (g * 32 + c * 8) * SIZE, *b = r.values[p][1] + (g * 32 + c * 8) * SIZE;
          if (KIND == F32) part[p] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps((const float*)a)), _mm256_loadu_ps((const float*)b), 1);
          else part[p] = widen512<KIND>(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a)), _mm_loadu_si128((const __m128i*)b), 1));
          const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32((i32)(word[p][0] >> c / 2 * 32)), 0xff00, (i32)(word[p][1] >> c / 2 * 32));
          column[p] = _mm512_ternarylogic_epi32(_mm512_srlv_epi32(both, shift[c % 2]), three, base, 0xEA);
        }
        UNROLL for (int m = 0; m < M; m++) {
          const __m512 xs = _mm512_loadu_ps(x + m * w.stride + g * 64 + c * 16);
          UNROLL for (int p = 0; p < P; p++) sum[p][m] = _mm512_fmadd_ps(part[p], _mm512_permutexvar_ps(column[p], xs), sum[p][m]);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++)
      if (n + 2 * p < to) write<M>(w, sum[p], bias, y, rows, n + 2 * p, to);
  }
}

// The tokens that there are, M at a time and then fewer.
template <int KIND, bool PAIRS, int M>
T512 static void tokens_of(const Matrix& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to) {
  const i64 size = w.given == F32 ? 4 : 2, done = tokens / M * M;
  for (i64 m = 0; m < done; m += M) {
    u8* out = (u8*)y + m * rows * size;
    if (w.mask) of_mask<KIND, PAIRS, M>(w, (const u8*)x + m * w.stride * (PAIRS ? 2 : 4), bias, out, rows, from, to);
    else if (PAIRS) of_bf16<M>(w, (const u16*)x + m * w.stride, bias, out, rows, from, to);
    else of_float<KIND, M>(w, (const float*)x + m * w.stride, bias, out, rows, from, to);
  }
  if constexpr (M > 1)
    if (done < tokens) {
      const u8* rest = (const u8*)x + done * w.stride * (PAIRS ? 2 : 4);
      tokens_of<KIND, PAIRS, M - 1>(w, rest, bias, (u8*)y + done * rows * size, tokens - done, rows, from, to);
    }
}

// Rows [from, to) of y [tokens, rows]. Where tokens take more than one turn, so many rows at a time as stay in the second
// cache until the last turn.
template <int KIND, bool PAIRS>
T512 static void product(const Matrix& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to) {
  if (tokens == 1 && !w.mask && PAIRS) return one_bf16<4>(w, (const u16*)x, bias, y, from, to);
  const i64 row_bytes = w.columns / 2 * (KIND == F32 ? 4 : 2), held = HELD / row_bytes / (2 * P) * (2 * P);
  const bool mask_of_floats = w.mask && !PAIRS;
  const i64 block = tokens <= (mask_of_floats ? MOST / 2 : MOST) ? to - from : held > 2 * P ? held : 2 * P;
  for (i64 n = from; n < to; n += block) {
    const i64 end = n + block < to ? n + block : to;
    if (mask_of_floats) tokens_of<KIND, PAIRS, MOST / 2>(w, x, bias, y, tokens, rows, n, end);
    else tokens_of<KIND, PAIRS, MOST>(w, x, bias, y, tokens, rows, n, end);
  }
}
}   // namespace pairs
#endif
