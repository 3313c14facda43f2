// The layout "fragments" of a 2:4 matrix [rows, columns] (sparsify/runtime/cuda/fragments.py packs it).
//
// Tiles of 16 rows and 256 columns, row tiles outermost, each 4608 contiguous bytes: 9 chunks of 32 lanes x 16 bytes.
//   chunk j = 0..7: the values of columns 32 j .. 32 j + 31, as the four registers of mma.sp.m16n8k32's operand A:
//     lane 4 g + t holds groups t and t + 4 of rows g and g + 8: {row g, group t}, {row g + 8, group t},
//     {row g, group t + 4}, {row g + 8, group t + 4}; a group is two values;
//   chunk 8: the codes, four words a lane: word q serves chunk 2 q from lanes t = 0, 1 and chunk 2 q + 1 from t = 2, 3;
//     its low half is row g, its high half row g + 8: four nibbles of groups 4 (t & 1) .. 4 (t & 1) + 3.
// Group m of a chunk is the group of four consecutive columns 4 s .. 4 s + 3 with s = 4 (m & 1) + (m >> 1): so two
// neighbouring lanes that load 16 consecutive bytes of x each have between them what both need of operand B.
#pragma once

// What every kernel is given. Unused ones are null or zero.
struct Arguments {
  const uint4* fragments;
  const u16* x;        // [tokens, columns], columns a multiple of 8, on a 16-byte boundary
  const u16* bias;     // [rows] or null
  u16* y;              // [tokens, rows]
  float* partial;      // [splits, tokens, rows], where columns are split over blocks
  int tokens, rows, columns;
  int tiles;           // of 256 columns
  int splits;          // blocks that share the columns of one row
  int early;           // whether this kernel was started before the one before it had ended
  int first, count;    // rows that unpack writes, a multiple of 16 first
  int scales;          // of a row of a tile, that unpack has of integers
};

const int CHUNKS = 8, LANE_CHUNKS = 9, TILE = LANE_CHUNKS * 32;  // a tile in units of 16 bytes
const int TILE_BYTES = TILE * 16;

struct Tile {
  uint4 a[CHUNKS];
  uint4 codes;
};

// `p` points at the lane's first chunk.
DEVICE void load_tile(Tile& tile, const uint4* p) {
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) tile.a[j] = load_weights(p + 32 * j);
  tile.codes = load_weights(p + 32 * CHUNKS);
}

// The same of a tile that was copied to shared memory.
DEVICE void read_tile(Tile& tile, const unsigned char* p) {
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) tile.a[j] = load_shared(p + 512 * j);
  tile.codes = load_shared(p + 512 * CHUNKS);
}

DEVICE u32 word_of(const uint4& v, int q) { return q == 0 ? v.x : q == 1 ? v.y : q == 2 ? v.z : v.w; }

// Eight consecutive inputs of one token, x[8 t .. 8 t + 7] of a chunk, to the lane's registers of operand B: the even
// lane of two keeps the first halves of four groups, the odd one the second halves.
DEVICE uint4 operand_b(const uint4& v, bool odd) {
  const u32 first = from_neighbour(odd ? v.x : v.y), second = from_neighbour(odd ? v.z : v.w);
  return odd ? uint4{first, second, v.y, v.w} : uint4{v.x, v.z, first, second};
}

template <class T>
DEVICE void multiply_chunk(float (&c)[4], const Tile& tile, const uint4& b, int j) {
  const u32 codes = word_of(tile.codes, j >> 1);
  if (j & 1) Sparse<T, 1>::multiply(c, tile.a[j], b, codes);
  else Sparse<T, 0>::multiply(c, tile.a[j], b, codes);
}
