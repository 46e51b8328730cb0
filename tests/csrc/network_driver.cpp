// Random whole networks (csrc/cpu/network/network.h) against plain loops in double.
//
// ReLU's gradient jumps at 0, where no tolerance helps: a float kernel and a double reference may
// take different sides. So the reference carries with every number a bound of its error (running
// error analysis) from the input on; where that leaves a ReLU's side open, the gradient through it
// may be that of either side, which is an error bound too. Where nothing was rounded, as in
// channels without weights, the bound is 0, and 0 itself must be taken as torch does: relu'(0) =
// sign(0) = 0.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "cpu/network/network.h"
#include "cpu/network/winograd.h"
#include "support.h"

namespace cibp::test {
namespace {

constexpr int64_t kMaxProducts = 40000;  // of a network and stream: sanitized loops are slow
constexpr int kFastEvery = 25;           // one network in so many is large, for Winograd

struct StageCase {
  Shape shape;
  bool pool, relu, bias, wants_weight, wants_bias, fast;
};

struct NetworkCase {
  std::vector<StageCase> stages;
  int threads;
  bool ball, head, wants_input;
};

bool covers(const Shape& s) {
  return s.out_height == 1 && s.out_width == 1 && s.kernel_height == s.in_height &&
         s.kernel_width == s.in_width && s.padding_height == 0 && s.padding_width == 0 &&
         (s.dilation_height == 1 || s.kernel_height == 1) &&
         (s.dilation_width == 1 || s.kernel_width == 1);
}

// A convolution's or pooling's window on an input of s's size; `padded`: before and, by itself,
// after it. Whether there is room for it.
bool draw_window(Random& random, bool pool, bool padded, Shape& s) {
  // One output that sees the whole image, as in global pooling; dilated with just enough padding.
  const bool whole = random.one_in(4);
  for (const auto [in, out, kernel, stride, padding, dilation] :
       {std::array{&s.in_height, &s.out_height, &s.kernel_height, &s.stride_height,
                   &s.padding_height, &s.dilation_height},
        std::array{&s.in_width, &s.out_width, &s.kernel_width, &s.stride_width, &s.padding_width,
                   &s.dilation_width}}) {
    *kernel = whole ? *in : random.integer(1, pool ? 3 : 4);
    *stride = random.integer(1, 3);
    *padding = padded && !whole ? random.integer(0, 2) : 0;
    *dilation = pool ? 1 : random.integer(1, 2);
    const int64_t fit = (*dilation - 1) * (*kernel - 1);
    const int64_t end = !padded ? 0 : whole ? fit : random.integer(0, 2);
    const int64_t room = *in + *padding + end - *dilation * (*kernel - 1) - 1;
    *out = room < 0 ? 0 : room / *stride + 1;
  }
  return s.out_height > 0 && s.out_width > 0;
}

int64_t draw_channels(Random& random) {
  if (random.one_in(4)) return 16 * random.integer(1, 2);  // whole vectors and cache lines
  return random.integer(1, random.one_in(3) ? 40 : 12);
}

int64_t draw_features(Random& random) {
  return random.one_in(6) ? random.integer(1, 300) : draw_channels(random);
}

// False where what was drawn does not fit together, or is too large.
bool draw_any_network(Random& random, NetworkCase& c) {
  c = {};
  c.threads = static_cast<int>(random.integer(1, 4));
  c.head = random.one_in(2);
  const int64_t convolutions = random.integer(0, 3), linear = random.integer(1, 3);
  c.ball = convolutions > 0 && random.one_in(3);
  c.wants_input = !c.ball && random.one_in(2);

  Shape s{};
  s.batch = random.one_in(8) ? random.integer(64, 140) : random.integer(1, 20);
  const bool image = convolutions > 0 || random.one_in(3);
  s.out_channels = image ? draw_channels(random) : draw_features(random);
  const int64_t largest = !image ? 1 : random.one_in(3) ? 4 : 12;
  s.out_height = random.integer(1, largest);
  s.out_width = random.integer(1, largest);
  const auto follow = [&s] {
    s = {s.batch, s.out_channels, s.out_height, s.out_width, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  };
  const auto add = [&](bool pool) {
    const bool bias = random.one_in(2);
    c.stages.push_back({s, pool, !random.one_in(4), bias && !pool, !pool && !random.one_in(4),
                        !pool && !random.one_in(4), random.one_in(2)});
  };
  const auto add_pools = [&] {
    while (random.one_in(4)) {
      follow();
      s.out_channels = s.groups = s.in_channels;
      if (!draw_window(random, true, random.one_in(2), s)) return false;
      add(true);
    }
    return true;
  };
  bool dense = false;  // a convolution may cover its input too
  for (int64_t i = 0; i < convolutions && !dense; ++i) {
    if (i > 0 && !add_pools()) return false;
    follow();
    s.out_channels = draw_channels(random);
    const bool ball = i == 0 && c.ball;
    if (!draw_window(random, false, !ball && random.one_in(2), s)) return false;
    dense = covers(s);
    if (ball && dense) return false;
    add(false);
  }
  if (convolutions > 0 && !dense && !add_pools()) return false;
  for (int64_t i = 0; i < linear; ++i) {
    follow();
    s.kernel_height = s.in_height;
    s.kernel_width = s.in_width;
    s.out_channels = draw_features(random);
    add(false);
  }
  c.stages.back().relu = false;

  int64_t products = 0;
  for (const StageCase& stage : c.stages) {
    const Shape& t = stage.shape;
    products += t.batch * t.out_channels * t.out_height * t.out_width * t.in_channels / t.groups *
                t.kernel_height * t.kernel_width;
  }
  return products <= kMaxProducts;
}

// Two convolutions, the second by Winograd's products, and a linear layer.
bool draw_fast_network(Random& random, NetworkCase& c) {
  const int64_t size = random.integer(8, 24), padding = random.integer(0, 2);
  const int64_t kernel = random.integer(2, 6), stride = random.integer(1, 2);
  const int64_t channels = random.integer(6, 20), outputs = random.integer(6, 20);
  const int64_t height = size, width = size + random.integer(0, 3);
  const auto reach = [&](int64_t in) {
    return (in + padding + random.integer(0, 2) - kernel) / stride + 1;
  };
  const int64_t out_height = reach(height), out_width = reach(width);
  const int64_t batch = random.one_in(3) ? random.integer(5, 9) : random.integer(1, 3);
  const Shape first{batch, 2, height, width, channels, height, width, 1, 1, 1, 1, 0, 0, 1, 1, 1},
      second{batch,  channels, height, width,   outputs, out_height, out_width, kernel,
             kernel, stride,   stride, padding, padding, 1,          1,         1},
      last{batch,     outputs, out_height, out_width, 3, 1, 1, out_height,
           out_width, 1,       1,          0,         0, 1, 1, 1};
  c = {{{first, false, random.one_in(2), true, true, true, true},
        {second, false, random.one_in(2), true, true, true, true},
        {last, false, false, true, true, true, true}},
       static_cast<int>(random.integer(1, 4)),
       random.one_in(2),
       random.one_in(2),
       false};
  c.wants_input = !c.ball;
  const int64_t products = batch * out_height * out_width * kernel * kernel * channels * outputs;
  return winograd_passes(second).any() && !covers(second) && products <= 6 * kMaxProducts;
}

NetworkCase draw_network(Random& random, bool fast) {
  NetworkCase c;
  while (!(fast ? draw_fast_network : draw_any_network)(random, c)) {
  }
  return c;
}

size_t input_count(const Shape& s) {
  return count({s.batch, s.in_channels, s.in_height, s.in_width});
}
size_t output_count(const Shape& s) {
  return count({s.batch, s.out_channels, s.out_height, s.out_width});
}
size_t weight_count(const Shape& s) {
  return count({s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width});
}

template <class T>
struct NetworkData {
  std::vector<Argument<T>> box;                 // lower <= upper, nominal
  std::vector<T> ball;                          // [in channels] or empty
  std::vector<std::vector<T>> weights, biases;  // of each stage, or empty
  std::vector<T> grad_lower, grad_upper, grad_nominal, grad_head_lower, grad_head_upper,
      grad_widths;

  NetworkData(const NetworkCase& c, Random& random) {
    const auto draw = [&](size_t size, double scale) { return reals<T>(random, size, scale); };
    const Shape& s = c.stages[0].shape;
    const Size size{s.batch, s.in_channels, s.in_height, s.in_width};
    const Layout layout = draw_layout(random);
    const auto strides = [&] {
      return draw_strides(
          random, size,
          layout == Layout::kMixed ? static_cast<Layout>(random.integer(0, 2)) : layout);
    };
    const Size shared = strides();  // of expanded ones: lower <= upper where elements are shared
    std::vector<T> lower(input_count(s)), upper(lower), nominal(lower);
    for (size_t i = 0; i < lower.size(); ++i) {
      lower[i] = random.one_in(8) ? T{0} : static_cast<T>(0.5 + 0.5 * random.real());
      upper[i] = lower[i] + (random.one_in(8) ? T{0} : static_cast<T>(0.2 + 0.2 * random.real()));
      nominal[i] = static_cast<T>(0.5 + 0.5 * random.real());
    }
    for (const std::vector<T>& values : {lower, upper, nominal}) {
      auto next = values.begin();
      box.emplace_back(size, layout == Layout::kExpanded ? shared : strides(),
                       [&] { return *next++; });
    }
    if (c.ball) {
      ball = draw(static_cast<size_t>(s.in_channels), 0.3);
      for (T& radius : ball) radius = std::abs(radius);
    }
    for (const StageCase& stage : c.stages) {
      const size_t outputs = static_cast<size_t>(stage.shape.out_channels);
      biases.push_back(draw(stage.bias ? outputs : 0, 0.3));
      weights.emplace_back(stage.pool ? 0 : weight_count(stage.shape));
      const size_t inputs = weights.back().size() / outputs;
      // Each output's weights lean to one side, so that all states of ReLU come up however many
      // there are.
      for (size_t o = 0; o < outputs && !stage.pool; ++o) {
        const double mean = random.real() / 2, scale = 2.0 / static_cast<double>(inputs);
        const bool none = random.one_in(16);
        for (size_t i = 0; i < inputs; ++i)
          weights.back()[o * inputs + i] =
              none || random.one_in(8) ? T{0} : static_cast<T>(scale * (mean + random.real() / 2));
      }
    }
    const Shape& last = c.stages.back().shape;
    for (std::vector<T>* gradient : {&grad_lower, &grad_upper, &grad_nominal})
      *gradient = draw(output_count(last), 1);
    for (std::vector<T>* gradient : {&grad_head_lower, &grad_head_upper})
      *gradient = draw(c.head ? input_count(last) : 0, 1);
    grad_widths = draw(c.stages.size(), 0.25);
  }
};

// Within `error` of `value`.
struct Number {
  double value = 0, error = 0;
  double size() const { return std::abs(value) + error; }
};
using Numbers = std::vector<Number>;
using Streams = std::array<Numbers, 3>;  // center, radius, nominal; or what is by them

Number operator*(double exact, const Number& a) {
  return {exact * a.value, std::abs(exact) * a.error};
}

template <class T>
Numbers exact(const std::vector<T>& values) {
  Numbers numbers;
  for (const T value : values) numbers.push_back({static_cast<double>(value), 0});
  return numbers;
}

// A sum in whatever order: `size` bounds the magnitudes of its terms.
struct Sum {
  double value = 0, error = 0, size = 0;
  void add(const Number& a) {
    value += a.value;
    error += a.error;
    size += a.size();
  }
  void add(const Number& a, const Number& b) {
    value += a.value * b.value;
    error += std::abs(a.value) * b.error + a.error * b.size();
    size += a.size() * b.size();
  }
  template <class T>
  Number rounded(int64_t roundings) const {
    return {value, error + gamma<T>(roundings) * size};
  }
};
using Sums = std::vector<Sum>;

template <class T>
Number total(std::initializer_list<Number> terms) {
  Sum sum;
  for (const Number& term : terms) sum.add(term);
  return sum.rounded<T>(static_cast<int64_t>(terms.size()));
}

// `fast`: by Winograd's products. Those of a tile share their roundings, and its transforms, whose
// factors are up to 16, make sums of much larger terms than they give: kFastRoundings of them bound
// what is seen in practice, where 3 would do; what can be proved is far more.
constexpr double kFastRoundings = 30;

template <class T>
Numbers rounded(const Sums& sums, int64_t roundings, bool fast = false) {
  double largest = 0;
  for (const Sum& sum : sums) largest = std::max(largest, sum.size);
  Numbers numbers;
  for (const Sum& sum : sums) {
    numbers.push_back(sum.rounded<T>(roundings));
    if (fast) numbers.back().error += kFastRoundings * gamma<T>(1) * largest;
  }
  return numbers;
}

// ReLU's side at a number. (A sum of two has the right sign even when rounded.)
enum class Side { kBelow, kOpen, kAbove };  // 0 is below

Side side(double value, double error) {
  return value > error ? Side::kAbove : value <= -error ? Side::kBelow : Side::kOpen;
}

// The sides of an output's bounds and nominal.
struct Sides {
  Side lower, upper, nominal;
  Sides(const Number& center, const Number& radius, const Number& nominal_)
      : lower(side(center.value - radius.value, center.error + radius.error)),
        upper(side(center.value + radius.value, center.error + radius.error)),
        nominal(side(nominal_.value, nominal_.error)) {}
};

template <class T>
void activate(Number& center, Number& radius, Number& nominal) {
  const Sides sides(center, radius, nominal);
  if (sides.nominal != Side::kAbove)
    nominal = {std::max(nominal.value, 0.0), sides.nominal == Side::kOpen ? nominal.error : 0};
  if (sides.lower == Side::kAbove) return;
  const double lower = std::max(center.value - radius.value, 0.0),
               upper = std::max(center.value + radius.value, 0.0);
  const double error =
      sides.upper == Side::kBelow ? 0 : center.error + radius.error + gamma<T>(1) * upper;
  center = {(upper + lower) / 2, error};
  radius = {(upper - lower) / 2, error};
}

// The gradients by what `activate` made of them -> those by center, radius and nominal.
template <class T>
void deactivate(const Sides& sides, Number& center, Number& radius, Number& nominal) {
  if (sides.nominal != Side::kAbove)
    nominal = {0, sides.nominal == Side::kOpen ? nominal.size() : 0};
  if (sides.lower == Side::kAbove) return;
  const bool open = sides.lower == Side::kOpen || sides.upper == Side::kOpen;
  const Number upper = 0.5 * total<T>({center, radius});  // alone passes something on
  if (open)
    center = radius = {upper.value, center.size() + radius.size()};
  else
    center = radius = sides.upper == Side::kAbove ? upper : Number{};
}

// What a network's outputs and gradients should be, in T.
template <class T>
struct NetworkReference {
  std::vector<Streams> inputs, outputs;  // of each stage; inputs after, outputs before ReLU
  Numbers lower, upper, nominal, head_lower, head_upper, widths;
  Numbers grad_lower, grad_upper, grad_nominal;
  std::vector<Numbers> grad_weights, grad_biases;

  NetworkReference(const NetworkCase& c, const NetworkData<T>& data)
      : grad_weights(c.stages.size()), grad_biases(c.stages.size()) {
    forward(c, data);
    if (sizeof(T) == 4) round_saved(c);
    backward(c, data);
  }

 private:
  static Numbers weight(const StageCase& stage, const std::vector<T>& given) {
    const Shape& s = stage.shape;
    const double mean = 1 / static_cast<double>(s.kernel_height * s.kernel_width);
    return stage.pool ? Numbers(weight_count(s), {mean, 0}) : exact(given);
  }

  void forward(const NetworkCase& c, const NetworkData<T>& data) {
    inputs.push_back(first_input(c, data));
    for (size_t i = 0; i < c.stages.size(); ++i) {
      const StageCase& stage = c.stages[i];
      outputs.push_back(
          affine(i, stage, weight(stage, data.weights[i]), data.biases[i], inputs[i]));
      Streams next = outputs[i];
      Sum width;
      for (size_t j = 0; j < next[0].size(); ++j) {
        if (stage.relu) activate<T>(next[0][j], next[1][j], next[2][j]);
        width.add(4 * next[1][j], next[1][j]);
      }
      widths.push_back(width.rounded<T>(static_cast<int64_t>(next[0].size()) + 4));
      inputs.push_back(next);
    }
    bounds(inputs[c.stages.size()], lower, upper);
    bounds(inputs[c.stages.size() - 1], head_lower, head_upper);
    nominal = inputs[c.stages.size()][2];
  }

  static void bounds(const Streams& streams, Numbers& lower, Numbers& upper) {
    for (size_t i = 0; i < streams[0].size(); ++i) {
      lower.push_back(total<T>({streams[0][i], -1 * streams[1][i]}));
      upper.push_back(total<T>({streams[0][i], streams[1][i]}));
    }
  }

  static Streams first_input(const NetworkCase& c, const NetworkData<T>& data) {
    const Shape& s = c.stages[0].shape;
    const size_t pixels = static_cast<size_t>(s.in_height * s.in_width),
                 channels = static_cast<size_t>(s.in_channels);
    Streams streams;
    for (size_t i = 0; i < input_count(s); ++i) {
      const Number lower{data.box[0].values[i]}, upper{data.box[1].values[i]},
          nominal{data.box[2].values[i]};
      streams[2].push_back(nominal);
      if (c.ball) {
        streams[0].push_back(nominal);
        streams[1].push_back({static_cast<double>(data.ball[i / pixels % channels])});
      } else {
        streams[0].push_back(total<T>({0.5 * lower, 0.5 * upper}));
        streams[1].push_back(total<T>({-0.5 * lower, 0.5 * upper}));
      }
    }
    return streams;
  }

  // The backward pass has the fast stages' inputs in bfloat16 only, whose elements (layers.h) are
  // off by at most 2^-8, and radii by three times that: but on the same side of ReLU.
  void round_saved(const NetworkCase& c) {
    for (size_t i = 1; i < c.stages.size(); ++i)
      for (size_t k = 0; k < inputs[i].size() && c.stages[i].fast; ++k)
        for (Number& number : inputs[i][k])
          number.error += std::ldexp(k == 1 ? 3 : 1, -8) * number.size();
  }

  // Roundings of a sum of n products: n each, and a few for the bias, pooling's mean and streams
  // that were added up before.
  static constexpr int64_t kMore = 8;

  static bool by_winograd(size_t i, const StageCase& stage) {
    return i > 0 && stage.fast && !stage.pool && !covers(stage.shape) &&
           winograd_passes(stage.shape).any();
  }

  static Streams affine(size_t i, const StageCase& stage, const Numbers& weight,
                        const std::vector<T>& bias, const Streams& in) {
    const Shape& s = stage.shape;
    std::array<Sums, 3> sums;
    sums.fill(Sums(output_count(s)));
    for_products(s, [&](int64_t output, int64_t input, int64_t w) {
      const size_t o = static_cast<size_t>(output), i = static_cast<size_t>(input);
      const Number& factor = weight[static_cast<size_t>(w)];
      sums[0][o].add(factor, in[0][i]);
      sums[1][o].add({std::abs(factor.value), 0}, in[1][i]);
      sums[2][o].add(factor, in[2][i]);
    });
    for (size_t o = 0; o < sums[0].size() && !bias.empty(); ++o)
      for (Sums* stream : {&sums[0], &sums[2]})
        (*stream)[o].add({static_cast<double>(bias[channel(s, o)])});
    const int64_t roundings = static_cast<int64_t>(weight.size()) / s.out_channels + kMore;
    return {rounded<T>(sums[0], roundings, by_winograd(i, stage)),
            rounded<T>(sums[1], roundings, by_winograd(i, stage)),
            rounded<T>(sums[2], roundings, by_winograd(i, stage))};
  }

  static size_t channel(const Shape& s, size_t output) {
    return output / static_cast<size_t>(s.out_height * s.out_width) %
           static_cast<size_t>(s.out_channels);
  }

  void backward(const NetworkCase& c, const NetworkData<T>& data) {
    const Numbers gl = exact(data.grad_lower), gu = exact(data.grad_upper);
    Streams grad{Numbers(), Numbers(), exact(data.grad_nominal)};
    const Number twice{4 * static_cast<double>(data.grad_widths.back())};
    for (size_t o = 0; o < gl.size(); ++o) {
      Sum radius;
      radius.add(gu[o]);
      radius.add(-1 * gl[o]);
      radius.add(twice, upper[o]);
      radius.add(-1 * twice, lower[o]);
      grad[0].push_back(total<T>({gl[o], gu[o]}));
      grad[1].push_back(radius.template rounded<T>(4));
    }
    for (size_t i = c.stages.size(); i-- > 0;) {
      grad = adjoint(i, c.stages[i], weight(c.stages[i], data.weights[i]), grad);
      const bool head = c.head && i + 1 == c.stages.size();
      for (size_t j = 0; j < grad[0].size() && head; ++j) {
        const Number l{static_cast<double>(data.grad_head_lower[j])},
            u{static_cast<double>(data.grad_head_upper[j])};
        grad[0][j] = total<T>({grad[0][j], l, u});
        grad[1][j] = total<T>({grad[1][j], -1 * l, u});
      }
      for (size_t j = 0; j < grad[0].size() && i > 0; ++j) {
        Sum radius;
        radius.add(grad[1][j]);
        radius.add({8 * static_cast<double>(data.grad_widths[i - 1])}, inputs[i][1][j]);
        grad[1][j] = radius.template rounded<T>(3);
        const Streams& out = outputs[i - 1];
        if (c.stages[i - 1].relu)
          deactivate<T>(Sides(out[0][j], out[1][j], out[2][j]), grad[0][j], grad[1][j], grad[2][j]);
      }
    }
    for (size_t j = 0; j < grad[0].size(); ++j) {
      grad_lower.push_back(0.5 * total<T>({grad[0][j], -1 * grad[1][j]}));
      grad_upper.push_back(0.5 * total<T>({grad[0][j], grad[1][j]}));
    }
    grad_nominal = grad[2];
  }

  // The gradient by stage i's input from that by its output; sets its parameters' gradients.
  Streams adjoint(size_t i, const StageCase& stage, const Numbers& weight, const Streams& grad) {
    const Shape& s = stage.shape;
    const Streams& in = inputs[i];
    std::array<Sums, 3> sums;
    sums.fill(Sums(input_count(s)));
    Sums weights(weight.size()), biases(static_cast<size_t>(s.out_channels));
    for_products(s, [&](int64_t output, int64_t input, int64_t w) {
      const size_t o = static_cast<size_t>(output), j = static_cast<size_t>(input);
      const Number& factor = weight[static_cast<size_t>(w)];
      const double sign = (factor.value > 0) - (factor.value < 0);
      sums[0][j].add(factor, grad[0][o]);
      sums[1][j].add({std::abs(factor.value), 0}, grad[1][o]);
      sums[2][j].add(factor, grad[2][o]);
      if (stage.pool) return;
      Sum& sum = weights[static_cast<size_t>(w)];
      sum.add(grad[0][o], in[0][j]);
      sum.add(sign * grad[1][o], in[1][j]);
      sum.add(grad[2][o], in[2][j]);
    });
    for (size_t o = 0; o < grad[0].size(); ++o)
      for (const Numbers* stream : {&grad[0], &grad[2]}) biases[channel(s, o)].add((*stream)[o]);
    const int64_t taps = s.kernel_height * s.kernel_width,
                  pixels = s.batch * s.out_height * s.out_width;
    grad_weights[i] = rounded<T>(weights, 3 * pixels + kMore, by_winograd(i, stage));
    grad_biases[i] = rounded<T>(biases, 2 * pixels + kMore);
    const int64_t roundings = s.out_channels / s.groups * taps + kMore;
    return {rounded<T>(sums[0], roundings, by_winograd(i, stage)),
            rounded<T>(sums[1], roundings, by_winograd(i, stage)),
            rounded<T>(sums[2], roundings, by_winograd(i, stage))};
  }
};

template <class T>
struct NetworkOutputs {
  std::vector<T> lower, upper, nominal, head_lower, head_upper, widths;
  std::vector<T> grad_lower, grad_upper, grad_nominal;
  std::vector<std::vector<T>> grad_weights, grad_biases;

  // Both passes. Packed inputs have the size that the op says, and no more.
  NetworkOutputs(const NetworkCase& c, const NetworkData<T>& data, int threads) {
    const Shape &first = c.stages[0].shape, &last = c.stages.back().shape;
    for (std::vector<T>* output : {&lower, &upper, &nominal})
      *output = unwritten<T>(output_count(last));
    for (std::vector<T>* output : {&head_lower, &head_upper})
      *output = unwritten<T>(input_count(last));
    widths = unwritten<T>(c.stages.size());
    for (std::vector<T>* output : {&grad_lower, &grad_upper, &grad_nominal})
      if (c.wants_input) *output = unwritten<T>(input_count(first));

    std::vector<NetworkLayer> layers;
    std::vector<const T*> weights, biases;
    std::vector<T*> weight_targets, bias_targets;
    for (size_t i = 0; i < c.stages.size(); ++i) {
      const StageCase& stage = c.stages[i];
      layers.push_back({stage.shape, stage.relu, stage.pool, stage.fast});
      weights.push_back(data_of(data.weights[i]));
      biases.push_back(data_of(data.biases[i]));
      grad_weights.push_back(unwritten<T>(stage.wants_weight ? data.weights[i].size() : 0));
      const auto outputs = static_cast<size_t>(stage.shape.out_channels);
      grad_biases.push_back(unwritten<T>(stage.wants_bias ? outputs : 0));
    }
    for (size_t i = 0; i < c.stages.size(); ++i) {
      weight_targets.push_back(data_of(grad_weights[i]));
      bias_targets.push_back(data_of(grad_biases[i]));
    }
    const Network<T> network(layers, c.ball);
    // NaN of any kind
    std::vector<std::byte> saved(static_cast<size_t>(network.saved_bytes()), std::byte{0xff});
    network.forward({threads, weights, biases, view<Tensor4<const T>>(data.box[0], !c.ball),
                     view<Tensor4<const T>>(data.box[1], !c.ball),
                     view<Tensor4<const T>>(data.box[2]), data_of(data.ball), false, saved.data(),
                     lower.data(), upper.data(), nominal.data(), head_lower.data(),
                     head_upper.data(), widths.data()});
    // The widths are sums over the units, but means over the batch.
    const T batch = static_cast<T>(first.batch);
    std::vector<T> grad_widths = data.grad_widths;
    for (T& width : widths) width *= batch;
    for (T& gradient : grad_widths) gradient *= batch;
    network.backward({threads, weights, data_of(data.ball), false, saved.data(), lower.data(),
                      upper.data(), data.grad_lower.data(), data.grad_upper.data(),
                      data.grad_nominal.data(), data_of(data.grad_head_lower),
                      data_of(data.grad_head_upper), grad_widths.data(), data_of(grad_lower),
                      data_of(grad_upper), data_of(grad_nominal), weight_targets, bias_targets});
  }

  // Calls body(name, values, what other has there) for each of them, and returns whether all agree.
  template <class Other, class Body>
  bool all(const Other& other, const Body& body) const {
    bool good = body("lower'", lower, other.lower);
    good &= body("upper'", upper, other.upper);
    good &= body("nominal'", nominal, other.nominal);
    good &= body("the head's lower", head_lower, other.head_lower);
    good &= body("the head's upper", head_upper, other.head_upper);
    good &= body("the widths", widths, other.widths);
    good &= body("the gradient of lower", grad_lower, other.grad_lower);
    good &= body("the gradient of upper", grad_upper, other.grad_upper);
    good &= body("the gradient of nominal", grad_nominal, other.grad_nominal);
    for (size_t i = 0; i < grad_weights.size(); ++i) {
      const bool weight = body("a gradient of weight", grad_weights[i], other.grad_weights[i]),
                 bias = body("a gradient of bias", grad_biases[i], other.grad_biases[i]);
      if (!weight || !bias) std::printf("  of stage %zu\n", i);
      good &= weight && bias;
    }
    return good;
  }
};

template <class T>
bool check(const NetworkCase& c, Random& random) {
  const NetworkData<T> data(c, random);
  const NetworkReference<T> expected(c, data);
  const NetworkOutputs<T> one(c, data, 1), many(c, data, c.threads), again(c, data, c.threads);
  bool good = true;
  for (const NetworkOutputs<T>* found : {&one, &many}) {
    const bool right = found->all(
        expected, [](const char* quantity, const std::vector<T>& values, const Numbers& numbers) {
          return close(
              quantity, values, [&](size_t i) { return numbers[i].value; },
              [&](size_t i) { return numbers[i].error; });
        });
    if (!right) std::printf("  with %d threads\n", found == &one ? 1 : c.threads);
    good &= right;
  }
  return good & many.all(again, [&](const char* quantity, const std::vector<T>& values,
                                    const std::vector<T>& others) {
    if (values.empty() || std::memcmp(values.data(), others.data(), values.size() * sizeof(T)) == 0)
      return true;
    std::printf("MISMATCH of %s in %s: a second run differs, with %d threads\n", quantity, kName<T>,
                c.threads);
    return false;
  });
}

void describe(int number, const NetworkCase& c) {
  std::printf("  in network %d: batch %d, %d threads, ball %d, head gradient %d, wants input %d\n",
              number, static_cast<int>(c.stages[0].shape.batch), c.threads, c.ball, c.head,
              c.wants_input);
  for (size_t i = 0; i < c.stages.size(); ++i) {
    const StageCase& stage = c.stages[i];
    const char* kind = stage.pool ? "pooling" : covers(stage.shape) ? "dense" : "convolution";
    std::printf("    stage %zu, %s: ", i, kind);
    print(stage.shape);
    std::printf("ReLU %d, bias %d, wants weight %d, bias %d, fast %d\n", stage.relu, stage.bias,
                stage.wants_weight, stage.wants_bias, stage.fast);
  }
}

}  // namespace

int wrong_networks(int only) {
  return count_wrong(
      kNetworks, only,
      [](Random& r, int number) { return draw_network(r, number % kFastEvery == 0); }, describe,
      [](const auto& c, Random& r, auto zero) { return check<decltype(zero)>(c, r); });
}

}  // namespace cibp::test
