// y = x W^T + b for few tokens, as in decode.h, with weights that the copy engine brings into shared memory. Why: a tile
// costs one instruction to ask for instead of nine loads a lane and no register while it is on its way; blocks stay, and
// go on to the next rows with the copies for them already under way, where a grid of short blocks starts and drains anew
// for every 16 rows.
#pragma once
#include "few_tokens.h"

#if HOPPER
// A block takes every blocks_x()-th group of RT row tiles; its WARPS (and the blocks of its cluster) split the columns.
// Each warp has DEPTH places for RT tiles, and a signal for each. Grid: (at most one block a group, 1, splits).
// Shared memory: WARPS * DEPTH * RT tiles, twice the sums of one round, and WARPS * DEPTH signals.
template <class T, int WARPS, int RT, int MT, int DEPTH>
DEVICE void bulk(const Arguments& a) {
  SHARED(shared);
  const int lane = thread() & 31, warp = thread() >> 5, sums_of = WARPS * RT * MT * 128;
  const int groups = (a.rows + 16 * RT - 1) / (16 * RT), first = block_z() * WARPS + warp, step = WARPS * a.splits;
  unsigned char* ring = shared + warp * DEPTH * RT * TILE_BYTES;
  float* sums = reinterpret_cast<float*>(shared + WARPS * DEPTH * RT * TILE_BYTES);
  Signal* signals = reinterpret_cast<Signal*>(sums + 2 * sums_of) + warp * DEPTH;
  if (lane == 0) {
    for (int i = 0; i < DEPTH; i++) make_signal(signals + i);
    publish_signals();
  }
  warp_barrier();
  const uint4* base[RT];
#pragma unroll
  for (int r = 0; r < RT; r++) base[r] = row_tile_of(a, block_x() * RT + r);
  start_early<RT>(a, base, first, step, DEPTH);

  // What is asked for runs DEPTH tiles ahead of what is used, on through the groups.
  int asked_group = block_x(), asked_k = first;
  auto ask = [&](int place) {
    if (asked_k >= a.tiles) return;  // all columns are there, or this warp has none at all
    if (lane == 0) {
      announce(signals + place, RT * TILE_BYTES);
#pragma unroll
      for (int r = 0; r < RT; r++)
        copy_bulk(ring + (place * RT + r) * TILE_BYTES, row_tile_of(a, asked_group * RT + r) + (u64)asked_k * TILE,
                  TILE_BYTES, signals + place);
    }
    asked_k += step;
    if (asked_k >= a.tiles && asked_group + blocks_x() < groups) asked_group += blocks_x(), asked_k = first;
  };
  for (int i = 0; i < DEPTH; i++) ask(i);

  int place = 0, phase = 0, half = 0;
  for (int group = block_x(); group < groups; group += blocks_x()) {
    float c[RT][MT][4] = {};
    for (int k = first; k < a.tiles; k += step) {
      Tile tiles[RT];
      // Inputs are asked for while the weights are still on their way.
      uint4 x[CHUNKS][MT];
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) load_inputs<MT>(a, x[j], k, j);
      await_signal(signals + place, phase);
#pragma unroll
      for (int r = 0; r < RT; r++) read_tile(tiles[r], ring + (place * RT + r) * TILE_BYTES + lane * 16);
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) multiply_inputs<T, RT, MT>(c, tiles, x[j], j);
      // The place is free again once every lane has read it. After the products, where nobody has to wait for that: the
      // tiles that are on their way are enough.
      end_reads();
      warp_barrier();
      ask(place);
      if (++place == DEPTH) place = 0, phase ^= 1;
    }
    // Two halves in turn: one barrier a round is enough for nobody to write sums that are still being read.
    add_warps<T, WARPS, RT, MT>(a, sums + half * sums_of, c, group * RT);
    half ^= 1;
  }
  if (a.splits > 1) cluster_barrier();
}
#endif
