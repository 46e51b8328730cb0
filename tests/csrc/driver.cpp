// The CPU kernels without Python, to run under sanitizers (tests/test_sanitizers.py): random small
// layers and ReLU (here), whole networks (network_driver.cpp) and losses (loss_driver.cpp), forward
// and backward, against plain loops in double; and the threads (parallel_driver.cpp).
//
// driver [layer | network | loss [number] | threads]   all, or those of one kind, or one of them;
// the exit status says whether all agree
//
// lower <= upper is not asked for in layers: no formula needs it.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/linear.h"
#include "cpu/relu.h"
#include "support.h"

using namespace cibp;
using namespace cibp::test;

namespace {

constexpr int kCases = 200;
constexpr int64_t kMaxProducts = 400000;  // of a layer and stream: sanitized loops are slow

struct Case {
  bool linear;  // then the convolution of one pixel that it equals
  Shape shape;
  bool nominal, bias, width, wants_input, wants_weight;
};

Case draw_case(Random& random) {
  Case c{};
  c.nominal = random.one_in(2);
  c.bias = random.one_in(2);
  c.width = random.one_in(2);
  const int64_t wanted = random.integer(1, 3);
  c.wants_input = wanted & 1;
  c.wants_weight = wanted & 2;
  c.linear = random.one_in(4);
  for (;;) {
    Shape& s = c.shape;
    s = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
    s.batch = random.one_in(12) ? 0 : random.one_in(3) ? 1 : 2 * random.integer(1, 2) + 1;
    if (c.linear) {
      if (random.one_in(4)) s.batch = random.integer(1, 300);
      s.in_channels = random.integer(1, random.one_in(3) ? 600 : 70);
      s.out_channels = random.integer(1, random.one_in(3) ? 150 : 70);
    } else {
      const bool large = random.one_in(2);  // a large image or many channels
      s.groups = random.one_in(2) ? 1 : random.integer(2, 5);
      const int64_t channels = std::max<int64_t>(1, (large ? 12 : 70) / s.groups);
      s.in_channels =
          s.groups * random.integer(1, channels) + (s.groups == 1 && random.one_in(16) ? 256 : 0);
      s.out_channels = s.groups * random.integer(1, channels);
      for (const auto [in, out, kernel, stride, padding, dilation] :
           {std::array{&s.in_height, &s.out_height, &s.kernel_height, &s.stride_height,
                       &s.padding_height, &s.dilation_height},
            std::array{&s.in_width, &s.out_width, &s.kernel_width, &s.stride_width,
                       &s.padding_width, &s.dilation_width}}) {
        *in = random.integer(1, large ? 40 : 9);
        *kernel = random.integer(1, 5);
        *stride = random.integer(1, 3);
        *padding = random.integer(0, 3);
        *dilation = random.integer(1, 3);
        const int64_t room = *in + 2 * *padding - *dilation * (*kernel - 1) - 1;
        *out = room < 0 ? 0 : room / *stride + 1;
      }
    }
    const int64_t pixels = s.batch * s.out_channels * s.out_height * s.out_width;
    const int64_t products = pixels * s.in_channels / s.groups * s.kernel_height * s.kernel_width;
    if (s.out_height > 0 && s.out_width > 0 && products <= kMaxProducts) return c;
  }
}

template <class T>
struct Inputs {
  Argument<T> lower, upper, nominal, weight, bias, grad_lower, grad_upper, grad_nominal, lower_out,
      upper_out;
  T grad_width;

  Inputs(Random& random, const Shape& s)
      : Inputs(random, {s.batch, s.in_channels, s.in_height, s.in_width},
               {s.batch, s.out_channels, s.out_height, s.out_width},
               {s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width},
               draw_layout(random), draw_layout(random)) {}

 private:
  Inputs(Random& random, const Size& in, const Size& out, const Size& kernel, Layout layout,
         Layout grad_layout)
      : lower(random, in, layout),
        upper(random, in, layout),
        nominal(random, in, layout),
        weight(random, kernel, draw_layout(random)),
        bias(random, {1, 1, 1, kernel[0]}, Layout::kContiguous),
        grad_lower(random, out, grad_layout),
        grad_upper(random, out, grad_layout),
        grad_nominal(random, out, grad_layout),
        lower_out(random, out, grad_layout),
        upper_out(random, out, grad_layout),
        grad_width(static_cast<T>(random.real())) {}
};

// What an output should be, and the sum of the magnitudes of its terms, for support.h: gamma.
struct Expected {
  Values value, magnitude;
  explicit Expected(size_t size = 0) : value(size), magnitude(size) {}
  void add(int64_t i, double term, double size) {
    value[static_cast<size_t>(i)] += term;
    magnitude[static_cast<size_t>(i)] += size;
  }
  void add(int64_t i, double term) { add(i, term, std::abs(term)); }
};

// (a - b, a + b)
std::array<Expected, 2> bounds(const Expected& a, const Expected& b) {
  std::array<Expected, 2> result{a, a};
  for (size_t i = 0; i < a.value.size(); ++i) {
    result[0].add(static_cast<int64_t>(i), -b.value[i], b.magnitude[i]);
    result[1].add(static_cast<int64_t>(i), b.value[i], b.magnitude[i]);
  }
  return result;
}

struct Reference {
  std::array<Expected, 2> out, grad_in;  // lower, upper
  Expected nominal_out, grad_nominal_in, grad_weight, grad_bias;

  template <class T>
  Reference(const Case& c, const Inputs<T>& in) {
    const Shape& s = c.shape;
    const size_t inputs = in.lower.values.size(), outputs = in.grad_lower.values.size();
    const auto channel = [&](size_t i) {
      return static_cast<int64_t>(i) / (s.out_height * s.out_width) % s.out_channels;
    };
    Values center(inputs), radius(inputs);
    for (size_t i = 0; i < inputs; ++i) {
      center[i] = 0.5 * in.lower.values[i] + 0.5 * in.upper.values[i];
      radius[i] = 0.5 * in.upper.values[i] - 0.5 * in.lower.values[i];
    }
    Expected center_out(outputs), radius_out(outputs), grad_center(outputs), grad_radius(outputs);
    nominal_out = Expected(outputs);
    grad_bias = Expected(static_cast<size_t>(s.out_channels));
    for (size_t i = 0; i < outputs; ++i) {
      const int64_t at = static_cast<int64_t>(i);
      if (c.bias) {
        center_out.add(at, in.bias.values[static_cast<size_t>(channel(i))]);
        nominal_out.add(at, in.bias.values[static_cast<size_t>(channel(i))]);
      }
      grad_center.add(at, in.grad_lower.values[i] + in.grad_upper.values[i]);
      grad_radius.add(at, in.grad_upper.values[i] - in.grad_lower.values[i]);
      // d/dradius' of width = sum (upper' - lower')^2 = sum 4 radius'^2, times grad_width
      if (c.width)
        grad_radius.add(at, 4 * static_cast<double>(in.grad_width) *
                                (in.upper_out.values[i] - in.lower_out.values[i]));
      grad_bias.add(channel(i), grad_center.value[i]);
      if (c.nominal) grad_bias.add(channel(i), in.grad_nominal.values[i]);
    }
    Expected grad_center_in(inputs), grad_radius_in(inputs);
    grad_nominal_in = Expected(inputs);
    grad_weight = Expected(in.weight.values.size());
    for_products(s, [&](int64_t output, int64_t input, int64_t weight) {
      const size_t o = static_cast<size_t>(output), i = static_cast<size_t>(input);
      const double w = in.weight.values[static_cast<size_t>(weight)], sign = (w > 0) - (w < 0);
      center_out.add(output, w * center[i]);
      radius_out.add(output, std::abs(w) * radius[i]);
      nominal_out.add(output, w * in.nominal.values[i]);
      grad_center_in.add(input, w * grad_center.value[o]);
      grad_radius_in.add(input, std::abs(w) * grad_radius.value[o],
                         std::abs(w) * grad_radius.magnitude[o]);
      grad_nominal_in.add(input, w * in.grad_nominal.values[o]);
      grad_weight.add(weight, grad_center.value[o] * center[i]);
      grad_weight.add(weight, sign * grad_radius.value[o] * radius[i],
                      std::abs(sign * radius[i]) * grad_radius.magnitude[o]);
      if (c.nominal) grad_weight.add(weight, in.grad_nominal.values[o] * in.nominal.values[i]);
    });
    out = bounds(center_out, radius_out);
    for (Expected* e :
         {&grad_center_in,
          &grad_radius_in})  // lower and upper enter both of center and radius by half
      for (Values* v : {&e->value, &e->magnitude})
        for (double& x : *v) x *= 0.5;
    grad_in = bounds(grad_center_in, grad_radius_in);
  }
};

// `roundings` of each term.
template <class T>
bool agrees(const char* quantity, const std::vector<T>& found, const Expected& expected,
            int64_t roundings) {
  return close(
      quantity, found, [&](size_t i) { return expected.value[i]; },
      [&](size_t i) { return gamma<T>(roundings) * expected.magnitude[i]; });
}

template <class T>
struct Outputs {
  std::vector<T> lower, upper, nominal, width{std::numeric_limits<T>::quiet_NaN()};
  std::vector<T> grad_lower, grad_upper, grad_nominal, grad_weight, grad_bias;

  Outputs(const Case& c, const Inputs<T>& in) {
    const auto make = [](std::vector<T>& output, bool wanted, size_t size) {
      if (wanted) output = unwritten<T>(size);
    };
    const size_t inputs = in.lower.values.size(), outputs = in.grad_lower.values.size();
    make(lower, true, outputs);
    make(upper, true, outputs);
    make(nominal, c.nominal, outputs);
    make(grad_lower, c.wants_input, inputs);
    make(grad_upper, c.wants_input, inputs);
    make(grad_nominal, c.wants_input && c.nominal, inputs);
    make(grad_weight, c.wants_weight, in.weight.values.size());
    make(grad_bias, c.wants_weight && c.bias, in.bias.values.size());
  }
};

// The arguments of either op: they have the same members in the same order.
template <class Forward, class Backward, class Tensor, class Shape, class T>
std::pair<Forward, Backward> arguments(const Case& c, const Shape& shape, int threads,
                                       const Inputs<T>& in, Outputs<T>& out) {
  const Tensor lower = view<Tensor>(in.lower), upper = view<Tensor>(in.upper),
               weight = view<Tensor>(in.weight);
  const Tensor nominal = view<Tensor>(in.nominal, c.nominal);
  return {{shape, threads, lower, upper, nominal, weight, c.bias ? in.bias.block.data() : nullptr,
           out.lower.data(), out.upper.data(), out.nominal.data(), out.width.data()},
          {shape, threads, view<Tensor>(in.grad_lower), view<Tensor>(in.grad_upper),
           view<Tensor>(in.grad_nominal, c.nominal), view<Tensor>(in.lower_out, c.width),
           view<Tensor>(in.upper_out, c.width), in.grad_width, lower, upper, nominal, weight,
           out.grad_lower.data(), out.grad_upper.data(), out.grad_nominal.data(),
           out.grad_weight.data(), out.grad_bias.data()}};
}

template <class T>
bool check(const Case& c, const Inputs<T>& in, const Reference& expected, int threads) {
  const Shape& s = c.shape;
  Outputs<T> out(c, in);
  if (c.linear) {
    const auto [forward, backward] =
        arguments<LinearForward<T>, LinearBackward<T>, Tensor2<const T>>(
            c, LinearShape{s.batch, s.in_channels, s.out_channels}, threads, in, out);
    linear_forward(forward);
    linear_backward(backward);
  } else {
    const auto [forward, backward] =
        arguments<Conv2dForward<T>, Conv2dBackward<T>, Tensor4<const T>>(c, s, threads, in, out);
    conv2d_forward(forward);
    conv2d_backward(backward);
  }

  Expected width(1);  // of the bounds found, which are checked themselves
  for (size_t i = 0; i < out.lower.size(); ++i)
    width.add(0,
              std::pow(static_cast<double>(out.upper[i]) - static_cast<double>(out.lower[i]), 2));

  // Roundings of a term: center or radius 1; the gradient of radius' 3 (a difference, its product
  // with grad_width, the sum with another difference); n products in a sum n; each sum of two
  // results 1.
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t forward = 1 + s.in_channels / s.groups * taps + 2,
                backward = 3 + s.out_channels / s.groups * taps + 1;
  const int64_t pixels = s.batch * s.out_height * s.out_width, weights = 3 + 1 + 2 * pixels + 1;
  const int64_t squares = static_cast<int64_t>(
      out.lower.size());  // each of a rounded difference, and a last rounding to T
  bool good = agrees("lower'", out.lower, expected.out[0], forward);
  good &= agrees("upper'", out.upper, expected.out[1], forward);
  good &= agrees("nominal'", out.nominal, expected.nominal_out, forward);
  good &= agrees("width", out.width, width, 2 + squares + 1);
  good &= agrees("the gradient of lower", out.grad_lower, expected.grad_in[0], backward);
  good &= agrees("the gradient of upper", out.grad_upper, expected.grad_in[1], backward);
  good &= agrees("the gradient of nominal", out.grad_nominal, expected.grad_nominal_in, backward);
  good &= agrees("the gradient of weight", out.grad_weight, expected.grad_weight, weights);
  good &= agrees("the gradient of bias", out.grad_bias, expected.grad_bias, weights);
  if (!good) std::printf("  with %d threads\n", threads);
  return good;
}

template <class T>
bool check(const Case& c, Random& random) {
  const Inputs<T> in(random, c.shape);
  const Reference expected(c, in);
  const bool one = check(c, in, expected, 1), three = check(c, in, expected, 3);
  return one && three;
}

void describe(int number, const Case& c) {
  std::printf("  in case %d, %s: batch %d, ", number, c.linear ? "linear" : "conv2d",
              static_cast<int>(c.shape.batch));
  print(c.shape);
  std::printf("nominal %d, bias %d, width gradient %d, wants input %d, wants weight %d\n",
              c.nominal, c.bias, c.width, c.wants_input, c.wants_weight);
}

// ReLU is exact but for the width: its sum of `size` squares, two roundings each, and a last one.
template <class T>
bool check_relu(int64_t size, bool nominal, Random& random) {
  const auto draw = [&] { return reals<T>(random, static_cast<size_t>(size)); };
  const auto empty = [&] { return unwritten<T>(static_cast<size_t>(size)); };
  const std::vector<T> lower = draw(), upper = draw(), point = draw();
  const std::vector<T> grad_lower = draw(), grad_upper = draw(), grad_point = draw();
  const double unit = std::numeric_limits<T>::epsilon() / 2, grad_width = 0.25;
  bool right = true;
  for (const int threads : {1, 3}) {
    auto lower_out = empty(), upper_out = empty(), point_out = empty();
    auto lower_in = empty(), upper_in = empty(), point_in = empty();
    T width = std::numeric_limits<T>::quiet_NaN();
    relu_forward<T>({size, threads, lower.data(), upper.data(), nominal ? point.data() : nullptr,
                     lower_out.data(), upper_out.data(), point_out.data(), &width});
    relu_backward<T>({size, threads, grad_lower.data(), grad_upper.data(), grad_point.data(),
                      lower_out.data(), upper_out.data(), nominal ? point_out.data() : nullptr,
                      static_cast<T>(grad_width), lower_in.data(), upper_in.data(),
                      point_in.data()});
    double squares = 0;
    for (size_t i = 0; i < lower.size(); ++i) {
      const T l = std::max(lower[i], T{0}), u = std::max(upper[i], T{0});
      const double slope = 2 * grad_width * (static_cast<double>(u) - static_cast<double>(l));
      const double limit = 8 * unit;  // |slope| and the gradients are at most 1
      squares += (static_cast<double>(u) - l) * (static_cast<double>(u) - l);
      right &= lower_out[i] == l && upper_out[i] == u;
      right &= std::abs(lower_in[i] - (l > 0 ? grad_lower[i] - slope : 0)) <= limit;
      right &= std::abs(upper_in[i] - (u > 0 ? grad_upper[i] + slope : 0)) <= limit;
      if (!nominal) continue;
      right &= point_out[i] == std::max(point[i], T{0});
      right &= point_in[i] == (point[i] > 0 ? grad_point[i] : T{0});
    }
    const double terms = static_cast<double>(size) + 4;
    right &= std::abs(static_cast<double>(width) - squares) <= terms * unit * squares;
  }
  if (!right) std::printf("relu of %lld elements is wrong\n", static_cast<long long>(size));
  return right;
}

#if defined(__AVX512F__)
constexpr const char* kInstructions = "AVX-512";
#elif defined(__AVX2__)
constexpr const char* kInstructions = "AVX2";
#else
constexpr const char* kInstructions = "baseline";
#endif

// The number of wrong cases, and sizes for ReLU, or of the one case of this number.
int wrong_layers(int only) {
  int failures = count_wrong(
      kCases, only, [](Random& random, int) { return draw_case(random); }, describe,
      [](const Case& c, Random& random, auto zero) { return check<decltype(zero)>(c, random); });
  for (const int64_t size : {0, 1, 7, 33, 8191, 8192, 20001}) {
    if (only >= 0) break;
    Random random(static_cast<uint64_t>(size));
    for (const bool nominal : {false, true})
      if (!check_relu<float>(size, nominal, random) || !check_relu<double>(size, nominal, random))
        ++failures;
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // nothing is lost where a sanitizer ends the program
  const char* kind = argc > 1 ? argv[1] : "";
  const int only = argc > 2 ? std::atoi(argv[2]) : -1;
  const auto chosen = [kind](const char* name) { return !*kind || std::strcmp(kind, name) == 0; };
  const int threads = chosen("threads") ? wrong_threads() : 0;
  const int layers = chosen("layer") ? wrong_layers(only) : 0;
  const int networks = chosen("network") ? wrong_networks(only) : 0;
  const int losses = chosen("loss") ? wrong_losses(only) : 0;
  std::printf(
      "%d-byte vectors, %s instructions: %d of %d layers, %d of %d networks, %d of %d losses, %d "
      "of "
      "%d checks of threads wrong\n",
      CIBP_VECTOR_BYTES, kInstructions, layers, kCases, networks, kNetworks, losses, kLosses,
      threads, kThreadChecks);
  return layers + networks + losses + threads == 0 ? 0 : 1;
}
