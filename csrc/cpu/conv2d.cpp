// Direct convolutions over packed streams.
//
// A strip of rows of one image and group is packed channels last, [row][stream][column][channel],
// with its zero padding. A Plan lists, for every tile of pixels, which runs of products it needs;
// the forward pass and the input gradient differ only in their plans: the latter has one class of
// pixels for each residue modulo the stride.
#include "conv2d.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "streams.h"
#include "tile.h"

namespace cibp {
namespace {

// A kernel tap: it multiplies the source at the pixel's base plus (y, x) by the panel's rows from
// tap * channels on.
struct Tap {
  int64_t y, x;
  int64_t kernel_y, kernel_x;
};

// Pixels of an output image that use the same taps: (first + i * step) in each direction, with the
// source base (base + i * base_step).
struct PixelClass {
  struct Axis {
    int64_t first, step, base, base_step;
  } y, x;
  std::vector<Tap> taps;  // in the order of their rows in the panel
  int64_t first_row = 0;  // of the panel, in taps
};

// A strip of output rows, and the source rows it reads (those outside of the image are zero).
struct Strip {
  int64_t begin, end;
  int64_t source_begin, source_end;
  int64_t tile_begin, tile_end;
};

struct Tile {
  int64_t first_pixel;  // index into pixels and targets
  int64_t first_run, run_count;
  bool accumulate;
};

struct Plan {
  int64_t channels;               // of the source
  int64_t column_begin, columns;  // of the packed source; column_begin <= 0 is the left padding
  int64_t max_source_rows, max_pixels;  // of a strip
  std::vector<PixelClass> classes;
  std::vector<Strip> strips;
  std::vector<Tile> tiles;
  std::vector<int64_t> pixels,
      targets;  // source offset from the strip's first row; output pixel in the strip
  std::vector<Run> runs;
};

// Output rows of a strip: enough pixels to use the weights well, few enough for their streams to
// stay in cache.
constexpr int64_t kStripPixels = 256;

int64_t strip_rows(int64_t height, int64_t width) {
  const int64_t strips =
      std::max<int64_t>(1, ceil_div(height, std::max<int64_t>(1, kStripPixels / width)));
  return ceil_div(height, strips);
}

// Rows of the weight panel that a tile uses at once.
constexpr int64_t kPanelRows = 256;

template <int STREAMS>
void add_tiles(Plan& plan, Strip& strip, const PixelClass& pixel_class, int64_t width,
               int64_t source_height, int64_t source_width) {
  constexpr int P = kTilePixels<STREAMS>;
  struct Pixel {
    int64_t target, y, x;
  };
  std::vector<Pixel> pixels;
  for (int64_t i = 0;; ++i) {
    const int64_t y = pixel_class.y.first + i * pixel_class.y.step;
    if (y >= strip.end) break;
    if (y < strip.begin) continue;
    for (int64_t j = 0;; ++j) {
      const int64_t x = pixel_class.x.first + j * pixel_class.x.step;
      if (x >= width) break;
      pixels.push_back({(y - strip.begin) * width + x,
                        pixel_class.y.base + i * pixel_class.y.base_step,
                        pixel_class.x.base + j * pixel_class.x.base_step});
    }
  }
  const int64_t row_stride = STREAMS * plan.columns * plan.channels;
  const int64_t first_pixel = static_cast<int64_t>(plan.pixels.size());
  for (size_t i = 0; i < (pixels.size() + P - 1) / P * P;
       ++i) {  // the last tile repeats the last pixel
    const Pixel& pixel = pixels[std::min(i, pixels.size() - 1)];
    plan.targets.push_back(pixel.target);
    plan.pixels.push_back((pixel.y - strip.source_begin) * row_stride +
                          (pixel.x - plan.column_begin) * plan.channels);
  }
  // All tiles use some taps before any uses the next: the weights of those stay in the first-level
  // cache.
  const size_t taps_at_once = std::max<int64_t>(1, kPanelRows / plan.channels);
  for (size_t k0 = 0; k0 < std::max<size_t>(1, pixel_class.taps.size()); k0 += taps_at_once)
    for (size_t first = 0; first < pixels.size(); first += P) {
      Tile tile{first_pixel + static_cast<int64_t>(first), static_cast<int64_t>(plan.runs.size()),
                0, k0 > 0};
      const size_t last = std::min(pixels.size(), first + P);
      // Taps that read only padding, for every pixel of the tile, are left out. (A weight that is
      // not finite makes a border pixel NaN, 0 x inf, only where its tile uses the tap.)
      for (size_t k = k0; k < std::min(pixel_class.taps.size(), k0 + taps_at_once); ++k) {
        const Tap& tap = pixel_class.taps[k];
        const bool used =
            std::any_of(pixels.begin() + first, pixels.begin() + last, [&](const Pixel& pixel) {
              const int64_t y = pixel.y + tap.y, x = pixel.x + tap.x;
              return y >= 0 && y < source_height && x >= 0 && x < source_width;
            });
        if (!used) continue;
        const Run run{tap.y * row_stride + tap.x * plan.channels,
                      (pixel_class.first_row + static_cast<int64_t>(k)) * plan.channels,
                      plan.channels};
        if (tile.run_count > 0) {
          Run& previous = plan.runs.back();
          if (previous.source + previous.length == run.source &&
              previous.row + previous.length == run.row) {
            previous.length += run.length;
            continue;
          }
        }
        plan.runs.push_back(run);
        ++tile.run_count;
      }
      if (tile.run_count > 0 || !tile.accumulate) plan.tiles.push_back(tile);
    }
}

// A plan for an output image of height x width from a source image of source_height x source_width.
template <int STREAMS>
Plan make_plan(std::vector<PixelClass> classes, int64_t channels, int64_t height, int64_t width,
               int64_t source_height, int64_t source_width) {
  Plan plan{};
  plan.channels = channels;
  // The rows and columns that any pixel of a range reads, used or not.
  const auto reach = [&](auto axis, auto tap_axis, int64_t begin, int64_t end) {
    int64_t low = 0, high = 0;
    bool any = false;
    for (const PixelClass& pixel_class : classes) {
      const PixelClass::Axis& a = pixel_class.*axis;
      const int64_t i0 = begin > a.first ? ceil_div(begin - a.first, a.step) : 0;
      if (a.first + i0 * a.step >= end) continue;
      const int64_t i1 = (end - 1 - a.first) / a.step;
      for (const Tap& tap : pixel_class.taps) {
        const int64_t from = a.base + i0 * a.base_step + tap.*tap_axis,
                      to = a.base + i1 * a.base_step + tap.*tap_axis + 1;
        low = any ? std::min(low, from) : from;
        high = any ? std::max(high, to) : to;
        any = true;
      }
    }
    return std::pair<int64_t, int64_t>(low, high);
  };
  const auto [column_begin, column_end] = reach(&PixelClass::x, &Tap::x, int64_t{0}, width);
  plan.column_begin = std::min<int64_t>(column_begin, 0);
  plan.columns = std::max(column_end, source_width) - plan.column_begin;
  const int64_t rows = strip_rows(height, width);
  for (int64_t y = 0; y < height; y += rows) {
    Strip strip{};
    strip.begin = y;
    strip.end = std::min(height, y + rows);
    std::tie(strip.source_begin, strip.source_end) =
        reach(&PixelClass::y, &Tap::y, strip.begin, strip.end);
    strip.tile_begin = static_cast<int64_t>(plan.tiles.size());
    for (const PixelClass& pixel_class : classes)
      add_tiles<STREAMS>(plan, strip, pixel_class, width, source_height, source_width);
    strip.tile_end = static_cast<int64_t>(plan.tiles.size());
    plan.max_source_rows = std::max(plan.max_source_rows, strip.source_end - strip.source_begin);
    plan.max_pixels = std::max(plan.max_pixels, (strip.end - strip.begin) * width);
    plan.strips.push_back(strip);
  }
  plan.classes = std::move(classes);
  return plan;
}

std::vector<PixelClass> forward_classes(const Conv2dShape& s) {
  PixelClass pixel_class;
  pixel_class.y = {0, 1, -s.padding_height, s.stride_height};
  pixel_class.x = {0, 1, -s.padding_width, s.stride_width};
  for (int64_t ky = 0; ky < s.kernel_height; ++ky)
    for (int64_t kx = 0; kx < s.kernel_width; ++kx)
      pixel_class.taps.push_back({ky * s.dilation_height, kx * s.dilation_width, ky, kx});
  return {pixel_class};
}

// Input pixel y takes output row (y + padding - dilation ky) / stride for each ky where that is
// whole.
std::vector<PixelClass> input_gradient_classes(const Conv2dShape& s) {
  std::vector<PixelClass> classes;
  int64_t row = 0;
  for (int64_t py = 0; py < s.stride_height; ++py)
    for (int64_t px = 0; px < s.stride_width; ++px) {
      const auto axis = [](int64_t residue, int64_t stride, int64_t padding) {
        const int64_t first =
            ((residue - padding) % stride + stride) % stride;  // least y >= 0 of this residue
        return PixelClass::Axis{first, stride, (first + padding - residue) / stride, 1};
      };
      PixelClass pixel_class;
      pixel_class.y = axis(py, s.stride_height, s.padding_height);
      pixel_class.x = axis(px, s.stride_width, s.padding_width);
      for (int64_t ky = s.kernel_height - 1; ky >= 0; --ky)  // so that the source offsets grow
        for (int64_t kx = s.kernel_width - 1; kx >= 0; --kx) {
          const int64_t y = py - s.dilation_height * ky, x = px - s.dilation_width * kx;
          if (y % s.stride_height == 0 && x % s.stride_width == 0)
            pixel_class.taps.push_back({y / s.stride_height, x / s.stride_width, ky, kx});
        }
      pixel_class.first_row = row;
      row += static_cast<int64_t>(pixel_class.taps.size());
      classes.push_back(std::move(pixel_class));
    }
  return classes;
}

// The weight panel: for each group, block of output channels, tap and input channel a vector block
// of weights. What is input and output is as the plan sees it: the input gradient has them
// exchanged.
template <class T>
T* pack_weights(const Conv2dShape& shape, const Tensor4<const T>& weight, const Plan& plan,
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
double convolve(const Conv2dShape& shape, int threads, const Plan& plan, const T* panel,
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
                               &plan.targets[tile.first_pixel], tile.accumulate, product);
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
  const Conv2dShape& s = op.shape;
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
  const Conv2dShape& s = op.shape;
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

// Each thread sums its images' strips into its own [row, channel] sums, row = (tap, input channel);
// the sums of the threads are then added in their order.
template <class T, class Prologue>
void weight_gradient(const Conv2dBackward<T>& op, const Prologue& prologue,
                     const std::array<Tensor4<const T>, kMaxSources>& gradients) {
  constexpr int S = Prologue::STREAMS, R = kTileRows;
  const Conv2dShape& s = op.shape;
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
  const int threads = items > 1 ? op.threads : 1;

  std::vector<int64_t> offsets(static_cast<size_t>(sum_rows));
  for (int64_t i = 0; i < sum_rows; ++i) {
    const int64_t row = std::min(i, rows - 1), tap = row / in_channels, ky = tap / s.kernel_width,
                  kx = tap % s.kernel_width;
    offsets[i] =
        ky * s.dilation_height * row_stride + kx * s.dilation_width * pitch + row % in_channels;
  }
  T* signed_sums = scratch<T>(Slot::kSumA, threads * sum_size);
  T* absolute_sums = scratch<T>(Slot::kSumB, threads * sum_size);
  double* bias_sums = scratch<double>(Slot::kWidth, threads * s.out_channels);
  int team = 1;
  parallel(threads, [&](int thread, int actual) {
    if (thread == 0) team = actual;
    T* signed_sum = signed_sums + thread * sum_size;
    T* absolute_sum = absolute_sums + thread * sum_size;
    double* bias_sum = bias_sums + thread * s.out_channels;
    std::fill_n(signed_sum, sum_size, T{0});
    std::fill_n(absolute_sum, sum_size, T{0});
    std::fill_n(bias_sum, s.out_channels, 0.0);
    T* source = scratch<T>(Slot::kSource, source_rows * row_stride);
    T* gradient = scratch<T>(Slot::kGradient, strip_height * S * s.out_width * kBlock<T>);
    const int64_t tile_height = std::max<int64_t>(1, kOuterPixels / s.out_width);
    const Part part(items, thread, actual);
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
        for (int thread = 0; thread < team; ++thread) {
          const int64_t at = thread * sum_size + base + (tap * in_channels + c) * block_width;
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
      for (int thread = 0; thread < team; ++thread) sum += bias_sums[thread * s.out_channels + o];
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
