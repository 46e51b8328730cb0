// Convolutions with a kernel for each channel, one example at a time; planned as pooling is.
#pragma once

#include <cstdint>
#include <vector>

#include "../tile.h"
#include "../vec.h"
#include "layers.h"

namespace cibp {

// The weights [channels, 1, height, width] as [tap][channel], padded by zeros.
template <class E>
std::vector<Number<E>> depthwise_panel(const Layer<E>& layer, const Number<E>* weight) {
  const int64_t taps = layer.shape.kernel_height * layer.shape.kernel_width;
  std::vector<Number<E>> panel(static_cast<size_t>(taps * layer.width()));
  for (int64_t c = 0; c < layer.shape.out_channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap)
      panel[static_cast<size_t>(tap * layer.width() + c)] = weight[c * taps + tap];
  return panel;
}

// Where what the first tap of output (y, x) reads lies in the input.
template <class E>
int64_t depthwise_corner(const Layer<E>& layer, int64_t y, int64_t x) {
  const Shape& s = layer.shape;
  return layer.in.offset(y * s.stride_height - s.padding_height,
                         x * s.stride_width - s.padding_width);
}

// body(tap, how far what it reads is from that).
template <class E, class Body>
[[gnu::always_inline]] inline void for_taps(const Layer<E>& layer, const Body& body) {
  const Shape& s = layer.shape;
  const int64_t down = s.dilation_height * layer.in.row_stride(),
                right = s.dilation_width * layer.in.pitch;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky)
    for (int64_t kx = 0; kx < s.kernel_width; ++kx)
      body(ky * s.kernel_width + kx, ky * down + kx * right);
}

// One layer of one example, as convolve_forward; returns the sum of r^2.
template <class E>
double depthwise_forward(const Layer<E>& layer, const Number<E>* panel, const Number<E>* bias,
                         const E* in, const Layer<E>& next, E* out) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry &g = layer.in, &h = next.in;
  const int64_t stride = g.stream_stride();
  Vec<T> squares{};
  for (int64_t y = 0; y < s.out_height; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
        const E* const corner = in + depthwise_corner(layer, y, x) + c;
        Vec<T> streams[S] = {};
        for_taps(layer, [&](int64_t tap, int64_t apart) {
          const Vec<T> w = load(panel + tap * layer.width() + c);
          const E* const p = corner + apart;
          streams[0] += w * numbers(p);
          streams[1] += absolute<T>(w) * numbers(p + stride);
          streams[2] += w * numbers(p + 2 * stride);
        });
        activate<E>(layer, load(bias + c), streams);
        store_streams(out + h.offset(y, x) + c, h.stream_stride(), streams);
        squares += streams[1] * streams[1];
      }
  return static_cast<double>(sum<T>(squares));
}

// One example's input gradient; finish(pixel, channel of the vector, streams).
template <class E, class Finish>
void depthwise_input_gradient(const Layer<E>& layer, const Number<E>* panel, const E* gradient,
                              const Finish& finish) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry& h = layer.gradient;
  const int64_t stride = h.stream_stride();
  struct Reader {  // an output that reads the pixel, by a tap
    int64_t tap, offset;
  };
  std::vector<Reader> readers;
  // The output in one direction that reads input i by tap k, or -1.
  const auto output = [](int64_t i, int64_t k, int64_t padding, int64_t dilation, int64_t step,
                         int64_t size) {
    const int64_t from = i + padding - k * dilation;
    return from >= 0 && from % step == 0 && from / step < size ? from / step : -1;
  };
  for (int64_t y = 0; y < s.in_height; ++y)
    for (int64_t x = 0; x < s.in_width; ++x) {
      readers.clear();
      for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
        const int64_t oy =
            output(y, ky, s.padding_height, s.dilation_height, s.stride_height, s.out_height);
        for (int64_t kx = 0; oy >= 0 && kx < s.kernel_width; ++kx) {
          const int64_t ox =
              output(x, kx, s.padding_width, s.dilation_width, s.stride_width, s.out_width);
          if (ox >= 0) readers.push_back({ky * s.kernel_width + kx, h.offset(oy, ox)});
        }
      }
      for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
        Vec<T> streams[S] = {};
        for (const Reader& reader : readers) {
          const Vec<T> w = load(panel + reader.tap * layer.width() + c);
          const E* const p = gradient + reader.offset + c;
          streams[0] += w * numbers(p);
          streams[1] += absolute<T>(w) * numbers(p + stride);
          streams[2] += w * numbers(p + 2 * stride);
        }
        finish(y * s.in_width + x, c, streams);
      }
    }
}

// The gradients of weights and biases: sums over the examples, by parts of the batch.
template <class E>
class DepthwiseSums {
  using T = Number<E>;

 public:
  DepthwiseSums(const Layer<E>& layer, int parts)
      : layer_(layer),
        taps_(layer.shape.kernel_height * layer.shape.kernel_width),
        size_((2 * taps_ + 1) * layer.width()),
        sums_(static_cast<size_t>(parts * size_)) {}

  // Adds those of an example.
  void add(int part, const E* in, const E* gradient) {
    const Shape& s = layer_.shape;
    const int64_t in_stride = layer_.in.stream_stride(), stride = layer_.gradient.stream_stride();
    double* const own = &sums_[static_cast<size_t>(part * size_)];
    const auto add_to = [&](int64_t row, int64_t channel, Vec<T> x) {
      for (int i = 0; i < kLanes<T>; ++i)
        own[row * layer_.width() + channel + i] += static_cast<double>(x[i]);
    };
    for (int64_t c = 0; c < layer_.width(); c += kLanes<T>) {
      Vec<T> ones{};
      for_taps(layer_, [&](int64_t tap, int64_t apart) {
        Vec<T> plus{}, magnitude{};
        for (int64_t y = 0; y < s.out_height; ++y)
          for (int64_t x = 0; x < s.out_width; ++x) {
            const E* const p = in + depthwise_corner(layer_, y, x) + apart + c;
            const E* const d = gradient + layer_.gradient.offset(y, x) + c;
            const Vec<T> center = numbers(d), nominal = numbers(d + 2 * stride);
            plus += center * numbers(p) + nominal * numbers(p + 2 * in_stride);
            magnitude += numbers(d + stride) * numbers(p + in_stride);
            if (tap == 0) ones += center + nominal;
          }
        add_to(2 * tap, c, plus);
        add_to(2 * tap + 1, c, magnitude);
      });
      add_to(2 * taps_, c, ones);
    }
  }

  // Null: not wanted.
  void add_up(const T* weight, T* grad_weight, T* grad_bias) const {
    for (int64_t c = 0; c < layer_.shape.out_channels; ++c) {
      for (int64_t tap = 0; grad_weight && tap < taps_; ++tap) {
        const double direction = sign(static_cast<double>(weight[c * taps_ + tap]));
        grad_weight[c * taps_ + tap] =
            static_cast<T>(total(2 * tap, c) + direction * total(2 * tap + 1, c));
      }
      if (grad_bias) grad_bias[c] = static_cast<T>(total(2 * taps_, c));
    }
  }

 private:
  double total(int64_t row, int64_t channel) const {
    double all = 0;
    for (int64_t at = row * layer_.width() + channel; at < static_cast<int64_t>(sums_.size());
         at += size_)
      all += sums_[static_cast<size_t>(at)];
    return all;
  }

  const Layer<E>& layer_;
  const int64_t taps_, size_;
  std::vector<double> sums_;  // [parts][2 a tap: of center and nominal, of the radius; bias][width]
};

}  // namespace cibp
