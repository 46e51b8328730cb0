// What the forward pass saves of a layer's input for the backward pass: the images as they are, or
// rounded to bfloat16, the upper half of a float (layers.h says which, and what rounding keeps).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../parallel.h"
#include "../vec.h"
#include "layers.h"

namespace cibp {

struct BFloat16 {
  uint16_t bits;
};

using UpperHalves __attribute__((vector_size(CIBP_VECTOR_BYTES / 2))) = uint16_t;

inline Vec<float> load(const BFloat16* p) {
  UpperHalves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Vec<uint32_t> bits = __builtin_convertvector(halves, Vec<uint32_t>) << 16;
  Vec<float> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline void store(BFloat16* p, Vec<uint32_t> upper) {
  const UpperHalves halves = __builtin_convertvector(upper, UpperHalves);
  std::memcpy(p, &halves, sizeof halves);
}

// v rounded to nearest, ties to even; but NaN stays NaN, and what is above 0 above 0.
inline Vec<uint32_t> bfloat16_bits(Vec<float> v) {
  Vec<uint32_t> bits;
  std::memcpy(&bits, &v, sizeof v);
  const Vec<uint32_t> upper = bits >> 16, nearest = (bits + 0x7fff + (upper & 1)) >> 16;
  const Vec<uint32_t> positive = (nearest == 0) & (bits != 0) ? nearest + 1 : nearest;
  return v != v ? upper | 0x40 : positive;
}

// Saves the images of `count` examples.
template <class T>
void save_rounded(const Layer<T>& layer, int64_t count, const T* images, std::byte* saved) {
  if constexpr (std::is_same_v<T, float>) {
    BFloat16* to = reinterpret_cast<BFloat16*>(saved);
    const int64_t stride = layer.in.stream_stride();
    for (int64_t row = 0; row < count * layer.in.rows;
         ++row, images += S * stride, to += S * stride)
      for (int64_t i = 0; i < stride; i += kLanes<T>) {
        const Vec<T> m = load(images + i), r = load(images + stride + i);
        const Vec<uint32_t> upper_m = bfloat16_bits(m), upper_r = bfloat16_bits(r);
        store(to + i, upper_m);
        store(to + stride + i, (m > r) & (upper_m == upper_r) ? upper_r - 1 : upper_r);
        store(to + 2 * stride + i, bfloat16_bits(load(images + 2 * stride + i)));
      }
  }
}

// Calls body(images) with a pointer to what saved images consist of.
template <class T, class Body>
void with_saved(const Layer<T>& layer, const std::byte* saved, const Body& body) {
  if constexpr (std::is_same_v<T, float>)
    if (layer.rounded) return body(reinterpret_cast<const BFloat16*>(saved));
  body(reinterpret_cast<const T*>(saved));
}

// The saved images of `count` examples in T, where they are or in the thread's buffer for images.
template <class T>
const T* restore(const Layer<T>& layer, int64_t count, const std::byte* saved) {
  const T* images = nullptr;
  with_saved(layer, saved, [&](const auto* from) {
    if constexpr (std::is_same_v<decltype(from), const T*>) {
      images = from;
    } else {
      const int64_t size = count * layer.in.size();
      T* to = scratch<T>(Slot::kImages, size);
      for (int64_t i = 0; i < size; i += kLanes<T>) store<T>(to + i, load(from + i));
      images = to;
    }
  });
  return images;
}

}  // namespace cibp
