// What the functions of the C ABI share: memory, threads, and what callers may get wrong, looked at before a pointer moves.
#pragma once
#include "common.h"
#include "avx2.h"

#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

// A program with threads of its own, while it calls: `share` calls work(what, i) for every i below `count`, on any of them.
struct Host {
  bool (*share)(void* with, void (*work)(void*, size_t), size_t count, void* what);
  void* with;
};
inline thread_local const Host* host = nullptr;

namespace {

struct Buffer {   // aligned for whole vectors; null where there is no memory
  u8* at;
  explicit Buffer(i64 bytes) : at(nullptr) {
    void* p = nullptr;
    if (bytes && posix_memalign(&p, 64, (size_t)bytes) == 0) at = (u8*)p;
  }
  ~Buffer() { free(at); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// How many rows each of some threads takes at a time: a multiple of `unit`.
INLINE i64 piece_of(i64 rows, int threads, i64 unit) {
  return ((rows + threads * 4 - 1) / (threads * 4) + unit - 1) / unit * unit;
}

// Calls f(from, to, scratch) over all rows; false where memory ran out, or a host did not do the work. Kernels of products
// take 3 or 4 rows at a time.
template <class F> bool over_rows(i64 rows, int threads, i64 scratch_bytes, F f, i64 unit = 12) {
  bool enough = true;
  if (rows < 1) return enough;
  if (host && threads > 1) {
    struct Work { F& f; i64 rows, piece, scratch_bytes; int short_of; };
    Work all{f, rows, piece_of(rows, threads, unit), scratch_bytes, 0};
    auto one = [](void* at, size_t i) {
      Work& w = *(Work*)at;
      const i64 from = (i64)i * w.piece, to = from + w.piece < w.rows ? from + w.piece : w.rows;
      Buffer scratch(w.scratch_bytes);
      if (w.scratch_bytes && !scratch.at) __atomic_store_n(&w.short_of, 1, __ATOMIC_RELAXED);
      else w.f(from, to, scratch.at);
    };
    return host->share(host->with, one, (size_t)((rows + all.piece - 1) / all.piece), &all) && !all.short_of;
  }
#if defined(_OPENMP)
  if (threads > 1) {
    const i64 piece = piece_of(rows, threads, unit), pieces = (rows + piece - 1) / piece;
#pragma omp parallel num_threads(threads)
    {
      Buffer scratch(scratch_bytes);
      if (scratch_bytes && !scratch.at) {
#pragma omp atomic write
        enough = false;
      }
      // No thread waits for one that is slow or busy elsewhere.
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < pieces; i++)
        if (scratch.at || !scratch_bytes) f(i * piece, (i + 1) * piece < rows ? (i + 1) * piece : rows, scratch.at);
    }
    return enough;
  }
#endif
  (void)threads;
  Buffer scratch(scratch_bytes);
  if (scratch_bytes && !scratch.at) return false;
  f((i64)0, rows, scratch.at);
  return enough;
}

// Rows in fours, so that a piece of the weights stays in the first cache while all tokens pass over it.
template <class F4, class F2, class F1> inline void few_tokens(i64 tokens, i64 from, i64 to, F4 four, F2 two, F1 one) {
  for (i64 start = from; start < to; start += 4) {
    i64 stop = tokens == 1 || start + 4 > to ? to : start + 4, m = 0;
    for (; m + 4 <= tokens; m += 4) four(m, start, stop);
    for (; m + 2 <= tokens; m += 2) two(m, start, stop);
    if (m < tokens) one(m, start, stop);
    if (stop == to) return;
  }
}

inline i64 count_bits(int isa, const u32_anywhere* mask, i64 words) {
#ifdef SPARSIFY_X86
  if (isa > SCALAR) return count_bits_avx2(mask, words);
#endif
  (void)isa;
  i64 bits = 0;
  for (i64 i = 0; i < words; i++) bits += __builtin_popcount(mask[i]);
  return bits;
}

enum Answer { DONE = 0, SIZES = 1, MEMORY = 2, STARTS = 3 };

// What a caller hands over: where it lies, and how much of it there is.
struct Given {
  const void* at;
  i64 count;
  bool is(i64 wanted) const { return count == wanted && (at || !wanted); }
};

const i64 MOST_COLUMNS = (i64)1 << 40;   // so that no size overflows

// Whether one of `starts` lies below zero or above `limit`: it is, or leaves, a negative number.
INLINE bool beyond(const i64_anywhere* starts, i64 count, i64 limit) {
  u64 signs = 0;
  for (i64 i = 0; i < count; i++) signs |= (u64)starts[i] | ((u64)limit - (u64)starts[i]);
  return signs >> 63;
}

// Whether x is free of NaN and infinity.
INLINE bool finite(int kind, const void* x, i64 count) {
  u32 found = 0;
  u16 some = 0;
  if (kind == F32) {
    for (i64 i = 0; i < count; i++) found |= (((const u32_anywhere*)x)[i] & 0x7f800000) == 0x7f800000;
  } else {
    const u16 exponent = kind == BF16 ? 0x7f80 : 0x7c00;
    for (i64 i = 0; i < count; i++) some |= (((const u16_anywhere*)x)[i] & exponent) == exponent;
  }
  return !found && !some;
}

#ifdef SPARSIFY_X86
T256 inline bool beyond_avx2(const i64_anywhere* starts, i64 count, i64 limit) { return beyond(starts, count, limit); }
T256 inline bool finite_avx2(int kind, const void* x, i64 count) { return finite(kind, x, count); }
#endif

}   // namespace
