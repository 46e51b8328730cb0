// The gradients of the weights and biases of convolutions: sums over the examples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../parallel.h"
#include "../tile.h"
#include "direct.h"
#include "layers.h"
#include "network.h"
#include "winograd.h"

namespace cibp {

// Adds one example's gradient of a bias, and of a ball's radius.
template <int STREAMS, class G, class E>
void add_bias_gradient(const Layer<E>& layer, const G* gradient, double* bias_sums,
                       double* radius_sums) {
  using T = Number<E>;
  const Shape& s = layer.shape;
  const Geometry& h = layer.gradient;
  const int64_t channels = s.out_channels;
  for (int64_t c = 0; c < layer.width(); c += kLanes<T>) {
    Vec<T> totals[2] = {};
    for (int64_t y = 0; y < s.out_height; ++y)
      for (int64_t x = 0; x < s.out_width; ++x) {
        const G* p = gradient + h.offset(y, x) + c;
        totals[0] += numbers(p);
        if constexpr (STREAMS > 1)
          totals[0] += numbers(p + 2 * h.stream_stride());
        else
          totals[1] += numbers(p + h.stream_stride());
      }
    const int64_t count = std::min<int64_t>(kLanes<T>, channels - c);
    for (int64_t i = 0; i < count; ++i) {
      bias_sums[c + i] += static_cast<double>(totals[0][i]);
      if constexpr (STREAMS == 1) radius_sums[c + i] += static_cast<double>(totals[1][i]);
    }
  }
}

// Each part of a batch has sums of its own, which are added up in the end. They lie in buffers of
// the thread that makes this.
template <class E>
class ParameterSums {
  using T = Number<E>;

 public:
  ParameterSums(const NetworkPlan<E>& plan, const NetworkBackward<T>& op, int parts)
      : plan_(plan),
        op_(op),
        parts_(parts),
        wanted_(wanted(op.grad_weights) || wanted(op.grad_biases)),
        size_(wanted_ ? plan.sums : 0),
        plus_(scratch<T>(Slot::kSumA, parts * size_)),
        magnitude_(scratch<T>(Slot::kSumB, parts * size_)),
        bias_sums_(static_cast<size_t>(parts * plan.outputs)),
        radius_sums_(static_cast<size_t>(parts * plan.layers[0].shape.out_channels)) {}

  int parts() const { return parts_; }

  void clear(int part) {
    std::fill_n(plus_ + part * size_, size_, T{0});
    std::fill_n(magnitude_ + part * size_, size_, T{0});
  }

  // Adds the gradients of weight and bias of layer i, of `count` examples.
  template <class G>
  void add(int part, size_t i, int64_t count, const G* in, const G* gradients) {
    if (!wanted_) return;
    const Layer<E>& layer = plan_.layers[i];
    T* const plus = plus_ + part * size_ + layer.sums;
    T* const magnitude = magnitude_ + part * size_ + layer.sums;
    const int64_t channels = plan_.layers[0].shape.out_channels;
    double* const bias = &bias_sums_[static_cast<size_t>(part * plan_.outputs + layer.bias)];
    double* const radius = &radius_sums_[static_cast<size_t>(part * channels)];
    if constexpr (std::is_same_v<G, E>)
      if (layer.winograd.weight)
        winograd_weight_gradient(layer, count, in, gradients, plus, magnitude);
    for (int64_t k = 0; k < count; ++k, in += layer.in.size(), gradients += layer.gradient.size()) {
      if constexpr (std::is_same_v<G, T>)
        if (layer.in.streams == 1) {
          convolve_weight_gradient<T, 1>(layer, in, gradients, plus, magnitude);
          add_bias_gradient<1>(layer, gradients, bias, radius);
          continue;
        }
      if (!layer.winograd.weight)
        convolve_weight_gradient<G, S>(layer, in, gradients, plus, magnitude);
      add_bias_gradient<S>(layer, gradients, bias, radius);
    }
  }

  // The gradients of weights and biases, from all parts' sums.
  void add_up() const {
    if (!wanted_) return;
    struct Item {  // a vector of a layer's output channels
      size_t layer;
      int64_t channel;
    };
    std::vector<Item> items;
    for (size_t i = 0; i < plan_.convolutions; ++i)
      for (int64_t o = 0; !plan_.layers[i].pool && o < plan_.layers[i].width(); o += kLanes<T>)
        items.push_back({i, o});
    parallel_for(op_.threads, static_cast<int64_t>(items.size()), [&](int64_t index) {
      const auto [i, channel] = items[static_cast<size_t>(index)];
      const Layer<E>& layer = plan_.layers[i];
      const WeightSums<T> all{plus_ + layer.sums, magnitude_ + layer.sums, size_, parts_};
      if (T* target = op_.grad_weights[i]) {
        if (layer.winograd.weight)
          winograd_reduce(layer, op_.weights[i], all, channel, target);
        else
          convolve_reduce(layer, op_.weights[i], all, radius_sums_.data(), op_.ball_radius, channel,
                          target);
      }
      const int64_t end = std::min<int64_t>(channel + kLanes<T>, layer.shape.out_channels);
      for (int64_t o = channel; op_.grad_biases[i] && o < end; ++o) {
        double total = 0;
        for (int part = 0; part < parts_; ++part)
          total += bias_sums_[static_cast<size_t>(part * plan_.outputs + layer.bias + o)];
        op_.grad_biases[i][o] = static_cast<T>(total);
      }
    });
  }

 private:
  static bool wanted(const std::vector<T*>& targets) {
    return std::any_of(targets.begin(), targets.end(), [](const T* target) { return target; });
  }

  const NetworkPlan<E>& plan_;
  const NetworkBackward<T>& op_;
  const int parts_;
  const bool wanted_;
  const int64_t size_;                // elements of a part's
  T *const plus_, *const magnitude_;  // [parts][size]
  std::vector<double> bias_sums_;     // [parts][plan.outputs]
  std::vector<double> radius_sums_;   // [parts][channels of the first layer]
};

}  // namespace cibp
