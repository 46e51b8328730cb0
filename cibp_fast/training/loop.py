"""The training loop: data, model, schedules, loss, steps. A run that was stopped goes on."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cibp_fast.environment import hardware, versions
from cibp_fast.layerwise import Bounds
from cibp_fast.ops import backends
from cibp_fast.training import averaging, datasets, own, runs
from cibp_fast.training.batches import epoch_batches
from cibp_fast.training.config import Config, Dataset, Net, OwnConfig
from cibp_fast.training.distributed import World, world
from cibp_fast.training.evaluation import evaluate, provable
from cibp_fast.training.progress import Progress
from cibp_fast.training.step import LOGGED, Step, fastest, rehearse

SAVE_SECONDS = 120.0  # between checkpoints inside an epoch; each epoch ends with one too
REHEARSED = 4  # examples with which a user's network and loss are tried
POLL_STEPS = 10  # after so many steps several processes agree on whether to save or stop


def train(
    config: Config,
    run_dir: str | Path | None = None,
    *,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    data: tuple[Any, Any] | datasets.Dataset | None = None,
    loss: Callable[[Bounds, Tensor, float], Tensor] | None = None,
    data_root: str | Path | None = None,
    verify_data: bool = True,
    device: str = "cpu",
    backend: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates one network, fills the run folder, and returns its result.json.

    A run of the same config that the folder holds goes on, bitwise as if it had never stopped; one
    that has finished is not trained again. The same config and numbers of threads and processes
    give the same numbers bitwise on the same machine. Under torchrun each process takes its share
    of every batch, and the first one writes the run. SIGINT and SIGTERM let the step finish, save
    the state and raise KeyboardInterrupt; without overwrite the same call then goes on. Torch's
    global random state is left as it was.

    A network, data or a loss of one's own replace those of the config, which then records them by
    name and SHA-256 (docs/own.md). Whoever goes on with such a run gives the same again: weights
    and buffers come from the run, and those of another network are refused.

    Args:
        config: `cf.config.preset(name)`, or for one's own network and data `cf.config.own(...)`.
        run_dir: folder of the run; None: `default_run_dir(config)`, below runs/.
        model: a network, which is trained in place and in the modes that it has, or a function that
            makes one, of `(input_shape, classes)` or of nothing: it is called with the config's
            seed. It maps [N, *input_shape] to logits [N, classes], of a Tensor and of an Interval.
        data: (train, test), each of them a pair of tensors, images [N, ...] and labels [N] int64,
            or a map-style torch Dataset, which is read once into memory. uint8 images are divided
            by 255; floating-point ones are taken as they are, as float32, and eps and clip are
            in their units.
        loss: function of (out, y, kappa), the `Bounds` of a batch, its labels [N] and the weight of
            the nominal loss at that step; it returns a 0-dim tensor with a gradient.
        data_root, verify_data: of the config's data set, see `cf.data.load`.
        device: `cpu` or `cuda`.
        backend: of the bounds, as for `fuse`; with Triton's kernels a step of one process is one
            CUDA graph, where the config allows it (interval method, width post, elide, a first
            layer that takes images; on the CPU, in Triton's interpreter, the same kernels one by
            one).
        overwrite: replace the run that the folder holds.

    Raises:
        TypeError: config, model, data or loss is of another kind.
        ValueError: the config, the network, the loss or the backend does not fit the data, which is
            tried before anything is written; or a file of the run is damaged.
        FileExistsError: the folder holds a run of another config and not overwrite, or other files.
        FileNotFoundError: it holds a run that has lost a file.
        BlockingIOError: another process trains in it.
        OSError: it cannot be written. All these before training starts, this one whenever it
            happens.
        FloatingPointError: the loss is no longer finite (the metrics are kept), or the attack
            breaks an example that ordinary bounds verify (the result is kept).
        Contradiction: it refutes a sound certificate (the network and the evidence are kept).

    Examples:
        >>> images, labels = torch.rand(60, 1, 8, 8), torch.randint(2, (60,))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> config = cf.config.own(eps=0.05, steps=4, batch_size=30)
        >>> data = (images[:30], labels[:30]), (images[30:], labels[30:])
        >>> result = cf.train(config, "runs/own", model=network, data=data)
        own-...
        >>> result["test_error"] <= result["pgd_error"] <= result["verified_error"]
        True
    """
    if not isinstance(config, Config):
        raise TypeError(
            "config must be what cf.config.preset or cf.config.own gives, not a "
            f"{type(config).__name__}"
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of (out, y, kappa), not a {type(loss).__name__}")
    _require_own(config, model, data, loss)
    processes = world(device)

    def load() -> datasets.Dataset:
        if data is not None:
            return own.dataset(data)
        return datasets.load(config.dataset, data_root, verify=verify_data)

    with ExitStack() as stack:
        devices = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        dataset = processes.together(load)
        if any(each is not None for each in (model, data, loss)):
            config = own.recorded(config, dataset, data is not None, model, loss)
        run_dir = default_run_dir(config) if run_dir is None else Path(run_dir)
        dataset = dataset.held_out(config.validation).to(processes.device)
        _check(config, dataset, processes, backend)
        training = _Training(config, dataset, processes, backend, model, loss)

        def open_run() -> tuple[dict[str, Any] | None, runs.Checkpoint | None]:
            stack.enter_context(runs.locked(run_dir))
            runs.claim(run_dir, config, overwrite)
            result, checkpoint = runs.read_progress(run_dir, model)
            if result is checkpoint is None and runs.read_epochs(run_dir):
                print(
                    f"The run in {run_dir} has no {runs.CHECKPOINT}: it starts anew.",
                    file=sys.stderr,
                )
            return result, checkpoint

        # Last: what fails before leaves nothing behind.
        result, checkpoint = processes.of_first(open_run)
        if result is None:
            if checkpoint is not None:
                training.restore(checkpoint, run_dir / runs.CHECKPOINT)
            result = finished = _trained(training, run_dir)
            processes.of_first(lambda: runs.write_result(run_dir, finished))
        elif processes.first:
            print(f"The run in {run_dir} has finished already.", flush=True)
        processes.of_first(lambda: runs.remove_checkpoint(run_dir))
    if result["contradictions"]:
        raise FloatingPointError(
            f"the bounds verify {result['contradictions']} of {result['examples']} examples that "
            f"the attack breaks, so they are wrong: see {run_dir / 'result.json'}"
        )
    return result


def default_run_dir(config: Config) -> Path:
    """Returns the folder below runs/ that belongs to this config: see `Config.folder`."""
    return Path("runs") / config.folder


def _require_own(config: Config, model: Any, data: Any, loss: Any) -> None:
    """Raises ValueError where a config of one's own lacks what it cannot hold."""
    if isinstance(config, OwnConfig):
        for name, given, needed in (
            ("model", model, config.net not in get_args(Net)),
            ("data", data, config.dataset not in get_args(Dataset)),
            ("loss", loss, config.method == "own"),
        ):
            if given is None and needed:
                raise ValueError(f"{name} must be given with a config of one's own, and is None")


def _check(
    config: Config, dataset: datasets.Dataset, processes: World, backend: str = "auto"
) -> None:
    """Raises ValueError where the config does not fit the data or the processes."""
    if config.batch_size > len(dataset.train):
        raise ValueError(
            f"batch_size must be at most the {len(dataset.train)} training examples, "
            f"not {config.batch_size}"
        )
    if config.batch_size % processes.size:
        raise ValueError(
            f"batch_size must be a multiple of the {processes.size} processes, "
            f"not {config.batch_size}"
        )
    if processes.size > 1:
        for what, found in (
            ("method exp", config.method == "exp"),
            ("regularizer", config.regularizer),
        ):
            if found:
                raise ValueError(
                    f"{what} must not be taken where {processes.size} processes train: it is of "
                    "means of the whole batch, of which each has a part"
                )
    name, why = backends.select(backend, processes.device, torch.float32)
    if config.precision != "float32" and name == "torch":
        raise ValueError(f"precision {config.precision!r} cannot run here: {why}")
    if backend != "auto" and config.method != "nominal" and config.width != "post":
        raise ValueError(
            f"backend={backend!r} is of bounds as one op, whose width is 'post', not "
            f"{config.width!r}: take backend='auto'"
        )
    on_gpu = processes.device.type == "cuda" or backend in ("triton", "cuda")
    if config.precision == "tf32" and not on_gpu:
        raise ValueError("precision 'tf32' is for a GPU; on the CPU take 'fast' or 'bf16'")
    least, greatest = 0.0, 1.0
    images = [part.images for part in (dataset.train, dataset.test)]
    own_units = images[0].is_floating_point()
    if own_units:
        least = min(float(each.min()) for each in images)
        greatest = max(float(each.max()) for each in images)
    if config.clip is not None and not config.clip[0] <= least <= greatest <= config.clip[1]:
        data = f"data's {least:.4g} to {greatest:.4g}" if own_units else "pixels' 0 to 1"
        raise ValueError(f"clip must contain the {data}, or be none, not {config.clip}")
    if config.augmentation != "none" and images[0].dim() != 4:
        raise ValueError(
            f"augmentation must be none for examples {list(images[0].shape[1:])}, which are no "
            f"images [channels, height, width], not {config.augmentation}"
        )


def _trained(training: _Training, run_dir: Path) -> dict[str, Any]:
    """Trains to the last step, writes the network, and evaluates it."""
    config, processes = training.config, training.processes
    training.run(run_dir)
    training.install()
    processes.of_first(lambda: runs.write_model(run_dir, training.model))
    train_seconds = training.seconds
    semantics = provable(training.model, training.dataset.test, config)
    try:
        errors = evaluate(
            training.model,
            training.dataset.test,
            config,
            processes,
            semantics=semantics,
            evidence=run_dir,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped in the final evaluation, with the trained network in {run_dir}"
        ) from None
    result = {
        "dataset": config.dataset,
        "model": config.net,
        "method": config.method,
        "seed": config.seed,
        **errors,
        "split": "validation" if config.validation else "test",
        "eps": config.eps,
        "eps_space": config.eps_space,
        "eps_pixel": config.eps_pixel,
        "clip": config.clip,
        "precision": config.precision,
        "sound": semantics is not None,
        "semantics": semantics,
        "seconds": round(training.seconds, 3),
        "train_seconds": round(train_seconds, 3),
        "versions": versions(),
        "hardware": hardware(processes.device, processes.size),
    }
    return runs.as_json(result)


class _Training:
    """Holds the state of a run between two steps."""

    def __init__(
        self,
        config: Config,
        dataset: datasets.Dataset,
        processes: World,
        backend: str = "auto",
        model: Any = None,
        loss: Any = None,
    ) -> None:
        self.config, self.dataset, self.processes = config, dataset, processes
        self.step = Step(config, dataset.train, processes, backend, model, loss)
        self.model, self.loss = self.step.model, self.step.loss
        self.average = averaging.Average(self.model, config.average_from)
        if isinstance(config, OwnConfig):
            own.check(self.model, config, processes)
            few = dataset.train[: min(config.batch_size, REHEARSED)]
            rehearse(self.step.objective, self.step.prepare(few.pixels()), few.labels)
        self.epoch_steps = self.step.epoch_steps
        self.done = 0  # steps
        self.started = time.perf_counter()
        self.saved = self.started

    @property
    def seconds(self) -> float:
        """Returns the seconds that the run has taken, earlier sessions included."""
        return time.perf_counter() - self.started

    def restore(self, checkpoint: runs.Checkpoint, path: Path) -> None:
        """Takes the state of an earlier session. Raises ValueError naming path where it misfits."""
        try:
            runs.check_weights(self.model, checkpoint.model)
            totals = checkpoint.totals.reshape(checkpoint.processes, -1).to(self.processes.device)
            if checkpoint.step > self.config.steps:
                raise ValueError(f"its step {checkpoint.step} is beyond {self.config.steps}")
            self.step.adam.load(checkpoint.optimizer)
            self.average.load(checkpoint.average, checkpoint.step)
            self.model.load_state_dict(checkpoint.model)  # last: it may be the user's
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} does not fit this run's network ({' '.join(str(error).splitlines()[:2])}):"
                f" {runs.ANEW}"
            ) from error
        self.done = checkpoint.step
        same = checkpoint.processes == self.processes.size
        self.step.totals = totals[self.processes.rank] if same else totals.mean(0)
        self.started -= checkpoint.seconds
        here = (torch.get_num_threads(), self.processes.size)
        if here != (checkpoint.threads, checkpoint.processes) and self.processes.first:
            print(
                f"The run was at {checkpoint.threads} threads in {checkpoint.processes} processes "
                f"and goes on at {here[0]} in {here[1]}: its numbers will differ in rounding.",
                file=sys.stderr,
            )

    def run(self, run_dir: Path) -> None:
        """Trains to the config's last step."""
        config, processes = self.config, self.processes
        eps, kappa, lr = self.step.schedules
        step = fastest(self.step, self.done)
        records: list[dict[str, Any]] = []
        if self.done >= self.epoch_steps:
            earlier = processes.of_first(lambda: runs.read_epochs(run_dir))
            records = [record for record in earlier if record["step"] <= self.done]
            begun = self.done
            if self.done < config.steps:
                begun -= self.done % self.epoch_steps
            if not records or records[-1]["step"] != begun:
                raise ValueError(
                    f"{run_dir / 'metrics.jsonl'} lacks the epoch that ends at step {begun}: "
                    + runs.ANEW
                )
        with (
            Progress(config, self.epoch_steps, self.done, shown=processes.first) as progress,
            _StopSignals(patient=processes.size > 1) as signals,
        ):
            while self.done < config.steps:
                epoch = self.done // self.epoch_steps + 1
                begin = (epoch - 1) * self.epoch_steps
                end = min(begin + self.epoch_steps, config.steps)
                step.load(epoch, self.done - begin)
                with self.step.memory():
                    for _ in range(end - self.done):
                        step()
                        self.done += 1
                        if self.average.begin:
                            self.average.update(self.done)
                        progress.update()
                        if self.done < end:
                            self._save_or_stop(run_dir, signals)

                totals = processes.gather(self.step.totals).mean(0)
                means = (totals / (self.done - begin)).tolist()
                record: dict[str, Any] = {
                    "epoch": epoch,
                    "step": self.done,
                    "eps": eps(end - 1),
                    "kappa": kappa(end - 1),
                    "lr": lr(end - 1),
                    **dict(zip(LOGGED, means, strict=False)),
                    "widths": means[len(LOGGED) :],
                    "test_error": None,
                    "verified_error": None,
                }
                if epoch % config.eval_every == 0 or self.done == config.steps:
                    with self._installed():
                        record |= evaluate(
                            self.model, self.dataset.test, config, processes, attack=False
                        )
                record["seconds"] = round(self.seconds, 3)
                records.append(runs.as_json(record))
                processes.of_first(lambda: runs.write_metrics(run_dir, records))
                progress.report(records[-1])
                if not math.isfinite(means[0]):
                    raise FloatingPointError(
                        f"training diverged: the loss of epoch {epoch} is {means[0]}, see {run_dir}"
                    )
                self.step.totals.zero_()
                self.save(run_dir)
                self._save_or_stop(run_dir, signals)

    def install(self) -> None:
        """Gives the network what it is evaluated with, after the steps that are done."""
        config = self.config
        if self.done == config.steps:
            self.average.install()
        if not config.reestimate and (self.done < config.steps or not config.average_from):
            return
        batches = epoch_batches(
            self.dataset.train, config.batch_size, seed=config.seed, epoch=0
        )  # those of training have other numbers
        averaging.reestimate(self.model, (self.step.prepare(x) for x, _ in batches))

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Does so inside the block: training goes on as if nothing had been evaluated."""
        if not (self.config.reestimate or self.config.average_from):
            yield
            return
        with averaging.restored(self.model):
            self.install()
            yield

    def save(self, run_dir: Path) -> None:
        """Writes the state, in the first process; all processes must call it."""
        totals = self.processes.gather(self.step.totals)
        self.saved = time.perf_counter()
        for count in self.step.adam.steps:
            count.fill_(self.done)  # Triton's kernels have their own
        checkpoint = runs.Checkpoint(
            step=self.done,
            seconds=self.seconds,
            threads=torch.get_num_threads(),
            processes=self.processes.size,
            totals=totals,
            model=self.model.state_dict(),
            optimizer=self.step.adam.state(),
            average=self.average.means,
        )
        self.processes.of_first(lambda: runs.write_checkpoint(run_dir, checkpoint))

    def _save_or_stop(self, run_dir: Path, signals: _StopSignals) -> None:
        """Saves when it is time; saves and raises KeyboardInterrupt after a signal to stop."""
        stop, save = signals.received, time.perf_counter() - self.saved > SAVE_SECONDS
        if self.processes.size > 1:  # all must do the same, and asking costs a little
            last = self.done % self.epoch_steps == 0 or self.done == self.config.steps
            if self.done % POLL_STEPS and not last:
                return
            flags = torch.tensor([stop, save], device=self.processes.device, dtype=torch.int32)
            stop, save = (bool(flag) for flag in self.processes.sum(flags))
        if stop or save:
            self.save(run_dir)
        if stop:
            raise KeyboardInterrupt(f"stopped after step {self.done} and saved in {run_dir}")


class _StopSignals:
    """Notes SIGINT and SIGTERM inside a block, for a stop between two steps.

    A second one raises KeyboardInterrupt at once, unless patient: several processes must save
    together, and torchrun adds a SIGTERM where it gets a second Ctrl-C while it waits for them.
    """

    def __init__(self, patient: bool) -> None:
        self.patient, self.received = patient, False

    def __enter__(self) -> _StopSignals:
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere it is forbidden
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and not self.patient:
            raise KeyboardInterrupt("stopped at once, with the last saved state kept")
        self.received = True
