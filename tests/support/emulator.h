// A cluster of blocks (mostly of one) on a CPU: what sparsify/runtime/cuda/kernels/device.h offers, under the same names, so that the
// kernels' own source runs where there is no GPU. A thread is a fiber that runs until it has to wait for others.
//
// What it checks: every global access against the buffers that it was told of; copies without a register arrive when
// they are awaited and not before, bulk ones when as many bytes as were announced are on their way, and none of these
// goes to a place that a thread has read without saying that its reads have ended; nothing but a
// prefetch touches memory before the kernel before has ended; no block of a cluster reads another's shared memory after
// that one has ended; shared memory begins as NaN and may not be written past its end; threads that wait for others who
// never come; and, run in the other order of threads, results that depend on it.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };

#define HOPPER 1
#define DEVICE inline
#define KERNEL(name, threads) extern "C" void name(const Arguments a)
#define RESIDENT_KERNEL(name, threads, blocks) KERNEL(name, threads)
#define SHARED(name) unsigned char* name = emulator::own().shared

namespace emulator {

struct Copy { unsigned char* to; const void* from; bool there; u64 bytes = 16; };
struct Wait { int count = 0; u64 round = 0; };
struct Thread {
  ucontext_t context;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  // Of shared memory: what it has read, and what its copies have written, since it said that such has ended.
  std::vector<const unsigned char*> reads, writes;
  bool done = false, waited = false;
  // Products that were asked for and not awaited.
  u64 products = 0;
  // What it waits for, if anything: it is not run before that is there.
  const Wait* meeting = nullptr;
  u64 round = 0;
  const struct Phases* signal = nullptr;
  int phase = 0;
  bool ready() const;
};
struct Buffer { const unsigned char* begin; u64 bytes; bool writable; };
struct Warp {
  Wait wait;
  uint4 a[32], b[32];
  u32 word[32];
  int lane[32];
  float c[32][4];
};

// A phase of it ends when all have arrived, and what is on its way is as much as was announced.
struct Phases {
  u64 announced = 0, on_their_way = 0;
  int expected = 1, arrivals = 0, phase = 0;
  bool published = false;
  std::vector<Copy> copies;
  bool complete() const { return arrivals == expected && on_their_way == announced; }
};
inline bool Thread::ready() const {
  if (meeting) return meeting->round != round;
  return !signal || signal->phase != phase || signal->complete();
}
struct Block {
  std::vector<unsigned char> memory;
  unsigned char* shared;
  u64 bytes;
  Wait everyone, part;
  int alive;
  std::map<const void*, Phases> signals;
  // Sixteen bytes of shared memory that were read, and the threads that may still be at it.
  std::map<const unsigned char*, std::set<int>> reading;
  // Sixteen bytes of it that copies of threads have been asked for, and that the tensor core may not read yet.
  std::unordered_map<const unsigned char*, int> unpublished;
};

static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Block> blocks;
static std::vector<std::vector<unsigned char>> stacks;
static std::vector<Buffer> buffers;
static Wait whole_cluster;
static int current, block_threads, alive, at_x, at_y, at_z, grid_x;
static u64 progress, clusters_run;
static ucontext_t scheduler;
static char failure[256];

[[noreturn]] inline void fail(const char* what) {
  snprintf(failure, sizeof failure, "%s (block %d %d %d, thread %d)", what, at_x, at_y, at_z + current / block_threads, current % block_threads);
  setcontext(&scheduler);
  abort();
}
inline Block& own() { return blocks[current / block_threads]; }
inline void yield() { swapcontext(&threads[current].context, &scheduler); }

template <class Last>
void meet(Wait& wait, int of, Last last) {
  const u64 round = wait.round;
  progress++;
  if (++wait.count == of) {
    last();
    wait.count = 0;
    wait.round++;
    return;
  }
  Thread& self = threads[current];
  self.meeting = &wait, self.round = round;
  yield();
  self.meeting = nullptr;
  progress++;
}

inline void check(const void* p, u64 bytes, bool write) {
  const unsigned char* at = (const unsigned char*)p;
  if (!threads[current].waited) fail("memory touched before the kernel before has ended");
  if ((u64)at % (bytes < 16 ? bytes : 16)) fail("access off its boundary");
  for (const Buffer& b : buffers)
    if (at >= b.begin && (u64)(at - b.begin) + bytes <= b.bytes && (b.writable || !write)) return;
  fail(write ? "write outside of every buffer" : "read outside of every buffer");
}

inline void deliver(std::vector<Copy>& copies) {
  for (const Copy& copy : copies)
    if (copy.there) memcpy(copy.to, copy.from, copy.bytes);
    else memset(copy.to, 0, copy.bytes);
  for (const Copy& copy : copies)
    if (copy.bytes <= 16) threads[current].writes.push_back(copy.to - (copy.to - own().shared) % 16);
  copies.clear();
}

}  // namespace emulator

inline int thread() { return emulator::current % emulator::block_threads; }
inline int block_x() { return emulator::at_x; }
inline int block_y() { return emulator::at_y; }
inline int block_z() { return emulator::at_z + emulator::current / emulator::block_threads; }
inline int blocks_x() { return emulator::grid_x; }
inline void barrier() { emulator::meet(emulator::own().everyone, emulator::own().alive, [] {}); }
inline void warp_barrier() { emulator::meet(emulator::warps[emulator::current >> 5].wait, 32, [] {}); }
inline void cluster_barrier() { emulator::meet(emulator::whole_cluster, emulator::threads.size(), [] {}); }
inline void await_previous() { emulator::threads[emulator::current].waited = true; }
inline void let_next_start() {}
inline void prefetch(const void* p, u32 bytes) {
  bool& waited = emulator::threads[emulator::current].waited;
  const bool before = waited;
  waited = true;
  if (bytes % 16) emulator::fail("a prefetch of other than sixteens of bytes");
  emulator::check(p, bytes, false);
  waited = before;
}
inline float load_of_block(const float* p, int rank) {
  using namespace emulator;
  if (rank >= (int)blocks.size()) fail("no such block in the cluster");
  if (blocks[rank].alive < block_threads) fail("shared memory of a block that has ended");
  float v;
  memcpy(&v, blocks[rank].shared + ((const unsigned char*)p - own().shared), 4);
  return v;
}

inline void load_four_of_block(float (&v)[4], const float* p, int rank) {
  if (((const unsigned char*)p - emulator::own().shared) % 16) emulator::fail("shared access off its boundary");
  for (int i = 0; i < 4; i++) v[i] = load_of_block(p + i, rank);
}

template <class V>
V read_checked(const void* p) {
  emulator::check(p, sizeof(V), false);
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
void write_checked(void* p, V v) {
  emulator::check(p, sizeof(V), true);
  memcpy(p, &v, sizeof v);
}
inline uint4 load_weights(const uint4* p) { return read_checked<uint4>(p); }
inline u32 load_scales(const u32* p) { return read_checked<u32>(p); }
inline uint4 load_input(const void* p) { return read_checked<uint4>(p); }
inline u16 load_half(const u16* p) { return read_checked<u16>(p); }
inline float load_float(const float* p) { return read_checked<float>(p); }
inline void store_half(u16* p, u16 v) { write_checked(p, v); }
inline void store_float(float* p, float v) { write_checked(p, v); }
inline void store_pair(uint2* p, uint2 v) { write_checked(p, v); }
template <class V>
V read_shared(const unsigned char* p) {
  if ((p - emulator::own().shared) % sizeof(V)) emulator::fail("shared access off its boundary");
  const unsigned char* sixteen = p - (p - emulator::own().shared) % 16;
  emulator::own().reading[sixteen].insert(emulator::current);
  emulator::threads[emulator::current].reads.push_back(sixteen);
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline uint4 load_shared(const unsigned char* p) { return read_shared<uint4>(p); }
inline u32 load_shared_4(const unsigned char* p) { return read_shared<u32>(p); }
inline uint2 load_shared_8(const unsigned char* p) { return read_shared<uint2>(p); }
inline void end_reads() {
  for (const unsigned char* p : emulator::threads[emulator::current].reads)
    emulator::own().reading[p].erase(emulator::current);
  emulator::threads[emulator::current].reads.clear();
}
inline uint4 load_matrices(const unsigned char* p) {
  const int own = emulator::current & 31;
  emulator::Warp& warp = emulator::warps[emulator::current >> 5];
  warp.a[own] = read_shared<uint4>(p);
  emulator::meet(warp.wait, 32, [] {});
  u32 words[4];
  for (int i = 0; i < 4; i++) memcpy(&words[i], (const char*)&warp.a[8 * i + own / 4] + own % 4 * 4, 4);
  emulator::meet(warp.wait, 32, [] {});
  return {words[0], words[1], words[2], words[3]};
}

inline void copy_async(unsigned char* to, const void* from, bool there, int bytes = 16) {
  if (there) emulator::check(from, bytes, false);
  // What is on its way must not be taken for what is there.
  memset(to, 0xff, bytes);
  emulator::own().unpublished[to - (to - emulator::own().shared) % 16]++;
  emulator::threads[emulator::current].open.push_back({to, from, there, (u64)bytes});
}
inline void copy_async_8(unsigned char* to, const void* from, bool there) { copy_async(to, from, there, 8); }
inline void commit_copies() {
  auto& self = emulator::threads[emulator::current];
  self.groups.push_back(self.open);
  self.open.clear();
}
template <int left>
void await_copies() {
  auto& groups = emulator::threads[emulator::current].groups;
  while (groups.size() > left) {
    emulator::deliver(groups.front());
    groups.erase(groups.begin());
  }
}

typedef u64 Signal;
inline void make_signal(Signal* s, int arrivals = 1) {
  if ((const unsigned char*)s - emulator::own().shared & 7) emulator::fail("a signal off its boundary");
  *s = 1;
  emulator::own().signals[s] = emulator::Phases();
  emulator::own().signals[s].expected = arrivals;
}
inline void publish_signals() {
  for (auto& one : emulator::own().signals) one.second.published = true;
}
inline emulator::Phases& signal_of(Signal* s) {
  auto found = emulator::own().signals.find(s);
  if (found == emulator::own().signals.end() || !found->second.published) emulator::fail("a signal that nobody made");
  return found->second;
}
inline void end_phase(emulator::Phases& phases) {
  emulator::deliver(phases.copies);
  phases.arrivals = 0, phases.on_their_way = phases.announced = 0, phases.phase ^= 1;
  emulator::progress++;
}
inline void announce(Signal* s, u32 bytes) {
  emulator::Phases& phases = signal_of(s);
  if (phases.arrivals == phases.expected) emulator::fail("a phase announced twice");
  phases.announced += bytes, phases.arrivals++;
  emulator::progress++;
}
inline void arrive(Signal* s) {
  emulator::Phases& phases = signal_of(s);
  if (phases.arrivals == phases.expected) emulator::fail("an arrival at a phase that was full");
  phases.arrivals++;
  emulator::progress++;
  if (phases.complete() && phases.copies.empty()) end_phase(phases);
}
inline void copy_bulk(unsigned char* to, const void* from, u32 bytes, Signal* s) {
  if (bytes % 16 || (to - emulator::own().shared) % 16) emulator::fail("a bulk copy of other than sixteens of bytes");
  emulator::check(from, bytes, false);
  auto& reading = emulator::own().reading;
  for (auto at = reading.lower_bound(to); at != reading.end() && at->first < to + bytes; ++at)
    if (!at->second.empty()) emulator::fail("a bulk copy to where a load may still read");
  memset(to, 0xff, bytes);
  emulator::Phases& phases = signal_of(s);
  phases.copies.push_back({to, from, true, bytes});
  phases.on_their_way += bytes;
  emulator::progress++;
}
inline void await_signal(Signal* s, int phase) {
  emulator::Phases& phases = signal_of(s);
  while (phases.phase == phase) {
    if (phases.complete()) {
      end_phase(phases);
    } else {
      emulator::Thread& self = emulator::threads[emulator::current];
      self.signal = &phases, self.phase = phase;
      emulator::yield();
      self.signal = nullptr;
    }
  }
}

inline u32 from_lane(u32 v, int lane) {
  const int own = emulator::current & 31;
  emulator::Warp& warp = emulator::warps[emulator::current >> 5];
  warp.word[own] = v;
  emulator::meet(warp.wait, 32, [] {});
  const u32 result = warp.word[lane];
  emulator::meet(warp.wait, 32, [] {});
  return result;
}
inline u32 from_neighbour(u32 v) { return from_lane(v, (emulator::current & 31) ^ 1); }

#include "emulator_warp.h"

struct Arguments;
namespace emulator {
typedef void (*Kernel)(const Arguments);
static Kernel kernel;
static const void* arguments;
void run_kernel();  // defined where Arguments is known
inline void fiber() {
  run_kernel();
  threads[current].done = true;
  alive--;
  own().alive--;
  progress++;
  if (!threads[current].open.empty()) fail("copies that were never committed");
  if (threads[current].products) fail("products that were never awaited");
  yield();
}

// `cluster` blocks of `count` threads.
inline bool run_cluster(int count, int cluster, u64 shared_bytes, bool backwards) {
  block_threads = count, alive = count * cluster, clusters_run++;
  blocks.assign(cluster, Block());
  for (Block& block : blocks) {
    block.memory.assign(shared_bytes + 4096 + 128, 0xff);
    block.shared = block.memory.data() + (128 - (u64)block.memory.data() % 128) % 128;
    block.alive = count, block.bytes = shared_bytes;
  }
  whole_cluster = Wait();
  threads.assign(alive, Thread());
  warps.assign(alive / 32, Warp());
  while ((int)stacks.size() < alive) stacks.emplace_back(128 << 10);
  for (int i = 0; i < alive; i++) {
    ucontext_t& context = threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].data();
    context.uc_stack.ss_size = stacks[i].size();
    context.uc_link = &scheduler;
    makecontext(&context, fiber, 0);
  }
  const int all = alive;
  while (alive > 0) {
    const u64 before = progress;
    for (int i = 0; i < all && !failure[0]; i++) {
      current = backwards ? all - 1 - i : i;
      if (!threads[current].done && threads[current].ready()) swapcontext(&scheduler, &threads[current].context);
    }
    if (failure[0]) return false;
    if (progress == before) {
      snprintf(failure, sizeof failure, "threads wait for others that never come (block %d %d %d)", at_x, at_y, at_z);
      return false;
    }
  }
  for (Block& block : blocks) {
    for (int i = 0; i < 4096; i++)
      if (block.shared[shared_bytes + i] != 0xff) {
        snprintf(failure, sizeof failure, "shared memory written past its end (block %d %d %d)", at_x, at_y, at_z);
        return false;
      }
    for (auto& one : block.signals)
      if (!one.second.copies.empty()) {
        snprintf(failure, sizeof failure, "bulk copies that nobody awaited (block %d %d %d)", at_x, at_y, at_z);
        return false;
      }
  }
  return true;
}

}  // namespace emulator
