// y = x W^T + b for some dozens to hundreds of tokens: rows share what is read of x, tokens what is read of W.
#pragma once
#include "fragments.h"

// A row of x in shared memory: 256 columns, and 64 bytes so that two neighbouring tokens lie in different banks.
const int STAGE_ROW = 576;

// Let `to` receive columns 256 k .. 256 k + 255 of the block's tokens.
template <int WARPS, int MT>
DEVICE void stage_inputs(const Arguments& a, unsigned char* to, int token0, int k) {
#pragma unroll
  for (int i = thread(); i < MT * 8 * 32; i += WARPS * 32) {
    const int token = token0 + (i >> 5), column = k * 256 + (i & 31) * 8;
    const bool there = token < a.tokens && column < a.columns;
    copy_async(to + (i >> 5) * STAGE_ROW + (i & 31) * 16, there ? a.x + (u64)token * a.columns + column : a.x, there);
  }
}

// A block has 16 RT WARPS rows (each warp RT row tiles of its own) and 8 MT tokens.
// Grid: (ceil(tokens / (8 MT)), ceil(rows / (16 RT WARPS)), splits): blocks that read the same weights run together.
// Shared memory: 2 * 8 MT * STAGE_ROW bytes. With splits > 1 the sums go to a.partial, and add_splits makes y of them.
template <class T, int WARPS, int RT, int MT>
DEVICE void tiled(const Arguments& a) {
  SHARED(shared);
  const int lane = thread() & 31, warp = thread() >> 5, g = lane >> 2, t = lane & 3;
  const int token0 = block_x() * MT * 8, row_tile = (block_y() * WARPS + warp) * RT, row_tiles = (a.rows + 15) >> 4;
  const int first = (int)((u64)a.tiles * block_z() / a.splits), last = (int)((u64)a.tiles * (block_z() + 1) / a.splits);
  const int stage = MT * 8 * STAGE_ROW;
  const uint4* base[RT];
  Tile now[RT], next[RT];
#if HOPPER
  if (a.early && lane == 0 && first < last)
#pragma unroll
    for (int r = 0; r < RT; r++)
      if (row_tile + r < row_tiles)
        prefetch(a.fragments + ((u64)(row_tile + r) * a.tiles + first) * TILE, TILE_BYTES);
#endif
  await_previous();
  // The sum of the splits waits for all of this in any case.
  if (a.splits > 1) let_next_start();
  if (first < last) stage_inputs<WARPS, MT>(a, shared, token0, first);
  commit_copies();
#pragma unroll
  for (int r = 0; r < RT; r++) {
    const int tile = row_tile + r < row_tiles ? row_tile + r : row_tiles - 1;
    base[r] = a.fragments + (u64)tile * a.tiles * TILE + lane;
    if (first < last) load_tile(now[r], base[r] + (u64)first * TILE);
  }
  float c[RT][MT][4] = {};
  for (int k = first; k < last; k++) {
    const unsigned char* inputs = shared + ((k - first) & 1) * stage;
    if (k + 1 < last) {
      stage_inputs<WARPS, MT>(a, shared + ((k + 1 - first) & 1) * stage, token0, k + 1);
#pragma unroll
      for (int r = 0; r < RT; r++) load_tile(next[r], base[r] + (u64)(k + 1) * TILE);
    }
    commit_copies();
    await_copies<1>();
    barrier();
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const uint4 b = operand_b(load_shared(inputs + (g + 8 * m) * STAGE_ROW + j * 64 + t * 16), t & 1);
#pragma unroll
        for (int r = 0; r < RT; r++) multiply_chunk<T>(c[r][m], now[r], b, j);
      }
    // Nobody may overwrite these inputs before all have read them.
    barrier();
#pragma unroll
    for (int r = 0; r < RT; r++) now[r] = next[r];
  }
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = (row_tile + r) * 16 + g + 8 * (i >> 1), token = token0 + m * 8 + 2 * t + (i & 1);
        if (row >= a.rows || token >= a.tokens) continue;
        const u64 at = (u64)token * a.rows + row;
        if (a.splits > 1) {
          store_float(a.partial + (u64)block_z() * a.tokens * a.rows + at, c[r][m][i]);
          continue;
        }
        const float bias = a.bias ? T::wide(load_half(a.bias + row)) : 0.f;
        store_half(a.y + at, T::narrow(c[r][m][i] + bias));
      }
}

// y of the sums of all splits, always in the same order. Grid: ceil(tokens * rows / 256).
template <class T>
DEVICE void add_splits(const Arguments& a) {
  await_previous();
  const u64 i = (u64)block_x() * 256 + thread(), all = (u64)a.tokens * a.rows;
  if (i >= all) return;
  float sum = 0;
  for (int s = 0; s < a.splits; s++) sum += load_float(a.partial + s * all + i);
  if (a.bias) sum += T::wide(load_half(a.bias + i % a.rows));
  store_half(a.y + i, T::narrow(sum));
}
