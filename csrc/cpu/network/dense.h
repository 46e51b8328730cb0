// Dense layers: the whole batch at once, a block of weights at a time.
//
// Their weights lie as torch has them, [out][channel][pixel], and their inputs as [pixel][channel]
// (layers.h): a block of some pixels x channels goes through an in-register transpose on its way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../bfloat16.h"
#include "../parallel.h"
#include "../tile.h"
#include "../vec.h"
#include "layers.h"
#include "saved.h"

namespace cibp {

constexpr int64_t kDepth = 256;     // features of a block: products summed before memory
constexpr int64_t kFeatures = 256;  // the same of the backward pass
constexpr int64_t kOutputs = 256;   // of one pass over a block of features, backward
constexpr int64_t kExamples = 128;  // whose streams of a few features stay in first-level cache
template <class T>
constexpr int64_t kGroup = 16 * kBlock<T>;  // outputs of one pass, forward

// Some of an input's features: [pixel, pixel + pixels) x [channel, channel + channels), ordered
// pixel by pixel. channels is a multiple of a vector; those past the input's last are zero.
struct FeatureBlock {
  int64_t pixel, pixels, channel, channels;
  size_t index;  // in feature_blocks
  int64_t size() const { return pixels * channels; }
};

// Blocks of about `size` features. Neighbours in the weights follow each other.
template <class E>
std::vector<FeatureBlock> feature_blocks(const Layer<E>& layer, int64_t size) {
  using T = Number<E>;
  constexpr int L = kLanes<T>;
  const int64_t all = static_cast<int64_t>(layer.in_offsets.size());
  const int64_t pixels = std::min(all, std::max<int64_t>(L, size / kBlock<T> / L * L));
  const int64_t channels = std::max(kBlock<T>, size / pixels / kBlock<T> * kBlock<T>);
  const int64_t end = round_up(layer.shape.in_channels, kLanes<T>);
  std::vector<FeatureBlock> blocks;
  for (int64_t c = 0; c < end; c += channels)
    for (int64_t p = 0; p < all; p += pixels)
      blocks.push_back(
          {p, std::min(pixels, all - p), c, std::min(channels, end - c), blocks.size()});
  return blocks;
}

// A layer's weights, [out][channel][pixel].
template <class T>
struct DenseWeights {
  const T* data;
  int64_t outputs, channels, pixels;
  int64_t row() const { return channels * pixels; }
  // Rows of a block's panel: pixels are transposed a vector at a time.
  int64_t rows(const FeatureBlock& block) const {
    return pixels == 1 ? block.size() : round_up(block.pixels, kLanes<T>) * block.channels;
  }

  template <class E>
  DenseWeights(const Layer<E>& layer, const T* weight)
      : data(weight),
        outputs(layer.shape.out_channels),
        channels(layer.shape.in_channels),
        pixels(layer.shape.in_height * layer.shape.in_width) {}

  // `wanted` of the weights from `at` on in each of some rows; a vector where that can be read.
  int64_t columns(int64_t at, int64_t stride, int64_t rows, int64_t wanted) const {
    return at + (rows - 1) * stride + kLanes<T> <= outputs * row() ? kLanes<T> : wanted;
  }
};

// At most kLanes x kLanes elements of a matrix.
template <class T>
struct Corner {
  T* data;
  int64_t stride, rows, columns;
};

// Transposes `from` into `to`, with zeros past its end.
template <class T>
[[gnu::always_inline]] inline void transpose(const Corner<const T>& from, const Corner<T>& to) {
  constexpr int L = kLanes<T>;
  if (from.rows >= L && from.columns >= L && to.rows >= L && to.columns >= L) {
    Vec<T> rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = load(from.data + i * from.stride);
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store<T>(to.data + i * to.stride, rows[i]);
    return;
  }
  Vec<T> rows[L] = {};
  for (int i = 0; i < std::min<int64_t>(L, from.rows); ++i)
    rows[i] = load_some(from.data + i * from.stride, std::min<int64_t>(L, from.columns));
  transpose<T>(rows);
  for (int i = 0; i < std::min<int64_t>(L, to.rows); ++i)
    store_some<T>(to.data + i * to.stride, rows[i], std::min<int64_t>(L, to.columns));
}

// Copies kLanes numbers.
template <class To, class From>
inline void copy_numbers(To* to, const From* from) {
  if constexpr (std::is_same_v<To, From>)
    std::memcpy(to, from, kLanes<To> * sizeof(To));
  else
    store<To>(to, numbers(from));
}

// Copies a block of `count` examples' inputs: [example][stream][feature], streams `pitch` apart,
// or, where that is 0, [block of channels][example][stream][channel].
template <class E, class Saved>
void copy_block(const Layer<E>& layer, const FeatureBlock& block, const Saved* in, int64_t count,
                int64_t pitch, E* out) {
  const int64_t in_size = layer.in.size(), stride = layer.in.stream_stride();
  const int64_t pixels = block.pixels, channels = block.channels;
  const int64_t* const offsets = &layer.in_offsets[static_cast<size_t>(block.pixel)];
  in += block.channel;
  for (int64_t row = 0; row < count * S; ++row) {
    const Saved* const from = in + row / S * in_size + row % S * stride;
    for (int64_t j = 0; j < pixels; ++j) {
      const Saved* const pixel = from + offsets[j];
      for (int64_t c = 0; c < channels; c += kBlock<E>) {
        const int64_t width = std::min(kBlock<E>, channels - c), feature = j * channels + c;
        E* const to = out + (pitch > 0 ? row * pitch + feature : feature * count * S + row * width);
        copy_numbers(to, pixel + c);
        if (width > kLanes<E>) copy_numbers(to + kLanes<E>, pixel + c + kLanes<E>);
      }
    }
  }
}

// Copies a block of `count` examples' inputs as pairs of examples, [block of channels][pair]
// [stream][channel]; an odd last example is paired with zeros.
inline void pair_examples(const Layer<BFloat16>& layer, const FeatureBlock& block,
                          const BFloat16* in, int64_t count, Pair* out) {
  const int64_t in_size = layer.in.size(), stride = layer.in.stream_stride();
  const int64_t rows = ceil_div(count, 2) * S;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t example = row / S * 2;
    const BFloat16* const from = in + example * in_size + row % S * stride + block.channel;
    for (int64_t j = 0; j < block.pixels; ++j) {
      const BFloat16* const pixel = from + layer.in_offsets[static_cast<size_t>(block.pixel + j)];
      for (int64_t c = 0; c < block.channels; c += kLanes<Pair>) {
        const int64_t first = c / kBlock<Pair> * kBlock<Pair>;
        const int64_t width = std::min(kBlock<Pair>, block.channels - first);
        store(out + (j * block.channels + first) * rows + row * width + c - first,
              paired(load_halves(pixel + c),
                     example + 1 < count ? load_halves(pixel + in_size + c) : Halves{}));
      }
    }
  }
}

// The numbers of example n among the examples or pairs of them from p on.
template <class T>
inline Vec<T> numbers_of(const T* p, int64_t) {
  return load(p);
}
inline Vec<float> numbers_of(const Pair* p, int64_t n) {
  return as_float(n % 2 ? load(p) & 0xffff0000 : load(p) << 16);
}

// What is read next: the weights of a block for `outputs` outputs from `first` on, and `count`
// examples' inputs. They come into cache while tiles are computed, a step at each tile.
template <class E>
struct Ahead {
  using T = Number<E>;
  const Layer<E>& layer;
  const DenseWeights<T>& weights;
  FeatureBlock block;
  int64_t first, outputs;
  const std::byte* in;
  int64_t element, count;  // bytes of an input's element

  // Inline: GCC leaves out calls that do nothing but prefetch.
  [[gnu::always_inline]] void step(int64_t i, int64_t steps) const {
    constexpr int64_t line = 64 / sizeof(T);
    const DenseWeights<T> w = weights;
    const int64_t* const offsets = &layer.in_offsets[static_cast<size_t>(block.pixel)];
    const Part part(outputs + count * S, static_cast<int>(i), static_cast<int>(steps));
    for (int64_t row = part.begin; row < std::min(part.end, outputs); ++row) {
      const T* from = w.data + (first + row) * w.row() + block.channel * w.pixels + block.pixel;
      for (int64_t c = 0; c < block.channels; c += w.pixels == 1 ? line : 1)
        for (int64_t j = 0; j < block.pixels; j += line)  // in part read with the block before
          __builtin_prefetch(from + c * w.pixels + std::min(j + line, block.pixels) - 1);
    }
    for (int64_t row = std::max(part.begin, outputs) - outputs; row < part.end - outputs; ++row) {
      const int64_t from = row / S * layer.in.size() + row % S * layer.in.stream_stride();
      for (int64_t j = 0; j < block.pixels; ++j)
        for (int64_t c = 0; c < block.channels; c += 64 / element)
          __builtin_prefetch(in + (from + offsets[j] + block.channel + c) * element);
    }
  }
};

// panel[feature][output] for the N outputs from `first` on; zeros past the last channel and output.
template <class T, int VECTORS>
void pack_panel(const DenseWeights<T>& weights, const FeatureBlock& of, int64_t first, T* panel) {
  constexpr int L = kLanes<T>, N = VECTORS * L;
  const DenseWeights<T> w = weights;  // copies, that no store to the panel can change
  const FeatureBlock block = of;
  const bool single = w.pixels == 1;  // then a vector of channels is transposed, not of pixels
  const int64_t step = single ? L : 1, stride = single ? N : block.channels * N;
  for (int o = 0; o < N; o += L)
    for (int64_t c = 0; c < block.channels; c += step) {
      const int64_t channels = std::min(step, w.channels - block.channel - c);
      const int64_t outputs = channels > 0 ? std::min<int64_t>(L, w.outputs - first - o) : 0;
      for (int64_t j = 0; j < block.pixels; j += L) {
        const int64_t at = (first + o) * w.row() + (block.channel + c) * w.pixels + block.pixel + j;
        const int64_t columns =
            single ? channels : w.columns(at, w.row(), outputs, block.pixels - j);
        transpose<T>({w.data + at, w.row(), outputs, columns},
                     {panel + (j * block.channels + c) * N + o, stride, L, L});
      }
    }
}

// A layer's forward pass; finish(example, channel of the vector, sums) in any thread. Returns the
// sum of r^2 that finish leaves.
template <class E, class Finish>
double dense_forward(const Layer<E>& layer, const Number<E>* weight, const E* in, int threads,
                     const Finish& finish) {
  using T = Number<E>;
  using F = Factor<E>;
  constexpr int P = kTilePixels<S>, Q = kPaired<E>;
  const DenseWeights<T> w(layer, weight);
  const int64_t batch = layer.shape.batch, in_size = layer.in.size();
  const int64_t groups = ceil_div(layer.width(), kGroup<T>);
  // Few groups leave threads idle, or give them unequal shares: then the batch is divided.
  const int64_t parts =
      groups >= 4 * threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, batch / (2 * P)));
  const std::vector<FeatureBlock> blocks = feature_blocks(layer, kDepth);
  int64_t rows = 0;
  for (const FeatureBlock& block : blocks) rows = std::max(rows, w.rows(block));
  double* widths = scratch<double>(Slot::kWidth, groups * parts);
  parallel_for(threads, groups * parts, [&](int64_t item) {
    const int64_t first = item % groups * kGroup<T>;
    const int64_t width = std::min(kGroup<T>, layer.width() - first);
    const Part part(batch, static_cast<int>(item / groups), static_cast<int>(parts));
    const int64_t count = part.end - part.begin;
    T* weights = scratch<T>(Slot::kGradient, rows * kBlock<T>);
    Pair* pairs = Q > 1 ? scratch<Pair>(Slot::kPacked, rows * kBlock<T> / 2) : nullptr;
    E* source = scratch<E>(Slot::kSource, count * S * spread_pitch<E>(rows));
    T* product = scratch<T>(Slot::kProduct, count * S * kGroup<T>);
    double squares = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      const FeatureBlock& block = blocks[b];
      const bool last = b + 1 == blocks.size();
      const Run run{0, 0, block.size() / Q};
      const int64_t pitch = spread_pitch<E>(block.size());
      copy_block(layer, block, in + part.begin * in_size, count, pitch, source);
      const Ahead<E> ahead{layer,
                           w,
                           blocks[last ? b : b + 1],
                           first,
                           last ? 0 : std::min(width, w.outputs - first),
                           reinterpret_cast<const std::byte*>(in + part.begin * in_size),
                           sizeof(E),
                           last ? 0 : count};
      const int64_t tiles = ceil_div(count, P), steps = ceil_div(width, kBlock<T>) * tiles;
      for_blocks<T>(width, [&](int64_t c, auto vectors) {
        constexpr int V = decltype(vectors)::value;
        pack_panel<T, V>(w, block, first + c, weights);
        if constexpr (Q > 1) pair_rows(weights, block.size(), V * kLanes<T>, pairs);
        const F* const panel = Q > 1 ? as_factors<E>(pairs) : as_factors<E>(weights);
        T* const sums = product + c * S * count;
        Vec<T> square{};
        for (int64_t n = 0; n < count; n += P) {
          int64_t pixels[P], targets[P];
          for (int t = 0; t < P; ++t) {
            targets[t] = std::min(n + t, count - 1);  // the last tile repeats the last example
            pixels[t] = targets[t] * S * pitch / Q;
          }
          ahead.step(c / kBlock<T> * tiles + n / P, steps);
          if (!last)
            multiply_tile<F, S, V>(as_factors<E>(source), pixels, pitch / Q, &run, 1, panel,
                                   targets, b > 0, layer.points, sums);
          else
            multiply<F, S, V>(as_factors<E>(source), pixels, pitch / Q, &run, 1, panel, targets,
                              b > 0 ? sums : nullptr, layer.points,
                              [&](int t, int v, Vec<T>* streams) {
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

// Where the gradient of a dense layer's input goes, packed as the input is.
template <class E>
struct InputTarget {
  const Layer<E>* previous;  // null: the network's input
  E* data;                   // null: not wanted
  Number<E> scale;           // of r in the width's gradient
};

// A layer's backward pass of some features. gradient: [N][stream][pitch]. head: a further gradient
// by (m, r) of the input, [N][2][pixel][channel], or null. in: as it was saved.
template <class E>
void dense_backward(const Layer<E>& layer, const Number<E>* weight, const std::byte* in,
                    const E* gradient, int64_t pitch, const FeatureBlock& block,
                    const InputTarget<E>& target, const Number<E>* head, Number<E>* grad_weight) {
  using T = Number<E>;
  using F = Factor<E>;
  constexpr int P = kTilePixels<S>, R = kTileRows, L = kLanes<T>, Q = kPaired<E>;
  const DenseWeights<T> w(layer, weight);
  const int64_t batch = layer.shape.batch, size = block.size();
  const int64_t in_size = layer.in.size(), stride = layer.in.stream_stride();
  const int64_t depth = static_cast<int64_t>(layer.in_offsets.size()) * layer.in.pitch;  // of head
  // body(offset in the image, offset in head, first feature, vectors) for each block of channels
  const auto for_features = [&](const auto& body) {
    for (int64_t j = 0; j < block.pixels; ++j)
      for_blocks<T>(block.channels, [&](int64_t c, auto vectors) {
        const int64_t pixel = block.pixel + j, channel = block.channel + c;
        body(layer.in_offsets[static_cast<size_t>(pixel)] + channel,
             pixel * layer.in.pitch + channel, j * block.channels + c, vectors);
      });
  };

  const int64_t rows = ceil_div(batch, Q);  // of the weight gradient's products
  F* source = scratch<F>(Slot::kSource, rows * S * size);
  with_saved(layer, in, [&](const auto* images) {
    if constexpr (Q > 1)
      pair_examples(layer, block, images, batch, source);
    else
      copy_block(layer, block, images, batch, 0, source);
  });

  const std::vector<FeatureBlock> blocks = feature_blocks(layer, kFeatures);
  const int passes = static_cast<int>(ceil_div(w.outputs, kOutputs));
  const auto part_of = [&](int pass) {  // whole factors of outputs
    const Part part(ceil_div(w.outputs, Q), pass, passes);
    return std::pair(part.begin * Q, std::min(part.end * Q, w.outputs));
  };
  const int64_t most = ceil_div(ceil_div(w.outputs, Q), passes) * Q, most_rows = round_up(most, R);
  T* weights = scratch<T>(Slot::kBlockWeights, most * w.rows(block));  // [block][output][channel]
  T* product = scratch<T>(Slot::kProduct, passes > 1 ? batch * S * size : 1);
  Pair* pairs = Q > 1 ? scratch<Pair>(Slot::kPacked, most / 2 * kBlock<T>) : nullptr;
  F* scalars = scratch<F>(Slot::kGradient, most_rows * rows * S);  // [tile][factor][stream][row]
  T* signed_sums = scratch<T>(Slot::kSumA, most_rows * kBlock<T>);
  T* absolute_sums = scratch<T>(Slot::kSumB, most_rows * kBlock<T>);
  for (int pass = 0; pass < passes; ++pass) {
    const bool last = pass + 1 == passes;
    const auto [begin, end] = part_of(pass);
    const int64_t first_output = begin, outputs = end - begin, step = block.channels * outputs;
    // body(place in the weights, place in the block, channels, pixels) for vectors of each
    const auto for_corners = [=](const auto& body) {
      const FeatureBlock b = block;
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t c = 0; c < b.channels; c += L) {
          const int64_t first = c / kBlock<T> * kBlock<T>;
          const int64_t width = std::min(kBlock<T>, b.channels - first);
          for (int64_t j = 0; j < b.pixels; j += L)
            body((first_output + o) * w.row() + (b.channel + c) * w.pixels + b.pixel + j,
                 weights + (j * b.channels + first) * outputs + o * width + c - first,
                 std::min<int64_t>(L, w.channels - b.channel - c), b.pixels - j);
        }
    };
    for_corners([=](int64_t at, T* to, int64_t channels, int64_t pixels) {
      if (w.pixels == 1)
        store<T>(to, load_some(w.data + at, channels));
      else
        transpose<T>({w.data + at, w.pixels, channels, w.columns(at, w.pixels, channels, pixels)},
                     {to, step, L, L});
    });

    if (target.data) {
      const bool done = last && block.index + 1 == blocks.size();
      const auto [next, next_end] = part_of(last ? 0 : pass + 1);
      const Ahead<E> ahead{layer,
                           w,
                           last && !done ? blocks[block.index + 1] : block,
                           next,
                           done ? 0 : next_end - next,
                           in,
                           layer.element,
                           last && !done ? batch : 0};
      const int64_t tiles = ceil_div(batch, P), steps = ceil_div(size, kBlock<T>) * tiles;
      for_features([&](int64_t offset, int64_t at_head, int64_t feature, auto vectors) {
        constexpr int V = decltype(vectors)::value;
        const Run run{first_output / Q, 0, ceil_div(outputs, Q)};
        const T* const block_weights = weights + feature * outputs;
        if constexpr (Q > 1) pair_rows(block_weights, outputs, V * L, pairs);
        const F* const panel = Q > 1 ? as_factors<E>(pairs) : as_factors<E>(block_weights);
        T* const sums = product + (passes > 1 ? feature * batch * S : 0);
        for (int64_t n = 0; n < batch; n += P) {
          int64_t pixels[P], targets[P];
          for (int t = 0; t < P; ++t) {
            targets[t] = std::min(n + t, batch - 1);
            pixels[t] = targets[t] * S * pitch / Q;
          }
          ahead.step(feature / kBlock<T> * tiles + n / P, steps);
          if (!last) {
            multiply_tile<F, S, V>(as_factors<E>(gradient), pixels, pitch / Q, &run, 1, panel,
                                   targets, pass > 0, layer.points, sums);
            continue;
          }
          multiply<F, S, V>(
              as_factors<E>(gradient), pixels, pitch / Q, &run, 1, panel, targets,
              pass > 0 ? sums : nullptr, layer.points, [&](int t, int v, Vec<T>* streams) {
                const int64_t example = targets[t];
                if (head) {
                  const T* extra = head + example * 2 * depth + at_head + v * L;
                  streams[0] += load(extra);
                  streams[1] += load(extra + depth);
                }
                if (target.previous) {
                  const F* const x = source + (feature * rows + example / Q * V * L) * S + v * L;
                  Vec<T> forward[S];
                  for (int k = 0; k < S; ++k) forward[k] = numbers_of(x + k * V * L, example);
                  deactivate<E>(*target.previous, forward, target.scale, streams);
                }
                E* to = target.data + example * in_size + offset + v * L;
                for (int k = 0; k < S; ++k) store_numbers(to + k * stride, streams[k]);
              });
        }
      });
    }

    if (!grad_weight) continue;
    for (int64_t o = 0; o < outputs; o += R)
      for (int64_t row = 0; row < rows * S; ++row) {
        F* to = scalars + o * rows * S + row * R;
        const int64_t count = std::min<int64_t>(R, outputs - o), example = row / S * Q;
        const E* from = gradient + (example * S + row % S) * pitch + first_output + o;
        if constexpr (Q > 1)
          for (int64_t j = 0; j < count; ++j)
            to[j] = {from[j].bits |
                     (example + 1 < batch ? uint32_t{from[S * pitch + j].bits} << 16 : 0)};
        else if (count == R)
          std::memcpy(to, from, R * sizeof(T));
        else
          std::copy_n(from, count, to);
        std::fill(to + count, to + R, F{});
      }
    int64_t offsets[R];
    for (int j = 0; j < R; ++j) offsets[j] = j;
    for_features([&](int64_t, int64_t, int64_t feature, auto vectors) {
      constexpr int V = decltype(vectors)::value, N = V * L;
      std::fill_n(signed_sums, round_up(outputs, R) * N, T{0});
      std::fill_n(absolute_sums, round_up(outputs, R) * N, T{0});
      for (int64_t n = 0; n < rows; n += kExamples) {
        const int64_t examples = std::min(kExamples, rows - n);
        const Operand<F> vector{source + (feature * rows + n * N) * S, 0, S * N, N};
        for (int64_t o = 0; o < outputs; o += R) {
          const Operand<F> scalar{scalars + (o * rows + n * R) * S, 0, S * R, R};
          outer_tile<F, 0, S, V>(vector, scalar, offsets, 1, examples, signed_sums + o * N);
          outer_tile<F, 1, S, V>(vector, scalar, offsets, 1, examples, absolute_sums + o * N);
        }
      }
      T* const here = weights + feature * outputs;  // the weights, then their gradient
      for (int64_t i = 0; i < outputs * N; i += L)
        store<T>(here + i,
                 load(signed_sums + i) + signs<T>(load(here + i)) * load(absolute_sums + i));
    });
    for_corners([=](int64_t at, T* from, int64_t channels, int64_t pixels) {
      if (w.pixels == 1)
        store_some<T>(grad_weight + at, load(from), channels);
      else
        transpose<T>({from, step, L, L}, {grad_weight + at, w.pixels, channels, pixels});
    });
  }
}

// A bias's gradient from [N][stream][pitch] gradients.
template <class E>
void dense_bias_gradient(const E* gradient, int64_t pitch, int64_t batch, int64_t outputs,
                         Number<E>* out) {
  std::vector<double> sums(static_cast<size_t>(outputs), 0.0);
  for (int64_t n = 0; n < batch; ++n)
    for (int k = 0; k < S; k += 2)
      for (int64_t o = 0; o < outputs; ++o)
        sums[static_cast<size_t>(o)] +=
            static_cast<double>(number(gradient[(n * S + k) * pitch + o]));
  for (int64_t o = 0; o < outputs; ++o)
    out[o] = static_cast<Number<E>>(sums[static_cast<size_t>(o)]);
}

}  // namespace cibp
