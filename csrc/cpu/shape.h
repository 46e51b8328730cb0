// The geometry of a layer, the same for all kernels, and views of torch tensors.
#pragma once

#include <cstdint>

namespace cibp {

// A convolution, or an average pooling (groups = in_channels). Padding is with zeros: before the
// input as given, after it as much as the output reads.
struct Shape {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t groups = 1;
  bool channels_last = false;  // how images are written: [N, H, W, C] in memory, or [N, C, H, W]
};

// A linear layer.
struct LinearShape {
  int64_t batch, in_features, out_features;
};

// A torch tensor of RANK dimensions; absent where data is null.
template <class T, int RANK>
struct Strided {
  T* data = nullptr;
  int64_t stride[RANK] = {};  // in elements
};

template <class T>
using Tensor4 = Strided<T, 4>;
template <class T>
using Tensor2 = Strided<T, 2>;

}  // namespace cibp
