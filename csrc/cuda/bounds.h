// The end of an interval layer and its gradient, for layers that were computed elsewhere, say as
// two convolutions: center and radius to bounds, bias, ReLU and width. Any layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "streams.h"

namespace cibp::cuda {

// A tensor [N, C, H, W]; strides in elements. Absent where data is null.
template <class T>
struct Strided {
  T* data;
  int64_t stride[4];
};

struct BoundsShape {
  int64_t size[4];  // N, C, H, W

  CIBP_HOST_DEVICE int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
};

// How the elements of a launch are enumerated.
struct Elements {
  BoundsShape shape;
  // Whether all tensors have the same strides without gaps or overlaps. Element i is then at i in
  // all of them, and its channel is i / channel_stride % C.
  bool dense;
  int64_t channel_stride;
};

// Whether strides enumerate shape without gaps or overlaps.
inline bool is_dense(const BoundsShape& shape, const int64_t* stride) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int d = 0; d < 4; ++d)
    if (shape.size[d] > 1) dims.emplace_back(stride[d], shape.size[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [step, size] : dims) {
    if (step != expected) return false;
    expected *= size;
  }
  return true;
}

// `tensors` are those of a launch that are not absent: data and strides.
inline Elements enumerate(const BoundsShape& shape,
                          const std::vector<std::pair<const float*, const int64_t*>>& tensors) {
  if (shape.count() == 0) return {shape, false, 1};
  const int64_t* stride = tensors.front().second;
  bool dense = is_dense(shape, stride);
  for (const auto& [data, other] : tensors) {
    dense = dense && aligned(data);
    for (int d = 0; d < 4; ++d) dense = dense && (shape.size[d] == 1 || other[d] == stride[d]);
  }
  return {shape, dense, dense && shape.size[1] > 1 ? stride[1] : shape.count()};
}

// Blocks of a launch, and so the partial sums of its width.
CIBP_HOST_DEVICE int64_t bounds_blocks(const BoundsShape& shape) {
  const int64_t blocks = ceil_div(shape.count(), 4 * 256);
  return blocks < 1 ? 1 : blocks > 1024 ? 1024 : blocks;
}

// (center, radius, nominal), of a layer without its bias, or (lower, upper, nominal) -> (lower,
// upper, nominal).
struct Bounds {
  static constexpr int kInputs = 3;
  bool bounds;        // whether lower and upper are given, and no bias
  const float* bias;  // [C] of this stride, or null
  int64_t bias_stride;
  bool relu;

  // Returns (upper - lower)^2.
  CIBP_DEVICE float operator()(int64_t channel, const float* in, float* out) const {
    const float b = bias ? bias[channel * bias_stride] : 0.0f, center = in[0] + b, radius = in[1];
    out[0] = center - radius;
    out[1] = center + radius;
    out[2] = in[2] + b;
    if (bounds) {
      out[0] = in[0];
      out[1] = in[1];
    } else if (!relu) {
      return out[0] == out[1] ? 0.0f : 4.0f * radius * radius;  // at infinity too
    }
    CIBP_UNROLL
    for (int s = 0; s < 3; ++s) out[s] = relu ? positive(out[s]) : out[s];
    return (out[1] - out[0]) * (out[1] - out[0]);
  }
};

// The gradients of (lower, upper, nominal), and the outputs themselves -> those of what was given.
struct BoundsGrad {
  static constexpr int kInputs = 6;
  bool bounds;              // whether that was lower and upper, and not center and radius
  const float* grad_width;  // of the sum of (upper - lower)^2; null: none
  bool relu;

  CIBP_DEVICE float operator()(int64_t, const float* in, float* out) const {
    const bool apart = grad_width && in[4] != in[3];  // inf - inf would be NaN
    const float width = apart ? 2.0f * *grad_width * (in[4] - in[3]) : 0.0f;
    float grad[3] = {in[0], in[1], in[2]}, of_width[3] = {width, width, 0.0f};
    CIBP_UNROLL
    for (int s = 0; s < 3; ++s)
      if (relu && in[3 + s] <= 0) grad[s] = of_width[s] = 0.0f;
    if (bounds) {
      out[0] = grad[0] - of_width[0];
      out[1] = grad[1] + of_width[1];
    } else {  // the width's gradients cancel in the center, exactly where they come after the rest
      out[0] = grad[0] + grad[1] + (of_width[1] - of_width[0]);
      out[1] = grad[1] - grad[0] + (of_width[1] + of_width[0]);
    }
    out[2] = grad[2];
    return 0.0f;
  }
};

// Applies Op to each element; absent inputs are zeros, and absent outputs are not wanted. A thread
// takes 4 dense elements at a time, or one of any strides.
template <class Op>
struct Elementwise {
  static constexpr int kThreads = 256, kMinBlocks = 2, kInputs = Op::kInputs;

  Elements elements;
  Op op;
  Strided<const float> in[kInputs];

  // outputs
  Strided<float> out[3];
  float* sums;  // [bounds_blocks] of what Op returns, or null

  static Elementwise make(const BoundsShape& shape, const Op& op, const Strided<const float>* in,
                          // outputs
                          const Strided<float>* out, float* sums) {
    Elementwise kernel{{}, op, {}, {}, sums};
    std::vector<std::pair<const float*, const int64_t*>> tensors;
    for (int i = 0; i < kInputs; ++i) {
      kernel.in[i] = in[i];
      if (in[i].data) tensors.emplace_back(in[i].data, in[i].stride);
    }
    for (int i = 0; i < 3; ++i) {
      kernel.out[i] = out[i];
      if (out[i].data) tensors.emplace_back(out[i].data, out[i].stride);
    }
    kernel.elements = enumerate(shape, tensors);
    return kernel;
  }
  Grid grid() const { return {bounds_blocks(elements.shape), 1, 1}; }
  int shared_floats() const { return kThreads; }

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float* shared) const {
    block.each([&](int thread) {
      const int64_t first = static_cast<int64_t>(block.x) * kThreads + thread;
      const int64_t step = bounds_blocks(elements.shape) * kThreads;
      shared[thread] = elements.dense ? dense(first, step) : strided(first, step);
    });
    if (sums) sum_block<kThreads>(block, shared, [&](float sum) { sums[block.x] = sum; });
  }

  CIBP_DEVICE float dense(int64_t first, int64_t step) const {
    const int64_t count = elements.shape.count();
    float total = 0.0f;
    for (int64_t i = 4 * first; i < count; i += 4 * step) {
      const bool whole = count - i >= 4;
      const int lanes = whole ? 4 : static_cast<int>(count - i);
      Pack<float, 4> x[kInputs], y[3];
      CIBP_UNROLL
      for (int k = 0; k < kInputs; ++k) {
        if (in[k].data && whole) {
          x[k] = load_pack<4>(in[k].data + i);
        } else {
          CIBP_UNROLL
          for (int j = 0; j < 4; ++j)
            x[k].value[j] = in[k].data && j < lanes ? in[k].data[i + j] : 0.0f;
        }
      }
      int64_t channel = i / elements.channel_stride % elements.shape.size[1];
      int64_t place = i % elements.channel_stride;
      CIBP_UNROLL
      for (int j = 0; j < 4; ++j) {
        float from[kInputs], to[3];
        CIBP_UNROLL
        for (int k = 0; k < kInputs; ++k) from[k] = x[k].value[j];
        const float value = op(channel, from, to);
        total += j < lanes ? value : 0.0f;
        CIBP_UNROLL
        for (int k = 0; k < 3; ++k) y[k].value[j] = to[k];
        if (++place == elements.channel_stride) {
          place = 0;
          if (++channel == elements.shape.size[1]) channel = 0;
        }
      }
      CIBP_UNROLL
      for (int k = 0; k < 3; ++k) {
        if (out[k].data && whole) {
          store_pack(out[k].data + i, y[k]);
        } else {
          CIBP_UNROLL
          for (int j = 0; j < 4; ++j)
            if (out[k].data && j < lanes) out[k].data[i + j] = y[k].value[j];
        }
      }
    }
    return total;
  }

  CIBP_DEVICE float strided(int64_t first, int64_t step) const {
    const int64_t count = elements.shape.count();
    float total = 0.0f;
    for (int64_t i = first; i < count; i += step) {
      const int64_t* size = elements.shape.size;
      const int64_t w = i % size[3], h = i / size[3] % size[2];
      const int64_t image = i / (size[3] * size[2]), c = image % size[1], n = image / size[1];
      const auto offset = [&](const int64_t* stride) {
        return n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
      };
      float from[kInputs], to[3];
      CIBP_UNROLL
      for (int k = 0; k < kInputs; ++k)
        from[k] = in[k].data ? in[k].data[offset(in[k].stride)] : 0.0f;
      total += op(c, from, to);
      CIBP_UNROLL
      for (int k = 0; k < 3; ++k)
        if (out[k].data) out[k].data[offset(out[k].stride)] = to[k];
    }
    return total;
  }
};

using BoundsForward = Elementwise<Bounds>;
using BoundsBackward = Elementwise<BoundsGrad>;

// out[split][c]: sums over every `splits`-th of the chunks of pixels. Threads lie along channels or
// along pixels, whichever is contiguous.
struct ChannelSums {
  static constexpr int kThreads = 256, kMinBlocks = 2;

  BoundsShape shape;
  Strided<const float> in;
  int splits, lanes;  // lanes: threads along the channels

  // outputs
  float* out;  // [splits, C]

  static ChannelSums make(const BoundsShape& shape, const Strided<const float>& in, int splits,
                          // outputs
                          float* out) {
    const int lanes = in.stride[1] == 1 ? power_of_2(shape.size[1], 32) : 1;
    return {shape, in, splits, lanes, out};
  }
  Grid grid() const { return {splits, ceil_div(shape.size[1], lanes), 1}; }
  int shared_floats() const { return kThreads; }

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float* shared) const {
    const int rows = kThreads / lanes;  // pixels at a time
    const int64_t area = shape.size[2] * shape.size[3], pixels = shape.size[0] * area;
    block.each([&](int thread) {
      const int64_t c = static_cast<int64_t>(block.y) * lanes + thread % lanes;
      float sum = 0.0f;
      const int64_t step = static_cast<int64_t>(splits) * rows;
      for (int64_t i = static_cast<int64_t>(block.x) * rows + thread / lanes;
           i < pixels && c < shape.size[1]; i += step) {
        const int64_t n = i / area, h = i % area / shape.size[3], w = i % shape.size[3];
        sum += in.data[n * in.stride[0] + c * in.stride[1] + h * in.stride[2] + w * in.stride[3]];
      }
      shared[thread] = sum;
    });
    for (int half = rows / 2; half > 0; half /= 2)
      block.each([&](int thread) {
        if (thread < half * lanes) shared[thread] += shared[thread + half * lanes];
      });
    block.each([&](int thread) {
      const int64_t c = static_cast<int64_t>(block.y) * lanes + thread;
      if (thread < lanes && c < shape.size[1])
        out[static_cast<int64_t>(block.x) * shape.size[1] + c] = shared[thread];
    });
  }
};

// out[i] = the sum of in[0][i], ..., in[splits - 1][i], in an order that is always the same.
struct SumPartials {
  static constexpr int kThreads = 256, kMinBlocks = 2, kColumns = 32, kRows = kThreads / kColumns;

  int64_t splits, size;
  const float* in;  // [splits, size]

  // outputs
  float* out;  // [size]

  Grid grid() const { return {ceil_div(size, kColumns), 1, 1}; }
  int shared_floats() const { return kThreads; }

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float* shared) const {
    block.each([&](int thread) {
      const int64_t column = static_cast<int64_t>(block.x) * kColumns + thread % kColumns;
      float sum = 0.0f;
      for (int64_t row = thread / kColumns; row < splits && column < size; row += kRows)
        sum += in[row * size + column];
      shared[thread] = sum;
    });
    for (int half = kRows / 2; half > 0; half /= 2)
      block.each([&](int thread) {
        if (thread < half * kColumns) shared[thread] += shared[thread + half * kColumns];
      });
    block.each([&](int thread) {
      const int64_t column = static_cast<int64_t>(block.x) * kColumns + thread;
      if (thread < kColumns && column < size) out[column] = shared[thread];
    });
  }
};

}  // namespace cibp::cuda
