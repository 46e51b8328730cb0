// Interval convolution of few input channels (an image's 1 or 3), directly in float32: with so few
// products per output, the tensor cores would not be busy.
//
// A block stages the streams of its tile's input in shared memory, [stream][channel][row][column],
// zeros around the image included. Product k = (channel, kernel row, kernel column) of an output
// then lies at its own place plus offset(k), whatever stride and dilation are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "precision.h"
#include "shape.h"

namespace cibp::cuda {

// The outputs of a block, and the input that they need.
struct FirstTile {
  int rows, columns, in_rows, in_columns;
  int down, across;  // tiles of an image

  CIBP_HOST_DEVICE int per_image() const { return down * across; }
  // Shared memory of the staged input, in elements: a multiple of 4.
  CIBP_HOST_DEVICE int staged(int channels, int streams) const {
    return (streams * channels * in_rows * in_columns + 3) / 4 * 4;
  }
};

constexpr int kMaxStaged = 6144;  // 24 KB: with the rest, it stays below the 48 KB of any GPU

// Tiles of at most `pixels` outputs, the fewest of them, and then the least to be staged.
inline FirstTile first_conv2d_tile(const ConvShape& s, int streams, int pixels) {
  const auto make = [&](int rows, int columns) -> FirstTile {
    return {rows,
            columns,
            (rows - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1,
            (columns - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1,
            static_cast<int>(ceil_div(s.out_height, rows)),
            static_cast<int>(ceil_div(s.out_width, columns))};
  };
  const auto fits = [&](const FirstTile& tile) {
    return static_cast<int64_t>(streams) * s.in_channels * tile.in_rows * tile.in_columns <=
           kMaxStaged;
  };
  FirstTile best = make(1, 1);
  if (!fits(best))
    throw std::invalid_argument("first_conv2d: an output reads " + std::to_string(best.in_rows) +
                                " x " + std::to_string(best.in_columns) + " inputs of " +
                                std::to_string(s.in_channels) + " channels; at most " +
                                std::to_string(kMaxStaged / streams) + " inputs are supported");
  for (int rows = 1; rows <= std::min(pixels, s.out_height); ++rows) {
    int columns = std::min(pixels / rows, s.out_width);
    while (columns > 1 && !fits(make(rows, columns))) --columns;
    const FirstTile tile = make(rows, columns);
    if (!fits(tile)) break;
    const auto cost = [&](const FirstTile& t) {
      return std::pair(t.per_image(), t.staged(s.in_channels, streams));
    };
    if (cost(tile) < cost(best)) best = tile;
  }
  return best;
}

template <int STREAMS>
struct FirstStage {
  const ConvShape& shape;
  const FirstTile& tile;

  CIBP_DEVICE int plane() const { return shape.in_channels * tile.in_rows * tile.in_columns; }

  // The input of tile (row, column) of image n, by all threads.
  template <class T>
  CIBP_DEVICE void load(const T* in, int n, int row, int column, int thread, int threads,
                        float* staged) const {
    const int top = row * tile.rows * shape.stride_height - shape.padding_height;
    const int left = column * tile.columns * shape.stride_width - shape.padding_width;
    const int area = tile.in_rows * tile.in_columns, size = plane();
    for (int i = thread; i < size; i += threads) {
      const int c = i / area, y = i % area / tile.in_columns, x = i % tile.in_columns;
      const bool inside =
          top + y >= 0 && top + y < shape.in_height && left + x >= 0 && left + x < shape.in_width;
      const int64_t place = inside ? shape.in_place(n, top + y, left + x, c) : 0;
      CIBP_UNROLL
      for (int s = 0; s < STREAMS; ++s)
        staged[s * size + i] = inside ? to_float(in[s * shape.inputs() + place]) : 0.0f;
    }
  }

  // Of product k, in a plane.
  CIBP_DEVICE int offset(int k) const {
    const int taps = shape.kernel_height * shape.kernel_width, tap = k % taps;
    const int y = k / taps * tile.in_rows + tap / shape.kernel_width * shape.dilation_height;
    return y * tile.in_columns + tap % shape.kernel_width * shape.dilation_width;
  }

  // Of the output (row, column) of the tile, in a plane.
  CIBP_DEVICE int place(int row, int column) const {
    return row * shape.stride_height * tile.in_columns + column * shape.stride_width;
  }
};

// Streams of the output, [STREAMS, N, H', W', K] contiguous. A thread computes kPixels outputs of
// kChannels channels.
template <int STREAMS, class T>
struct FirstConv2dForward {
  static constexpr int kThreads = 128, kMinBlocks = 4, kChannels = 8, kPixels = 2;
  static constexpr int kProducts = 32;  // whose weights are in shared memory at a time

  ConvShape shape;
  FirstTile tile;
  int groups;           // threads side by side along the channels: a power of 2
  const T* in;          // [STREAMS, N, H, W, C], contiguous
  const float* weight;  // [K, C, R, S]
  const float* bias;    // [K], or null
  bool relu;
  int dropped;  // bits, in rounding what is stored
  bool packed;  // whether kChannels channels may be stored at once

  // outputs
  T* out;
  float* width;  // [channel blocks * tiles] sums of 4 radius^2, or null

  static FirstConv2dForward make(const ConvShape& shape, const T* in, const float* weight,
                                 const float* bias, bool relu, int dropped,
                                 // outputs
                                 T* out, float* width) {
    const int groups = power_of_2(ceil_div(shape.out_channels, kChannels), 8);
    const FirstTile tile = first_conv2d_tile(shape, STREAMS, kPixels * kThreads / groups);
    const bool packed = shape.out_channels % kChannels == 0 && aligned(out);
    return {shape, tile, groups, in, weight, bias, relu, dropped, packed, out, width};
  }
  Grid grid() const {
    return {static_cast<int64_t>(shape.batch) * tile.per_image(),
            ceil_div(shape.out_channels, groups * kChannels), 1};
  }
  CIBP_HOST_DEVICE int pitch() const { return groups * kChannels + 4; }  // of a product's weights
  int shared_floats() const {
    return std::max(kThreads, tile.staged(shape.in_channels, STREAMS) + kProducts * (pitch() + 1));
  }

  struct Sums {
    float value[kPixels][3][kChannels];
    int place[kPixels];
  };

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float* shared) const {
    const FirstStage<STREAMS> stage{shape, tile};
    const int n = block.x / tile.per_image(), index = block.x % tile.per_image();
    const int tile_row = index / tile.across, tile_column = index % tile.across;
    const int slots = kThreads / groups;
    const int first_channel = block.y * groups * kChannels, products = shape.products();
    const int plane = stage.plane();
    float* const weights = shared + tile.staged(shape.in_channels, STREAMS);
    int* const offsets = reinterpret_cast<int*>(weights + kProducts * pitch());
    typename Block::template PerThread<Sums> sums;

    block.each([&](int thread) {
      stage.load(in, n, tile_row, tile_column, thread, kThreads, shared);
      Sums& sum = sums[thread];
      CIBP_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int pixel = thread / groups + p * slots;
        // one of no output adds up those of the first, and stores nothing
        const bool any = pixel < tile.rows * tile.columns;
        sum.place[p] = any ? stage.place(pixel / tile.columns, pixel % tile.columns) : 0;
        CIBP_UNROLL
        for (int s = 0; s < STREAMS; ++s) {
          CIBP_UNROLL
          for (int c = 0; c < kChannels; ++c) sum.value[p][s][c] = 0.0f;
        }
      }
    });

    for (int begin = 0; begin < products; begin += kProducts) {
      const int count = products - begin < kProducts ? products - begin : kProducts;
      block.each([&](int thread) {
        for (int i = thread; i < count * groups * kChannels; i += kThreads) {
          const int k = i % count, c = i / count, channel = first_channel + c;
          const bool any = channel < shape.out_channels;
          weights[k * pitch() + c] =
              any ? weight[static_cast<int64_t>(channel) * products + begin + k] : 0.0f;
        }
        if (thread < count) offsets[thread] = stage.offset(begin + thread);
      });
      block.each([&](int thread) {
        Sums& sum = sums[thread];
        const float* w = weights + thread % groups * kChannels;
        for (int k = 0; k < count; ++k, w += pitch()) {
          const Pack<float, 4> low = load_pack<4>(w), high = load_pack<4>(w + 4);
          const float* staged = shared + offsets[k];
          float x[kPixels][STREAMS];
          CIBP_UNROLL
          for (int p = 0; p < kPixels; ++p) {
            CIBP_UNROLL
            for (int s = 0; s < STREAMS; ++s) x[p][s] = staged[s * plane + sum.place[p]];
          }
          CIBP_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            const float value = c < 4 ? low.value[c] : high.value[c - 4];
            const float magnitude = fabsf(value);
            CIBP_UNROLL
            for (int p = 0; p < kPixels; ++p) {
              sum.value[p][0][c] += value * x[p][0];
              sum.value[p][1][c] += magnitude * x[p][1];
              if constexpr (STREAMS == 3) sum.value[p][2][c] += value * x[p][2];
            }
          }
        }
      });
    }

    block.each([&](int thread) {
      Sums& sum = sums[thread];
      const int channel = first_channel + thread % groups * kChannels;
      const int channels = shape.out_channels - channel;  // from here on
      float squares = 0.0f;
      CIBP_UNROLL
      for (int p = 0; p < kPixels; ++p) {
        const int pixel = thread / groups + p * slots;
        const int y = tile_row * tile.rows + pixel / tile.columns;
        const int x = tile_column * tile.columns + pixel % tile.columns;
        if (pixel >= tile.rows * tile.columns || y >= shape.out_height || x >= shape.out_width)
          continue;
        Pack<T, kChannels> result[STREAMS];
        CIBP_UNROLL
        for (int c = 0; c < kChannels; ++c) {
          const float b = bias && c < channels ? bias[channel + c] : 0.0f;
          float m = sum.value[p][0][c] + b, r = sum.value[p][1][c];
          if (relu) activate(m, r);
          if (c < channels) squares += 4.0f * r * r;
          round_pair(m, r, dropped);
          result[0].value[c] = stored<T>(m);
          result[1].value[c] = stored<T>(r);
          if constexpr (STREAMS == 3) {
            const float z = sum.value[p][2][c] + b;
            result[2].value[c] = stored<T>(rounded(relu ? positive(z) : z, dropped));
          }
        }
        const int64_t place = shape.out_place(n, y, x, channel);
        CIBP_UNROLL
        for (int s = 0; s < STREAMS; ++s) {
          T* target = out + s * shape.outputs() + place;
          if (packed && channels > 0) {
            store_pack(target, result[s]);
          } else {
            CIBP_UNROLL
            for (int c = 0; c < kChannels; ++c)
              if (c < channels) target[c] = result[s].value[c];
          }
        }
      }
      shared[thread] = squares;  // over the staged input, which nobody reads any more
    });
    if (width)
      sum_block<kThreads>(block, shared, [&](float sum) {
        width[static_cast<int64_t>(block.y) * shape.batch * tile.per_image() + block.x] = sum;
      });
  }
};

// The gradient of weight and bias, of the gradients [STREAMS, N, H', W', K] of center, radius and
// nominal before ReLU. Block x adds up tiles x, x + splits, x + 2 splits, ... and a later kernel
// the blocks. A thread has kProducts products of kChannels channels.
template <int STREAMS, class T>
struct FirstConv2dGradWeight {
  static constexpr int kThreads = 128, kMinBlocks = 4, kChannels = 4, kProducts = 4;
  static constexpr int kPixels = 32;

  ConvShape shape;
  FirstTile tile;
  int groups;  // threads along the channels: a power of 2, at most 16
  int splits;
  const T* in;          // [STREAMS, N, H, W, C], contiguous
  const T* grad;        // [STREAMS, N, H', W', K], contiguous
  bool packed;          // whether kChannels channels may be read at once
  const float* weight;  // [K, C, R, S]

  // outputs
  float* grad_weight;  // [splits, K, R, S, C]
  float* grad_bias;    // [splits, K], or null

  static FirstConv2dGradWeight make(const ConvShape& shape, int splits, const T* in, const T* grad,
                                    const float* weight,
                                    // outputs
                                    float* grad_weight, float* grad_bias) {
    const int groups = power_of_2(ceil_div(shape.out_channels, kChannels), 16);
    const FirstTile tile = first_conv2d_tile(shape, STREAMS, kPixels);
    const bool packed = shape.out_channels % kChannels == 0 && aligned(grad);
    return {shape, tile, groups, splits, in, grad, packed, weight, grad_weight, grad_bias};
  }
  Grid grid() const {
    return {splits, ceil_div(shape.out_channels, groups * kChannels),
            ceil_div(shape.products(), kProducts * kThreads / groups)};
  }
  int shared_floats() const {
    return tile.staged(shape.in_channels, STREAMS) + STREAMS * kPixels * groups * kChannels;
  }

  struct Sums {
    float plus[kProducts][kChannels], magnitude[kProducts][kChannels], bias[kChannels];
    int offset[kProducts];
  };

  template <class Block>
  CIBP_DEVICE void operator()(Block& block, float* shared) const {
    const FirstStage<STREAMS> stage{shape, tile};
    const int lanes = kThreads / groups, pitch = groups * kChannels, plane = stage.plane();
    const int first_channel = block.y * pitch, first_product = block.z * kProducts * lanes;
    const int all_products = shape.products(), tiles = shape.batch * tile.per_image();
    float* const grads = shared + tile.staged(shape.in_channels, STREAMS);
    typename Block::template PerThread<Sums> sums;

    block.each([&](int thread) {
      Sums& sum = sums[thread];
      CIBP_UNROLL
      for (int j = 0; j < kProducts; ++j) {
        const int k = first_product + thread % lanes + j * lanes;
        sum.offset[j] = k < all_products ? stage.offset(k) : 0;
        CIBP_UNROLL
        for (int c = 0; c < kChannels; ++c) sum.plus[j][c] = sum.magnitude[j][c] = 0.0f;
      }
      CIBP_UNROLL
      for (int c = 0; c < kChannels; ++c) sum.bias[c] = 0.0f;
    });

    for (int t = block.x; t < tiles; t += splits) {
      const int n = t / tile.per_image(), index = t % tile.per_image();
      const int tile_row = index / tile.across, tile_column = index % tile.across;
      const int top = tile_row * tile.rows, left = tile_column * tile.columns;
      const int rows = shape.out_height - top < tile.rows ? shape.out_height - top : tile.rows;
      const int columns =
          shape.out_width - left < tile.columns ? shape.out_width - left : tile.columns;
      block.each([&](int thread) {
        stage.load(in, n, tile_row, tile_column, thread, kThreads, shared);
        load_grads(n, top, left, rows, columns, first_channel, thread, grads);
      });
      block.each([&](int thread) {
        Sums& sum = sums[thread];
        const int used = (all_products - first_product + lanes - 1) / lanes;  // of kProducts
        const float* g = grads + thread / lanes * kChannels;
        for (int row = 0; row < rows; ++row)
          for (int column = 0; column < columns; ++column, g += pitch) {
            const float* staged = shared + stage.place(row, column);
            Pack<float, kChannels> grad_of[STREAMS];
            CIBP_UNROLL
            for (int s = 0; s < STREAMS; ++s)
              grad_of[s] = load_pack<kChannels>(g + s * kPixels * pitch);
            CIBP_UNROLL
            for (int c = 0; c < kChannels; ++c) {
              sum.bias[c] += grad_of[0].value[c];
              if constexpr (STREAMS == 3) sum.bias[c] += grad_of[2].value[c];
            }
            CIBP_UNROLL
            for (int j = 0; j < kProducts; ++j) {
              if (j >= used) break;
              const float* x = staged + sum.offset[j];
              CIBP_UNROLL
              for (int c = 0; c < kChannels; ++c) {
                sum.plus[j][c] += grad_of[0].value[c] * x[0];
                sum.magnitude[j][c] += grad_of[1].value[c] * x[plane];
                if constexpr (STREAMS == 3) sum.plus[j][c] += grad_of[2].value[c] * x[2 * plane];
              }
            }
          }
      });
    }

    block.each([&](int thread) {
      Sums& sum = sums[thread];
      const int channel = first_channel + thread / lanes * kChannels;
      const int taps = shape.kernel_height * shape.kernel_width;
      CIBP_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (channel + c >= shape.out_channels) continue;
        const int64_t row = static_cast<int64_t>(block.x) * shape.out_channels + channel + c;
        CIBP_UNROLL
        for (int j = 0; j < kProducts; ++j) {
          const int k = first_product + thread % lanes + j * lanes;
          if (k >= all_products) continue;
          const float w = weight[static_cast<int64_t>(channel + c) * all_products + k];
          const int tap = k % taps * shape.in_channels + k / taps;
          grad_weight[row * all_products + tap] = sum.plus[j][c] + sign(w) * sum.magnitude[j][c];
        }
        if (grad_bias && block.z == 0 && thread % lanes == 0) grad_bias[row] = sum.bias[c];
      }
    });
  }

  // grads[stream][pixel of the tile][channel] of the block, zeros where there is no such channel.
  CIBP_DEVICE void load_grads(int n, int top, int left, int rows, int columns, int first_channel,
                              int thread, float* grads) const {
    for (int i = thread; i < rows * columns * groups; i += kThreads) {
      const int pixel = i / groups, c = i % groups * kChannels, channel = first_channel + c;
      const int y = top + pixel / columns, x = left + pixel % columns;
      const int64_t place = shape.out_place(n, y, x, channel);
      CIBP_UNROLL
      for (int s = 0; s < STREAMS; ++s) {
        const T* source = grad + s * shape.outputs() + place;
        Pack<float, kChannels> values;
        if (packed && channel < shape.out_channels) {
          const Pack<T, kChannels> read = load_pack<kChannels>(source);
          CIBP_UNROLL
          for (int j = 0; j < kChannels; ++j) values.value[j] = to_float(read.value[j]);
        } else {
          CIBP_UNROLL
          for (int j = 0; j < kChannels; ++j)
            values.value[j] = channel + j < shape.out_channels ? to_float(source[j]) : 0.0f;
        }
        store_pack(grads + ((s * kPixels + pixel) * groups) * kChannels + c, values);
      }
    }
  }
};

}  // namespace cibp::cuda
