// The packed weights of a network's convolutions.
#pragma once

#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../tile.h"
#include "direct.h"
#include "layers.h"
#include "scatter.h"
#include "winograd.h"

namespace cibp {

// Packs the weights of the convolutions, in one parallel region; a layer's panel is at `panel`
// (forward) or `backward_panel`. Those of the first layer come first.
template <class E>
const Number<E>* pack_weights(const NetworkPlan<E>& plan,
                              const std::vector<const Number<E>*>& weights, bool backward,
                              bool first_too, int threads) {
  using T = Number<E>;
  T* panels = scratch<T>(Slot::kPanel, (backward ? plan.backward_panels : plan.panels) + 1);
  const auto& blocks = backward ? plan.backward_panel_blocks : plan.panel_blocks;
  size_t begin = 0;
  while (!first_too && begin < blocks.size() && blocks[begin].layer == 0) ++begin;
  parallel_for(threads, static_cast<int64_t>(blocks.size() - begin), [&](int64_t index) {
    const PanelBlock& item = blocks[begin + static_cast<size_t>(index)];
    const Layer<E>& layer = plan.layers[item.layer];
    const T* weight = weights[item.layer];
    T* panel = panels + (backward ? layer.backward_panel : layer.panel);
    const Plan& plan_of_pass = backward ? layer.backward : layer.forward;
    if (backward ? layer.winograd.input : layer.winograd.forward)
      with_outputs(Winograd<E>(layer.shape), [&](auto outputs) {
        pack_winograd<E, kPoints<E> + 1 - outputs>(layer.shape, weight, backward, layer.in.pitch,
                                                   item.block, panel);
      });
    else if (backward && layer.scatter)
      pack_scatter<T>(layer.shape, weight, item.block, panel);
    else if (layer.first)
      pack_panel<T>(layer.shape, weight, plan_of_pass, backward, item.block, panel);
    else
      pack_panel<E>(layer.shape, weight, plan_of_pass, backward, item.block, panel);
  });
  return panels;
}

// The caller's buffer for a whole batch of a dense layer's input, or of its gradient; that of the
// layer before is another.
template <class E>
Slot batch_slot(const NetworkPlan<E>& plan, size_t i) {
  return (plan.layers.size() - i) % 2 ? Slot::kStageOdd : Slot::kStageEven;
}

}  // namespace cibp
