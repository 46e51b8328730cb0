// The CUDA kernels as a Python module: raw pointers and a stream in, no torch headers.
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

// A kernels.shape.Shape, by the names of its fields.
template <>
struct py::detail::type_caster<ConvShape> {
  PYBIND11_TYPE_CASTER(ConvShape, const_name("Shape"));

  bool load(handle from, bool) {
    if (!hasattr(from, "kernel_height")) return false;
    const auto number = [](const object& field) {
      const int64_t n = field.cast<int64_t>();
      if (n < 0 || n > std::numeric_limits<int>::max())
        throw std::invalid_argument("shape: " + std::to_string(n) + " must be from 0 to 2^31 - 1");
      return static_cast<int>(n);
    };
    const auto one = [&](const char* name) { return number(from.attr(name)); };
    const auto pair = [&](const char* name, int i) { return number(from.attr(name)[int_(i)]); };
    value = {one("batch"),        one("in_channels"),  one("in_height"),   one("in_width"),
             one("out_channels"), one("out_height"),   one("out_width"),   one("kernel_height"),
             one("kernel_width"), pair("stride", 0),   pair("stride", 1),  pair("padding", 0),
             pair("padding", 1),  pair("dilation", 0), pair("dilation", 1)};
    return true;
  }
};

namespace {

using Device = std::pair<int, int64_t>;  // index, stream

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

Launch launch_at(const Device& device) {
  return {device.first, static_cast<uintptr_t>(device.second)};
}

int streams_of(int count) {
  if (count != 2 && count != 3)
    throw std::invalid_argument("streams must be 2 or 3, not " + std::to_string(count));
  return count;
}

Precision precision(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "tf32") return Precision::kTf32;
  if (name == "bf16") return Precision::kBFloat16;
  throw std::invalid_argument("precision must be 'float32', 'tf32' or 'bf16', not '" + name + "'");
}

Precision halo_precision(const std::string& name) {
  if (name == "float32")
    throw std::invalid_argument("halo_conv2d: precision must be 'tf32' or 'bf16', not 'float32'");
  return precision(name);
}

int splits_of(int64_t value) {
  if (value < 1 || value > 65535)
    throw std::invalid_argument("splits must be from 1 to 65535, not " + std::to_string(value));
  return static_cast<int>(value);
}

std::pair<std::vector<std::pair<int, int>>, std::string> devices_py() {
  std::string why_none;
  auto all = devices(&why_none);
  return {std::move(all), std::move(why_none)};
}

int64_t first_conv2d_blocks_py(const ConvShape& shape, int streams, const std::string& stored) {
  return first_conv2d_blocks(shape, streams_of(streams), precision(stored));
}

void first_conv2d_forward_py(const Device& device, const ConvShape& shape, int streams, int64_t in,
                             int64_t weight, int64_t bias, bool relu, const std::string& stored,
                             const std::array<int64_t, 2>& out) {
  first_conv2d_forward(launch_at(device), shape, streams_of(streams), pointer<const void>(in),
                       pointer<const float>(weight), pointer<const float>(bias), relu,
                       precision(stored), pointer<void>(out[0]), pointer<float>(out[1]));
}

void first_conv2d_grad_weight_py(const Device& device, const ConvShape& shape, int streams,
                                 int64_t splits, int64_t in, const std::string& stored,
                                 int64_t grad, int64_t weight, const std::array<int64_t, 2>& out) {
  first_conv2d_grad_weight(launch_at(device), shape, streams_of(streams), splits_of(splits),
                           pointer<const void>(in), precision(stored), pointer<const void>(grad),
                           pointer<const float>(weight), pointer<float>(out[0]),
                           pointer<float>(out[1]));
}

int64_t halo_conv2d_blocks_py(const ConvShape& shape) {
  const Grid grid =
      HaloConv2d<3, float>::make(shape, nullptr, nullptr, nullptr, false, 0, nullptr, nullptr)
          .grid();
  return grid.x * grid.y;
}

void halo_conv2d_pack_weight_py(const Device& device, const ConvShape& shape, int64_t weight,
                                const std::string& stored, int64_t out) {
  halo_conv2d_pack_weight(launch_at(device), shape, pointer<const float>(weight),
                          halo_precision(stored), pointer<uint32_t>(out));
}

void halo_conv2d_forward_py(const Device& device, const ConvShape& shape, int streams, int64_t in,
                            int64_t weight, int64_t bias, bool relu, const std::string& stored,
                            const std::array<int64_t, 2>& out) {
  halo_conv2d_forward(launch_at(device), shape, streams_of(streams), pointer<const void>(in),
                      pointer<const uint32_t>(weight), pointer<const float>(bias), relu,
                      halo_precision(stored), pointer<void>(out[0]), pointer<float>(out[1]));
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
  m.attr("architectures") = CIBP_CUDA_ARCHITECTURES;
}
