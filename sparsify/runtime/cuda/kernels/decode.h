// y = x W^T + b for few tokens: bound by reading W, so W goes from memory to the tensor core without any decoding.
#pragma once
#include "fragments.h"

// A block has RT row tiles; its WARPS split the columns, and MT groups of 8 tokens share every weight that is read.
// Grid: ceil(rows / (16 RT)). Shared memory: WARPS * RT * MT * 128 floats, for the sum over warps.
template <class T, int WARPS, int RT, int MT>
DEVICE void decode(const Arguments& a) {
  SHARED(shared);
  const int lane = thread() & 31, warp = thread() >> 5, g = lane >> 2, t = lane & 3;
  const int row_tile = block_x() * RT, row_tiles = (a.rows + 15) >> 4;
  const uint4* base[RT];
  Tile now[RT], next[RT];
  int k = warp;
#pragma unroll
  for (int r = 0; r < RT; r++) {
    const int tile = row_tile + r < row_tiles ? row_tile + r : row_tiles - 1;  // past the end: read again, not stored
    base[r] = a.fragments + (u64)tile * a.tiles * TILE + lane;
    if (k < a.tiles) load_tile(now[r], base[r] + (u64)k * TILE);
  }
  float c[RT][MT][4] = {};
  for (; k < a.tiles; k += WARPS) {
    // The next tile is asked for before this one is used: a warp always has 4608 RT bytes on their way.
#pragma unroll
    for (int r = 0; r < RT; r++)
      if (k + WARPS < a.tiles) load_tile(next[r], base[r] + (u64)(k + WARPS) * TILE);
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
      const int column = k * 256 + j * 32 + t * 8;
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const int token = g + 8 * m;
        uint4 v = {0, 0, 0, 0};
        if (token < a.tokens && column < a.columns) v = load_input(a.x + (u64)token * a.columns + column);
        const uint4 b = operand_b(v, t & 1);
#pragma unroll
        for (int r = 0; r < RT; r++) multiply_chunk<T>(c[r][m], now[r], b, j);
      }
    }
#pragma unroll
    for (int r = 0; r < RT; r++) now[r] = next[r];
  }
  // The sum over warps, always in the same order.
  float* sums = reinterpret_cast<float*>(shared);
  const int each = RT * MT * 128;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[warp * each + ((r * MT + m) * 4 + i) * 32 + lane] = c[r][m][i];
  barrier();
  for (int i = thread(); i < each; i += WARPS * 32) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w * each + i];
    const int l = i & 31, q = i >> 5, part = q & 3, m = (q >> 2) % MT, r = (q >> 2) / MT;
    const int row = (row_tile + r) * 16 + (l >> 2) + 8 * (part >> 1), token = m * 8 + 2 * (l & 3) + (part & 1);
    if (row >= a.rows || token >= a.tokens) continue;
    if (a.bias) sum += T::wide(load_half(a.bias + row));
    store_half(a.y + (u64)token * a.rows + row, T::narrow(sum));
  }
}
