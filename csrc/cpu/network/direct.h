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
template <class E>
void pack_panel(const Shape& s, const Number<E>* weight, const Plan& plan, bool exchanged,
                int64_t block, Number<E>* panel) {
  using T = Number<E>;
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t out_stride = exchanged ? taps : s.in_channels * taps,
                in_stride = exchanged ? s.in_channels * taps : taps;
  const int64_t outputs = exchanged ? s.in_channels : s.out_channels,
                inputs = exchanged ? s.out_channels : s.in_channels;
  const int64_t first = block * kBlock<T>, rows = taps * plan.channels,
                channels = plan.channels * kPaired<E>;
  const int64_t n = std::min(round_up(outputs, kLanes<T>) - first, kBlock<T>),
                valid = std::min(outputs - first, n);
  panel += first * rows;
  constexpr bool kPairs = kPaired<E> > 1;
  T* const numbers = kPairs ? scratch<T>(Slot::kPacked, taps * channels * n) : panel;
  T* target = numbers;
  for (const PixelClass& pixel_class : plan.classes)
    for (const Tap& tap : pixel_class.taps) {
      const T* w = weight + first * out_stride + tap.kernel_y * s.kernel_width + tap.kernel_x;
      for (int64_t i = 0; i < channels; ++i, target += n)
        for (int64_t o = 0; o < n; ++o)
          target[o] = i < inputs && o < valid ? w[o * out_stride + i * in_stride] : T{0};
    }
  if constexpr (kPairs) pair_rows(numbers, taps * channels, n, reinterpret_cast<Pair*>(panel));
}

// One strip of a convolution: source -> finish(image pixel, first channel of the vector, sums).
template <class E, int STREAMS, int V, class Finish>
void convolve_strip(const Plan& plan, const Strip& strip, const Geometry& g, const E* image,
                    int64_t width, const Number<E>* packed, bool points, Number<E>* product,
                    const Finish& finish) {
  using T = Number<E>;
  using F = Factor<E>;
  const F* source = as_factors<E>(image + (strip.source_begin - g.row_begin) * g.row_stride());
  const F* panel = as_factors<E>(packed);
  const int64_t stream_stride = g.stream_stride() / kPaired<E>;
  const int64_t first = strip.begin * width;
  constexpr int P = kTilePixels<STREAMS>;
  for (int64_t i = strip.tile_begin; i < strip.tile_end; ++i) {
    const Tile& tile = plan.tiles[static_cast<size_t>(i)];
    const int64_t* pixels = &plan.pixels[static_cast<size_t>(tile.first_pixel)];
    const int64_t* targets = &plan.targets[static_cast<size_t>(tile.first_pixel)];
    const Run* runs = plan.runs.data() + tile.first_run;
    const auto compute = [&](auto size, int64_t count) {
      constexpr int kPixels = size;
      if (!tile.last)
        multiply_tile<F, STREAMS, V, kPixels>(source, pixels, stream_stride, runs, tile.run_count,
                                              panel, targets, tile.accumulate, points, product);
      else
        multiply<F, STREAMS, V, kPixels>(
            source, pixels, stream_stride, runs, tile.run_count, panel, targets,
            tile.accumulate ? product : nullptr, points,
            [&](int t, int v, Vec<T>* sums) { finish(first + targets[t], v, t < count, sums); });
    };
    if constexpr (V == 1) {  // two tiles at once have as many sums as one of two vectors
      if (tile.twin) {
        compute(std::integral_constant<int, 2 * P>{},
                P + plan.tiles[static_cast<size_t>(++i)].count);
        continue;
      }
    }
    compute(std::integral_constant<int, P>{}, tile.count);
  }
}

// One convolution of one example; returns the sum of r^2 after ReLU. `radius`: [out channels] of
// the output where the input is a ball, whose one stream is both centre and nominal.
template <class In, int STREAMS, class E>
double convolve_forward(const Layer<E>& layer, const Number<E>* panels, const Number<E>* bias,
                        const Number<E>* radius, const In* in, const Layer<E>& next,
                        Number<E>* product, E* out) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry &g = layer.in, &h = next.in;
  clear_padding(h, s.out_height, s.out_width, out);
  double total = 0;
  for (const Strip& strip : layer.forward.strips)
    for_blocks<T>(s.out_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const int64_t rows = s.kernel_height * s.kernel_width * layer.forward.channels;
      Vec<T> squares{};
      convolve_strip<In, STREAMS, V>(
          layer.forward, strip, g, in, s.out_width, panels + layer.panel + c * rows, layer.points,
          product, [&](int64_t pixel, int v, bool counts, const Vec<T>* sums) {
            const int64_t channel = c + v * kLanes<T>;
            Vec<T> streams[S];
            if constexpr (STREAMS == 1) {
              streams[0] = streams[2] = sums[0];
              streams[1] = load(radius + channel);
            } else {
              for (int k = 0; k < S; ++k) streams[k] = sums[k];
            }
            activate<E>(layer, load(bias + channel), streams);
            store_streams(out + next.in_offsets[static_cast<size_t>(pixel)] + channel,
                          h.stream_stride(), streams);
            if (counts) squares += streams[1] * streams[1];
          });
      total += static_cast<double>(sum<T>(squares));
    });
  return total;
}

// The radius of a convolution's output for a ball of radius [in channels]: sum |W| radius, [out
// channels, rounded up].
template <class E>
std::vector<Number<E>> ball_output_radius(const Layer<E>& layer, const Number<E>* weight,
                                          const Number<E>* radius) {
  using T = Number<E>;
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

// The pairs of input pixels that one output pixel and the next multiply with, for every pixel and
// channel of an image; where the second one lies beyond the row it is 0.
inline const Pair* pixel_pairs(const Geometry& g, int64_t stride, const BFloat16* in) {
  Pair* const pairs = scratch<Pair>(Slot::kImages, g.size());
  const int64_t line = g.stream_stride(), both = line - std::min(stride * g.pitch, line);
  for (int64_t first = 0; first < g.size(); first += line)
    for (int64_t i = first; i < first + line; i += kLanes<Pair>) {
      const Halves next = i < first + both ? load_halves(in + i + stride * g.pitch) : Halves{};
      store(pairs + i, paired(load_halves(in + i), next));
    }
  return pairs;
}

// The streams of some lines of a gradient's image, N channels from `channel` on, as outer_tile
// reads them: [line][pixel or pair of pixels][stream][N].
template <class G, int N, int STREAMS>
void pack_gradient(const Geometry& h, int64_t line, int64_t lines, int64_t width, const G* image,
                   Factor<G>* to) {
  for (int64_t y = line; y < line + lines; ++y)
    for (int64_t x = 0; x < width; x += kPaired<G>)
      for (int k = 0; k < STREAMS; ++k, to += N) {
        const G* from = image + h.offset(y, x) + k * h.stream_stride();
        if constexpr (kPaired<G> == 1)
          std::copy_n(from, N, to);
        else
          for (int v = 0; v < N; v += kLanes<G>)
            store(to + v, paired(load_halves(from + v),
                                 x + 1 < width ? load_halves(from + h.pitch + v) : Halves{}));
      }
}

// Adds one example's products to a convolution's weight gradient sums. Where the input is a ball's
// one stream, so is the gradient's first, centre and nominal together.
template <class X, int STREAMS, class E>
void convolve_weight_gradient(const Layer<E>& layer, const X* in, const X* gradient,
                              Number<E>* signed_sums, Number<E>* absolute_sums) {
  using F = Factor<X>;
  constexpr int R = kTileRows;
  const Shape& s = layer.shape;
  const Geometry &g = layer.in, &h = layer.gradient;
  const int64_t rows = layer.rows(), sum_rows = round_up(rows, R);
  const int64_t columns = ceil_div(s.out_width, kPaired<X>);
  const int64_t tile_height = std::max<int64_t>(1, kOuterPixels / s.out_width);
  F* const packed = scratch<F>(Slot::kPacked, tile_height * columns * STREAMS * kBlock<X>);
  const F* inputs = nullptr;
  if constexpr (kPaired<X> > 1)
    inputs = pixel_pairs(g, s.stride_width, in);
  else
    inputs = in;
  for (int64_t y = 0; y < s.out_height; y += tile_height) {
    const int64_t lines = std::min(tile_height, s.out_height - y);
    const Operand<F> scalars{
        inputs + g.offset(y * s.stride_height - s.padding_height, -s.padding_width),
        s.stride_height * g.row_stride(), kPaired<X> * s.stride_width * g.pitch, g.stream_stride()};
    for_blocks<X>(s.out_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * kLanes<X>;
      Operand<F> vector{packed, columns * STREAMS * N, STREAMS * N, N};
      if (kPaired<X> > 1 || rows > kPackedRows)
        pack_gradient<X, N, STREAMS>(h, y, lines, s.out_width, gradient + c, packed);
      else if constexpr (kPaired<X> == 1)
        vector = {gradient + h.offset(y, 0) + c, h.row_stride(), h.pitch, h.stream_stride()};
      auto* const plus = signed_sums + c * sum_rows;
      auto* const magnitude = absolute_sums + c * sum_rows;
      for (int64_t row = 0; row < rows; row += R) {
        const int64_t* at = &layer.row_offsets[static_cast<size_t>(row)];
        outer_tile<F, 0, STREAMS, V>(vector, scalars, at, lines, columns, plus + row * N);
        if constexpr (STREAMS > 1)
          outer_tile<F, 1, STREAMS, V>(vector, scalars, at, lines, columns, magnitude + row * N);
      }
    });
  }
}

// The weight gradient of a vector of outputs. radius_sums: [parts][out channels], of a ball.
template <class E>
void convolve_reduce(const Layer<E>& layer, const Number<E>* weight,
                     const WeightSums<Number<E>>& sums, const double* radius_sums,
                     const Number<E>* ball_radius, int64_t channel, Number<E>* out) {
  using T = Number<E>;
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

// One example's input gradient; finish(pixel, channel of the vector, streams), once for each.
template <class G, class E, class Finish>
void convolve_input_gradient(const Layer<E>& layer, const Number<E>* panels, const G* gradient,
                             Number<E>* product, const Finish& finish) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry& h = layer.gradient;
  for (const Strip& strip : layer.backward.strips)
    for_blocks<T>(s.in_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const int64_t rows = s.kernel_height * s.kernel_width * layer.backward.channels;
      convolve_strip<G, S, V>(layer.backward, strip, h, gradient, s.in_width,
                              panels + layer.backward_panel + c * rows, layer.points, product,
                              [&](int64_t pixel, int v, bool counts, Vec<T>* streams) {
                                if (counts) finish(pixel, c + v * kLanes<T>, streams);
                              });
    });
}

}  // namespace cibp
