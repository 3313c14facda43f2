// From fragments to the dense matrix, for products that are better done dense.
#pragma once
#include "integers.h"

// Two values of the group of four at `column`, of which the nibble `code` says which two.
DEVICE void store_group(const Arguments& a, int row, int column, u32 pair, u32 code) {
  const u64 four = (u64)(pair & 0xffff) << (16 * (code & 3)) | (u64)(pair >> 16) << (16 * (code >> 2 & 3));
  if (row < a.count && column < a.columns)
    store_pair(reinterpret_cast<uint2*>(a.y + (u64)row * a.columns + column), uint2{(u32)four, (u32)(four >> 32)});
}

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
        store_group(a, block_y() * 16 + g + 8 * low, column, word_of(tile.a[j], 2 * half + low), codes >> (16 * low + 4 * t));
      }
    }
}

// The same of integers: each times its scale, rounded once.
template <class T, int BITS>
DEVICE void unpack_integers(const Arguments& a) {
  const int lane = thread(), g = lane >> 2, t = lane & 3, k = block_x(), size = integer_units(BITS, a.scales);
  const uint4* tile = a.fragments + ((u64)((a.first >> 4) + block_y()) * a.tiles + k) * size;
  const u32* scales = reinterpret_cast<const u32*>(tile + (BITS / 2 + 1) * 32) + g * a.scales;
  uint4 values[BITS / 2];
  await_previous();
#pragma unroll
  for (int i = 0; i < BITS / 2; i++) values[i] = load_weights(tile + 32 * i + lane);
  const uint4 words = load_weights(tile + 32 * (BITS / 2) + lane);
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) {
    const uint4 operand = operand_a<T, BITS>(values, j);
    const u32 scale = load_scales(scales + (j * a.scales >> 3));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 codes = from_lane(word_of(words, j >> 1), 4 * g + 2 * (j & 1) + half);
      const int m = t + 4 * half, column = k * 256 + j * 32 + 4 * (4 * (m & 1) + (m >> 1));
#pragma unroll
      for (int low = 0; low < 2; low++) {
        const u32 pair = word_of(operand, 2 * half + low);
        const float times = T::wide((u16)(scale >> (16 * low)));
        // Zero times a negative scale is -0.0, to which adding zero gives 0.0.
        const u32 first = T::narrow(T::wide((u16)pair) * times + 0.0f), second = T::narrow(T::wide((u16)(pair >> 16)) * times + 0.0f);
        store_group(a, block_y() * 16 + g + 8 * low, column, first | second << 16, codes >> (16 * low + 4 * t));
      }
    }
  }
}
