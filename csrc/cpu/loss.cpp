#include "loss.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "tile.h"

namespace cibp {
namespace {

bool in_range(const int64_t* labels, const LinearShape& shape) {
  return std::all_of(labels, labels + shape.batch,
                     [&](int64_t label) { return label >= 0 && label < shape.out_features; });
}

// Features with the zeros that fill the last vector.
template <class T>
int64_t padded(const LinearShape& shape) {
  return ceil_div(shape.in_features, kLanes<T>) * kLanes<T>;
}

// The weights [C, padded], in the calling thread's memory.
template <class T>
const T* padded_weight(const LinearShape& shape, const T* weight) {
  const int64_t width = padded<T>(shape);
  T* rows = scratch<T>(Slot::kPanel, shape.out_features * width);
  for (int64_t j = 0; j < shape.out_features; ++j) {
    T* end = std::copy_n(weight + j * shape.in_features, shape.in_features, rows + j * width);
    std::fill(end, rows + (j + 1) * width, T{0});
  }
  return rows;
}

// Center and radius [padded] of an example's box.
template <class T>
struct Ball {
  T *center, *radius;
  Ball(const LinearShape& shape)
      : center(scratch<T>(Slot::kSource, 2 * padded<T>(shape))),
        radius(center + padded<T>(shape)) {}
  void read(const LinearShape& shape, const T* lower, const T* upper, int64_t n) {
    for (int64_t k = 0; k < shape.in_features; k += kLanes<T>) {
      const int64_t at = n * shape.in_features + k;
      const int64_t count = std::min<int64_t>(kLanes<T>, shape.in_features - k);
      const Vec<T> low = T(0.5) * load_some(lower + at, count);
      const Vec<T> high = T(0.5) * load_some(upper + at, count);
      store<T>(center + k, high + low);
      store<T>(radius + k, high - low);
    }
  }
};

template <class T>
void worst_logits(const LossForward<T>& op, const T* weight, const Ball<T>& ball, int64_t label,
                  T* worst) {
  constexpr int kRows = 4;  // so many sums in registers that none waits for itself
  const int64_t width = padded<T>(op.shape), classes = op.shape.out_features;
  for (int64_t first = 0; first < classes; first += kRows) {
    const T* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = weight + std::min(first + i, classes - 1) * width;
    Vec<T> centers[kRows]{}, radii[kRows]{};
    for (int64_t k = 0; k < width; k += kLanes<T>) {
      const Vec<T> own = load(weight + label * width + k);
      const Vec<T> center = load(ball.center + k), radius = load(ball.radius + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> difference = load(rows[i] + k) - own;
        centers[i] += difference * center;
        radii[i] += absolute<T>(difference) * radius;
      }
    }
    for (int64_t j = first; j < std::min(first + kRows, classes); ++j)
      worst[j] = sum<T>(centers[j - first] + radii[j - first]) +
                 (op.bias ? op.bias[j] - op.bias[label] : T{0});
  }
  worst[label] = 0;
}

// Of one example; `slopes`, which may be `logits`, becomes the derivative by the logits.
template <class T>
T cross_entropy(const T* logits, int64_t classes, int64_t label, T* slopes) {
  const T greatest = *std::max_element(logits, logits + classes);  // a NaN shows in the sum
  const T own = logits[label] - greatest;
  T total = 0;
  for (int64_t j = 0; j < classes; ++j) total += slopes[j] = std::exp(logits[j] - greatest);
  for (int64_t j = 0; j < classes; ++j) slopes[j] /= total;
  slopes[label] -= 1;
  return std::log(total) - own;
}

}  // namespace

template <class T>
bool loss_forward(const LossForward<T>& op) {
  const int64_t batch = op.shape.batch, classes = op.shape.out_features;
  if (!in_range(op.labels, op.shape)) return false;
  double* sums = scratch<double>(Slot::kWidth, 2 * op.threads);
  std::fill_n(sums, 2 * op.threads, 0.0);
  parallel(op.threads, [&](int index, int parts) {
    const T* weight = padded_weight(op.shape, op.weight);
    Ball<T> ball(op.shape);
    double nominal = 0, robust = 0;
    const Part part(batch, index, parts);
    for (int64_t n = part.begin; n < part.end; ++n) {
      const int64_t label = op.labels[n], row = n * classes;
      nominal += cross_entropy(op.logits + row, classes, label, op.slopes + row);
      T* worst = op.slopes + batch * classes + row;
      ball.read(op.shape, op.lower, op.upper, n);
      worst_logits(op, weight, ball, label, worst);
      robust += cross_entropy(worst, classes, label, worst);
      worst[label] = 0;  // the worst-case logit at the label is constant
    }
    sums[2 * index] = nominal;
    sums[2 * index + 1] = robust;
  });
  double nominal = 0, robust = 0;
  for (int i = 0; i < op.threads; ++i) {
    nominal += sums[2 * i];
    robust += sums[2 * i + 1];
  }
  *op.nominal = static_cast<T>(nominal / static_cast<double>(batch));
  *op.robust = static_cast<T>(robust / static_cast<double>(batch));
  return true;
}

template <class T>
bool loss_backward(const LossBackward<T>& op) {
  const int64_t batch = op.shape.batch, classes = op.shape.out_features,
                features = op.shape.in_features;
  const int64_t width = padded<T>(op.shape);
  if (!in_range(op.labels, op.shape)) return false;
  const auto scale = [&](const T* gradient) {
    return gradient ? *gradient / static_cast<T>(batch) : T{0};
  };
  if (op.grad_logits) {
    const T nominal = scale(op.grad_nominal);
    for (int64_t i = 0; i < batch * classes; ++i) op.grad_logits[i] = nominal * op.slopes[i];
  }
  if (!op.grad_lower && !op.grad_weight && !op.grad_bias) return true;

  const T robust = scale(op.grad_robust);
  const int64_t size = classes * (width + 1);  // of weight and bias
  T* sums = scratch<T>(Slot::kSumA, op.threads * size);
  std::fill_n(sums, op.threads * size, T{0});
  parallel(op.threads, [&](int index, int parts) {
    const T* weight = padded_weight(op.shape, op.weight);
    T* weight_sum = sums + index * size;
    T* bias_sum = weight_sum + classes * width;
    T* slopes = scratch<T>(Slot::kBias, classes);
    Ball<T> ball(op.shape);
    const Part part(batch, index, parts);
    for (int64_t n = part.begin; n < part.end; ++n) {
      const int64_t label = op.labels[n];
      T total = 0;
      for (int64_t j = 0; j < classes; ++j) {
        slopes[j] = robust * op.slopes[(batch + n) * classes + j];
        bias_sum[j] += slopes[j];
        total += slopes[j];
      }
      bias_sum[label] -= total;
      ball.read(op.shape, op.lower, op.upper, n);
      for (int64_t k = 0; k < width; k += kLanes<T>) {
        const Vec<T> own = load(weight + label * width + k);
        const Vec<T> center = load(ball.center + k), radius = load(ball.radius + k);
        Vec<T> by_own{}, by_lower{}, by_upper{};
        for (int64_t j = 0; j < classes; ++j) {  // at the label both factors are 0
          const Vec<T> difference = load(weight + j * width + k) - own;
          const Vec<T> worst = difference > 0 ? radius : difference < 0 ? -radius : Vec<T>{};
          const Vec<T> by_difference = slopes[j] * (center + worst);
          store<T>(weight_sum + j * width + k, load(weight_sum + j * width + k) + by_difference);
          by_own += by_difference;
          const Vec<T> positive = difference > 0 ? difference : Vec<T>{};
          by_lower += slopes[j] * (difference - positive);
          by_upper += slopes[j] * positive;
        }
        T* of_label = weight_sum + label * width + k;
        store<T>(of_label, load(of_label) - by_own);
        if (!op.grad_lower) continue;
        const int64_t at = n * features + k, count = std::min<int64_t>(kLanes<T>, features - k);
        store_some<T>(op.grad_lower + at, by_lower, count);
        store_some<T>(op.grad_upper + at, by_upper, count);
      }
    }
  });
  const auto total = [&](int64_t i) {
    T result = 0;
    for (int part = 0; part < op.threads; ++part) result += sums[part * size + i];
    return result;
  };
  for (int64_t j = 0; j < classes; ++j) {
    if (op.grad_bias) op.grad_bias[j] = total(classes * width + j);
    for (int64_t k = 0; op.grad_weight && k < features; ++k)
      op.grad_weight[j * features + k] = total(j * width + k);
  }
  return true;
}

template bool loss_forward(const LossForward<float>&);
template bool loss_forward(const LossForward<double>&);
template bool loss_backward(const LossBackward<float>&);
template bool loss_backward(const LossBackward<double>&);

}  // namespace cibp
