// One build of the CPU kernels as a Python module: raw pointers and strides in, no torch headers.
//
// cibp_fast/ops, fusion/layers.py and losses.py check dtypes, devices and shapes; cibp_fast/ops
// allocates the outputs and keeps every tensor alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/linear.h"
#include "cpu/loss.h"
#include "cpu/memory.h"
#include "cpu/network/graph.h"
#include "cpu/network/network.h"
#include "cpu/network/train.h"
#include "cpu/peak.h"
#include "cpu/relu.h"

#ifndef CIBP_MODULE
#define CIBP_MODULE _cpu_portable
#endif

namespace py = pybind11;
using namespace cibp;
using namespace py::literals;

namespace {

using Tensor = std::array<int64_t, 5>;  // data pointer (0: absent), strides in elements

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

template <class T>
Tensor4<const T> tensor4(const Tensor& t) {
  return {pointer<const T>(t[0]), {t[1], t[2], t[3], t[4]}};
}

template <class T>
Tensor2<const T> tensor2(const Tensor& t) {
  return {pointer<const T>(t[0]), {t[1], t[2]}};
}

template <class T>
void conv2d_forward_py(const Shape& shape, int threads, const std::array<Tensor, 4>& in,
                       int64_t bias, const std::array<int64_t, 4>& out) {
  conv2d_forward<T>({shape, threads, tensor4<T>(in[0]), tensor4<T>(in[1]), tensor4<T>(in[2]),
                     tensor4<T>(in[3]), pointer<const T>(bias), pointer<T>(out[0]),
                     pointer<T>(out[1]), pointer<T>(out[2]), pointer<T>(out[3])});
}

template <class T>
void conv2d_backward_py(const Shape& shape, int threads, const std::array<Tensor, 9>& in,
                        double grad_width, const std::array<int64_t, 5>& out) {
  conv2d_backward<T>({shape, threads, tensor4<T>(in[0]), tensor4<T>(in[1]), tensor4<T>(in[2]),
                      tensor4<T>(in[3]), tensor4<T>(in[4]), static_cast<T>(grad_width),
                      tensor4<T>(in[5]), tensor4<T>(in[6]), tensor4<T>(in[7]), tensor4<T>(in[8]),
                      pointer<T>(out[0]), pointer<T>(out[1]), pointer<T>(out[2]),
                      pointer<T>(out[3]), pointer<T>(out[4])});
}

template <class T>
void linear_forward_py(const LinearShape& shape, int threads, const std::array<Tensor, 4>& in,
                       int64_t bias, const std::array<int64_t, 4>& out) {
  linear_forward<T>({shape, threads, tensor2<T>(in[0]), tensor2<T>(in[1]), tensor2<T>(in[2]),
                     tensor2<T>(in[3]), pointer<const T>(bias), pointer<T>(out[0]),
                     pointer<T>(out[1]), pointer<T>(out[2]), pointer<T>(out[3])});
}

template <class T>
void linear_backward_py(const LinearShape& shape, int threads, const std::array<Tensor, 9>& in,
                        double grad_width, const std::array<int64_t, 5>& out) {
  linear_backward<T>({shape, threads, tensor2<T>(in[0]), tensor2<T>(in[1]), tensor2<T>(in[2]),
                      tensor2<T>(in[3]), tensor2<T>(in[4]), static_cast<T>(grad_width),
                      tensor2<T>(in[5]), tensor2<T>(in[6]), tensor2<T>(in[7]), tensor2<T>(in[8]),
                      pointer<T>(out[0]), pointer<T>(out[1]), pointer<T>(out[2]),
                      pointer<T>(out[3]), pointer<T>(out[4])});
}

template <class T>
void relu_forward_py(int64_t size, int threads, const std::array<int64_t, 3>& in,
                     const std::array<int64_t, 4>& out) {
  relu_forward<T>({size, threads, pointer<const T>(in[0]), pointer<const T>(in[1]),
                   pointer<const T>(in[2]), pointer<T>(out[0]), pointer<T>(out[1]),
                   pointer<T>(out[2]), pointer<T>(out[3])});
}

template <class T>
void relu_backward_py(int64_t size, int threads, const std::array<int64_t, 6>& in,
                      double grad_width, const std::array<int64_t, 3>& out) {
  relu_backward<T>({size, threads, pointer<const T>(in[0]), pointer<const T>(in[1]),
                    pointer<const T>(in[2]), pointer<const T>(in[3]), pointer<const T>(in[4]),
                    pointer<const T>(in[5]), static_cast<T>(grad_width), pointer<T>(out[0]),
                    pointer<T>(out[1]), pointer<T>(out[2])});
}

template <class T>
bool loss_forward_py(const LinearShape& shape, int threads, const std::array<int64_t, 6>& in,
                     const std::array<int64_t, 3>& out) {
  return loss_forward<T>({shape, threads, pointer<const T>(in[0]), pointer<const T>(in[1]),
                          pointer<const T>(in[2]), pointer<const T>(in[3]), pointer<const T>(in[4]),
                          pointer<const int64_t>(in[5]), pointer<T>(out[0]), pointer<T>(out[1]),
                          pointer<T>(out[2])});
}

template <class T>
bool loss_backward_py(const LinearShape& shape, int threads, const std::array<int64_t, 7>& in,
                      const std::array<int64_t, 5>& out) {
  return loss_backward<T>({shape, threads, pointer<const T>(in[0]), pointer<const T>(in[1]),
                           pointer<const T>(in[2]), pointer<const T>(in[3]),
                           pointer<const T>(in[4]), pointer<const int64_t>(in[5]),
                           pointer<const T>(in[6]), pointer<T>(out[0]), pointer<T>(out[1]),
                           pointer<T>(out[2]), pointer<T>(out[3]), pointer<T>(out[4])});
}

// Memory for what the forward pass saves.
class Buffer : public Memory {
 public:
  using Memory::Memory;
  py::buffer_info view() { return {static_cast<uint8_t*>(data()), static_cast<ssize_t>(size())}; }
};

template <class P>
std::vector<P*> pointers(const std::vector<int64_t>& addresses) {
  std::vector<P*> all;
  for (const int64_t address : addresses) all.push_back(pointer<P>(address));
  return all;
}

template <class E>
void network_forward_py(const Network<E>& network, int threads, const std::vector<int64_t>& weights,
                        const std::vector<int64_t>& biases, const std::array<Tensor, 3>& in,
                        int64_t ball_radius, bool mean, int64_t saved,
                        const std::array<int64_t, 6>& out) {
  using T = Number<E>;
  network.forward({threads, pointers<const T>(weights), pointers<const T>(biases),
                   tensor4<T>(in[0]), tensor4<T>(in[1]), tensor4<T>(in[2]),
                   pointer<const T>(ball_radius), nullptr, mean, pointer<std::byte>(saved),
                   pointer<T>(out[0]), pointer<T>(out[1]), pointer<T>(out[2]), pointer<T>(out[3]),
                   pointer<T>(out[4]), pointer<T>(out[5])});
}

template <class E>
void network_backward_py(const Network<E>& network, int threads,
                         const std::vector<int64_t>& weights, int64_t ball_radius, bool mean,
                         int64_t saved, const std::array<int64_t, 8>& in,
                         const std::array<int64_t, 3>& out,
                         const std::vector<int64_t>& grad_weights,
                         const std::vector<int64_t>& grad_biases) {
  using T = Number<E>;
  network.backward({threads, pointers<const T>(weights), pointer<const T>(ball_radius), mean,
                    pointer<const std::byte>(saved), pointer<const T>(in[0]),
                    pointer<const T>(in[1]), pointer<const T>(in[2]), pointer<const T>(in[3]),
                    pointer<const T>(in[4]), pointer<const T>(in[5]), pointer<const T>(in[6]),
                    pointer<const T>(in[7]), pointer<T>(out[0]), pointer<T>(out[1]),
                    pointer<T>(out[2]), pointers<T>(grad_weights), pointers<T>(grad_biases)});
}

template <class E>
void define_network(py::module_& m, const char* suffix) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Network<E>>(m, (std::string("Network_") + suffix).c_str(), py::module_local())
      .def(py::init<const std::vector<NetworkLayer>&, Given>(), "layers"_a, "given"_a)
      .def_property_readonly("saved_bytes", &Network<E>::saved_bytes)
      .def_property_readonly("example_bytes", &Network<E>::example_bytes)
      .def("forward", &network_forward_py<E>, Unlocked())
      .def("backward", &network_backward_py<E>, Unlocked());
}

// Addresses of one kind for each node; 0: none.
using Addresses = std::vector<int64_t>;

template <class E>
void graph_forward_py(const Graph<E>& graph, int threads,
                      const std::array<Addresses, 4>& parameters, const std::array<Tensor, 3>& in,
                      bool mean, int64_t saved, const std::array<int64_t, 6>& out, int64_t moments,
                      const std::array<Addresses, 2>& statistics) {
  using T = Number<E>;
  graph.forward({threads, pointers<const T>(parameters[0]), pointers<const T>(parameters[1]),
                 pointers<const T>(parameters[2]), pointers<const T>(parameters[3]),
                 tensor4<T>(in[0]), tensor4<T>(in[1]), tensor4<T>(in[2]), mean,
                 pointer<std::byte>(saved), pointer<T>(out[0]), pointer<T>(out[1]),
                 pointer<T>(out[2]), pointer<T>(out[3]), pointer<T>(out[4]), pointer<T>(out[5]),
                 pointer<double>(moments), pointers<T>(statistics[0]), pointers<T>(statistics[1])});
}

template <class E>
void graph_backward_py(const Graph<E>& graph, int threads,
                       const std::array<Addresses, 3>& parameters, bool mean, int64_t saved,
                       const std::array<Addresses, 2>& statistics, const std::array<int64_t, 8>& in,
                       int64_t grad_moments, const std::array<int64_t, 3>& out,
                       const std::array<Addresses, 4>& gradients) {
  using T = Number<E>;
  graph.backward({threads,
                  pointers<const T>(parameters[0]),
                  pointers<const T>(parameters[1]),
                  pointers<const T>(parameters[2]),
                  mean,
                  pointer<const std::byte>(saved),
                  pointers<const T>(statistics[0]),
                  pointers<const T>(statistics[1]),
                  pointer<const T>(in[0]),
                  pointer<const T>(in[1]),
                  pointer<const T>(in[2]),
                  pointer<const T>(in[3]),
                  pointer<const T>(in[4]),
                  pointer<const T>(in[5]),
                  pointer<const T>(in[6]),
                  pointer<const T>(in[7]),
                  pointer<const double>(grad_moments),
                  pointer<T>(out[0]),
                  pointer<T>(out[1]),
                  pointer<T>(out[2]),
                  pointers<T>(gradients[0]),
                  pointers<T>(gradients[1]),
                  pointers<T>(gradients[2]),
                  pointers<T>(gradients[3])});
}

template <class E>
void define_graph(py::module_& m, const char* suffix) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Graph<E>>(m, (std::string("Graph_") + suffix).c_str(), py::module_local())
      .def(py::init<const std::vector<Node>&>(), "nodes"_a)
      .def_property_readonly("saved_bytes", &Graph<E>::saved_bytes)
      .def_property_readonly("example_bytes", &Graph<E>::example_bytes)
      .def("forward", &graph_forward_py<E>, Unlocked())
      .def("backward", &graph_backward_py<E>, Unlocked());
}

// One step of training; the addresses of a parameter are those of its value and its two moments.
template <class E>
void define_train_step(py::module_& m, const char* suffix) {
  using Addresses = std::array<int64_t, 4>;  // and its size
  py::class_<TrainStep<E>>(m, (std::string("TrainStep_") + suffix).c_str(), py::module_local())
      .def(py::init([](const std::vector<NetworkLayer>& layers, bool ball,
                       const std::vector<Addresses>& weights, const std::vector<Addresses>& biases,
                       int64_t images, int64_t labels, int64_t plan, int64_t pixels,
                       std::array<float, 2> clip, std::array<int64_t, 2> normalize,
                       double width_weight, bool mean) {
             const auto parameters = [](const std::vector<Addresses>& given) {
               std::vector<Parameter> all;
               for (const Addresses& each : given)
                 all.push_back({pointer<float>(each[0]), pointer<float>(each[1]),
                                pointer<float>(each[2]), each[3]});
               return all;
             };
             return TrainStep<E>({layers, ball, parameters(weights), parameters(biases),
                                  pointer<const uint8_t>(images), pointer<const int64_t>(labels),
                                  pointer<const int32_t>(plan), pointer<const float>(pixels),
                                  clip[0], clip[1], pointer<const float>(normalize[0]),
                                  pointer<const float>(normalize[1]), width_weight, mean});
           }),
           py::kw_only(), "layers"_a, "ball"_a, "weights"_a, "biases"_a, "images"_a, "labels"_a,
           "plan"_a, "pixels"_a, "clip"_a, "normalize"_a, "width_weight"_a, "mean"_a)
      .def_property_readonly("saved_bytes", &TrainStep<E>::saved_bytes)
      .def(
          "run",
          [](TrainStep<E>& self, int threads, int64_t first, int64_t number, double eps,
             double kappa, double lr, int64_t totals) {
            return self.run({threads, first, number, eps, kappa, lr}, pointer<double>(totals));
          },
          "threads"_a, "first"_a, "number"_a, "eps"_a, "kappa"_a, "lr"_a, "totals"_a,
          py::call_guard<py::gil_scoped_release>());
}

template <class T>
void define(py::module_& m, const char* suffix) {
  const auto def = [&](const char* name, auto function) {
    m.def((std::string(name) + suffix).c_str(), function, py::call_guard<py::gil_scoped_release>());
  };
  def("conv2d_forward_", &conv2d_forward_py<T>);
  def("conv2d_backward_", &conv2d_backward_py<T>);
  def("linear_forward_", &linear_forward_py<T>);
  def("linear_backward_", &linear_backward_py<T>);
  def("loss_forward_", &loss_forward_py<T>);
  def("loss_backward_", &loss_backward_py<T>);
  def("peak_flops_", &peak_flops<T>);
  def("relu_forward_", &relu_forward_py<T>);
  def("relu_backward_", &relu_backward_py<T>);
  define_network<T>(m, suffix);
  define_graph<T>(m, suffix);
}

// The geometry of layers, by the names that kernels/shape.py has. All classes are the module's own:
// the other instruction sets' modules have them too.
void define_shapes(py::module_& m) {
  using Pair = std::array<int64_t, 2>;
  py::class_<Shape>(m, "Shape", py::module_local())
      .def(py::init([](int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                       int64_t out_channels, int64_t out_height, int64_t out_width,
                       int64_t kernel_height, int64_t kernel_width, Pair stride, Pair padding,
                       Pair dilation, int64_t groups, bool channels_last) {
             return Shape{batch,      in_channels,  in_height,     in_width,     out_channels,
                          out_height, out_width,    kernel_height, kernel_width, stride[0],
                          stride[1],  padding[0],   padding[1],    dilation[0],  dilation[1],
                          groups,     channels_last};
           }),
           py::kw_only(), "batch"_a, "in_channels"_a, "in_height"_a, "in_width"_a, "out_channels"_a,
           "out_height"_a, "out_width"_a, "kernel_height"_a, "kernel_width"_a, "stride"_a,
           "padding"_a, "dilation"_a, "groups"_a, "channels_last"_a = false);
  py::class_<LinearShape>(m, "LinearShape", py::module_local())
      .def(py::init([](int64_t batch, int64_t in_features, int64_t out_features) {
             return LinearShape{batch, in_features, out_features};
           }),
           py::kw_only(), "batch"_a, "in_features"_a, "out_features"_a);
  py::enum_<Given>(m, "Given", py::module_local())
      .value("boxes", Given::kBoxes)
      .value("balls", Given::kBalls)
      .value("points", Given::kPoints)
      .value("real", Given::kReal)
      .value("float32", Given::kFloat32);
  py::class_<NetworkLayer>(m, "NetworkLayer", py::module_local())
      .def(py::init([](const Shape& shape, bool relu, bool pool, bool fast) {
             return NetworkLayer{shape, relu, pool, fast};
           }),
           py::kw_only(), "shape"_a, "relu"_a, "pool"_a, "fast"_a);
  py::enum_<NodeKind>(m, "NodeKind", py::module_local())
      .value("affine", NodeKind::kAffine)
      .value("pool", NodeKind::kPool)
      .value("sum", NodeKind::kSum)
      .value("depthwise", NodeKind::kDepthwise);
  py::enum_<Curve>(m, "Curve", py::module_local())
      .value("leaky", Curve::kLeaky)
      .value("hardtanh", Curve::kHardtanh)
      .value("exponential", Curve::kExponential)
      .value("sigmoid", Curve::kSigmoid)
      .value("tanh", Curve::kTanh);
  py::class_<Edge>(m, "Edge", py::module_local())
      .def(py::init([](int64_t value, Curve curve, const std::array<double, 3>& numbers) {
             return Edge{value, {curve, numbers[0], numbers[1], numbers[2]}};
           }),
           py::kw_only(), "value"_a, "curve"_a, "numbers"_a);
  py::class_<Node>(m, "Node", py::module_local())
      .def(py::init([](NodeKind kind, const Shape& shape, bool fast, const Edge& a, const Edge& b,
                       bool norm, bool fixed,
                       double eps) { return Node{kind, shape, fast, a, b, norm, fixed, eps}; }),
           py::kw_only(), "kind"_a, "shape"_a, "fast"_a, "a"_a, "b"_a, "norm"_a, "fixed"_a,
           "eps"_a);
}

// Instruction sets of this CPU that a build may need, as the operating system lets them be used.
py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  features["avx512"] = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                       __builtin_cpu_supports("fma");
#if defined(__clang__) || __GNUC__ >= 11
  features["avx512bf16"] = features["avx512"].cast<bool>() && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(CIBP_MODULE, m) {
  m.doc() = "Interval kernels for one CPU instruction set; see cibp_fast.ops and cibp_fast.fusion.";
  define_shapes(m);
  define<float>(m, "float32");
  define<double>(m, "float64");
  define_network<BFloat16>(m, "bfloat16");
  define_graph<BFloat16>(m, "bfloat16");
  define_train_step<float>(m, "float32");
  define_train_step<BFloat16>(m, "bfloat16");
  m.def("cpu_features", &cpu_features);
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "bytes that are used again")
      .def(py::init<size_t>())
      .def_buffer(&Buffer::view);
  m.attr("vector_bytes") = CIBP_VECTOR_BYTES;
#ifdef __AVX512BF16__
  m.attr("bf16_products") = true;
#else
  m.attr("bf16_products") = false;  // emulated
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#ifdef __VERSION__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
