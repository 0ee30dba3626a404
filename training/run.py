"""The engine under both training loops: run folder, device, logging, checkpoints, interruption.

A run folder holds

    run.json                      configuration and fingerprints, written before the first step
    corpus.lock                   the corpus: `pumit-data lock --check` compares
    tensorboard/                  curves
    pictures/step-00000200.png    what the network sees and makes of it
    checkpoints/step-00000200/    complete or absent; the name counts the steps done
        model.safetensors         weights, one file per network
        training.pt               optimizers, gradient scaler, random generators (tensors and numbers only)
        state.json                step, configuration, fingerprints, losses so far
        corpus.lock               as above
    summary.json                  written when the run is done
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from catalog.durable import sync
from catalog.errors import SetupError
from catalog.lock import LOCK_FILE
from training.config import RunConfig, changed_fields
from training.meter import Meter
from training.meter import scalars as meter_scalars

AVERAGED_STEPS = 10
"""Steps over which the first and the last loss of a run are averaged."""

SHOWN_WAIT_SHARE = 0.05
"""Share of the time that a run may wait for data before its progress says so."""

MAX_NON_FINITE_STEPS = 3
"""Consecutive steps without a finite loss or gradient after which a run stops (as DINOv3 does)."""


class World(NamedTuple):
    """Which of the processes that train together this one is; rank 0 alone writes files."""

    rank: int = 0
    size: int = 1


class TrainingDivergedError(SetupError):
    """Loss or gradient was not finite in several steps running; the message names the images."""


class TrainingInterrupted(SystemExit):
    """SIGTERM or SIGINT came: the checkpoint is written, the process ends with exit code 3."""

    def __init__(self, message: str) -> None:
        super().__init__(3)
        self.message = message

    def __str__(self) -> str:
        return self.message


def choose_device(name: str) -> torch.device:
    """The device called `name` (auto | cpu | cuda); auto is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SetupError("device is cuda, but PyTorch sees no GPU here; use --set device=cpu or device=auto")
    return torch.device(name)


_AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """One training run in its folder; a context that owns the log, the progress bar and the signals.

    The order of use is that of a loop: open, `restore`, then for each of `steps()`: `update` (once per
    optimizer), `finish_step`, and `save` where `due`; `close_with` ends it.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        fingerprints: Mapping[str, str],
        resume: bool,
        lock: str | None = None,
        world: World = World(),  # noqa: B008 - an immutable constant
    ) -> None:
        """Open `folder` for a new run, or with `resume` for one that was interrupted.

        `fingerprints` name what the run's result depends on besides its configuration (catalog, split,
        tokenizer). `lock` says of which corpus the run is: it lies in the folder and in every checkpoint.
        Raises SetupError when the folder is taken, or when anything changed since.
        """
        self.folder = folder
        self.config = config
        self.world = world
        self.device = choose_device(config.device)
        self.fingerprints = dict(fingerprints)
        self._lock = lock
        if config.precision == "fp16" and self.device.type == "cpu":
            raise SetupError("precision is fp16, which needs a GPU; use --set precision=bf16 or fp32")
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._models: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._stop_signal: signal.Signals | None = None
        self._bad_in_this_step: str | None = None
        self._bad_steps: list[str] = []
        self._losses: dict[str, list[float]] = {"first": [], "last": []}
        self._images, self._seconds, self._mark = 0, 0.0, 0.0
        self._waiting = 0.0
        self.first_step = 0
        self.numbers: dict[str, float] = {}
        """What else a loop carries from step to step; saved and restored with the rest."""
        self.take_meter: Callable[[], Meter] | None = None
        """What loading took since it was asked last; logged with the rest."""
        self._checkpoint: Path | None = None
        if resume:
            self._checkpoint = self._open_to_resume()
        else:
            self._create()
        self.console = Console(stderr=True, quiet=world.rank > 0)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(config.kind, total=config.steps, speed="")
        torch.manual_seed(config.seed)

    # -- folder ---------------------------------------------------------------------------------------

    def picture_file(self, step: int) -> Path:
        """Where the contact sheet made after `step` goes."""
        return self.folder / "pictures" / f"step-{step + 1:08d}.png"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config.model_dump(mode="json"), "fingerprints": self.fingerprints}

    def _create(self) -> None:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise SetupError(
                f"{self.folder} exists already: continue that run with --resume, or give --run another folder"
            )
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir()
            (self.folder / "pictures").mkdir()
            write_json(self.folder / "run.json", self._identity())
            self._write_lock(self.folder)

    def _write_lock(self, folder: Path) -> None:
        if self._lock is not None:
            (folder / LOCK_FILE).write_text(self._lock, encoding="utf-8")

    def _open_to_resume(self) -> Path | None:
        """Check that nothing changed since the run began; return its newest checkpoint, if it has one."""
        try:
            began = json.loads((self.folder / "run.json").read_text())
        except FileNotFoundError:
            raise SetupError(f"{self.folder} holds no run to resume; leave --resume out to start one") from None
        changes = changed_fields(began["config"], self.config)
        if changes:
            raise SetupError(
                f"{self.folder} was started with another configuration: {'; '.join(changes)}. Give the same "
                "preset and --set values to resume, or start a new run in another folder"
            )
        for name, fingerprint in self.fingerprints.items():
            if began["fingerprints"].get(name) != fingerprint:
                raise SetupError(
                    f"{self.folder}: the {name} changed since this run began (fingerprint "
                    f"{began['fingerprints'].get(name)}, now {fingerprint}), so resuming would not continue "
                    f"the same training. Bring the earlier {name} back, or start a new run in another folder"
                )
        if self.world.rank == 0:
            for leftover in self.checkpoints.glob(".*"):
                shutil.rmtree(leftover)
        return newest_checkpoint(self.folder)

    # -- state ----------------------------------------------------------------------------------------

    def restore(self, models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        """Name what checkpoints hold; when resuming, load it, so that the next step is the one that was due.

        Called once, after networks (on `device`) and optimizers are built.
        """
        self._models, self._optimizers = dict(models), dict(optimizers)
        if self._checkpoint is None:
            return
        state = read_state(self._checkpoint)
        for name, model in self._models.items():
            load_model(model, self._checkpoint / f"{name}.safetensors", device=str(self.device))
        training = torch.load(self._checkpoint / "training.pt", map_location="cpu", weights_only=True)
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(training["optimizers"][name])
        self._scaler.load_state_dict(training["scaler"])
        torch.set_rng_state(training["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in training["rng"]:
            torch.cuda.set_rng_state(training["rng"]["cuda"], self.device)
        self._losses, self._bad_steps = state["losses"], state["bad_steps"]
        self.first_step, self.numbers = int(state["step"]), state["numbers"]
        self.console.print(f"{self.config.kind}: resumed after step {self.first_step} of {self.config.steps}")

    def save(self, steps_done: int) -> None:
        """Write checkpoint `steps_done` to a temporary folder, rename it, and drop all but the newest."""
        target = self.checkpoints / f"step-{steps_done:08d}"
        # The same step of the same run is the same state, so one that stands is never rewritten.
        if self.world.rank > 0 or target.exists():
            return
        temporary = self.checkpoints / f".{target.name}.partial"
        temporary.mkdir()
        for name, model in self._models.items():
            save_model(model, str(temporary / f"{name}.safetensors"))
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        training = {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "scaler": self._scaler.state_dict(),
            "rng": rng,
        }
        torch.save(training, temporary / "training.pt")
        state = {
            "step": steps_done,
            "numbers": self.numbers,
            "losses": self._losses,
            "bad_steps": self._bad_steps,
        }
        write_json(temporary / "state.json", state | self._identity())
        self._write_lock(temporary)
        for file in temporary.iterdir():
            sync(file)
        temporary.rename(target)
        sync(self.checkpoints)
        for old in sorted(self.checkpoints.glob("step-*"))[: -self.config.keep_checkpoints]:
            # Renamed first: a checkpoint half deleted must not look like a whole one.
            shutil.rmtree(old.rename(self.checkpoints / f".{old.name}.old"))

    # -- steps ----------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps still to do, counted from 0; raises TrainingInterrupted after a step with a signal."""
        for step in range(self.first_step, self.config.steps):
            self._mark = time.perf_counter()
            self._bad_in_this_step = None
            yield step
            if self._stop_signal is not None:
                self.save(step + 1)
                raise TrainingInterrupted(
                    f"{self._stop_signal.name}: stopped after step {step + 1} of {self.config.steps}; "
                    f"checkpoint written. Continue with --run {self.folder} --resume"
                )

    def autocast(self) -> torch.autocast:
        """Context of the forward pass: the configured precision on the run's device."""
        dtype = _AUTOCAST_TYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def update(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, keys: Sequence[str]
    ) -> float:
        """Backward, clip to `max_grad_norm` (L2, None: unclipped), one step of `optimizer`; the gradient norm.

        Without a finite loss and gradient the weights stay as they are. Raises TrainingDivergedError,
        naming the images `keys` of the steps concerned, once that happened in three steps running.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad(set_to_none=True)
        finite = math.isfinite(loss.item())
        norm = math.nan
        if finite:
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._scaler.unscale_(optimizer)
            limit = math.inf if max_grad_norm is None else max_grad_norm
            norm = float(nn.utils.clip_grad_norm_(parameters, limit))
            # Under fp16 an infinite gradient is how the scaler finds its scale: it skips the step itself.
            finite = math.isfinite(norm) or self._scaler.is_enabled()
            if finite:
                self._scaler.step(optimizer)
        if not finite:
            self._bad_in_this_step = f"loss {loss.item():.4g}, gradient norm {norm:.4g}: {', '.join(keys)}"
        return norm

    def finish_step(self, step: int, loss: float, images: int, scalars: Mapping[str, float | Tensor]) -> None:
        """Count the step, watch for divergence, log `scalars` at the interval; time stops here."""
        self._watch(step)
        if self._scaler.is_enabled() and self._bad_in_this_step is None:
            self._scaler.update()
        self._seconds += time.perf_counter() - self._mark
        self._images += images
        if math.isfinite(loss):
            self._losses["first"] = [*self._losses["first"], loss][:AVERAGED_STEPS]
            self._losses["last"] = [*self._losses["last"], loss][-AVERAGED_STEPS:]
        due = self.due(step, self.config.intervals.log_every_steps)
        loading = meter_scalars(self.take_meter()) if due and self.take_meter else {}
        self._waiting = loading.get("loader/wait_share", self._waiting)
        speed = f"loss {loss:.4f}  {self._images / self._seconds:.1f} images/s"
        if self._waiting >= SHOWN_WAIT_SHARE:
            speed += f"  {self._waiting:.0%} waiting for data"
        self._progress.update(self._task, completed=step + 1, speed=speed)
        if due:
            rates = {"loss": loss, "images_per_second": self._images / self._seconds}
            self.log(step, {**rates, **loading, **scalars})
            if not self.console.is_terminal:
                self.console.print(f"{self.config.kind}: step {step + 1}/{self.config.steps}  {speed}")

    def _watch(self, step: int) -> None:
        if self._bad_in_this_step is None:
            self._bad_steps = []
            return
        self._bad_steps = [*self._bad_steps, f"step {step}: {self._bad_in_this_step}"]
        if len(self._bad_steps) >= MAX_NON_FINITE_STEPS:
            raise TrainingDivergedError(
                f"{self.folder}: no finite loss in {MAX_NON_FINITE_STEPS} steps running. Look at these images "
                f"or lower the learning rate. {'; '.join(self._bad_steps)}"
            )

    def due(self, step: int, every_steps: int) -> bool:
        """Whether something done every so many steps is due after `step`; it always is after the last."""
        return (step + 1) % every_steps == 0 or step + 1 == self.config.steps

    def log(self, step: int, scalars: Mapping[str, float | Tensor]) -> None:
        """Write `scalars` to TensorBoard under the number of steps done."""
        if self.world.rank == 0:
            for name, value in scalars.items():
                number = value.item() if isinstance(value, Tensor) else value
                self._writer.add_scalar(name, number, step + 1)

    def summary(self, measured: Mapping[str, float]) -> dict[str, Any]:
        """First and last loss (means over some steps), images/s of this process, and what was `measured`."""
        count = min(AVERAGED_STEPS, max(self.config.steps // 2, 1))
        first, last = self._losses["first"][:count], self._losses["last"][-count:]
        summary = {
            "kind": self.config.kind,
            "run": str(self.folder),
            "steps": self.config.steps,
            "first_loss": sum(first) / len(first),
            "last_loss": sum(last) / len(last),
            "images_per_second": self._images / self._seconds if self._seconds else None,
            **measured,
        }
        if self.world.rank == 0:
            write_json(self.folder / "summary.json", summary)
        return summary

    # -- context --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter

        if self.world.rank == 0:
            # What an interrupted run logged after its last checkpoint is logged again.
            self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.first_step + 1)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._restore_signals()
        if self.world.rank == 0:
            self._writer.close()
        if isinstance(error, TrainingInterrupted):
            self.console.print(str(error))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = signal.Signals(number)
        self._restore_signals()  # a second signal ends the process at once

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The complete checkpoint of a run with the most steps done, or None."""
    return max((run_folder / "checkpoints").glob("step-*"), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, config, fingerprints, and what the run counted so far."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content` whole or not at all."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")
    temporary.replace(file)
