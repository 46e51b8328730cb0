// As in the forward pass: the dense layers run over the whole batch, a block of weights at a time,
// and then the convolutions example by example.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../bfloat16.h"
#include "../parallel.h"
#include "../tile.h"
#include "dense.h"
#include "direct.h"
#include "layers.h"
#include "network.h"
#include "panels.h"
#include "pool.h"
#include "saved.h"
#include "scatter.h"
#include "sums.h"
#include "winograd.h"

namespace cibp {

// The gradient of the logits' center, radius and nominal, or of the points': [N][stream][pitch].
template <class E>
std::vector<E> logits_gradient(const NetworkPlan<E>& plan, const NetworkBackward<Number<E>>& op,
                               Number<E> grad_squares, int64_t pitch) {
  using T = Number<E>;
  const Shape& s = plan.layers.back().shape;
  const T width = T(4) * grad_squares;
  std::vector<T> gradient(static_cast<size_t>(s.batch * S * pitch), T{0});
  if (plan.given == Given::kPoints)
    for (int64_t n = 0; n < plan.points; ++n)
      std::copy_n(op.grad_nominal + n * s.out_channels, s.out_channels,
                  &gradient[static_cast<size_t>(n * pitch)]);
  for (int64_t n = 0; plan.given != Given::kPoints && n < s.batch; ++n)
    for (int64_t o = 0; o < s.out_channels; ++o) {
      const int64_t at = n * s.out_channels + o;
      T* g = &gradient[static_cast<size_t>(n * S * pitch + o)];
      g[0] = op.grad_lower[at] + op.grad_upper[at];
      g[pitch] = op.grad_upper[at] - op.grad_lower[at] +
                 width * difference(op.lower_out[at], op.upper_out[at]);
      g[2 * pitch] = op.grad_nominal[at];
    }
  if constexpr (std::is_same_v<E, T>) {
    return gradient;
  } else {
    std::vector<E> rounded(gradient.size());
    for (size_t i = 0; i < gradient.size(); i += kLanes<E>)
      store_numbers(&rounded[i], load(&gradient[i]));
    return rounded;
  }
}

// The further gradient of the last layer's input by (m, r): [N][2][pixel][channel]; empty: none.
template <class E>
std::vector<Number<E>> head_gradient(const NetworkBackward<Number<E>>& op, const Layer<E>& layer) {
  using T = Number<E>;
  if (!op.grad_head_lower) return {};
  const Shape& s = layer.shape;
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

// One example's gradient of the input of the first dense layer, into the padded image that the
// convolution before it reads.
template <class E, class G>
void copy_gradient(const Layer<E>& dense, const E* from, const Layer<E>& convolution, G* to) {
  const Geometry &g = dense.in, &h = convolution.gradient;
  const int64_t size = g.columns * h.pitch;
  for (int64_t y = 0; y < g.rows; ++y) {
    const E* in = from + g.offset(y, 0);
    G* out = to + h.offset(y, 0);
    if constexpr (std::is_same_v<E, G>) {
      for (int k = 0; k < S; ++k)
        std::copy_n(in + k * g.stream_stride(), size, out + k * h.stream_stride());
    } else {
      for (int k = 0; k < S; ++k)
        for (int64_t i = 0; i < size; i += kLanes<E>)
          store_numbers(out + k * h.stream_stride() + i, numbers(in + k * g.stream_stride() + i));
    }
    if constexpr (std::is_same_v<G, Number<E>>)
      if (convolution.in.streams == 1)
        for (int64_t i = 0; i < size; ++i) out[i] += number(in[2 * g.stream_stride() + i]);
  }
}

// The gradient of example n's packed input -> that of lower, upper and nominal, or of points.
template <class E, class G>
void unpack_gradient(const NetworkPlan<E>& plan, const NetworkBackward<Number<E>>& op, int64_t n,
                     const G* packed, const std::vector<int64_t>& at, int64_t stream_stride) {
  using T = Number<E>;
  const Shape& s = plan.layers[0].shape;
  const int64_t pixels = s.in_height * s.in_width;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < s.in_channels; ++c) {
      const G* g = packed + at[static_cast<size_t>(p)] + c;
      if (plan.given == Given::kPoints) {
        for (int64_t k = 0; k < std::min<int64_t>(S, plan.points - n * S); ++k)
          op.grad_nominal_in[((n * S + k) * s.in_channels + c) * pixels + p] =
              number(g[k * stream_stride]);
        continue;
      }
      const int64_t to = (n * s.in_channels + c) * pixels + p;
      const T center = T(0.5) * number(g[0]), radius = T(0.5) * number(g[stream_stride]);
      op.grad_lower_in[to] = center - radius;
      op.grad_upper_in[to] = center + radius;
      op.grad_nominal_in[to] = number(g[2 * stream_stride]);
    }
}

// The input gradient of `images` examples of a layer that is not dense; finish(example, pixel,
// channel of the vector, streams).
template <class G, class E, class Finish>
void input_gradient(const Layer<E>& layer, int64_t images, const Number<E>* panels,
                    const G* gradient, int64_t max_pixels, const Finish& finish) {
  using T = Number<E>;
  if constexpr (std::is_same_v<G, E>)
    if (layer.winograd.input)
      return winograd_input_gradient(layer, images, panels, gradient, finish);
  T* product = scratch<T>(Slot::kProduct, max_pixels * S * kBlock<T>);
  for (int64_t n = 0; n < images; ++n) {
    const G* of_one = gradient + n * layer.gradient.size();
    const auto finish_one = [&](int64_t pixel, int64_t channel, Vec<T>* streams) {
      finish(n, pixel, channel, streams);
    };
    if constexpr (std::is_same_v<G, E>)
      if (layer.pool) {
        pool_input_gradient(layer, of_one, finish_one);
        continue;
      }
    convolve_input_gradient(layer, panels, of_one, product, finish_one);
  }
}

// The gradient of the network's input, of example n, from that of the first convolution's output.
template <class E>
void convolve_to_input(const NetworkPlan<E>& plan, const NetworkBackward<Number<E>>& op,
                       const Number<E>* panels, int64_t n, const Number<E>* gradient) {
  using T = Number<E>;
  const Layer<E>& layer = plan.layers[0];
  const Shape& s = layer.shape;
  if (layer.scatter) {
    const ScatterImage image(s);
    T* const out = scratch<T>(Slot::kSource, image.size() + kLanes<T>);
    scatter_input_gradient(layer, panels, gradient, out);
    return unpack_gradient(plan, op, n, out, plan.input_at, image.stream_stride());
  }
  const int64_t pitch = round_up(s.in_channels, kLanes<T>);
  const int64_t stream_stride = s.in_height * s.in_width * pitch;
  T* const out = scratch<T>(Slot::kSource, S * stream_stride);
  input_gradient(layer, 1, panels, gradient, plan.backward_max_pixels,
                 [&](int64_t, int64_t pixel, int64_t channel, Vec<T>* streams) {
                   T* to = out + pixel * pitch + channel;
                   for (int k = 0; k < S; ++k) store<T>(to + k * stream_stride, streams[k]);
                 });
  unpack_gradient(plan, op, n, out, plan.input_at, stream_stride);
}

// The gradients of the dense layers; returns that of the first one's input, packed as it is, or
// null where nobody wants it. grad_squares: by the sums of squares that the widths are made of.
template <class E>
const E* dense_layers(const NetworkPlan<E>& plan, const NetworkBackward<Number<E>>& op,
                      const std::vector<Number<E>>& grad_squares, bool wants_input) {
  using T = Number<E>;
  const std::vector<Layer<E>>& layers = plan.layers;
  const int64_t batch = plan.batch;
  int64_t pitch = spread_pitch<E>(layers.back().width());
  const std::vector<E> logits = logits_gradient(plan, op, grad_squares.back(), pitch);
  const std::vector<T> head = head_gradient(op, layers.back());
  const E* gradient = logits.data();  // of a layer's output, packed as the input of the next
  for (size_t i = layers.size(); i-- > plan.convolutions;) {
    const Layer<E>& layer = layers[i];
    E* next = nullptr;
    if (i > 0 || wants_input)
      next = scratch<E>(batch_slot(plan, i), batch * layer.in.size() + kBlock<E>);
    const InputTarget<E> target{i > 0 ? &layers[i - 1] : nullptr, next,
                                i > 0 ? T(8) * grad_squares[i - 1] : T{0}};
    const std::vector<FeatureBlock> blocks = feature_blocks(layer, kFeatures);
    parallel_for(op.threads, static_cast<int64_t>(blocks.size()), [&](int64_t b) {
      dense_backward(layer, op.weights[i], op.saved + layer.saved, gradient, pitch,
                     blocks[static_cast<size_t>(b)], target,
                     i + 1 < layers.size() || head.empty() ? nullptr : head.data(),
                     op.grad_weights[i]);
    });
    if (op.grad_biases[i])
      dense_bias_gradient(gradient, pitch, batch, layer.shape.out_channels, op.grad_biases[i]);
    gradient = next;
    pitch = layer.in.stream_stride();
  }
  return gradient;
}

// The gradients of the layers in front of the dense ones. The batch is divided into as many parts
// as threads: the examples of a part go through all layers, and have sums of their own of the
// gradients of weights and biases, which are added up in the end.
template <class E>
class Convolutions {
  using T = Number<E>;

 public:
  Convolutions(const NetworkPlan<E>& plan, const NetworkBackward<T>& op,
               const std::vector<T>& grad_squares, const T* panels, bool wants_input)
      : plan_(plan),
        layers_(plan.layers),
        op_(op),
        grad_squares_(grad_squares),
        panels_(panels),
        wants_input_(wants_input),
        sums_(plan, op, plan.batch > 1 ? op.threads : 1) {}

  // gradient: of the input of the first dense layer.
  void run(const E* gradient) {
    parallel(sums_.parts(), [&](int index, int parts) {
      examples(index, Part(plan_.batch, index, parts), gradient);
    });
    sums_.add_up();
  }

 private:
  // All layers of a part's examples.
  void examples(int index, const Part& part, const E* gradient) {
    sums_.clear(index);
    T* const images = scratch<T>(Slot::kGradient, plan_.gradient_images + kBlock<T>);
    for (size_t i = 0; i < plan_.convolutions; ++i) {
      const Layer<E>& layer = layers_[i];
      with_gradients(i, images, [&](auto* gradients) {
        for (int64_t n = 0; n < layer.gradient_images; ++n)
          clear_padding(layer.gradient, layer.shape.out_height, layer.shape.out_width,
                        gradients + n * layer.gradient.size());
      });
    }
    const size_t i = plan_.convolutions - 1;
    const Layer<E>&dense = layers_[i + 1], &last = layers_[i];
    with_gradients(i, images, [&](auto* gradients) {
      for (int64_t n = part.begin; n < part.end; n += last.group) {
        const int64_t end = std::min(n + last.group, part.end);
        for (int64_t k = n; k < end; ++k)
          copy_gradient(dense, gradient + k * dense.in.size(), last,
                        gradients + (k - n) * last.gradient.size());
        layers(index, i, n, end, gradients, images);
      }
    });
  }

  // Calls body(images) with a pointer to the gradients of layer i's outputs.
  template <class Body>
  void with_gradients(size_t i, T* images, const Body& body) const {
    T* const gradients = images + layers_[i].gradient_image;
    if (i == 0)
      body(gradients);
    else
      body(reinterpret_cast<E*>(gradients));
  }

  // The layers from i down, of the examples [begin, end), from the gradients of i's outputs.
  template <class G>
  void layers(int part, size_t i, int64_t begin, int64_t end, const G* gradients, T* images) {
    const Layer<E>& layer = layers_[i];
    for (int64_t n = begin; n < end; n += layer.group) {
      const int64_t count = std::min(layer.group, end - n);
      const std::byte* const saved = op_.saved + layer.saved + n * layer.saved_size();
      if (i == 0) {  // which takes one example at a time
        if constexpr (std::is_same_v<G, T>) {
          sums_.add(part, i, count, reinterpret_cast<const T*>(saved), gradients);
          if (wants_input_) convolve_to_input(plan_, op_, panels_, n, gradients);
        }
      } else if constexpr (std::is_same_v<G, E>) {
        const E* in = restore(layer, count, saved);
        if (!layer.pool) sums_.add(part, i, count, in, gradients);
        with_gradients(i - 1, images, [&](auto* out) {
          to_previous(i, count, in, gradients, out);
          layers(part, i - 1, n, n + count, out, images);
        });
      }
      gradients += count * layer.gradient.size();
    }
  }

  // The gradients of the outputs of the layer before i, of `count` examples.
  template <class G>
  void to_previous(size_t i, int64_t count, const E* in, const E* gradients, G* out) const {
    const Layer<E>&layer = layers_[i], &previous = layers_[i - 1];
    const T scale = T(8) * grad_squares_[i - 1];
    input_gradient(layer, count, panels_, gradients, plan_.backward_max_pixels,
                   [&](int64_t example, int64_t pixel, int64_t channel, Vec<T>* streams) {
                     const auto p = static_cast<size_t>(pixel);
                     const E* x = in + example * layer.in.size() + layer.in_offsets[p] + channel;
                     Vec<T> forward[S];
                     load_streams(x, layer.in.stream_stride(), forward);
                     deactivate<E>(previous, forward, scale, streams);
                     if (previous.in.streams == 1) streams[0] += streams[2];
                     G* to = out + example * previous.gradient.size() +
                             previous.gradient_offsets[p] + channel;
                     for (int k = 0; k < S; ++k)
                       store_numbers(to + k * previous.gradient.stream_stride(), streams[k]);
                   });
  }

  const NetworkPlan<E>& plan_;
  const std::vector<Layer<E>>& layers_;
  const NetworkBackward<T>& op_;
  const std::vector<T>& grad_squares_;
  const T* const panels_;
  const bool wants_input_;
  ParameterSums<E> sums_;
};

template <class E>
void Network<E>::backward(const NetworkBackward<Number<E>>& op) const {
  using T = Number<E>;
  const NetworkPlan<E>& plan = *plan_;
  const std::vector<Layer<E>>& layers = plan.layers;
  std::vector<T> grad_squares(layers.size());
  for (size_t i = 0; op.grad_widths && i < layers.size(); ++i)
    grad_squares[i] = op.grad_widths[i] / width_divisor(layers[i], op.mean);
  const bool wants_input = op.grad_nominal_in != nullptr;
  const T* panels = pack_weights(plan, op.weights, true, wants_input, op.threads);
  const E* gradient = dense_layers(plan, op, grad_squares, wants_input);
  if (plan.convolutions > 0) {
    Convolutions<E>(plan, op, grad_squares, panels, wants_input).run(gradient);
  } else if (wants_input) {
    const Geometry& in = layers[0].in;
    for (int64_t n = 0; n < plan.batch; ++n)
      unpack_gradient(plan, op, n, gradient + n * in.size(), layers[0].in_offsets,
                      in.stream_stride());
  }
}

}  // namespace cibp
