// y = x W^T + b for some dozens to a few hundred tokens on Hopper's own tensor cores: the products run beside the warps
// that ask for them (warpgroup.h). W goes from shared memory to registers, as it is stored; x is read by the tensor core
// where four warps have put it.
#pragma once
#include "few_tokens.h"

#ifdef WARPGROUPS
// Warps that copy x.
const int COPIERS = 4;

// Stored groups of W that lie with lanes 4 g + 1 and 4 g + 2 change places, and their codes in the middle of each half
// word with them: then a product takes columns 0-3, 4-7, 16-19, 20-23, 8-11, 12-15, 24-27, 28-31 of a chunk in this
// order, and x is copied sixteen bytes at a time instead of eight.
DEVICE int other_lane(int lane) { return (lane & 28) | (lane & 1) << 1 | (lane >> 1 & 1); }
DEVICE u32 other_codes(u32 codes) {
  return (codes & 0xf00ff00f) | (codes & 0x00f000f0) << 4 | (codes & 0x0f000f00) >> 4;
}

// The tiles of columns of a block, each block's from another one on: all read the same x, and were all to read the same
// columns of it at once, few parts of the L2 cache would have to serve them.
struct Turn {
  int first, count, start;
  DEVICE int tile(int i) const { return first + (i + start < count ? i + start : i + start - count); }
};

// x, 64 columns of the block's tokens at a time, through PLACES in shared memory: each is `full` when the copies are
// there and `empty` when every product that reads it is done. The warps take turns, and each waits for its own copies,
// so that as many blocks of columns as there are warps are on their way.
template <int TOKENS, int PLACES>
DEVICE void copy_inputs(const Arguments& a, unsigned char* ring, Signal* full, Signal* empty, const Turn& turn, int warp) {
  // Eight lanes bring 128 bytes of a token; sixteen bytes v of a chunk become its 0th, 2nd, 1st, 3rd.
  const int lane = thread() & 31, unit = lane & 7, row = lane >> 3, token = block_x() * TOKENS + row;
  const int at = (unit & 4) | (unit & 1) << 1 | (unit >> 1 & 1), left = a.tokens - token;
  const u64 four_tokens = (u64)4 * a.columns;
  unsigned char *even = ring + row * 128 + ((at ^ row) << 4), *odd = ring + row * 128 + ((at ^ row ^ 4) << 4);
  const int blocks = turn.count * (CHUNKS / 2);
  int place = warp, phase = 1;
  for (int b = warp; b < blocks; b += COPIERS, place += COPIERS) {
    while (place >= PLACES) place -= PLACES, phase ^= 1;
    // The first time around there is nothing to wait for: phase 1 counts as the one before the first.
    if (b >= PLACES) await_signal(empty + place, phase);
    const int column = (turn.tile(b / (CHUNKS / 2)) * (CHUNKS / 2) + b % (CHUNKS / 2)) * 64 + unit * 8;
    const int tokens = column < a.columns ? left : 0;
    const u16* from = a.x + (u64)token * a.columns + column;
#pragma unroll 16
    for (int r = 0; r < TOKENS / 4; r++, from += four_tokens)
      copy_async((r & 1 ? odd : even) + place * TOKENS * 128 + r * 512, from, 4 * r < tokens);
    commit_copies();
    // Not after the next has been asked for, which was slower: products would wait for a place as well.
    await_copies<0>();
    publish_writes();
    warp_barrier();
    if (lane == 0) arrive(full + place);
  }
}

// A block has GROUPS warpgroups that sum, each warp RT row tiles, and COPIERS warps; 64 RT GROUPS rows and 8 MT tokens.
// Grid: (ceil(tokens / (8 MT)), ceil(rows / (64 RT GROUPS)), splits); the blocks of a split are one cluster. Shared
// memory: PLACES times 64 columns of x, DEPTH times RT tiles of each warp, and their signals; when all are used, the
// sums, 8 MT * (64 RT GROUPS + 4), in the same place; and 1024 bytes for a boundary of as many.
template <class T, int GROUPS, int RT, int MT, int DEPTH, int PLACES>
DEVICE void wgmma(const Arguments& a) {
  SHARED(shared);
  const int WARPS = 4 * GROUPS, TOKENS = 8 * MT, ROWS = 16 * RT * WARPS, PLACE = TOKENS * 128;
  // A step is so many chunks of one row tile; all the row tiles' steps of 64 columns follow each other.
  const int AT_ONCE = RT * MT > 16 ? 1 : 2, STEPS = RT * CHUNKS / AT_ONCE, STEPS_OF_BLOCK = RT * 2 / AT_ONCE;
  // The compiler has to see that a warp's threads agree on what the warp does.
  const int lane = thread() & 31, warp = from_lane(thread() >> 5, 0), row_tile = block_y() * WARPS * RT;
  const int first = (int)((u64)a.tiles * block_z() / a.splits), last = (int)((u64)a.tiles * (block_z() + 1) / a.splits);
  const int count = last - first;
  const Turn turn{first, count, count ? block_y() * 5 % count : 0};
  unsigned char* inputs = shared + (1024 - (shared_address(shared) & 1023) & 1023);
  unsigned char* weights = inputs + PLACES * PLACE;
  Signal* arrived = reinterpret_cast<Signal*>(weights + WARPS * DEPTH * RT * TILE_BYTES);
  Signal *full = arrived + WARPS * DEPTH, *empty = full + PLACES;
  if (thread() == 0) {
    for (int i = 0; i < WARPS * DEPTH; i++) make_signal(arrived + i);
    for (int i = 0; i < PLACES; i++) make_signal(full + i), make_signal(empty + i, WARPS);
    publish_signals();
  }
  barrier();
  // Each of the first lanes of a warp that sums brings one of its row tiles.
  const bool carrier = warp < WARPS && lane < RT;
  const uint4* base = row_tile_of(a, row_tile + warp % WARPS * RT + (carrier ? lane : 0));
  if (a.early && carrier)
    for (int i = 0; i < count && i < DEPTH; i++) prefetch(base + (u64)turn.tile(i) * TILE, TILE_BYTES);
  await_previous();

  if (warp >= WARPS) {
    copy_inputs<TOKENS, PLACES>(a, inputs, full, empty, turn, warp - WARPS);
    if (a.splits > 1) cluster_barrier(), cluster_barrier();
    return;
  }
  unsigned char* ring = weights + warp * DEPTH * RT * TILE_BYTES;
  arrived += warp * DEPTH;
  auto ask = [&](int i, int place) {
    if (i >= count) return;
    if (lane == 0) announce(arrived + place, RT * TILE_BYTES);
    warp_barrier();
    if (carrier) copy_bulk(ring + (place * RT + lane) * TILE_BYTES, base + (u64)turn.tile(i) * TILE, TILE_BYTES, arrived + place);
  };
  for (int i = 0; i < DEPTH; i++) ask(i, i);

  float c[RT][TOKENS / 2] = {};
  // Of this step and of the one before, which the tensor core may still be reading.
  uint4 values[2][AT_ONCE];
  u32 codes[2];
  int place = 0, phase = 0, x_place = 0, x_phase = 0;
  const u64 described = describe_inputs(inputs);
  // W of a step, of the tile that lies at `place`.
  auto read = [&](int step) {
    const unsigned char* tile = ring + (place * RT + step % RT) * TILE_BYTES;
    const int chunk = step / RT * AT_ONCE;
    codes[step & 1] = other_codes(load_shared_4(tile + 512 * CHUNKS + lane * 16 + chunk / 2 * 4));
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      values[step & 1][j] = load_shared(tile + 512 * (chunk + j) + other_lane(lane) * 16);
  };
  if (count) {
    await_signal(arrived, 0);
    read(0);
  }
  for (int k = 0; k < count; k++) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step % STEPS_OF_BLOCK == 0) await_signal(full + x_place, x_phase);
      begin_products();
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int chunk = step / RT * AT_ONCE + j;
        const u64 x = described + (x_place * PLACE + (chunk & 1) * 64 >> 4);
        if (chunk & 1) WarpgroupSparse<T, 1>::multiply(c[step % RT], values[step & 1][j], x, codes[step & 1]);
        else WarpgroupSparse<T, 0>::multiply(c[step % RT], values[step & 1][j], x, codes[step & 1]);
      }
      commit_products();
      if (step == STEPS - 1) {
        // All of the tile has gone to registers.
        end_reads();
        warp_barrier();
        ask(k + DEPTH, place);
        if (++place == DEPTH) place = 0, phase ^= 1;
      }
      // The products of the step before: theirs is the other half of the registers, and the place of x before this.
      await_products<1>();
      if (step % STEPS_OF_BLOCK == 0 && (k > 0 || step > 0) && lane == 0)
        arrive(empty + (x_place ? x_place : PLACES) - 1);
      if (step % STEPS_OF_BLOCK == STEPS_OF_BLOCK - 1 && ++x_place == PLACES) x_place = 0, x_phase ^= 1;
      if (step < STEPS - 1) {
        read(step + 1);
      } else if (k + 1 < count) {
        await_signal(arrived + place, phase);
        read(0);
      }
    }
  }
  await_products<0>();

  // Rows innermost, in the place of what all have read.
  const int ROW = ROWS + 4, QUADS = ROWS / 4;
  float* sums = reinterpret_cast<float*>(inputs);
  part_barrier<32 * WARPS>();
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++)
      sums[((i >> 2) * 8 + 2 * (lane & 3) + (i & 1)) * ROW + (warp * RT + r) * 16 + (lane >> 2) + 8 * (i >> 1 & 1)] = c[r][i];
  if (a.splits > 1) cluster_barrier();
  else part_barrier<32 * WARPS>();
  // The blocks of a cluster share the outputs; always in the same order.
  for (int i = block_z() * 32 * WARPS + thread(); i < TOKENS * QUADS; i += a.splits * 32 * WARPS) {
    const int token = block_x() * TOKENS + i / QUADS, row = row_tile * 16 + i % QUADS * 4;
    if (token >= a.tokens || row >= a.rows) continue;
    const float* at = sums + i / QUADS * ROW + i % QUADS * 4;
    float sum[4] = {};
    if (a.splits > 1) {
      for (int block = 0; block < a.splits; block++) {
        float four[4];
        load_four_of_block(four, at, block);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += four[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) sum[j] = at[j];
    }
    u16 out[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      out[j] = T::narrow(a.bias && row + j < a.rows ? sum[j] + T::wide(load_half(a.bias + row + j)) : sum[j]);
    u16* y = a.y + (u64)token * a.rows + row;
    if (a.rows % 4 == 0)
      store_pair(reinterpret_cast<uint2*>(y), uint2{out[0] | (u32)out[1] << 16, out[2] | (u32)out[3] << 16});
    else
      for (int j = 0; j < 4 && row + j < a.rows; j++) store_half(y + j, out[j]);
  }
  // No block may end while another reads its sums.
  if (a.splits > 1) cluster_barrier();
}
#endif
