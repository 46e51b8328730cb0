// Each node runs over the whole batch, the examples divided among the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "dense.h"
#include "depthwise.h"
#include "forward.h"
#include "graph_plan.h"
#include "norm.h"
#include "view.h"

namespace cibp {

// What a node reads by an edge.
template <class E>
View<E> view_of(const GraphPlan<E>& plan, const Edge& edge, const std::byte* saved,
                const std::vector<Norm<Number<E>>>& norms) {
  using T = Number<E>;
  const auto k = static_cast<size_t>(edge.value - 1);
  const NodePlan<E>& node = plan.nodes[k];
  return {reinterpret_cast<const E*>(saved + node.saved),
          &node.place,
          node.norm ? &norms[k] : nullptr,
          {edge.activation.curve, static_cast<T>(edge.activation.a),
           static_cast<T>(edge.activation.b), static_cast<T>(edge.activation.c)}};
}

template <class E>
class GraphForwardPass {
  using T = Number<E>;

 public:
  GraphForwardPass(const GraphPlan<E>& plan, const GraphForward<T>& op)
      : plan_(plan),
        op_(op),
        norms_(plan.nodes.size()),
        widths_(3 * plan.nodes.size()),
        moments_(kMoments * plan.nodes.size()) {}

  void run() {
    for (size_t i = 0; i < plan_.nodes.size(); ++i) {
      const NodePlan<E>& node = plan_.nodes[i];
      E* const out = reinterpret_cast<E*>(op_.saved + node.saved);
      if (node.kind == NodeKind::kSum)
        add(i, out);
      else if (node.layer().dense)
        dense(i, out);
      else
        convolve(i, out);
      if (node.norm) normalize_node(i, out);
    }
    for (size_t i = 0; i < widths_.size(); ++i)
      op_.widths[i] = static_cast<T>(4 * widths_[i]) /
                      width_divisor(plan_.nodes[i % plan_.nodes.size()].place, op_.mean);
    for (size_t i = 0; op_.moments && i < moments_.size(); ++i)
      op_.moments[i] = moments_[i] / plan_.nodes[i % plan_.nodes.size()].units();
  }

 private:
  // What a part of the examples adds to widths and moments: of what both edges read, and of what is
  // made.
  struct Sums {
    Totals a, b;
    double made = 0;
  };

  void count(const Edge& edge, const Counted& counted, const Totals& totals) {
    const size_t nodes = plan_.nodes.size(), k = static_cast<size_t>(edge.value - 1);
    if (counted.normed) widths_[nodes + k] += totals.normed;
    if (!counted.activated) return;
    widths_[2 * nodes + k] += totals.activated;
    for (size_t m = 0; m < kMoments; ++m) moments_[m * nodes + k] += totals.moments[m];
  }

  bool wants_moments(const Counted& counted) const { return op_.moments && counted.activated; }

  // Calls body(n, count, sums) for groups of examples.
  template <class Body>
  void for_examples(size_t i, int64_t group, const Body& body) {
    const int parts = plan_.batch > 1 ? op_.threads : 1;
    std::vector<Sums> sums(static_cast<size_t>(parts));
    parallel(parts, [&](int index, int of) {
      Sums own;
      const Part part(plan_.batch, index, of);
      for (int64_t n = part.begin; n < part.end; n += group)
        body(n, std::min(group, part.end - n), own);
      sums[static_cast<size_t>(index)] = own;
    });
    const NodePlan<E>& node = plan_.nodes[i];
    for (const Sums& own : sums) {
      count(node.a, node.counted_a, own.a);
      count(node.b, node.counted_b, own.b);
      widths_[i] += own.made;
    }
  }

  // What the network is given, packed for the node that reads it: [N] images of numbers N.
  void pack(const NodePlan<E>& node, int64_t n, T* image) const {
    NetworkForward<T> given{};
    given.lower = op_.lower;
    given.upper = op_.upper;
    given.nominal = op_.nominal;
    pack_input(node.plan, given, n, image);
  }

  void convolve(size_t i, E* out) {
    const NodePlan<E>& node = plan_.nodes[i];
    const Layer<E>& layer = node.layer();
    const T* panels = nullptr;
    T* bias = scratch<T>(Slot::kBias, node.plan.biases);
    std::fill_n(bias, node.plan.biases, T{0});
    if (node.weighted() && op_.biases[i])
      std::copy_n(op_.biases[i], layer.shape.out_channels, bias);
    std::vector<T> depthwise;
    if (node.kind == NodeKind::kDepthwise)
      depthwise = depthwise_panel(layer, op_.weights[i]);
    else if (node.weighted())
      panels = pack_weights(node.plan, {op_.weights[i]}, false, true, op_.threads);
    const int64_t most = node.plan.max_pixels, size = node.place.in.size();
    if (layer.first) {
      T* const input = reinterpret_cast<T*>(op_.saved + plan_.input);
      return for_examples(i, 1, [&](int64_t n, int64_t, Sums& sums) {
        pack(node, n, input + n * layer.in.size());
        sums.made += forward_one(layer, panels, bias, bias, input + n * layer.in.size(), node.place,
                                 most, out + n * size);
      });
    }
    const View<E> view = view_of(plan_, node.a, op_.saved, norms_);
    const bool moments = wants_moments(node.counted_a);
    for_examples(i, layer.group, [&](int64_t n, int64_t count, Sums& sums) {
      E* const images = scratch<E>(Slot::kStageOdd, layer.group * layer.in.size());
      prepare(view, n, count, node, images, moments, sums.a);
      double made = 0;
      if (layer.winograd.forward)
        made = winograd_forward(layer, count, panels, bias, images, node.place, out + n * size);
      else
        for (int64_t k = 0; k < count; ++k) {
          const E* const image = images + k * layer.in.size();
          E* const to = out + (n + k) * size;
          made += node.kind == NodeKind::kDepthwise
                      ? depthwise_forward(layer, depthwise.data(), bias, image, node.place, to)
                      : forward_one(layer, panels, bias, bias, image, node.place, most, to);
        }
      if (node.weighted()) sums.made += made;
    });
  }

  void dense(size_t i, E* out) {
    const NodePlan<E>& node = plan_.nodes[i];
    const Layer<E>& layer = node.layer();
    E* in = nullptr;
    if (layer.first) {
      in = reinterpret_cast<E*>(op_.saved + plan_.input);
      NetworkForward<T> given{};
      given.threads = op_.threads;
      given.lower = op_.lower;
      given.upper = op_.upper;
      given.nominal = op_.nominal;
      pack_dense(node.plan, given, in);
    } else {
      in = scratch<E>(Slot::kStageEven, plan_.batch * layer.in.size());
      const View<E> view = view_of(plan_, node.a, op_.saved, norms_);
      const bool moments = wants_moments(node.counted_a);
      for_examples(i, 1, [&](int64_t n, int64_t count, Sums& sums) {
        prepare(view, n, count, node, in + n * layer.in.size(), moments, sums.a);
      });
    }
    T* bias = scratch<T>(Slot::kBias, node.plan.biases);
    std::fill_n(bias, node.plan.biases, T{0});
    if (op_.biases[i]) std::copy_n(op_.biases[i], layer.shape.out_channels, bias);
    if (i + 1 == plan_.nodes.size()) {
      head_bounds_of(node, in);
      widths_[i] = dense_forward(layer, op_.weights[i], in, op_.threads, logits(layer, bias));
      return;
    }
    const Geometry& g = node.place.in;
    widths_[i] = dense_forward(
        layer, op_.weights[i], in, op_.threads, [&](int64_t n, int64_t channel, Vec<T>* sums) {
          activate<E>(layer, load(bias + channel), sums);
          store_streams(out + n * g.size() + channel, g.stream_stride(), sums);
        });
  }

  // What dense_forward does with the sums of the last node.
  auto logits(const Layer<E>& layer, const T* bias) const {
    const int64_t classes = layer.shape.out_channels;
    return [this, &layer, bias, classes](int64_t n, int64_t channel, Vec<T>* sums) {
      activate<E>(layer, load(bias + channel), sums);
      const int64_t valid = std::min<int64_t>(kLanes<T>, classes - channel);
      const int64_t at = n * classes + channel;
      const Vec<T> lower = sums[0] - sums[1], upper = sums[0] + sums[1];
      store_some<T>(op_.lower_out + at, lower, valid);
      store_some<T>(op_.upper_out + at, upper, valid);
      store_some<T>(op_.nominal_out + at, sums[2], valid);
      sums[1] = lower == upper ? Vec<T>{} : sums[1];  // as `difference`
    };
  }

  // A sum reads both values as they lie.
  void add(size_t i, E* out) {
    const NodePlan<E>& node = plan_.nodes[i];
    const View<E> a = view_of(plan_, node.a, op_.saved, norms_),
                  b = view_of(plan_, node.b, op_.saved, norms_);
    for_examples(i, 1, [&](int64_t n, int64_t, Sums& sums) {
      const int64_t base = n * a.size();
      Seen<T> of_a{wants_moments(node.counted_a)}, of_b{wants_moments(node.counted_b)};
      for_vectors(node.place, [&](int64_t at, int64_t, int64_t channel) {
        Vec<T> x[S], y[S];
        read(a, a.value + base + at, channel, x, of_a);
        read(b, b.value + base + at, channel, y, of_b);
        for (int k = 0; k < S; ++k) x[k] += y[k];
        clear_masked<T>(x);
        store_streams(out + base + at, a.stride(), x);
      });
      sums.a.add(of_a);
      sums.b.add(of_b);
    });
  }

  // The statistics of a node's value, and its norm.
  void normalize_node(size_t i, const E* value) {
    const NodePlan<E>& node = plan_.nodes[i];
    const int64_t pitch = node.place.in.pitch, channels = node.shape.out_channels;
    if (!node.fixed) statistics(i, value);
    norms_[i] = norm_of<T>(channels, pitch, node.eps, op_.means[i], op_.variances[i], op_.gammas[i],
                           op_.betas[i]);
  }

  void statistics(size_t i, const E* value) const {
    const NodePlan<E>& node = plan_.nodes[i];
    const int64_t pitch = node.place.in.pitch;
    const int parts = plan_.batch > 1 ? op_.threads : 1;
    std::vector<Statistics> all_parts(static_cast<size_t>(parts), Statistics(pitch));
    parallel(parts, [&](int index, int of) {
      Statistics own(pitch);
      const Part part(plan_.batch, index, of);
      for (int64_t n = part.begin; n < part.end; ++n)
        own.add(node.place, value + n * node.place.in.size());
      all_parts[static_cast<size_t>(index)] = own;
    });
    Statistics all(pitch);
    for (const Statistics& own : all_parts) all.add(own);
    for (int64_t c = 0; c < node.shape.out_channels; ++c) {
      op_.means[i][c] = static_cast<T>(all.mean(static_cast<size_t>(c)));
      op_.variances[i][c] = static_cast<T>(all.variance(static_cast<size_t>(c)));
    }
  }

  // The bounds of what the last node reads, in torch's order.
  void head_bounds_of(const NodePlan<E>& node, const E* in) const {
    const Layer<E>& layer = node.layer();
    const int64_t pixels = static_cast<int64_t>(layer.in_offsets.size());
    const int64_t channels = layer.shape.in_channels, stride = layer.in.stream_stride();
    const bool relu = node.a.value > 0 && node.a.activation.relu();
    parallel_for(op_.threads, plan_.batch, [&](int64_t n) {
      for (int64_t p = 0; p < pixels; ++p) {
        const E* from = in + n * layer.in.size() + layer.in_offsets[static_cast<size_t>(p)];
        for (int64_t c = 0; c < channels; ++c) {
          const T m = number(from[c]), r = number(from[c + stride]);
          const int64_t to = (n * channels + c) * pixels + p;
          op_.head_lower[to] = relu && m <= r ? T{0} : m - r;  // of infinite bounds m - r is NaN
          op_.head_upper[to] = m + r;
        }
      }
    });
  }

  const GraphPlan<E>& plan_;
  const GraphForward<T>& op_;
  std::vector<Norm<T>> norms_;
  std::vector<double> widths_, moments_;
};

template <class E>
void Graph<E>::forward(const GraphForward<Number<E>>& op) const {
  GraphForwardPass<E>(*plan_, op).run();
}

}  // namespace cibp
