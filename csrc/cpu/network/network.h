// A whole network of affine layers with ReLU between them: all streams through all layers in one
// blocked layout, forward and backward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../shape.h"
#include "../vec.h"

namespace cibp {

// An affine layer as a convolution (of one group), and whether ReLU follows it. A linear layer is
// one whose kernel covers its whole input; such layers are dense, and only dense ones may follow
// them. Average pooling has no weight and bias, and is neither first nor last.
struct NetworkLayer {
  Shape shape;
  bool relu = false;
  bool pool = false;
  bool fast = false;  // may round more: in faster products, and in what is saved of its input
};

// Examples of a data set: bytes, which tables turn into a box.
template <class T>
struct Images {
  const uint8_t* bytes;  // [E, C, H, W]
  const int32_t* plan;   // [N, 4]: example, and by how much it moves up and left, and whether it is
                         // mirrored, then; what comes in is 0
  const T* tables;       // [3, C, 256]: center, radius and nominal of each byte
};

// Of a network of points, x and its logits are the nominal streams, and nothing else is read or
// written but `saved`.
template <class T>
struct NetworkForward {
  int threads;
  std::vector<const T*> weights;  // [layers] [out_channels, in_channels, height, width]; pool: null
  std::vector<const T*> biases;   // [layers] [out_channels] or null
  Tensor4<const T> lower, upper, nominal;  // [N, C, H, W]
  const T* ball_radius;                    // [C], of a network of a ball, or null
  const Images<T>* images;                 // to be read in place of lower, upper, nominal; or null
  bool mean;  // whether widths are means over examples and units, or sums of an example's units
  // outputs
  std::byte* saved;  // [Network::saved_bytes], from a line of the cache on; null: nothing is kept
  T *lower_out, *upper_out, *nominal_out;  // [N, classes]
  T *head_lower, *head_upper;              // [N, features of the last layer], in its order
  T* widths;  // [layers] of (upper - lower)^2 after ReLU, 0 at infinity
};

template <class T>
struct NetworkBackward {
  int threads;
  std::vector<const T*> weights;
  const T* ball_radius;  // as in the forward pass; the box has no gradient then
  bool mean;
  const std::byte* saved;
  const T *lower_out, *upper_out;                   // [N, classes]
  const T *grad_lower, *grad_upper, *grad_nominal;  // [N, classes]; of points, the last alone
  const T *grad_head_lower, *grad_head_upper;       // [N, features], or null
  const T* grad_widths;                             // [layers], or null
  // outputs
  // [N, C, H, W]; or all null, as of a ball; of points, the last alone
  T *grad_lower_in, *grad_upper_in, *grad_nominal_in;
  std::vector<T*> grad_weights, grad_biases;  // [layers]; null: not wanted, and of pooling
};

template <class E>
struct NetworkPlan;

// What a network is given: boxes with a nominal point; the same, where the box is exactly nominal
// +- a radius for each channel (lower and upper are not read, and the first layer is an unpadded
// convolution); or points alone, three of which take the place of a box in all that is packed. Or
// boxes whose bounds must be sound, in the semantics "real" or "float32" (sound.h): then what
// counts is the last layer's input and the nominal logits, and there is no backward pass.
enum class Given { kBoxes, kBalls, kPoints, kReal, kFloat32 };

// What the passes of a network need besides its tensors, made once: plans, offsets, sizes. Several
// threads may call it at a time. E: what is packed and saved (layers.h), float, double or BFloat16.
template <class E>
class Network {
 public:
  // The batch is at least 1; the last layer is dense, without ReLU. Points are float or double.
  Network(const std::vector<NetworkLayer>& layers, Given given);

  int64_t saved_bytes() const;
  std::vector<int64_t> example_bytes() const;  // what is saved of each layer's input, per example
  void forward(const NetworkForward<Number<E>>& op) const;
  void backward(const NetworkBackward<Number<E>>& op) const;

 private:
  std::shared_ptr<const NetworkPlan<E>> plan_;
};

}  // namespace cibp
