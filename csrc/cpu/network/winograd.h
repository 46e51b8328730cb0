// Winograd convolution for training: fewer products, more rounding (never for certificates).
//
// A tile of M x M outputs of a K x K kernel, M + K - 1 = 6, takes 36 products for each pair of
// channels instead of M M K K: input tile, kernel and output are taken to and from values at the
// points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, arXiv 1509.09308), in both directions. |W|
// has a transform of its own. A stride of s is s s convolutions of stride 1 (the phases), of every
// s-th pixel and tap, whose transforms are added.
//
// Products of bfloat16 take the points 0, 1, -1 and infinity, M + K - 1 = 4: the others magnify
// rounding ten times. Transforms are in float, and rounded once, before the products.
//
// The weight gradient is the convolution of the input tile with the gradient's: the same points,
// M and K exchanged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../parallel.h"
#include "../tile.h"
#include "../vec.h"
#include "layers.h"

namespace cibp {

template <class E>
constexpr int kPoints = kPaired<E> > 1 ? 4 : 6;
template <class E>
constexpr int kProducts = kPoints<E> * kPoints<E>;
constexpr int64_t kTiles = 24;           // transformed at a time: more leave the second-level cache
constexpr int64_t kGroupSize = 1 << 17;  // elements of the images that are transformed together

// Elements from one product's values of some tiles to the next product's: all products of a tile
// are written and read together, and must not meet in few cache sets.
template <class T>
constexpr int64_t plane_size(int64_t tiles, int64_t channels) {
  return spread_pitch<T>(tiles * S * channels);
}

// P input values -> at the P points.
template <class T, int P>
inline void transform_input(Vec<T>* d, int stride) {
  const Vec<T> d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride];
  if constexpr (P == 4) {
    d[0] = d0 - d2;
    d[stride] = d1 + d2;
    d[2 * stride] = d2 - d1;
    d[3 * stride] = d3 - d1;
  } else {
    const Vec<T> d4 = d[4 * stride], d5 = d[5 * stride];
    const Vec<T> a = d4 - T(4) * d2, b = d3 - T(4) * d1, c = d4 - d2, e = T(2) * (d3 - d1);
    d[0] = T(4) * d0 - T(5) * d2 + d4;
    d[stride] = a + b;
    d[2 * stride] = a - b;
    d[3 * stride] = c + e;
    d[4 * stride] = c - e;
    d[5 * stride] = T(4) * d1 - T(5) * d3 + d5;
  }
}

// K values of a kernel -> at the P points.
template <class T, int P, int K>
inline void transform_kernel(const Vec<T>* g, int from, Vec<T>* u, int to) {
  Vec<T> even1{}, odd1{}, even2{}, odd2{};
  T power = 1;
  for (int i = 0; i < K; ++i, power *= 2) {
    const Vec<T> value = g[i * from];
    (i % 2 ? odd1 : even1) += value;
    (i % 2 ? odd2 : even2) += power * value;
  }
  const T scale = P == 4 ? T(1) / 2 : T(-1) / 6;
  u[0] = P == 4 ? g[0] : g[0] * (T(1) / 4);
  u[to] = (even1 + odd1) * scale;
  u[2 * to] = (even1 - odd1) * scale;
  if constexpr (P == 6) {
    u[3 * to] = (even2 + odd2) * (T(1) / 24);
    u[4 * to] = (even2 - odd2) * (T(1) / 24);
  }
  u[(P - 1) * to] = g[(K - 1) * from];
}

// The P products -> M outputs.
template <class T, int P, int M>
inline void transform_output(const Vec<T>* x, int from, Vec<T>* y, int to) {
  const Vec<T> sum1 = x[from] + x[2 * from], difference1 = x[from] - x[2 * from];
  if constexpr (P == 4) {
    y[0] = x[0] + sum1;
    for (int i = 1; i < M; ++i) y[i * to] = i % 2 ? difference1 : sum1;
  } else {
    const Vec<T> sum2 = x[3 * from] + x[4 * from], difference2 = x[3 * from] - x[4 * from];
    y[0] = x[0] + sum1 + sum2;
    T power = 2;
    for (int i = 1; i < M; ++i, power *= 2)
      y[i * to] = i % 2 ? difference1 + power * difference2 : sum1 + power * sum2;
  }
  y[(M - 1) * to] += x[(P - 1) * from];
}

template <class T, int P>
inline void transform_input_tile(Vec<T>* d) {  // [P][P] in place
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) transform_input<T, P>(d + i, P);
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) transform_input<T, P>(d + P * i, 1);
}

template <class T, int P, int K>
inline void transform_kernel_tile(const Vec<T>* g, Vec<T>* u) {  // [K][K] -> [P][P]
  Vec<T> rows[P * K];
#pragma GCC unroll 6
  for (int i = 0; i < K; ++i) transform_kernel<T, P, K>(g + i, K, rows + i, K);
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) transform_kernel<T, P, K>(rows + K * i, 1, u + P * i, 1);
}

template <class T, int P, int M>
inline void transform_gradient_tile(Vec<T>* d) {  // [M][M] -> [P][P], in place
  Vec<T> kernel[M * M];
  std::copy_n(d, M * M, kernel);
  transform_kernel_tile<T, P, M>(kernel, d);
}

template <class T, int P, int M>
inline void transform_output_tile(const Vec<T>* x, Vec<T>* y) {  // [P][P] -> [M][M]
  Vec<T> rows[M * P];
#pragma GCC unroll 6
  for (int i = 0; i < P; ++i) transform_output<T, P, M>(x + i, P, rows + i, P);
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) transform_output<T, P, M>(rows + P * i, 1, y + M * i, 1);
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
template <class E>
struct Winograd {
  int64_t stride, taps;  // taps of a phase, in each direction
  int64_t outputs;       // of a tile, in each direction
  Grid out, in;          // tiles of the output, and of each phase of the input, for its gradient
  int64_t phases() const { return stride * stride; }

  explicit Winograd(const Shape& s)
      : stride(s.stride_height),
        taps(ceil_div(s.kernel_height, s.stride_height)),
        outputs(kPoints<E> + 1 - taps) {
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
// estimated. Of float products, values that leave the cache between them make each cost about 1.7
// direct ones. Of bfloat16 products 1.25, but the transforms, in float, cost four times as much
// beside them; and transformed weights of more than 1 MiB are read from memory for few tiles.
template <class E>
Passes winograd_passes(const Shape& s) {
  const int64_t taps = ceil_div(s.kernel_height, s.stride_height);
  const bool possible = s.kernel_height == s.kernel_width && s.stride_height == s.stride_width &&
                        s.dilation_height == 1 && s.dilation_width == 1 && taps >= 2 &&
                        taps <= kPoints<E> / 2 + 1 && s.stride_height <= 2;
  if (!possible) return {};
  const Winograd<E> w(s);
  const int64_t in = w.phases() * s.in_channels, out = s.out_channels;
  const int64_t direct =
      s.out_height * s.out_width * s.kernel_height * s.kernel_width * s.in_channels * out;
  const auto faster = [&](const Grid& grid, int64_t from, int64_t to) {
    const int64_t tiles = grid.tiles() * kProducts<E>, transforms = 5 * from + 4 * to;
    if constexpr (kPaired<E> > 1)
      return tiles * (from * to + 4 * transforms) * 5 / 4 < direct && from * to <= 128 * 128;
    else
      return tiles * (from * to + transforms) * 17 / 10 < direct;
  };
  return {faster(w.out, in, out), faster(w.out, in, out), faster(w.in, out, in)};
}

// Images of packed streams, and which of their pixels a phase has: (y, x) * stride + first.
template <class E>
struct Phase {
  const E* data;  // of channel 0 of pixel (0, 0)
  int64_t image_size;
  const Geometry* geometry;
  int64_t height, width;
  int64_t stride, first_y, first_x;
};

// N x N pixels of one stream, from (y, x) of the phase on; zeros outside of the image.
template <int N, class E>
inline void load_tile(const Phase<E>& p, int64_t image, int64_t y, int64_t x, int64_t offset,
                      Vec<Number<E>>* tile) {
  const int64_t y0 = y * p.stride + p.first_y, x0 = x * p.stride + p.first_x;
  const int64_t row = p.geometry->row_stride() * p.stride, column = p.geometry->pitch * p.stride;
  const E* corner = p.data + image * p.image_size + y0 * p.geometry->row_stride() +
                    x0 * p.geometry->pitch + offset;
  if (y0 >= 0 && x0 >= 0 && y0 + (N - 1) * p.stride < p.height &&
      x0 + (N - 1) * p.stride < p.width) {
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) tile[N * i + j] = numbers(corner + i * row + j * column);
    return;
  }
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) {
      const int64_t yy = y0 + i * p.stride, xx = x0 + j * p.stride;
      const bool inside = yy >= 0 && yy < p.height && xx >= 0 && xx < p.width;
      tile[N * i + j] = inside ? numbers(corner + i * row + j * column) : Vec<Number<E>>{};
    }
}

// The tiles [begin, end) of a grid through `transform` into out[product][tile][stream][pitch], from
// `channel` on; or, if `out` is of pairs, into those of two tiles each, [product][pair]...
template <int N, class E, class Out, class Transform>
void transform_tiles(const Phase<E>& phase, const Grid& grid, int64_t begin, int64_t end,
                     int64_t channels, int64_t channel, int64_t pitch, const Transform& transform,
                     Out* out) {
  using T = Number<E>;
  constexpr int64_t together = std::is_same_v<Out, Pair> ? 2 : 1;
  const int64_t plane = plane_size<Out>(ceil_div(end - begin, together), pitch);
  for (int64_t t = begin; t < end; t += together)
    for (int k = 0; k < S; ++k)
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        const int64_t offset = k * phase.geometry->stream_stride() + c;
        const auto load_transformed = [&](int64_t t, Vec<T>* tile) {
          load_tile<N>(phase, grid.image(t), grid.top(t), grid.left(t), offset, tile);
          transform(tile);
        };
        Out* target = out + ((t - begin) / together * S + k) * pitch + channel + c;
        Vec<T> tile[kProducts<E>];
        load_transformed(t, tile);
        if constexpr (together == 1) {
#pragma GCC unroll 36
          for (int i = 0; i < kProducts<E>; ++i) store_numbers(target + i * plane, tile[i]);
        } else {
          Vec<T> second[kProducts<E>] = {};
          if (t + 1 < end) load_transformed(t + 1, second);
#pragma GCC unroll 16
          for (int i = 0; i < kProducts<E>; ++i)
            store(target + i * plane, paired(tile[i], second[i]));
        }
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
template <class F, int VECTORS>
[[gnu::noinline]] void multiply_points(const F* in, int64_t tile, int64_t tiles, int64_t depth,
                                       const F* signed_panel, const F* absolute_panel,
                                       Number<F>* out) {
  using T = Number<F>;
  constexpr int P = kTilePixels<S>, L = kLanes<T>, N = VECTORS * L;
  Vec<T> acc[S][P][VECTORS];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < P; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) acc[s][t][v] = Vec<T>{};
  const F* x[P];
#pragma GCC unroll 16
  for (int t = 0; t < P; ++t) x[t] = in + std::min(tile + t, tiles - 1) * S * depth;
  for (int64_t k = 0; k < depth; ++k, signed_panel += N, absolute_panel += N) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Factors<F> weight[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) {
        Factors<F> loaded = load((half ? absolute_panel : signed_panel) + v * L);
        pin(loaded);
        weight[v] = loaded;
      }
#pragma GCC unroll 16
      for (int s = half; s < S; s += 2)
#pragma GCC unroll 16
        for (int t = 0; t < P; ++t) {
          const Factors<F> value = broadcast(x[t][k + s * depth]);
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; ++v)
            acc[s][t][v] = multiply_add(acc[s][t][v], weight[v], value);
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
// finish(tile, channel of the vector, outputs), outputs being [stream][M][M]. points: all streams
// are points, to be multiplied with W.
template <class E, int M, class Finish>
void multiply_tiles(const E* in, int64_t tiles, int64_t depth, const Number<E>* packed,
                    int64_t outputs, bool points, Number<E>* products, const Finish& finish) {
  using T = Number<E>;
  using F = Factor<E>;
  constexpr int kAll = kProducts<E>;
  const F* const panel = as_factors<E>(packed);
  const int64_t factors = depth / kPaired<E>;
  constexpr int P = kTilePixels<S>, L = kLanes<T>;
  const int64_t in_plane = plane_size<E>(tiles, depth), plane = plane_size<T>(tiles, outputs);
  for (int i = 0; i < kAll; ++i)
    for_blocks<T>(outputs, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * L;
      const F* weights = panel + c * kAll * 2 * factors + 2 * i * factors * N;
      for (int64_t t = 0; t < tiles; t += P)
        multiply_points<F, V>(as_factors<E>(in + i * in_plane), t, tiles, factors, weights,
                              points ? weights : weights + factors * N,
                              products + i * plane + c * tiles * S);
    });
  for_blocks<T>(outputs, [&](int64_t c, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t N = V * L;
    for (int64_t t = 0; t < tiles; ++t)
      for (int v = 0; v < V; ++v) {
        Vec<T> out[S][M * M];
        for (int k = 0; k < S; ++k) {
          Vec<T> x[kAll];
          const T* from = products + c * tiles * S + (t * S + k) * N + v * L;
          for (int i = 0; i < kAll; ++i) x[i] = load(from + i * plane);
          transform_output_tile<T, kPoints<E>, M>(x, out[k]);
        }
        finish(t, c + v * L, out);
      }
  });
}

// Calls body(outputs of a tile as a constant) for the convolution's.
template <class E, class Body>
void with_outputs(const Winograd<E>& w, const Body& body) {
  if constexpr (kPoints<E> == 4) {
    if (w.outputs == 2) return body(std::integral_constant<int, 2>{});
    return body(std::integral_constant<int, 3>{});
  } else {
    if (w.outputs == 3) return body(std::integral_constant<int, 3>{});
    if (w.outputs == 4) return body(std::integral_constant<int, 4>{});
    return body(std::integral_constant<int, 5>{});
  }
}

// Packs one block of a convolution's weights, transformed, from `block * kBlock` on. Forward, the
// channels are (phase, in channel) and the outputs the out channels; exchanged, for the input
// gradient, the channels are the out channels, and the outputs (phase, in channel).
template <class E, int K>
void pack_winograd(const Shape& s, const Number<E>* weight, bool exchanged, int64_t pitch,
                   int64_t block, Number<E>* panel) {
  using T = Number<E>;
  constexpr int L = kLanes<T>, Q = kPaired<E>, kAll = kProducts<E>;
  const Winograd<E> w(s);
  const int64_t kernel = s.kernel_height, taps = kernel * kernel;
  const int64_t in = w.phases() * pitch, out = round_up(s.out_channels, kLanes<T>);
  const int64_t depth = exchanged ? out : in, outputs = exchanged ? in : out;
  const int64_t first = block * kBlock<T>, n = std::min(outputs - first, kBlock<T>);
  T* target = panel + first * kAll * 2 * depth / Q;
  // W's and |W|'s values at the points, of a vector of outputs.
  const auto transformed = [&](int64_t k, int64_t o, Vec<T>(&u)[2][kAll]) {
    Vec<T> g[K * K] = {};
    for (int lane = 0; lane < L; ++lane) {
      const int64_t input = exchanged ? first + o + lane : k,
                    output = exchanged ? k : first + o + lane;
      const int64_t phase = input / pitch, channel = input % pitch;
      if (channel >= s.in_channels || output >= s.out_channels) continue;
      const T* from = weight + (output * s.in_channels + channel) * taps;
      for (int64_t ky = 0; ky < K; ++ky)
        for (int64_t kx = 0; kx < K; ++kx) {
          const int64_t y = ky * w.stride + phase / w.stride, x = kx * w.stride + phase % w.stride;
          if (y >= kernel || x >= kernel) continue;
          const int64_t to = exchanged ? (K - 1 - ky) * K + K - 1 - kx : ky * K + kx;
          g[to][lane] = from[y * kernel + x];
        }
    }
    transform_kernel_tile<T, kPoints<E>, K>(g, u[0]);
    for (auto& value : g) value = absolute<T>(value);
    transform_kernel_tile<T, kPoints<E>, K>(g, u[1]);
  };
  for (int64_t k = 0; k < depth; k += Q)
    for (int64_t o = 0; o < n; o += L) {
      Vec<T> u[Q][2][kAll];
      for (int q = 0; q < Q; ++q) transformed(k + q, o, u[q]);
      for (int i = 0; i < kAll; ++i)
        for (int a = 0; a < 2; ++a) {
          T* const to = target + ((2 * i + a) * depth + k) / Q * n + o;
          if constexpr (Q > 1)
            store(reinterpret_cast<Pair*>(to), paired(u[0][a][i], u[1][a][i]));
          else
            store<T>(to, u[0][a][i]);
        }
    }
}

// The transformed input of the output tiles [begin, end), [product][tile][stream][pitch].
template <class E, class Out>
void transform_inputs(const Layer<E>& layer, const Winograd<E>& w, const E* in, int64_t begin,
                      int64_t end, int64_t pitch, Out* out) {
  const Shape& s = layer.shape;
  const Geometry& g = layer.in;
  for (int64_t phase = 0; phase < w.phases(); ++phase)
    transform_tiles<kPoints<E>>(
        Phase<E>{in + g.offset(0, 0), g.size(), &g, s.in_height, s.in_width, w.stride,
                 phase / w.stride - s.padding_height, phase % w.stride - s.padding_width},
        w.out, begin, end, g.pitch, phase * g.pitch, pitch,
        transform_input_tile<Number<E>, kPoints<E>>, out);
}

// The gradients of some examples' outputs as a phase of their own.
template <class E>
Phase<E> gradient_phase(const Layer<E>& layer, const E* gradient) {
  const Geometry& h = layer.gradient;
  return {gradient + h.offset(0, 0), h.size(), &h, layer.shape.out_height,
          layer.shape.out_width,     1,        0,  0};
}

// As convolve_forward, of `images` examples.
template <class E>
double winograd_forward(const Layer<E>& layer, int64_t images, const Number<E>* panels,
                        const Number<E>* bias, const E* in, const Layer<E>& next, E* out) {
  using T = Number<E>;
  constexpr int kAll = kProducts<E>;
  const Shape& s = layer.shape;
  const Winograd<E> w(s);
  const Geometry& h = next.in;
  const int64_t depth = w.phases() * layer.in.pitch;
  for (int64_t n = 0; n < images; ++n)
    clear_padding(h, s.out_height, s.out_width, out + n * h.size());
  E* tiles_in = scratch<E>(Slot::kTilesIn, kAll * plane_size<E>(kMostTiles, depth));
  T* products = scratch<T>(Slot::kTilesOut, kAll * plane_size<T>(kMostTiles, layer.width()));
  double total = 0;
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for_tiles(w.out, images, [&](int64_t begin, int64_t end) {
      transform_inputs(layer, w, in, begin, end, depth, tiles_in);
      Vec<T> squares{};
      multiply_tiles<E, M>(
          tiles_in, end - begin, depth, panels + layer.panel, layer.width(), layer.points, products,
          [&](int64_t tile, int64_t channel, Vec<T>(*sums)[M* M]) {
            const int64_t t = begin + tile, y = w.out.top(t), x = w.out.left(t);
            E* image = out + w.out.image(t) * h.size() + channel;
            for (int64_t i = 0; i < M && y + i < s.out_height; ++i)
              for (int64_t j = 0; j < M && x + j < s.out_width; ++j) {
                Vec<T> streams[S];
                for (int k = 0; k < S; ++k) streams[k] = sums[k][M * i + j];
                if (!layer.points)  // rounding
                  streams[1] = streams[1] < 0 ? Vec<T>{} : streams[1];
                activate<E>(layer, load(bias + channel), streams);
                store_streams(image + h.offset(y + i, x + j), h.stream_stride(), streams);
                squares += streams[1] * streams[1];
              }
          });
      total += static_cast<double>(sum<T>(squares));
    });
  });
  return total;
}

// As convolve_weight_gradient, of `images` examples: sums [product][block of outputs][row][lane].
template <class E>
void winograd_weight_gradient(const Layer<E>& layer, int64_t images, const E* in, const E* gradient,
                              Number<E>* signed_sums, Number<E>* absolute_sums) {
  using F = Factor<E>;
  constexpr int R = kTileRows, kAll = kProducts<E>;
  const Winograd<E> w(layer.shape);
  const int64_t depth = w.phases() * layer.in.pitch, width = layer.width();
  const int64_t sum_rows = round_up(depth, R);
  const int64_t pitch = spread_pitch<F>(depth), out_pitch = spread_pitch<F>(width);
  F* tiles_in = scratch<F>(Slot::kTilesIn, kAll * plane_size<F>(kMostTiles, pitch));
  F* tiles_out = scratch<F>(Slot::kTilesOut, kAll * plane_size<F>(kMostTiles, out_pitch));
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for_tiles(w.out, images, [&](int64_t begin, int64_t end) {
      const int64_t tiles = ceil_div(end - begin, kPaired<E>);
      transform_inputs(layer, w, in, begin, end, pitch, tiles_in);
      transform_tiles<M>(gradient_phase(layer, gradient), w.out, begin, end, width, 0, out_pitch,
                         transform_gradient_tile<Number<E>, kPoints<E>, M>, tiles_out);
      for (int i = 0; i < kAll; ++i)
        for_blocks<F>(width, [&](int64_t c, auto vectors) {
          constexpr int V = decltype(vectors)::value;
          const Operand<F> vector{tiles_out + i * plane_size<F>(tiles, out_pitch) + c, 0,
                                  S * out_pitch, out_pitch};
          const Operand<F> scalars{tiles_in + i * plane_size<F>(tiles, pitch), 0, S * pitch, pitch};
          const int64_t base = (i * width + c) * sum_rows;
          for (int64_t row = 0; row < depth; row += R) {
            int64_t at[R];
            for (int j = 0; j < R; ++j) at[j] = std::min(row + j, depth - 1);
            const int64_t to = base + row * V * kLanes<F>;
            outer_tile<F, 0, S, V>(vector, scalars, at, 1, tiles, signed_sums + to);
            outer_tile<F, 1, S, V>(vector, scalars, at, 1, tiles, absolute_sums + to);
          }
        });
    });
  });
}

// The weight gradient of a vector of outputs.
template <class E>
void winograd_reduce(const Layer<E>& layer, const Number<E>* weight,
                     const WeightSums<Number<E>>& sums, int64_t output, Number<E>* out) {
  using T = Number<E>;
  constexpr int kAll = kProducts<E>;
  const Shape& s = layer.shape;
  const Winograd<E> w(s);
  const int64_t depth = w.phases() * layer.in.pitch, width = layer.width();
  const int64_t sum_rows = round_up(depth, kTileRows), kernel = s.kernel_height;
  const int64_t block = output / kBlock<T> * kBlock<T>, n = std::min(kBlock<T>, width - block);
  const int64_t lanes = std::min<int64_t>(kLanes<T>, s.out_channels - output);
  with_outputs(w, [&](auto outputs) {
    constexpr int K = kPoints<E> + 1 - outputs;
    for (int64_t row = 0; row < depth; ++row) {
      const int64_t phase = row / layer.in.pitch, channel = row % layer.in.pitch;
      if (channel >= s.in_channels) continue;
      Vec<T> taps[2][K * K];
      for (int a = 0; a < 2; ++a) {
        Vec<T> products[kAll] = {};
        for (int part = 0; part < sums.parts; ++part)
          for (int i = 0; i < kAll; ++i)
            products[i] += load((a ? sums.magnitude : sums.plus) + part * sums.size +
                                (i * width + block) * sum_rows + row * n + output - block);
        transform_output_tile<T, kPoints<E>, K>(products, taps[a]);
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
template <class E, class Finish>
void winograd_input_gradient(const Layer<E>& layer, int64_t images, const Number<E>* panels,
                             const E* gradient, const Finish& finish) {
  using T = Number<E>;
  constexpr int kAll = kProducts<E>;
  const Shape& s = layer.shape;
  const Winograd<E> w(s);
  const int64_t depth = layer.width(), pitch = layer.in.pitch, outs = w.phases() * pitch;
  Grid source = w.in;  // of the gradient's pixels that a tile reads
  source.y -= w.taps - 1;
  source.x -= w.taps - 1;
  E* tiles_in = scratch<E>(Slot::kTilesIn, kAll * plane_size<E>(kMostTiles, depth));
  T* products = scratch<T>(Slot::kTilesOut, kAll * plane_size<T>(kMostTiles, outs));
  with_outputs(w, [&](auto outputs) {
    constexpr int M = outputs;
    for_tiles(w.in, images, [&](int64_t begin, int64_t end) {
      transform_tiles<kPoints<E>>(gradient_phase(layer, gradient), source, begin, end, depth, 0,
                                  depth, transform_input_tile<T, kPoints<E>>, tiles_in);
      multiply_tiles<E, M>(
          tiles_in, end - begin, depth, panels + layer.backward_panel, outs, layer.points, products,
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
