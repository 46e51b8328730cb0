// A step of training by constrained IBP and Adam, from the bytes of a data set to the parameters.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "network.h"

namespace cibp {

// A parameter with Adam's state, all of `size` elements.
struct Parameter {
  float *value, *first, *second;  // first and second moment
  int64_t size;
};

// What stays the same from step to step.
struct Training {
  std::vector<NetworkLayer> layers;
  bool ball;  // whether the box is exactly nominal +- eps, and the first layer takes such
              // (network.h)
  std::vector<Parameter> weights, biases;  // [layers]; null values: none, and of pooling
  const uint8_t* images;                   // [E, C, H, W]
  const int64_t* labels;                   // [E]
  const int32_t* plan;                     // [E, 4]: of an epoch, as of Images
  const float* pixels;                     // [C, 256]: the network's input of each byte
  float least, greatest;                   // what the box is cut to
  const float *center, *scale;             // [C]: it is (box - center) / scale then; or null
  double width_weight;
  bool mean;  // as in NetworkForward
};

// What changes.
struct TrainingStep {
  int threads;
  int64_t first;   // example of the batch, in the plan
  int64_t number;  // of the step, from 1 on
  double eps, kappa, lr;
};

// Equals, in the arithmetic of Network<E>, one step of
//   loss = kappa CE(z, y) + (1 - kappa) CE(zhat, y) + width_weight * sum of widths
// (zhat elided, widths after ReLU and of the logits) with torch.optim.Adam's defaults.
template <class E>
class TrainStep {
 public:
  explicit TrainStep(const Training& training);

  // Takes a step. Adds to totals, [5 + K], the loss, its three terms, the part of wrong nominal
  // predictions (NaN is wrong), and the K widths. Returns whether all labels are classes; nothing
  // has changed where not.
  bool run(const TrainingStep& step, double* totals);

  int64_t saved_bytes() const;  // kept from the forward pass to the backward pass

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace cibp
