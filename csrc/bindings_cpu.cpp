// One build of the CPU kernels as a Python module: raw pointers and strides in, no torch headers.
//
// cibp_fast/ops.py, _stages.py and losses.py check dtypes, devices and shapes; ops.py,
// _network_op.py and _loss_op.py allocate the outputs and keep every tensor alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/linear.h"
#include "cpu/loss.h"
#include "cpu/network/network.h"
#include "cpu/peak.h"
#include "cpu/relu.h"

#ifndef CIBP_MODULE
#define CIBP_MODULE _cpu_portable
#endif

namespace py = pybind11;
using namespace cibp;

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

Conv2dShape conv2d_shape(const std::array<int64_t, 17>& s) {
  return {s[0], s[1],  s[2],  s[3],  s[4],  s[5],  s[6],  s[7],      s[8],
          s[9], s[10], s[11], s[12], s[13], s[14], s[15], s[16] != 0};
}

template <class T>
void conv2d_forward_py(const std::array<int64_t, 17>& shape, int threads,
                       const std::array<Tensor, 4>& in, int64_t bias,
                       const std::array<int64_t, 4>& out) {
  conv2d_forward<T>({conv2d_shape(shape), threads, tensor4<T>(in[0]), tensor4<T>(in[1]),
                     tensor4<T>(in[2]), tensor4<T>(in[3]), pointer<const T>(bias),
                     pointer<T>(out[0]), pointer<T>(out[1]), pointer<T>(out[2]),
                     pointer<T>(out[3])});
}

template <class T>
void conv2d_backward_py(const std::array<int64_t, 17>& shape, int threads,
                        const std::array<Tensor, 9>& in, double grad_width,
                        const std::array<int64_t, 5>& out) {
  conv2d_backward<T>({conv2d_shape(shape), threads, tensor4<T>(in[0]), tensor4<T>(in[1]),
                      tensor4<T>(in[2]), tensor4<T>(in[3]), tensor4<T>(in[4]),
                      static_cast<T>(grad_width), tensor4<T>(in[5]), tensor4<T>(in[6]),
                      tensor4<T>(in[7]), tensor4<T>(in[8]), pointer<T>(out[0]), pointer<T>(out[1]),
                      pointer<T>(out[2]), pointer<T>(out[3]), pointer<T>(out[4])});
}

template <class T>
void linear_forward_py(const std::array<int64_t, 3>& s, int threads,
                       const std::array<Tensor, 4>& in, int64_t bias,
                       const std::array<int64_t, 4>& out) {
  linear_forward<T>({{s[0], s[1], s[2]},
                     threads,
                     tensor2<T>(in[0]),
                     tensor2<T>(in[1]),
                     tensor2<T>(in[2]),
                     tensor2<T>(in[3]),
                     pointer<const T>(bias),
                     pointer<T>(out[0]),
                     pointer<T>(out[1]),
                     pointer<T>(out[2]),
                     pointer<T>(out[3])});
}

template <class T>
void linear_backward_py(const std::array<int64_t, 3>& s, int threads,
                        const std::array<Tensor, 9>& in, double grad_width,
                        const std::array<int64_t, 5>& out) {
  linear_backward<T>({{s[0], s[1], s[2]},
                      threads,
                      tensor2<T>(in[0]),
                      tensor2<T>(in[1]),
                      tensor2<T>(in[2]),
                      tensor2<T>(in[3]),
                      tensor2<T>(in[4]),
                      static_cast<T>(grad_width),
                      tensor2<T>(in[5]),
                      tensor2<T>(in[6]),
                      tensor2<T>(in[7]),
                      tensor2<T>(in[8]),
                      pointer<T>(out[0]),
                      pointer<T>(out[1]),
                      pointer<T>(out[2]),
                      pointer<T>(out[3]),
                      pointer<T>(out[4])});
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
bool loss_forward_py(const std::array<int64_t, 3>& s, int threads, const std::array<int64_t, 6>& in,
                     const std::array<int64_t, 3>& out) {
  return loss_forward<T>({{s[0], s[1], s[2]},
                          threads,
                          pointer<const T>(in[0]),
                          pointer<const T>(in[1]),
                          pointer<const T>(in[2]),
                          pointer<const T>(in[3]),
                          pointer<const T>(in[4]),
                          pointer<const int64_t>(in[5]),
                          pointer<T>(out[0]),
                          pointer<T>(out[1]),
                          pointer<T>(out[2])});
}

template <class T>
bool loss_backward_py(const std::array<int64_t, 3>& s, int threads,
                      const std::array<int64_t, 7>& in, const std::array<int64_t, 5>& out) {
  return loss_backward<T>({{s[0], s[1], s[2]},
                           threads,
                           pointer<const T>(in[0]),
                           pointer<const T>(in[1]),
                           pointer<const T>(in[2]),
                           pointer<const T>(in[3]),
                           pointer<const T>(in[4]),
                           pointer<const int64_t>(in[5]),
                           pointer<const T>(in[6]),
                           pointer<T>(out[0]),
                           pointer<T>(out[1]),
                           pointer<T>(out[2]),
                           pointer<T>(out[3]),
                           pointer<T>(out[4])});
}

// Memory for what the forward pass saves, kept from call to call: fresh pages would cost small
// networks a tenth of their time. At most kKept blocks stay, so it is bounded by what was in use.
class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    if (bytes == 0) bytes = 1;
    const std::lock_guard<std::mutex> lock(mutex());
    auto best = kept().end();  // the smallest that is large enough, and not much too large
    for (auto it = kept().begin(); it != kept().end(); ++it)
      if (it->bytes >= bytes && it->bytes / 2 <= bytes &&
          (best == kept().end() || it->bytes < best->bytes))
        best = it;
    if (best != kept().end()) {
      block_ = *best;
      kept().erase(best);
    } else {
      block_ = {std::aligned_alloc(64, (bytes + 63) / 64 * 64), bytes};
      if (!block_.data) throw std::bad_alloc();
    }
    size_ = bytes;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    const std::lock_guard<std::mutex> lock(mutex());
    kept().push_back(block_);
    if (kept().size() > kKept) {  // the one unused for longest
      std::free(kept().front().data);
      kept().erase(kept().begin());
    }
  }
  py::buffer_info view() {
    return {static_cast<uint8_t*>(block_.data), static_cast<ssize_t>(size_)};
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  static constexpr size_t kKept = 2;
  // Never destroyed: tensors may outlive this module.
  static std::vector<Block>& kept() {
    static auto* blocks = [] {
      auto* made = new std::vector<Block>;
      made->reserve(kKept + 1);  // so that a destructor need not
      return made;
    }();
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* instance = new std::mutex;
    return *instance;
  }

  Block block_;
  size_t size_;
};

// shape, flags (1: ReLU, 2: fast), weight, bias
using StageNumbers = std::array<int64_t, 20>;

template <class T>
std::vector<Stage<T>> stages(const std::vector<StageNumbers>& numbers) {
  std::vector<Stage<T>> all;
  for (const StageNumbers& n : numbers) {
    std::array<int64_t, 17> shape;
    std::copy_n(n.begin(), 17, shape.begin());
    all.push_back({conv2d_shape(shape), (n[17] & 1) != 0, pointer<const T>(n[18]),
                   pointer<const T>(n[19]), (n[17] & 2) != 0});
  }
  return all;
}

template <class P>
std::vector<P*> pointers(const std::vector<int64_t>& addresses) {
  std::vector<P*> all;
  for (const int64_t address : addresses) all.push_back(pointer<P>(address));
  return all;
}

// Widths are the sums of squares, each divided by its divisor.
template <class T>
void network_forward_py(const std::vector<StageNumbers>& numbers, int threads,
                        const std::array<Tensor, 3>& in, int64_t ball_radius,
                        const std::vector<int64_t>& inputs, const std::vector<double>& divisors,
                        const std::array<int64_t, 6>& out) {
  network_forward<T>({threads, stages<T>(numbers), tensor4<T>(in[0]), tensor4<T>(in[1]),
                      tensor4<T>(in[2]), pointer<const T>(ball_radius), pointers<std::byte>(inputs),
                      pointer<T>(out[0]), pointer<T>(out[1]), pointer<T>(out[2]),
                      pointer<T>(out[3]), pointer<T>(out[4]), pointer<T>(out[5])});
  for (size_t i = 0; i < divisors.size(); ++i) pointer<T>(out[5])[i] /= static_cast<T>(divisors[i]);
}

template <class T>
void network_backward_py(const std::vector<StageNumbers>& numbers, int threads,
                         const std::vector<int64_t>& inputs, const std::vector<double>& divisors,
                         int64_t ball_radius, const std::array<int64_t, 8>& in,
                         const std::array<int64_t, 3>& out, const std::vector<int64_t>& weights,
                         const std::vector<int64_t>& biases) {
  std::vector<T> grad_squares(divisors.size());
  for (size_t i = 0; in[7] && i < divisors.size(); ++i)
    grad_squares[i] = pointer<const T>(in[7])[i] / static_cast<T>(divisors[i]);
  network_backward<T>({threads, stages<T>(numbers), pointers<const std::byte>(inputs),
                       pointer<const T>(ball_radius), pointer<const T>(in[0]),
                       pointer<const T>(in[1]), pointer<const T>(in[2]), pointer<const T>(in[3]),
                       pointer<const T>(in[4]), pointer<const T>(in[5]), pointer<const T>(in[6]),
                       grad_squares.data(), pointer<T>(out[0]), pointer<T>(out[1]),
                       pointer<T>(out[2]), pointers<T>(weights), pointers<T>(biases)});
}

template <class T>
int64_t stage_input_bytes_py(const std::array<int64_t, 17>& shape, bool first, bool ball,
                             bool fast) {
  return stage_input_bytes<T>(conv2d_shape(shape), first, ball, fast);
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
  def("network_forward_", &network_forward_py<T>);
  def("network_backward_", &network_backward_py<T>);
  def("stage_input_bytes_", &stage_input_bytes_py<T>);
  def("peak_flops_", &peak_flops<T>);
  def("relu_forward_", &relu_forward_py<T>);
  def("relu_backward_", &relu_backward_py<T>);
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
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(CIBP_MODULE, m) {
  m.doc() = "Interval kernels for one CPU instruction set; see cibp_fast.ops and cibp_fast.fusion.";
  define<float>(m, "float32");
  define<double>(m, "float64");
  m.def("cpu_features", &cpu_features);
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "bytes that are used again")
      .def(py::init<size_t>())
      .def_buffer(&Buffer::view);
  m.attr("vector_bytes") = CIBP_VECTOR_BYTES;
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
