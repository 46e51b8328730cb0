// Interval ReLU: F.relu of lower, upper and nominal, and the width of the result, in one pass.
#pragma once

#include <cstdint>

namespace cibp {

template <class T>
struct ReluForward {
  int64_t size;  // elements of each tensor; all are contiguous
  int threads;
  const T *lower, *upper, *nominal;  // nominal may be null
  // outputs
  T *lower_out, *upper_out, *nominal_out;  // nominal_out as nominal
  T* width;                                // [1] sum of (upper_out - lower_out)^2
};

template <class T>
struct ReluBackward {
  int64_t size;
  int threads;
  const T *grad_lower, *grad_upper, *grad_nominal;
  const T *lower_out, *upper_out, *nominal_out;  // nominal_out, grad_nominal may be null
  T grad_width;
  // outputs
  T *grad_lower_in, *grad_upper_in, *grad_nominal_in;  // grad_nominal_in as nominal_out
};

template <class T>
void relu_forward(const ReluForward<T>& op);
template <class T>
void relu_backward(const ReluBackward<T>& op);

}  // namespace cibp
