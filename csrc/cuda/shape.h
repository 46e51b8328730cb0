// The geometry of a convolution: kernels/shape.py's Shape.
#pragma once

#include "block.h"

namespace cibp::cuda {

// What lies before the image is padding_height and padding_width; what lies after it follows from
// the output's size, so it may differ.
struct ConvShape {
  int batch, in_channels, in_height, in_width;
  int out_channels, out_height, out_width;
  int kernel_height, kernel_width;
  int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;

  CIBP_HOST_DEVICE int products() const { return in_channels * kernel_height * kernel_width; }
  // Elements of a stream of the input, [N, H, W, C], and of the output, [N, H', W', K].
  CIBP_HOST_DEVICE int64_t inputs() const { return in_place(batch, 0, 0, 0); }
  CIBP_HOST_DEVICE int64_t outputs() const { return out_place(batch, 0, 0, 0); }
  // Where an element of such a stream is.
  CIBP_HOST_DEVICE int64_t in_place(int n, int y, int x, int channel) const {
    const int64_t row = static_cast<int64_t>(n) * in_height + y;
    return (row * in_width + x) * in_channels + channel;
  }
  CIBP_HOST_DEVICE int64_t out_place(int n, int y, int x, int channel) const {
    const int64_t row = static_cast<int64_t>(n) * out_height + y;
    return (row * out_width + x) * out_channels + channel;
  }
};

}  // namespace cibp::cuda
