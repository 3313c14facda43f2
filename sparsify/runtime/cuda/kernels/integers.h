// The layout "fragments" of a 2:4 matrix whose values are integers of 8 or 4 bits, with scales
// (sparsify/runtime/cuda/integers.py packs it): tiles, chunks and lanes as in fragments.h, but a lane's 16 bytes are
// the values of two chunks (8 bits) or of four (4 bits). Then the codes, and then the scales of the tile: for each g a
// word for every 256 / SCALES columns, row g in its low half and row g + 8 in its high half. Scales are in the dtype of
// the inputs; where a row has only one, every tile has it (SCALES = 1).
//
// A chunk's values are those of the registers 0 .. 3 of operand A, two each:
//   8 bits: two words, of registers 0, 1 and 2, 3: bytes {first of the even one, first of the odd one, second, second};
//   4 bits: one word: nibble r is the first value of register r, nibble 4 + r its second, each with 8 added.
#pragma once
#include "fragments.h"

// Of a tile, 16 bytes each.
DEVICE int integer_units(int bits, int scales) { return (bits / 2 + 1) * 32 + 2 * scales; }

template <int BITS, int SCALES>
struct IntegerTile {
  static const int UNITS = (BITS / 2 + 1) * 32 + 2 * SCALES;
  uint4 values[BITS / 2];
  uint4 codes;
  u32 scales[SCALES];
};

// `p` points at the tile.
template <int BITS, int SCALES>
DEVICE void load_integers(IntegerTile<BITS, SCALES>& tile, const uint4* p) {
  const int lane = thread() & 31, g = lane >> 2;
#pragma unroll
  for (int i = 0; i < BITS / 2; i++) tile.values[i] = load_weights(p + 32 * i + lane);
  tile.codes = load_weights(p + 32 * (BITS / 2) + lane);
  const uint4* scales = p + 32 * (BITS / 2 + 1);
  if constexpr (SCALES >= 4) {
#pragma unroll
    for (int i = 0; i < SCALES / 4; i++) {
      const uint4 four = load_weights(scales + g * (SCALES / 4) + i);
#pragma unroll
      for (int q = 0; q < 4; q++) tile.scales[4 * i + q] = word_of(four, q);
    }
  } else {
#pragma unroll
    for (int i = 0; i < SCALES; i++)
      tile.scales[i] = load_scales(reinterpret_cast<const u32*>(scales) + g * SCALES + i);
  }
}

// Two integers in the low bytes of both halves, as numbers. The last seven bits are counted up from T::ONES, and the
// sign takes its 128 away: every step is exact in bfloat16 too, whose significand has eight bits.
template <class T>
DEVICE u32 from_bytes(u32 word) {
  return T::minus((word & 0x007f007f) | T::ONES, (word & 0x00800080) | T::ONES);
}
// The same of integers to which 8 was added, in the low nibbles.
template <class T>
DEVICE u32 from_nibbles(u32 word) {
  return T::minus((word & 0x000f000f) | T::ONES, T::ONES | 0x00080008);
}

// The lane's registers of operand A of chunk j.
template <class T, int BITS>
DEVICE uint4 operand_a(const uint4 (&values)[BITS / 2], int j) {
  if constexpr (BITS == 8) {
    const u32 first = word_of(values[j >> 1], 2 * (j & 1)), second = word_of(values[j >> 1], 2 * (j & 1) + 1);
    return {from_bytes<T>(first), from_bytes<T>(first >> 8), from_bytes<T>(second), from_bytes<T>(second >> 8)};
  } else {
    const u32 word = word_of(values[j >> 2], j & 3);
    return {from_nibbles<T>(word), from_nibbles<T>(word >> 4), from_nibbles<T>(word >> 8), from_nibbles<T>(word >> 12)};
  }
}
