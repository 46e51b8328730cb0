// Convolutions run example by example, all of them while an example is in cache; dense layers
// (dense.h) run over the whole batch, a block of weights at a time.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../bfloat16.h"
#include "../parallel.h"
#include "../streams.h"
#include "../tile.h"
#include "dense.h"
#include "direct.h"
#include "layers.h"
#include "network.h"
#include "panels.h"
#include "pool.h"
#include "saved.h"
#include "sound.h"
#include "winograd.h"

namespace cibp {

template <class E>
std::vector<const Number<E>*> padded_biases(const NetworkPlan<E>& plan,
                                            const NetworkForward<Number<E>>& op) {
  using T = Number<E>;
  T* next = scratch<T>(Slot::kBias, plan.biases);
  std::fill_n(next, plan.biases, T{0});
  std::vector<const T*> biases;
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const Layer<E>& layer = plan.layers[i];
    if (op.biases[i]) std::copy_n(op.biases[i], layer.shape.out_channels, next);
    biases.push_back(next);
    next += layer.width() + kBlock<T>;
  }
  return biases;
}

template <class T, int STREAMS_>
struct Copy {
  static constexpr int STREAMS = STREAMS_, SOURCES = STREAMS_;
  template <class V>
  void operator()(const V* in, V* out) const {
    for (int k = 0; k < STREAMS; ++k) out[k] = in[k];
  }
};

// An image, packed with the first layer's padding.
template <class T, class Prologue>
void pack_image(const Prologue& prologue, const Tensor4<const T>* sources, const Shape& s,
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
    // Of a dense layer: past the channels there are weights of 0, and no NaN may meet them.
    for (int64_t x = 0; x < s.in_width && s.in_channels < g.pitch; ++x)
      for (int64_t k = 0; k < g.streams; ++k)
        std::fill_n(out + g.offset(y, x) + k * g.stream_stride() + s.in_channels,
                    g.pitch - s.in_channels, T{0});
  }
}

// The same of an example of a data set; of a geometry of one stream, its nominal alone.
template <class T>
void pack_image(const Images<T>& images, const Shape& s, const Geometry& g, int64_t image, T* out) {
  clear_padding(g, s.in_height, s.in_width, out);
  const int32_t* plan = images.plan + 4 * image;
  const int64_t down = plan[1], right = plan[2], pixels = s.in_height * s.in_width;
  const uint8_t* const bytes = images.bytes + plan[0] * s.in_channels * pixels;
  for (int64_t y = 0; y < s.in_height; ++y)
    for (int64_t x = 0; x < s.in_width; ++x) {
      const int64_t row = y + down, column = (plan[3] ? s.in_width - 1 - x : x) + right;
      const bool inside = row >= 0 && row < s.in_height && column >= 0 && column < s.in_width;
      T* to = out + g.offset(y, x);
      for (int64_t c = 0; c < s.in_channels; ++c) {
        const int64_t byte = inside ? bytes[c * pixels + row * s.in_width + column] : 0;
        for (int64_t k = 0; k < g.streams; ++k) {
          const int64_t table = (g.streams == 1 ? 2 : k) * s.in_channels + c;
          to[k * g.stream_stride() + c] = images.tables[table * 256 + byte];
        }
      }
      for (int64_t k = 0; k < g.streams; ++k)
        std::fill_n(to + k * g.stream_stride() + s.in_channels, g.pitch - s.in_channels, T{0});
    }
}

// Example n of what the network is given, packed for the first layer.
template <class E, class T = Number<E>>
void pack_input(const NetworkPlan<E>& plan, const NetworkForward<T>& op, int64_t n, T* out) {
  const Geometry& g = plan.layers[0].in;
  Shape s = plan.layers[0].shape;
  Tensor4<const T> sources[S] = {op.lower, op.upper, op.nominal};
  if (op.images) return pack_image(*op.images, s, g, n, out);
  if (plan.given == Given::kPoints) {
    s.batch = 1;
    for (int k = 0; k < S; ++k) {  // the last one fills up what is not given
      sources[k] = op.nominal;
      sources[k].data += std::min(n * S + k, plan.points - 1) * op.nominal.stride[0];
    }
    return pack_image(Copy<T, S>{}, sources, s, g, 0, out);
  }
  if (g.streams == 1) return pack_image(Copy<T, 1>{}, &sources[2], s, g, n, out);
  if (const Slack<T>& slack = plan.layers[0].slack; slack.wanted())
    return pack_image(Outward<T>{slack.input}, sources, s, g, n, out);
  pack_image(CenterRadius<T, S>{}, sources, s, g, n, out);
}

// A layer of one example, not by Winograd's products; returns the sum of r^2.
template <class In, class E>
double forward_one(const Layer<E>& layer, const Number<E>* panels, const Number<E>* bias,
                   const Number<E>* radius, const In* in, const Layer<E>& next, int64_t max_pixels,
                   E* out) {
  Number<E>* product = scratch<Number<E>>(Slot::kProduct, max_pixels * S * kBlock<E>);
  if constexpr (std::is_same_v<In, E>)
    if (layer.pool) return pool_forward(layer, in, next, out);
  if constexpr (std::is_same_v<In, Number<E>>)
    if (layer.in.streams == 1)
      return convolve_forward<In, 1>(layer, panels, bias, radius, in, next, product, out);
  return convolve_forward<In, S>(layer, panels, bias, radius, in, next, product, out);
}

// The images of a first layer that is dense.
template <class E>
void pack_dense(const NetworkPlan<E>& plan, const NetworkForward<Number<E>>& op, E* out) {
  const Layer<E>& layer = plan.layers[0];
  parallel_for(op.threads, plan.batch, [&](int64_t n) {
    E* const image = out + n * layer.in.size();
    if constexpr (std::is_same_v<E, BFloat16>) {
      float* const buffer = scratch<float>(Slot::kImages, layer.in.size());
      pack_input(plan, op, n, buffer);
      save_rounded(layer.in, 1, buffer, image);
    } else {
      pack_input(plan, op, n, image);
    }
  });
}

// The bounds of the last layer's input, [N, features].
template <class E>
void head_bounds(const NetworkPlan<E>& plan, const NetworkForward<Number<E>>& op, const E* in) {
  using T = Number<E>;
  const Layer<E>& head = plan.layers.back();
  const Shape& s = head.shape;
  const int64_t pixels = s.in_height * s.in_width;
  const bool relu = plan.layers.size() > 1 && plan.layers[plan.layers.size() - 2].relu;
  parallel_for(op.threads, s.batch, [&](int64_t n) {
    const E* image = in + n * head.in.size();
    const int64_t base = n * s.in_channels * pixels;
    for (int64_t p = 0; p < pixels; ++p) {
      const E* from = image + head.in_offsets[static_cast<size_t>(p)];
      for (int64_t c = 0; c < s.in_channels; ++c) {
        const T m = number(from[c]), r = number(from[c + head.in.stream_stride()]);
        // of an unstable unit whose upper bound is infinite m - r is NaN
        op.head_lower[base + c * pixels + p] = relu && m <= r ? T{0} : m - r;
        op.head_upper[base + c * pixels + p] = m + r;
      }
    }
  });
}

template <class E>
void Network<E>::forward(const NetworkForward<Number<E>>& op) const {
  using T = Number<E>;
  const NetworkPlan<E>& plan = *plan_;
  const std::vector<Layer<E>>& layers = plan.layers;
  const Nearest<T> nearest(layers[0].slack.wanted());
  const T* panels = pack_weights(plan, op.weights, false, true, op.threads);
  const std::vector<const T*> biases = padded_biases(plan, op);
  const int64_t batch = plan.batch;
  const size_t convolutions = plan.convolutions;
  const auto saved = [&](size_t i, int64_t n) {
    return op.saved + layers[i].saved + n * layers[i].saved_size();
  };
  // Where the images of a layer's input are computed, from example n on: where they are saved, or,
  // if they are not or are rounded, in `buffer`.
  const auto in_buffer = [&](size_t i) { return !op.saved || layers[i].rounded; };
  const auto images_of = [&](size_t i, int64_t n, E* buffer) {
    return in_buffer(i) ? buffer : reinterpret_cast<E*>(saved(i, n));
  };
  // Rounds those of `count` examples to where they are saved, if they are.
  const auto save = [&](size_t i, int64_t n, int64_t count, const E* images) {
    if constexpr (std::is_same_v<E, float>)
      if (op.saved && layers[i].rounded)
        save_rounded(layers[i].in, count, images, reinterpret_cast<BFloat16*>(saved(i, n)));
  };
  // The same of a dense layer and the whole batch.
  const auto batch_of = [&](size_t i) {
    E* const buffer =
        in_buffer(i) ? scratch<E>(batch_slot(plan, i), batch * layers[i].in.size()) : nullptr;
    return images_of(i, 0, buffer);
  };

  const int64_t count = static_cast<int64_t>(convolutions);
  std::vector<double> widths(static_cast<size_t>(batch * count + 1));
  const std::vector<T> radius = plan.given == Given::kBalls
                                    ? ball_output_radius(layers[0], op.weights[0], op.ball_radius)
                                    : std::vector<T>{};
  const auto one = [&](size_t i, int64_t n, const auto* in, E* out) {
    widths[static_cast<size_t>(n * count) + i] = forward_one(
        layers[i], panels, biases[i], radius.data(), in, layers[i + 1], plan.max_pixels, out);
  };
  // The layers up to `i` of the examples [begin, end), a group at a time, into the images `out`.
  const auto run = [&](const auto& self, size_t i, int64_t begin, int64_t end, E* buffer,
                       E* out) -> void {
    const Layer<E>&layer = layers[i], &next = layers[i + 1];
    for (int64_t n = begin; n < end; n += layer.group, out += layer.group * next.in.size()) {
      const int64_t images = std::min(layer.group, end - n);
      if (i == 0) {  // which takes one example at a time
        T* const in = reinterpret_cast<T*>(images_of(0, n, buffer + layer.in_image));
        pack_input(plan, op, n, in);
        one(i, n, in, out);
      } else {
        E* const in = images_of(i, n, buffer + layer.in_image);
        self(self, i - 1, n, n + images, buffer, in);
        if (layer.winograd.forward)
          widths[static_cast<size_t>(n * count) + i] =
              winograd_forward(layer, images, panels, biases[i], in, next, out);
        else
          for (int64_t k = 0; k < images; ++k)
            one(i, n + k, in + k * layer.in.size(), out + k * next.in.size());
      }
      save(i + 1, n, images, out);
    }
  };
  E* in = batch_of(convolutions);  // of a dense layer
  if (convolutions == 0)
    pack_dense(plan, op, in);
  else
    parallel(batch > 1 ? op.threads : 1, [&](int index, int parts) {
      const Part part(batch, index, parts);
      run(run, convolutions - 1, part.begin, part.end,
          scratch<E>(Slot::kImages, plan.in_images + 1),
          in + part.begin * layers[convolutions].in.size());
    });
  for (size_t i = 0; op.widths && i < convolutions; ++i) {
    double total = 0;
    for (int64_t n = 0; n < batch; ++n) total += widths[static_cast<size_t>(n * count) + i];
    op.widths[i] = static_cast<T>(4 * total);
  }

  for (size_t i = convolutions; i < layers.size(); ++i) {
    const Layer<E>& layer = layers[i];
    const int64_t channels = layer.shape.out_channels;
    const T* bias = biases[i];
    double width = 0;
    if (i + 1 < layers.size()) {
      const Layer<E>& next = layers[i + 1];
      E* const out = batch_of(i + 1);
      const int64_t stride = next.in.stream_stride(), out_size = next.in.size();
      width = dense_forward(layer, op.weights[i], in, op.threads,
                            [&](int64_t n, int64_t channel, Vec<T>* sums) {
                              activate<E>(layer, load(bias + channel), sums);
                              store_streams(out + n * out_size + channel, stride, sums);
                            });
      if (next.rounded)
        parallel_for(op.threads, batch, [&](int64_t n) { save(i + 1, n, 1, out + n * out_size); });
      in = out;
    } else {
      width = dense_forward(
          layer, op.weights[i], in, op.threads, [&](int64_t n, int64_t channel, Vec<T>* sums) {
            activate<E>(layer, load(bias + channel), sums);
            const int64_t valid = std::min<int64_t>(kLanes<T>, channels - channel);
            if (layer.points) {
              for (int64_t k = 0; k < std::min<int64_t>(S, plan.points - n * S); ++k)
                store_some<T>(op.nominal_out + (n * S + k) * channels + channel, sums[k], valid);
              return;
            }
            const int64_t at = n * channels + channel;
            const Vec<T> lower = sums[0] - sums[1], upper = sums[0] + sums[1];
            store_some<T>(op.lower_out + at, lower, valid);
            store_some<T>(op.upper_out + at, upper, valid);
            store_some<T>(op.nominal_out + at, sums[2], valid);
            sums[1] = lower == upper ? Vec<T>{} : sums[1];  // as `difference`
          });
    }
    if (op.widths) op.widths[i] = static_cast<T>(4 * width);
  }

  if (plan.given == Given::kPoints) return;
  for (size_t i = 0; i < layers.size(); ++i) op.widths[i] /= width_divisor(layers[i], op.mean);
  head_bounds(plan, op, in);
}

}  // namespace cibp
