"""The geometry of a layer, for all kernels: those of Triton, of CUDA C++ and of the CPU."""

from __future__ import annotations

from typing import NamedTuple

CONSTANTS = (
    *("CIN", "IH", "IW", "COUT", "OH", "OW", "KH", "KW"),
    *("SH", "SW", "PH", "PW", "DH", "DW"),  # stride, padding, dilation
)


class Shape(NamedTuple):
    """Describes a convolution, or an average pooling (groups = in_channels).

    Padding is with zeros: before the input as given, after it as needed. A linear layer is a 1x1
    convolution of 1x1 images. csrc/cpu/shape.h has the same fields.
    """

    batch: int
    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    channels_last: bool = False  # how images are written: [N, H, W, C] in memory, or [N, C, H, W]

    @property
    def out_pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def output(self) -> tuple[int, int, int, int]:
        """Gives the output's shape, [N, C, H, W]."""
        return self.batch, self.out_channels, self.out_height, self.out_width

    @property
    def products(self) -> int:
        """Returns how many one output is the sum of."""
        return self.kernel_height * self.kernel_width * self.in_channels

    def check_size(self) -> None:
        """Raises ValueError where a stream has more elements than the kernels can count."""
        pixels = self.batch * self.in_height * self.in_width
        size = max(pixels * self.in_channels, self.out_pixels * self.out_channels)
        if size >= 2**31:
            raise ValueError(
                f"a layer's inputs and outputs must have fewer than 2**31 elements, got {size} "
                f"with a batch of {self.batch}: take a smaller one"
            )

    def constants(self) -> dict[str, int]:
        """Returns what the kernels are compiled for."""
        sizes = (*self[1:9], *self.stride, *self.padding, *self.dilation)
        return dict(zip(CONSTANTS, sizes, strict=True))
