"""One build of csrc/bindings_cpu.cpp; the other instruction sets' modules have the same names.

Tensors cross as integers, and nothing is checked: cibp_fast.ops does that. A tensor argument is
(data pointer or 0 for an absent one, then strides in elements), padded with zeros to five; bias and
outputs are data pointers (0: absent or not wanted). The headers in csrc/cpu name the arguments.
"""

from collections.abc import Sequence

vector_bytes: int
openmp: bool
compiler: str

def cpu_features() -> dict[str, bool]: ...
def conv2d_forward_float32(
    shape: Sequence[int],  # 17 numbers: Conv2dShape
    threads: int,
    tensors: Sequence[Sequence[int]],  # 4
    bias: int,
    outputs: Sequence[int],  # 4
    /,
) -> None: ...
def conv2d_backward_float32(
    shape: Sequence[int],
    threads: int,
    tensors: Sequence[Sequence[int]],  # 9
    grad_width: float,
    outputs: Sequence[int],  # 5
    /,
) -> None: ...
def linear_forward_float32(
    shape: Sequence[int],  # 3 numbers: LinearShape
    threads: int,
    tensors: Sequence[Sequence[int]],  # 4
    bias: int,
    outputs: Sequence[int],  # 4
    /,
) -> None: ...
def linear_backward_float32(
    shape: Sequence[int],
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
def stage_input_bytes_float32(
    shape: Sequence[int],  # 17 numbers: Conv2dShape
    first: bool,
    ball: bool,
    fast: bool,
    /,
) -> int: ...
def network_forward_float32(
    stages: Sequence[Sequence[int]],  # Conv2dShape, flags (1: ReLU, 2: fast), weight, bias
    threads: int,
    tensors: Sequence[Sequence[int]],  # 3
    ball_radius: int,
    packed_inputs: Sequence[int],  # of each stage
    divisors: Sequence[float],  # of each stage's width
    outputs: Sequence[int],  # 6
    /,
) -> None: ...
def network_backward_float32(
    stages: Sequence[Sequence[int]],
    threads: int,
    packed_inputs: Sequence[int],
    divisors: Sequence[float],
    ball_radius: int,
    inputs: Sequence[int],  # 8 data pointers
    outputs: Sequence[int],  # 3
    grad_weights: Sequence[int],  # of each stage
    grad_biases: Sequence[int],
    /,
) -> None: ...
def loss_forward_float32(
    shape: Sequence[int],  # 3 numbers: LossShape
    threads: int,
    inputs: Sequence[int],  # 6 data pointers
    outputs: Sequence[int],  # 3
    /,
) -> bool: ...  # whether the labels are in range; nothing is computed where they are not
def loss_backward_float32(
    shape: Sequence[int],
    threads: int,
    inputs: Sequence[int],  # 7 data pointers
    outputs: Sequence[int],  # 5
    /,
) -> bool: ...
def peak_flops_float32(threads: int, repeats: int, /) -> float: ...

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
stage_input_bytes_float64 = stage_input_bytes_float32
loss_forward_float64 = loss_forward_float32
loss_backward_float64 = loss_backward_float32
network_forward_float64 = network_forward_float32
network_backward_float64 = network_backward_float32
peak_flops_float64 = peak_flops_float32
