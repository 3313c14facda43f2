// What the kernels need of the device: types, loads, and the sparse tensor core. Needs no header of CUDA, so that NVRTC
// compiles it where no toolkit is installed. tests/support/emulator.h offers the same names to a host compiler.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// Hopper and later have clusters of blocks, bulk copies, and kernels that start before the one before them has ended.
#define HOPPER (__CUDA_ARCH__ >= 900)

#define DEVICE __device__ __forceinline__
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name(const Arguments a)
// `blocks` of it fit on one multiprocessor.
#define RESIDENT_KERNEL(name, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Arguments a)
#define SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Weights are read once: they stay out of L1, and L2 is asked for 256 bytes at a time.
DEVICE uint4 load_weights(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}

// Scales of integers, which lie behind the weights of their tile.
DEVICE u32 load_scales(const u32* p) {
  u32 r;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}

// Inputs are read by every block: L1 keeps them for the blocks that follow on the same multiprocessor. Not the path of
// constants ("nc"), and volatile, so that no load moves above await_previous: the kernel before may still write them.
DEVICE uint4 load_input(const void* p) {
  uint4 r;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}

DEVICE u16 load_half(const u16* p) { return *p; }
DEVICE float load_float(const float* p) { return *p; }
DEVICE void store_half(u16* p, u16 v) { *p = v; }
DEVICE void store_float(float* p, float v) { *p = v; }
DEVICE void store_pair(uint2* p, uint2 v) { *p = v; }

DEVICE uint4 load_shared(const unsigned char* p) { return *reinterpret_cast<const uint4*>(p); }
DEVICE u32 load_shared_4(const unsigned char* p) { return *reinterpret_cast<const u32*>(p); }
DEVICE uint2 load_shared_8(const unsigned char* p) { return *reinterpret_cast<const uint2*>(p); }

// Four matrices of eight rows of 16 bytes; lane 8 i + r names row r of matrix i, and lane 4 g + t gets bytes 4 t .. 4 t + 3
// of each one's row g.
DEVICE uint4 load_matrices(const unsigned char* p) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"((u32)__cvta_generic_to_shared(p))
               : "memory");
  return r;
}

// 16 bytes from global to shared memory without a register on the way; zeros where there is nothing to read.
DEVICE void copy_async(unsigned char* shared, const void* global, bool there) {
  const u32 to = (u32)__cvta_generic_to_shared(shared);
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes));
}
DEVICE void copy_async_8(unsigned char* shared, const void* global, bool there) {
  const u32 to = (u32)__cvta_generic_to_shared(shared);
  const int bytes = there ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes));
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Until all copies but those of the last `left` commits are there.
template <int left>
DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(left)); }

#if HOPPER
// Until the kernel before this one on the stream has ended and what it wrote is to be seen. At once, where this kernel
// was not started early. Before it a kernel may fetch into L2 and do nothing else to memory: L2 is what all writes go
// through, so not even a weight that the kernel before has just written can be taken from there in its old state.
DEVICE void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel, if it is one that waits, may start as soon as every block has said so.
DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
// `bytes`, a multiple of 16, into L2.
DEVICE void prefetch(const void* p, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
}

// The blocks of a cluster run at the same time and read each other's shared memory.
DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// `p` lies in shared memory; the same place in block `rank` of the cluster.
DEVICE float load_of_block(const float* p, int rank) {
  u32 at;
  float r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(r) : "r"(at) : "memory");
  return r;
}

// Four neighbours of it, on a boundary of 16 bytes.
DEVICE void load_four_of_block(float (&v)[4], const float* p, int rank) {
  u32 at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(at)
               : "memory");
}

// Bulk copies: one thread asks, the copy engine writes, and a Signal in shared memory tells how far it is. Its phases
// take turns, 0 first; each ends when the bytes that were announced for it are there.
typedef u64 Signal;
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// A phase takes so many arrivals.
DEVICE void make_signal(Signal* s, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(s)), "r"(arrivals) : "memory");
}
// Without bytes to wait for.
DEVICE void arrive(Signal* s) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(s)) : "memory");
}
// By who made them, before others use them.
DEVICE void publish_signals() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void announce(Signal* s, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(s)), "r"(bytes) : "memory");
}
// Both on a boundary of 16 bytes, and `bytes` a multiple of it.
DEVICE void copy_bulk(unsigned char* to, const void* from, u32 bytes, Signal* s) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(s))
               : "memory");
}
// By everyone who has read shared memory, before a barrier behind which a bulk copy writes over it. The copy engine
// waits for no load: a load that was only issued, and waits in its queue, would get the new bytes. It happened, with
// 16 tokens' inputs in that queue (an H200, 2026-11-27).
DEVICE void end_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A signal that never comes ends the kernel with an error rather than the GPU's usefulness to everybody.
DEVICE void await_signal(Signal* s, int phase) {
  u32 done = 0;
  for (u32 tries = 0; !done; tries++) {
    asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(s)), "r"(phase)
                 : "memory");
    if (tries == 1u << 22) __trap();
  }
}
#else
DEVICE void await_previous() {}
DEVICE void let_next_start() {}
#endif

DEVICE u32 from_neighbour(u32 v) { return __shfl_xor_sync(0xffffffffu, v, 1); }
DEVICE u32 from_lane(u32 v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

struct BFloat16 {
  static DEVICE float wide(u16 v) { return __uint_as_float((u32)v << 16); }
  static DEVICE u16 narrow(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
  }
  // Two numbers of it in which the last seven bits count ones: 128 and more.
  static const u32 ONES = 0x43004300;
  // Both halves of a - b.
  static DEVICE u32 minus(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return r;
  }
};

struct Float16 {
  static DEVICE float wide(u16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
  }
  static DEVICE u16 narrow(float v) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
  }
  // 1024 and more.
  static const u32 ONES = 0x64006400;
  static DEVICE u32 minus(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
};

#define MMA_SP(type)                                                                                            \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type ".f32 "              \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"                        \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(codes), "n"(pair))

// c[16 rows, 8 tokens] += a[16 rows, 32 columns, half of them stored] b[32 columns, 8 tokens].
// pair: which lanes of each four hold the codes, 0: the first two, 1: the last two.
template <class T, int pair>
struct Sparse;
template <int pair>
struct Sparse<BFloat16, pair> {
  static DEVICE void multiply(float (&c)[4], const uint4& a, const uint4& b, u32 codes) { MMA_SP("bf16"); }
};
template <int pair>
struct Sparse<Float16, pair> {
  static DEVICE void multiply(float (&c)[4], const uint4& a, const uint4& b, u32 codes) { MMA_SP("f16"); }
};
