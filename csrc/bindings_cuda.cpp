// The CUDA kernels as a Python module: raw pointers, strides and a stream in, no torch headers.
//
// It links CUDA's runtime statically, so that it imports without a driver; `devices` then says what
// is missing. Whoever calls has checked dtypes, devices and sizes, and keeps every tensor alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/ops.h"

namespace py = pybind11;
using namespace cibp::cuda;

namespace {

using Tensor = std::array<int64_t, 5>;   // data pointer (0: absent), strides in elements
using Device = std::pair<int, int64_t>;  // index, stream

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

template <class T>
Strided<T> strided(const Tensor& t) {
  return {pointer<T>(t[0]), {t[1], t[2], t[3], t[4]}};
}

Launch launch_at(const Device& device) {
  return {device.first, static_cast<uintptr_t>(device.second)};
}

int int_of(const char* what, int64_t value) {
  if (value < 0 || value > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(value) +
                                " must be from 0 to 2^31 - 1");
  return static_cast<int>(value);
}

FirstConv2dShape first_shape(const std::array<int64_t, 15>& numbers) {
  std::array<int, 15> s;
  for (size_t i = 0; i < s.size(); ++i) s[i] = int_of("first_conv2d: shape", numbers[i]);
  return {s[0], s[1], s[2],  s[3],  s[4],  s[5],  s[6], s[7],
          s[8], s[9], s[10], s[11], s[12], s[13], s[14]};
}

int streams_of(int count) {
  if (count != 2 && count != 3)
    throw std::invalid_argument("streams must be 2 or 3, not " + std::to_string(count));
  return count;
}

int stream_count(int64_t third) { return third ? 3 : 2; }

FirstInput first_input(const std::array<Tensor, 3>& tensors, bool bounds) {
  FirstInput in{};
  for (size_t s = 0; s < 3; ++s) {
    const Tensor& t = tensors[s];
    in.stream[s] = {pointer<const float>(t[0]), {t[1], t[2], t[3], t[4]}};
  }
  in.bounds = bounds;
  return in;
}

Precision precision(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "tf32") return Precision::kTf32;
  if (name == "bf16") return Precision::kBFloat16;
  throw std::invalid_argument("precision must be 'float32', 'tf32' or 'bf16', not '" + name + "'");
}

int at_least_1(const char* name, int64_t value) {
  if (value < 1 || value > 65535)
    throw std::invalid_argument(std::string(name) + " must be from 1 to 65535, not " +
                                std::to_string(value));
  return static_cast<int>(value);
}

std::pair<std::vector<std::pair<int, int>>, std::string> devices_py() {
  std::string why_none;
  auto all = devices(&why_none);
  return {std::move(all), std::move(why_none)};
}

int64_t first_conv2d_blocks_py(const std::array<int64_t, 15>& shape, int streams,
                               const std::string& stored) {
  return first_conv2d_blocks(first_shape(shape), streams_of(streams), precision(stored));
}

void first_conv2d_forward_py(const Device& device, const std::array<int64_t, 15>& shape,
                             const std::array<Tensor, 3>& in, bool bounds, int64_t weight,
                             int64_t bias, bool relu, const std::string& stored,
                             const std::array<int64_t, 2>& out) {
  first_conv2d_forward(launch_at(device), first_shape(shape), stream_count(in[2][0]),
                       first_input(in, bounds), pointer<const float>(weight),
                       pointer<const float>(bias), relu, precision(stored), pointer<void>(out[0]),
                       pointer<float>(out[1]));
}

void first_conv2d_grad_weight_py(const Device& device, const std::array<int64_t, 15>& shape,
                                 int64_t splits, const std::array<Tensor, 3>& in, bool bounds,
                                 const std::string& stored, int64_t grad, int64_t weight,
                                 const std::array<int64_t, 2>& out) {
  first_conv2d_grad_weight(launch_at(device), first_shape(shape), stream_count(in[2][0]),
                           at_least_1("splits", splits), first_input(in, bounds), precision(stored),
                           pointer<const void>(grad), pointer<const float>(weight),
                           pointer<float>(out[0]), pointer<float>(out[1]));
}

HaloShape halo_shape(const std::array<int64_t, 9>& numbers) {
  std::array<int, 9> s;
  for (size_t i = 0; i < s.size(); ++i) s[i] = int_of("halo_conv2d: shape", numbers[i]);
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]};
}

Precision halo_precision(const std::string& name) {
  if (name == "float32")
    throw std::invalid_argument("halo_conv2d: precision must be 'tf32' or 'bf16', not 'float32'");
  return precision(name);
}

int64_t halo_conv2d_blocks_py(const std::array<int64_t, 9>& numbers) {
  const HaloShape shape = halo_shape(numbers);
  check_halo<float>(shape);
  const Grid grid =
      HaloConv2d<3, float>::make(shape, nullptr, nullptr, nullptr, false, 0, nullptr, nullptr)
          .grid();
  return grid.x * grid.y;
}

void halo_conv2d_pack_weight_py(const Device& device, int in_channels, int out_channels,
                                int64_t weight, const std::string& stored, int64_t out) {
  halo_conv2d_pack_weight(launch_at(device), in_channels, out_channels,
                          pointer<const float>(weight), halo_precision(stored),
                          pointer<uint32_t>(out));
}

void halo_conv2d_forward_py(const Device& device, const std::array<int64_t, 9>& shape, int streams,
                            int64_t in, int64_t weight, int64_t bias, bool relu,
                            const std::string& stored, const std::array<int64_t, 2>& out) {
  halo_conv2d_forward(launch_at(device), halo_shape(shape), streams_of(streams),
                      pointer<const void>(in), pointer<const uint32_t>(weight),
                      pointer<const float>(bias), relu, halo_precision(stored),
                      pointer<void>(out[0]), pointer<float>(out[1]));
}

int64_t bounds_blocks_py(const std::array<int64_t, 4>& size) {
  return bounds_blocks({{size[0], size[1], size[2], size[3]}});
}

template <class Op, size_t INPUTS>
Elementwise<Op> elementwise(const std::array<int64_t, 4>& size, const Op& op,
                            const std::array<Tensor, INPUTS>& in, const std::array<Tensor, 3>& out,
                            int64_t sums) {
  static_assert(INPUTS == Op::kInputs);
  Strided<const float> from[INPUTS];
  Strided<float> to[3];
  for (size_t i = 0; i < INPUTS; ++i) from[i] = strided<const float>(in[i]);
  for (size_t i = 0; i < 3; ++i) to[i] = strided<float>(out[i]);
  return Elementwise<Op>::make({{size[0], size[1], size[2], size[3]}}, op, from, to,
                               pointer<float>(sums));
}

void bounds_forward_py(const Device& device, const std::array<int64_t, 4>& size,
                       const std::array<Tensor, 3>& in, bool bounds,
                       const std::array<int64_t, 2>& bias, bool relu,
                       const std::array<Tensor, 3>& out, int64_t width) {
  const Bounds op{bounds, pointer<const float>(bias[0]), bias[1], relu};
  bounds_forward(launch_at(device), elementwise(size, op, in, out, width));
}

void bounds_backward_py(const Device& device, const std::array<int64_t, 4>& size,
                        const std::array<Tensor, 6>& in, bool bounds, int64_t grad_width, bool relu,
                        const std::array<Tensor, 3>& out) {
  const BoundsGrad op{bounds, pointer<const float>(grad_width), relu};
  bounds_backward(launch_at(device), elementwise(size, op, in, out, 0));
}

void channel_sums_py(const Device& device, const std::array<int64_t, 4>& size, int64_t splits,
                     const Tensor& in, int64_t out) {
  channel_sums(launch_at(device),
               ChannelSums::make({{size[0], size[1], size[2], size[3]}}, strided<const float>(in),
                                 at_least_1("splits", splits), pointer<float>(out)));
}

void sum_partials_py(const Device& device, int64_t splits, int64_t size, int64_t in, int64_t out) {
  sum_partials(launch_at(device), {splits, size, pointer<const float>(in), pointer<float>(out)});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Interval kernels in CUDA C++.";
  const auto def = [&](const char* name, auto function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  def("devices", &devices_py);
  def("first_conv2d_blocks", &first_conv2d_blocks_py);
  def("first_conv2d_forward", &first_conv2d_forward_py);
  def("first_conv2d_grad_weight", &first_conv2d_grad_weight_py);
  def("halo_conv2d_blocks", &halo_conv2d_blocks_py);
  def("halo_conv2d_pack_weight", &halo_conv2d_pack_weight_py);
  def("halo_conv2d_forward", &halo_conv2d_forward_py);
  def("bounds_blocks", &bounds_blocks_py);
  def("bounds_forward", &bounds_forward_py);
  def("bounds_backward", &bounds_backward_py);
  def("channel_sums", &channel_sums_py);
  def("sum_partials", &sum_partials_py);
  m.attr("architectures") = CIBP_CUDA_ARCHITECTURES;
}
