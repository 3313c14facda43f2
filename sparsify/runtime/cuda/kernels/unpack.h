// From fragments to the dense matrix, for products that are better done dense.
#pragma once
#include "fragments.h"

// Rows [first, first + count) into y [count, columns]; columns a multiple of 4. Grid: (tiles, ceil(count / 16)); one warp.
DEVICE void unpack_tile(const Arguments& a) {
  const int lane = thread(), g = lane >> 2, t = lane & 3, k = block_x();
  Tile tile;
  await_previous();
  load_tile(tile, a.fragments + ((u64)((a.first >> 4) + block_y()) * a.tiles + k) * TILE + lane);
#pragma unroll
  for (int j = 0; j < CHUNKS; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Groups t (half 0) and t + 4 (half 1), whose codes lie with the first and the second lane of the pair.
      const u32 codes = from_lane(word_of(tile.codes, j >> 1), 4 * g + 2 * (j & 1) + half);
      const int m = t + 4 * half, column = k * 256 + j * 32 + 4 * (4 * (m & 1) + (m >> 1));
#pragma unroll
      for (int low = 0; low < 2; low++) {
        const u32 pair = word_of(tile.a[j], 2 * half + low), code = codes >> (16 * low + 4 * t);
        const u64 four = (u64)(pair & 0xffff) << (16 * (code & 3)) | (u64)(pair >> 16) << (16 * (code >> 2 & 3));
        const int row = block_y() * 16 + g + 8 * low;
        if (row < a.count && column < a.columns)
          store_pair(reinterpret_cast<uint2*>(a.y + (u64)row * a.columns + column), uint2{(u32)four, (u32)(four >> 32)});
      }
    }
}
