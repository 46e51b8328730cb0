// The plan of a graph: how each node's layer is computed, and where the values lie.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "graph.h"
#include "layers.h"
#include "planning.h"

namespace cibp {

struct Counted {
  bool normed = false, activated = false;
};

template <class E>
struct NodePlan : Node {
  NetworkPlan<E> plan;  // of its layer, the only one
  Layer<E> place;       // whose `in` is how the node's value lies
  int64_t saved = 0;    // where that is, in bytes
  // whether the widths behind norm and activation of what its edges read are its to count
  Counted counted_a, counted_b;

  const Layer<E>& layer() const { return plan.layers[0]; }
  bool weighted() const { return kind == NodeKind::kAffine || kind == NodeKind::kDepthwise; }
  double units() const {  // of the whole batch
    return static_cast<double>(shape.batch * shape.out_channels * shape.out_height *
                               shape.out_width);
  }
};

template <class E>
struct GraphPlan {
  std::vector<NodePlan<E>> nodes;
  int64_t batch;
  int64_t input = 0;  // where the packed input of the node that reads what is given is saved
  int64_t saved_bytes = 0;
  std::vector<int64_t> example_bytes;

  // Makes room for so many bytes an example; returns where it begins.
  int64_t save(int64_t bytes) {
    const int64_t begin = saved_bytes;
    saved_bytes += round_up(batch * bytes, kLine);
    example_bytes.push_back(bytes);
    return begin;
  }
};

// How the outputs of a shape lie as a value.
template <class E>
Layer<E> value_place(const Shape& s) {
  Layer<E> place{};
  place.in = {S, 0, s.out_height, 0, s.out_width, round_up(s.out_channels, kLanes<E>)};
  place.in_offsets = offsets(place.in, s.out_height, s.out_width);
  place.shape = s;
  return place;
}

template <class E>
Graph<E>::Graph(const std::vector<Node>& nodes) {
  const auto plan = std::make_shared<GraphPlan<E>>();
  plan->batch = nodes[0].shape.batch;
  std::vector<Counted> counted(nodes.size() + 1);
  const auto count = [&](const Edge& edge) {  // the first time that a value is read so
    Counted& before = counted[static_cast<size_t>(edge.value)];
    const Counted own{edge.value > 0 && !before.normed,
                      edge.value > 0 && !edge.activation.none() && !before.activated};
    before.normed |= own.normed;
    before.activated |= own.activated;
    return own;
  };
  for (const Node& given : nodes) {
    NodePlan<E> node{};
    static_cast<Node&>(node) = given;
    node.plan.given = Given::kBoxes;
    node.plan.batch = node.plan.points = plan->batch;
    node.place = value_place<E>(given.shape);
    node.counted_a = count(given.a);
    if (given.kind == NodeKind::kSum) {
      node.counted_b = count(given.b);
    } else {
      const bool pool = given.kind != NodeKind::kAffine;  // planned as one
      const bool first = given.a.value == 0;
      Layer<E> layer =
          planned_layer<E>({given.shape, false, pool, given.fast}, first, Given::kBoxes);
      layer.rounded = false;
      layer.element = first && !layer.dense ? sizeof(Number<E>) : sizeof(E);
      layer.scatter = first && !layer.dense && scatters<Number<E>>(layer.shape);
      if (!first && !pool && !layer.dense && (given.fast || kPaired<E> > 1)) {
        layer.winograd = winograd_passes<E>(given.shape);
        if (layer.winograd.any())
          layer.group = std::min(plan->batch, Winograd<E>(given.shape).group(layer.in.size()));
      }
      if (first) plan->input = plan->save(layer.saved_size());
      node.plan.biases = layer.width() + kBlock<E>;
      node.plan.input_at = input_places<E>(layer);
      node.plan.layers.push_back(std::move(layer));
      if (!node.layer().dense) {
        node.plan.convolutions = 1;
        cibp::place(node.plan, 0);
      }
    }
    if (plan->nodes.size() + 1 < nodes.size())  // the last one's is what the graph returns
      node.saved = plan->save(node.place.in.size() * int64_t{sizeof(E)});
    plan->nodes.push_back(std::move(node));
  }
  plan_ = plan;
}

template <class E>
int64_t Graph<E>::saved_bytes() const {
  return plan_->saved_bytes;
}

template <class E>
std::vector<int64_t> Graph<E>::example_bytes() const {
  return plan_->example_bytes;
}

}  // namespace cibp
