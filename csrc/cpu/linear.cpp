// Matrix products over packed streams, [example][stream][feature].
//
// The weights are read once, a block of columns (a vector or two) at a time, transposed where the
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

// Products summed in registers before the sums go back to memory: a block of weights of this depth
// stays in the first-level cache.
constexpr int64_t kDepth = 256;

// Examples of one weight gradient block, and input features that a thread reads at once: whole
// pages of the weights and the inputs are touched for a vector or two otherwise.
constexpr int64_t kExamples = 64;
constexpr int64_t kColumns = 128;

template <class T>
using Sources = std::array<Tensor2<const T>, kMaxSources>;

// Packs `count` rows and `channels` columns of the sources, [rows, columns] each, into
// [example][stream][pitch].
template <class T, class Prologue>
void pack_matrix(const Prologue& prologue, const Sources<T>& sources, int64_t rows, int64_t columns,
                 int64_t row, int64_t count, int64_t column, int64_t channels, int64_t pitch,
                 T* out) {
  Plane<T> planes[Prologue::SOURCES];
  for (int k = 0; k < Prologue::SOURCES; ++k) {
    const Tensor2<const T>& t = sources[k];
    planes[k] = {t.data + row * t.stride[0] + column * t.stride[1], t.stride[1], t.stride[0],
                 t.data + (rows - 1) * t.stride[0] + (columns - 1) * t.stride[1] + 1};
  }
  pack(prologue, planes, channels, count, Prologue::STREAMS * pitch, pitch, out);
}

// All rows of the sources, packed by all threads.
template <class T, class Prologue>
const T* pack_all(const Prologue& prologue, const Sources<T>& sources, int64_t rows,
                  int64_t columns, int64_t pitch, Slot slot, int threads) {
  T* packed = scratch<T>(slot, rows * Prologue::STREAMS * pitch);
  const int64_t parts = std::min<int64_t>(rows, 4 * threads);
  parallel_for(threads, parts, [&](int64_t i) {
    const Part part(rows, static_cast<int>(i), static_cast<int>(parts));
    pack_matrix<T>(prologue, sources, rows, columns, part.begin, part.end - part.begin, 0, columns,
                   pitch, packed + part.begin * Prologue::STREAMS * pitch);
  });
  return packed;
}

// panel[k][o] = matrix[row + o][column + k] for `outputs` (at most block) o and `depth` k; zeros up
// to `block`.
template <class T>
void pack_transposed(const Tensor2<const T>& matrix, int64_t row, int64_t column, int64_t outputs,
                     int64_t depth, int64_t block, T* panel) {
  constexpr int L = kLanes<T>;
  for (int64_t o = 0; o < block; o += L)
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t valid = std::min<int64_t>(L, outputs - o),
                    columns = std::min<int64_t>(L, depth - k);
      const T* p = matrix.data + (row + o) * matrix.stride[0] + (column + k) * matrix.stride[1];
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
          for (int64_t i = 0; i < L; ++i)
            target[j * block + i] =
                i < valid ? p[i * matrix.stride[0] + j * matrix.stride[1]] : T{0};
      }
    }
}

// The columns [column, column + columns) of the matrix as blocks, each [rows][block width], zeros
// past the columns.
template <class T>
void pack_blocks(const Tensor2<const T>& matrix, int64_t rows, int64_t column, int64_t columns,
                 T* blocks) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* p = matrix.data + row * matrix.stride[0] + column * matrix.stride[1];
    for_blocks<T>(columns, [&](int64_t c, auto vectors) {
      constexpr int64_t N = decltype(vectors)::value * kLanes<T>;
      T* target = blocks + c * rows + row * N;
      const int64_t count = std::min(N, columns - c);
      for (int64_t i = 0; i < count; ++i) target[i] = p[(c + i) * matrix.stride[1]];
      std::fill(target + count, target + N, T{0});
    });
  }
}

// product[example][stream][block] = packed[example][stream][depth] x the panel, [depth, block].
// panel(begin, count) gives `count` rows of it.
template <class T, int S, int V, class Panel>
void multiply(const T* packed, int64_t pitch, int64_t count, int64_t depth, const Panel& panel,
              T* product) {
  constexpr int P = kTilePixels<S>;
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const Run run{begin, 0, std::min(kDepth, depth - begin)};
    const T* weights = panel(begin, run.length);
    for (int64_t first = 0; first < count; first += P) {
      int64_t pixels[P], targets[P];
      for (int t = 0; t < P; ++t) {
        targets[t] = std::min(first + t, count - 1);  // the last tile repeats the last example
        pixels[t] = targets[t] * S * pitch;
      }
      multiply_tile<T, S, V>(packed, pixels, pitch, &run, 1, weights, targets, begin > 0, false,
                             product);
    }
  }
}

template <class T, int S>
void forward(const LinearForward<T>& op) {
  const int64_t batch = op.shape.batch, in_features = op.shape.in_features,
                out_features = op.shape.out_features;
  const T* packed = pack_all<T>(CenterRadius<T, S>{}, {op.lower, op.upper, op.nominal}, batch,
                                in_features, in_features, Slot::kSource, op.threads);
  T* bias = scratch<T>(Slot::kBias, out_features + kLanes<T>);
  std::fill_n(bias, out_features + kLanes<T>, T{0});
  if (op.bias) std::copy_n(op.bias, out_features, bias);

  // Few outputs leave threads idle: then the batch is divided as well.
  const int64_t blocks = ceil_div(out_features, kBlock<T>);
  const int64_t parts =
      std::max<int64_t>(1, std::min(batch / kTilePixels<S>, ceil_div(2 * op.threads, blocks)));
  double* widths = scratch<double>(Slot::kWidth, blocks * parts);
  parallel_for(op.threads, blocks * parts, [&](int64_t item) {
    const int64_t first = item / parts * kBlock<T>;
    const Part part(batch, static_cast<int>(item % parts), static_cast<int>(parts));
    const int64_t count = part.end - part.begin, at = part.begin * out_features;
    T* panel = scratch<T>(Slot::kPanel, kDepth * kBlock<T>);
    T* product = scratch<T>(Slot::kProduct, round_up(count, kLanes<T>) * S * kBlock<T>);
    const Target<T> target{
        {op.lower_out + at, op.upper_out + at, S == 3 ? op.nominal_out + at : nullptr},
        1,
        out_features};
    const int64_t columns = std::min(out_features - first, kBlock<T>);
    for_blocks<T>(columns, [&](int64_t, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const auto weights = [&](int64_t begin, int64_t depth) {
        pack_transposed<T>(op.weight, first, begin, columns, depth, V * kLanes<T>, panel);
        return panel;
      };
      multiply<T, S, V>(packed + part.begin * S * in_features, in_features, count, in_features,
                        weights, product);
      widths[item] =
          unpack<T>(Bounds<T, S>{bias}, product, V * kLanes<T>, first, columns, count, target);
    });
  });
  double total = 0;
  for (int64_t i = 0; i < blocks * parts; ++i) total += widths[i];
  *op.width = static_cast<T>(total);
}

// The columns [first, first + columns) of the weight gradient; weights: those of W as blocks.
template <class T, int S>
void weight_gradient(const LinearBackward<T>& op, const T* gradient, int64_t gradient_pitch,
                     int64_t first, int64_t columns, const T* weights) {
  constexpr int R = kTileRows;
  const int64_t batch = op.shape.batch, in_features = op.shape.in_features,
                out_features = op.shape.out_features;
  const int64_t sum_rows = round_up(out_features, R),
                sum_size = sum_rows * round_up(columns, kLanes<T>);
  const int64_t pitch = spread_pitch<T>(round_up(columns, kBlock<T>));
  T* signed_sums = scratch<T>(Slot::kSumA, sum_size);
  T* absolute_sums = scratch<T>(Slot::kSumB, sum_size);
  std::fill_n(signed_sums, sum_size, T{0});
  std::fill_n(absolute_sums, sum_size, T{0});
  T* source = scratch<T>(Slot::kSource, std::min(batch, kExamples) * S * pitch);
  for (int64_t begin = 0; begin < batch; begin += kExamples) {
    const int64_t count = std::min(batch - begin, kExamples);
    pack_matrix<T>(CenterRadius<T, S>{}, {op.lower, op.upper, op.nominal}, batch, in_features,
                   begin, count, first, columns, pitch, source);
    const Operand<T> scalars{gradient + begin * S * gradient_pitch, 0, S * gradient_pitch,
                             gradient_pitch};
    for_blocks<T>(columns, [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      constexpr int64_t N = V * kLanes<T>;
      for (int64_t o = 0; o < out_features; o += R) {
        int64_t offsets[R];
        for (int j = 0; j < R; ++j) offsets[j] = std::min(o + j, out_features - 1);
        const int64_t at = c * sum_rows + o * N;
        const Operand<T> vector{source + c, 0, S * pitch, pitch};
        outer_tile<T, 0, S, V>(vector, scalars, offsets, 1, count, signed_sums + at);
        outer_tile<T, 1, S, V>(vector, scalars, offsets, 1, count, absolute_sums + at);
      }
    });
  }
  for (int64_t o = 0; o < out_features; ++o)
    for_blocks<T>(columns, [&](int64_t c, auto vectors) {
      constexpr int64_t N = decltype(vectors)::value * kLanes<T>;
      const int64_t at = c * sum_rows + o * N, count = std::min(N, columns - c);
      const T* w = weights + c * out_features + o * N;
      T* target = op.grad_weight + o * in_features + first + c;
      for (int64_t i = 0; i < count; ++i)
        target[i] = signed_sums[at + i] + sign(w[i]) * absolute_sums[at + i];
    });
}

template <class T, int S>
void bias_gradient(const LinearBackward<T>& op, const T* gradient, int64_t pitch) {
  const int64_t out_features = op.shape.out_features;
  double* sums = scratch<double>(Slot::kWidth, out_features);
  std::fill_n(sums, out_features, 0.0);
  for (int64_t n = 0; n < op.shape.batch; ++n)
    for (int s = 0; s < S; s += 2) {
      const T* p = gradient + (n * S + s) * pitch;
      for (int64_t o = 0; o < out_features; ++o) sums[o] += static_cast<double>(p[o]);
    }
  for (int64_t o = 0; o < out_features; ++o) op.grad_bias[o] = static_cast<T>(sums[o]);
}

template <class T, int S, bool WIDTH>
void backward(const LinearBackward<T>& op) {
  const int64_t batch = op.shape.batch, in_features = op.shape.in_features,
                out_features = op.shape.out_features;
  Sources<T> sources{op.grad_lower, op.grad_upper};
  if (S == 3) sources[2] = op.grad_nominal;
  if (WIDTH) {
    sources[S] = op.lower_out;
    sources[S + 1] = op.upper_out;
  }
  const int64_t pitch = spread_pitch<T>(out_features);
  const T* gradient = pack_all<T>(OutputGradient<T, S, WIDTH>{op.grad_width}, sources, batch,
                                  out_features, pitch, Slot::kGradient, op.threads);

  // Columns of W at a time: their input gradient and their weight gradient.
  parallel_for(op.threads, ceil_div(in_features, kColumns), [&](int64_t item) {
    const int64_t first = item * kColumns, columns = std::min(in_features - first, kColumns);
    T* weights = scratch<T>(Slot::kPanel, out_features * round_up(columns, kBlock<T>));
    pack_blocks<T>(op.weight, out_features, first, columns, weights);
    if (op.grad_lower_in) {
      T* product = scratch<T>(Slot::kProduct, round_up(batch, kLanes<T>) * S * kBlock<T>);
      const Target<T> target{
          {op.grad_lower_in, op.grad_upper_in, op.grad_nominal_in}, 1, in_features};
      for_blocks<T>(columns, [&](int64_t c, auto vectors) {
        constexpr int V = decltype(vectors)::value;
        constexpr int64_t N = V * kLanes<T>;
        const T* block = weights + c * out_features;
        multiply<T, S, V>(
            gradient, pitch, batch, out_features,
            [&](int64_t begin, int64_t) { return block + begin * N; }, product);
        unpack<T>(InputGradient<T, S>{}, product, N, first + c, std::min(N, columns - c), batch,
                  target);
      });
    }
    if (op.grad_weight) weight_gradient<T, S>(op, gradient, pitch, first, columns, weights);
  });
  if (op.grad_bias) bias_gradient<T, S>(op, gradient, pitch);
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
