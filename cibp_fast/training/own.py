"""What a user brings to a training, checked before it begins: examples, a network, a loss."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from cibp_fast.certificates import evaluation
from cibp_fast.training.config import Config, OwnConfig, did_you_mean
from cibp_fast.training.datasets import CLASSES, INPUT_SHAPES, Dataset, Split
from cibp_fast.training.distributed import World
from cibp_fast.training.presets import OF_ATTACK
from cibp_fast.training.progress import bar

Shape = Sequence[int]  # of an example
MOST = 4  # members of a tuple or list that an error names


def dataset(data: Any) -> Dataset:
    """Returns the data set of a pair (train, test), each of which `split` takes.

    Raises TypeError or ValueError as that, and where the two do not fit each other.
    """
    parts = (data.train, data.test) if isinstance(data, Dataset) else data
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or isinstance(parts[0], Tensor):
        raise TypeError(
            "data must be a pair (train, test), each of them a pair of tensors (images, labels) or "
            f"a torch Dataset, not {_described(data)}"
        )
    train, test = (
        _stored(split(name, part)) for name, part in zip(("train", "test"), parts, strict=True)
    )
    shapes = [list(part.images.shape[1:]) for part in (train, test)]
    if shapes[0] != shapes[1] or train.images.dtype != test.images.dtype:
        raise ValueError(
            f"train and test must be alike, not {train.images.dtype} {shapes[0]} and "
            f"{test.images.dtype} {shapes[1]}"
        )
    if isinstance(data, Dataset):
        return Dataset(data.name, train, test)
    name = hashlib.sha256("".join(map(described, (train, test))).encode()).hexdigest()[:8]
    return Dataset(f"own-{name}", train, test)


def split(name: str, data: Any) -> Split:
    """Returns the examples of a pair of tensors, a map-style torch Dataset, or a Split.

    They are in memory then: a torch Dataset is read once, with the transforms that it has.

    Args:
        name: of data, for errors.
        data: images [N, ...], uint8 or floating-point, and labels [N] int64.

    Raises:
        TypeError: data is something else, or has no length.
        ValueError: it is empty, shapes do not fit, a label is negative, or an image is not finite.
    """
    if isinstance(data, Dataset):
        raise TypeError(f"{name} must be a part of a data set, its .train or .test, not all of it")
    if isinstance(data, Split):
        images, labels = data.images, data.labels
    elif isinstance(data, (tuple, list)):
        if len(data) != 2 or not all(isinstance(each, Tensor) for each in data):
            raise TypeError(
                f"{name} must be a pair of tensors, not {_described(data)}: single examples are "
                "for a torch Dataset"
            )
        images, labels = data
    else:
        images, labels = _read(name, data)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"the images of {name} must be uint8 or floating point, not {images.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"the labels of {name} must be int64, not {labels.dtype}")
    if images.dim() < 2 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"{name} must have images [N, ...] and labels [N] of one example or more, not "
            f"{list(images.shape)} and {list(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"the labels of {name} must be 0 or more, not {labels.min().item()}")
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError(f"the images of {name} must be finite, and some are NaN or infinite")
    return Split(images.detach(), labels)


def length(name: str, data: Any) -> int:
    """Returns the length. Raises TypeError where it is not known."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        raise TypeError(
            f"{name} must have a length, and a {type(data).__name__} of unknown length was given"
        ) from None


def _read(name: str, data: Any) -> tuple[Tensor, Tensor]:
    """Reads a map-style torch Dataset of pairs (image, label)."""
    if isinstance(data, DataLoader):
        raise TypeError(
            f"{name} must be a pair of tensors or a torch Dataset, not a DataLoader: batches are "
            "drawn here; give its .dataset"
        )
    count = length(name, data)
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise TypeError(f"{name} must give its examples by number, and {_described(data)} does not")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for index in bar(range(count), f"reading {name}", "example"):
        try:
            example = data[index]
        except Exception as error:
            raise ValueError(f"{name}[{index}] cannot be read: {_line(error)}") from error
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise ValueError(f"{name}[{index}] is no pair (image, label): {_described(example)}")
        image, label = example
        if not isinstance(image, Tensor):
            raise TypeError(
                f"{name}[{index}] must have a tensor as its image, not a {type(image).__name__}; "
                "a transform makes one, such as torchvision's ToTensor()"
            )
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            raise ValueError(
                f"the images of {name} must be alike: {name}[{index}] is {image.dtype} "
                f"{list(image.shape)}, {name}[0] {images[0].dtype} {list(images[0].shape)}"
            )
        images.append(image)
        labels.append(_label(f"{name}[{index}]", label))
    if not images:
        raise ValueError(f"{name} must hold one example or more, and it is empty")
    return torch.stack(images), torch.stack(labels)


def _label(where: str, label: Any) -> Tensor:
    """Returns the label as a tensor, 0-dim. Raises TypeError where it is no number."""
    with suppress(TypeError, ValueError, RuntimeError):
        made = torch.as_tensor(label)
        if not made.dim():
            return made
    found = list(label.shape) if isinstance(label, Tensor) else _described(label)
    raise TypeError(f"{where} must have one whole number as its label, not {found}")


def _stored(examples: Split) -> Split:
    """Returns the examples as training keeps them: uint8 or float32, in rows of one piece."""
    images = examples.images
    if images.dtype != torch.uint8:
        images = images.to(torch.float32)
    return Split(images.contiguous(), examples.labels.contiguous())


def described(examples: Split) -> str:
    """Describes examples in a few words that no others have: with the SHA-256 of their bytes."""
    images, labels = examples.images.cpu(), examples.labels.cpu()
    content = hashlib.sha256(images.numpy().tobytes())
    content.update(labels.numpy().tobytes())
    kind = str(images.dtype).removeprefix("torch.")
    return f"{kind} {list(images.shape)} sha256 {content.hexdigest()}"


def name_of(thing: Any) -> str:
    """Names a function or class `module:name`, and any other object by its class, `module.name`."""
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}:{thing.__qualname__}"
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def imported(text: str) -> Callable[..., Any]:
    """Returns what `package.module:factory` names, with modules of the current folder, too.

    Raises ValueError where there is no such module or name, the module fails, or what is named
    makes nothing.
    """
    where, _, name = text.partition(":")
    if not where or not name.isidentifier():
        raise ValueError(f"model must be package.module:factory, not {text!r}")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as python -m does
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if where != missing and not where.startswith(missing + "."):
            raise ValueError(f"model: the module {where} cannot be imported: {error}") from error
        raise ValueError(
            f"model must name a module that Python finds, here or installed: {text!r} has none "
            f"({missing})"
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"model: the module {where} cannot be imported: {_line(error)}") from error
    if not hasattr(module, name):
        names = [each for each in vars(module) if not each.startswith("_")]
        file = getattr(module, "__file__", None) or "built in"
        raise ValueError(f"model: {where} ({file}) has no {name}{did_you_mean(name, names)}")
    found = getattr(module, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise ValueError(
            f"model must name a function or class that makes a network, and {text} is "
            f"{_described(found)}"
        )
    return found


def build(model: Any, shape: Shape, classes: int) -> nn.Module:
    """Returns a network: the module itself, or what a factory makes.

    The factory is called with the shape of an example and the number of classes, or with nothing
    if that will do. Lazy layers get their weights.

    Raises:
        TypeError: model is neither a module nor a factory.
        ValueError: the factory fails, or returns no module.
    """
    made = model if isinstance(model, nn.Module) else _made(model, shape, classes)
    if any(map(is_lazy, (*made.parameters(), *made.buffers()))):
        classes_of(made, shape, torch.device("cpu"))
    return made


def _made(model: Any, shape: Shape, classes: int) -> nn.Module:
    if not callable(model):
        raise TypeError(
            f"model must be a torch.nn.Module or a function that makes one, not {_described(model)}"
        )
    arguments: tuple[Any, ...] = ()
    try:
        needed = inspect.signature(model)
        try:
            if {"input_shape", "classes"} <= set(needed.parameters):
                raise TypeError  # defaults are for other data
            needed.bind()
        except TypeError:
            arguments = tuple(shape), classes
            try:
                needed.bind(*arguments)
            except TypeError:
                raise ValueError(
                    f"model: {name_of(model)}{needed} must take (input_shape, classes), or nothing"
                ) from None
    except ValueError as error:
        if str(error).startswith("model: "):
            raise
        # a function of C has no signature: nothing, then
    try:
        made = model(*arguments)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model: {name_of(model)} failed: {_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"model: {name_of(model)} must return a torch.nn.Module, not {_described(made)}"
        )
    return made


def require_new(model: Any, config: OwnConfig) -> None:
    """Raises ValueError where a factory returns one network each time, which several runs would
    share.
    """
    with torch.random.fork_rng(devices=[]):
        one, other = (build(model, config.input_shape, config.classes) for _ in range(2))
    if one is other:
        raise ValueError(
            f"model must make a new network each time it is called, and {name_of(model)} returned "
            "the same one again"
        )


def classes_of(model: nn.Module, shape: Shape, device: torch.device) -> int:
    """Returns the number of a network's logits for one example.

    Raises ValueError where it fails on one, or gives something else than logits [1, classes].
    """
    example = torch.zeros(1, *shape, device=device)
    try:
        with torch.no_grad(), evaluation(model):
            out = model(example)
    except Exception as error:
        raise ValueError(
            f"model must take examples {list(example.shape)}, and it failed: {_line(error)}"
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 1 or out.shape[1] < 2:
        found = list(out.shape) if isinstance(out, Tensor) else _described(out)
        raise ValueError(
            f"model must map examples {list(example.shape)} to logits [1, classes], two or more, "
            f"not to {found}"
        )
    return out.shape[1]


def check(model: nn.Module, config: OwnConfig, processes: World) -> None:
    """Raises ValueError unless a training can take the network, and it has a logit for each class.

    model: on the device of the processes.
    """
    classes = classes_of(model, config.input_shape, processes.device)
    if classes < config.classes:
        raise ValueError(
            f"the labels must be from 0 to {classes - 1}, the network's {classes} classes, and "
            f"there is a label {config.classes - 1}"
        )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model must have tensors alone in its state_dict, and not {name}")


def require_one_process(model: nn.Module, processes: World) -> None:
    """Raises ValueError where several processes would train a batch norm."""
    if processes.size > 1 and changes(model):
        raise ValueError(
            "model must have no batch norm in training mode where several processes train, since "
            "each would take the statistics of its own examples"
        )


def changes(model: nn.Module) -> bool:
    """Returns whether a batch norm takes its statistics from the batches, which it then changes."""
    return any(module.training for module in model.modules() if isinstance(module, _BatchNorm))


def on_data_set(config: Config, model: Any) -> OwnConfig:
    """Returns the config with an own network for its data set, which need not be there."""
    shape = INPUT_SHAPES[config.dataset]
    fields = dict(config) | {
        "net": name_of(model),
        "input_shape": shape,
        "classes": CLASSES[config.dataset],
    }
    return OwnConfig(**fields | {"init": "torch", "net_width": 0})  # its own affair


def recorded(config: Config, examples: Dataset, own_data: bool, model: Any, loss: Any) -> OwnConfig:
    """Returns the config with what can be recorded of the user's own network, data and loss."""
    fields: dict[str, Any] = dict(config)
    if own_data:
        fields["dataset"] = examples.name
        fields["data"] = (described(examples.train), described(examples.test))
    if model is not None:
        fields |= {"net": name_of(model), "net_width": 0}
    if loss is not None:
        fields |= {"method": "own", "loss": name_of(loss), "width_weight": 0.0}
        # of no effect then
        fields |= {each: Config.model_fields[each].default for each in ("alpha", *OF_ATTACK)}
    fields["input_shape"] = tuple(examples.train.images.shape[1:])
    labels = (examples.train.labels, examples.test.labels)
    largest = max(int(each.max()) for each in labels)
    fields["classes"] = max(largest + 1, 2) if own_data else CLASSES[config.dataset]
    return OwnConfig(**fields)


def _line(error: BaseException) -> str:
    """Describes an error of the user's code in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        kinds = [type(each).__name__ for each in value[:MOST]] + ["..."] * (len(value) > MOST)
        return f"a {type(value).__name__} of {', '.join(kinds) or 'nothing'}"
    return f"a {type(value).__name__}"
