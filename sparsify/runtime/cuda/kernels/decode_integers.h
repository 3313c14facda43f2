// y = x W^T + b for few tokens, as in decode.h, of integers of 8 or 4 bits with scales: a tile is read in 5 or 3 bits a
// weight, and its values become numbers of the inputs' dtype on their way to the tensor core. That is exact, and so are
// the products: a scale is multiplied with the sum of its columns, in float32.
#pragma once
#include "few_tokens.h"
#include "integers.h"

// A block has one row tile; its WARPS split the columns, and MT groups of 8 tokens share every weight that is read.
// Grid: (ceil(rows / 16), 1, splits); the blocks of a split are one cluster. Shared memory: sums of one round.
template <class T, int BITS, int SCALES, int WARPS, int MT>
DEVICE void decode_integers(const Arguments& a) {
  SHARED(shared);
  typedef IntegerTile<BITS, SCALES> Few;
  const int lane = thread() & 31, step = WARPS * a.splits;
  const uint4* base[1] = {row_tile_of(a, block_x(), Few::UNITS)};
  Few now, next;
  int k = block_z() * WARPS + (thread() >> 5);
  start_early<1>(a, base, k, step, 2, Few::UNITS);
  if (k < a.tiles) load_integers(now, base[0] + (u64)k * Few::UNITS);
  float c[1][MT][4] = {};
  for (; k < a.tiles; k += step) {
    // The next tile is asked for before this one is used.
    if (k + step < a.tiles) load_integers(next, base[0] + (u64)(k + step) * Few::UNITS);
#pragma unroll
    for (int s = 0; s < SCALES; s++) {
      float sum[MT][4] = {};
#pragma unroll
      for (int i = 0; i < CHUNKS / SCALES; i++) {
        const int j = s * (CHUNKS / SCALES) + i;
        uint4 x[MT];
        load_inputs<MT>(a, x, k, j);
        const uint4 w = operand_a<T, BITS>(now.values, j);
        const u32 codes = word_of(now.codes, j >> 1);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const uint4 b = operand_b(x[m], lane & 1);
          if (j & 1) Sparse<T, 1>::multiply(sum[m], w, b, codes);
          else Sparse<T, 0>::multiply(sum[m], w, b, codes);
        }
      }
      const float upper = T::wide((u16)now.scales[s]), lower = T::wide((u16)(now.scales[s] >> 16));
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[0][m][i] += (i < 2 ? upper : lower) * sum[m][i];
    }
    now = next;
  }
  add_warps<T, WARPS, 1, MT>(a, reinterpret_cast<float*>(shared), c, block_x());
#if HOPPER
  // No block may end while another reads its sums.
  if (a.splits > 1) cluster_barrier();
#endif
}
