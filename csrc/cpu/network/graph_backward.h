// Each node's backward pass runs over the whole batch, from the last node to the first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "../memory.h"
#include "../parallel.h"
#include "backward.h"
#include "depthwise.h"
#include "graph_forward.h"
#include "graph_plan.h"
#include "norm.h"
#include "sums.h"
#include "view.h"

namespace cibp {

template <class E>
class GraphBackwardPass {
  using T = Number<E>;

 public:
  GraphBackwardPass(const GraphPlan<E>& plan, const GraphBackward<T>& op)
      : plan_(plan),
        op_(op),
        norms_(plan.nodes.size()),
        gradients_(plan.nodes.size()),
        sums_(plan.nodes.size()) {}

  void run() {
    for (size_t i = 0; i < plan_.nodes.size(); ++i)
      if (const NodePlan<E>& node = plan_.nodes[i]; node.norm)
        norms_[i] = norm_of(node.shape.out_channels, node.place.in.pitch, node.eps, op_.means[i],
                            op_.variances[i], op_.gammas[i], op_.betas[i]);
    last();
    for (size_t i = plan_.nodes.size() - 1; i-- > 0;) {
      const NodePlan<E>& node = plan_.nodes[i];
      if (gradients_[i]) {
        if (node.kind == NodeKind::kSum)
          add(i);
        else if (node.layer().dense)
          dense(i, finished(i), node.place.in.stream_stride(), nullptr);
        else
          convolve(i);
      }
      gradients_[i].reset();
    }
  }

 private:
  const E* value(size_t i) const {
    return reinterpret_cast<const E*>(op_.saved + plan_.nodes[i].saved);
  }
  E* gradient(size_t i) const { return static_cast<E*>(gradients_[i]->data()); }

  // The gradient of what a node reads by an edge, into that of the value.
  ViewGradient<E> target(const Edge& edge, const Counted& counted) {
    const auto k = static_cast<size_t>(edge.value - 1);
    const NodePlan<E>& node = plan_.nodes[k];
    const bool filled = gradients_[k] != nullptr;
    if (!filled)
      gradients_[k] = std::make_unique<Memory>(
          static_cast<size_t>(plan_.batch) * static_cast<size_t>(node.place.in.size()) * sizeof(E));
    ViewGradient<E> to{view_of(plan_, edge, op_.saved, norms_), gradient(k), filled};
    if (counted.normed) to.normed = of_width(1, k);
    if (counted.activated) {
      to.activated = of_width(2, k);
      if (op_.grad_moments)
        to.moments.emplace(op_.grad_moments + k, static_cast<int64_t>(plan_.nodes.size()),
                           node.units(), node.shape.out_channels, node.place.in.pitch);
    }
    // who reads a value first is the last to give it a gradient
    if (counted.normed && node.norm)
      sums_[k].assign(static_cast<size_t>(parts()), NormSums<T>(node.place.in.pitch));
    return to;
  }

  int parts() const { return plan_.batch > 1 ? op_.threads : 1; }

  // Where a part of the examples sums up the gradients by the norm of what an edge reads, or null.
  NormSums<T>* sums_of(const Edge& edge, const Counted& counted, int part) {
    std::vector<NormSums<T>>& sums =
        sums_[static_cast<size_t>(std::max<int64_t>(edge.value, 1) - 1)];
    return counted.normed && !sums.empty() ? &sums[static_cast<size_t>(part)] : nullptr;
  }

  // What r is multiplied by in the gradient of a width of node i; row: as in GraphForward.
  T of_width(size_t row, size_t i) const {
    if (!op_.grad_widths) return T{0};
    const size_t nodes = plan_.nodes.size();
    return T(8) * op_.grad_widths[row * nodes + i] / width_divisor(plan_.nodes[i].place, op_.mean);
  }

  NormGradient<T> through_norm(size_t i) const {
    const NodePlan<E>& node = plan_.nodes[i];
    const int64_t channels = node.shape.out_channels;
    const NormGradient<T> by = norm_gradient(
        channels, node.place.in.pitch, node.units() / static_cast<double>(channels), norms_[i],
        node.eps, op_.variances[i], sums_[i], op_.grad_gammas[i], op_.grad_betas[i]);
    return node.fixed ? NormGradient<T>{} : by;
  }

  // The gradient by what a node makes, of one vector, from that by its value; in place.
  void finish(size_t i, const NormGradient<T>& by, T width, int64_t channel, const E* from,
              Vec<T>* gradient) const {
    const NodePlan<E>& node = plan_.nodes[i];
    if (!node.norm && width == 0) return;
    Vec<T> made[S];
    load_streams(from, node.place.in.stream_stride(), made);
    if (node.norm) denormalize<T>(norms_[i], by, channel, made, gradient);
    gradient[1] += width * made[1];
  }

  // The same of a whole value.
  const E* finished(size_t i) const {
    const NodePlan<E>& node = plan_.nodes[i];
    E* const all = gradient(i);
    const T width = node.weighted() ? of_width(0, i) : T{0};
    if (!node.norm && width == 0) return all;
    NormGradient<T> by;
    if (node.norm) by = through_norm(i);
    const E* const values = value(i);
    parallel_for(op_.threads, plan_.batch, [&](int64_t n) {
      for_vectors(node.place, [&](int64_t from, int64_t, int64_t channel) {
        const int64_t at = n * node.place.in.size() + from;
        const int64_t stride = node.place.in.stream_stride();
        Vec<T> d[S];
        load_streams(all + at, stride, d);
        finish(i, by, width, channel, values + at, d);
        for (int k = 0; k < S; ++k) store_numbers(all + at + k * stride, d[k]);
      });
    });
    return all;
  }

  // A NetworkBackward for the one layer of a node.
  NetworkBackward<T> of_layer(size_t i) const {
    NetworkBackward<T> op{};
    op.threads = op_.threads;
    op.weights = {op_.weights[i]};
    op.mean = op_.mean;
    op.lower_out = op_.lower_out;
    op.upper_out = op_.upper_out;
    op.grad_lower = op_.grad_lower;
    op.grad_upper = op_.grad_upper;
    op.grad_nominal = op_.grad_nominal;
    op.grad_head_lower = op_.grad_head_lower;
    op.grad_head_upper = op_.grad_head_upper;
    op.grad_lower_in = op_.grad_lower_in;
    op.grad_upper_in = op_.grad_upper_in;
    op.grad_nominal_in = op_.grad_nominal_in;
    op.grad_weights = {op_.grad_weights[i]};
    op.grad_biases = {op_.grad_biases[i]};
    return op;
  }

  void last() {
    const size_t i = plan_.nodes.size() - 1;
    const NodePlan<E>& node = plan_.nodes[i];
    const T squares = of_width(0, i) / T(8);
    const int64_t pitch = spread_pitch<E>(node.layer().width());
    const NetworkBackward<T> op = of_layer(i);
    const std::vector<E> logits = logits_gradient(node.plan, op, squares, pitch);
    const std::vector<T> head = head_gradient(op, node.layer());
    dense(i, logits.data(), pitch, head.empty() ? nullptr : head.data());
  }

  // gradient: by what the node makes, [N][stream][pitch]; head: as in dense_backward.
  void dense(size_t i, const E* gradient, int64_t pitch, const T* head) {
    const NodePlan<E>& node = plan_.nodes[i];
    const Layer<E>& layer = node.layer();
    const bool wants_input = !layer.first || op_.grad_nominal_in;
    const E* in = reinterpret_cast<const E*>(op_.saved + plan_.input);
    if (!layer.first) {
      E* const images = scratch<E>(Slot::kStageEven, plan_.batch * layer.in.size());
      const View<E> view = view_of(plan_, node.a, op_.saved, norms_);
      parallel_for(op_.threads, plan_.batch, [&](int64_t n) {
        Totals unused;
        prepare(view, n, 1, node, images + n * layer.in.size(), false, unused);
      });
      in = images;
    }
    E* const out = wants_input
                       ? scratch<E>(Slot::kStageOdd, plan_.batch * layer.in.size() + kBlock<E>)
                       : nullptr;
    const std::vector<FeatureBlock> blocks = feature_blocks(layer, kFeatures);
    parallel_for(op_.threads, static_cast<int64_t>(blocks.size()), [&](int64_t b) {
      dense_backward(layer, op_.weights[i], reinterpret_cast<const std::byte*>(in), gradient, pitch,
                     blocks[static_cast<size_t>(b)], InputTarget<E>{nullptr, out, T{0}}, head,
                     op_.grad_weights[i]);
    });
    if (op_.grad_biases[i])
      dense_bias_gradient(gradient, pitch, plan_.batch, layer.shape.out_channels,
                          op_.grad_biases[i]);
    if (!wants_input) return;
    if (layer.first) {
      const NetworkBackward<T> op = of_layer(i);
      for (int64_t n = 0; n < plan_.batch; ++n)
        unpack_gradient(node.plan, op, n, out + n * layer.in.size(), layer.in_offsets,
                        layer.in.stream_stride());
      return;
    }
    const ViewGradient<E> to = target(node.a, node.counted_a);
    const Layer<E>& place = *to.view.place;
    parallel(parts(), [&](int index, int of) {
      NormSums<T>* const norm = sums_of(node.a, node.counted_a, index);
      const Part part(plan_.batch, index, of);
      for (int64_t n = part.begin; n < part.end; ++n) {
        for_vectors(place, [&](int64_t from, int64_t pixel, int64_t channel) {
          Vec<T> streams[S];
          load_streams(
              out + n * layer.in.size() + layer.in_offsets[static_cast<size_t>(pixel)] + channel,
              layer.in.stream_stride(), streams);
          take(to, n, from, channel, streams, norm);
        });
        if (norm) norm->add_up();
      }
    });
  }

  void convolve(size_t i) {
    const NodePlan<E>& node = plan_.nodes[i];
    const Layer<E>& layer = node.layer();
    NormGradient<T> by;
    if (node.norm) by = through_norm(i);
    const NetworkBackward<T> op = of_layer(i);
    const bool wants_input = !layer.first || op_.grad_nominal_in;
    const T* panels = nullptr;
    if (!layer.pool) panels = pack_weights(node.plan, op.weights, true, wants_input, op_.threads);
    ParameterSums<E> sums(node.plan, op, parts());
    const bool alone = node.kind == NodeKind::kDepthwise;
    std::optional<DepthwiseSums<E>> depthwise;
    std::vector<T> panel;
    if (alone) {
      panel = depthwise_panel(layer, op_.weights[i]);
      if (op_.grad_weights[i] || op_.grad_biases[i]) depthwise.emplace(layer, parts());
    }
    ViewGradient<E> to{};
    if (!layer.first) to = target(node.a, node.counted_a);
    parallel(sums.parts(), [&](int index, int of) {
      sums.clear(index);
      NormSums<T>* const norm = sums_of(node.a, node.counted_a, index);
      const Part part(plan_.batch, index, of);
      for (int64_t n = part.begin; n < part.end; n += layer.group) {
        const int64_t count = std::min(layer.group, part.end - n);
        if (layer.first) {
          const T* gradients = gradient_images<T>(i, by, n, count);
          sums.add(index, 0, count,
                   reinterpret_cast<const T*>(op_.saved + plan_.input) + n * layer.in.size(),
                   gradients);
          if (wants_input) convolve_to_input(node.plan, op, panels, n, gradients);
          continue;
        }
        const E* gradients = gradient_images<E>(i, by, n, count);
        if (!layer.pool || depthwise) {
          E* const images = scratch<E>(Slot::kStageOdd, layer.group * layer.in.size());
          Totals unused;
          prepare(to.view, n, count, node, images, false, unused);
          if (depthwise)
            depthwise->add(index, images, gradients);
          else
            sums.add(index, 0, count, images, gradients);
        }
        const auto finish = [&](int64_t example, int64_t pixel, int64_t channel, Vec<T>* streams) {
          take(to, n + example, to.view.place->in_offsets[static_cast<size_t>(pixel)] + channel,
               channel, streams, norm);
        };
        if (alone)
          depthwise_input_gradient(layer, panel.data(), gradients,
                                   [&](int64_t pixel, int64_t channel, Vec<T>* streams) {
                                     finish(0, pixel, channel, streams);
                                   });
        else
          input_gradient(layer, count, panels, gradients, node.plan.backward_max_pixels, finish);
        if (norm) norm->add_up();
      }
    });
    if (!layer.pool) sums.add_up();
    if (depthwise) depthwise->add_up(op_.weights[i], op_.grad_weights[i], op_.grad_biases[i]);
  }

  // The gradients by what a convolution makes, its norm left behind, as its backward pass reads
  // them; of `count` examples from n on.
  template <class G>
  const G* gradient_images(size_t i, const NormGradient<T>& by, int64_t n, int64_t count) const {
    const NodePlan<E>& node = plan_.nodes[i];
    const Layer<E>& layer = node.layer();
    const Geometry& h = layer.gradient;
    const int64_t size = node.place.in.size(), stride = node.place.in.stream_stride();
    const T width = node.weighted() ? of_width(0, i) : T{0};
    G* const images = scratch<G>(Slot::kGradient, layer.group * h.size() + kBlock<E>);
    for (int64_t k = 0; k < count; ++k) {
      G* const image = images + k * h.size();
      clear_padding(h, node.shape.out_height, node.shape.out_width, image);
      const E* const from = gradient(i) + (n + k) * size;
      const E* const values = value(i) + (n + k) * size;
      for_vectors(node.place, [&](int64_t at, int64_t pixel, int64_t channel) {
        Vec<T> d[S];
        load_streams(from + at, stride, d);
        finish(i, by, width, channel, values + at, d);
        G* const to = image + layer.gradient_offsets[static_cast<size_t>(pixel)] + channel;
        for (int k2 = 0; k2 < S; ++k2) store_numbers(to + k2 * h.stream_stride(), d[k2]);
      });
    }
    return images;
  }

  void add(size_t i) {
    const NodePlan<E>& node = plan_.nodes[i];
    const E* const all = finished(i);
    const ViewGradient<E> b = target(node.b, node.counted_b), a = target(node.a, node.counted_a);
    parallel(parts(), [&](int index, int of) {
      NormSums<T>* const norm_a = sums_of(node.a, node.counted_a, index);
      NormSums<T>* const norm_b = sums_of(node.b, node.counted_b, index);
      const Part part(plan_.batch, index, of);
      for (int64_t n = part.begin; n < part.end; ++n) {
        for_vectors(node.place, [&](int64_t from, int64_t, int64_t channel) {
          const auto give = [&](const ViewGradient<E>& to, NormSums<T>* norm) {
            Vec<T> streams[S];
            load_streams(all + n * node.place.in.size() + from, node.place.in.stream_stride(),
                         streams);
            take(to, n, from, channel, streams, norm);
          };
          give(b, norm_b);  // a's value may be b's, too, and a reads it first
          give(a, norm_a);
        });
        if (norm_a) norm_a->add_up();
        if (norm_b) norm_b->add_up();
      }
    });
  }

  const GraphPlan<E>& plan_;
  const GraphBackward<T>& op_;
  std::vector<Norm<T>> norms_;
  std::vector<std::unique_ptr<Memory>> gradients_;  // by each node's value, behind its norm
  std::vector<std::vector<NormSums<T>>> sums_;      // of each node's norm, of each part
};

template <class E>
void Graph<E>::backward(const GraphBackward<Number<E>>& op) const {
  GraphBackwardPass<E>(*plan_, op).run();
}

}  // namespace cibp
