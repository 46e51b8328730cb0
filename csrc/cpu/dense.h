// Dense stages: the whole batch at once, a block of weights at a time.
//
// Their weights lie as torch has them, [out][channel][pixel], and their inputs as [pixel][channel]
// (layers.h): a block of some pixels x channels goes through an in-register transpose on its way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers.h"
#include "parallel.h"
#include "tile.h"
#include "vec.h"

namespace cibp {

constexpr int64_t kDepth = 256;     // products summed in registers before the sums go to memory
constexpr int64_t kExamples = 64;   // of one block of a weight gradient
constexpr int64_t kFeatures = 128;  // of the input, of one block of the backward pass
template <class T>
constexpr int64_t kGroup = 4 * kBlock<T>;  // outputs that read an input while it is in cache

// Some of an input's features: [pixel, pixel + pixels) x [channel, channel + channels), ordered
// pixel by pixel. channels is a multiple of a vector; those past the input's last are zero.
struct FeatureBlock {
  int64_t pixel, pixels, channel, channels;
  int64_t size() const { return pixels * channels; }
};

template <class T>
std::vector<FeatureBlock> feature_blocks(const Layer<T>& layer, int64_t size) {
  const int64_t all = static_cast<int64_t>(layer.in_offsets.size());
  const int64_t pixels = std::min<int64_t>(all, kLanes<T>);
  const int64_t channels = std::max(kBlock<T>, size / pixels / kBlock<T> * kBlock<T>);
  const int64_t end = round_up(layer.stage->shape.in_channels, kLanes<T>);
  std::vector<FeatureBlock> blocks;
  for (int64_t p = 0; p < all; p += pixels)
    for (int64_t c = 0; c < end; c += channels)
      blocks.push_back({p, std::min(pixels, all - p), c, std::min(channels, end - c)});
  return blocks;
}

// A stage's weights, [out][channel][pixel].
template <class T>
struct DenseWeights {
  const T* data;
  int64_t outputs, channels, pixels;
  int64_t row() const { return channels * pixels; }

  explicit DenseWeights(const Stage<T>& stage)
      : data(stage.weight),
        outputs(stage.shape.out_channels),
        channels(stage.shape.in_channels),
        pixels(stage.shape.in_height * stage.shape.in_width) {}

  // `count` weights of consecutive pixels or, where there is one pixel, channels. Lanes past them
  // are unspecified, so that a whole vector can be read wherever there is one.
  Vec<T> some(int64_t output, int64_t channel, int64_t pixel, int64_t count) const {
    const int64_t at = output * row() + channel * pixels + pixel;
    return at + kLanes<T> <= outputs * row() ? load(data + at) : load_some(data + at, count);
  }
};

// panel[feature][output] for the N outputs from `first` on; zeros past the last channel and output.
template <class T, int VECTORS>
void pack_panel(const DenseWeights<T>& w, const FeatureBlock& block, int64_t first, T* panel) {
  constexpr int L = kLanes<T>, N = VECTORS * L;
  const bool single = w.pixels == 1;  // then a vector of channels is transposed instead
  const int64_t step = single ? L : 1;
  for (int o = 0; o < N; o += L)
    for (int64_t c = 0; c < block.channels; c += step) {
      const int64_t channel = block.channel + c;
      const int64_t valid = std::min(step, w.channels - channel);  // channels
      const int64_t count = single ? step : block.pixels;          // features
      Vec<T> rows[L] = {};
      if (valid > 0)
        for (int i = 0; i < L && first + o + i < w.outputs; ++i)
          rows[i] = w.some(first + o + i, channel, block.pixel, single ? valid : count);
      transpose<T>(rows);
      T* target = panel + c * N + o;
      const int64_t stride = single ? N : block.channels * N;
      for (int64_t j = 0; j < count; ++j)
        store<T>(target + j * stride, !single || j < valid ? rows[j] : Vec<T>{});
    }
}

// rows[pixel]: an output's weights for a vector of channels; zeros past the last channel.
template <class T>
void load_channels(const DenseWeights<T>& w, int64_t output, const FeatureBlock& block,
                   int64_t channel, Vec<T>* rows) {
  constexpr int L = kLanes<T>;
  const int64_t valid = std::min<int64_t>(L, w.channels - channel);
  if (w.pixels == 1) {
    rows[0] = load_some(w.data + output * w.row() + channel, valid);
    return;
  }
  for (int i = 0; i < L; ++i)
    rows[i] = i < valid ? w.some(output, channel + i, block.pixel, block.pixels) : Vec<T>{};
  transpose<T>(rows);
}

// The inverse, into a gradient that lies as the weights do.
template <class T>
void store_channels(const DenseWeights<T>& w, int64_t output, const FeatureBlock& block,
                    int64_t channel, Vec<T>* rows, T* gradient) {
  constexpr int L = kLanes<T>;
  const int64_t valid = std::min<int64_t>(L, w.channels - channel);
  T* target = gradient + output * w.row() + channel * w.pixels + block.pixel;
  if (w.pixels == 1) {
    store_some<T>(target, rows[0], valid);
    return;
  }
  transpose<T>(rows);
  for (int i = 0; i < valid; ++i) store_some<T>(target + i * w.pixels, rows[i], block.pixels);
}

// The products of a block's features, for panel rows from 0 on.
template <class T>
std::vector<Run> feature_runs(const Layer<T>& layer, const FeatureBlock& block) {
  std::vector<Run> runs;
  for (int64_t j = 0; j < block.pixels; ++j) {
    const int64_t source = layer.in_offsets[static_cast<size_t>(block.pixel + j)] + block.channel;
    if (j > 0 && runs.back().source + runs.back().length == source)
      runs.back().length += block.channels;
    else
      runs.push_back({source, j * block.channels, block.channels});
  }
  return runs;
}

// A stage's forward pass; finish(example, channel of the vector, sums) in any thread. Returns the
// sum of r^2 that finish leaves.
template <class T, class Finish>
double dense_forward(const Layer<T>& layer, const T* in, int threads, const Finish& finish) {
  constexpr int P = kTilePixels<S>;
  const DenseWeights<T> w(*layer.stage);
  const int64_t batch = layer.stage->shape.batch, in_size = layer.in.size();
  const int64_t groups = ceil_div(layer.width(), kGroup<T>);
  // Few groups leave threads idle, or give them unequal shares: then the batch is divided.
  const int64_t parts =
      groups >= 4 * threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, batch / (2 * P)));
  const std::vector<FeatureBlock> blocks = feature_blocks(layer, kDepth);
  double* widths = scratch<double>(Slot::kWidth, groups * parts);
  parallel_for(threads, groups * parts, [&](int64_t item) {
    const int64_t first = item % groups * kGroup<T>;
    const int64_t width = std::min(kGroup<T>, layer.width() - first);
    const Part part(batch, static_cast<int>(item / groups), static_cast<int>(parts));
    const int64_t count = part.end - part.begin;
    T* panel = scratch<T>(Slot::kGradient, std::max(kDepth, blocks[0].size()) * kBlock<T>);
    T* product = scratch<T>(Slot::kProduct, count * S * kGroup<T>);
    double squares = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      const std::vector<Run> runs = feature_runs(layer, blocks[b]);
      const int64_t run_count = static_cast<int64_t>(runs.size());
      for_blocks<T>(width, [&](int64_t c, auto vectors) {
        constexpr int V = decltype(vectors)::value;
        pack_panel<T, V>(w, blocks[b], first + c, panel);
        T* const sums = product + c * S * count;
        Vec<T> square{};
        for (int64_t n = 0; n < count; n += P) {
          int64_t pixels[P], targets[P];
          for (int t = 0; t < P; ++t) {
            targets[t] = std::min(n + t, count - 1);  // the last tile repeats the last example
            pixels[t] = (part.begin + targets[t]) * in_size;
          }
          if (b + 1 < blocks.size())
            multiply_tile<T, S, V>(in, pixels, layer.in.stream_stride(), runs.data(), run_count,
                                   panel, targets, b > 0, sums);
          else
            multiply<T, S, V>(in, pixels, layer.in.stream_stride(), runs.data(), run_count, panel,
                              targets, b > 0 ? sums : nullptr, [&](int t, int v, Vec<T>* streams) {
                                finish(part.begin + targets[t], first + c + v * kLanes<T>, streams);
                                if (n + t < count) square += streams[1] * streams[1];
                              });
        }
        squares += static_cast<double>(sum<T>(square));
      });
    }
    widths[item] = squares;
  });
  double total = 0;
  for (int64_t i = 0; i < groups * parts; ++i) total += widths[i];
  return total;
}

// Where the gradient of a dense stage's input goes, packed as the input is.
template <class T>
struct InputTarget {
  const Stage<T>* previous;  // null: the network's input
  T* data;                   // null: not wanted
  T scale;                   // of r in the width's gradient
};

// A stage's backward pass of some features. gradient: [N][stream][pitch]. head: a further gradient
// by (m, r) of the input, [N][2][pixel][channel], or null.
template <class T>
void dense_backward(const Layer<T>& layer, const T* in, const T* gradient, int64_t pitch,
                    const FeatureBlock& block, const InputTarget<T>& target, const T* head,
                    T* grad_weight) {
  constexpr int P = kTilePixels<S>, R = kTileRows, L = kLanes<T>;
  const DenseWeights<T> w(*layer.stage);
  const int64_t batch = layer.stage->shape.batch, outputs = w.outputs, size = block.size();
  const int64_t in_size = layer.in.size(), stride = layer.in.stream_stride();
  // body(pixel of the block, channel of the block, first feature, vectors)
  const auto for_features = [&](const auto& body) {
    for (int64_t j = 0; j < block.pixels; ++j)
      for_blocks<T>(block.channels,
                    [&](int64_t c, auto vectors) { body(j, c, j * block.channels + c, vectors); });
  };

  T* weights = scratch<T>(Slot::kBlockWeights, outputs * size);  // [vector block][out]
  for (int64_t o = 0; o < outputs; ++o)
    for_blocks<T>(block.channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (int v = 0; v < V; ++v) {
        Vec<T> rows[L];
        load_channels<T>(w, o, block, block.channel + c + v * L, rows);
        for (int64_t j = 0; j < block.pixels; ++j)
          store<T>(weights + (j * block.channels + c) * outputs + (o * V + v) * L, rows[j]);
      }
    });

  if (target.data) {
    const int64_t depth = static_cast<int64_t>(layer.in_offsets.size()) * layer.in.pitch;
    T* product = scratch<T>(Slot::kProduct, batch * S * kBlock<T>);
    for_features([&](int64_t j, int64_t c, int64_t feature, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const int64_t pixel = block.pixel + j, channel = block.channel + c;
      const int64_t offset = layer.in_offsets[static_cast<size_t>(pixel)] + channel;
      for (int64_t begin = 0; begin < outputs; begin += kDepth) {
        const Run run{begin, 0, std::min(kDepth, outputs - begin)};
        for (int64_t n = 0; n < batch; n += P) {
          int64_t pixels[P], targets[P];
          for (int t = 0; t < P; ++t) {
            targets[t] = std::min(n + t, batch - 1);
            pixels[t] = targets[t] * S * pitch;
          }
          const T* panel = weights + feature * outputs + begin * V * L;
          if (begin + run.length < outputs) {
            multiply_tile<T, S, V>(gradient, pixels, pitch, &run, 1, panel, targets, begin > 0,
                                   product);
            continue;
          }
          multiply<T, S, V>(gradient, pixels, pitch, &run, 1, panel, targets,
                            begin > 0 ? product : nullptr, [&](int t, int v, Vec<T>* sums) {
                              const int64_t example = targets[t];
                              if (head) {
                                const T* extra = head + example * 2 * depth +
                                                 pixel * layer.in.pitch + channel + v * L;
                                sums[0] += load(extra);
                                sums[1] += load(extra + depth);
                              }
                              if (target.previous)
                                deactivate<T>(in + example * in_size + offset + v * L, stride,
                                              target.scale, target.previous->relu, sums);
                              T* to = target.data + example * in_size + offset + v * L;
                              for (int k = 0; k < S; ++k) store<T>(to + k * stride, sums[k]);
                            });
        }
      }
    });
  }

  if (!grad_weight) return;
  const int64_t sum_rows = round_up(outputs, R), source_pitch = spread_pitch<T>(size);
  T* signed_sums = scratch<T>(Slot::kSumA, sum_rows * size);
  T* absolute_sums = scratch<T>(Slot::kSumB, sum_rows * size);
  std::fill_n(signed_sums, sum_rows * size, T{0});
  std::fill_n(absolute_sums, sum_rows * size, T{0});
  T* source = scratch<T>(Slot::kSource, std::min(batch, kExamples) * S * source_pitch);
  for (int64_t begin = 0; begin < batch; begin += kExamples) {
    const int64_t count = std::min(batch - begin, kExamples);
    for (int64_t n = 0; n < count; ++n)
      for (int k = 0; k < S; ++k)
        for (int64_t j = 0; j < block.pixels; ++j)
          std::copy_n(in + (begin + n) * in_size + k * stride +
                          layer.in_offsets[static_cast<size_t>(block.pixel + j)] + block.channel,
                      block.channels, source + (n * S + k) * source_pitch + j * block.channels);
    const Operand<T> scalars{gradient + begin * S * pitch, 0, S * pitch, pitch};
    for_features([&](int64_t, int64_t, int64_t feature, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const Operand<T> vector{source + feature, 0, S * source_pitch, source_pitch};
      for (int64_t o = 0; o < outputs; o += R) {
        int64_t rows[R];
        for (int j = 0; j < R; ++j) rows[j] = std::min(o + j, outputs - 1);
        const int64_t at = feature * sum_rows + o * V * L;
        outer_tile<T, 0, S, V>(vector, scalars, rows, 1, count, signed_sums + at);
        outer_tile<T, 1, S, V>(vector, scalars, rows, 1, count, absolute_sums + at);
      }
    });
  }
  for (int64_t o = 0; o < outputs; ++o)
    for_blocks<T>(block.channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (int v = 0; v < V; ++v) {
        Vec<T> rows[L];
        for (int64_t j = 0; j < block.pixels; ++j) {
          const int64_t feature = j * block.channels + c, in_block = (o * V + v) * L;
          const T* sums = signed_sums + feature * sum_rows + in_block;
          rows[j] = load(sums) + signs<T>(load(weights + feature * outputs + in_block)) *
                                     load(absolute_sums + (sums - signed_sums));
        }
        store_channels<T>(w, o, block, block.channel + c + v * L, rows, grad_weight);
      }
    });
}

// A bias's gradient from [N][stream][pitch] gradients.
template <class T>
void dense_bias_gradient(const T* gradient, int64_t pitch, int64_t batch, int64_t outputs, T* out) {
  std::vector<double> sums(static_cast<size_t>(outputs), 0.0);
  for (int64_t n = 0; n < batch; ++n)
    for (int k = 0; k < S; k += 2)
      for (int64_t o = 0; o < outputs; ++o)
        sums[static_cast<size_t>(o)] += static_cast<double>(gradient[(n * S + k) * pitch + o]);
  for (int64_t o = 0; o < outputs; ++o) out[o] = static_cast<T>(sums[static_cast<size_t>(o)]);
}

}  // namespace cibp
