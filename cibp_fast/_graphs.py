"""Functions of tensors as CUDA graphs: captured once for tensors of each shape, then replayed.

A replay is one launch, where the function has one for each of its kernels and Python between them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Function = Callable[..., tuple[Tensor, ...]]


def capturing() -> bool:
    """Returns whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Graphed:
    """Calls a function of tensors; a GPU replays it from the third call of a shape on.

    The first call sets up what the function uses: kernels are compiled, libraries get workspaces.
    The second one must not wait for the GPU, as a capture must not, but fails without harm. A
    function that cannot be captured is called as it is, with a warning; so it is, without one, on
    the CPU and while someone else captures.

    Only the first calls run Python, hooks and checks of values included. What the function reads
    besides its arguments must stay where it is; its values may change.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._graphs: dict[Hashable, _Graph | None] = {}  # None after a first call
        self._refused = False
        self._place: tuple[torch.cuda.Stream, Any] | None = None  # of all captures, and their pool

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, times: int = 1) -> tuple[Tensor, ...]:
        """Returns `function(*inputs)`, without gradients.

        times: calls it so often, each time with what it returned in place of its first inputs.
        """
        loops = times > 1
        key = (loops, *((each.shape, each.stride(), each.dtype, each.device) for each in inputs))
        outputs: tuple[Tensor, ...] = ()
        for left in range(times, 0, -1):
            inputs = (*outputs, *inputs[len(outputs) :])
            if self._refused or not on_one_gpu(inputs) or capturing():
                outputs = self._function(*inputs)
            elif key not in self._graphs:
                outputs = self._function(*inputs)
                self._graphs[key] = None
            else:
                graph, why = self._graphs[key], ""
                try:
                    if graph is None:
                        graph = _Graph(self._function, inputs, loops)
                        outputs = graph.rehearsal()
                        self._graphs[key] = graph
                        continue
                    self._place = self._place or _place(inputs[0].device)
                    graph.capture(*self._place)
                except Exception as error:
                    why = _reason(error)
                if graph is not None and not why:
                    return graph(inputs, left)
                graph = self._graphs[key] = None  # its memory
                outputs = self._function(*inputs)  # raises what has nothing to do with waiting
                self._refused = True
                self._graphs.clear()
                warnings.warn(
                    "no CUDA graph could be made of the model, which runs slower without: " + why,
                    RuntimeWarning,
                    stacklevel=3,
                )
        return outputs


def _place(device: torch.device) -> tuple[torch.cuda.Stream, Any]:
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "there is no memory for it; smaller batches need less"
    return (
        f"{str(error).partition(chr(10))[0] or type(error).__name__} (a capture allows neither "
        "copies to or from the host nor decisions on values: .item(), `if tensor:`, boolean masks)"
    )


class _Graph:
    """Replays a function of tensors that are always the same: others are copied to them.

    Kernels may be compiled for addresses as these, so that the rehearsal has them too.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...], loops: bool) -> None:
        self._function, self._loops = function, loops
        self._inputs = tuple(each.clone() for each in inputs)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def _once(self) -> tuple[Tensor, ...]:
        outputs = self._function(*self._inputs)
        if self._loops:
            for static, output in zip(self._inputs, outputs, strict=False):
                static.copy_(output)
        return outputs

    def rehearsal(self) -> tuple[Tensor, ...]:
        """Returns the outputs; raises RuntimeError where a capture would fail."""
        with _no_waiting():
            return tuple(each.clone() for each in self._once())

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Captures the graph, unless that is done."""
        if self._graph is None:
            self._graph, self._outputs = capture(self._once, stream, pool)

    def __call__(self, inputs: tuple[Tensor, ...], times: int) -> tuple[Tensor, ...]:
        assert self._graph is not None
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        for _ in range(times):
            self._graph.replay()
        return tuple(each.clone() for each in self._outputs)  # the next replay writes over them


# Graphs whose capture could not be ended: torch's allocator goes on asking them for their streams.
_broken_off: list[torch.cuda.CUDAGraph] = []


def capture(
    function: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Captures what the function does on the stream's GPU; returns the graph, and its result.

    The function must have run before. Its tensors have values only after the first replay, which
    runs on the stream that is current then. Other threads may use the GPU meanwhile.
    """
    with torch.cuda.device(stream.device):
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                result = function()
        finally:
            if torch.cuda.current_stream() != current:  # where torch failed to end the capture
                torch.cuda.set_stream(current)
                _broken_off.append(graph)
    return graph, result


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes waiting for a GPU inside the block raise RuntimeError, if torch sees it."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # torch says once that this is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def on_one_gpu(tensors: tuple[Tensor, ...]) -> bool:
    return tensors[0].is_cuda and all(each.device == tensors[0].device for each in tensors)


class _Active(threading.local):
    reused: dict[Hashable, Graphed] | None = None


_active = _Active()


@contextmanager
def reuse_graphs() -> Iterator[None]:
    """Has `graphed` give the same for the same arguments inside the outermost such block.

    In it a model must keep its parameters' tensors, though not their values, and its modes.
    """
    previous = _active.reused
    _active.reused = {} if previous is None else previous
    try:
        yield
    finally:
        _active.reused = previous


def graphed(function: Function, model: object, *numbers: float) -> Graphed:
    """Returns `partial(function, model, *numbers)` as a `Graphed`."""
    made = Graphed(partial(function, model, *numbers))  # which holds the model, and so its id
    if _active.reused is None:
        return made
    return _active.reused.setdefault((function, id(model), *numbers), made)


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Names what was done, and what to do, where a GPU's memory runs out inside the block.

    The outermost of such blocks speaks: it knows what the user set.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = error.__cause__ if isinstance(error.__cause__, torch.OutOfMemoryError) else error
        why = str(first).partition(". ")[0]
        raise torch.OutOfMemoryError(f"{doing}: {why}; {remedy}") from first
