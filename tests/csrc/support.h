// What the tests of the kernels share: random arguments, the loops of a convolution, comparison.
//
// Every tensor has a heap block of its own that ends with its last element, and NaN between its
// elements; outputs begin as NaN, and -DCIBP_POISON makes scratch memory begin as NaN too.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cpu/conv2d.h"

namespace cibp::test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) {  // both may come up
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) { return integer(1, n) == 1; }
  double real() { return std::ldexp(static_cast<double>(engine_() >> 11), -52) - 1; }  // in [-1, 1)

 private:
  std::mt19937_64 engine_;
};

using Size = std::array<int64_t, 4>;
using Values = std::vector<double>;

inline size_t count(const Size& size) {
  return static_cast<size_t>(size[0] * size[1] * size[2] * size[3]);
}

template <class T>
std::vector<T> unwritten(size_t size) {
  return std::vector<T>(size, std::numeric_limits<T>::quiet_NaN());
}

template <class T>
std::vector<T> reals(Random& random, size_t size, double scale = 1) {
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(scale * random.real());
  return values;
}

// Null where there are none, as the kernels take arguments that are not there.
template <class Vector>
auto data_of(Vector& values) {
  return values.empty() ? nullptr : values.data();
}

// kMixed: each time one of the others, so that the tensors of an op differ.
enum class Layout { kContiguous, kChannelsLast, kGaps, kExpanded, kMixed };

inline Layout draw_layout(Random& random) { return static_cast<Layout>(random.integer(0, 4)); }

inline Size draw_strides(Random& random, const Size& size, Layout layout) {
  if (layout == Layout::kMixed) layout = static_cast<Layout>(random.integer(0, 3));
  std::array<int, 4> order{3, 2, 1, 0};  // innermost first
  if (layout == Layout::kChannelsLast) order = {1, 3, 2, 0};
  if (layout == Layout::kGaps)
    for (int i = 3; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
  Size strides;
  int64_t step = layout == Layout::kGaps ? random.integer(1, 2) : 1;
  for (int d : order) {
    const bool expanded = layout == Layout::kExpanded && random.one_in(2);
    strides[d] = expanded ? 0 : step;
    if (expanded) continue;
    step *= std::max<int64_t>(1, size[d]);
    if (layout == Layout::kGaps) step += random.integer(0, 2);
  }
  return strides;
}

// A tensor argument. One without elements has no data, as in torch.
template <class T>
struct Argument {
  Size stride;
  std::vector<T> block;
  Values values;  // in the order of the indices

  // element(): the next one in that order. Where several indices share one, the last is kept.
  template <class Element>
  Argument(const Size& size, const Size& strides, const Element& element) : stride(strides) {
    if (count(size) == 0) return;
    int64_t extent = 1;
    for (size_t d = 0; d < 4; ++d) extent += (size[d] - 1) * stride[d];
    block = unwritten<T>(static_cast<size_t>(extent));
    const auto each = [&](const auto& body) {
      for (int64_t n = 0; n < size[0]; ++n)
        for (int64_t c = 0; c < size[1]; ++c)
          for (int64_t y = 0; y < size[2]; ++y)
            for (int64_t x = 0; x < size[3]; ++x)
              body(block[static_cast<size_t>(n * stride[0] + c * stride[1] + y * stride[2] +
                                             x * stride[3])]);
    };
    each([&](T& target) { target = element(); });
    each([&](T& target) { values.push_back(static_cast<double>(target)); });
  }

  Argument(Random& random, const Size& size, Layout layout)
      : Argument(size, draw_strides(random, size, layout),
                 [&] { return random.one_in(8) ? T{0} : static_cast<T>(random.real()); }) {}
};

template <class Tensor, class T>
Tensor view(const Argument<T>& argument, bool present = true) {
  Tensor tensor;
  if (present) tensor.data = argument.block.data();
  std::copy_n(argument.stride.begin(), std::size(tensor.stride), tensor.stride);
  return tensor;
}

// Calls body(output, input, weight) with the indices of the factors of each product.
template <class Body>
void for_products(const Shape& s, const Body& body) {
  const int64_t in_channels = s.in_channels / s.groups, out_channels = s.out_channels / s.groups;
  int64_t output = 0;
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t y = 0; y < s.out_height; ++y)
        for (int64_t x = 0; x < s.out_width; ++x, ++output)
          for (int64_t c = 0; c < in_channels; ++c)
            for (int64_t ky = 0; ky < s.kernel_height; ++ky)
              for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
                const int64_t row = y * s.stride_height - s.padding_height + ky * s.dilation_height;
                const int64_t column = x * s.stride_width - s.padding_width + kx * s.dilation_width;
                if (row < 0 || row >= s.in_height || column < 0 || column >= s.in_width) continue;
                const int64_t channel = o / out_channels * in_channels + c;
                body(output,
                     ((n * s.in_channels + channel) * s.in_height + row) * s.in_width + column,
                     ((o * in_channels + c) * s.kernel_height + ky) * s.kernel_width + kx);
              }
}

// A result whose every term was rounded at most n times is off by at most gamma_n = n u / (1 - n u)
// times the sum of the magnitudes of its terms, in whatever order it was summed: here once in T by
// the kernel and once in double by the reference.
template <class T>
double gamma(int64_t n) {
  const auto of = [n](double epsilon) {
    const double nu = static_cast<double>(n) * epsilon / 2;
    return nu / (1 - nu);
  };
  return of(static_cast<double>(std::numeric_limits<T>::epsilon())) +
         of(std::numeric_limits<double>::epsilon());
}

template <class T>
constexpr const char* kName = sizeof(T) == 4 ? "float" : "double";

// Whether each found element is within limit(i) of value(i); prints the first that is not.
template <class T, class Value, class Limit>
bool close(const char* quantity, const std::vector<T>& found, const Value& value,
           const Limit& limit) {
  for (size_t i = 0; i < found.size(); ++i) {
    const double element = static_cast<double>(found[i]);
    if (std::abs(element - value(i)) <= limit(i)) continue;  // NaN is not
    std::printf("MISMATCH of %s in %s: element %zu of %zu is %.9g, expected %.9g +- %.2g\n",
                quantity, kName<T>, i, found.size(), element, value(i), limit(i));
    return false;
  }
  return true;
}

inline void print(const Shape& s) {
  const auto pair = [](const char* name, int64_t a, int64_t b) {
    std::printf("%s %d x %d, ", name, static_cast<int>(a), static_cast<int>(b));
  };
  pair("in x out channels", s.in_channels, s.out_channels);
  pair("image", s.in_height, s.in_width);
  pair("output", s.out_height, s.out_width);
  pair("kernel", s.kernel_height, s.kernel_width);
  pair("stride", s.stride_height, s.stride_width);
  pair("padding", s.padding_height, s.padding_width);
  pair("dilation", s.dilation_height, s.dilation_width);
  std::printf("groups %d, ", static_cast<int>(s.groups));
}

// The number of wrong cases of `cases`, or of the one of number `only`. Each is drawn from its
// number, checked in float and in double, and described where it is wrong or the only one.
template <class Draw, class Describe, class Check>
int count_wrong(int cases, int only, const Draw& draw, const Describe& describe,
                const Check& check) {
  int wrong = 0;
  for (int number = 0; number < cases; ++number) {
    if (only >= 0 && number != only) continue;
    Random random(static_cast<uint64_t>(number));
    const auto c = draw(random, number);
    if (only >= 0) describe(number, c);
    const bool in_float = check(c, random, float{}), in_double = check(c, random, double{});
    if (in_float && in_double) continue;
    describe(number, c);
    ++wrong;
  }
  return wrong;
}

// Random whole networks; the number of wrong ones of kNetworks, or of the one of this number.
constexpr int kNetworks = 200;
int wrong_networks(int only);

// The same of cross-entropies.
constexpr int kLosses = 100;
int wrong_losses(int only);

// What the threads must do, and how much of it they do not.
constexpr int kThreadChecks = 12;
int wrong_threads();

}  // namespace cibp::test
