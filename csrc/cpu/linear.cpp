// Matrix products over packed streams, [example][stream][feature].
//
// The weights are read once, a block of columns (a vector or two) by kDepth rows at a time, transposed where the
// product needs it, and used for every example while they are in cache.
#include "linear.h"

#include <algorithm>
#include <array>
#include <vector>

#include "parallel.h"
#include "streams.h"
#include "tile.h"

namespace cibp {
namespace {

// Products summed in registers before the sums go back to memory: what a block of weights of this depth takes
// stays in the first-level cache.
constexpr int64_t kDepth = 256;

// Examples of one weight gradient block.
constexpr int64_t kExamples = 256;

template <class T>
constexpr int64_t kBlock = 2 * kLanes<T>;

template <class T>
Plane<T> plane(const Tensor2<const T>& t, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  return {t.data + row * t.stride[0] + column * t.stride[1], t.stride[1], t.stride[0],
          t.data + (rows - 1) * t.stride[0] + (columns - 1) * t.stride[1] + 1};
}

// Packs `count` rows and `channels` columns of the sources, [rows, columns] each, into [example][stream][channels].
template <class T, class Prologue>
void pack_matrix(const Prologue& prologue, const std::array<Tensor2<const T>, kMaxSources>& sources, int64_t rows, int64_t columns,
                 int64_t row, int64_t count, int64_t column, int64_t channels, int64_t pitch, T* out) {
  Plane<T> planes[Prologue::SOURCES];
  for (int k = 0; k < Prologue::SOURCES; ++k) planes[k] = plane(sources[k], rows, columns, row, column);
  pack(prologue, planes, channels, count, Prologue::STREAMS * pitch, pitch, out);
}

// All rows of the sources, packed by all threads.
template <class T, class Prologue>
T* pack_all(const Prologue& prologue, const std::array<Tensor2<const T>, kMaxSources>& sources, int64_t rows, int64_t columns,
            Slot slot, int threads) {
  // The last example's last vector is read whole by an outer tile.
  T* packed = scratch<T>(slot, rows * Prologue::STREAMS * columns + kBlock<T>);
  const int64_t parts = std::min<int64_t>(rows, 4 * threads);
  parallel_for(threads, parts, [&](int64_t i) {
    const Part part(rows, static_cast<int>(i), static_cast<int>(parts));
    pack_matrix(prologue, sources, rows, columns, part.begin, part.end - part.begin, 0, columns, columns,
                packed + part.begin * Prologue::STREAMS * columns);
  });
  return packed;
}

// panel[k][o] = matrix[o][k] for `outputs` (at most block) o and `depth` k; zeros up to `block`.
template <class T>
void pack_transposed(const Tensor2<const T>& matrix, const Plane<T>& from, int64_t outputs, int64_t depth, int64_t block, T* panel) {
  constexpr int L = kLanes<T>;
  for (int64_t o = 0; o < block; o += L)
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t valid = std::min<int64_t>(L, outputs - o), columns = std::min<int64_t>(L, depth - k);
      const T* p = from.data + o * matrix.stride[0] + k * matrix.stride[1];
      T* target = panel + k * block + o;
      if (valid == L && columns == L && matrix.stride[1] == 1) {
        Vec<T> rows[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = load(p + i * matrix.stride[0]);
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store<T>(target + i * block, rows[i]);
      } else {
        for (int64_t j = 0; j < columns; ++j)
          for (int64_t i = 0; i < L; ++i) target[j * block + i] = i < valid ? p[i * matrix.stride[0] + j * matrix.stride[1]] : T{0};
      }
    }
}

// panel[k][c] = matrix[row + k][column + c] for `depth` k and `columns` (at most block) c; zeros up to `block`.
template <class T>
void pack_straight(const Tensor2<const T>& matrix, int64_t row, int64_t column, int64_t columns, int64_t depth, int64_t block, T* panel) {
  for (int64_t k = 0; k < depth; ++k, panel += block) {
    const T* p = matrix.data + (row + k) * matrix.stride[0] + column * matrix.stride[1];
    for (int64_t c = 0; c < columns; ++c) panel[c] = p[c * matrix.stride[1]];
    for (int64_t c = columns; c < block; ++c) panel[c] = 0;
  }
}

// Offsets of the examples [0, count) as tiles of multiply_tile want them; the last tile repeats the last example.
template <int STREAMS>
struct Examples {
  static constexpr int P = kTilePixels<STREAMS>;
  std::vector<int64_t> pixels, targets;
  Examples(int64_t count, int64_t stride) {
    for (int64_t i = 0; i < round_up(count, P); ++i) {
      targets.push_back(std::min(i, count - 1));
      pixels.push_back(targets.back() * stride);
    }
  }
};

// product[example][stream][block] = packed[example][stream][depth] x the panels that make_panel(begin, count, panel) gives.
template <class T, int S, int V, class MakePanel>
void multiply(const T* packed, const Examples<S>& examples, int64_t depth, const MakePanel& make_panel, T* product) {
  constexpr int P = kTilePixels<S>;
  T* panel = scratch<T>(Slot::kPanel, kDepth * kBlock<T>);
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t count = std::min(kDepth, depth - begin);
    make_panel(begin, count, panel);
    const Run run{begin, 0, count};
    for (size_t t = 0; t < examples.pixels.size(); t += P)
      multiply_tile<T, S, V>(packed, &examples.pixels[t], depth, &run, 1, panel, &examples.targets[t], begin > 0, product);
  }
}

// Calls body(vectors) with the vectors of a block of `columns` columns.
template <class T, class Body>
void with_vectors(int64_t columns, const Body& body) {
  if (columns > kLanes<T>)
    body(std::integral_constant<int, 2>{});
  else
    body(std::integral_constant<int, 1>{});
}

template <class T, int S>
void forward(const LinearForward<T>& op) {
  const auto [batch, in_features, out_features] = op.shape;
  const T* packed = pack_all<T>(CenterRadius<T, S>{}, {op.lower, op.upper, op.nominal}, batch, in_features, Slot::kSource, op.threads);
  T* bias = scratch<T>(Slot::kBias, out_features + kLanes<T>);
  std::fill_n(bias, out_features + kLanes<T>, T{0});
  if (op.bias) std::copy_n(op.bias, out_features, bias);

  // Few outputs leave threads idle: then the batch is divided as well.
  const int64_t blocks = ceil_div(out_features, kBlock<T>);
  const int64_t parts = std::max<int64_t>(1, std::min(batch / kTilePixels<S>, ceil_div(2 * op.threads, blocks)));
  double* widths = scratch<double>(Slot::kWidth, blocks * parts);
  parallel_for(op.threads, blocks * parts, [&](int64_t item) {
    const int64_t c = item / parts * kBlock<T>, columns = std::min(out_features - c, kBlock<T>);
    const Part part(batch, static_cast<int>(item % parts), static_cast<int>(parts));
    const int64_t count = part.end - part.begin;
    const Examples<S> examples(count, S * in_features);
    T* product = scratch<T>(Slot::kProduct, round_up(count, kLanes<T>) * S * kBlock<T>);
    with_vectors<T>(columns, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      multiply<T, S, V>(
          packed + part.begin * S * in_features, examples, in_features,
          [&](int64_t begin, int64_t depth, T* panel) {
            pack_transposed<T>(op.weight, plane(op.weight, out_features, in_features, c, begin), columns, depth, V * kLanes<T>, panel);
          },
          product);
      const Target<T> target{{op.lower_out + part.begin * out_features, op.upper_out + part.begin * out_features,
                              S == 3 ? op.nominal_out + part.begin * out_features : nullptr},
                             1,
                             out_features};
      widths[item] = unpack<T>(Bounds<T, S>{bias}, product, V * kLanes<T>, c, columns, count, target);
    });
  });
  double total = 0;
  for (int64_t i = 0; i < blocks * parts; ++i) total += widths[i];
  *op.width = static_cast<T>(total);
}

template <class T, class Prologue>
void gradients(const LinearBackward<T>& op, const Prologue& prologue, const std::array<Tensor2<const T>, kMaxSources>& sources) {
  constexpr int S = Prologue::STREAMS, R = kTileRows;
  const auto [batch, in_features, out_features] = op.shape;
  const T* gradient = pack_all<T>(prologue, sources, batch, out_features, Slot::kGradient, op.threads);
  const Examples<S> examples(batch, S * out_features);
  const int64_t sum_rows = round_up(out_features, R), blocks = ceil_div(in_features, kBlock<T>);

  // A block of input features at a time: its input gradient, and its columns of the weight gradient.
  parallel_for(op.threads, blocks, [&, batch = batch, in_features = in_features, out_features = out_features](int64_t block) {
    const int64_t c = block * kBlock<T>, columns = std::min(in_features - c, kBlock<T>);
    with_vectors<T>(columns, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * kLanes<T>;
      if (op.grad_lower_in) {
        T* product = scratch<T>(Slot::kProduct, round_up(batch, kLanes<T>) * S * N);
        multiply<T, S, V>(
            gradient, examples, out_features,
            [&](int64_t begin, int64_t depth, T* panel) { pack_straight<T>(op.weight, begin, c, columns, depth, N, panel); }, product);
        const Target<T> target{{op.grad_lower_in, op.grad_upper_in, op.grad_nominal_in}, 1, in_features};
        unpack<T>(InputGradient<T, S>{}, product, N, c, columns, batch, target);
      }
      if (op.grad_weight) {
        T* signed_sum = scratch<T>(Slot::kSumA, sum_rows * N);
        T* absolute_sum = scratch<T>(Slot::kSumB, sum_rows * N);
        std::fill_n(signed_sum, sum_rows * N, T{0});
        std::fill_n(absolute_sum, sum_rows * N, T{0});
        T* source = scratch<T>(Slot::kSource, std::min(batch, kExamples) * S * N);
        for (int64_t begin = 0; begin < batch; begin += kExamples) {
          const int64_t count = std::min(batch - begin, kExamples);
          pack_matrix<T>(CenterRadius<T, S>{}, {op.lower, op.upper, op.nominal}, batch, in_features, begin, count, c, columns, N, source);
          for (int64_t o = 0; o < out_features; o += R) {
            int64_t offsets[R];
            for (int j = 0; j < R; ++j) offsets[j] = std::min(o + j, out_features - 1);
            outer_tile<T, S, V>({source, 0, S * N, N}, {gradient + begin * S * out_features, 0, S * out_features, out_features}, offsets,
                                1, count, N, signed_sum + o * N, absolute_sum + o * N);
          }
        }
        for (int64_t o = 0; o < out_features; ++o) {
          const T* w = op.weight.data + o * op.weight.stride[0] + c * op.weight.stride[1];
          for (int64_t i = 0; i < columns; ++i)
            op.grad_weight[o * in_features + c + i] = signed_sum[o * N + i] + sign(w[i * op.weight.stride[1]]) * absolute_sum[o * N + i];
        }
      }
    });
  });
  if (op.grad_bias) {
    double* sums = scratch<double>(Slot::kWidth, out_features);
    std::fill_n(sums, out_features, 0.0);
    for (int64_t n = 0; n < batch; ++n)
      for (int s = 0; s < S; s += 2) {
        const T* p = gradient + (n * S + s) * out_features;
        for (int64_t o = 0; o < out_features; ++o) sums[o] += static_cast<double>(p[o]);
      }
    for (int64_t o = 0; o < out_features; ++o) op.grad_bias[o] = static_cast<T>(sums[o]);
  }
}

template <class T, int S, bool WIDTH>
void backward(const LinearBackward<T>& op) {
  std::array<Tensor2<const T>, kMaxSources> sources{op.grad_lower, op.grad_upper};
  if (S == 3) sources[2] = op.grad_nominal;
  if (WIDTH) {
    sources[S] = op.lower_out;
    sources[S + 1] = op.upper_out;
  }
  gradients<T>(op, OutputGradient<T, S, WIDTH>{op.grad_width}, sources);
}

}  // namespace

template <class T>
void linear_forward(const LinearForward<T>& op) {
  op.nominal.data ? forward<T, 3>(op) : forward<T, 2>(op);
}

template <class T>
void linear_backward(const LinearBackward<T>& op) {
  if (op.nominal.data)
    op.lower_out.data ? backward<T, 3, true>(op) : backward<T, 3, false>(op);
  else
    op.lower_out.data ? backward<T, 2, true>(op) : backward<T, 2, false>(op);
}

template void linear_forward(const LinearForward<float>&);
template void linear_forward(const LinearForward<double>&);
template void linear_backward(const LinearBackward<float>&);
template void linear_backward(const LinearBackward<double>&);

}  // namespace cibp
