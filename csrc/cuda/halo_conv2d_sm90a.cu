#include "launch.h"
#include "ops.h"

namespace cibp::cuda {
namespace {

template <int STREAMS, class T>
void forward(const Launch& at, const ConvShape& shape, const void* in, const uint32_t* weight,
             const float* bias, bool relu, int dropped, void* out, float* width) {
  launch("halo_conv2d_forward", at,
         HaloConv2d<STREAMS, T>::make(shape, static_cast<const T*>(in), weight, bias, relu, dropped,
                                      static_cast<T*>(out), width));
}

}  // namespace

void halo_conv2d_forward(const Launch& at, const ConvShape& shape, int streams, const void* in,
                         const uint32_t* weight, const float* bias, bool relu, Precision precision,
                         void* out, float* width) {
  require_capability("halo_conv2d_forward", at, 9, 0);
  const bool half = precision == Precision::kBFloat16;
  const auto build = streams == 3 ? (half ? &forward<3, BFloat16> : &forward<3, float>)
                                  : (half ? &forward<2, BFloat16> : &forward<2, float>);
  build(at, shape, in, weight, bias, relu, dropped_bits(precision), out, width);
}

void halo_conv2d_pack_weight(const Launch& at, const ConvShape& shape, const float* weight,
                             Precision precision, uint32_t* out) {
  require_capability("halo_conv2d_pack_weight", at, 9, 0);
  const int dropped = dropped_bits(precision);
  if (precision == Precision::kBFloat16) {
    check_halo<BFloat16>(shape);
    launch("halo_conv2d_pack_weight", at,
           HaloPackWeight<BFloat16>{shape.in_channels, shape.out_channels, dropped, weight, out});
  } else {
    check_halo<float>(shape);
    launch("halo_conv2d_pack_weight", at,
           HaloPackWeight<float>{shape.in_channels, shape.out_channels, dropped, weight, out});
  }
}

}  // namespace cibp::cuda
