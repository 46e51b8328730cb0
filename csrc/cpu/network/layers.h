// The layers of a network as the kernels see them: where the packed streams lie, and what ReLU
// makes of them.
//
// The streams of an interval stay packed from the first layer to the last: example by example,
// [row][stream][column][channel], with the zero padding of the layer that reads them. After ReLU
// they are
//   m = mu, r = radius      where mu > radius (active)
//   m = r = (mu + radius)/2 where mu + radius > 0 (unstable)
//   m = r = 0               elsewhere (dead)
// so that the bounds are m - r and m + r, and m and r alone tell the backward pass the state.
//
// Numbers of type E are packed, and products and sums are of type Number<E>: E is that type, or
// BFloat16. Then products are of pairs (bfloat16.h): of channels forward and in the input gradient,
// of pixels or examples in the weight gradient. A first layer that is a convolution is computed in
// float all the same: its few channels would fill no pairs.
//
// Of float networks, what a fast layer saves of its input is rounded to bfloat16 (saved.h), if it
// is not the network's; the forward pass goes on with what was not rounded. Rounding is to nearest,
// ties to even, except that the state stays (store_streams): so an element is off by at most 2^-8
// of it, and r, where m > r, by 3 2^-8.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../plan.h"
#include "../tile.h"
#include "../vec.h"
#include "network.h"
#include "sound.h"

namespace cibp {

constexpr int S = 3;  // streams: center, radius, nominal

// Where an image's streams lie: [row][stream][column][channel], from (row_begin, column_begin) on,
// both 0 or less.
struct Geometry {
  int64_t streams, row_begin, rows, column_begin, columns, pitch;
  int64_t stream_stride() const { return columns * pitch; }
  int64_t row_stride() const { return streams * columns * pitch; }
  int64_t size() const { return rows * row_stride(); }
  int64_t offset(int64_t y, int64_t x) const {
    return (y - row_begin) * row_stride() + (x - column_begin) * pitch;
  }
};

// paired: numbers in a factor of the plan.
inline Geometry geometry(const Plan& plan, int64_t streams, int64_t height, int64_t paired) {
  int64_t begin = 0, end = height;
  for (const Strip& strip : plan.strips) {
    begin = std::min(begin, strip.source_begin);
    end = std::max(end, strip.source_end);
  }
  return {streams, begin, end - begin, plan.column_begin, plan.columns, plan.channels * paired};
}

inline bool is_dense(const Shape& s) {
  return s.out_height == 1 && s.out_width == 1 && s.kernel_height == s.in_height &&
         s.kernel_width == s.in_width && s.padding_height == 0 && s.padding_width == 0 &&
         (s.dilation_height == 1 || s.kernel_height == 1) &&
         (s.dilation_width == 1 || s.kernel_width == 1) && s.groups == 1;
}

// The passes of a convolution that are computed as winograd.h says.
struct Passes {
  bool forward, weight, input;
  bool any() const { return forward || weight || input; }
};

template <class E>
struct Layer : NetworkLayer {
  bool first;  // whether it reads what the network is given
  bool dense;
  bool points;  // whether the streams are three points
  Slack<Number<E>> slack;
  bool scatter;  // whether its input gradient is that of scatter.h
  Passes winograd;
  Geometry in;        // of the packed input
  bool rounded;       // whether that is saved in bfloat16, though it is computed in float
  int64_t element;    // bytes of a number of it, as it is saved
  Geometry gradient;  // of the gradient of the layer's output, of a convolution
  Plan forward, backward;
  std::vector<int64_t> in_offsets, gradient_offsets;  // [pixels] of an image in the two geometries
  std::vector<int64_t> row_offsets;       // in the input, of the rows of a direct weight gradient
  int64_t group = 1;                      // examples that go through it together
  int64_t saved = 0;                      // where its input is saved, in bytes
  int64_t panel = 0, backward_panel = 0;  // offsets of the weight panels
  int64_t sums = 0, bias = 0;             // offsets of weight and bias gradients
  int64_t in_image = 0;                   // offset of the images of its input, forward
  int64_t gradient_image = 0;             // and of its output's gradient, backward
  int64_t gradient_images = 1;            // how many there are of these

  int64_t saved_size() const {  // bytes of one example's input
    return in.size() * element;
  }
  int64_t rows() const {  // of the weight gradient, (tap, channel)
    return shape.kernel_height * shape.kernel_width * shape.in_channels;
  }
  int64_t width() const { return round_up(shape.out_channels, kLanes<E>); }
  int64_t sum_size() const { return width() * round_up(rows(), kTileRows); }
};

// A block of outputs of a layer's weight panel.
struct PanelBlock {
  size_t layer;
  int64_t block;
};

template <class E>
struct NetworkPlan {
  std::vector<Layer<E>> layers;
  size_t convolutions = 0;  // layers in front of the dense ones, pooling included
  Given given;
  int64_t batch;   // packed together
  int64_t points;  // of a network of points: up to three in each
  int64_t saved_bytes = 0;
  int64_t biases = 0;                       // elements of all padded biases
  int64_t panels = 0, backward_panels = 0;  // elements of all weight panels
  std::vector<PanelBlock> panel_blocks, backward_panel_blocks;
  int64_t max_pixels = 1, backward_max_pixels = 1;
  // elements of a part: images forward; backward images, weight sums and bias sums
  int64_t in_images = 0, gradient_images = 0, sums = 0, outputs = 0;
  std::vector<int64_t> input_at;  // [pixels] of the gradient of the network's input
};

// What a width is less than the sum of squares of a layer's output.
template <class E>
Number<E> width_divisor(const Layer<E>& layer, bool mean) {
  const Shape& s = layer.shape;
  const int64_t units = mean ? s.out_channels * s.out_height * s.out_width : 1;
  return static_cast<Number<E>>(static_cast<double>(s.batch * units));
}

// Zeros around the height x width image.
template <class E>
void clear_padding(const Geometry& g, int64_t height, int64_t width, E* image) {
  for (int64_t row = 0; row < g.rows; ++row) {
    E* p = image + row * g.row_stride();
    const int64_t y = row + g.row_begin;
    if (y < 0 || y >= height) {
      std::fill_n(p, g.row_stride(), E{});
      continue;
    }
    const int64_t left = -g.column_begin * g.pitch, right = left + width * g.pitch;
    for (int64_t s = 0; s < g.streams; ++s, p += g.stream_stride()) {
      std::fill_n(p, left, E{});
      std::fill_n(p + right, g.stream_stride() - right, E{});
    }
  }
}

template <class T>
Vec<T> positive(Vec<T> x) {  // not max: NaN must stay NaN
  return x <= 0 ? Vec<T>{} : x;
}

// Whether both bounds are at the same infinity.
template <class T>
[[gnu::always_inline]] inline auto masked_units(const Vec<T>* streams) {
  const Vec<T> all = Vec<T>{} + std::numeric_limits<T>::infinity();
  return (absolute<T>(streams[0]) == all) & (streams[1] < all);
}

// Masked units have no width.
template <class T>
[[gnu::always_inline]] inline void clear_masked(Vec<T>* streams) {
  streams[1] = masked_units<T>(streams) ? Vec<T>{} : streams[1];
}

// Bias and ReLU of one vector of (mu, radius, nominal), or of three points, in place.
template <class E>
[[gnu::always_inline]] inline void activate(const Layer<E>& layer, Vec<Number<E>> bias,
                                            Vec<Number<E>>* streams) {
  using T = Number<E>;
  if (layer.points) {
    for (int k = 0; k < S; ++k)
      streams[k] = layer.relu ? positive<T>(streams[k] + bias) : streams[k] + bias;
    return;
  }
  const Vec<T> mu = streams[0] + bias, nominal = streams[2] + bias;
  const Vec<T> radius = layer.slack.wanted() ? reach<T>(streams[1], bias, layer.slack) : streams[1];
  if (layer.relu) {
    const Vec<T> upper = mu + radius, half = positive<T>(upper) * T(0.5);
    streams[0] = mu > radius ? mu : half;
    streams[1] = mu > radius ? radius : half;
    streams[2] = positive<T>(nominal);
  } else {
    streams[0] = mu;
    streams[1] = radius;
    streams[2] = nominal;
    clear_masked<T>(streams);
  }
  if (layer.slack.wanted()) streams[1] = outward<T>(streams[0], streams[1], layer.slack.next);
}

// The (m, r, nominal) that `activate` made, from where they are packed.
template <class E>
void load_streams(const E* p, int64_t stride, Factors<Number<E>>* streams) {
#pragma GCC unroll 3
  for (int k = 0; k < S; ++k) streams[k] = numbers(p + k * stride);
}

// The gradient of (m, r, nominal) after a layer's ReLU -> that of (mu, radius, nominal) before it,
// in place; `scale` times r is the width's gradient by r. Of points, that of the points.
template <class E>
[[gnu::always_inline]] inline void deactivate(const Layer<E>& layer, const Vec<Number<E>>* forward,
                                              Number<E> scale, Vec<Number<E>>* gradient) {
  using T = Number<E>;
  if (layer.points) {
    for (int k = 0; k < S && layer.relu; ++k)
      gradient[k] = forward[k] <= 0 ? Vec<T>{} : gradient[k];
    return;
  }
  const Vec<T> m = forward[0], r = forward[1], nominal = forward[2];
  gradient[1] += scale * r;
  if (!layer.relu) return;
  const Vec<T> both = m * T(0) + (gradient[0] + gradient[1]) * T(0.5);  // NaN stays NaN
  const Vec<T> shared = m <= 0 ? Vec<T>{} : both;
  gradient[0] = m > r ? gradient[0] : shared;
  gradient[1] = m > r ? gradient[1] : shared;
  gradient[2] = nominal <= 0 ? Vec<T>{} : gradient[2];
}

// What the parts of a batch sum up of a layer's weight gradient, `size` elements apart: the sums of
// center and nominal, and those of the radius, to be multiplied by the sign of W.
template <class T>
struct WeightSums {
  const T *plus, *magnitude;
  int64_t size;
  int parts;
};

}  // namespace cibp
