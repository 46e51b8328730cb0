// Batch norm in training mode: the statistics of the nominal points, and the gradient through them.
//
// A value x becomes y = (x - mean) s + beta, s = gamma / sqrt(variance + eps), for center and
// nominal; its radius becomes |s| radius. Mean and variance are those of the nominal points of the
// batch. With g the gradient by y and M points of a channel,
//   A = sum of g of center and nominal         = the gradient by beta
//   D = sum of g (x - mean) of both, and of sign(s) g radius; D / sqrt(variance + eps): by gamma
//   by x of the nominal points: s g - s A / M - s D / (variance + eps) / M (x - mean)
//   by center: s g; by radius: |s| g
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "../vec.h"
#include "view.h"

namespace cibp {

// Mean and sum of squared deviations of nominal points, by channel.
class Statistics {
 public:
  explicit Statistics(int64_t channels)
      : mean_(static_cast<size_t>(channels)), squares_(static_cast<size_t>(channels)) {}

  // Adds those of an example's value.
  template <class E>
  void add(const Layer<E>& place, const E* value) {
    using T = Number<E>;
    constexpr int L = kLanes<T>;
    const Geometry& g = place.in;
    const auto pixels = static_cast<double>(g.rows * g.columns);
    // sums[lane] of f(points); in double from row to row
    const auto sums_of = [&](int64_t channel, double* sums, const auto& f) {
      for (int i = 0; i < L; ++i) sums[i] = 0;
      for (int64_t y = 0; y < g.rows; ++y) {
        Vec<T> row{};
        const E* from = value + g.offset(y, 0) + 2 * g.stream_stride() + channel;
        for (int64_t x = 0; x < g.columns; ++x) row += f(numbers(from + x * g.pitch));
        for (int i = 0; i < L; ++i) sums[i] += static_cast<double>(row[i]);
      }
    };
    for (int64_t c = 0; c < g.pitch; c += L) {
      double totals[L], squares[L];
      sums_of(c, totals, [](Vec<T> x) { return x; });
      Vec<T> near;  // the mean, rounded
      for (int i = 0; i < L; ++i) near[i] = static_cast<T>(totals[i] / pixels);
      sums_of(c, squares, [&](Vec<T> x) { return (x - near) * (x - near); });
      for (int i = 0; i < L; ++i) {
        const double mean = totals[i] / pixels, off = static_cast<double>(near[i]) - mean;
        join(static_cast<size_t>(c + i), pixels, mean, squares[i] - pixels * off * off);
      }
    }
    count_ += pixels;
  }

  void add(const Statistics& other) {
    if (other.count_ == 0) return;
    for (size_t c = 0; c < mean_.size(); ++c)
      join(c, other.count_, other.mean_[c], other.squares_[c]);
    count_ += other.count_;
  }

  double mean(size_t channel) const { return mean_[channel]; }
  double variance(size_t channel) const { return squares_[channel] / count_; }  // biased

 private:
  void join(size_t c, double count, double mean, double squares) {
    const double all = count_ + count, apart = mean - mean_[c];
    mean_[c] += apart * count / all;
    squares_[c] += squares + apart * apart * count_ * count / all;
  }

  double count_ = 0;
  std::vector<double> mean_, squares_;
};

// The norm of a value, from its statistics [channels]; gamma and beta may be null.
template <class T>
Norm<T> norm_of(int64_t channels, int64_t padded, double eps, const T* mean, const T* variance,
                const T* gamma, const T* beta) {
  const auto size = static_cast<size_t>(padded);
  Norm<T> norm{std::vector<T>(size), std::vector<T>(size), std::vector<T>(size),
               std::vector<T>(size)};
  for (int64_t c = 0; c < channels; ++c) {
    const auto i = static_cast<size_t>(c);
    const double root = std::sqrt(static_cast<double>(variance[c]) + eps);
    norm.mean[i] = mean[c];
    norm.scale[i] = static_cast<T>((gamma ? static_cast<double>(gamma[c]) : 1.0) / root);
    norm.shift[i] = beta ? beta[c] : T{0};
    norm.spread[i] = std::isinf(norm.shift[i]) ? T{0} : std::abs(norm.scale[i]);
  }
  return norm;
}

// What turns the gradient by a norm's output into that by its input.
template <class T>
struct NormGradient {
  // of the nominal points: + constant + linear (x - mean); empty: nothing, of fixed statistics
  std::vector<T> constant, linear;
};

// In place, of one vector; value: of the norm's input.
template <class T>
[[gnu::always_inline]] inline void denormalize(const Norm<T>& norm, const NormGradient<T>& by,
                                               int64_t channel, const Vec<T>* value,
                                               Vec<T>* gradient) {
  const auto c = static_cast<size_t>(channel);
  const Vec<T> scale = load(&norm.scale[c]);
  gradient[0] *= scale;
  gradient[1] *= load(&norm.spread[c]);
  gradient[2] *= scale;
  if (!by.linear.empty())
    gradient[2] += load(&by.constant[c]) + load(&by.linear[c]) * (value[2] - load(&norm.mean[c]));
}

// The gradients of a norm's gamma and beta (null: not wanted), and by its input; variance: as in
// norm_of; parts: the sums of all parts of the batch; points: of a channel.
template <class T>
NormGradient<T> norm_gradient(int64_t channels, int64_t padded, double points, const Norm<T>& norm,
                              double eps, const T* variance, const std::vector<NormSums<T>>& parts,
                              T* grad_gamma, T* grad_beta) {
  const auto size = static_cast<size_t>(padded);
  NormGradient<T> out{std::vector<T>(size), std::vector<T>(size)};
  for (int64_t channel = 0; channel < channels; ++channel) {
    const auto c = static_cast<size_t>(channel);
    double ones = 0, whole = 0;
    const auto scale = static_cast<double>(norm.scale[c]);
    for (const NormSums<T>& own : parts) {
      const double radii = own.radii(channel);
      ones += own.ones(channel);
      whole += own.deviations(channel) + (scale < 0 ? -radii : scale > 0 ? radii : 0);
    }
    const double spread = static_cast<double>(variance[channel]) + eps;
    if (grad_gamma) grad_gamma[channel] = static_cast<T>(whole / std::sqrt(spread));
    if (grad_beta) grad_beta[channel] = static_cast<T>(ones);
    out.constant[c] = static_cast<T>(-scale * ones / points);
    out.linear[c] = static_cast<T>(-scale * whole / spread / points);
  }
  return out;
}

}  // namespace cibp
