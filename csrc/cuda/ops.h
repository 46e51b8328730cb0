// The launches, for the bindings: kernels' arguments are documented in the headers of the kernels.
#pragma once

#include "bounds.h"
#include "device.h"
#include "first_conv2d.h"
#include "halo_conv2d.h"

namespace cibp::cuda {

// Partial sums of the width of a first_conv2d_forward.
int64_t first_conv2d_blocks(const FirstConv2dShape& shape, int streams, Precision precision);
void first_conv2d_forward(const Launch& at, const FirstConv2dShape& shape, int streams,
                          const FirstInput& in, const float* weight, const float* bias, bool relu,
                          Precision precision,
                          // outputs
                          void* out, float* width);
void first_conv2d_grad_weight(const Launch& at, const FirstConv2dShape& shape, int streams,
                              int splits, const FirstInput& in, Precision precision,
                              const void* grad, const float* weight,
                              // outputs
                              float* grad_weight, float* grad_bias);
void bounds_forward(const Launch& at, const BoundsForward& kernel);
void bounds_backward(const Launch& at, const BoundsBackward& kernel);
void channel_sums(const Launch& at, const ChannelSums& kernel);
void sum_partials(const Launch& at, const SumPartials& kernel);

void halo_conv2d_pack_weight(const Launch& at, int in_channels, int out_channels,
                             const float* weight, Precision precision,
                             // outputs
                             uint32_t* out);
void halo_conv2d_forward(const Launch& at, const HaloShape& shape, int streams, const void* in,
                         const uint32_t* weight, const float* bias, bool relu, Precision precision,
                         // outputs
                         void* out, float* width);

}  // namespace cibp::cuda
