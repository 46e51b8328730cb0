// Cross-entropies of a batch, averaged: of its logits, and of the worst-case logits over the box of
// the last linear layer's input.
//
// The worst-case logits of an example with label y are 0 at y and elsewhere the greatest
// z_j - z_y: |W_j - W_y| r + (W_j - W_y) c + b_j - b_y, for c, r = (upper + lower) / 2,
// (upper - lower) / 2.
#pragma once

#include <cstdint>

#include "shape.h"

namespace cibp {

template <class T>
struct LossForward {
  LinearShape shape;  // N examples, K features, C classes; all tensors are contiguous
  int threads;
  const T* logits;         // [N, C]
  const T *lower, *upper;  // [N, K]
  const T *weight, *bias;  // [C, K], [C]; bias may be null
  const int64_t* labels;   // [N]
  // outputs
  T *nominal, *robust;  // [1]: of the logits, of the worst-case logits
  T* slopes;            // [2, N, C]: derivatives of an example's two by its logits
};

template <class T>
struct LossBackward {
  LinearShape shape;
  int threads;
  const T *grad_nominal, *grad_robust;  // [1]; null: 0
  const T *lower, *upper, *weight;
  const int64_t* labels;
  const T* slopes;
  // outputs, null where not wanted
  T* grad_logits;              // [N, C]
  T *grad_lower, *grad_upper;  // [N, K]; both or none
  T *grad_weight, *grad_bias;  // [C, K], [C]
};

// Both return whether all labels are in [0, C); nothing is written where they are not.
template <class T>
bool loss_forward(const LossForward<T>& op);
template <class T>
bool loss_backward(const LossBackward<T>& op);

}  // namespace cibp
