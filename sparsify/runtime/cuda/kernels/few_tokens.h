// What the kernels for few tokens share: a tile of W times the inputs, and the sum over the warps that split its columns.
#pragma once
#include "fragments.h"

// The first chunk of a row of tiles; of the last one, past the end: read again, and not stored.
// `size`: of a tile of the layout that it is in, in units of 16 bytes.
DEVICE const uint4* row_tile_of(const Arguments& a, int tile, int size = TILE) {
  const int row_tiles = (a.rows + 15) >> 4;
  return a.fragments + (u64)(tile < row_tiles ? tile : row_tiles - 1) * a.tiles * size;
}

// Wait for the kernel before, and meanwhile have the warp's first `count` tiles of each row tile brought into L2.
template <int RT>
DEVICE void start_early(const Arguments& a, const uint4* const (&base)[RT], int k, int step, int count, int size = TILE) {
#if HOPPER
  if (a.early && (thread() & 31) == 0)
    for (int i = 0; i < count && k + i * step < a.tiles; i++)
#pragma unroll
      for (int r = 0; r < RT; r++) prefetch(base[r] + (u64)(k + i * step) * size, size * 16);
#endif
  await_previous();
}

// The lane's inputs of chunk j at columns 256 k, of MT groups of 8 tokens.
template <int MT>
DEVICE void load_inputs(const Arguments& a, uint4 (&x)[MT], int k, int j) {
  const int lane = thread() & 31, g = lane >> 2, t = lane & 3, column = k * 256 + j * 32 + t * 8;
#pragma unroll
  for (int m = 0; m < MT; m++) {
    const int token = g + 8 * m;
    x[m] = {0, 0, 0, 0};
    if (token < a.tokens && column < a.columns) x[m] = load_input(a.x + (u64)token * a.columns + column);
  }
}

// c += chunk j of RT tiles, times those inputs.
template <class T, int RT, int MT>
DEVICE void multiply_inputs(float (&c)[RT][MT][4], const Tile (&tiles)[RT], const uint4 (&x)[MT], int j) {
#pragma unroll
  for (int m = 0; m < MT; m++) {
    const uint4 b = operand_b(x[m], thread() & 1);
#pragma unroll
    for (int r = 0; r < RT; r++) multiply_chunk<T>(c[r][m], tiles[r], b, j);
  }
}

// y of the sums of all warps of a block, and of all blocks of its cluster where splits > 1, always in the same order.
// `sums`: WARPS * RT * MT * 128 floats, which nobody may write again before all have passed the next barrier.
template <class T, int WARPS, int RT, int MT>
DEVICE void add_warps(const Arguments& a, float* sums, const float (&c)[RT][MT][4], int row_tile) {
  const int lane = thread() & 31, warp = thread() >> 5, each = RT * MT * 128;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[warp * each + ((r * MT + m) * 4 + i) * 32 + lane] = c[r][m][i];
#if HOPPER
  if (a.splits > 1) cluster_barrier();
  else barrier();
#else
  barrier();
#endif
  // The blocks of a cluster share the outputs.
  for (int i = block_z() * WARPS * 32 + thread(); i < each; i += a.splits * WARPS * 32) {
    float sum = 0;
#if HOPPER
    if (a.splits > 1) {
      for (int block = 0; block < a.splits; block++)
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += load_of_block(sums + w * each + i, block);
    } else
#endif
    {
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += sums[w * each + i];
    }
    const int l = i & 31, q = i >> 5, part = q & 3, m = (q >> 2) % MT, r = (q >> 2) / MT;
    const int row = (row_tile + r) * 16 + (l >> 2) + 8 * (part >> 1), token = m * 8 + 2 * (l & 3) + (part & 1);
    if (row >= a.rows || token >= a.tokens) continue;
    if (a.bias) sum += T::wide(load_half(a.bias + row));
    store_half(a.y + (u64)token * a.rows + row, T::narrow(sum));
  }
}
