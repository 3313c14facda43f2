// Attention of one token of each sequence, as decoding has it in every layer: softmax(scale · q Kᵀ + mask) V.
//
// Heads of queries that share one of keys and values meet it together, so that what was kept is read once, where it lies and in
// its dtype; sums are float. Positions are taken by CHUNKs whose sums are put together in their order: threads change no bit.
#include "common.h"
#include "avx2.h"
#include "avx512.h"
#include "calls.h"

#include <cmath>

namespace {

const i64 CHUNK = 256;
const i64 STEP = 16;   // of which widths are multiples: the longest vector
const int BOOLS = 3;   // a mask that says which positions count, where others are added to the scores

struct Attention {
  const u8 *q, *k, *v, *mask;   // no mask: null
  int mask_kind;
  i64 group, width, value_width;
  const i64 *of_q, *of_k, *of_v, *of_mask;   // how many numbers from one sequence, head and position to the next
  float scale;
};

// Keys or values of one head: the first, how far apart they are, and how long each is, in bytes.
struct Rows {
  const u8* at;
  i64 stride, bytes;
};

INLINE void ask_row(const Rows& rows, i64 row) {
  for (i64 i = 0; i < rows.bytes; i += 64) ask(rows.at + row * rows.stride + i);
}

// The positions of [from, to) that count for any query of a head: a mask of bools that all heads share leaves out the others,
// whose keys are not even read (a static cache is mostly empty).
i64 live_positions(const Attention& a, i64 sequence, i64 head, i64 from, i64 to, i32* live) {
  const bool some = a.mask && a.mask_kind == BOOLS && (a.group == 1 || a.of_mask[1] == 0);
  const u8* mask = some ? a.mask + sequence * a.of_mask[0] + head * a.group * a.of_mask[1] : nullptr;
  i64 count = 0;
  for (i64 j = from; j < to; j++) {
    live[count] = (i32)j;
    count += mask ? mask[j * a.of_mask[2]] != 0 : 1;
  }
  return count;
}

void add_mask(const Attention& a, i64 sequence, i64 head, const i32* live, i64 count, float* score) {
  if (!a.mask) return;
  const i64 start = sequence * a.of_mask[0] + head * a.of_mask[1];
  for (i64 j = 0; j < count; j++) {
    const i64 at = start + live[j] * a.of_mask[2];
    if (a.mask_kind != BOOLS) score[j] += load(a.mask_kind, a.mask, at);
    else if (!a.mask[at]) score[j] = -INFINITY;
  }
}

template <class F4, class F2, class F1> INLINE void in_fours(i64 count, F4 four, F2 two, F1 one) {
  i64 g = 0;
  for (; g + 4 <= count; g += 4) four(g);
  for (; g + 2 <= count; g += 2) two(g);
  if (g < count) one(g);
}

namespace plain {
#define TARGET
const i64 W = 1;
typedef float vec;
INLINE vec all(float f) { return f; }
template <int KIND> INLINE vec take(const void* p, i64 i) { return load(KIND, p, i); }
INLINE void put(float* p, vec v) { *p = v; }
INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
INLINE vec mul(vec a, vec b) { return a * b; }
INLINE vec add(vec a, vec b) { return a + b; }
INLINE vec sub(vec a, vec b) { return a - b; }
INLINE vec most(vec a, vec b) { return a > b ? a : b; }
INLINE vec nearest(vec a) { return std::nearbyint(a); }
INLINE vec twice(vec a, vec n) { return std::ldexp(a, n == n ? (int)n : 0); }
INLINE vec zero_below(vec x, vec limit, vec y) { return x < limit ? 0.0f : y; }
INLINE float total(vec v) { return v; }
INLINE float highest(vec v) { return v; }
#include "attend_steps.h"
#undef TARGET
}   // namespace plain

#ifdef SPARSIFY_X86
namespace with_avx2 {
#define TARGET T256
const i64 W = 8;
typedef __m256 vec;
T256 INLINE vec all(float f) { return _mm256_set1_ps(f); }
template <int KIND> T256 INLINE vec take(const void* p, i64 i) {
  if (KIND == F32) return _mm256_loadu_ps((const float*)p + i);
  return widen<KIND>(_mm_loadu_si128((const __m128i*)((const u16*)p + i)));
}
T256 INLINE void put(float* p, vec v) { _mm256_storeu_ps(p, v); }
T256 INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
T256 INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
T256 INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
T256 INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
T256 INLINE vec most(vec a, vec b) { return _mm256_max_ps(a, b); }   // NaN where b is
T256 INLINE vec nearest(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
T256 INLINE vec twice(vec a, vec n) {   // a · 2ⁿ
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
T256 INLINE vec zero_below(vec x, vec limit, vec y) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y); }
T256 INLINE float total(vec v) { return sum8(v); }
T256 INLINE float highest(vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
#include "attend_steps.h"
#undef TARGET
}   // namespace with_avx2

namespace with_avx512 {
#define TARGET T512
const i64 W = 16;
typedef __m512 vec;
T512 INLINE vec all(float f) { return _mm512_set1_ps(f); }
template <int KIND> T512 INLINE vec take(const void* p, i64 i) {
  if (KIND == F32) return _mm512_loadu_ps((const float*)p + i);
  return widen512<KIND>(_mm256_loadu_si256((const __m256i*)((const u16*)p + i)));
}
T512 INLINE void put(float* p, vec v) { _mm512_storeu_ps(p, v); }
T512 INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
T512 INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
T512 INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
T512 INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
T512 INLINE vec most(vec a, vec b) { return _mm512_max_ps(a, b); }
T512 INLINE vec nearest(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
T512 INLINE vec twice(vec a, vec n) { return _mm512_scalef_ps(a, n); }
T512 INLINE vec zero_below(vec x, vec limit, vec y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y); }
T512 INLINE float total(vec v) { return _mm512_reduce_add_ps(v); }
T512 INLINE float highest(vec v) { return _mm512_reduce_max_ps(v); }
#include "attend_steps.h"
#undef TARGET
}   // namespace with_avx512
#endif

template <int KIND>
void chunk_of(int isa, const Attention& a, i64 sequence, i64 head, i64 from, i64 to, float* scratch, float* out, float* top,
              float* sum) {
#ifdef SPARSIFY_X86
  if (isa == AVX512) return with_avx512::chunk<KIND>(a, sequence, head, from, to, scratch, out, top, sum);
  if (isa == AVX2) return with_avx2::chunk<KIND>(a, sequence, head, from, to, scratch, out, top, sum);
#endif
  (void)isa;
  plain::chunk<KIND>(a, sequence, head, from, to, scratch, out, top, sum);
}

}   // namespace

extern "C" {

// y [sequences, heads · group, value_width], contiguous, of q, k and v in the dtype `kind`, columns of each next to each other.
// `strides`: of q 2 (sequence, head), of k, v and the mask 3 each (and position), in numbers; 0 where one serves all.
EXPORT int sparsify_attend(int isa, int kind, const void* q, const void* k, const void* v, const void* mask, int mask_kind,
                           const i64* strides, i64 sequences, i64 heads, i64 group, i64 positions, i64 width,
                           i64 value_width, float scale, void* y, int threads) {
  if (kind < F32 || kind > F16 || isa < SCALAR || isa > AVX512 || mask_kind < F32 || mask_kind > BOOLS) return SIZES;
  if (sequences < 0 || heads < 1 || group < 1 || positions < 1 || positions > INT32_MAX) return SIZES;
  if (width < STEP || value_width < STEP || width % STEP || value_width % STEP) return SIZES;
  const Attention a{(const u8*)q, (const u8*)k, (const u8*)v, (const u8*)mask, mask_kind, group, width, value_width,
                    strides, strides + 2, strides + 5, strides + 8, scale};
  const i64 chunks = (positions + CHUNK - 1) / CHUNK, all = sequences * heads;
  const i64 part = group * (value_width + 2);   // of one chunk: sums, the highest scores, the weights' sums
  Buffer parts(all * chunks * part * 4);
  if (all && !parts.at) return MEMORY;
  if ((double)all * (double)positions * (double)width * (double)group < (1 << 17)) threads = 1;
  const i64 scratch = (group * (width + CHUNK) + CHUNK) * 4 + 64;
  const bool enough = over_rows(all * chunks, threads, scratch, [&](i64 from, i64 to, u8* buffer) {
    for (i64 i = from; i < to; i++) {
      const i64 of = i / chunks, start = i % chunks * CHUNK, end = start + CHUNK < positions ? start + CHUNK : positions;
      float* out = (float*)parts.at + i * part;
      float *top = out + group * value_width, *sum = top + group, *own = (float*)buffer;
      if (kind == F32) chunk_of<F32>(isa, a, of / heads, of % heads, start, end, own, out, top, sum);
      else if (kind == BF16) chunk_of<BF16>(isa, a, of / heads, of % heads, start, end, own, out, top, sum);
      else chunk_of<F16>(isa, a, of / heads, of % heads, start, end, own, out, top, sum);
    }
  }, 1);
  if (!enough) return MEMORY;
  for (i64 of = 0; of < all; of++)
    for (i64 g = 0; g < group; g++) {
      float* first = (float*)parts.at + of * chunks * part;
      float high = -INFINITY, weights = 0.0f;
      for (i64 c = 0; c < chunks; c++) high = std::fmax(high, first[c * part + group * value_width + g]);
      float* out = first + g * value_width;   // the first chunk's sums become those of all
      for (i64 c = 0; c < chunks; c++) {
        const float* here = first + c * part;
        const float top = here[group * value_width + g], share = top == -INFINITY ? 0.0f : std::exp(top - high);
        weights += here[group * (value_width + 1) + g] * share;
        for (i64 d = 0; d < value_width; d++) out[d] = (c ? out[d] : 0.0f) + here[g * value_width + d] * share;
      }
      for (i64 d = 0; d < value_width; d++)
        store(kind, y, (of * group + g) * value_width + d, weights == 0.0f ? 0.0f : out[d] / weights);
    }
  return DONE;
}

}   // extern "C"
