// Tile registers in portable C++: slow, run anywhere, bit for bit what AMX-BF16 gives. For tests.
#pragma once

#include <cstdint>
#include <cstring>

namespace ffmerge {
namespace {

struct EmulatedTiles {
  void begin() {}
  void end() {}

  template <int kTile>
  void zero() {
    std::memset(tile[kTile], 0, sizeof(tile[kTile]));
  }
  template <int kTile>
  void load(const void* from, int64_t stride = 64) {
    for (int row = 0; row < 16; ++row) std::memcpy(tile[kTile][row], static_cast<const char*>(from) + row * stride, 64);
  }
  template <int kTile>
  void store(void* to) {
    std::memcpy(to, tile[kTile], sizeof(tile[kTile]));
  }

  // Intel's definition of TDPBF16PS: even and odd tokens are summed apart, in order, then added to each other and to
  // the result; subnormal inputs and results count as 0; products of bfloat16 are exact in float32.
  template <int kSum, int kLeft, int kRight>
  void dpbf16ps() {
    for (int m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        const float left_even = flushed(tile[kLeft][m][k] << 16), left_odd = flushed(tile[kLeft][m][k] & 0xffff0000u);
        for (int n = 0; n < 16; ++n) {
          const uint32_t right = tile[kRight][k][n];
          even[n] = flushed(even[n] + flushed(left_even * flushed(right << 16)));
          odd[n] = flushed(odd[n] + flushed(left_odd * flushed(right & 0xffff0000u)));
        }
      }
      for (int n = 0; n < 16; ++n) {
        const float sum = flushed(flushed(tile[kSum][m][n]) + flushed(even[n] + odd[n]));
        std::memcpy(&tile[kSum][m][n], &sum, 4);
      }
    }
  }

  static float flushed(uint32_t bits) {
    float x;
    bits = bits & 0x7f800000u ? bits : bits & 0x80000000u;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static float flushed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return flushed(bits);
  }

  uint32_t tile[8][16][16];
};

}  // namespace
}  // namespace ffmerge
