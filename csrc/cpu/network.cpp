// Convolutions run example by example, all of them while an example is in cache; dense stages
// (dense.h) run over the whole batch, a block of weights at a time.
#include "network.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dense.h"
#include "layers.h"
#include "parallel.h"
#include "plan.h"
#include "streams.h"
#include "tile.h"
#include "winograd.h"

namespace cibp {
namespace {

constexpr int64_t kOuterPixels = 64;  // of one tile of a convolution's weight gradient

template <class T>
std::vector<Layer<T>> plan(const std::vector<Stage<T>>& stages, bool ball) {
  std::vector<Layer<T>> layers = make_layers(stages, ball);
  for (size_t i = 1; i < layers.size(); ++i)  // the first one's channels fill no vector
    layers[i].winograd =
        stages[i].fast && stages[i].weight && !layers[i].dense && prefers_winograd(stages[i].shape);
  return layers;
}

// The weights of a convolution as its plan reads them: for each block of outputs, tap and channel a
// vector block. `exchanged` for the input gradient, whose outputs are the stage's inputs.
template <class T>
void pack_panel(const Conv2dShape& s, const T* weight, const Plan& plan, bool exchanged,
                int64_t block, T* panel) {
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

// Packs the weights of the convolutions in front, in one parallel region; a layer's panel is at
// `panel` (forward) or `backward_panel`.
template <class T>
const T* pack_weights(std::vector<Layer<T>>& layers, bool backward, bool first_too, int threads) {
  struct Item {
    size_t layer;
    int64_t block;
  };
  std::vector<Item> items;
  int64_t size = 0;
  for (size_t i = backward && !first_too ? 1 : 0; i < layers.size() && !layers[i].dense; ++i) {
    Layer<T>& layer = layers[i];
    if (!layer.stage->weight) continue;
    const Conv2dShape& s = layer.stage->shape;
    (backward ? layer.backward_panel : layer.panel) = size;
    // The panel's rows for each output, and its outputs.
    int64_t rows = s.kernel_height * s.kernel_width, outputs = layer.width();
    if (layer.winograd) {
      rows = 2 * kProducts;
      const int64_t in = Winograd(s).phases() * layer.in.pitch;
      rows *= backward ? layer.width() : in;
      outputs = backward ? in : layer.width();
    } else {
      rows *= backward ? layer.width() : layer.in.pitch;
      outputs = backward ? round_up(s.in_channels, kLanes<T>) : layer.width();
    }
    size += rows * outputs;
    for (int64_t b = 0; b < ceil_div(outputs, kBlock<T>); ++b) items.push_back({i, b});
  }
  T* panels = scratch<T>(Slot::kPanel, size + 1);
  parallel_for(threads, static_cast<int64_t>(items.size()), [&](int64_t index) {
    const Item& item = items[static_cast<size_t>(index)];
    const Layer<T>& layer = layers[item.layer];
    T* panel = panels + (backward ? layer.backward_panel : layer.panel);
    const Stage<T>& stage = *layer.stage;
    if (layer.winograd)
      with_outputs(Winograd(stage.shape), [&](auto outputs) {
        pack_winograd<T, kPoints + 1 - outputs>(stage.shape, stage.weight, backward, layer.in.pitch,
                                                item.block, panel);
      });
    else
      pack_panel(stage.shape, stage.weight, backward ? layer.backward : layer.forward, backward,
                 item.block, panel);
  });
  return panels;
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

template <class T>
T* padded_biases(const std::vector<Layer<T>>& layers, std::vector<const T*>& biases) {
  int64_t size = 0;
  for (const Layer<T>& layer : layers) size += layer.width() + kBlock<T>;
  T* all = scratch<T>(Slot::kBias, size);
  std::fill_n(all, size, T{0});
  T* next = all;
  for (const Layer<T>& layer : layers) {
    if (layer.stage->bias) std::copy_n(layer.stage->bias, layer.stage->shape.out_channels, next);
    biases.push_back(next);
    next += layer.width() + kBlock<T>;
  }
  return all;
}

// One convolution of one example; returns the sum of r^2 after ReLU. `radius`: [out channels] of
// the output where the input is a ball, whose one stream is both centre and nominal.
template <class T, int STREAMS>
double convolve_forward(const Layer<T>& layer, const T* panels, const T* bias, const T* radius,
                        const T* in, const Layer<T>& next, T* product, T* out) {
  const Conv2dShape& s = layer.stage->shape;
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
            activate<T>(load(bias + channel), layer.stage->relu, streams);
            T* target = out + next.in_offsets[static_cast<size_t>(pixel)] + channel;
#pragma GCC unroll 3
            for (int k = 0; k < S; ++k) store<T>(target + k * h.stream_stride(), streams[k]);
            if (counts) squares += streams[1] * streams[1];
          });
      total += static_cast<double>(sum<T>(squares));
    });
  return total;
}

constexpr int64_t kTileValues = kProducts * kTiles * S;  // of a channel

// The transformed input of the output tiles [begin, end).
template <class T>
void transform_inputs(const Layer<T>& layer, const Winograd& w, const T* in, int64_t begin,
                      int64_t end, T* out) {
  const Conv2dShape& s = layer.stage->shape;
  const Geometry& g = layer.in;
  for (int64_t phase = 0; phase < w.phases(); ++phase)
    transform_tiles<T, kPoints>(
        {in + g.offset(0, 0), &g, s.in_height, s.in_width, w.stride,
         phase / w.stride - s.padding_height, phase % w.stride - s.padding_width},
        begin, end, w.columns, w.outputs, 0, 0, g.pitch, phase * g.pitch, w.phases() * g.pitch,
        transform_input_tile<T>, out);
}

// As convolve_forward.
template <class T>
double winograd_forward(const Layer<T>& layer, const T* panels, const T* bias, const T* in,
                        const Layer<T>& next, T* out) {
  const Conv2dShape& s = layer.stage->shape;
  const Winograd w(s);
  const Geometry &g = layer.in, &h = next.in;
  const int64_t depth = w.phases() * g.pitch;
  clear_padding(h, s.out_height, s.out_width, out);
  T* tiles_in = scratch<T>(Slot::kTilesIn, kTileValues * depth);
  T* products = scratch<T>(Slot::kTilesOut, kTileValues * kBlock<T>);
  double total = 0;
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for (int64_t begin = 0; begin < w.rows * w.columns; begin += kTiles) {
      const int64_t end = std::min(begin + kTiles, w.rows * w.columns);
      transform_inputs(layer, w, in, begin, end, tiles_in);
      Vec<T> squares{};
      multiply_tiles<T, M>(tiles_in, end - begin, depth, panels + layer.panel, layer.width(),
                           products, [&](int64_t tile, int64_t channel, Vec<T>(*sums)[M* M]) {
                             const int64_t y = (begin + tile) / w.columns * M,
                                           x = (begin + tile) % w.columns * M;
                             for (int64_t i = 0; i < M && y + i < s.out_height; ++i)
                               for (int64_t j = 0; j < M && x + j < s.out_width; ++j) {
                                 Vec<T> streams[S];
                                 for (int k = 0; k < S; ++k) streams[k] = sums[k][M * i + j];
                                 streams[1] = streams[1] < 0 ? Vec<T>{} : streams[1];  // rounding
                                 activate<T>(load(bias + channel), layer.stage->relu, streams);
                                 T* target = out + h.offset(y + i, x + j) + channel;
                                 for (int k = 0; k < S; ++k)
                                   store<T>(target + k * h.stream_stride(), streams[k]);
                                 squares += streams[1] * streams[1];
                               }
                           });
      total += static_cast<double>(sum<T>(squares));
    }
  });
  return total;
}

// One average pooling of one example, as convolve_forward.
template <class T>
double pool_forward(const Layer<T>& layer, const T* in, const Layer<T>& next, T* out) {
  const Conv2dShape& s = layer.stage->shape;
  const Geometry &g = layer.in, &h = next.in;
  const T scale = T(1) / static_cast<T>(s.kernel_height * s.kernel_width);
  clear_padding(h, s.out_height, s.out_width, out);
  Vec<T> squares{};
  for (int64_t y = 0; y < s.out_height; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
        const T* corner =
            in + c +
            g.offset(y * s.stride_height - s.padding_height, x * s.stride_width - s.padding_width);
        Vec<T> streams[S] = {};
        for (int64_t ky = 0; ky < s.kernel_height; ++ky)
          for (int64_t kx = 0; kx < s.kernel_width; ++kx)
            for (int k = 0; k < S; ++k)
              streams[k] +=
                  load(corner + ky * g.row_stride() + kx * g.pitch + k * g.stream_stride());
        for (int k = 0; k < S; ++k) streams[k] *= scale;
        activate<T>(Vec<T>{}, layer.stage->relu, streams);
        T* target = out + h.offset(y, x) + c;
        for (int k = 0; k < S; ++k) store<T>(target + k * h.stream_stride(), streams[k]);
        squares += streams[1] * streams[1];
      }
  return static_cast<double>(sum<T>(squares));
}

// The gradient of the pixel (y, x) of an average pooling's input, of a vector of channels.
template <class T>
void pool_gradient(const Layer<T>& layer, int64_t y, int64_t x, const T* gradient,
                   Vec<T>* streams) {
  const Conv2dShape& s = layer.stage->shape;
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
        streams[k] += load(gradient + h.offset(oy, ox) + k * h.stream_stride());
  for (int k = 0; k < S; ++k) streams[k] *= scale;
}

// The radius of a convolution's output for a ball of radius [in channels]: sum |W| radius, [out
// channels, rounded up].
template <class T>
std::vector<T> ball_output_radius(const Layer<T>& layer, const T* radius) {
  const Conv2dShape& s = layer.stage->shape;
  const int64_t taps = s.kernel_height * s.kernel_width;
  std::vector<T> out(static_cast<size_t>(layer.width() + kBlock<T>), T{0});
  const T* w = layer.stage->weight;
  for (int64_t o = 0; o < s.out_channels; ++o) {
    double total = 0;
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int64_t tap = 0; tap < taps; ++tap)
        total += std::fabs(static_cast<double>(*w++)) * static_cast<double>(radius[c]);
    out[static_cast<size_t>(o)] = static_cast<T>(total);
  }
  return out;
}

template <class T, int STREAMS_>
struct Copy {
  static constexpr int STREAMS = STREAMS_, SOURCES = STREAMS_;
  template <class V>
  void operator()(const V* in, V* out) const {
    for (int k = 0; k < STREAMS; ++k) out[k] = in[k];
  }
};

// An image, packed with the first stage's padding.
template <class T, class Prologue>
void pack_image(const Prologue& prologue, const Tensor4<const T>* sources, const Conv2dShape& s,
                const Geometry& g, int64_t image, T* out) {
  clear_padding(g, s.in_height, s.in_width, out);
  for (int64_t y = 0; y < s.in_height; ++y) {
    Plane<T> planes[Prologue::SOURCES];
    for (int k = 0; k < Prologue::SOURCES; ++k) {
      const Tensor4<const T>& t = sources[k];
      const T* last = t.data + (s.batch - 1) * t.stride[0] + (s.in_channels - 1) * t.stride[1] +
                      (s.in_height - 1) * t.stride[2] + (s.in_width - 1) * t.stride[3];
      planes[k] = {t.data + image * t.stride[0] + y * t.stride[2], t.stride[1], t.stride[3],
                   last + 1};
    }
    pack(prologue, planes, s.in_channels, s.in_width, g.pitch, g.stream_stride(),
         out + g.offset(y, 0));
    // Of a dense stage: past the channels there are weights of 0, and no NaN may meet them.
    for (int64_t x = 0; x < s.in_width && s.in_channels < g.pitch; ++x)
      for (int64_t k = 0; k < g.streams; ++k)
        std::fill_n(out + g.offset(y, x) + k * g.stream_stride() + s.in_channels,
                    g.pitch - s.in_channels, T{0});
  }
}

}  // namespace

template <class T>
int64_t stage_input_size(const Conv2dShape& shape, bool first, bool ball) {
  return input_geometry<T>(shape, first, ball).size();
}

template <class T>
void network_forward(const NetworkForward<T>& op) {
  std::vector<Layer<T>> layers = plan(op.stages, op.ball_radius != nullptr);
  const T* panels = pack_weights(layers, false, false, op.threads);
  std::vector<const T*> biases;
  padded_biases(layers, biases);
  const int64_t batch = op.stages[0].shape.batch;
  size_t convolutions = 0;
  int64_t max_pixels = 1;
  for (; !layers[convolutions].dense; ++convolutions)
    max_pixels = std::max(max_pixels, layers[convolutions].forward.max_pixels);

  const int64_t count = static_cast<int64_t>(convolutions);
  std::vector<double> widths(static_cast<size_t>(batch * count + 1));
  const Tensor4<const T> sources[S] = {op.lower, op.upper, op.nominal};
  const std::vector<T> radius =
      op.ball_radius ? ball_output_radius(layers[0], op.ball_radius) : std::vector<T>{};
  parallel_for(op.threads, batch, [&](int64_t n) {
    T* product = scratch<T>(Slot::kProduct, max_pixels * S * kBlock<T>);
    T* const image = op.inputs[0] + n * layers[0].in.size();
    const Conv2dShape& first = op.stages[0].shape;
    if (op.ball_radius)
      pack_image(Copy<T, 1>{}, &sources[2], first, layers[0].in, n, image);
    else
      pack_image(CenterRadius<T, S>{}, sources, first, layers[0].in, n, image);
    for (size_t i = 0; i < convolutions; ++i) {
      const Layer<T>&layer = layers[i], &next = layers[i + 1];
      const T* in = op.inputs[i] + n * layer.in.size();
      T* out = op.inputs[i + 1] + n * next.in.size();
      double& width = widths[static_cast<size_t>(n * count) + i];
      if (!layer.stage->weight) {
        width = pool_forward(layer, in, next, out);
        continue;
      }
      if (layer.winograd) {
        width = winograd_forward(layer, panels, biases[i], in, next, out);
        continue;
      }
      const auto convolve = layer.in.streams == 1 ? convolve_forward<T, 1> : convolve_forward<T, S>;
      width = convolve(layer, panels, biases[i], radius.data(), in, next, product, out);
    }
  });
  for (size_t i = 0; i < convolutions; ++i) {
    double total = 0;
    for (int64_t n = 0; n < batch; ++n) total += widths[static_cast<size_t>(n * count) + i];
    op.widths[i] = static_cast<T>(4 * total);
  }

  for (size_t i = convolutions; i < layers.size(); ++i) {
    const Layer<T>& layer = layers[i];
    const int64_t channels = layer.stage->shape.out_channels;
    const T* bias = biases[i];
    double width = 0;
    if (i + 1 < layers.size()) {
      T* out = op.inputs[i + 1];
      const int64_t stride = layers[i + 1].in.stream_stride(), out_size = layers[i + 1].in.size();
      width = dense_forward(layer, op.inputs[i], op.threads,
                            [&](int64_t n, int64_t channel, Vec<T>* sums) {
                              activate<T>(load(bias + channel), layer.stage->relu, sums);
                              T* target = out + n * out_size + channel;
                              for (int k = 0; k < S; ++k) store<T>(target + k * stride, sums[k]);
                            });
    } else {
      width = dense_forward(
          layer, op.inputs[i], op.threads, [&](int64_t n, int64_t channel, Vec<T>* sums) {
            activate<T>(load(bias + channel), layer.stage->relu, sums);
            const int64_t valid = std::min<int64_t>(kLanes<T>, channels - channel);
            const int64_t at = n * channels + channel;
            store_some<T>(op.lower_out + at, sums[0] - sums[1], valid);
            store_some<T>(op.upper_out + at, sums[0] + sums[1], valid);
            store_some<T>(op.nominal_out + at, sums[2], valid);
          });
    }
    op.widths[i] = static_cast<T>(4 * width);
  }

  const Layer<T>& head = layers.back();
  const Conv2dShape& s = head.stage->shape;
  const int64_t pixels = s.in_height * s.in_width;
  parallel_for(op.threads, batch, [&](int64_t n) {
    const T* in = op.inputs.back() + n * head.in.size();
    const int64_t base = n * s.in_channels * pixels;
    for (int64_t p = 0; p < pixels; ++p) {
      const T* m = in + head.in_offsets[static_cast<size_t>(p)];
      for (int64_t c = 0; c < s.in_channels; ++c) {
        op.head_lower[base + c * pixels + p] = m[c] - m[c + head.in.stream_stride()];
        op.head_upper[base + c * pixels + p] = m[c] + m[c + head.in.stream_stride()];
      }
    }
  });
}

namespace {

// Adds one example's products to a convolution's weight gradient sums. Where the input is a ball's
// one stream, so is the gradient's first, centre and nominal together.
template <class T, int STREAMS>
void convolve_weight_gradient(const Layer<T>& layer, const std::vector<int64_t>& row_offsets,
                              const T* in, const T* gradient, T* signed_sums, T* absolute_sums) {
  constexpr int R = kTileRows;
  const Conv2dShape& s = layer.stage->shape;
  const Geometry &g = layer.in, &h = layer.gradient;
  const int64_t rows = layer.rows(), sum_rows = round_up(rows, R);
  const int64_t tile_height = std::max<int64_t>(1, kOuterPixels / s.out_width);
  for (int64_t y = 0; y < s.out_height; y += tile_height) {
    const int64_t lines = std::min(tile_height, s.out_height - y);
    const Operand<T> scalars{
        in + g.offset(y * s.stride_height - s.padding_height, -s.padding_width),
        s.stride_height * g.row_stride(), s.stride_width * g.pitch, g.stream_stride()};
    for_blocks<T>(s.out_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * kLanes<T>;
      const Operand<T> vector{gradient + h.offset(y, 0) + c, h.row_stride(), h.pitch,
                              h.stream_stride()};
      T* const plus = signed_sums + c * sum_rows;
      T* const magnitude = absolute_sums + c * sum_rows;
      for (int64_t row = 0; row < rows; row += R) {
        const int64_t* at = &row_offsets[static_cast<size_t>(row)];
        outer_tile<T, 0, STREAMS, V>(vector, scalars, at, lines, s.out_width, plus + row * N);
        if constexpr (STREAMS > 1)
          outer_tile<T, 1, STREAMS, V>(vector, scalars, at, lines, s.out_width,
                                       magnitude + row * N);
      }
    });
  }
}

// As convolve_weight_gradient: sums [product][block of outputs][row][lane].
template <class T>
void winograd_weight_gradient(const Layer<T>& layer, const T* in, const T* gradient, T* signed_sums,
                              T* absolute_sums) {
  constexpr int R = kTileRows;
  const Conv2dShape& s = layer.stage->shape;
  const Winograd w(s);
  const Geometry& h = layer.gradient;
  const int64_t depth = w.phases() * layer.in.pitch, width = layer.width();
  const int64_t sum_rows = round_up(depth, R);
  T* tiles_in = scratch<T>(Slot::kTilesIn, kTileValues * depth);
  T* tiles_out = scratch<T>(Slot::kTilesOut, kTileValues * width);
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for (int64_t begin = 0; begin < w.rows * w.columns; begin += kTiles) {
      const int64_t end = std::min(begin + kTiles, w.rows * w.columns), tiles = end - begin;
      transform_inputs(layer, w, in, begin, end, tiles_in);
      transform_tiles<T, M>(
          {gradient + h.offset(0, 0), &h, s.out_height, s.out_width, 1, 0, 0}, begin, end,
          w.columns, M, 0, 0, width, 0, width,
          [](Vec<T>* tile) {
            Vec<T> kernel[M * M];
            std::copy_n(tile, M * M, kernel);
            transform_kernel_tile<T, M>(kernel, tile);
          },
          tiles_out);
      for (int i = 0; i < kProducts; ++i)
        for_blocks<T>(width, [&](int64_t c, auto vectors) {
          constexpr int V = decltype(vectors)::value;
          const Operand<T> vector{tiles_out + i * tiles * S * width + c, 0, S * width, width};
          const Operand<T> scalars{tiles_in + i * tiles * S * depth, 0, S * depth, depth};
          const int64_t base = (i * width + c) * sum_rows;
          for (int64_t row = 0; row < depth; row += R) {
            int64_t at[R];
            for (int j = 0; j < R; ++j) at[j] = std::min(row + j, depth - 1);
            const int64_t to = base + row * V * kLanes<T>;
            outer_tile<T, 0, S, V>(vector, scalars, at, 1, tiles, signed_sums + to);
            outer_tile<T, 1, S, V>(vector, scalars, at, 1, tiles, absolute_sums + to);
          }
        });
    }
  });
}

// The weight gradient of a vector of outputs, from the sums of the threads, `size` apart.
template <class T>
void winograd_reduce(const Layer<T>& layer, const T* signed_sums, const T* absolute_sums,
                     int64_t size, int team, int64_t output, T* out) {
  const Conv2dShape& s = layer.stage->shape;
  const Winograd w(s);
  const int64_t depth = w.phases() * layer.in.pitch, width = layer.width();
  const int64_t sum_rows = round_up(depth, kTileRows), kernel = s.kernel_height;
  const int64_t block = output / kBlock<T> * kBlock<T>, n = std::min(kBlock<T>, width - block);
  const int64_t lanes = std::min<int64_t>(kLanes<T>, s.out_channels - output);
  with_outputs(w, [&](auto outputs) {
    constexpr int K = kPoints + 1 - outputs;
    for (int64_t row = 0; row < depth; ++row) {
      const int64_t phase = row / layer.in.pitch, channel = row % layer.in.pitch;
      if (channel >= s.in_channels) continue;
      Vec<T> taps[2][K * K];
      for (int a = 0; a < 2; ++a) {
        Vec<T> products[kProducts] = {};
        for (int thread = 0; thread < team; ++thread)
          for (int i = 0; i < kProducts; ++i)
            products[i] += load((a ? absolute_sums : signed_sums) + thread * size + layer.sums +
                                (i * width + block) * sum_rows + row * n + output - block);
        transform_output_tile<T, K>(products, taps[a]);
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t at = ((output + lane) * s.in_channels + channel) * kernel * kernel;
        for (int64_t ky = 0; ky < K; ++ky)
          for (int64_t kx = 0; kx < K; ++kx) {
            const int64_t y = ky * w.stride + phase / w.stride,
                          x = kx * w.stride + phase % w.stride;
            if (y >= kernel || x >= kernel) continue;
            const int64_t tap = at + y * kernel + x;
            out[tap] = taps[0][ky * K + kx][lane] +
                       sign(layer.stage->weight[tap]) * taps[1][ky * K + kx][lane];
          }
      }
    }
  });
}

// One example's input gradient; finish(pixel, channel of the vector, streams).
template <class T, class Finish>
void winograd_input_gradient(const Layer<T>& layer, const T* panels, const T* gradient,
                             const Finish& finish) {
  const Conv2dShape& s = layer.stage->shape;
  const Winograd w(s);
  const Geometry& h = layer.gradient;
  const int64_t depth = layer.width(), pitch = layer.in.pitch;
  T* tiles_in = scratch<T>(Slot::kTilesIn, kTileValues * depth);
  T* products = scratch<T>(Slot::kTilesOut, kTileValues * kBlock<T>);
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for (int64_t begin = 0; begin < w.in_rows * w.in_columns; begin += kTiles) {
      const int64_t end = std::min(begin + kTiles, w.in_rows * w.in_columns);
      transform_tiles<T, kPoints>(
          {gradient + h.offset(0, 0), &h, s.out_height, s.out_width, 1, 0, 0}, begin, end,
          w.in_columns, M, w.in_y - (w.taps - 1), w.in_x - (w.taps - 1), depth, 0, depth,
          transform_input_tile<T>, tiles_in);
      multiply_tiles<T, M>(
          tiles_in, end - begin, depth, panels + layer.backward_panel, w.phases() * pitch, products,
          [&](int64_t tile, int64_t output, Vec<T>(*sums)[M* M]) {
            const int64_t phase = output / pitch;
            const int64_t y0 = (w.in_y + (begin + tile) / w.in_columns * M) * w.stride +
                               phase / w.stride - s.padding_height;
            const int64_t x0 = (w.in_x + (begin + tile) % w.in_columns * M) * w.stride +
                               phase % w.stride - s.padding_width;
            for (int i = 0; i < M; ++i)
              for (int j = 0; j < M; ++j) {
                const int64_t y = y0 + i * w.stride, x = x0 + j * w.stride;
                if (y < 0 || y >= s.in_height || x < 0 || x >= s.in_width) continue;
                Vec<T> streams[S];
                for (int k = 0; k < S; ++k) streams[k] = sums[k][M * i + j];
                finish(y * s.in_width + x, output % pitch, streams);
              }
          });
    }
  });
}

// Adds one example's gradient of a bias, and of a ball's radius.
template <class T, int STREAMS>
void add_bias_gradient(const Layer<T>& layer, const T* gradient, double* bias_sums,
                       double* radius_sums) {
  const Conv2dShape& s = layer.stage->shape;
  const Geometry& h = layer.gradient;
  const int64_t channels = s.out_channels;
  for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
    Vec<T> totals[2] = {};
    for (int64_t y = 0; y < s.out_height; ++y)
      for (int64_t x = 0; x < s.out_width; ++x) {
        const T* p = gradient + h.offset(y, x) + c;
        totals[0] += load(p);
        if constexpr (STREAMS > 1)
          totals[0] += load(p + 2 * h.stream_stride());
        else
          totals[1] += load(p + h.stream_stride());
      }
    const int64_t count = std::min<int64_t>(kLanes<T>, channels - c);
    for (int64_t i = 0; i < count; ++i) {
      bias_sums[c + i] += static_cast<double>(totals[0][i]);
      if constexpr (STREAMS == 1) radius_sums[c + i] += static_cast<double>(totals[1][i]);
    }
  }
}

// One example's gradient of the input of the first dense stage, into the padded image that the
// convolution before it reads.
template <class T>
void copy_gradient(const Layer<T>& dense, const T* from, const Layer<T>& convolution, T* to) {
  const Geometry &g = dense.in, &h = convolution.gradient;
  const int64_t size = g.columns * h.pitch;
  for (int64_t y = 0; y < g.rows; ++y) {
    const T* in = from + g.offset(y, 0);
    T* out = to + h.offset(y, 0);
    for (int k = 0; k < S; ++k)
      std::copy_n(in + k * g.stream_stride(), size, out + k * h.stream_stride());
    if (convolution.in.streams == 1)
      for (int64_t i = 0; i < size; ++i) out[i] += in[2 * g.stream_stride() + i];
  }
}

// The gradient of the network's packed input -> that of lower, upper and nominal.
template <class T>
void unpack_gradient(const Conv2dShape& s, int64_t n, const T* packed,
                     const std::vector<int64_t>& at, int64_t stream_stride, T* lower, T* upper,
                     T* nominal) {
  const int64_t pixels = s.in_height * s.in_width;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < s.in_channels; ++c) {
      const T* g = packed + at[static_cast<size_t>(p)] + c;
      const int64_t to = (n * s.in_channels + c) * pixels + p;
      const T center = T(0.5) * g[0], radius = T(0.5) * g[stream_stride];
      lower[to] = center - radius;
      upper[to] = center + radius;
      nominal[to] = g[2 * stream_stride];
    }
}

}  // namespace

template <class T>
void network_backward(const NetworkBackward<T>& op) {
  std::vector<Layer<T>> layers = plan(op.stages, op.ball_radius != nullptr);
  const bool wants_input = op.grad_lower_in != nullptr;
  const T* panels = pack_weights(layers, true, wants_input, op.threads);
  const Conv2dShape& first = op.stages[0].shape;
  const int64_t batch = first.batch;
  size_t convolutions = 0;
  while (!layers[convolutions].dense) ++convolutions;

  // The logits' gradient.
  const int64_t classes = op.stages.back().shape.out_channels;
  int64_t pitch = spread_pitch<T>(round_up(classes, kLanes<T>));
  std::vector<T> logits(static_cast<size_t>(batch * S * pitch), T{0});
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t o = 0; o < classes; ++o) {
      const int64_t at = n * classes + o;
      T* g = &logits[static_cast<size_t>(n * S * pitch + o)];
      g[0] = op.grad_lower[at] + op.grad_upper[at];
      g[pitch] = op.grad_upper[at] - op.grad_lower[at] +
                 T(4) * op.grad_widths[layers.size() - 1] * (op.upper_out[at] - op.lower_out[at]);
      g[2 * pitch] = op.grad_nominal[at];
    }

  const T* gradient = logits.data();  // of a stage's output, packed as the input of the next
  for (size_t i = layers.size(); i-- > convolutions;) {
    const Layer<T>& layer = layers[i];
    const Conv2dShape& s = layer.stage->shape;
    const bool last = i + 1 == layers.size();
    const int64_t depth = static_cast<int64_t>(layer.in_offsets.size()) * layer.in.pitch;
    // The extra gradient of the last stage's input, by (m, r) in the packed order.
    std::vector<T> head;
    if (last && op.grad_head_lower) {
      head.assign(static_cast<size_t>(batch * 2 * depth + kBlock<T>), T{0});
      const int64_t pixels = s.in_height * s.in_width;
      for (int64_t n = 0; n < batch; ++n)
        for (int64_t c = 0; c < s.in_channels; ++c)
          for (int64_t p = 0; p < pixels; ++p) {
            const int64_t from = (n * s.in_channels + c) * pixels + p;
            T* to = &head[static_cast<size_t>(n * 2 * depth + p * layer.in.pitch + c)];
            to[0] = op.grad_head_lower[from] + op.grad_head_upper[from];
            to[depth] = op.grad_head_upper[from] - op.grad_head_lower[from];
          }
    }
    T* next = nullptr;
    if (i > 0 || wants_input)
      next = scratch<T>((layers.size() - i) % 2 ? Slot::kStageOdd : Slot::kStageEven,
                        batch * layer.in.size() + kBlock<T>);
    const InputTarget<T> target{i > 0 ? &op.stages[i - 1] : nullptr, next,
                                i > 0 ? T(8) * op.grad_widths[i - 1] : T{0}};
    const std::vector<FeatureBlock> blocks = feature_blocks(layer, kFeatures);
    parallel_for(op.threads, static_cast<int64_t>(blocks.size()), [&](int64_t b) {
      dense_backward(layer, op.inputs[i], gradient, pitch, blocks[static_cast<size_t>(b)], target,
                     head.empty() ? nullptr : head.data(), op.grad_weights[i]);
    });
    if (op.grad_biases[i])
      dense_bias_gradient(gradient, pitch, batch, s.out_channels, op.grad_biases[i]);
    gradient = next;
    pitch = layer.in.stream_stride();
  }

  if (convolutions == 0) {
    if (wants_input)
      for (int64_t n = 0; n < batch; ++n)
        unpack_gradient(first, n, gradient + n * layers[0].in.size(), layers[0].in_offsets,
                        layers[0].in.stream_stride(), op.grad_lower_in, op.grad_upper_in,
                        op.grad_nominal_in);
    return;
  }

  int64_t sums = 0, images = 0, outputs = 0, max_pixels = 1;
  std::vector<std::vector<int64_t>> row_offsets(convolutions);
  for (size_t i = 0; i < convolutions; ++i) {
    Layer<T>& layer = layers[i];
    const Conv2dShape& s = layer.stage->shape;
    layer.sums = sums;
    if (layer.winograd)
      sums +=
          kProducts * layer.width() * round_up(Winograd(s).phases() * layer.in.pitch, kTileRows);
    else if (layer.stage->weight)
      sums += layer.sum_size();
    layer.scratch = images;
    images += layer.gradient.size() + kBlock<T>;
    outputs += s.out_channels;
    max_pixels = std::max(max_pixels, layer.backward.max_pixels);
    for (int64_t row = 0; row < round_up(layer.rows(), kTileRows); ++row) {
      const int64_t r = std::min(row, layer.rows() - 1), tap = r / s.in_channels;
      row_offsets[i].push_back(tap / s.kernel_width * s.dilation_height * layer.in.row_stride() +
                               tap % s.kernel_width * s.dilation_width * layer.in.pitch +
                               r % s.in_channels);
    }
  }
  T* signed_sums = scratch<T>(Slot::kSumA, op.threads * sums);
  T* absolute_sums = scratch<T>(Slot::kSumB, op.threads * sums);
  std::vector<double> bias_sums(static_cast<size_t>(op.threads * outputs), 0.0);
  std::vector<double> radius_sums(static_cast<size_t>(op.threads * first.out_channels), 0.0);
  int team = 1;
  parallel(batch > 1 ? op.threads : 1, [&](int thread, int actual) {
    if (thread == 0) team = actual;
    T* plus = signed_sums + thread * sums;
    T* magnitude = absolute_sums + thread * sums;
    std::fill_n(plus, sums, T{0});
    std::fill_n(magnitude, sums, T{0});
    T* product = scratch<T>(Slot::kProduct, max_pixels * S * kBlock<T>);
    T* image = scratch<T>(Slot::kGradient, images + kBlock<T>);
    for (size_t i = 0; i < convolutions; ++i)
      clear_padding(layers[i].gradient, op.stages[i].shape.out_height, op.stages[i].shape.out_width,
                    image + layers[i].scratch);
    const int64_t input_pitch = round_up(first.in_channels, kLanes<T>);
    const int64_t pixels = first.in_height * first.in_width;
    T* input = wants_input ? scratch<T>(Slot::kSource, S * pixels * input_pitch) : nullptr;
    const Layer<T>& dense = layers[convolutions];
    const Part part(batch, thread, actual);
    for (int64_t n = part.begin; n < part.end; ++n) {
      T* g = image + layers[convolutions - 1].scratch;
      copy_gradient(dense, gradient + n * dense.in.size(), layers[convolutions - 1], g);
      int64_t bias_at = outputs;
      for (size_t i = convolutions; i-- > 0;) {
        const Layer<T>& layer = layers[i];
        const Conv2dShape& s = layer.stage->shape;
        const T* in = op.inputs[i] + n * layer.in.size();
        bias_at -= s.out_channels;
        if (layer.stage->weight) {
          const bool one = layer.in.streams == 1;
          T *to_plus = plus + layer.sums, *to_magnitude = magnitude + layer.sums;
          if (layer.winograd) {
            winograd_weight_gradient(layer, in, g, to_plus, to_magnitude);
          } else {
            const auto add = one ? convolve_weight_gradient<T, 1> : convolve_weight_gradient<T, S>;
            add(layer, row_offsets[i], in, g, to_plus, to_magnitude);
          }
          const auto add = one ? add_bias_gradient<T, 1> : add_bias_gradient<T, S>;
          add(layer, g, &bias_sums[static_cast<size_t>(thread * outputs + bias_at)],
              &radius_sums[static_cast<size_t>(thread * first.out_channels)]);
        }
        if (i == 0 && !wants_input) break;
        T* out = i > 0 ? image + layers[i - 1].scratch : input;
        const T scale = i > 0 ? T(8) * op.grad_widths[i - 1] : T{0};
        const auto finish = [&](int64_t pixel, int64_t channel, Vec<T>* streams) {
          if (i > 0) {
            const Layer<T>& previous = layers[i - 1];
            deactivate<T>(in + layer.in_offsets[static_cast<size_t>(pixel)] + channel,
                          layer.in.stream_stride(), scale, previous.stage->relu, streams);
            if (previous.in.streams == 1) streams[0] += streams[2];
            T* to = out + previous.gradient_offsets[static_cast<size_t>(pixel)] + channel;
            for (int k = 0; k < S; ++k)
              store<T>(to + k * previous.gradient.stream_stride(), streams[k]);
          } else {
            T* to = out + pixel * input_pitch + channel;
            for (int k = 0; k < S; ++k) store<T>(to + k * pixels * input_pitch, streams[k]);
          }
        };
        const Geometry& h = layer.gradient;
        if (!layer.stage->weight) {
          for (int64_t y = 0; y < s.in_height; ++y)
            for (int64_t x = 0; x < s.in_width; ++x)
              for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
                Vec<T> streams[S];
                pool_gradient<T>(layer, y, x, g + c, streams);
                finish(y * s.in_width + x, c, streams);
              }
        }
        if (layer.winograd) {
          winograd_input_gradient(layer, panels, g, finish);
          g = out;
          continue;
        }
        for (const Strip& strip : layer.backward.strips)
          for_blocks<T>(s.in_channels, [&](int64_t c, auto vectors) {
            constexpr int V = decltype(vectors)::value;
            const T* panel = panels + layer.backward_panel +
                             c * s.kernel_height * s.kernel_width * layer.width();
            convolve_strip<T, S, V>(layer.backward, strip, strip_source(h, strip, g),
                                    h.stream_stride(), s.in_width, panel, product,
                                    [&](int64_t pixel, int v, bool, Vec<T>* streams) {
                                      finish(pixel, c + v * kLanes<T>, streams);
                                    });
          });
        if (i == 0) {
          std::vector<int64_t> at(static_cast<size_t>(pixels));
          for (int64_t p = 0; p < pixels; ++p) at[static_cast<size_t>(p)] = p * input_pitch;
          unpack_gradient(first, n, input, at, pixels * input_pitch, op.grad_lower_in,
                          op.grad_upper_in, op.grad_nominal_in);
        }
        g = out;
      }
    }
  });

  struct Output {
    size_t layer;
    int64_t channel, bias;
  };
  std::vector<Output> items;
  for (size_t i = 0, bias = 0; i < convolutions; ++i)
    for (int64_t o = 0; o < op.stages[i].shape.out_channels; ++o, ++bias)
      if (op.stages[i].weight) items.push_back({i, o, static_cast<int64_t>(bias)});
  parallel_for(op.threads, static_cast<int64_t>(items.size()), [&](int64_t index) {
    const Output& item = items[static_cast<size_t>(index)];
    const Layer<T>& layer = layers[item.layer];
    const Conv2dShape& s = layer.stage->shape;
    const int64_t taps = s.kernel_height * s.kernel_width, o = item.channel;
    const int64_t block = o / kBlock<T> * kBlock<T>, n = std::min(kBlock<T>, layer.width() - block);
    const int64_t base = layer.sums + block * round_up(layer.rows(), kTileRows) + o - block;
    const T* w = layer.stage->weight + o * layer.rows();
    T* target = op.grad_weights[item.layer];
    if (target && layer.winograd) {
      if (o % kLanes<T> == 0)
        winograd_reduce(layer, signed_sums, absolute_sums, sums, team, o, target);
    } else if (target)
      for (int64_t c = 0; c < s.in_channels; ++c)
        for (int64_t tap = 0; tap < taps; ++tap) {
          T plus = 0, magnitude = 0;
          for (int thread = 0; thread < team; ++thread) {
            const int64_t at = thread * sums + base + (tap * s.in_channels + c) * n;
            plus += signed_sums[at];
            magnitude += absolute_sums[at];
          }
          const int64_t k = c * taps + tap;
          if (layer.in.streams == 1)
            for (int thread = 0; thread < team; ++thread)
              magnitude +=
                  static_cast<T>(radius_sums[static_cast<size_t>(thread * s.out_channels + o)] *
                                 static_cast<double>(op.ball_radius[c]));
          target[o * layer.rows() + k] = plus + sign(w[k]) * magnitude;
        }
    if (op.grad_biases[item.layer]) {
      double total = 0;
      for (int thread = 0; thread < team; ++thread)
        total += bias_sums[static_cast<size_t>(thread * outputs + item.bias)];
      op.grad_biases[item.layer][o] = static_cast<T>(total);
    }
  });
}

template int64_t stage_input_size<float>(const Conv2dShape&, bool, bool);
template int64_t stage_input_size<double>(const Conv2dShape&, bool, bool);
template void network_forward(const NetworkForward<float>&);
template void network_forward(const NetworkForward<double>&);
template void network_backward(const NetworkBackward<float>&);
template void network_backward(const NetworkBackward<double>&);

}  // namespace cibp
