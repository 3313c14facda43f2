// Every kernel of one dtype (SPARSIFY_TYPE: BFloat16 or Float16), under the names that sparsify/runtime/cuda/variants.py calls.
#ifdef SPARSIFY_EMULATOR
#include "emulator.h"
#include "emulator_warpgroup.h"
#else
#include "device.h"
#include "warpgroup.h"
#endif
#include "bulk.h"
#include "decode.h"
#include "decode_integers.h"
#include "tiled.h"
#include "unpack.h"
#include "wgmma.h"
#include "wide.h"

#define DECODE(w, r, m) \
  KERNEL(decode_w##w##_r##r##_m##m, w * 32) { decode<SPARSIFY_TYPE, w, r, m>(a); }
DECODE(4, 1, 1) DECODE(4, 1, 2)
DECODE(8, 1, 1) DECODE(8, 1, 2)
DECODE(16, 1, 1) DECODE(16, 1, 2)
DECODE(8, 2, 1) DECODE(8, 2, 2)

// Bits, columns of a scale (256: the row has one) and scales of a row of a tile.
#define INTEGERS(bits, group, scales, w, m) \
  KERNEL(int##bits##g##group##_w##w##_r1_m##m, w * 32) { decode_integers<SPARSIFY_TYPE, bits, scales, w, m>(a); }
#define GROUPS(bits, w, m) \
  INTEGERS(bits, 256, 1, w, m) INTEGERS(bits, 128, 2, w, m) INTEGERS(bits, 64, 4, w, m) INTEGERS(bits, 32, 8, w, m)
GROUPS(8, 8, 1) GROUPS(8, 8, 2)
GROUPS(4, 8, 1) GROUPS(4, 8, 2)

#if HOPPER
// Depth and blocks a multiprocessor: see Variant.depth and Variant.resident.
#define BULK(w, r, m, depth, blocks) \
  RESIDENT_KERNEL(bulk_w##w##_r##r##_m##m, w * 32, blocks) { bulk<SPARSIFY_TYPE, w, r, m, depth>(a); }
BULK(8, 1, 1, 2, 2) BULK(8, 1, 2, 2, 2)
BULK(4, 1, 1, 3, 3) BULK(4, 1, 2, 3, 3)
BULK(8, 2, 1, 2, 1) BULK(8, 2, 2, 2, 1)

#define WIDE(r, m) \
  RESIDENT_KERNEL(wide_w8_r##r##_m##m, WIDE_THREADS, 1) { wide<SPARSIFY_TYPE, r, m>(a); }
WIDE(2, 4) WIDE(2, 8)
WIDE(4, 4) WIDE(4, 8)
#endif

#ifdef WARPGROUPS
// Warps, with those that copy x; depth and places: see variants.py.
#define WGMMA(w, r, m, depth, places) \
  RESIDENT_KERNEL(wgmma_w##w##_r##r##_m##m, w * 32, 1) { wgmma<SPARSIFY_TYPE, w / 4 - 1, r, m, depth, places>(a); }
WGMMA(12, 1, 8, 4, 8) WGMMA(16, 1, 8, 3, 6) WGMMA(12, 2, 8, 2, 8)
WGMMA(12, 1, 16, 3, 6) WGMMA(16, 1, 16, 2, 6) WGMMA(12, 2, 16, 2, 4)
WGMMA(12, 1, 32, 2, 4)
#endif

#define TILED(w, r, m) \
  KERNEL(tiled_w##w##_r##r##_m##m, w * 32) { tiled<SPARSIFY_TYPE, w, r, m>(a); }
TILED(4, 1, 4) TILED(4, 1, 8)
TILED(8, 1, 4) TILED(8, 1, 8)
TILED(8, 2, 4) TILED(8, 2, 8)

KERNEL(add_splits, 256) { add_splits<SPARSIFY_TYPE>(a); }
KERNEL(unpack, 32) { unpack_tile(a); }
KERNEL(unpack_int8, 32) { unpack_integers<SPARSIFY_TYPE, 8>(a); }
KERNEL(unpack_int4, 32) { unpack_integers<SPARSIFY_TYPE, 4>(a); }
