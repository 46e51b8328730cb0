// What the forward pass saves of a layer's input for the backward pass: the images as they are, or,
// of a fast layer of a float network, rounded to bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../bfloat16.h"
#include "../parallel.h"
#include "layers.h"

namespace cibp {

// Saves `count` examples' images of floats in bfloat16.
inline void save_rounded(const Geometry& g, int64_t count, const float* images, BFloat16* to) {
  const int64_t stride = g.stream_stride();
  for (int64_t row = 0; row < count * g.rows; ++row, images += S * stride, to += S * stride)
    for (int64_t i = 0; i < stride; i += kLanes<float>) {
      Vec<float> streams[S];
      load_streams(images + i, stride, streams);
      store_streams(to + i, stride, streams);
    }
}

// Calls body(images) with a pointer to what saved images consist of.
template <class E, class Body>
void with_saved(const Layer<E>& layer, const std::byte* saved, const Body& body) {
  if constexpr (std::is_same_v<E, float>)
    if (layer.rounded) return body(reinterpret_cast<const BFloat16*>(saved));
  body(reinterpret_cast<const E*>(saved));
}

// The saved images of `count` examples, where they are or, of rounded ones, in the thread's buffer
// for images.
template <class E>
const E* restore(const Layer<E>& layer, int64_t count, const std::byte* saved) {
  const E* images = nullptr;
  with_saved(layer, saved, [&](const auto* from) {
    if constexpr (std::is_same_v<decltype(from), const E*>) {
      images = from;
    } else {
      const int64_t size = count * layer.in.size();
      E* to = scratch<E>(Slot::kImages, size);
      for (int64_t i = 0; i < size; i += kLanes<E>) store<E>(to + i, numbers(from + i));
      images = to;
    }
  });
  return images;
}

}  // namespace cibp
