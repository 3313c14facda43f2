// Products of activations with packed weights of 8 or 4 bits, and the way back to dense: few.h says how.
#include "calls.h"
#include "few.h"
#include "few_avx2.h"
#include "few_avx512.h"
#include "few_pairs_avx512.h"

namespace {

// Whether all that lies in memory is of the sizes that a matrix [rows, width] has.
bool is_matrix(int isa, const Few& w, Given values, Given codes, i64 start_count, Given scales, i64 rows) {
  if (isa < SCALAR || isa > AVX512 || w.kind < F32 || w.kind > F16 || w.layout < PACKED24 || w.layout > DENSE) return false;
  if ((w.bits != 8 && w.bits != 4) || (w.group != 0 && w.group != 32 && w.group != 64 && w.group != 128)) return false;
  if (rows < 0 || rows > ((i64)1 << 62) / w.columns) return false;   // so that no size below overflows
  if (!codes.is(w.layout == DENSE ? 0 : rows * (w.columns / 8)) || !scales.is(rows * w.scale_count)) return false;
  if (w.layout == BITMASK) return start_count == rows + 1 && w.starts && values.count >= PADDING && values.at;
  return values.is(rows * value_bytes(w.layout, w.bits, w.columns));
}

// Whether every row of [from, to) stays among the values, whatever its mask, as the one of kernels.cpp.
bool stays_inside(int isa, const Few& w, i64 from, i64 to) {
  if (w.layout != BITMASK) return true;
  const i64 end = w.bytes - PADDING, most = value_bytes(BITMASK, w.bits, w.columns);
  i64 last = to;
  for (; last > from && (w.starts[last - 1] < 0 || w.starts[last - 1] > end - most); last--) {
    const i64 start = w.starts[last - 1];
    if (start < 0 || start > end) return false;
    i64 bytes = 0;
    for (i64 b = 0; b < w.columns / 64; b++) bytes += block_bytes(w, __builtin_popcountll(block_mask(w, last - 1, b)));
    if (bytes > end - start) return false;
  }
#ifdef SPARSIFY_X86
  if (isa > SCALAR) return !beyond_avx2(w.starts + from, last - from, end - most);
#endif
  (void)isa;
  return !beyond(w.starts + from, last - from, end - most);
}

#ifdef SPARSIFY_X86
template <int LAYOUT>
void few_tokens512(const Few& w, const Quantised& x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to) {
  if (w.bits == 8) few_tokens512<LAYOUT, 8>(w, x, bias, y, tokens, rows, from, to);
  else few_tokens512<LAYOUT, 4>(w, x, bias, y, tokens, rows, from, to);
}

void few_avx512(const Few& w, const Quantised& x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to) {
  if (w.layout == PACKED24 && w.bits == 4)
    few_tokens(tokens, from, to, [&](i64 m, i64 a, i64 b) { pairs512<4>(w, x, m, bias, y, rows, a, b); },
               [&](i64 m, i64 a, i64 b) { pairs512<2>(w, x, m, bias, y, rows, a, b); },
               [&](i64 m, i64 a, i64 b) { pairs512<1>(w, x, m, bias, y, rows, a, b); });
  else if (w.layout == PACKED24) few_tokens512<PACKED24, 8>(w, x, bias, y, tokens, rows, from, to);
  else if (w.layout == BITMASK) few_tokens512<BITMASK>(w, x, bias, y, tokens, rows, from, to);
  else few_tokens512<DENSE>(w, x, bias, y, tokens, rows, from, to);
}

void exact_avx512(const Few& w, const void* x, const void* bias, void* y, i64 tokens, i64 rows, i64 from, i64 to, u8* scratch) {
  if (w.kind == F32) few_exact512<F32>(w, x, bias, y, tokens, rows, from, to, scratch);
  else if (w.kind == BF16) few_exact512<BF16>(w, x, bias, y, tokens, rows, from, to, scratch);
  else few_exact512<F16>(w, x, bias, y, tokens, rows, from, to, scratch);
}
#endif

#ifdef SPARSIFY_X86
template <int KIND> bool wide_avx512(const Few& w, const wide::Product& p) {
  return w.bits == 8 ? p.run<KIND>(Scaled<KIND, 8>{w}) : p.run<KIND>(Scaled<KIND, 4>{w});
}
#endif

// What a thread needs of memory: a row as int8 and as float, or (AVX-512's exact way) a piece of four rows and their sums.
i64 scratch_bytes(int isa, const Few& w, i64 exact_tokens) {
  if (isa == AVX512) return exact_tokens ? 4 * BLOCK * 4 + 4 * 64 * exact_tokens : 0;
  return w.columns * 5 + 5 * 32;   // the numbers of groups are rounded up to eight
}

// A run of tokens, x as it was given.
struct Run {
  const Few& w;
  int isa, threads;
  i64 rows;
  const void* bias;

  i64 size() const { return w.kind == F32 ? 4 : 2; }

  bool exact(const void* x, void* y, i64 tokens) const {
    const bool as_float = !(isa == AVX512 && w.kind == BF16);
    Buffer in(tokens * w.columns * (as_float ? 4 : 2));
    if (!in.at) return false;
    for (i64 m = 0; m < tokens; m++) {
      const u8* row = (const u8*)x + m * w.width * size();
      if (as_float) floats(row, (float*)in.at + m * w.columns);
      else {
        memcpy(in.at + m * w.columns * 2, row, w.width * 2);
        memset(in.at + (m * w.columns + w.width) * 2, 0, (w.columns - w.width) * 2);
      }
    }
    return over_rows(rows, threads, scratch_bytes(isa, w, tokens), [&](i64 from, i64 to, u8* scratch) {
#ifdef SPARSIFY_X86
      if (isa == AVX512) return exact_avx512(w, in.at, bias, y, tokens, rows, from, to, scratch);
      if (isa == AVX2) return few_exact_avx2(w, (const float*)in.at, bias, y, tokens, rows, from, to, scratch);
#endif
      few_exact_scalar(w, (const float*)in.at, bias, y, tokens, rows, from, to, scratch);
    });
  }

  // Where tokens are many: x is not quantised, and what is not finite takes the way on which zeros count.
  bool many(const void* x, void* y, i64 tokens) const {
#ifdef SPARSIFY_X86
    if (isa == AVX512 && w.layout == PACKED24 && finite_avx2(w.kind, x, tokens * w.width)) {
      const wide::Product p{w.columns, w.width, x, bias, y, tokens, rows, threads};
      return w.kind == F32 ? wide_avx512<F32>(w, p) : w.kind == BF16 ? wide_avx512<BF16>(w, p) : wide_avx512<F16>(w, p);
    }
#endif
    return exact(x, y, tokens);
  }

  bool quantised(const Quantised& x, void* y, i64 tokens) const {
    return over_rows(rows, threads, scratch_bytes(isa, w, 0), [&](i64 from, i64 to, u8* scratch) {
#ifdef SPARSIFY_X86
      if (isa == AVX512) return few_avx512(w, x, bias, y, tokens, rows, from, to);
      if (isa == AVX2) return few_avx2(w, x, bias, y, tokens, rows, from, to, scratch);
#endif
      few_scalar(w, x, bias, y, tokens, rows, from, to, scratch);
    });
  }

  void floats(const void* x, float* out) const {
#ifdef SPARSIFY_X86
    if (isa > SCALAR) return floats_avx2(w.kind, x, w.width, w.columns, out);
#endif
    to_floats(w.kind, x, w.width, w.columns, out);
  }

  // Token m of `out` from x; false where it has to be multiplied as it is.
  bool quantise_token(const void* x, float* buffer, const Quantised& out, i64 m) const {
    floats(x, buffer);
    i8* q = out.q + m * out.stride;
    float* scales = out.scales + m * out.scale_stride;
#ifdef SPARSIFY_X86
    if (isa == AVX512) {
      if (!quantise512(buffer, w.columns, shared(w), q, scales)) return false;
      arrange512(w, q, out.base + m * out.base_stride);
      return true;
    }
    if (isa == AVX2) {
      if (!quantise_avx2(buffer, w.columns, shared(w), q, scales)) return false;
      if (out.planes) planes_avx2(q, w.columns, out.planes + m * 2 * w.columns);
      return true;
    }
#endif
    return quantise(buffer, w.columns, shared(w), q, scales);
  }
};

// All tokens: those that can be are quantised, runs of the others are multiplied as they are.
int product(const Run& run, const void* x, void* y, i64 tokens, i64 few, bool exact) {
  const Few& w = run.w;
  if (tokens > few) return run.many(x, y, tokens) ? DONE : MEMORY;
  if (exact) return run.exact(x, y, tokens) ? DONE : MEMORY;
  const i64 steps = w.columns / WIDE, group = shared(w), size = run.size();
  Quantised q;
  // Tokens a power of two apart would all lie in the same lines of the first cache.
  q.stride = w.columns + 64;
  q.scale_stride = (w.columns / group + 15) / 16 * 16;
  q.base_stride = steps * 32 + 16;
  Buffer bytes(tokens * q.stride), scales(tokens * q.scale_stride * 4), base(tokens * q.base_stride * 4), lanes(16 * 32 * 4),
      row(w.columns * 4), planes(tokens > FEW24 ? 1 : tokens * 2 * w.columns);
  if (!bytes.at || !scales.at || !base.at || !lanes.at || !row.at || !planes.at) return MEMORY;
  q.q = (i8*)bytes.at;
  q.planes = run.isa == AVX2 && w.layout == PACKED24 && tokens <= FEW24 ? (i8*)planes.at : nullptr;
  q.scales = (float*)scales.at;
  q.base = (i32*)base.at;
  q.lanes = (i32*)lanes.at;
  memset(scales.at, 0, tokens * q.scale_stride * 4);
#ifdef SPARSIFY_X86
  const int half = halves(w.layout, w.bits), shift = __builtin_ctzll(group);   // a division takes longer
  for (int step = 0, i = 0; step < group / 8; step++)
    for (int h = 0; h < half; h++)
      for (int lane = 0; lane < 16; lane++)
        q.lanes[i++] = (i32)((step * WIDE + first_column(w.layout, w.bits, h, lane)) >> shift);
#endif
  for (i64 m = 0; m < tokens;) {
    const u8* in = (const u8*)x + m * w.width * size;
    u8* out = (u8*)y + m * run.rows * size;
    i64 count = 0;
    while (m + count < tokens && run.quantise_token(in + count * w.width * size, (float*)row.at, q, count)) count++;
    bool done = true;
    if (count) done = run.quantised(q, out, count);
    else {
      // The next token that can be quantised ends the run; it is quantised once more then.
      do count++;
      while (m + count < tokens && !run.quantise_token(in + count * w.width * size, (float*)row.at, q, 0));
      done = run.exact(in, out, count);
    }
    if (!done) return MEMORY;
    m += count;
  }
  return DONE;
}

Few matrix(int kind, int layout, int bits, i64 group, const void* values, i64 bytes, const void* codes, const i64* starts,
           const void* scales, i64 width, i32* apart) {
  const i64 columns = (width + WIDE - 1) / WIDE * WIDE;
  return {kind, layout, bits, group, (const u8*)values, (const u8*)codes, starts, scales, columns, width, bytes,
          group > 0 ? (width + group - 1) / group : 1, apart};
}

}   // namespace

extern "C" {

// Each returns an Answer. `layout`, `bits` and `group` are those of Few; `kind` is the dtype of scales, x, bias and y. The
// columns are `width`, padded; a `bias_count` below zero says that there is no bias. `exact`: x is not quantised, nor are
// more than `few` tokens.
EXPORT int sparsify_linear_few(int isa, int kind, int layout, int bits, i64 group, const void* values, i64 value_bytes,
                               const void* codes, i64 code_bytes, const i64* starts, i64 start_count, const void* scales,
                               i64 scale_count, const void* x, i64 x_count, const void* bias, i64 bias_count, void* y, i64 rows,
                               i64 width, i64 few, int exact, int threads) {
  if (width < 1 || width > MOST_COLUMNS) return SIZES;
  i32 apart = 0;
  const Few w = matrix(kind, layout, bits, group, values, value_bytes, codes, starts, scales, width, &apart);
  const Given in{x, x_count};
  if (!is_matrix(isa, w, Given{values, value_bytes}, Given{codes, code_bytes}, start_count, Given{scales, scale_count}, rows))
    return SIZES;
  if (x_count < 0 || x_count % width || !in.is(x_count)) return SIZES;
  if (bias_count >= 0 && !Given{bias, bias_count}.is(rows)) return SIZES;
  if (!stays_inside(isa, w, 0, rows)) return STARTS;
  const i64 tokens = x_count / width;
  if (!tokens || !rows) return DONE;
  if ((double)rows * (double)w.columns * (double)tokens < (1 << 16)) threads = 1;   // as in kernels.cpp
  const int answer = product(Run{w, isa, threads, rows, bias_count >= 0 ? bias : nullptr}, x, y, tokens, few, exact != 0);
  return answer == DONE && apart ? STARTS : answer;
}

// The same of a matrix whose arguments from `kind` to `scale_count` lie in `w`: they stay what they are from call to call, and
// a caller through ctypes takes as long to hand over each as a small product.
EXPORT int sparsify_linear_few_of(int isa, const i64* w, const void* x, i64 x_count, const void* bias, i64 bias_count, void* y,
                                  i64 rows, i64 width, i64 few, int exact, int threads) {
  return sparsify_linear_few(isa, (int)w[0], (int)w[1], (int)w[2], w[3], (const void*)w[4], w[5], (const void*)w[6], w[7],
                             (const i64*)w[8], w[9], (const void*)w[10], w[11], x, x_count, bias, bias_count, y, rows, width,
                             few, exact, threads);
}

// Rows [first, first + count) of `rows` back to dense [count, width], in the dtype of the scales.
EXPORT int sparsify_unpack_few(int isa, int kind, int layout, int bits, i64 group, const void* values, i64 value_bytes,
                               const void* codes, i64 code_bytes, const i64* starts, i64 start_count, const void* scales,
                               i64 scale_count, void* out, i64 out_count, i64 rows, i64 width, i64 first, i64 count, int threads) {
  if (width < 1 || width > MOST_COLUMNS) return SIZES;
  i32 apart = 0;
  const Few w = matrix(kind, layout, bits, group, values, value_bytes, codes, starts, scales, width, &apart);
  if (!is_matrix(isa, w, Given{values, value_bytes}, Given{codes, code_bytes}, start_count, Given{scales, scale_count}, rows))
    return SIZES;
  if (first < 0 || count < 0 || count > rows || first > rows - count || out_count / width < count || (count && !out)) return SIZES;
  if (!stays_inside(isa, w, first, first + count)) return STARTS;
  const i64 size = kind == F32 ? 4 : 2;
  const bool done = over_rows(count, threads, scratch_bytes(isa, w, 0), [&](i64 from, i64 to, u8* scratch) {
    for (i64 n = from; n < to; n++) {
      u8* row = (u8*)out + n * width * size;
#ifdef SPARSIFY_X86
      if (isa == AVX512) {
        if (kind == F32) unpack_few512<F32>(w, first + n, row);
        else if (kind == BF16) unpack_few512<BF16>(w, first + n, row);
        else unpack_few512<F16>(w, first + n, row);
        continue;
      }
      if (isa == AVX2) { unpack_few_avx2(w, first + n, row, scratch); continue; }
#endif
      unpack_few_scalar(w, first + n, row, scratch);
    }
  });
  return !done ? MEMORY : apart ? STARTS : DONE;
}
}
