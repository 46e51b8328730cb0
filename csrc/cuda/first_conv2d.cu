#include "launch.h"
#include "ops.h"

namespace cibp::cuda {
namespace {

template <int STREAMS>
struct Streams {
  static constexpr int value = STREAMS;
};

// Calls body(streams, element of what is stored) for one of the four builds of a kernel.
template <class Body>
auto dispatch(int streams, Precision precision, const Body& body) {
  const bool half = precision == Precision::kBFloat16;
  if (streams == 3) return half ? body(Streams<3>(), BFloat16()) : body(Streams<3>(), 0.0f);
  return half ? body(Streams<2>(), BFloat16()) : body(Streams<2>(), 0.0f);
}

}  // namespace

int64_t first_conv2d_blocks(const ConvShape& shape, int streams, Precision precision) {
  return dispatch(streams, precision, [&](auto count, auto element) {
    using Kernel = FirstConv2dForward<decltype(count)::value, decltype(element)>;
    const Grid grid =
        Kernel::make(shape, nullptr, nullptr, nullptr, false, 0, nullptr, nullptr).grid();
    return grid.x * grid.y;
  });
}

void first_conv2d_forward(const Launch& at, const ConvShape& shape, int streams, const void* in,
                          const float* weight, const float* bias, bool relu, Precision precision,
                          void* out, float* width) {
  dispatch(streams, precision, [&](auto count, auto element) {
    using T = decltype(element);
    using Kernel = FirstConv2dForward<decltype(count)::value, T>;
    launch("first_conv2d_forward", at,
           Kernel::make(shape, static_cast<const T*>(in), weight, bias, relu,
                        dropped_bits(precision), static_cast<T*>(out), width));
  });
}

void first_conv2d_grad_weight(const Launch& at, const ConvShape& shape, int streams, int splits,
                              const void* in, Precision precision, const void* grad,
                              const float* weight, float* grad_weight, float* grad_bias) {
  dispatch(streams, precision, [&](auto count, auto element) {
    using T = decltype(element);
    using Kernel = FirstConv2dGradWeight<decltype(count)::value, T>;
    launch("first_conv2d_grad_weight", at,
           Kernel::make(shape, splits, static_cast<const T*>(in), static_cast<const T*>(grad),
                        weight, grad_weight, grad_bias));
  });
}

}  // namespace cibp::cuda
