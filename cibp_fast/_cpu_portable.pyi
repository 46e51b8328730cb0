"""One build of csrc/bindings_cpu.cpp; the other instruction sets' modules have the same names.

Tensors cross as integers, and nothing is checked: cibp_fast.ops does that. A tensor argument is
(data pointer or 0 for an absent one, then strides in elements), padded with zeros to five; bias and
outputs are data pointers (0: absent or not wanted). The headers in csrc/cpu name the arguments.
"""

from collections.abc import Sequence
from enum import Enum

vector_bytes: int
openmp: bool
bf16_products: bool  # whether pairs of bfloat16 are multiplied by the CPU, or emulated
compiler: str

def cpu_features() -> dict[str, bool]: ...
def conv2d_forward_float32(
    shape: Shape,
    threads: int,
    tensors: Sequence[Sequence[int]],  # 4
    bias: int,
    outputs: Sequence[int],  # 4
    /,
) -> None: ...
def conv2d_backward_float32(
    shape: Shape,
    threads: int,
    tensors: Sequence[Sequence[int]],  # 9
    grad_width: float,
    outputs: Sequence[int],  # 5
    /,
) -> None: ...
def linear_forward_float32(
    shape: LinearShape,
    threads: int,
    tensors: Sequence[Sequence[int]],  # 4
    bias: int,
    outputs: Sequence[int],  # 4
    /,
) -> None: ...
def linear_backward_float32(
    shape: LinearShape,
    threads: int,
    tensors: Sequence[Sequence[int]],  # 9
    grad_width: float,
    outputs: Sequence[int],  # 5
    /,
) -> None: ...
def relu_forward_float32(
    size: int,
    threads: int,
    inputs: Sequence[int],  # 3 data pointers
    outputs: Sequence[int],  # 4
    /,
) -> None: ...
def relu_backward_float32(
    size: int,
    threads: int,
    inputs: Sequence[int],  # 6 data pointers
    grad_width: float,
    outputs: Sequence[int],  # 3
    /,
) -> None: ...
def loss_forward_float32(
    shape: LinearShape,
    threads: int,
    inputs: Sequence[int],  # 6 data pointers
    outputs: Sequence[int],  # 3
    /,
) -> bool: ...  # whether the labels are in range; nothing is computed where they are not
def loss_backward_float32(
    shape: LinearShape,
    threads: int,
    inputs: Sequence[int],  # 7 data pointers
    outputs: Sequence[int],  # 5
    /,
) -> bool: ...
def peak_flops_float32(threads: int, repeats: int, /) -> float: ...

class Shape:
    """The geometry of a layer: kernels/shape.py has the same fields."""

    def __init__(
        self,
        *,
        batch: int,
        in_channels: int,
        in_height: int,
        in_width: int,
        out_channels: int,
        out_height: int,
        out_width: int,
        kernel_height: int,
        kernel_width: int,
        stride: Sequence[int],  # vertical, horizontal, as padding and dilation
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool = False,
    ) -> None: ...

class LinearShape:
    def __init__(self, *, batch: int, in_features: int, out_features: int) -> None: ...

class NetworkLayer:
    def __init__(self, *, shape: Shape, relu: bool, pool: bool, fast: bool) -> None: ...

class Given(Enum):
    boxes = 0
    balls = 1
    points = 2
    real = 3
    float32 = 4

class Network_float32:
    """csrc/cpu/network/network.h: Network. Layers without weight or bias have the address 0."""

    def __init__(self, layers: Sequence[NetworkLayer], given: Given) -> None: ...
    @property
    def saved_bytes(self) -> int: ...
    @property
    def example_bytes(self) -> list[int]: ...  # of each layer's input
    def forward(
        self,
        threads: int,
        weights: Sequence[int],  # of each layer
        biases: Sequence[int],
        tensors: Sequence[Sequence[int]],  # 3
        ball_radius: int,
        mean: bool,
        saved: int,
        outputs: Sequence[int],  # 6
        /,
    ) -> None: ...
    def backward(
        self,
        threads: int,
        weights: Sequence[int],
        ball_radius: int,
        mean: bool,
        saved: int,
        inputs: Sequence[int],  # 8 data pointers
        outputs: Sequence[int],  # 3
        grad_weights: Sequence[int],  # of each layer
        grad_biases: Sequence[int],
        /,
    ) -> None: ...

class NodeKind(Enum):
    affine = 0
    pool = 1
    sum = 2
    depthwise = 3

class Curve(Enum):
    leaky = 0
    hardtanh = 1
    exponential = 2
    sigmoid = 3
    tanh = 4

class Edge:
    def __init__(self, *, value: int, curve: Curve, numbers: Sequence[float]) -> None: ...

class Node:
    def __init__(
        self,
        *,
        kind: NodeKind,
        shape: Shape,
        fast: bool,
        a: Edge,
        b: Edge,
        norm: bool,
        fixed: bool,
        eps: float,
    ) -> None: ...

class Graph_float32:
    """csrc/cpu/network/graph.h: Graph. What a node has not has the address 0."""

    def __init__(self, nodes: Sequence[Node]) -> None: ...
    @property
    def saved_bytes(self) -> int: ...
    @property
    def example_bytes(self) -> list[int]: ...  # of each thing that is saved
    def forward(
        self,
        threads: int,
        parameters: Sequence[Sequence[int]],  # weights, biases, gammas and betas of each node
        tensors: Sequence[Sequence[int]],  # 3
        mean: bool,
        saved: int,
        outputs: Sequence[int],  # 6
        moments: int,  # 0: not wanted
        statistics: Sequence[Sequence[int]],  # means and variances of each node
        /,
    ) -> None: ...
    def backward(
        self,
        threads: int,
        parameters: Sequence[Sequence[int]],  # weights, gammas and betas of each node
        mean: bool,
        saved: int,
        statistics: Sequence[Sequence[int]],
        inputs: Sequence[int],  # 8 data pointers
        grad_moments: int,
        outputs: Sequence[int],  # 3
        gradients: Sequence[Sequence[int]],  # as the parameters of forward
        /,
    ) -> None: ...

class TrainStep_float32:
    """csrc/cpu/network/train.h: TrainStep. Absent parameters have zeros."""

    def __init__(
        self,
        *,
        layers: Sequence[NetworkLayer],
        ball: bool,
        weights: Sequence[Sequence[int]],  # of each layer: value, two moments, size
        biases: Sequence[Sequence[int]],
        images: int,
        labels: int,
        plan: int,
        pixels: int,
        clip: Sequence[float],
        normalize: Sequence[int],  # mean and std
        width_weight: float,
        mean: bool,
    ) -> None: ...
    @property
    def saved_bytes(self) -> int: ...
    def run(
        self,
        *,
        threads: int,
        first: int,
        number: int,
        eps: float,
        kappa: float,
        lr: float,
        totals: int,
    ) -> bool: ...  # whether all labels are classes

class Buffer:
    """Memory that is used again; its bytes are not initialised."""

    def __init__(self, bytes: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

conv2d_forward_float64 = conv2d_forward_float32
conv2d_backward_float64 = conv2d_backward_float32
linear_forward_float64 = linear_forward_float32
linear_backward_float64 = linear_backward_float32
relu_forward_float64 = relu_forward_float32
relu_backward_float64 = relu_backward_float32
loss_forward_float64 = loss_forward_float32
loss_backward_float64 = loss_backward_float32
Network_float64 = Network_float32
Network_bfloat16 = Network_float32
Graph_float64 = Graph_float32
Graph_bfloat16 = Graph_float32
TrainStep_bfloat16 = TrainStep_float32
peak_flops_float64 = peak_flops_float32
