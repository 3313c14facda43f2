// What sparsify/runtime/cuda/kernels/warpgroup.h offers, beside emulator.h: products that four warps issue and that run
// beside them. PTX ISA, "Asynchronous warpgroup level multiply-and-accumulate operation using wgmma.mma_async.sp".
//
// A product is done when it is awaited and not before: it reads the registers that it was given there, so that a kernel
// that writes them meanwhile gets other sums, and one that reads the sums too early gets those of before. x is read
// through its description, by the bits of addresses, and must be published when the product is issued and still be the
// same when it is done.
#pragma once
#include "emulator.h"

#define WARPGROUPS 1

namespace emulator {

// Not a multiple of 1024: no kernel may count on it.
const u32 SHARED_BASE = 1024 + 128;

struct Product {
  void (*run)(Product&);
  float* c[32];
  const uint4* a[32];
  const u32* codes[32];
  u64 x;
  int tokens, pair;
  std::vector<u16> seen;
  bool same(const Product& other) const { return x == other.x && tokens == other.tokens && pair == other.pair; }
};
struct Issued {
  bool fenced = false;
  Product next;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  u64 count = 0;
};
static std::map<int, Issued> issued;
// Of each four warps, all that the first of them to come has issued.
static std::map<int, std::vector<Product>> agreed;
static u64 issued_in;

inline Issued& own_products() {
  if (issued_in != clusters_run) issued.clear(), agreed.clear(), issued_in = clusters_run;
  return issued[current >> 5];
}

// Rows of 32 columns, as the tensor core finds them; none of them may still be on its way.
inline std::vector<u16> described_inputs(u64 x, int tokens, bool issue) {
  if (x >> 62 != 1 || (x >> 49 & 7)) fail("a description of x other than with a swizzle of 128 bytes");
  const u32 start = (x & 0x3fff) << 4, stride = (x >> 32 & 0x3fff) << 4;
  std::vector<u16> found(tokens * 32);
  for (int token = 0; token < tokens; token++)
    for (int k = 0; k < 32; k += 8) {
      const u32 plain = start + token / 8 * stride + token % 8 * 128 + 2 * k, at = plain ^ (plain >> 7 & 7) << 4;
      if (at < SHARED_BASE || at - SHARED_BASE + 16 > own().bytes) fail("x described outside of shared memory");
      const unsigned char* p = own().shared + (at - SHARED_BASE);
      if (issue && own().unpublished.count(p)) fail("a product of x that was not published");
      memcpy(&found[token * 32 + k], p, 16);
    }
  return found;
}

// Sixteen rows of a warp.
template <class T>
void run_product(Product& product) {
  if (described_inputs(product.x, product.tokens, false) != product.seen) fail("x written over while a product read it");
  std::vector<float> inputs(product.seen.size());
  for (size_t i = 0; i < inputs.size(); i++) inputs[i] = T::wide(product.seen[i]);
  for (int row = 0; row < 16; row++) {
    int columns[16];
    float values[16];
    for (int stored = 0; stored < 16; stored++) {
      // Stored values 2 t, 2 t + 1 of a row lie with lane t of its four: of the rows from 8 on in the registers after,
      // those from 8 on two registers further.
      const int group = stored / 2, lane = row % 8 * 4 + stored % 8 / 2, reg = row / 8 + stored / 8 * 2;
      const u32 codes = *product.codes[row % 8 * 4 + 2 * product.pair + group / 4] >> (row / 8 * 16 + group % 4 * 4);
      if ((codes & 3) >= (codes >> 2 & 3)) fail("codes that do not ascend");
      columns[stored] = group * 4 + (codes >> (stored % 2 * 2) & 3);
      values[stored] = T::wide(half_of(*product.a[lane], reg, stored % 2));
    }
    for (int token = 0; token < product.tokens; token++) {
      float& sum = product.c[row % 8 * 4 + token % 8 / 2][token / 8 * 4 + row / 8 * 2 + token % 2];
      for (int i = 0; i < 16; i++) sum += values[i] * inputs[token * 32 + columns[i]];
    }
  }
}

template <class T>
void issue(float* c, int tokens, const uint4& a, u64 x, const u32& codes, int pair) {
  Issued& own_issued = own_products();
  Warp& warp = warps[current >> 5];
  const int lane = current & 31;
  Product& next = own_issued.next;
  if (!own_issued.fenced) fail("a product without begin_products before it");
  if (warp.wait.count == 0) next.x = x, next.tokens = tokens, next.pair = pair;
  if (next.x != x || next.tokens != tokens || next.pair != pair) fail("lanes that ask for different products");
  threads[current].products++;
  next.c[lane] = c, next.a[lane] = &a, next.codes[lane] = &codes;
  meet(warp.wait, 32, [&] {
    next.run = run_product<T>;
    next.seen = described_inputs(x, tokens, true);
    std::vector<Product>& others = agreed[current >> 7];
    if (own_issued.count == others.size()) others.push_back(next), others.back().seen.clear();
    else if (!others[own_issued.count].same(next)) fail("warps of four that ask for different products");
    own_issued.count++;
    own_issued.open.push_back(next);
  });
}

}  // namespace emulator

inline u32 shared_address(const void* p) {
  return (u32)((const unsigned char*)p - emulator::own().shared) + emulator::SHARED_BASE;
}
template <int threads>
inline void part_barrier() { emulator::meet(emulator::own().part, threads, [] {}); }
inline void publish_writes() {
  auto& self = emulator::threads[emulator::current];
  for (const unsigned char* p : self.writes) {
    auto found = emulator::own().unpublished.find(p);
    if (found != emulator::own().unpublished.end() && --found->second == 0) emulator::own().unpublished.erase(found);
  }
  self.writes.clear();
}
inline void begin_products() {
  emulator::Issued& issued = emulator::own_products();
  emulator::meet(emulator::warps[emulator::current >> 5].wait, 32, [&] { issued.fenced = true; });
}
inline void commit_products() {
  emulator::Issued& issued = emulator::own_products();
  emulator::meet(emulator::warps[emulator::current >> 5].wait, 32, [&] {
    issued.groups.push_back(issued.open);
    issued.open.clear();
    issued.fenced = false;
  });
}
template <int left>
void await_products() {
  emulator::Issued& issued = emulator::own_products();
  emulator::meet(emulator::warps[emulator::current >> 5].wait, 32, [&] {
    while (issued.groups.size() > left) {
      for (emulator::Product& product : issued.groups.front()) product.run(product);
      issued.groups.erase(issued.groups.begin());
    }
  });
  emulator::threads[emulator::current].products = issued.groups.size() + issued.open.size();
}
inline u64 describe_inputs(const unsigned char* p) {
  return (u64)(shared_address(p) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

template <class T, int pair>
struct WarpgroupSparse {
  template <int count>
  static void multiply(float (&c)[count], const uint4& a, u64 x, const u32& codes) {
    emulator::issue<T>(c, 2 * count, a, x, codes, pair);
  }
};
