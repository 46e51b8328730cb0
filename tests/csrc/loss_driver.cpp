// Random cross-entropies against the same in double.
#include <cstring>

#include "cpu/loss.h"
#include "support.h"

namespace cibp::test {
namespace {

struct LossCase {
  LinearShape shape;
  int threads;
  bool bias, wants_logits, wants_box, wants_weight, wants_bias;
};

LossCase draw_loss(Random& random) {
  LossCase c;
  c.shape = {random.integer(1, 9), random.integer(1, 70), random.integer(1, 12)};
  c.threads = static_cast<int>(random.integer(1, 4));
  for (bool* flag : {&c.bias, &c.wants_logits, &c.wants_box, &c.wants_weight, &c.wants_bias})
    *flag = !random.one_in(4);
  return c;
}

template <class T>
struct Losses {
  std::vector<T> values, logits, lower, upper, weight, bias;  // values: nominal, robust
};

template <class T>
struct LossInputs {
  std::vector<T> logits, lower, upper, weight, bias;
  std::vector<int64_t> labels;
  T grad_nominal, grad_robust;
};

template <class T>
bool run(const LossCase& c, const LossInputs<T>& in, Losses<T>& out) {
  const auto [batch, features, classes] = c.shape;
  const auto make = [](bool wanted, int64_t size) {
    return unwritten<T>(wanted ? static_cast<size_t>(size) : 0);
  };
  out = {make(true, 2),
         make(c.wants_logits, batch * classes),
         make(c.wants_box, batch * features),
         make(c.wants_box, batch * features),
         make(c.wants_weight, classes * features),
         make(c.wants_bias, classes)};
  std::vector<T> slopes = make(true, 2 * batch * classes);
  const LossForward<T> forward{c.shape,
                               c.threads,
                               in.logits.data(),
                               in.lower.data(),
                               in.upper.data(),
                               in.weight.data(),
                               c.bias ? in.bias.data() : nullptr,
                               in.labels.data(),
                               &out.values[0],
                               &out.values[1],
                               slopes.data()};
  const LossBackward<T> backward{c.shape,
                                 c.threads,
                                 &in.grad_nominal,
                                 &in.grad_robust,
                                 in.lower.data(),
                                 in.upper.data(),
                                 in.weight.data(),
                                 in.labels.data(),
                                 slopes.data(),
                                 data_of(out.logits),
                                 data_of(out.lower),
                                 data_of(out.upper),
                                 data_of(out.weight),
                                 data_of(out.bias)};
  return loss_forward(forward) && loss_backward(backward);
}

// The definition in loss.h, and its derivatives.
template <class T>
Losses<double> expected(const LossCase& c, const LossInputs<T>& in) {
  const auto [batch, features, classes] = c.shape;
  const auto zeros = [](int64_t size) { return Values(static_cast<size_t>(size)); };
  Losses<double> out{zeros(2),
                     zeros(batch * classes),
                     zeros(batch * features),
                     zeros(batch * features),
                     zeros(classes * features),
                     zeros(classes)};
  const auto at = [](const auto& values, int64_t i) {
    return static_cast<double>(values[static_cast<size_t>(i)]);
  };
  const auto add = [](Values& values, int64_t i, double x) { values[static_cast<size_t>(i)] += x; };
  const double share = 1 / static_cast<double>(batch);
  // Adds one cross-entropy; returns its derivatives by the logits.
  const auto cross_entropy = [&](const Values& logits, int64_t label, double& value) {
    const double greatest = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (const double z : logits) total += std::exp(z - greatest);
    value += share * (std::log(total) + greatest - at(logits, label));
    Values slopes;
    for (const double z : logits) slopes.push_back(share * std::exp(z - greatest) / total);
    add(slopes, label, -share);
    return slopes;
  };
  for (int64_t n = 0; n < batch; ++n) {
    const int64_t y = in.labels[static_cast<size_t>(n)];
    Values logits, worst;
    for (int64_t j = 0; j < classes; ++j) {
      logits.push_back(at(in.logits, n * classes + j));
      double z = j != y && c.bias ? at(in.bias, j) - at(in.bias, y) : 0;
      for (int64_t k = 0; k < features; ++k) {
        const double w = at(in.weight, j * features + k) - at(in.weight, y * features + k);
        const double low = at(in.lower, n * features + k), high = at(in.upper, n * features + k);
        z += w * (high + low) / 2 + std::abs(w) * (high - low) / 2;
      }
      worst.push_back(z);
    }
    const Values by_logits = cross_entropy(logits, y, out.values[0]);
    const Values by_worst = cross_entropy(worst, y, out.values[1]);
    for (int64_t j = 0; j < classes; ++j) {
      add(out.logits, n * classes + j, static_cast<double>(in.grad_nominal) * at(by_logits, j));
      if (j == y) continue;
      const double slope = static_cast<double>(in.grad_robust) * at(by_worst, j);
      add(out.bias, j, slope);
      add(out.bias, y, -slope);
      for (int64_t k = 0; k < features; ++k) {
        const double w = at(in.weight, j * features + k) - at(in.weight, y * features + k);
        const double corner = w > 0 ? at(in.upper, n * features + k)
                                    : at(in.lower, n * features + k);  // that is the worst
        add(w > 0 ? out.upper : out.lower, n * features + k, slope * w);
        add(out.weight, j * features + k, slope * corner);
        add(out.weight, y * features + k, -slope * corner);
      }
    }
  }
  return out;
}

template <class T>
bool check(const LossCase& c, Random& random) {
  const auto [batch, features, classes] = c.shape;
  const auto draw = [&](int64_t size) { return reals<T>(random, static_cast<size_t>(size)); };
  LossInputs<T> in;
  in.logits = draw(batch * classes);
  in.lower = in.upper = draw(batch * features);
  in.weight = draw(classes * features);
  in.bias = draw(classes);
  in.grad_nominal = static_cast<T>(random.real());
  in.grad_robust = static_cast<T>(random.real());
  for (T& value : in.upper) value += static_cast<T>(1 + random.real());
  for (int64_t n = 0; n < batch; ++n) in.labels.push_back(random.integer(0, classes - 1));
  Losses<T> found, again;
  if (!run(c, in, found) || !run(c, in, again)) {
    std::printf("MISMATCH in %s: labels are out of range\n", kName<T>);
    return false;
  }
  const Losses<double> exact = expected(c, in);
  // A worst-case logit sums at most 8 for each feature, and all derivatives are below 4 for each
  // example's class; roundings of both are of that size.
  const double limit =
      gamma<T>(8 * features + classes + batch + 32) * 8 * static_cast<double>(features) * 4;
  bool right = true;
  const auto compare = [&](const char* name, const std::vector<T>& values,
                           const std::vector<T>& others, const Values& wanted) {
    right = right &&
            close(name, values, [&](size_t i) { return wanted[i]; }, [&](size_t) { return limit; });
    if (!values.empty() &&
        std::memcmp(values.data(), others.data(), values.size() * sizeof(T)) != 0) {
      std::printf("MISMATCH of %s in %s: a second run differs\n", name, kName<T>);
      right = false;
    }
  };
  compare("cross-entropies", found.values, again.values, exact.values);
  compare("gradient of logits", found.logits, again.logits, exact.logits);
  compare("gradient of lower", found.lower, again.lower, exact.lower);
  compare("gradient of upper", found.upper, again.upper, exact.upper);
  compare("gradient of weight", found.weight, again.weight, exact.weight);
  compare("gradient of bias", found.bias, again.bias, exact.bias);
  in.labels.back() = random.one_in(2) ? classes : -1;
  if (run(c, in, again)) {
    std::printf("MISMATCH in %s: a label out of range is taken\n", kName<T>);
    right = false;
  }
  return right;
}

}  // namespace

int wrong_losses(int only) {
  return count_wrong(
      kLosses, only, [](Random& random, int) { return draw_loss(random); },
      [](int number, const LossCase& c) {
        std::printf("  in loss %d: %d x %d logits of %d features, %d threads\n", number,
                    static_cast<int>(c.shape.batch), static_cast<int>(c.shape.out_features),
                    static_cast<int>(c.shape.in_features), c.threads);
      },
      [](const auto& c, Random& random, auto zero) { return check<decltype(zero)>(c, random); });
}

}  // namespace cibp::test
