#include "train.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "../loss.h"
#include "../parallel.h"
#include "../vec.h"

namespace cibp {
namespace {

constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kAdamEps = 1e-8;
constexpr int64_t kChunk = 4096;  // elements that a thread takes at a time

// Part of a parameter, with its gradient.
struct Chunk {
  Parameter parameter;
  const float* gradient;
};

std::vector<Chunk> chunks(const Parameter& all, const float* gradient) {
  std::vector<Chunk> parts;
  for (int64_t at = 0; at < all.size; at += kChunk)
    parts.push_back(
        {{all.value + at, all.first + at, all.second + at, std::min(kChunk, all.size - at)},
         gradient + at});
  return parts;
}

void adam(const Chunk& chunk, double lr, int64_t number) {
  const double exponent = static_cast<double>(number);
  const auto rate = static_cast<float>(lr / (1 - std::pow(kBeta1, exponent)));
  const auto root = static_cast<float>(std::sqrt(1 - std::pow(kBeta2, exponent)));
  const Parameter& p = chunk.parameter;
  for (int64_t i = 0; i < p.size; ++i) {
    const float g = chunk.gradient[i];
    const float first = p.first[i] + static_cast<float>(1 - kBeta1) * (g - p.first[i]);
    const float second =
        static_cast<float>(kBeta2) * p.second[i] + static_cast<float>(1 - kBeta2) * g * g;
    p.first[i] = first;
    p.second[i] = second;
    p.value[i] -= rate * first / (std::sqrt(second) / root + static_cast<float>(kAdamEps));
  }
}

// The part of the batch whose nominal prediction is not its label.
double error(const float* logits, const int64_t* labels, int64_t batch, int64_t classes) {
  int64_t wrong = 0;
  for (int64_t n = 0; n < batch; ++n, logits += classes) {
    const bool nan = std::any_of(logits, logits + classes, [](float z) { return std::isnan(z); });
    wrong += nan || std::max_element(logits, logits + classes) - logits != labels[n];
  }
  return static_cast<double>(wrong) / static_cast<double>(batch);
}

}  // namespace

template <class E>
struct TrainStep<E>::State {
  Training given;
  Network<E> network;
  LinearShape head;
  std::vector<size_t> counted;  // layers whose widths count
  std::vector<float> tables, radius;
  std::vector<int64_t> labels;
  // of the forward pass: see NetworkForward
  std::unique_ptr<std::byte, decltype(&std::free)> saved{nullptr, &std::free};
  std::vector<float> lower, upper, logits, head_lower, head_upper, widths;
  // of the loss, and gradients
  std::vector<float> slopes, nothing, grad_logits, grad_lower, grad_upper, grad_widths;
  std::vector<float> gradients, head_weight, head_bias;
  std::vector<float*> grad_weights, grad_biases;  // [layers], in `gradients`
  std::vector<Chunk> chunks;

  explicit State(const Training& training)
      : given(training), network(training.layers, training.ball ? Given::kBalls : Given::kBoxes) {
    const Shape& in = given.layers.front().shape;
    const Shape& last = given.layers.back().shape;
    const auto batch = static_cast<size_t>(in.batch);
    const int64_t features = last.in_channels * last.in_height * last.in_width;
    head = {in.batch, features, last.out_channels};
    const size_t outputs = batch * static_cast<size_t>(head.out_features);
    const size_t inputs = batch * static_cast<size_t>(features);

    tables.resize(static_cast<size_t>(3 * in.in_channels * 256));
    radius.resize(static_cast<size_t>(in.in_channels));
    labels.resize(batch);
    const size_t line = 64;
    const size_t bytes = static_cast<size_t>(network.saved_bytes()) + 1;
    saved.reset(
        static_cast<std::byte*>(std::aligned_alloc(line, (bytes + line - 1) / line * line)));
    if (!saved) throw std::bad_alloc();
    for (auto* each : {&lower, &upper, &logits, &nothing, &grad_logits}) each->resize(outputs);
    slopes.resize(2 * outputs);
    for (auto* each : {&head_lower, &head_upper, &grad_lower, &grad_upper}) each->resize(inputs);
    widths.resize(given.layers.size());
    grad_widths.resize(given.layers.size());

    int64_t size = 0;
    for (const auto* each : {&given.weights, &given.biases})
      for (const Parameter& parameter : *each)
        if (parameter.value) size += parameter.size;
    gradients.resize(static_cast<size_t>(size));
    float* next = gradients.data();
    const auto place = [&](const Parameter& parameter, std::vector<float*>& to) {
      to.push_back(parameter.value ? next : nullptr);
      if (!parameter.value) return;
      const std::vector<Chunk> parts = cibp::chunks(parameter, next);
      chunks.insert(chunks.end(), parts.begin(), parts.end());
      next += parameter.size;
    };
    for (size_t i = 0; i < given.layers.size(); ++i) {
      place(given.weights[i], grad_weights);
      place(given.biases[i], grad_biases);
      if (given.layers[i].relu || i + 1 == given.layers.size()) counted.push_back(i);
    }
    for (const size_t i : counted) grad_widths[i] = static_cast<float>(given.width_weight);
    head_weight.resize(static_cast<size_t>(given.weights.back().size));
    head_bias.resize(static_cast<size_t>(head.out_features));
  }

  // Center, radius and nominal of each byte, as Interval.ball and models.Normalize compute them.
  void fill_tables(float eps) {
    const auto size = tables.size() / 3;
    std::fill(radius.begin(), radius.end(), eps);
    for (size_t c = 0; given.scale && c < radius.size(); ++c) radius[c] = eps / given.scale[c];
    for (size_t i = 0; i < size; ++i) {
      float x = given.pixels[i];
      float low = std::min(std::max(x - eps, given.least), given.greatest);
      float high = std::min(std::max(x + eps, given.least), given.greatest);
      for (float* each : {&x, &low, &high})
        if (given.scale) *each = (*each - given.center[i / 256]) / given.scale[i / 256];
      tables[i] = 0.5f * low + 0.5f * high;
      tables[size + i] = 0.5f * high - 0.5f * low;
      tables[2 * size + i] = x;
    }
  }

  static std::vector<const float*> values(const std::vector<Parameter>& parameters) {
    std::vector<const float*> all;
    for (const Parameter& parameter : parameters) all.push_back(parameter.value);
    return all;
  }
};

template <class E>
TrainStep<E>::TrainStep(const Training& training) : state_(std::make_shared<State>(training)) {}

template <class E>
bool TrainStep<E>::run(const TrainingStep& step, double* totals) {
  State& s = *state_;
  const Training& given = s.given;
  const int64_t batch = s.head.batch;
  const int32_t* plan = given.plan + 4 * step.first;
  for (int64_t n = 0; n < batch; ++n) s.labels[static_cast<size_t>(n)] = given.labels[plan[4 * n]];
  s.fill_tables(static_cast<float>(step.eps));
  const Images<float> images{given.images, plan, s.tables.data()};
  const std::vector<const float*> weights = State::values(given.weights);
  const float* ball = given.ball ? s.radius.data() : nullptr;
  s.network.forward({step.threads,
                     weights,
                     State::values(given.biases),
                     {},
                     {},
                     {},
                     ball,
                     &images,
                     given.mean,
                     s.saved.get(),
                     s.lower.data(),
                     s.upper.data(),
                     s.logits.data(),
                     s.head_lower.data(),
                     s.head_upper.data(),
                     s.widths.data()});

  float nominal = 0, robust = 0;
  const float *weight = weights.back(), *bias = given.biases.back().value;
  if (!loss_forward<float>({s.head, step.threads, s.logits.data(), s.head_lower.data(),
                            s.head_upper.data(), weight, bias, s.labels.data(), &nominal, &robust,
                            s.slopes.data()}))
    return false;
  const auto of_nominal = static_cast<float>(step.kappa);
  const auto of_robust = static_cast<float>(1 - step.kappa);
  loss_backward<float>({s.head, step.threads, &of_nominal, &of_robust, s.head_lower.data(),
                        s.head_upper.data(), weight, s.labels.data(), s.slopes.data(),
                        s.grad_logits.data(), s.grad_lower.data(), s.grad_upper.data(),
                        s.head_weight.data(), bias ? s.head_bias.data() : nullptr});
  s.network.backward({step.threads, weights, ball, given.mean, s.saved.get(), s.lower.data(),
                      s.upper.data(), s.nothing.data(), s.nothing.data(), s.grad_logits.data(),
                      s.grad_lower.data(), s.grad_upper.data(),
                      given.width_weight > 0 ? s.grad_widths.data() : nullptr, nullptr, nullptr,
                      nullptr, s.grad_weights, s.grad_biases});
  for (size_t i = 0; i < s.head_weight.size(); ++i) s.grad_weights.back()[i] += s.head_weight[i];
  for (size_t i = 0; bias && i < s.head_bias.size(); ++i) s.grad_biases.back()[i] += s.head_bias[i];
  parallel_for(step.threads, static_cast<int64_t>(s.chunks.size()),
               [&](int64_t i) { adam(s.chunks[static_cast<size_t>(i)], step.lr, step.number); });

  float width = 0;
  for (const size_t i : s.counted) width += s.widths[i];
  float loss = of_nominal * nominal + of_robust * robust;
  if (given.width_weight > 0) loss += static_cast<float>(given.width_weight) * width;
  *totals++ += loss;
  *totals++ += nominal;
  *totals++ += robust;
  *totals++ += width;
  *totals++ += error(s.logits.data(), s.labels.data(), batch, s.head.out_features);
  for (const size_t i : s.counted) *totals++ += s.widths[i];
  return true;
}

template <class E>
int64_t TrainStep<E>::saved_bytes() const {
  return state_->network.saved_bytes();
}

template class TrainStep<float>;
template class TrainStep<BFloat16>;

}  // namespace cibp
