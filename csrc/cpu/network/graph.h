// A network that is more than a chain of affine layers with ReLU: batch norm in training mode, sums
// of two branches, leaky ReLU, values that several layers read. Where network.h takes an example
// through all layers at once, here each layer takes the whole batch: batch norm needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "network.h"

namespace cibp {

// An activation that does not fall.
enum class Curve {
  kLeaky,        // x where x > 0, a x elsewhere; a = 0: ReLU, a = 1: none
  kHardtanh,     // x within [a, b], and the nearer end elsewhere
  kExponential,  // c x where x > 0, a (exp(b x) - 1) elsewhere
  kSigmoid,
  kTanh,
};

template <class T>
struct Activation {
  Curve curve = Curve::kLeaky;
  T a = 1, b = 0, c = 0;

  bool none() const { return curve == Curve::kLeaky && a == 1; }
  bool relu() const { return curve == Curve::kLeaky && a == 0; }
};

// What a node reads: a value behind an activation.
struct Edge {
  int64_t value = 0;  // 0: what the network is given; k + 1: that of node k
  Activation<double> activation;
};

// A depthwise one has as many groups as channels, input and output.
enum class NodeKind { kAffine, kPool, kSum, kDepthwise };

// A node's value is what it makes of what it reads, behind its batch norm.
struct Node {
  NodeKind kind = NodeKind::kAffine;
  Shape shape;         // of a sum only the output's counts
  bool fast = false;   // as in NetworkLayer
  Edge a, b;           // b: of a sum
  bool norm = false;   // batch norm, with the statistics of the nominal points of the batch
  bool fixed = false;  // or with statistics that are given
  double eps = 0;      // that is added to the variance
};

template <class T>
struct GraphForward {
  int threads;
  // [nodes], null where there is none: weights as in NetworkForward, the others [out_channels]
  std::vector<const T*> weights, biases, gammas, betas;
  Tensor4<const T> lower, upper, nominal;  // [N, C, H, W]
  bool mean;                               // as in NetworkForward
  // outputs
  std::byte* saved;                        // [Graph::saved_bytes], from a line of the cache on
  T *lower_out, *upper_out, *nominal_out;  // [N, classes]
  T *head_lower, *head_upper;              // [N, features of the last node]: what it reads
  // [3, nodes] of (upper - lower)^2: of what a node makes (0 of pooling and sums), of its value
  // behind its norm, and behind the (first) activation with which it is read, or 0; 0 at infinity
  T* widths;
  // [kMoments, nodes], or null: means over batch and units of what moments.h sums up, of its value
  // behind its norm, if it is read with an activation, or 0
  double* moments;
  // [nodes] [out_channels], of norms: of the batch, biased; of fixed ones they are read
  std::vector<T*> means, variances;
};

template <class T>
struct GraphBackward {
  int threads;
  std::vector<const T*> weights, gammas, betas;  // as in the forward pass
  bool mean;
  const std::byte* saved;
  std::vector<const T*> means, variances;
  const T *lower_out, *upper_out;                   // [N, classes]
  const T *grad_lower, *grad_upper, *grad_nominal;  // [N, classes]
  const T *grad_head_lower, *grad_head_upper;       // [N, features], or null
  const T* grad_widths;                             // [3, nodes], or null
  const double* grad_moments;                       // [kMoments, nodes], or null
  // outputs; null: not wanted
  T *grad_lower_in, *grad_upper_in, *grad_nominal_in;
  std::vector<T*> grad_weights, grad_biases, grad_gammas, grad_betas;  // [nodes]
};

template <class E>
struct GraphPlan;

// As Network. What is given is boxes with a nominal point.
template <class E>
class Graph {
 public:
  // The batch is at least 1. The last node is affine and dense, without a norm, and nothing reads
  // it; all others are read; what is given is read by one node, which is affine, not depthwise.
  explicit Graph(const std::vector<Node>& nodes);

  int64_t saved_bytes() const;
  std::vector<int64_t> example_bytes() const;  // of each thing that is saved, per example
  void forward(const GraphForward<Number<E>>& op) const;
  void backward(const GraphBackward<Number<E>>& op) const;

 private:
  std::shared_ptr<const GraphPlan<E>> plan_;
};

}  // namespace cibp
