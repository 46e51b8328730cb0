// The two register tiles that do all arithmetic of the interval ops.
//
// Streams are numbered 0 center, 1 radius, 2 nominal; STREAMS is 3, or 2 without a nominal. Centre
// and nominal go through W, the radius through |W|, which is made in registers from the W just
// loaded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "vec.h"

namespace cibp {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Channels from one pixel to the next where many pixels are read at a time: not an even number of
// cache lines, which would crowd into few cache sets.
template <class T>
constexpr int64_t spread_pitch(int64_t channels) {
  constexpr int64_t line = 64 / sizeof(T);
  return channels % (2 * line) == 0 ? channels + line : channels;
}

// Channels of a weight block: two vectors; the last block of a layer has one where that is enough.
template <class T>
constexpr int64_t kBlock = 2 * kLanes<T>;

// Calls body(first channel, vectors) for each block.
template <class T, class Body>
void for_blocks(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kBlock<T>) {
    if (channels - c > kLanes<T>)
      body(c, std::integral_constant<int, 2>{});
    else
      body(c, std::integral_constant<int, 1>{});
  }
}

// Consecutive products of one pixel: `length` scalars from `source` on, relative to the pixel, with
// the rows of the weight panel from `row` on.
struct Run {
  int64_t source, row, length;
  bool operator==(const Run& other) const {
    return source == other.source && row == other.row && length == other.length;
  }
};

// Pixels a multiply tile computes at once.
template <int STREAMS>
constexpr int kTilePixels = kAccumulators / (2 * STREAMS);

// For each of PIXELS pixels t and each vector v of channels: the sums over runs and k of
//   source[pixels[t] + run + k][stream] * panel[row + k][v]
// onto those in `partial`, if it is given; finish(t, v, sums) takes them, one for each stream.
template <class F, int STREAMS, int VECTORS, int PIXELS = kTilePixels<STREAMS>, class Finish>
[[gnu::always_inline]] inline void multiply(
    const F* source,        // packed streams
    const int64_t* pixels,  // [PIXELS] offsets into source
    int64_t stream_stride,  // from one stream to the next in source
    const Run* runs, int64_t run_count,
    const F* panel,            // [rows, VECTORS * kLanes]
    const int64_t* targets,    // [kTilePixels] rows of partial; repeats are fine
    const Number<F>* partial,  // [.., STREAMS, VECTORS * kLanes] or null
    bool points,               // whether the second stream is multiplied by W, not by |W|
    const Finish& finish) {
  using T = Number<F>;
  const auto kept = kept_bits<F>(points);
  constexpr int P = PIXELS, L = kLanes<F>, N = VECTORS * L;
  Vec<T> acc[STREAMS][P][VECTORS];
#pragma GCC unroll 16
  for (int s = 0; s < STREAMS; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < P; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) acc[s][t][v] = Vec<T>{};

  for (const Run* run = runs; run < runs + run_count; ++run) {
    const F* w = panel + run->row * N;
    const F* x[P];
#pragma GCC unroll 16
    for (int t = 0; t < P; ++t) x[t] = source + pixels[t] + run->source;
    for (int64_t k = run->length; k > 0; --k, w += N) {
      Factors<F> weight[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) {
        Factors<F> loaded = load(w + v * L);
        pin(loaded);
        weight[v] = loaded;
      }
#pragma GCC unroll 16
      for (int s = 0; s < STREAMS; s += 2)
#pragma GCC unroll 16
        for (int t = 0; t < P; ++t) {
          const Factors<F> value = broadcast(x[t][s * stream_stride]);
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; ++v)
            acc[s][t][v] = multiply_add(acc[s][t][v], weight[v], value);
        }
      if constexpr (STREAMS > 1) {
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) weight[v] = masked<F>(weight[v], kept);
#pragma GCC unroll 16
        for (int t = 0; t < P; ++t) {
          const Factors<F> value = broadcast(x[t][stream_stride]);
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; ++v)
            acc[1][t][v] = multiply_add(acc[1][t][v], weight[v], value);
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < P; ++t) ++x[t];
    }
  }
  if (partial) {  // all are read before any is written: targets may repeat
#pragma GCC unroll 16
    for (int s = 0; s < STREAMS; ++s)
#pragma GCC unroll 16
      for (int t = 0; t < P; ++t)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v)
          acc[s][t][v] += load(partial + (targets[t] * STREAMS + s) * N + v * L);
  }
#pragma GCC unroll 16
  for (int t = 0; t < P; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      Vec<T> sums[STREAMS];
#pragma GCC unroll 16
      for (int s = 0; s < STREAMS; ++s) sums[s] = acc[s][t][v];
      finish(t, v, sums);
    }
}

// product[targets[t]][stream][v] = what `multiply` sums, onto what is there where `accumulate`.
template <class F, int STREAMS, int VECTORS, int PIXELS = kTilePixels<STREAMS>>
[[gnu::noinline]] void multiply_tile(const F* source, const int64_t* pixels, int64_t stream_stride,
                                     const Run* runs, int64_t run_count, const F* panel,
                                     const int64_t* targets, bool accumulate, bool points,
                                     // outputs
                                     Number<F>* product) {  // [.., STREAMS, VECTORS * kLanes]
  using T = Number<F>;
  constexpr int L = kLanes<F>, N = VECTORS * L;
  multiply<F, STREAMS, VECTORS, PIXELS>(
      source, pixels, stream_stride, runs, run_count, panel, targets,
      accumulate ? product : nullptr, points, [&](int t, int v, const Vec<T>* sums) {
#pragma GCC unroll 16
        for (int s = 0; s < STREAMS; ++s)
          store<T>(product + (targets[t] * STREAMS + s) * N + v * L, sums[s]);
      });
}

// Rows of the weight gradient an outer tile computes at once.
constexpr int kTileRows = 6;

// One operand of outer_tile: packed streams of rows x columns pixels.
template <class F>
struct Operand {
  const F* data;
  int64_t row_stride, pixel_stride, stream_stride;
};

// sums[j][v] += sum over pixels and the streams FIRST, FIRST + 2, .. of scalars[offsets[j]] *
// vectors[v]
//
// The weight gradient is that of FIRST = 0 plus sign(W) times that of FIRST = 1.
//
// ONE_ROW: rows is 1. Without the loop over rows the sums stay in registers; where the compiler is
// left to see that, it does so in some builds only.
template <class F, int FIRST, int STREAMS, int VECTORS, bool ONE_ROW>
[[gnu::noinline]] void outer_rows(
    const Operand<F>& vectors,  // data: the first of VECTORS * kLanes channels
    const Operand<F>& scalars,  // data: the first pixel
    const int64_t* offsets,     // [kTileRows] relative to a pixel of scalars
    int64_t rows, int64_t columns,
    // outputs
    Number<F>* sums) {  // [kTileRows, VECTORS * kLanes]
  using T = Number<F>;
  constexpr int R = kTileRows, L = kLanes<F>, N = VECTORS * L;
  Vec<T> acc[R][VECTORS];
  const F* g = vectors.data + FIRST * vectors.stream_stride;
  const F* x[R];
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j) {
    x[j] = scalars.data + FIRST * scalars.stream_stride + offsets[j];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) acc[j][v] = Vec<T>{};
  }
  const int64_t g_pixel = vectors.pixel_stride, g_second = 2 * vectors.stream_stride;
  const int64_t x_pixel = scalars.pixel_stride, x_second = 2 * scalars.stream_stride;
  const int64_t g_row = vectors.row_stride - columns * g_pixel,
                x_row = scalars.row_stride - columns * x_pixel;
  if (ONE_ROW) rows = 1;
  for (; rows > 0; --rows) {
    for (int64_t column = columns; column > 0; --column) {
#pragma GCC unroll 2
      for (int s = FIRST; s < STREAMS; s += 2) {
        Factors<F> value[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
          Factors<F> loaded = load(g + (s > FIRST ? g_second : 0) + v * L);
          pin(loaded);
          value[v] = loaded;
        }
#pragma GCC unroll 16
        for (int j = 0; j < R; ++j) {
          const Factors<F> scalar = broadcast(x[j][s > FIRST ? x_second : 0]);
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; ++v) acc[j][v] = multiply_add(acc[j][v], value[v], scalar);
        }
      }
      g += g_pixel;
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) x[j] += x_pixel;
    }
    g += g_row;
#pragma GCC unroll 16
    for (int j = 0; j < R; ++j) x[j] += x_row;
  }
#pragma GCC unroll 16
  for (int j = 0; j < R; ++j)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      T* const sum = sums + j * N + v * L;
      store<T>(sum, load(sum) + acc[j][v]);
    }
}

template <class F, int FIRST, int STREAMS, int VECTORS>
inline void outer_tile(const Operand<F>& vectors, const Operand<F>& scalars, const int64_t* offsets,
                       int64_t rows, int64_t columns, Number<F>* sums) {
  const auto add = rows == 1 ? outer_rows<F, FIRST, STREAMS, VECTORS, true>
                             : outer_rows<F, FIRST, STREAMS, VECTORS, false>;
  add(vectors, scalars, offsets, rows, columns, sums);
}

// torch.sign: 0 at 0, NaN at NaN.
template <class T>
inline T sign(T w) {
  return w > 0 ? T{1} : w < 0 ? T{-1} : w;
}

template <class T>
inline Vec<T> signs(Vec<T> w) {
  const Vec<T> one = broadcast(T{1});
  return w > 0 ? one : w < 0 ? -one : w;
}

}  // namespace cibp
