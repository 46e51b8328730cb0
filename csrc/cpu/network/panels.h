// A network's layers, with how each pass of them is computed, and their packed weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../tile.h"
#include "direct.h"
#include "layers.h"
#include "winograd.h"

namespace cibp {

template <class T>
std::vector<Layer<T>> planned_layers(const std::vector<Stage<T>>& stages, bool ball) {
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

// The caller's buffer for a whole batch of a dense stage's input, or of its gradient; that of the
// stage before is another.
template <class T>
Slot batch_slot(const std::vector<Layer<T>>& layers, size_t i) {
  return (layers.size() - i) % 2 ? Slot::kStageOdd : Slot::kStageEven;
}

}  // namespace cibp
