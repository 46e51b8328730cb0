// Rounding to what is stored, ReLU and its gradient, as in kernels/precision.py.
#pragma once

#include "block.h"

namespace cibp::cuda {

struct BFloat16 {
  uint16_t bits;
};

// How numbers are stored. All sums are float32.
enum class Precision { kFloat32 = 0, kTf32 = 1, kBFloat16 = 2 };

// Bits of float32's significand that what is stored does not have.
inline int dropped_bits(Precision precision) {
  return precision == Precision::kFloat32 ? 0 : precision == Precision::kTf32 ? 13 : 16;
}

CIBP_DEVICE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

CIBP_DEVICE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

CIBP_DEVICE float to_float(float x) { return x; }
CIBP_DEVICE float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// What was rounded already; NaN stays NaN even if all of its payload is in the bits that go.
template <class T>
CIBP_DEVICE T stored(float x);
template <>
CIBP_DEVICE float stored<float>(float x) {
  return x;
}
template <>
CIBP_DEVICE BFloat16 stored<BFloat16>(float x) {
  return {static_cast<uint16_t>(x == x ? to_bits(x) >> 16 : 0x7fc0)};
}

// x to nearest without its last bits, ties to even; NaN stays, and x > 0 stays > 0.
CIBP_DEVICE float rounded(float x, int dropped) {
  if (dropped == 0 || !(x == x)) return x;
  const uint32_t unit = 1u << dropped, bits = to_bits(x);
  const uint32_t nearest = (bits + (unit / 2 - 1) + ((bits >> dropped) & 1)) & ~(unit - 1);
  return from_bits(x > 0 && nearest == 0 ? unit : nearest);
}

// m and r rounded, but m > r stays so: where they meet, r takes the next number below.
CIBP_DEVICE void round_pair(float& m, float& r, int dropped) {
  if (dropped == 0) return;
  const bool active = m > r;
  m = rounded(m, dropped);
  r = rounded(r, dropped);
  if (active && m == r) r = from_bits(to_bits(r) - (1u << dropped));
}

// ReLU; not fmaxf, which drops NaN.
CIBP_DEVICE float positive(float x) { return x <= 0 ? 0.0f : x; }

// Center and radius after ReLU, from those before it.
CIBP_DEVICE void activate(float& m, float& r) {
  if (m > r) return;
  m = r = 0.5f * positive(m + r);
}

// 1, 0 or -1; NaN of NaN.
CIBP_DEVICE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? 0.0f : x; }

}  // namespace cibp::cuda
