// Interval convolution: F.conv2d of the centre and the nominal with W, of the radius with |W|, in
// one pass.
#pragma once

#include "shape.h"

namespace cibp {

template <class T>
struct Conv2dForward {
  Shape shape;
  int threads;
  Tensor4<const T> lower, upper, nominal;  // [N, C, H, W]; nominal may be absent
  Tensor4<const T> weight;  // [out_channels, in_channels / groups, kernel_height, kernel_width]
  const T* bias;            // [out_channels] or null
  // outputs; [N, out_channels, out_height, out_width], nominal_out as nominal
  T *lower_out, *upper_out, *nominal_out;
  T* width;  // [1] sum of (upper_out - lower_out)^2
};

template <class T>
struct Conv2dBackward {
  Shape shape;
  int threads;
  Tensor4<const T> grad_lower, grad_upper,
      grad_nominal;                       // [N, out_channels, out_height, out_width]
  Tensor4<const T> lower_out, upper_out;  // the same; absent where width has no gradient
  T grad_width;
  Tensor4<const T> lower, upper, nominal;  // as in the forward pass
  Tensor4<const T> weight;
  // outputs; each pair or triple may be null where it is not wanted
  T *grad_lower_in, *grad_upper_in, *grad_nominal_in;  // [N, C, H, W]
  T* grad_weight;                                      // as weight, contiguous
  T* grad_bias;                                        // [out_channels]
};

template <class T>
void conv2d_forward(const Conv2dForward<T>& op);
template <class T>
void conv2d_backward(const Conv2dBackward<T>& op);

}  // namespace cibp
