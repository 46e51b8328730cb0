// The input gradient of a first layer of few channels, which would fill little of a vector: lanes
// are its taps and channels. So what one output gives to all inputs that it reads is computed, as
// products with the transposed weights, and added to them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../parallel.h"
#include "../tile.h"
#include "../vec.h"
#include "layers.h"

namespace cibp {

// Lanes of a layer's taps and channels.
template <class T>
int64_t scatter_lanes(const Shape& s) {
  return round_up(s.kernel_height * s.kernel_width * s.in_channels, kLanes<T>);
}

// Whether that takes less than half of the products.
template <class T>
bool scatters(const Shape& s) {
  return 2 * scatter_lanes<T>(s) <=
         s.kernel_height * s.kernel_width * round_up(s.in_channels, kLanes<T>);
}

// A block of the panel: for each output a vector block of (tap, channel).
template <class T>
void pack_scatter(const Shape& s, const T* weight, int64_t block, T* panel) {
  const int64_t taps = s.kernel_height * s.kernel_width, first = block * kBlock<T>;
  const int64_t n = std::min(scatter_lanes<T>(s) - first, kBlock<T>);
  panel += first * s.out_channels;
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t tap = (first + i) / s.in_channels, c = (first + i) % s.in_channels;
      *panel++ = tap < taps ? weight[(o * s.in_channels + c) * taps + tap] : T{0};
    }
}

// Where the gradient of one example's input is added up: [row][stream][column][channel], with the
// padding around it, and a vector more, which may be read and written.
struct ScatterImage {
  int64_t rows, columns, channels;
  explicit ScatterImage(const Shape& s)
      : rows(std::max(
            (s.out_height - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1,
            s.in_height + s.padding_height)),
        columns(std::max(
            (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1,
            s.in_width + s.padding_width)),
        channels(s.in_channels) {}
  int64_t stream_stride() const { return columns * channels; }
  int64_t row_stride() const { return S * stream_stride(); }
  int64_t size() const { return rows * row_stride(); }
};

// Adds `count` numbers to those at `to`; reads and writes whole vectors.
template <class T>
inline void add_some(const T* from, int64_t count, T* to) {
  Vec<Bits<T>> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> added = lane < static_cast<Bits<T>>(count - i) ? load(from + i) : Vec<T>{};
    store<T>(to + i, load(to + i) + added);
  }
}

// gradient: of the outputs of one example. image: [ScatterImage::size() + kLanes].
template <class E>
void scatter_input_gradient(const Layer<E>& layer, const Number<E>* panels,
                            const Number<E>* gradient, Number<E>* image) {
  using T = Number<E>;
  constexpr int P = kTilePixels<S>, L = kLanes<T>;
  const Shape& s = layer.shape;
  const ScatterImage to(s);
  const int64_t lanes = scatter_lanes<T>(s), stride = layer.gradient.stream_stride();
  const int64_t pixels = s.out_height * s.out_width;
  const bool together = s.dilation_width == 1;  // the taps of a row are neighbours
  const int64_t runs = together ? s.kernel_height : s.kernel_height * s.kernel_width;
  const int64_t run = (together ? s.kernel_width : 1) * s.in_channels;
  // past the last of a stream's numbers whole vectors are read
  T* const product = scratch<T>(Slot::kProduct, P * S * lanes + L);
  std::fill_n(image, to.size() + L, T{0});
  for (int64_t first = 0; first < pixels; first += P) {
    int64_t sources[P], targets[P];
    for (int t = 0; t < P; ++t) {
      targets[t] = std::min(first + t, pixels - 1);
      sources[t] = layer.gradient_offsets[static_cast<size_t>(targets[t])];
    }
    for_blocks<T>(lanes, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const Run all{0, 0, s.out_channels};
      multiply<T, S, V>(gradient, sources, stride, &all, 1,
                        panels + layer.backward_panel + c * s.out_channels, targets, nullptr,
                        layer.points, [&](int t, int v, const Vec<T>* sums) {
                          for (int k = 0; k < S; ++k)
                            store<T>(product + (t * S + k) * lanes + c + v * L, sums[k]);
                        });
    });
    for (int64_t t = 0; t < std::min<int64_t>(P, pixels - first); ++t) {
      const int64_t y = targets[t] / s.out_width * s.stride_height,
                    x = targets[t] % s.out_width * s.stride_width;
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t ky = together ? r : r / s.kernel_width,
                      kx = together ? 0 : r % s.kernel_width;
        T* const corner = image + (y + ky * s.dilation_height) * to.row_stride() +
                          (x + kx * s.dilation_width) * to.channels;
        for (int k = 0; k < S; ++k)
          add_some(product + (t * S + k) * lanes + r * run, run, corner + k * to.stream_stride());
      }
    }
  }
}

}  // namespace cibp
