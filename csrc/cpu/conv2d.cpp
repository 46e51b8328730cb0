// Direct convolutions over packed streams.
//
// A strip of rows of one image and group is packed channels last, [row][stream][column][channel],
// with its zero padding.
#include "conv2d.h"

#include <algorithm>
#include <array>
#include <vector>

#include "parallel.h"
#include "plan.h"
#include "streams.h"
#include "tile.h"

namespace cibp {
namespace {

// The weight panel: for each group, block of output channels, tap and input channel a vector block
// of weights. What is input and output is as the plan sees it: the input gradient has them
// exchanged.
template <class T>
T* pack_weights(const Shape& shape, const Tensor4<const T>& weight, const Plan& plan,
                int64_t out_channels, bool exchanged, int threads) {
  const int64_t in_channels = plan.channels, taps = shape.kernel_height * shape.kernel_width,
                rows = taps * in_channels;
  const int64_t width = round_up(out_channels, kLanes<T>),
                blocks = ceil_div(out_channels, kBlock<T>);
  T* panel = scratch<T>(Slot::kPanel, shape.groups * rows * width);
  const int64_t out_stride = weight.stride[exchanged ? 1 : 0],
                in_stride = weight.stride[exchanged ? 0 : 1];
  parallel_for(threads, shape.groups * blocks, [&](int64_t item) {
    const int64_t g = item / blocks, c = item % blocks * kBlock<T>;
    const int64_t n = std::min(width - c, kBlock<T>), valid = std::min(out_channels - c, n);
    T* target = panel + g * rows * width + c * rows;
    const T* source =
        weight.data + g * shape.out_channels / shape.groups * weight.stride[0] + c * out_stride;
    for (const PixelClass& pixel_class : plan.classes)
      for (const Tap& tap : pixel_class.taps) {
        const T* w = source + tap.kernel_y * weight.stride[2] + tap.kernel_x * weight.stride[3];
        for (int64_t i = 0; i < in_channels; ++i, w += in_stride, target += n) {
          for (int64_t o = 0; o < valid; ++o) target[o] = w[o * out_stride];
          for (int64_t o = valid; o < n; ++o) target[o] = 0;
        }
      }
  });
  return panel;
}

template <class T>
const T* last_element(const Tensor4<const T>& t, const int64_t (&size)[4]) {
  const T* p = t.data;
  for (int d = 0; d < 4; ++d) p += (size[d] - 1) * t.stride[d];
  return p;
}

// Packs rows [row_begin, row_end) of the channels from `channel` on into
// [row][stream][column][pitch], with zeros where a row or column lies outside of the height x width
// image.
template <class T, class Prologue>
void pack_rows(const Prologue& prologue, const std::array<Tensor4<const T>, kMaxSources>& sources,
               int64_t batch, int64_t all_channels, int64_t image, int64_t channel,
               int64_t channels, int64_t height, int64_t width, int64_t row_begin, int64_t row_end,
               int64_t column_begin, int64_t columns, int64_t pitch, T* out) {
  constexpr int S = Prologue::STREAMS;
  const int64_t stream_stride = columns * pitch;
  for (int64_t y = row_begin; y < row_end; ++y, out += S * stream_stride) {
    if (y < 0 || y >= height) {
      std::fill_n(out, S * stream_stride, T{0});
      continue;
    }
    const int64_t left = -column_begin * pitch, right = left + width * pitch;
    for (int s = 0; s < S; ++s) {
      std::fill_n(out + s * stream_stride, left, T{0});
      std::fill_n(out + s * stream_stride + right, stream_stride - right, T{0});
    }
    Plane<T> planes[Prologue::SOURCES];
    for (int k = 0; k < Prologue::SOURCES; ++k) {
      const Tensor4<const T>& t = sources[k];
      planes[k] = {t.data + image * t.stride[0] + channel * t.stride[1] + y * t.stride[2],
                   t.stride[1], t.stride[3],
                   last_element(t, {batch, all_channels, height, width}) + 1};
    }
    pack(prologue, planes, channels, width, pitch, stream_stride, out + left);
  }
}

// Convolves every strip of every image: prologue, tiles, epilogue. Returns the width that the
// epilogue sums up.
template <class T, class Prologue, class MakeEpilogue>
double convolve(const Shape& shape, int threads, const Plan& plan, const T* panel,
                const Prologue& prologue, const std::array<Tensor4<const T>, kMaxSources>& sources,
                int64_t source_height, int64_t source_width, const MakeEpilogue& epilogue,
                int64_t out_channels, int64_t height, int64_t width,
                const std::array<T*, 3>& outputs) {
  constexpr int S = Prologue::STREAMS;
  const int64_t groups = shape.groups, strips = static_cast<int64_t>(plan.strips.size());
  const int64_t rows = shape.kernel_height * shape.kernel_width * plan.channels;
  const int64_t panel_width = round_up(out_channels, kLanes<T>);
  const int64_t items = shape.batch * groups * strips;
  double* widths = scratch<double>(Slot::kWidth, items);
  parallel_for(threads, items, [&](int64_t item) {
    const Strip& strip = plan.strips[item % strips];
    const int64_t g = item / strips % groups, image = item / strips / groups;
    T* source = scratch<T>(Slot::kSource, S * plan.max_source_rows * plan.columns * plan.channels);
    T* product = scratch<T>(Slot::kProduct, round_up(plan.max_pixels, kLanes<T>) * S * kBlock<T>);
    pack_rows(prologue, sources, shape.batch, groups * plan.channels, image, g * plan.channels,
              plan.channels, source_height, source_width, strip.source_begin, strip.source_end,
              plan.column_begin, plan.columns, plan.channels, source);
    double sum = 0;
    for_blocks<T>(out_channels, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const T* weights = panel + g * rows * panel_width + c * rows;
      for (int64_t t = strip.tile_begin; t < strip.tile_end; ++t) {
        const Tile& tile = plan.tiles[t];
        multiply_tile<T, S, V>(source, &plan.pixels[tile.first_pixel], plan.columns * plan.channels,
                               plan.runs.data() + tile.first_run, tile.run_count, weights,
                               &plan.targets[tile.first_pixel], tile.accumulate, false, product);
      }
      const int64_t channel = g * out_channels + c, all = groups * out_channels;
      const int64_t pixel = shape.channels_last ? all : 1;
      Target<T> target{{}, shape.channels_last ? 1 : height * width, pixel};
      for (int s = 0; s < S; ++s)
        target.data[s] = outputs[s] + image * all * height * width + strip.begin * width * pixel;
      sum += unpack<T>(epilogue, product, V * kLanes<T>, channel,
                       std::min(out_channels - c, int64_t{V * kLanes<T>}),
                       (strip.end - strip.begin) * width, target);
    });
    widths[item] = sum;
  });
  double total = 0;
  for (int64_t i = 0; i < items; ++i) total += widths[i];
  return total;
}

template <class T, int S>
void forward(const Conv2dForward<T>& op) {
  const Shape& s = op.shape;
  const int64_t out_channels = s.out_channels / s.groups;
  const Plan plan = make_plan<S>(forward_classes(s), s.in_channels / s.groups, s.out_height,
                                 s.out_width, s.in_height, s.in_width);
  const T* panel = pack_weights(s, op.weight, plan, out_channels, false, op.threads);
  T* bias = scratch<T>(Slot::kBias, s.out_channels + kLanes<T>);
  std::fill_n(bias, s.out_channels + kLanes<T>, T{0});
  if (op.bias) std::copy_n(op.bias, s.out_channels, bias);
  *op.width = static_cast<T>(convolve<T>(
      s, op.threads, plan, panel, CenterRadius<T, S>{}, {op.lower, op.upper, op.nominal},
      s.in_height, s.in_width, Bounds<T, S>{bias}, out_channels, s.out_height, s.out_width,
      {op.lower_out, op.upper_out, op.nominal_out}));
}

template <class T, class Prologue>
void input_gradient(const Conv2dBackward<T>& op, const Prologue& prologue,
                    const std::array<Tensor4<const T>, kMaxSources>& gradients) {
  constexpr int S = Prologue::STREAMS;
  const Shape& s = op.shape;
  const int64_t in_channels = s.in_channels / s.groups;
  const Plan plan = make_plan<S>(input_gradient_classes(s), s.out_channels / s.groups, s.in_height,
                                 s.in_width, s.out_height, s.out_width);
  const T* panel = pack_weights(s, op.weight, plan, in_channels, true, op.threads);
  convolve<T>(s, op.threads, plan, panel, prologue, gradients, s.out_height, s.out_width,
              InputGradient<T, S>{}, in_channels, s.in_height, s.in_width,
              {op.grad_lower_in, op.grad_upper_in, op.grad_nominal_in});
}

// Pixels of one pass of the outer tiles: what they read of both operands stays in the first-level
// cache.
constexpr int64_t kOuterPixels = 64;

// Each of as many parts as threads sums its images' strips into its own [row, channel] sums, row =
// (tap, input channel); the sums of the parts are then added in their order.
template <class T, class Prologue>
void weight_gradient(const Conv2dBackward<T>& op, const Prologue& prologue,
                     const std::array<Tensor4<const T>, kMaxSources>& gradients) {
  constexpr int S = Prologue::STREAMS, R = kTileRows;
  const Shape& s = op.shape;
  const int64_t groups = s.groups, in_channels = s.in_channels / groups,
                out_channels = s.out_channels / groups;
  const int64_t taps = s.kernel_height * s.kernel_width, rows = taps * in_channels,
                sum_rows = round_up(rows, R);
  const int64_t width = round_up(out_channels, kLanes<T>), sum_size = groups * width * sum_rows;
  const int64_t strip_height = strip_rows(s.out_height, s.out_width),
                strips = ceil_div(s.out_height, strip_height);
  const int64_t columns =
      (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1;
  const int64_t all_columns = std::max(columns, s.in_width + s.padding_width);
  const int64_t pitch = spread_pitch<T>(in_channels), row_stride = S * all_columns * pitch;
  const int64_t source_rows =
      (strip_height - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1;
  const int64_t items = s.batch * strips;
  const int parts = items > 1 ? op.threads : 1;

  std::vector<int64_t> offsets(static_cast<size_t>(sum_rows));
  for (int64_t i = 0; i < sum_rows; ++i) {
    const int64_t row = std::min(i, rows - 1), tap = row / in_channels, ky = tap / s.kernel_width,
                  kx = tap % s.kernel_width;
    offsets[i] =
        ky * s.dilation_height * row_stride + kx * s.dilation_width * pitch + row % in_channels;
  }
  T* signed_sums = scratch<T>(Slot::kSumA, parts * sum_size);
  T* absolute_sums = scratch<T>(Slot::kSumB, parts * sum_size);
  double* bias_sums = scratch<double>(Slot::kWidth, parts * s.out_channels);
  parallel(parts, [&](int index, int) {
    T* signed_sum = signed_sums + index * sum_size;
    T* absolute_sum = absolute_sums + index * sum_size;
    double* bias_sum = bias_sums + index * s.out_channels;
    std::fill_n(signed_sum, sum_size, T{0});
    std::fill_n(absolute_sum, sum_size, T{0});
    std::fill_n(bias_sum, s.out_channels, 0.0);
    T* source = scratch<T>(Slot::kSource, source_rows * row_stride);
    T* gradient = scratch<T>(Slot::kGradient, strip_height * S * s.out_width * kBlock<T>);
    const int64_t tile_height = std::max<int64_t>(1, kOuterPixels / s.out_width);
    const Part part(items, index, parts);
    for (int64_t item = part.begin; item < part.end; ++item) {
      const int64_t image = item / strips, y = item % strips * strip_height,
                    y_end = std::min(s.out_height, y + strip_height);
      const int64_t source_begin = y * s.stride_height - s.padding_height;
      const int64_t source_end = source_begin + (y_end - y - 1) * s.stride_height +
                                 (s.kernel_height - 1) * s.dilation_height + 1;
      for (int64_t g = 0; g < groups; ++g) {
        pack_rows(CenterRadius<T, S>{}, {op.lower, op.upper, op.nominal}, s.batch, s.in_channels,
                  image, g * in_channels, in_channels, s.in_height, s.in_width, source_begin,
                  source_end, -s.padding_width, all_columns, pitch, source);
        for_blocks<T>(out_channels, [&](int64_t c, auto vectors) {
          constexpr int V = decltype(vectors)::value;
          constexpr int64_t N = V * kLanes<T>;
          const int64_t channel = g * out_channels + c, channels = std::min(out_channels - c, N),
                        gradient_stride = S * s.out_width * N;
          pack_rows(prologue, gradients, s.batch, s.out_channels, image, channel, channels,
                    s.out_height, s.out_width, y, y_end, 0, s.out_width, N, gradient);
          T* const signed_block = signed_sum + (g * width + c) * sum_rows;
          T* const absolute_block = absolute_sum + (g * width + c) * sum_rows;
          for (int64_t line = 0; line < y_end - y; line += tile_height) {
            const Operand<T> vector{gradient + line * gradient_stride, gradient_stride, N,
                                    s.out_width * N};
            const Operand<T> scalar{source + line * s.stride_height * row_stride,
                                    s.stride_height * row_stride, s.stride_width * pitch,
                                    all_columns * pitch};
            const int64_t lines = std::min(tile_height, y_end - y - line);
            for (int64_t row = 0; row < rows; row += R) {
              outer_tile<T, 0, S, V>(vector, scalar, &offsets[row], lines, s.out_width,
                                     signed_block + row * N);
              outer_tile<T, 1, S, V>(vector, scalar, &offsets[row], lines, s.out_width,
                                     absolute_block + row * N);
            }
          }
          for (int64_t line = 0; line < y_end - y; ++line)
            for (int stream = 0; stream < S; stream += 2) {
              const T* p = gradient + line * gradient_stride + stream * s.out_width * N;
              for (int64_t x = 0; x < s.out_width; ++x, p += N)
                for (int64_t o = 0; o < channels; ++o)
                  bias_sum[channel + o] += static_cast<double>(p[o]);
            }
        });
      }
    }
  });
  parallel_for(op.threads, s.out_channels, [&](int64_t o) {
    const int64_t in_group = o % out_channels, block = in_group / kBlock<T> * kBlock<T>;
    const int64_t block_width = std::min(kBlock<T>, width - block);
    const int64_t base = (o / out_channels * width + block) * sum_rows + in_group - block;
    const T* w = op.weight.data + o * op.weight.stride[0];
    T* target = op.grad_weight + o * rows;
    for (int64_t c = 0; c < in_channels; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        T plus = 0, magnitude = 0;
        for (int part = 0; part < parts; ++part) {
          const int64_t at = part * sum_size + base + (tap * in_channels + c) * block_width;
          plus += signed_sums[at];
          magnitude += absolute_sums[at];
        }
        const T value = w[c * op.weight.stride[1] + tap / s.kernel_width * op.weight.stride[2] +
                          tap % s.kernel_width * op.weight.stride[3]];
        *target++ = plus + sign(value) * magnitude;
      }
  });
  if (op.grad_bias)
    for (int64_t o = 0; o < s.out_channels; ++o) {
      double sum = 0;
      for (int part = 0; part < parts; ++part) sum += bias_sums[part * s.out_channels + o];
      op.grad_bias[o] = static_cast<T>(sum);
    }
}

template <class T, int S, bool WIDTH>
void backward(const Conv2dBackward<T>& op) {
  const OutputGradient<T, S, WIDTH> prologue{op.grad_width};
  std::array<Tensor4<const T>, kMaxSources> gradients{op.grad_lower, op.grad_upper};
  if (S == 3) gradients[2] = op.grad_nominal;
  if (WIDTH) {
    gradients[S] = op.lower_out;
    gradients[S + 1] = op.upper_out;
  }
  if (op.grad_lower_in) input_gradient(op, prologue, gradients);
  if (op.grad_weight) weight_gradient(op, prologue, gradients);
}

}  // namespace

template <class T>
void conv2d_forward(const Conv2dForward<T>& op) {
  op.nominal.data ? forward<T, 3>(op) : forward<T, 2>(op);
}

template <class T>
void conv2d_backward(const Conv2dBackward<T>& op) {
  if (op.nominal.data)
    op.lower_out.data ? backward<T, 3, true>(op) : backward<T, 3, false>(op);
  else
    op.lower_out.data ? backward<T, 2, true>(op) : backward<T, 2, false>(op);
}

template void conv2d_forward(const Conv2dForward<float>&);
template void conv2d_forward(const Conv2dForward<double>&);
template void conv2d_backward(const Conv2dBackward<float>&);
template void conv2d_backward(const Conv2dBackward<double>&);

}  // namespace cibp
