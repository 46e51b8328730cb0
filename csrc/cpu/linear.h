// Interval linear layer: F.linear of the centre and the nominal with W, of the radius with |W|, in
// one pass.
#pragma once

#include "shape.h"

namespace cibp {

template <class T>
struct LinearForward {
  LinearShape shape;
  int threads;
  Tensor2<const T> lower, upper, nominal;  // [N, in_features]; nominal may be absent
  Tensor2<const T> weight;                 // [out_features, in_features]
  const T* bias;                           // [out_features] or null
  // outputs, contiguous
  T *lower_out, *upper_out, *nominal_out;  // [N, out_features]; nominal_out as nominal
  T* width;                                // [1] sum of (upper_out - lower_out)^2
};

template <class T>
struct LinearBackward {
  LinearShape shape;
  int threads;
  Tensor2<const T> grad_lower, grad_upper, grad_nominal;  // [N, out_features]
  Tensor2<const T> lower_out, upper_out;  // the same; absent where width has no gradient
  T grad_width;
  Tensor2<const T> lower, upper, nominal;  // as in the forward pass
  Tensor2<const T> weight;
  // outputs, contiguous; each pair or triple may be null where it is not wanted
  T *grad_lower_in, *grad_upper_in, *grad_nominal_in;  // [N, in_features]
  T* grad_weight;                                      // [out_features, in_features]
  T* grad_bias;                                        // [out_features]
};

template <class T>
void linear_forward(const LinearForward<T>& op);
template <class T>
void linear_backward(const LinearBackward<T>& op);

}  // namespace cibp
