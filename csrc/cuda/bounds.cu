#include "launch.h"
#include "ops.h"

namespace cibp::cuda {

void bounds_forward(const Launch& at, const BoundsForward& kernel) {
  launch("bounds_forward", at, kernel);
}

void bounds_backward(const Launch& at, const BoundsBackward& kernel) {
  launch("bounds_backward", at, kernel);
}

void channel_sums(const Launch& at, const ChannelSums& kernel) {
  launch("channel_sums", at, kernel);
}

void sum_partials(const Launch& at, const SumPartials& kernel) {
  launch("sum_partials", at, kernel);
}

}  // namespace cibp::cuda
