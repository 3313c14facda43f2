// y = x W^T + b for few tokens: bound by reading W, so W goes from memory to the tensor core without any decoding.
#pragma once
#include "few_tokens.h"

// A block has RT row tiles; its WARPS split the columns, and MT groups of 8 tokens share every weight that is read.
// Grid: (ceil(rows / (16 RT)), 1, splits); the blocks of a split are one cluster. Shared memory: sums of one round.
template <class T, int WARPS, int RT, int MT>
DEVICE void decode(const Arguments& a) {
  SHARED(shared);
  const int lane = thread() & 31, warp = thread() >> 5;
  const int row_tile = block_x() * RT, step = WARPS * a.splits;
  const uint4* base[RT];
  Tile now[RT], next[RT];
  int k = block_z() * WARPS + warp;
#pragma unroll
  for (int r = 0; r < RT; r++) base[r] = row_tile_of(a, row_tile + r);
  start_early<RT>(a, base, k, step, 2);
#pragma unroll
  for (int r = 0; r < RT; r++)
    if (k < a.tiles) load_tile(now[r], base[r] + (u64)k * TILE + lane);
  float c[RT][MT][4] = {};
  for (; k < a.tiles; k += step) {
    // The next tile is asked for before this one is used: a warp always has 4608 RT bytes on their way.
#pragma unroll
    for (int r = 0; r < RT; r++)
      if (k + step < a.tiles) load_tile(next[r], base[r] + (u64)(k + step) * TILE + lane);
    // Chunk by chunk: registers are what this kernel is short of.
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      uint4 x[MT];
      load_inputs<MT>(a, x, k, j);
      multiply_inputs<T, RT, MT>(c, now, x, j);
    }
#pragma unroll
    for (int r = 0; r < RT; r++) now[r] = next[r];
  }
  add_warps<T, WARPS, RT, MT>(a, reinterpret_cast<float*>(shared), c, row_tile);
#if HOPPER
  // No block may end while another reads its sums.
  if (a.splits > 1) cluster_barrier();
#endif
}
