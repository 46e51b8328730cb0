// Convolutions run example by example, all of them while an example is in cache; dense stages
// (dense.h) run over the whole batch, a block of weights at a time.
#include "network.h"

#include <algorithm>
#include <vector>

#include "dense.h"
#include "direct.h"
#include "layers.h"
#include "parallel.h"
#include "plan.h"
#include "pool.h"
#include "saved.h"
#include "streams.h"
#include "tile.h"
#include "winograd.h"

namespace cibp {
namespace {

template <class T>
std::vector<Layer<T>> plan(const std::vector<Stage<T>>& stages, bool ball) {
  std::vector<Layer<T>> layers = make_layers(stages, ball);
  for (size_t i = 1; i < layers.size(); ++i) {  // the first one's channels fill no vector
    Layer<T>& layer = layers[i];
    if (stages[i].fast && stages[i].weight && !layer.dense)
      layer.winograd = winograd_passes(stages[i].shape);
    // Not fewer than of the layer before, which would have to run for fewer, too.
    const Conv2dShape& s = stages[i].shape;
    const int64_t group = layer.winograd.any() ? Winograd(s).group(layer.in.size()) : 1;
    layer.group = std::min(s.batch, std::max(layers[i - 1].group, group));
  }
  return layers;
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
    if (backward ? layer.winograd.input : layer.winograd.forward) {
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
    if (backward ? layer.winograd.input : layer.winograd.forward)
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

// The stage `i` of one example, not by Winograd's products; returns the sum of r^2.
template <class T>
double forward_one(const Layer<T>& layer, const T* panels, const T* bias, const T* radius,
                   const T* in, const Layer<T>& next, int64_t max_pixels, T* out) {
  if (!layer.stage->weight) return pool_forward(layer, in, next, out);
  T* product = scratch<T>(Slot::kProduct, max_pixels * S * kBlock<T>);
  const auto convolve = layer.in.streams == 1 ? convolve_forward<T, 1> : convolve_forward<T, S>;
  return convolve(layer, panels, bias, radius, in, next, product, out);
}

// The caller's buffer for a whole batch of a dense stage's input, or of its gradient; that of the
// stage before is another.
template <class T>
Slot batch_slot(const std::vector<Layer<T>>& layers, size_t i) {
  return (layers.size() - i) % 2 ? Slot::kStageOdd : Slot::kStageEven;
}

}  // namespace

template <class T>
int64_t stage_input_bytes(const Conv2dShape& shape, bool first, bool ball, bool fast) {
  return input_geometry<T>(shape, first, ball).size() *
         saved_element<T>(saves_rounded<T>(first, fast));
}

template <class T>
void network_forward(const NetworkForward<T>& op) {
  std::vector<Layer<T>> layers = plan(op.stages, op.ball_radius != nullptr);
  const T* panels = pack_weights(layers, false, false, op.threads);
  std::vector<const T*> biases;
  padded_biases(layers, biases);
  const int64_t batch = op.stages[0].shape.batch;
  size_t convolutions = 0;
  int64_t max_pixels = 1, image_sizes = 0;
  for (; !layers[convolutions].dense; ++convolutions) {
    Layer<T>& layer = layers[convolutions];
    max_pixels = std::max(max_pixels, layer.forward.max_pixels);
    layer.image = image_sizes;
    if (layer.rounded) image_sizes += layer.group * layer.in.size();
  }
  const auto saved = [&](size_t i, int64_t n) { return op.inputs[i] + n * layers[i].saved_size(); };
  // Where the images of a stage's input are computed, from example n on: where they are saved, or,
  // if those are rounded, in `buffer`.
  const auto images_of = [&](size_t i, int64_t n, T* buffer) {
    return layers[i].rounded ? buffer : reinterpret_cast<T*>(saved(i, n));
  };
  // The same of a dense stage and the whole batch.
  const auto batch_of = [&](size_t i) {
    T* const buffer = layers[i].rounded
                          ? scratch<T>(batch_slot(layers, i), batch * layers[i].in.size())
                          : nullptr;
    return images_of(i, 0, buffer);
  };

  const int64_t count = static_cast<int64_t>(convolutions);
  std::vector<double> widths(static_cast<size_t>(batch * count + 1));
  const Tensor4<const T> sources[S] = {op.lower, op.upper, op.nominal};
  const std::vector<T> radius =
      op.ball_radius ? ball_output_radius(layers[0], op.ball_radius) : std::vector<T>{};
  // The stages up to `i` of the examples [begin, end), a group at a time, into the images `out`.
  const auto run = [&](const auto& self, size_t i, int64_t begin, int64_t end, T* buffer,
                       T* out) -> void {
    const Layer<T>&layer = layers[i], &next = layers[i + 1];
    for (int64_t n = begin; n < end; n += layer.group, out += layer.group * next.in.size()) {
      const int64_t images = std::min(layer.group, end - n);
      T* const in = images_of(i, n, buffer + layer.image);
      if (i > 0)
        self(self, i - 1, n, n + images, buffer, in);
      else if (op.ball_radius)  // the first stage takes one example at a time
        pack_image(Copy<T, 1>{}, &sources[2], op.stages[0].shape, layer.in, n, in);
      else
        pack_image(CenterRadius<T, S>{}, sources, op.stages[0].shape, layer.in, n, in);
      double* const width = &widths[static_cast<size_t>(n * count) + i];
      if (layer.winograd.forward)
        *width = winograd_forward(layer, images, panels, biases[i], in, next, out);
      else
        for (int64_t k = 0; k < images; ++k)
          width[k * count] =
              forward_one(layer, panels, biases[i], radius.data(), in + k * layer.in.size(), next,
                          max_pixels, out + k * next.in.size());
      if (next.rounded) save_rounded(next, images, out, saved(i + 1, n));
    }
  };
  T* in = batch_of(convolutions);  // of a dense stage
  if (convolutions == 0)
    parallel_for(op.threads, batch, [&](int64_t n) {
      pack_image(CenterRadius<T, S>{}, sources, op.stages[0].shape, layers[0].in, n,
                 in + n * layers[0].in.size());
    });
  else
    parallel(batch > 1 ? op.threads : 1, [&](int thread, int team) {
      const Part part(batch, thread, team);
      run(run, convolutions - 1, part.begin, part.end, scratch<T>(Slot::kImages, image_sizes + 1),
          in + part.begin * layers[convolutions].in.size());
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
      const Layer<T>& next = layers[i + 1];
      T* const out = batch_of(i + 1);
      const int64_t stride = next.in.stream_stride(), out_size = next.in.size();
      width = dense_forward(layer, in, op.threads, [&](int64_t n, int64_t channel, Vec<T>* sums) {
        activate<T>(load(bias + channel), layer.stage->relu, sums);
        T* target = out + n * out_size + channel;
        for (int k = 0; k < S; ++k) store<T>(target + k * stride, sums[k]);
      });
      if (next.rounded)
        parallel_for(op.threads, batch, [&](int64_t n) {
          save_rounded(next, 1, out + n * out_size, saved(i + 1, n));
        });
      in = out;
    } else {
      width = dense_forward(layer, in, op.threads, [&](int64_t n, int64_t channel, Vec<T>* sums) {
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
    const T* image = in + n * head.in.size();
    const int64_t base = n * s.in_channels * pixels;
    for (int64_t p = 0; p < pixels; ++p) {
      const T* m = image + head.in_offsets[static_cast<size_t>(p)];
      for (int64_t c = 0; c < s.in_channels; ++c) {
        op.head_lower[base + c * pixels + p] = m[c] - m[c + head.in.stream_stride()];
        op.head_upper[base + c * pixels + p] = m[c] + m[c + head.in.stream_stride()];
      }
    }
  });
}

namespace {

// The gradient of the logits' center, radius and nominal: [N][stream][pitch].
template <class T>
std::vector<T> logits_gradient(const NetworkBackward<T>& op, int64_t pitch) {
  const Conv2dShape& s = op.stages.back().shape;
  const T width = T(4) * op.grad_widths[op.stages.size() - 1];
  std::vector<T> gradient(static_cast<size_t>(s.batch * S * pitch), T{0});
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t o = 0; o < s.out_channels; ++o) {
      const int64_t at = n * s.out_channels + o;
      T* g = &gradient[static_cast<size_t>(n * S * pitch + o)];
      g[0] = op.grad_lower[at] + op.grad_upper[at];
      g[pitch] =
          op.grad_upper[at] - op.grad_lower[at] + width * (op.upper_out[at] - op.lower_out[at]);
      g[2 * pitch] = op.grad_nominal[at];
    }
  return gradient;
}

// The further gradient of the last stage's input by (m, r): [N][2][pixel][channel]; empty: none.
template <class T>
std::vector<T> head_gradient(const NetworkBackward<T>& op, const Layer<T>& layer) {
  if (!op.grad_head_lower) return {};
  const Conv2dShape& s = layer.stage->shape;
  const int64_t pixels = s.in_height * s.in_width, depth = pixels * layer.in.pitch;
  std::vector<T> gradient(static_cast<size_t>(s.batch * 2 * depth + kBlock<T>), T{0});
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t from = (n * s.in_channels + c) * pixels + p;
        T* to = &gradient[static_cast<size_t>(n * 2 * depth + p * layer.in.pitch + c)];
        to[0] = op.grad_head_lower[from] + op.grad_head_upper[from];
        to[depth] = op.grad_head_upper[from] - op.grad_head_lower[from];
      }
  return gradient;
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

// The input gradient of `images` examples of a stage that is not dense; finish(example, pixel,
// channel of the vector, streams).
template <class T, class Finish>
void input_gradient(const Layer<T>& layer, int64_t images, const T* panels, const T* gradient,
                    int64_t max_pixels, const Finish& finish) {
  if (layer.winograd.input) return winograd_input_gradient(layer, images, panels, gradient, finish);
  T* product = scratch<T>(Slot::kProduct, max_pixels * S * kBlock<T>);
  for (int64_t n = 0; n < images; ++n) {
    const T* of_one = gradient + n * layer.gradient.size();
    const auto finish_one = [&](int64_t pixel, int64_t channel, Vec<T>* streams) {
      finish(n, pixel, channel, streams);
    };
    if (layer.stage->weight)
      convolve_input_gradient(layer, panels, of_one, product, finish_one);
    else
      pool_input_gradient(layer, of_one, finish_one);
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

  int64_t pitch = spread_pitch<T>(round_up(op.stages.back().shape.out_channels, kLanes<T>));
  const std::vector<T> logits = logits_gradient(op, pitch);
  const std::vector<T> head = head_gradient(op, layers.back());
  const T* gradient = logits.data();  // of a stage's output, packed as the input of the next
  for (size_t i = layers.size(); i-- > convolutions;) {
    const Layer<T>& layer = layers[i];
    const Conv2dShape& s = layer.stage->shape;
    T* next = nullptr;
    if (i > 0 || wants_input)
      next = scratch<T>(batch_slot(layers, i), batch * layer.in.size() + kBlock<T>);
    const InputTarget<T> target{i > 0 ? &op.stages[i - 1] : nullptr, next,
                                i > 0 ? T(8) * op.grad_widths[i - 1] : T{0}};
    const std::vector<FeatureBlock> blocks = feature_blocks(layer, kFeatures);
    parallel_for(op.threads, static_cast<int64_t>(blocks.size()), [&](int64_t b) {
      dense_backward(layer, op.inputs[i], gradient, pitch, blocks[static_cast<size_t>(b)], target,
                     i + 1 < layers.size() || head.empty() ? nullptr : head.data(),
                     op.grad_weights[i]);
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
    if (layer.winograd.weight)
      sums +=
          kProducts * layer.width() * round_up(Winograd(s).phases() * layer.in.pitch, kTileRows);
    else if (layer.stage->weight)
      sums += layer.sum_size();
    layer.image = images;  // of as many as the next convolution takes at a time
    const int64_t group = layers[std::min(i + 1, convolutions - 1)].group;
    images += group * layer.gradient.size() + kBlock<T>;
    layer.bias = outputs;
    outputs += s.out_channels;
    max_pixels = std::max(max_pixels, layer.backward.max_pixels);
    if (!layer.stage->weight || layer.winograd.weight) continue;
    for (int64_t row = 0; row < round_up(layer.rows(), kTileRows); ++row) {
      const int64_t r = std::min(row, layer.rows() - 1), tap = r / s.in_channels;
      row_offsets[i].push_back(tap / s.kernel_width * s.dilation_height * layer.in.row_stride() +
                               tap % s.kernel_width * s.dilation_width * layer.in.pitch +
                               r % s.in_channels);
    }
  }
  const int64_t input_pitch = round_up(first.in_channels, kLanes<T>);
  const int64_t pixels = first.in_height * first.in_width;
  std::vector<int64_t> input_at(static_cast<size_t>(pixels));
  for (int64_t p = 0; p < pixels; ++p) input_at[static_cast<size_t>(p)] = p * input_pitch;

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
    T* image = scratch<T>(Slot::kGradient, images + kBlock<T>);
    for (size_t i = 0; i < convolutions; ++i)
      for (int64_t n = 0; n < layers[std::min(i + 1, convolutions - 1)].group; ++n)
        clear_padding(layers[i].gradient, op.stages[i].shape.out_height,
                      op.stages[i].shape.out_width,
                      image + layers[i].image + n * layers[i].gradient.size());
    // The stages from `i` down, of the examples [begin, end), from the gradients of i's outputs.
    const auto run = [&](const auto& self, size_t i, int64_t begin, int64_t end,
                         const T* gradients) -> void {
      const Layer<T>& layer = layers[i];
      const T* g = gradients;
      for (int64_t n = begin; n < end; n += layer.group) {
        const int64_t count = std::min(layer.group, end - n);
        const T* in = restore(layer, count, op.inputs[i] + n * layer.saved_size());
        if (layer.stage->weight) {
          const bool one = layer.in.streams == 1;
          T *to_plus = plus + layer.sums, *to_magnitude = magnitude + layer.sums;
          if (layer.winograd.weight)
            winograd_weight_gradient(layer, count, in, g, to_plus, to_magnitude);
          const auto add = one ? convolve_weight_gradient<T, 1> : convolve_weight_gradient<T, S>;
          const auto add_bias = one ? add_bias_gradient<T, 1> : add_bias_gradient<T, S>;
          for (int64_t k = 0; k < count; ++k) {
            const T* from = g + k * layer.gradient.size();
            if (!layer.winograd.weight)
              add(layer, row_offsets[i], in + k * layer.in.size(), from, to_plus, to_magnitude);
            add_bias(layer, from, &bias_sums[static_cast<size_t>(thread * outputs + layer.bias)],
                     &radius_sums[static_cast<size_t>(thread * first.out_channels)]);
          }
        }
        if (i > 0) {
          const Layer<T>& previous = layers[i - 1];
          T* const out = image + previous.image;
          const T scale = T(8) * op.grad_widths[i - 1];
          const auto finish = [&](int64_t example, int64_t pixel, int64_t channel,
                                  Vec<T>* streams) {
            deactivate<T>(in + example * layer.in.size() +
                              layer.in_offsets[static_cast<size_t>(pixel)] + channel,
                          layer.in.stream_stride(), scale, previous.stage->relu, streams);
            if (previous.in.streams == 1) streams[0] += streams[2];
            T* to = out + example * previous.gradient.size() +
                    previous.gradient_offsets[static_cast<size_t>(pixel)] + channel;
            for (int k = 0; k < S; ++k)
              store<T>(to + k * previous.gradient.stream_stride(), streams[k]);
          };
          input_gradient(layer, count, panels, g, max_pixels, finish);
          self(self, i - 1, n, n + count, out);
        } else if (wants_input) {  // the first stage takes one example at a time
          T* const out = scratch<T>(Slot::kSource, S * pixels * input_pitch);
          input_gradient(layer, 1, panels, g, max_pixels,
                         [&](int64_t, int64_t pixel, int64_t channel, Vec<T>* streams) {
                           T* to = out + pixel * input_pitch + channel;
                           for (int k = 0; k < S; ++k)
                             store<T>(to + k * pixels * input_pitch, streams[k]);
                         });
          unpack_gradient(first, n, out, input_at, pixels * input_pitch, op.grad_lower_in,
                          op.grad_upper_in, op.grad_nominal_in);
        }
        g += count * layer.gradient.size();
      }
    };
    const Layer<T>&dense = layers[convolutions], &last = layers[convolutions - 1];
    const Part part(batch, thread, actual);
    for (int64_t n = part.begin; n < part.end; n += last.group) {
      const int64_t end = std::min(n + last.group, part.end);
      T* const gradients = image + last.image;
      for (int64_t k = n; k < end; ++k)
        copy_gradient(dense, gradient + k * dense.in.size(), last,
                      gradients + (k - n) * last.gradient.size());
      run(run, convolutions - 1, n, end, gradients);
    }
  });

  struct Output {  // a vector of a layer's output channels
    size_t layer;
    int64_t channel;
  };
  std::vector<Output> items;
  for (size_t i = 0; i < convolutions; ++i)
    for (int64_t o = 0; op.stages[i].weight && o < layers[i].width(); o += kLanes<T>)
      items.push_back({i, o});
  parallel_for(op.threads, static_cast<int64_t>(items.size()), [&](int64_t index) {
    const auto [i, channel] = items[static_cast<size_t>(index)];
    const Layer<T>& layer = layers[i];
    const WeightSums<T> all{signed_sums + layer.sums, absolute_sums + layer.sums, sums, team};
    if (T* target = op.grad_weights[i]) {
      if (layer.winograd.weight)
        winograd_reduce(layer, all, channel, target);
      else
        convolve_reduce(layer, all, radius_sums.data(), op.ball_radius, channel, target);
    }
    const int64_t end = std::min<int64_t>(channel + kLanes<T>, op.stages[i].shape.out_channels);
    for (int64_t o = channel; op.grad_biases[i] && o < end; ++o) {
      double total = 0;
      for (int thread = 0; thread < team; ++thread)
        total += bias_sums[static_cast<size_t>(thread * outputs + layer.bias + o)];
      op.grad_biases[i][o] = static_cast<T>(total);
    }
  });
}

template int64_t stage_input_bytes<float>(const Conv2dShape&, bool, bool, bool);
template int64_t stage_input_bytes<double>(const Conv2dShape&, bool, bool, bool);
template void network_forward(const NetworkForward<float>&);
template void network_forward(const NetworkForward<double>&);
template void network_backward(const NetworkBackward<float>&);
template void network_backward(const NetworkBackward<double>&);

}  // namespace cibp
