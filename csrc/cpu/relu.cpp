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
Vec<T> relu(Vec<T> x) {
  return x <= 0 ? Vec<T>{} : x;
}

// The gradient where ReLU gave something other than 0.
template <class T>
Vec<T> through(Vec<T> out, Vec<T> gradient) {
  return out <= 0 ? Vec<T>{} : gradient;
}

// Calls body(chunk, begin, end) for each chunk.
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
    Vec<T> sums{};
    for (int64_t i = begin; i < end; i += L) {
      const int64_t count = std::min<int64_t>(L, end - i);
      const Vec<T> lower = relu<T>(load_some(op.lower + i, count));
      const Vec<T> upper = relu<T>(load_some(op.upper + i, count));
      store_some<T>(op.lower_out + i, lower, count);
      store_some<T>(op.upper_out + i, upper, count);
      sums += (upper - lower) * (upper - lower);
      if (op.nominal)
        store_some<T>(op.nominal_out + i, relu<T>(load_some(op.nominal + i, count)), count);
    }
    widths[chunk] = static_cast<double>(sum<T>(sums));
  });
  double width = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) width += widths[chunk];
  *op.width = static_cast<T>(width);
}

template <class T>
void relu_backward(const ReluBackward<T>& op) {
  constexpr int L = kLanes<T>;
  const T scale = 2 * op.grad_width;
  for_chunks(op.threads, op.size, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += L) {
      const int64_t count = std::min<int64_t>(L, end - i);
      const auto at = [&](const T* p) { return load_some(p + i, count); };
      const Vec<T> lower = at(op.lower_out), upper = at(op.upper_out);
      const Vec<T> width = scale * (upper - lower);
      store_some<T>(op.grad_lower_in + i, through<T>(lower, at(op.grad_lower) - width), count);
      store_some<T>(op.grad_upper_in + i, through<T>(upper, at(op.grad_upper) + width), count);
      if (op.nominal_out)
        store_some<T>(op.grad_nominal_in + i, through<T>(at(op.nominal_out), at(op.grad_nominal)),
                      count);
    }
  });
}

template void relu_forward(const ReluForward<float>&);
template void relu_forward(const ReluForward<double>&);
template void relu_backward(const ReluBackward<float>&);
template void relu_backward(const ReluBackward<double>&);

}  // namespace cibp
