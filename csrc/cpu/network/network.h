// A whole network of affine stages with ReLU between them: all streams through all stages in one
// blocked layout, forward and backward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../conv2d.h"

namespace cibp {

// An affine layer as a convolution (of one group), and whether ReLU follows it. A linear layer is
// one whose kernel covers its whole input; such stages are dense, and only dense ones may follow
// them.
template <class T>
struct Stage {
  Conv2dShape shape;
  bool relu;
  // [out_channels, in_channels, kernel_height, kernel_width], or null: average pooling, which is
  // neither first nor last, and has no bias
  const T* weight;
  const T* bias;      // [out_channels] or null
  bool fast = false;  // may round more: in faster products, and in what is saved of its input
};

// Bytes of one example's packed input of a stage, as it is saved. `ball`: see NetworkForward.
template <class T>
int64_t stage_input_bytes(const Conv2dShape& shape, bool first, bool ball, bool fast);

// The batch is at least 1.
template <class T>
struct NetworkForward {
  int threads;
  std::vector<Stage<T>> stages;            // the last one dense, without ReLU
  Tensor4<const T> lower, upper, nominal;  // [N, C, H, W]
  // [C] or null. Where given the box is exactly nominal +- ball_radius, channel by channel, lower
  // and upper are not read, and the first stage is an unpadded convolution.
  const T* ball_radius;
  // outputs
  std::vector<std::byte*> inputs;          // [stages], each [N, stage_input_bytes]
  T *lower_out, *upper_out, *nominal_out;  // [N, classes]
  T *head_lower, *head_upper;              // [N, features of the last stage], in its order
  T* widths;  // [stages] sums of (upper - lower)^2 after ReLU, 0 at infinity
};

template <class T>
struct NetworkBackward {
  int threads;
  std::vector<Stage<T>> stages;          // biases are not read
  std::vector<const std::byte*> inputs;  // as the forward pass wrote them
  const T* ball_radius;                  // as in the forward pass; the box has no gradient then
  const T *lower_out, *upper_out;        // [N, classes]
  const T *grad_lower, *grad_upper, *grad_nominal;  // [N, classes]
  const T *grad_head_lower, *grad_head_upper;       // [N, features], or null
  const T* grad_widths;                             // [stages]
  // outputs
  T *grad_lower_in, *grad_upper_in, *grad_nominal_in;  // [N, C, H, W]; or all null, as of a ball
  std::vector<T*> grad_weights, grad_biases;           // [stages]; null: not wanted, and of pooling
};

template <class T>
void network_forward(const NetworkForward<T>& op);
template <class T>
void network_backward(const NetworkBackward<T>& op);

}  // namespace cibp
