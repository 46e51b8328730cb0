// The launches, for the bindings: kernels' arguments are documented in the headers of the kernels.
#pragma once

#include "device.h"
#include "first_conv2d.h"
#include "halo_conv2d.h"

namespace cibp::cuda {

// Partial sums of the width of a first_conv2d_forward.
int64_t first_conv2d_blocks(const ConvShape& shape, int streams, Precision precision);
void first_conv2d_forward(const Launch& at, const ConvShape& shape, int streams, const void* in,
                          const float* weight, const float* bias, bool relu, Precision precision,
                          // outputs
                          void* out, float* width);
void first_conv2d_grad_weight(const Launch& at, const ConvShape& shape, int streams, int splits,
                              const void* in, Precision precision, const void* grad,
                              const float* weight,
                              // outputs
                              float* grad_weight, float* grad_bias);

void halo_conv2d_pack_weight(const Launch& at, const ConvShape& shape, const float* weight,
                             Precision precision,
                             // outputs
                             uint32_t* out);
void halo_conv2d_forward(const Launch& at, const ConvShape& shape, int streams, const void* in,
                         const uint32_t* weight, const float* bias, bool relu, Precision precision,
                         // outputs
                         void* out, float* width);

}  // namespace cibp::cuda
