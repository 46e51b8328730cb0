// Winograd convolution for training: fewer products, more rounding (never for certificates).
//
// A tile of M x M outputs of a K x K kernel, M + K - 1 = 6, takes 36 products for each pair of
// channels instead of M M K K: input tile, kernel and output are taken to and from values at the
// points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, arXiv 1509.09308), in both directions. |W|
// has a transform of its own. A stride of s is s s convolutions of stride 1 (the phases), of every
// s-th pixel and tap, whose transforms are added.
//
// The weight gradient is the convolution of the input tile with the gradient's: the same points,
// M and K exchanged.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../parallel.h"
#include "../tile.h"
#include "../vec.h"
#include "layers.h"

namespace cibp {

constexpr int kPoints = 6;
constexpr int kProducts = kPoints * kPoints;
constexpr int64_t kTiles = 24;           // transformed at a time: more leave the second-level cache
constexpr int64_t kGroupSize = 1 << 17;  // elements of the images that are transformed together

// Elements from one product's values of some tiles to the next product's: all products of a tile
// are written and read together, and must not meet in few cache sets.
template <class T>
constexpr int64_t plane_size(int64_t tiles, int64_t channels) {
  return spread_pitch<T>(tiles * S * channels);
}

// Six input values -> at the six points.
template <class T>
inline void transform_input(Vec<T>* d, int stride) {
  const Vec<T> d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride],
               d4 = d[4 * stride], d5 = d[5 * stride];
  const Vec<T> a = d4 - T(4) * d2, b = d3 - T(4) * d1, c = d4 - d2, e = T(2) * (d3 - d1);
  d[0] = T(4) * d0 - T(5) * d2 + d4;
  d[stride] = a + b;
  d[2 * stride] = a - b;
  d[3 * stride] = c + e;
  d[4 * stride] = c - e;
  d[5 * stride] = T(4) * d1 - T(5) * d3 + d5;
}

// K values of a kernel -> at the six points.
template <class T, int K>
inline void transform_kernel(const Vec<T>* g, int from, Vec<T>* u, int to) {
  Vec<T> even1{}, odd1{}, even2{}, odd2{};
  T power = 1;
  for (int i = 0; i < K; ++i, power *= 2) {
    const Vec<T> value = g[i * from];
    (i % 2 ? odd1 : even1) += value;
    (i % 2 ? odd2 : even2) += power * value;
  }
  u[0] = g[0] * (T(1) / 4);
  u[to] = (even1 + odd1) * (T(-1) / 6);
  u[2 * to] = (even1 - odd1) * (T(-1) / 6);
  u[3 * to] = (even2 + odd2) * (T(1) / 24);
  u[4 * to] = (even2 - odd2) * (T(1) / 24);
  u[5 * to] = g[(K - 1) * from];
}

// The six products -> M outputs.
template <class T, int M>
inline void transform_output(const Vec<T>* x, int from, Vec<T>* y, int to) {
  const Vec<T> sum1 = x[from] + x[2 * from], difference1 = x[from] - x[2 * from],
               sum2 = x[3 * from] + x[4 * from], difference2 = x[3 * from] - x[4 * from];
  y[0] = x[0] + sum1 + sum2;
  T power = 2;
  for (int i = 1; i < M; ++i, power *= 2)
    y[i * to] = i % 2 ? difference1 + power * difference2 : sum1 + power * sum2;
  y[(M - 1) * to] += x[5 * from];
}

template <class T>
inline void transform_input_tile(Vec<T>* d) {  // [6][6] in place
#pragma GCC unroll 6
  for (int i = 0; i < kPoints; ++i) transform_input<T>(d + i, kPoints);
#pragma GCC unroll 6
  for (int i = 0; i < kPoints; ++i) transform_input<T>(d + kPoints * i, 1);
}

template <class T, int K>
inline void transform_kernel_tile(const Vec<T>* g, Vec<T>* u) {  // [K][K] -> [6][6]
  Vec<T> rows[kPoints * K];
#pragma GCC unroll 6
  for (int i = 0; i < K; ++i) transform_kernel<T, K>(g + i, K, rows + i, K);
#pragma GCC unroll 6
  for (int i = 0; i < kPoints; ++i) transform_kernel<T, K>(rows + K * i, 1, u + kPoints * i, 1);
}

template <class T, int M>
inline void transform_gradient_tile(Vec<T>* d) {  // [M][M] -> [6][6], in place
  Vec<T> kernel[M * M];
  std::copy_n(d, M * M, kernel);
  transform_kernel_tile<T, M>(kernel, d);
}

template <class T, int M>
inline void transform_output_tile(const Vec<T>* x, Vec<T>* y) {  // [6][6] -> [M][M]
  Vec<T> rows[M * kPoints];
#pragma GCC unroll 6
  for (int i = 0; i < kPoints; ++i) transform_output<T, M>(x + i, kPoints, rows + i, kPoints);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) transform_output<T, M>(rows + kPoints * i, 1, y + M * i, 1);
}

// The tiles of some images, one image after the other: `step` pixels apart, from (y, x) on.
struct Grid {
  int64_t rows, columns, step, y, x;
  int64_t tiles() const { return rows * columns; }  // of an image
  int64_t image(int64_t tile) const { return tile / tiles(); }
  int64_t top(int64_t tile) const { return tile % tiles() / columns * step + y; }
  int64_t left(int64_t tile) const { return tile % columns * step + x; }
};

// How a convolution is cut.
struct Winograd {
  int64_t stride, taps;  // taps of a phase, in each direction
  int64_t outputs;       // of a tile, in each direction: 7 - taps
  Grid out, in;          // tiles of the output, and of each phase of the input, for its gradient
  int64_t phases() const { return stride * stride; }

  explicit Winograd(const Shape& s)
      : stride(s.stride_height),
        taps(ceil_div(s.kernel_height, s.stride_height)),
        outputs(kPoints + 1 - taps) {
    out = {ceil_div(s.out_height, outputs), ceil_div(s.out_width, outputs), outputs, 0, 0};
    const int64_t y = s.padding_height / stride, x = s.padding_width / stride;
    in = {ceil_div((s.in_height - 1 + s.padding_height) / stride + 1 - y, outputs),
          ceil_div((s.in_width - 1 + s.padding_width) / stride + 1 - x, outputs), outputs, y, x};
  }

  // Examples that give enough tiles to use each transformed weight well, and few enough for their
  // images, of `image_size` elements, to stay near.
  int64_t group(int64_t image_size) const {
    const int64_t enough = (kTiles + out.tiles() / 2) / out.tiles();
    return std::max<int64_t>(1, std::min(enough, kGroupSize / image_size));
  }
};

// Where there is such a convolution, and it should be faster: the operations of the transforms are
// estimated; values that leave the cache between them make each cost about 1.7 direct ones.
inline Passes winograd_passes(const Shape& s) {
  const bool possible = s.kernel_height == s.kernel_width && s.stride_height == s.stride_width &&
                        s.dilation_height == 1 && s.dilation_width == 1 &&
                        ceil_div(s.kernel_height, s.stride_height) >= 2 &&
                        ceil_div(s.kernel_height, s.stride_height) <= 4 && s.stride_height <= 2;
  if (!possible) return {};
  const Winograd w(s);
  const int64_t in = w.phases() * s.in_channels, out = s.out_channels;
  const int64_t direct =
      s.out_height * s.out_width * s.kernel_height * s.kernel_width * s.in_channels * out;
  const auto faster = [&](const Grid& grid, int64_t from, int64_t to) {
    return grid.tiles() * kProducts * (from * to + 5 * from + 4 * to) * 17 / 10 < direct;
  };
  return {faster(w.out, in, out), faster(w.out, in, out), faster(w.in, out, in)};
}

// Images of packed streams, and which of their pixels a phase has: (y, x) * stride + first.
template <class T>
struct Phase {
  const T* data;  // of channel 0 of pixel (0, 0)
  int64_t image_size;
  const Geometry* geometry;
  int64_t height, width;
  int64_t stride, first_y, first_x;
};

// N x N pixels of one stream, from (y, x) of the phase on; zeros outside of the image.
template <class T, int N>
inline void load_tile(const Phase<T>& p, int64_t image, int64_t y, int64_t x, int64_t offset,
                      Vec<T>* tile) {
  const int64_t y0 = y * p.stride + p.first_y, x0 = x * p.stride + p.first_x;
  const int64_t row = p.geometry->row_stride() * p.stride, column = p.geometry->pitch * p.stride;
  const T* corner = p.data + image * p.image_size + y0 * p.geometry->row_stride() +
                    x0 * p.geometry->pitch + offset;
  if (y0 >= 0 && x0 >= 0 && y0 + (N - 1) * p.stride < p.height &&
      x0 + (N - 1) * p.stride < p.width) {
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) tile[N * i + j] = load(corner + i * row + j * column);
    return;
  }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {
      const int64_t yy = y0 + i * p.stride, xx = x0 + j * p.stride;
      const bool inside = yy >= 0 && yy < p.height && xx >= 0 && xx < p.width;
      tile[N * i + j] = inside ? load(corner + i * row + j * column) : Vec<T>{};
    }
}

// The tiles [begin, end) of a grid through `transform` into out[product][tile][stream][pitch], from
// `channel` on.
template <class T, int N, class Transform>
void transform_tiles(const Phase<T>& phase, const Grid& grid, int64_t begin, int64_t end,
                     int64_t channels, int64_t channel, int64_t pitch, const Transform& transform,
                     T* out) {
  const int64_t plane = plane_size<T>(end - begin, pitch);
  for (int64_t t = begin; t < end; ++t)
    for (int k = 0; k < S; ++k)
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        Vec<T> tile[kProducts];
        load_tile<T, N>(phase, grid.image(t), grid.top(t), grid.left(t),
                        k * phase.geometry->stream_stride() + c, tile);
        transform(tile);
        T* target = out + ((t - begin) * S + k) * pitch + channel + c;
#pragma GCC unroll 36
        for (int i = 0; i < kProducts; ++i) store<T>(target + i * plane, tile[i]);
      }
}

// Calls body(begin, end) for equal shares, of about kTiles, of all tiles of some images.
template <class Body>
void for_tiles(const Grid& grid, int64_t images, const Body& body) {
  const int64_t all = images * grid.tiles();
  const int parts = static_cast<int>(std::max<int64_t>(1, (all + kTiles / 2) / kTiles));
  for (int i = 0; i < parts; ++i) {
    const Part part(all, i, parts);
    body(part.begin, part.end);
  }
}
constexpr int64_t kMostTiles = 3 * kTiles / 2;  // of a share

// Sums over the channels, for the tiles t, t + 1, ..: in[tile][stream][k] times signed_panel[k]
// and, of the radius, absolute_panel[k]; out[tile][stream][VECTORS * kLanes].
template <class T, int VECTORS>
[[gnu::noinline]] void multiply_points(const T* in, int64_t tile, int64_t tiles, int64_t depth,
                                       const T* signed_panel, const T* absolute_panel, T* out) {
  constexpr int P = kTilePixels<S>, L = kLanes<T>, N = VECTORS * L;
  Vec<T> acc[S][P][VECTORS];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < P; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) acc[s][t][v] = Vec<T>{};
  const T* x[P];
#pragma GCC unroll 16
  for (int t = 0; t < P; ++t) x[t] = in + std::min(tile + t, tiles - 1) * S * depth;
  for (int64_t k = 0; k < depth; ++k, signed_panel += N, absolute_panel += N) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vec<T> weight[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) {
        Vec<T> loaded = load((half ? absolute_panel : signed_panel) + v * L);
        pin(loaded);
        weight[v] = loaded;
      }
#pragma GCC unroll 16
      for (int s = half; s < S; s += 2)
#pragma GCC unroll 16
        for (int t = 0; t < P; ++t) {
          const Vec<T> value = broadcast(x[t][k + s * depth]);
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; ++v) acc[s][t][v] += weight[v] * value;
        }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < P; ++t) {
    T* target = out + std::min(tile + t, tiles - 1) * S * N;
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) store<T>(target + s * N + v * L, acc[s][t][v]);
  }
}

// Multiplies transformed tiles with a panel, [block of outputs][product][W, |W|][channel][lane];
// finish(tile, channel of the vector, outputs), outputs being [stream][M][M].
template <class T, int M, class Finish>
void multiply_tiles(const T* in, int64_t tiles, int64_t depth, const T* panel, int64_t outputs,
                    T* products, const Finish& finish) {
  constexpr int P = kTilePixels<S>, L = kLanes<T>;
  const int64_t in_plane = plane_size<T>(tiles, depth), plane = plane_size<T>(tiles, outputs);
  for (int i = 0; i < kProducts; ++i)
    for_blocks<T>(outputs, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * L;
      const T* weights = panel + c * kProducts * 2 * depth + 2 * i * depth * N;
      for (int64_t t = 0; t < tiles; t += P)
        multiply_points<T, V>(in + i * in_plane, t, tiles, depth, weights, weights + depth * N,
                              products + i * plane + c * tiles * S);
    });
  for_blocks<T>(outputs, [&](int64_t c, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t N = V * L;
    for (int64_t t = 0; t < tiles; ++t)
      for (int v = 0; v < V; ++v) {
        Vec<T> out[S][M * M];
        for (int k = 0; k < S; ++k) {
          Vec<T> x[kProducts];
          const T* from = products + c * tiles * S + (t * S + k) * N + v * L;
          for (int i = 0; i < kProducts; ++i) x[i] = load(from + i * plane);
          transform_output_tile<T, M>(x, out[k]);
        }
        finish(t, c + v * L, out);
      }
  });
}

// Calls body(outputs of a tile as a constant) for the convolution's.
template <class Body>
void with_outputs(const Winograd& w, const Body& body) {
  switch (w.outputs) {
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    default:
      return body(std::integral_constant<int, 5>{});
  }
}

// Packs one block of a convolution's weights, transformed, from `block * kBlock` on. Forward, the
// channels are (phase, in channel) and the outputs the out channels; exchanged, for the input
// gradient, the channels are the out channels, and the outputs (phase, in channel).
template <class T, int K>
void pack_winograd(const Shape& s, const T* weight, bool exchanged, int64_t pitch, int64_t block,
                   T* panel) {
  constexpr int L = kLanes<T>;
  const Winograd w(s);
  const int64_t kernel = s.kernel_height, taps = kernel * kernel;
  const int64_t in = w.phases() * pitch, out = round_up(s.out_channels, kLanes<T>);
  const int64_t depth = exchanged ? out : in, outputs = exchanged ? in : out;
  const int64_t first = block * kBlock<T>, n = std::min(outputs - first, kBlock<T>);
  T* target = panel + first * kProducts * 2 * depth;
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t o = 0; o < n; o += L) {
      Vec<T> g[K * K] = {}, u[2][kProducts];
      for (int lane = 0; lane < L; ++lane) {
        const int64_t input = exchanged ? first + o + lane : k,
                      output = exchanged ? k : first + o + lane;
        const int64_t phase = input / pitch, channel = input % pitch;
        if (channel >= s.in_channels || output >= s.out_channels) continue;
        const T* from = weight + (output * s.in_channels + channel) * taps;
        for (int64_t ky = 0; ky < K; ++ky)
          for (int64_t kx = 0; kx < K; ++kx) {
            const int64_t y = ky * w.stride + phase / w.stride,
                          x = kx * w.stride + phase % w.stride;
            if (y >= kernel || x >= kernel) continue;
            const int64_t to = exchanged ? (K - 1 - ky) * K + K - 1 - kx : ky * K + kx;
            g[to][lane] = from[y * kernel + x];
          }
      }
      transform_kernel_tile<T, K>(g, u[0]);
      for (auto& value : g) value = absolute<T>(value);
      transform_kernel_tile<T, K>(g, u[1]);
      for (int i = 0; i < kProducts; ++i)
        for (int a = 0; a < 2; ++a) store<T>(target + ((2 * i + a) * depth + k) * n + o, u[a][i]);
    }
}

// The transformed input of the output tiles [begin, end), [product][tile][stream][pitch].
template <class T>
void transform_inputs(const Layer<T>& layer, const Winograd& w, const T* in, int64_t begin,
                      int64_t end, int64_t pitch, T* out) {
  const Shape& s = layer.shape;
  const Geometry& g = layer.in;
  for (int64_t phase = 0; phase < w.phases(); ++phase)
    transform_tiles<T, kPoints>(
        {in + g.offset(0, 0), g.size(), &g, s.in_height, s.in_width, w.stride,
         phase / w.stride - s.padding_height, phase % w.stride - s.padding_width},
        w.out, begin, end, g.pitch, phase * g.pitch, pitch, transform_input_tile<T>, out);
}

// The gradients of some examples' outputs as a phase of their own.
template <class T>
Phase<T> gradient_phase(const Layer<T>& layer, const T* gradient) {
  const Geometry& h = layer.gradient;
  return {gradient + h.offset(0, 0), h.size(), &h, layer.shape.out_height,
          layer.shape.out_width,     1,        0,  0};
}

// As convolve_forward, of `images` examples.
template <class T>
double winograd_forward(const Layer<T>& layer, int64_t images, const T* panels, const T* bias,
                        const T* in, const Layer<T>& next, T* out) {
  const Shape& s = layer.shape;
  const Winograd w(s);
  const Geometry& h = next.in;
  const int64_t depth = w.phases() * layer.in.pitch;
  for (int64_t n = 0; n < images; ++n)
    clear_padding(h, s.out_height, s.out_width, out + n * h.size());
  T* tiles_in = scratch<T>(Slot::kTilesIn, kProducts * plane_size<T>(kMostTiles, depth));
  T* products = scratch<T>(Slot::kTilesOut, kProducts * plane_size<T>(kMostTiles, layer.width()));
  double total = 0;
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for_tiles(w.out, images, [&](int64_t begin, int64_t end) {
      transform_inputs(layer, w, in, begin, end, depth, tiles_in);
      Vec<T> squares{};
      multiply_tiles<T, M>(tiles_in, end - begin, depth, panels + layer.panel, layer.width(),
                           products, [&](int64_t tile, int64_t channel, Vec<T>(*sums)[M* M]) {
                             const int64_t t = begin + tile, y = w.out.top(t), x = w.out.left(t);
                             T* image = out + w.out.image(t) * h.size() + channel;
                             for (int64_t i = 0; i < M && y + i < s.out_height; ++i)
                               for (int64_t j = 0; j < M && x + j < s.out_width; ++j) {
                                 Vec<T> streams[S];
                                 for (int k = 0; k < S; ++k) streams[k] = sums[k][M * i + j];
                                 streams[1] = streams[1] < 0 ? Vec<T>{} : streams[1];  // rounding
                                 activate<T>(load(bias + channel), layer.relu, streams);
                                 T* target = image + h.offset(y + i, x + j);
                                 for (int k = 0; k < S; ++k)
                                   store<T>(target + k * h.stream_stride(), streams[k]);
                                 squares += streams[1] * streams[1];
                               }
                           });
      total += static_cast<double>(sum<T>(squares));
    });
  });
  return total;
}

// As convolve_weight_gradient, of `images` examples: sums [product][block of outputs][row][lane].
template <class T>
void winograd_weight_gradient(const Layer<T>& layer, int64_t images, const T* in, const T* gradient,
                              T* signed_sums, T* absolute_sums) {
  constexpr int R = kTileRows;
  const Winograd w(layer.shape);
  const int64_t depth = w.phases() * layer.in.pitch, width = layer.width();
  const int64_t sum_rows = round_up(depth, R);
  const int64_t pitch = spread_pitch<T>(depth), out_pitch = spread_pitch<T>(width);
  T* tiles_in = scratch<T>(Slot::kTilesIn, kProducts * plane_size<T>(kMostTiles, pitch));
  T* tiles_out = scratch<T>(Slot::kTilesOut, kProducts * plane_size<T>(kMostTiles, out_pitch));
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for_tiles(w.out, images, [&](int64_t begin, int64_t end) {
      const int64_t tiles = end - begin;
      transform_inputs(layer, w, in, begin, end, pitch, tiles_in);
      transform_tiles<T, M>(gradient_phase(layer, gradient), w.out, begin, end, width, 0, out_pitch,
                            transform_gradient_tile<T, M>, tiles_out);
      for (int i = 0; i < kProducts; ++i)
        for_blocks<T>(width, [&](int64_t c, auto vectors) {
          constexpr int V = decltype(vectors)::value;
          const Operand<T> vector{tiles_out + i * plane_size<T>(tiles, out_pitch) + c, 0,
                                  S * out_pitch, out_pitch};
          const Operand<T> scalars{tiles_in + i * plane_size<T>(tiles, pitch), 0, S * pitch, pitch};
          const int64_t base = (i * width + c) * sum_rows;
          for (int64_t row = 0; row < depth; row += R) {
            int64_t at[R];
            for (int j = 0; j < R; ++j) at[j] = std::min(row + j, depth - 1);
            const int64_t to = base + row * V * kLanes<T>;
            outer_tile<T, 0, S, V>(vector, scalars, at, 1, tiles, signed_sums + to);
            outer_tile<T, 1, S, V>(vector, scalars, at, 1, tiles, absolute_sums + to);
          }
        });
    });
  });
}

// The weight gradient of a vector of outputs.
template <class T>
void winograd_reduce(const Layer<T>& layer, const T* weight, const WeightSums<T>& sums,
                     int64_t output, T* out) {
  const Shape& s = layer.shape;
  const Winograd w(s);
  const int64_t depth = w.phases() * layer.in.pitch, width = layer.width();
  const int64_t sum_rows = round_up(depth, kTileRows), kernel = s.kernel_height;
  const int64_t block = output / kBlock<T> * kBlock<T>, n = std::min(kBlock<T>, width - block);
  const int64_t lanes = std::min<int64_t>(kLanes<T>, s.out_channels - output);
  with_outputs(w, [&](auto outputs) {
    constexpr int K = kPoints + 1 - outputs;
    for (int64_t row = 0; row < depth; ++row) {
      const int64_t phase = row / layer.in.pitch, channel = row % layer.in.pitch;
      if (channel >= s.in_channels) continue;
      Vec<T> taps[2][K * K];
      for (int a = 0; a < 2; ++a) {
        Vec<T> products[kProducts] = {};
        for (int part = 0; part < sums.parts; ++part)
          for (int i = 0; i < kProducts; ++i)
            products[i] += load((a ? sums.magnitude : sums.plus) + part * sums.size +
                                (i * width + block) * sum_rows + row * n + output - block);
        transform_output_tile<T, K>(products, taps[a]);
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t at = ((output + lane) * s.in_channels + channel) * kernel * kernel;
        for (int64_t ky = 0; ky < K; ++ky)
          for (int64_t kx = 0; kx < K; ++kx) {
            const int64_t y = ky * w.stride + phase / w.stride,
                          x = kx * w.stride + phase % w.stride;
            if (y >= kernel || x >= kernel) continue;
            const int64_t tap = at + y * kernel + x;
            out[tap] = taps[0][ky * K + kx][lane] + sign(weight[tap]) * taps[1][ky * K + kx][lane];
          }
      }
    }
  });
}

// The input gradient of `images` examples; finish(example, pixel, channel of the vector, streams).
template <class T, class Finish>
void winograd_input_gradient(const Layer<T>& layer, int64_t images, const T* panels,
                             const T* gradient, const Finish& finish) {
  const Shape& s = layer.shape;
  const Winograd w(s);
  const int64_t depth = layer.width(), pitch = layer.in.pitch, outs = w.phases() * pitch;
  Grid source = w.in;  // of the gradient's pixels that a tile reads
  source.y -= w.taps - 1;
  source.x -= w.taps - 1;
  T* tiles_in = scratch<T>(Slot::kTilesIn, kProducts * plane_size<T>(kMostTiles, depth));
  T* products = scratch<T>(Slot::kTilesOut, kProducts * plane_size<T>(kMostTiles, outs));
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for_tiles(w.in, images, [&](int64_t begin, int64_t end) {
      transform_tiles<T, kPoints>(gradient_phase(layer, gradient), source, begin, end, depth, 0,
                                  depth, transform_input_tile<T>, tiles_in);
      multiply_tiles<T, M>(
          tiles_in, end - begin, depth, panels + layer.backward_panel, outs, products,
          [&](int64_t tile, int64_t output, Vec<T>(*sums)[M* M]) {
            const int64_t t = begin + tile, phase = output / pitch;
            const int64_t y0 = w.in.top(t) * w.stride + phase / w.stride - s.padding_height;
            const int64_t x0 = w.in.left(t) * w.stride + phase % w.stride - s.padding_width;
            for (int i = 0; i < M; ++i)
              for (int j = 0; j < M; ++j) {
                const int64_t y = y0 + i * w.stride, x = x0 + j * w.stride;
                if (y < 0 || y >= s.in_height || x < 0 || x >= s.in_width) continue;
                Vec<T> streams[S];
                for (int k = 0; k < S; ++k) streams[k] = sums[k][M * i + j];
                finish(w.in.image(t), y * s.in_width + x, output % pitch, streams);
              }
          });
    });
  });
}

}  // namespace cibp
