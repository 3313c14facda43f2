// y = x W^T + b for some dozens to a few hundred tokens on Hopper: weights come by bulk copies, inputs lie in shared
// memory as the tensor core takes them, and the blocks of a cluster split the columns and add up through each other's
// shared memory. Why beside tiled.h: no shuffle on the way to operand B and four row tiles for each that is read (both
// kernels are bound by the path to shared memory), and no second kernel for the sums.
#pragma once
#include "few_tokens.h"

#if HOPPER
// Warps of a block: four take rows of their own, and two of them half of a tile's chunks each.
const int WIDE_ROWS = 4, WIDE_HALVES = 2, WIDE_THREADS = 32 * WIDE_ROWS * WIDE_HALVES;
// A row of x in shared memory: 256 columns, and 16 bytes so that eight neighbouring tokens lie in different banks.
const int WIDE_STAGE_ROW = 528;

// Let `to` receive columns 256 k .. 256 k + 255 of the block's tokens. In each chunk of 32 columns, four columns s of
// eight go to where load_matrices takes them for operand B: matrix s & 3, first or second half of its row (fragments.h
// says which columns belong to a group of the chunk).
template <int MT>
DEVICE void stage_permuted(const Arguments& a, unsigned char* to, int token0, int k) {
#pragma unroll
  for (int i = thread(); i < MT * 8 * 64; i += WIDE_THREADS) {
    const int token = token0 + (i >> 6), column = k * 256 + (i & 63) * 4, s = i & 7;
    const bool there = token < a.tokens && column < a.columns;
    copy_async_8(to + (i >> 6) * WIDE_STAGE_ROW + ((i & 63) >> 3) * 64 + (s & 3) * 16 + (s >> 2) * 8,
                 there ? a.x + (u64)token * a.columns + column : a.x, there);
  }
}

// A block has 64 RT rows and 8 MT tokens. Grid: (ceil(tokens / (8 MT)), ceil(rows / (64 RT)), splits); the blocks of a
// split are one cluster. Shared memory: two stages of 4 RT tiles and 8 MT rows of x, and a signal for each; when all
// are used, WIDE_HALVES * 8 MT * (64 RT + 4) sums in the same place.
template <class T, int RT, int MT>
DEVICE void wide(const Arguments& a) {
  SHARED(shared);
  const int WEIGHTS = WIDE_ROWS * RT * TILE_BYTES, STAGE = WEIGHTS + MT * 8 * WIDE_STAGE_ROW;
  const int lane = thread() & 31, warp = thread() >> 5, row_warp = warp % WIDE_ROWS, half = warp / WIDE_ROWS;
  const int token0 = block_x() * MT * 8, row_tile = block_y() * WIDE_ROWS * RT;
  const int first = (int)((u64)a.tiles * block_z() / a.splits), last = (int)((u64)a.tiles * (block_z() + 1) / a.splits);
  Signal* signals = reinterpret_cast<Signal*>(shared + 2 * STAGE);
  if (thread() == 0) {
    make_signal(signals), make_signal(signals + 1);
    publish_signals();
  }
  barrier();
  // Each of the first lanes of warp 0 brings one row tile.
  const bool carrier = warp == 0 && lane < WIDE_ROWS * RT;
  const uint4* base = row_tile_of(a, row_tile + (carrier ? lane : 0));
  if (a.early && carrier)
    for (int k = first; k < last && k < first + 2; k++) prefetch(base + (u64)k * TILE, TILE_BYTES);
  await_previous();
  auto ask = [&](int k, int place) {
    if (k < last) {
      unsigned char* stage = shared + place * STAGE;
      if (warp == 0) {
        if (lane == 0) announce(signals + place, WEIGHTS);
        warp_barrier();
        if (carrier) copy_bulk(stage + lane * TILE_BYTES, base + (u64)k * TILE, TILE_BYTES, signals + place);
      }
      stage_permuted<MT>(a, stage + WEIGHTS, token0, k);
    }
    commit_copies();
  };
  ask(first, 0);
  ask(first + 1, 1);

  float c[RT][MT][4] = {};
  int place = 0, phase = 0;
  for (int k = first; k < last; k++) {
    const unsigned char* weights = shared + place * STAGE + row_warp * RT * TILE_BYTES;
    const unsigned char* inputs = shared + place * STAGE + WEIGHTS + (lane & 7) * WIDE_STAGE_ROW + (lane >> 3) * 16;
    await_copies<1>();
    barrier();
    await_signal(signals + place, phase);
    uint2 codes[RT];
#pragma unroll
    for (int r = 0; r < RT; r++)
      codes[r] = load_shared_8(weights + r * TILE_BYTES + 512 * CHUNKS + lane * 16 + half * 8);
#pragma unroll
    for (int j = 0; j < CHUNKS / WIDE_HALVES; j++) {
      const int chunk = half * (CHUNKS / WIDE_HALVES) + j;
      uint4 values[RT];
#pragma unroll
      for (int r = 0; r < RT; r++) values[r] = load_shared(weights + r * TILE_BYTES + 512 * chunk + lane * 16);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const uint4 b = load_matrices(inputs + m * 8 * WIDE_STAGE_ROW + chunk * 64);
#pragma unroll
        for (int r = 0; r < RT; r++) {
          const u32 word = j < 2 ? codes[r].x : codes[r].y;
          if (j & 1) Sparse<T, 1>::multiply(c[r][m], values[r], b, word);
          else Sparse<T, 0>::multiply(c[r][m], values[r], b, word);
        }
      }
    }
    // The place is free again once every thread has read it.
    end_reads();
    barrier();
    ask(k + 2, place);
    if (++place == 2) place = 0, phase ^= 1;
  }

  // The sums of each half of the warps, rows innermost: neighbouring threads write neighbouring outputs.
  const int ROW = 64 * RT + 4, each = MT * 8 * ROW;
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[half * each + (m * 8 + 2 * (lane & 3) + (i & 1)) * ROW + (row_warp * RT + r) * 16 + (lane >> 2) +
             8 * (i >> 1)] = c[r][m][i];
  if (a.splits > 1) cluster_barrier();
  else barrier();
  // The blocks of a cluster share the outputs; always in the same order.
  for (int i = block_z() * WIDE_THREADS + thread(); i < MT * 8 * 64 * RT; i += a.splits * WIDE_THREADS) {
    const int token = i / (64 * RT), row = i % (64 * RT);
    if (row_tile * 16 + row >= a.rows || token0 + token >= a.tokens) continue;
    const float* at = sums + token * ROW + row;
    float sum = 0;
    if (a.splits > 1)
      for (int block = 0; block < a.splits; block++) sum += load_of_block(at, block) + load_of_block(at + each, block);
    else sum = at[0] + at[each];
    if (a.bias) sum += T::wide(load_half(a.bias + row_tile * 16 + row));
    store_half(a.y + (u64)(token0 + token) * a.rows + row_tile * 16 + row, T::narrow(sum));
  }
  // No block may end while another reads its sums.
  if (a.splits > 1) cluster_barrier();
}
#endif
