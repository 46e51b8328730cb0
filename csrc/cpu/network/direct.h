// Direct convolutions, one example at a time: the products that a Plan lists, and the ReLU in the
// registers that hold their sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../plan.h"
#include "../tile.h"
#include "../vec.h"
#include "layers.h"

namespace cibp {

constexpr int64_t kOuterPixels = 64;  // of one tile of a weight gradient
// More rows of a weight gradient than these read a tile's gradients from a copy of their own: in
// the image they meet in few cache sets.
constexpr int64_t kPackedRows = 64;

// The weights of a convolution as its plan reads them: for each block of outputs, tap and channel a
// vector block. `exchanged` for the input gradient, whose outputs are the layer's inputs.
template <class T>
void pack_panel(const Shape& s, const T* weight, const Plan& plan, bool exchanged, int64_t block,
                T* panel) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t out_stride = exchanged ? taps : s.in_channels * taps,
                in_stride = exchanged ? s.in_channels * taps : taps;
  const int64_t outputs = exchanged ? s.in_channels : s.out_channels,
                inputs = exchanged ? s.out_channels : s.in_channels;
  const int64_t first = block * kBlock<T>, rows = taps * plan.channels;
  const int64_t n = std::min(round_up(outputs, kLanes<T>) - first, kBlock<T>),
                valid = std::min(outputs - first, n);
  T* target = panel + first * rows;
  for (const PixelClass& pixel_class : plan.classes)
    for (const Tap& tap : pixel_class.taps) {
      const T* w = weight + first * out_stride + tap.kernel_y * s.kernel_width + tap.kernel_x;
      for (int64_t i = 0; i < plan.channels; ++i, target += n)
        for (int64_t o = 0; o < n; ++o)
          target[o] = i < inputs && o < valid ? w[o * out_stride + i * in_stride] : T{0};
    }
}

// One strip of a convolution: source -> finish(image pixel, first channel of the vector, sums).
template <class T, int STREAMS, int V, class Finish>
void convolve_strip(const Plan& plan, const Strip& strip, const T* source, int64_t stream_stride,
                    int64_t width, const T* panel, T* product, const Finish& finish) {
  const int64_t first = strip.begin * width;
  for (int64_t i = strip.tile_begin; i < strip.tile_end; ++i) {
    const Tile& tile = plan.tiles[static_cast<size_t>(i)];
    const int64_t* pixels = &plan.pixels[static_cast<size_t>(tile.first_pixel)];
    const int64_t* targets = &plan.targets[static_cast<size_t>(tile.first_pixel)];
    const Run* runs = plan.runs.data() + tile.first_run;
    if (!tile.last) {
      multiply_tile<T, STREAMS, V>(source, pixels, stream_stride, runs, tile.run_count, panel,
                                   targets, tile.accumulate, product);
      continue;
    }
    multiply<T, STREAMS, V>(source, pixels, stream_stride, runs, tile.run_count, panel, targets,
                            tile.accumulate ? product : nullptr, [&](int t, int v, Vec<T>* sums) {
                              finish(first + targets[t], v, t < tile.count, sums);
                            });
  }
}

template <class T>
const T* strip_source(const Geometry& g, const Strip& strip, const T* image) {
  return image + (strip.source_begin - g.row_begin) * g.row_stride();
}

// One convolution of one example; returns the sum of r^2 after ReLU. `radius`: [out channels] of
// the output where the input is a ball, whose one stream is both centre and nominal.
template <class T, int STREAMS>
double convolve_forward(const Layer<T>& layer, const T* panels, const T* bias, const T* radius,
                        const T* in, const Layer<T>& next, T* product, T* out) {
  const Shape& s = layer.shape;
  const Geometry &g = layer.in, &h = next.in;
  clear_padding(h, s.out_height, s.out_width, out);
  double total = 0;
  for (const Strip& strip : layer.forward.strips)
    for_blocks<T>(s.out_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const T* panel = panels + layer.panel + c * s.kernel_height * s.kernel_width * g.pitch;
      Vec<T> squares{};
      convolve_strip<T, STREAMS, V>(
          layer.forward, strip, strip_source(g, strip, in), g.stream_stride(), s.out_width, panel,
          product, [&](int64_t pixel, int v, bool counts, const Vec<T>* sums) {
            const int64_t channel = c + v * kLanes<T>;
            Vec<T> streams[S];
            if constexpr (STREAMS == 1) {
              streams[0] = streams[2] = sums[0];
              streams[1] = load(radius + channel);
            } else {
              for (int k = 0; k < S; ++k) streams[k] = sums[k];
            }
            activate<T>(load(bias + channel), layer.relu, streams);
            T* target = out + next.in_offsets[static_cast<size_t>(pixel)] + channel;
#pragma GCC unroll 3
            for (int k = 0; k < S; ++k) store<T>(target + k * h.stream_stride(), streams[k]);
            if (counts) squares += streams[1] * streams[1];
          });
      total += static_cast<double>(sum<T>(squares));
    });
  return total;
}

// The radius of a convolution's output for a ball of radius [in channels]: sum |W| radius, [out
// channels, rounded up].
template <class T>
std::vector<T> ball_output_radius(const Layer<T>& layer, const T* weight, const T* radius) {
  const Shape& s = layer.shape;
  const int64_t taps = s.kernel_height * s.kernel_width;
  std::vector<T> out(static_cast<size_t>(layer.width() + kBlock<T>), T{0});
  const T* w = weight;
  for (int64_t o = 0; o < s.out_channels; ++o) {
    double total = 0;
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int64_t tap = 0; tap < taps; ++tap)
        total += std::fabs(static_cast<double>(*w++)) * static_cast<double>(radius[c]);
    out[static_cast<size_t>(o)] = static_cast<T>(total);
  }
  return out;
}

// Adds one example's products to a convolution's weight gradient sums. Where the input is a ball's
// one stream, so is the gradient's first, centre and nominal together.
template <class T, int STREAMS>
void convolve_weight_gradient(const Layer<T>& layer, const T* in, const T* gradient, T* signed_sums,
                              T* absolute_sums) {
  constexpr int R = kTileRows;
  const Shape& s = layer.shape;
  const Geometry &g = layer.in, &h = layer.gradient;
  const int64_t rows = layer.rows(), sum_rows = round_up(rows, R);
  const int64_t tile_height = std::max<int64_t>(1, kOuterPixels / s.out_width);
  T* const packed = scratch<T>(Slot::kPacked, tile_height * s.out_width * STREAMS * kBlock<T>);
  for (int64_t y = 0; y < s.out_height; y += tile_height) {
    const int64_t lines = std::min(tile_height, s.out_height - y);
    const Operand<T> scalars{
        in + g.offset(y * s.stride_height - s.padding_height, -s.padding_width),
        s.stride_height * g.row_stride(), s.stride_width * g.pitch, g.stream_stride()};
    for_blocks<T>(s.out_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * kLanes<T>;
      Operand<T> vector{gradient + h.offset(y, 0) + c, h.row_stride(), h.pitch, h.stream_stride()};
      if (rows > kPackedRows) {
        T* to = packed;
        for (int64_t line = y; line < y + lines; ++line)
          for (int64_t x = 0; x < s.out_width; ++x)
            for (int k = 0; k < STREAMS; ++k, to += N)
              std::copy_n(gradient + h.offset(line, x) + k * h.stream_stride() + c, N, to);
        vector = {packed, s.out_width * STREAMS * N, STREAMS * N, N};
      }
      T* const plus = signed_sums + c * sum_rows;
      T* const magnitude = absolute_sums + c * sum_rows;
      for (int64_t row = 0; row < rows; row += R) {
        const int64_t* at = &layer.row_offsets[static_cast<size_t>(row)];
        outer_tile<T, 0, STREAMS, V>(vector, scalars, at, lines, s.out_width, plus + row * N);
        if constexpr (STREAMS > 1)
          outer_tile<T, 1, STREAMS, V>(vector, scalars, at, lines, s.out_width,
                                       magnitude + row * N);
      }
    });
  }
}

// The weight gradient of a vector of outputs. radius_sums: [parts][out channels], of a ball.
template <class T>
void convolve_reduce(const Layer<T>& layer, const T* weight, const WeightSums<T>& sums,
                     const double* radius_sums, const T* ball_radius, int64_t channel, T* out) {
  const Shape& s = layer.shape;
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t end = std::min<int64_t>(channel + kLanes<T>, s.out_channels);
  for (int64_t o = channel; o < end; ++o) {
    const int64_t block = o / kBlock<T> * kBlock<T>, n = std::min(kBlock<T>, layer.width() - block);
    const int64_t base = block * round_up(layer.rows(), kTileRows) + o - block;
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        T plus = 0, magnitude = 0;
        for (int part = 0; part < sums.parts; ++part) {
          const int64_t at = part * sums.size + base + (tap * s.in_channels + c) * n;
          plus += sums.plus[at];
          magnitude += sums.magnitude[at];
          if (layer.in.streams == 1)
            magnitude += static_cast<T>(radius_sums[part * s.out_channels + o] *
                                        static_cast<double>(ball_radius[c]));
        }
        const int64_t k = o * layer.rows() + c * taps + tap;
        out[k] = plus + sign(weight[k]) * magnitude;
      }
  }
}

// One example's input gradient; finish(pixel, channel of the vector, streams).
template <class T, class Finish>
void convolve_input_gradient(const Layer<T>& layer, const T* panels, const T* gradient, T* product,
                             const Finish& finish) {
  const Shape& s = layer.shape;
  const Geometry& h = layer.gradient;
  for (const Strip& strip : layer.backward.strips)
    for_blocks<T>(s.in_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const T* panel =
          panels + layer.backward_panel + c * s.kernel_height * s.kernel_width * layer.width();
      convolve_strip<T, S, V>(layer.backward, strip, strip_source(h, strip, gradient),
                              h.stream_stride(), s.in_width, panel, product,
                              [&](int64_t pixel, int v, bool, Vec<T>* streams) {
                                finish(pixel, c + v * kLanes<T>, streams);
                              });
    });
}

}  // namespace cibp
