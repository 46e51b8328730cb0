// The plan of a network: how each pass of each layer is computed, and where its data lie.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "layers.h"
#include "network.h"
#include "scatter.h"
#include "winograd.h"

namespace cibp {

constexpr int64_t kLine = 64;  // bytes, of the cache

inline std::vector<int64_t> offsets(const Geometry& g, int64_t height, int64_t width) {
  std::vector<int64_t> table;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) table.push_back(g.offset(y, x));
  return table;
}

// What a layer needs by itself; the first one of a ball reads one stream.
template <class E>
Layer<E> planned_layer(const NetworkLayer& layer_given, bool first, Given given) {
  Layer<E> layer{};
  static_cast<NetworkLayer&>(layer) = layer_given;
  layer.first = first;
  layer.points = given == Given::kPoints;
  const Shape& s = layer.shape;
  const int64_t padded = round_up(s.in_channels, kLanes<E>);
  layer.dense = !layer.pool && is_dense(s);
  layer.rounded = std::is_same_v<E, float> && layer.fast && !first;
  layer.element = layer.rounded           ? sizeof(BFloat16)
                  : first && !layer.dense ? sizeof(Number<E>)
                                          : sizeof(E);
  if (layer.dense) {
    // A whole batch of single pixels is read at once.
    const bool single = s.in_height * s.in_width == 1;
    layer.in = {S, 0, s.in_height, 0, s.in_width, single ? spread_pitch<E>(padded) : padded};
  } else {
    const bool one = first && given == Given::kBalls;
    const int64_t paired = first ? 1 : kPaired<E>, channels = first ? s.in_channels : padded;
    layer.forward =
        (one ? make_plan<1> : make_plan<S>)(forward_classes(s), channels / paired, s.out_height,
                                            s.out_width, s.in_height, s.in_width);
    layer.in = geometry(layer.forward, one ? 1 : S, s.in_height, paired);
    if (layer.pool) {
      layer.gradient = {S, 0, s.out_height, 0, s.out_width, layer.width()};
    } else {
      layer.backward = make_plan<S>(input_gradient_classes(s), layer.width() / paired, s.in_height,
                                    s.in_width, s.out_height, s.out_width);
      layer.gradient = geometry(layer.backward, S, s.out_height, paired);
    }
    layer.gradient_offsets = offsets(layer.gradient, s.out_height, s.out_width);
  }
  layer.in_offsets = offsets(layer.in, s.in_height, s.in_width);
  return layer;
}

// Offsets of a direct weight gradient's rows in the input; the last one again to fill a tile.
template <class E>
std::vector<int64_t> row_offsets(const Layer<E>& layer) {
  const Shape& s = layer.shape;
  std::vector<int64_t> table;
  for (int64_t row = 0; row < round_up(layer.rows(), kTileRows); ++row) {
    const int64_t r = std::min(row, layer.rows() - 1), tap = r / s.in_channels;
    table.push_back(tap / s.kernel_width * s.dilation_height * layer.in.row_stride() +
                    tap % s.kernel_width * s.dilation_width * layer.in.pitch + r % s.in_channels);
  }
  return table;
}

// Where the panels of layer i's weights lie, forward or backward.
template <class E>
void place_panels(NetworkPlan<E>& plan, size_t i, bool backward) {
  Layer<E>& layer = plan.layers[i];
  const Shape& s = layer.shape;
  int64_t& size = backward ? plan.backward_panels : plan.panels;
  (backward ? layer.backward_panel : layer.panel) = size;
  // The panel's rows for each output, and its outputs.
  int64_t rows = s.kernel_height * s.kernel_width, outputs = layer.width();
  if (backward ? layer.winograd.input : layer.winograd.forward) {
    const int64_t in = Winograd<E>(s).phases() * layer.in.pitch;
    rows = 2 * kProducts<E> * (backward ? layer.width() : in) / kPaired<E>;
    outputs = backward ? in : layer.width();
  } else {
    rows *= (backward ? layer.backward : layer.forward).channels;
    outputs = backward ? round_up(s.in_channels, kLanes<E>) : layer.width();
  }
  if (backward && layer.scatter) {
    rows = s.out_channels;
    outputs = scatter_lanes<Number<E>>(s);
  }
  size += rows * outputs;
  for (int64_t b = 0; b < ceil_div(outputs, kBlock<E>); ++b)
    (backward ? plan.backward_panel_blocks : plan.panel_blocks).push_back({i, b});
}

// Where images and sums of layer i, in front of the dense ones, lie in a part's memory.
template <class E>
void place(NetworkPlan<E>& plan, size_t i) {
  Layer<E>& layer = plan.layers[i];
  layer.in_image = plan.in_images;
  // numbers of the first layer are of another type, and take up to kPaired times the room
  const int64_t room = layer.group * layer.in.size() * (i == 0 ? kPaired<E> : 1);
  plan.in_images += round_up(room, kLine);
  layer.sums = plan.sums;
  if (layer.winograd.weight)
    plan.sums += kProducts<E> * layer.width() *
                 round_up(Winograd<E>(layer.shape).phases() * layer.in.pitch, kTileRows);
  else if (!layer.pool)
    plan.sums += layer.sum_size();
  // as many images as the next convolution takes
  layer.gradient_images = plan.layers[std::min(i + 1, plan.convolutions - 1)].group;
  layer.gradient_image = plan.gradient_images;
  plan.gradient_images += layer.gradient_images * layer.gradient.size() + kBlock<E>;
  layer.bias = plan.outputs;
  plan.outputs += layer.shape.out_channels;
  plan.max_pixels = std::max(plan.max_pixels, layer.forward.max_pixels);
  plan.backward_max_pixels = std::max(plan.backward_max_pixels, layer.backward.max_pixels);
  if (!layer.pool) {
    place_panels(plan, i, false);
    place_panels(plan, i, true);
    if (!layer.winograd.weight) layer.row_offsets = row_offsets(layer);
  }
}

// Where the pixels of the gradient of a network's input lie, as its first layer makes it.
template <class E>
std::vector<int64_t> input_places(const Layer<E>& first) {
  const Shape& s = first.shape;
  const ScatterImage image(s);
  std::vector<int64_t> places;
  for (int64_t y = 0; y < s.in_height; ++y)
    for (int64_t x = 0; x < s.in_width; ++x)
      places.push_back(first.scatter ? (y + s.padding_height) * image.row_stride() +
                                           (x + s.padding_width) * image.channels
                                     : (y * s.in_width + x) * round_up(s.in_channels, kLanes<E>));
  return places;
}

template <class E>
Network<E>::Network(const std::vector<NetworkLayer>& layers, Given given) {
  const auto plan = std::make_shared<NetworkPlan<E>>();
  plan->given = given;
  plan->points = layers[0].shape.batch;
  plan->batch = given == Given::kPoints ? ceil_div(plan->points, int64_t{S}) : plan->points;
  for (size_t i = 0; i < layers.size(); ++i) {
    Layer<E> layer = planned_layer<E>(layers[i], i == 0, given);
    layer.shape.batch = plan->batch;
    layer.scatter = i == 0 && !layer.dense && scatters<Number<E>>(layer.shape);
    const Shape& s = layer.shape;
    if (i > 0) {  // the first one's channels fill no vector
      const bool fewer = layer.fast || kPaired<E> > 1;
      if (fewer && !layer.pool && !layer.dense) layer.winograd = winograd_passes<E>(s);
      // Not fewer than of the layer before, which would have to run for fewer, too.
      const int64_t group = layer.winograd.any() ? Winograd<E>(s).group(layer.in.size()) : 1;
      layer.group = std::min(s.batch, std::max(plan->layers[i - 1].group, group));
    }
    layer.saved = plan->saved_bytes;
    plan->saved_bytes += round_up(s.batch * layer.saved_size(), kLine);
    plan->biases += layer.width() + kBlock<E>;
    plan->layers.push_back(std::move(layer));
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    // of the last one only the input counts
    const bool last = i + 1 == layers.size();
    plan->layers[i].slack = slack<Number<E>>(last ? 0 : plan->layers[i].rows(), given);
    if (i > 0) plan->layers[i - 1].slack.next = plan->layers[i].slack.input;
  }
  while (!plan->layers[plan->convolutions].dense) ++plan->convolutions;
  for (size_t i = 0; i < plan->convolutions; ++i) place(*plan, i);
  plan->input_at = input_places(plan->layers[0]);
  plan_ = plan;
}

template <class E>
int64_t Network<E>::saved_bytes() const {
  return plan_->saved_bytes;
}

template <class E>
std::vector<int64_t> Network<E>::example_bytes() const {
  std::vector<int64_t> all;
  for (const Layer<E>& layer : plan_->layers) all.push_back(layer.saved_size());
  return all;
}

}  // namespace cibp
