// Average pooling, one example at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../vec.h"
#include "layers.h"

namespace cibp {

// One average pooling of one example, as convolve_forward.
template <class E>
double pool_forward(const Layer<E>& layer, const E* in, const Layer<E>& next, E* out) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry &g = layer.in, &h = next.in;
  const T scale = T(1) / static_cast<T>(s.kernel_height * s.kernel_width);
  clear_padding(h, s.out_height, s.out_width, out);
  Vec<T> squares{};
  for (int64_t y = 0; y < s.out_height; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
        const E* corner =
            in + c +
            g.offset(y * s.stride_height - s.padding_height, x * s.stride_width - s.padding_width);
        Vec<T> streams[S] = {};
        for (int64_t ky = 0; ky < s.kernel_height; ++ky)
          for (int64_t kx = 0; kx < s.kernel_width; ++kx)
            for (int k = 0; k < S; ++k)
              streams[k] +=
                  numbers(corner + ky * g.row_stride() + kx * g.pitch + k * g.stream_stride());
        for (int k = 0; k < S; ++k) streams[k] *= scale;
        activate<E>(layer, Vec<T>{}, streams);
        store_streams(out + h.offset(y, x) + c, h.stream_stride(), streams);
        squares += streams[1] * streams[1];
      }
  return static_cast<double>(sum<T>(squares));
}

// The gradient of the pixel (y, x) of an average pooling's input, of a vector of channels.
template <class E>
void pool_gradient(const Layer<E>& layer, int64_t y, int64_t x, const E* gradient,
                   Vec<Number<E>>* streams) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry& h = layer.gradient;
  const T scale = T(1) / static_cast<T>(s.kernel_height * s.kernel_width);
  // The outputs [begin, end) in one direction that read input i.
  const auto readers = [](int64_t i, int64_t padding, int64_t kernel, int64_t stride,
                          int64_t size) {
    const int64_t last = (i + padding) / stride, over = i + padding - kernel + 1;
    return std::pair<int64_t, int64_t>(over > 0 ? ceil_div(over, stride) : 0,
                                       std::min(last + 1, size));
  };
  const auto [y0, y1] =
      readers(y, s.padding_height, s.kernel_height, s.stride_height, s.out_height);
  const auto [x0, x1] = readers(x, s.padding_width, s.kernel_width, s.stride_width, s.out_width);
  for (int k = 0; k < S; ++k) streams[k] = Vec<T>{};
  for (int64_t oy = y0; oy < y1; ++oy)
    for (int64_t ox = x0; ox < x1; ++ox)
      for (int k = 0; k < S; ++k)
        streams[k] += numbers(gradient + h.offset(oy, ox) + k * h.stream_stride());
  for (int k = 0; k < S; ++k) streams[k] *= scale;
}

// One example's input gradient; finish(pixel, channel of the vector, streams).
template <class E, class Finish>
void pool_input_gradient(const Layer<E>& layer, const E* gradient, const Finish& finish) {
  const Shape& s = layer.shape;
  for (int64_t y = 0; y < s.in_height; ++y)
    for (int64_t x = 0; x < s.in_width; ++x)
      for (int64_t c = 0; c < layer.width(); c += kLanes<E>) {
        Vec<Number<E>> streams[S];
        pool_gradient<E>(layer, y, x, gradient + c, streams);
        finish(y * s.in_width + x, c, streams);
      }
}

}  // namespace cibp
