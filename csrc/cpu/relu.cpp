#include "relu.h"

#include <algorithm>

#include "parallel.h"
#include "tile.h"

namespace cibp {
namespace {

// Elements of one item: fixed, so that the width does not depend on the number of threads.
constexpr int64_t kChunk = 8192;

// Not max(x, 0), which the instruction sets make 0 for NaN: a NaN must reach the bounds.
template <class T>
T relu(T x) {
  return x <= 0 ? T{0} : x;
}

template <class T>
T through(T out, T gradient) {
  return out <= 0 ? T{0} : gradient;
}

// Calls body(begin, end) for each chunk.
template <class Body>
void for_chunks(int threads, int64_t size, const Body& body) {
  parallel_for(threads, ceil_div(size, kChunk), [&](int64_t chunk) {
    body(chunk, chunk * kChunk, std::min(size, (chunk + 1) * kChunk));
  });
}

}  // namespace

template <class T>
void relu_forward(const ReluForward<T>& op) {
  constexpr int L = kLanes<T>;
  const int64_t chunks = ceil_div(op.size, kChunk);
  double* widths = scratch<double>(Slot::kWidth, chunks);
  for_chunks(op.threads, op.size, [&](int64_t chunk, int64_t begin, int64_t end) {
    T sums[L] = {};  // in a fixed order that the compiler can keep in a vector
    int64_t i = begin;
    const auto element = [&](int64_t at) {
      const T lower = relu(op.lower[at]), upper = relu(op.upper[at]);
      op.lower_out[at] = lower;
      op.upper_out[at] = upper;
      return (upper - lower) * (upper - lower);
    };
    for (; i + L <= end; i += L)
      for (int lane = 0; lane < L; ++lane) sums[lane] += element(i + lane);
    for (; i < end; ++i) sums[0] += element(i);
    double width = 0;
    for (const T sum : sums) width += static_cast<double>(sum);
    widths[chunk] = width;
    if (op.nominal)
      for (int64_t at = begin; at < end; ++at) op.nominal_out[at] = relu(op.nominal[at]);
  });
  double width = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) width += widths[chunk];
  *op.width = static_cast<T>(width);
}

template <class T>
void relu_backward(const ReluBackward<T>& op) {
  for_chunks(op.threads, op.size, [&](int64_t, int64_t begin, int64_t end) {
    const T scale = 2 * op.grad_width;
    for (int64_t i = begin; i < end; ++i) {
      const T lower = op.lower_out[i], upper = op.upper_out[i], width = scale * (upper - lower);
      op.grad_lower_in[i] = through(lower, op.grad_lower[i] - width);
      op.grad_upper_in[i] = through(upper, op.grad_upper[i] + width);
    }
    if (op.nominal_out)
      for (int64_t i = begin; i < end; ++i)
        op.grad_nominal_in[i] = through(op.nominal_out[i], op.grad_nominal[i]);
  });
}

template void relu_forward(const ReluForward<float>&);
template void relu_forward(const ReluForward<double>&);
template void relu_backward(const ReluBackward<float>&);
template void relu_backward(const ReluBackward<double>&);

}  // namespace cibp
