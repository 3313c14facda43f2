// The sparse tensor core as Hopper has it (compute capability 9.0 alone, compiled as sm_90a): four warps issue one product
// that runs beside them, with W from their registers and x from shared memory. tests/support/emulator_warpgroup.h offers
// the same names to a host compiler.
#pragma once
#include "device.h"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS 1

// Barrier 1, for `threads` of the block; 0 is everybody's.
template <int threads>
DEVICE void part_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory"); }

// By everyone whose copies to shared memory have arrived, before others let the tensor core read them.
DEVICE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the products of a group, for the registers that other instructions wrote.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until the products of all groups but the last `left` are done: their sums may be read, and what they read written over.
template <int left>
DEVICE void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory"); }

// x as the tensor core is told of it: rows of 128 bytes (64 columns of a token), eight of them in 1024 bytes on a boundary
// of as many, sixteen bytes of which lie at their number xor the row's; 1024 bytes from eight tokens to the next.
DEVICE u64 describe_inputs(const unsigned char* p) {
  return (u64)((shared_address(p) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define SUMS_8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// Behind the sums: four registers of W, the description of x, the codes, and which lanes hold them. Added to the sums,
// neither operand negated, x with its columns innermost.
#define WARPGROUP_MMA(n, type, names, operands)                                                                    \
  asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"                                                 \
               "wgmma.mma_async.sp.sync.aligned.m64n" #n "k32.f32." type "." type " {" names "}, " operands ", add, 1, 1, 0;\n}"
#define WARPGROUP_MMA_END : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(x), "r"(codes), "n"(pair))
#define WARPGROUP_MMAS(type)                                                                                              \
  static DEVICE void multiply(float (&c)[32], const uint4& a, u64 x, const u32& codes) {                                         \
    WARPGROUP_MMA(64, type, NAMES_32, "{%32,%33,%34,%35}, %36, %37, %38") : SUMS_32(0) WARPGROUP_MMA_END;                 \
  }                                                                                                                       \
  static DEVICE void multiply(float (&c)[64], const uint4& a, u64 x, const u32& codes) {                                         \
    WARPGROUP_MMA(128, type, NAMES_64, "{%64,%65,%66,%67}, %68, %69, %70") : SUMS_32(0), SUMS_32(32) WARPGROUP_MMA_END;   \
  }                                                                                                                       \
  static DEVICE void multiply(float (&c)[128], const uint4& a, u64 x, const u32& codes) {                                        \
    WARPGROUP_MMA(256, type, NAMES_128, "{%128,%129,%130,%131}, %132, %133, %134")                                        \
        : SUMS_32(0), SUMS_32(32), SUMS_32(64), SUMS_32(96) WARPGROUP_MMA_END;                                            \
  }

// c[64 rows, 2 n tokens] += a[64 rows, 32 columns, half of them stored] x, each warp with its 16 rows as in Sparse.
// Until the products are awaited nobody may touch the registers that they were given.
template <class T, int pair>
struct WarpgroupSparse;
template <int pair>
struct WarpgroupSparse<BFloat16, pair> {
  WARPGROUP_MMAS("bf16")
};
template <int pair>
struct WarpgroupSparse<Float16, pair> {
  WARPGROUP_MMAS("f16")
};
#endif
