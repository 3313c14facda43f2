// The 16-bit types, and a warp's product on the sparse tensor core: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with
// .f16 and .bf16 types", lane by lane. A part of emulator.h, which includes it.
#pragma once

struct BFloat16 {
  static float wide(u16 v) {
    const u32 bits = (u32)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static u16 narrow(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fff;
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static const u32 ONES = 0x43004300;
  static u32 minus(u32 a, u32 b) {
    return narrow(wide((u16)a) - wide((u16)b)) | (u32)narrow(wide((u16)(a >> 16)) - wide((u16)(b >> 16))) << 16;
  }
};
struct Float16 {
  static float wide(u16 v) {
    _Float16 h;
    memcpy(&h, &v, 2);
    return (float)h;
  }
  static u16 narrow(float f) {
    const _Float16 h = (_Float16)f;
    u16 v;
    memcpy(&v, &h, 2);
    return v;
  }
  static const u32 ONES = 0x64006400;
  static u32 minus(u32 a, u32 b) {
    return narrow(wide((u16)a) - wide((u16)b)) | (u32)narrow(wide((u16)(a >> 16)) - wide((u16)(b >> 16))) << 16;
  }
};

namespace emulator {

inline u16 half_of(const uint4& v, int reg, int i) {
  const u32 word = reg == 0 ? v.x : reg == 1 ? v.y : reg == 2 ? v.z : v.w;
  return (u16)(word >> (16 * i));
}

// The whole warp's product, once all lanes have brought their operands.
template <class T>
void tensor_core(Warp& warp, int pair) {
  static float dense[16][32], inputs[32][8];
  memset(dense, 0, sizeof dense);
  for (int row = 0; row < 16; row++)
    for (int group = 0; group < 8; group++) {
      // Stored columns 2 t, 2 t + 1 lie in register row / 8 of lane t, those from 8 on in register row / 8 + 2.
      const int g = row % 8, at = 2 * group, reg = row / 8 + 2 * (at / 8), lane = 4 * g + at % 8 / 2;
      const u32 codes = warp.word[4 * g + 2 * pair + group / 4] >> (16 * (row / 8) + 4 * (group % 4));
      const int one = codes & 3, two = codes >> 2 & 3;
      if (one >= two) fail("codes that do not ascend");
      dense[row][4 * group + one] = T::wide(half_of(warp.a[lane], reg, 0));
      dense[row][4 * group + two] = T::wide(half_of(warp.a[lane], reg, 1));
    }
  for (int lane = 0; lane < 32; lane++)
    for (int reg = 0; reg < 4; reg++)
      for (int i = 0; i < 2; i++)
        inputs[8 * reg + 2 * (lane % 4) + i][lane / 4] = T::wide(half_of(warp.b[lane], reg, i));
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + 8 * (i / 2), token = 2 * (lane % 4) + i % 2;
      float sum = warp.c[lane][i];
      for (int k = 0; k < 32; k++) sum += dense[row][k] * inputs[k][token];
      warp.c[lane][i] = sum;
    }
}

}  // namespace emulator

template <class T, int pair>
struct Sparse {
  static void multiply(float (&c)[4], const uint4& a, const uint4& b, u32 codes) {
    const int lane = emulator::current & 31;
    emulator::Warp& warp = emulator::warps[emulator::current >> 5];
    warp.a[lane] = a, warp.b[lane] = b, warp.word[lane] = codes;
    memcpy(warp.c[lane], c, 16);
    emulator::meet(warp.wait, 32, [&] { emulator::tensor_core<T>(warp, pair); });
    memcpy(c, warp.c[lane], 16);
    emulator::meet(warp.wait, 32, [] {});
  }
};
