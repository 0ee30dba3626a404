"""The engine under all training loops: run folder, device, logging, checkpoints, interruption.

A run folder holds

    run.json                      configuration and fingerprints, written before the first step
    corpus.lock                   the corpus: `pumit-data lock --check` compares
    tensorboard/                  curves; with `wandb_project`, wandb/ and wandb.json beside it
    pictures/step-00000200.png    what the network sees and makes of it
    pictures/codebook-00000200.png    of a tokenizer, how often it means each code
    checkpoints/step-00000200/    complete or absent; the name counts the steps done
        model.safetensors         weights, one file per network, whole however many processes share them
        training.pt               optimizers, gradient scaler, random generators of every process (tensors
                                  and numbers only)
        state.json                step, configuration, fingerprints, losses so far
        corpus.lock               as above
    summary.json                  written when the run is done

Several processes take the same steps, each with its share of every batch. Whatever decides what happens next (a
loss or gradient that is not finite, a signal) is agreed upon in the same message as the losses, so no process
ever waits for one that does something else. Numbers stay on the device until they are needed: on a GPU, the
host reads a step's when the next one is queued.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from catalog.durable import sync
from catalog.errors import SetupError
from catalog.lock import LOCK_FILE
from training.config import changed_fields
from training.engine_config import EngineConfig, Precision
from training.meter import Meter
from training.meter import scalars as meter_scalars
from training.parallel import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    whole,
)
from training.speed import GraphWatch, Speed, StepWork, peak_flops
from training.world import World

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from training.wandb_log import WandbLog

AVERAGED_STEPS = 10
"""Steps over which the first and the last loss of a run are averaged."""

SHOWN_WAIT_SHARE = 0.05
"""Share of the time that a run may wait for data before its progress says so."""

_GRAPHS = 64
"""Graphs that one function may have: six DA levels, two sizes of batches, with and without gradients."""

Function = TypeVar("Function", bound=Callable[..., Any])

MAX_NON_FINITE_STEPS = 3
"""Consecutive steps without a finite loss or gradient after which a run stops (as DINOv3 does)."""


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


def steps_behind(device: torch.device) -> int:
    """How many steps later the host reads what one did: a GPU would otherwise run dry while it waits."""
    return 1 if device.type == "cuda" else 0


class _Report(NamedTuple):
    """What an update did, on its way from the device to the host."""

    values: Tensor
    """Loss and gradient norm of the whole batch, whether it was refused, how many processes each of
    STOP_SIGNALS reached; then the losses of this process's passes."""
    arrived: torch.cuda.Event | None
    """When `values` can be read; None if they always can."""
    passes: tuple[tuple[str, ...], ...]
    """The images of each pass."""

    @classmethod
    def of(cls, values: Tensor, passes: Sequence[tuple[str, ...]]) -> _Report:
        if values.device.type != "cuda":
            return cls(values, None, tuple(passes))
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(on_host, arrived, tuple(passes))

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context of a forward pass in this precision."""
    dtype = _AUTOCAST_TYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def compiled(function: Function, compile_it: bool) -> Function:
    """`function` (or a network) compiled, if asked for: one graph a DA level and shape."""
    if not compile_it:
        return function
    torch._dynamo.config.recompile_limit = _GRAPHS
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


_AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """One training run in its folder; a context that owns the log, the progress bar and the signals.

    The order of use is that of a loop: open, `restore`, then for each of `steps()`: for each optimizer
    `backward` (once per pass) and `update`; then `finish_step`, and `save` where `due`; `summary` ends it.
    Every process of the `world` calls all of them.
    """

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        *,
        fingerprints: Mapping[str, str],
        resume: bool,
        lock: str | None = None,
        world: World = World(),  # noqa: B008 - an immutable constant
    ) -> None:
        """Open `folder` for a new run, or with `resume` for one that was interrupted.

        `fingerprints` name what the run's result depends on besides its configuration (catalog, split,
        tokenizer). `lock` says of which corpus the run is: it lies in the folder and in every checkpoint.
        Raises SetupError when the folder is taken, when anything changed since, or when the processes of the
        world do not see the same.
        """
        self.folder = folder
        self.config = config
        self.world = world
        self.device = choose_device(config.device)
        self.fingerprints = dict(fingerprints)
        self._lock = lock
        if self.device.type == "cuda" and world.size > 1:
            self.device = torch.device("cuda", world.local_rank)
        if config.precision == "fp16" and self.device.type == "cpu":
            raise SetupError("precision is fp16, which needs a GPU; use --set precision=bf16 or fp32")
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._models: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._stop_signal: signal.Signals | None = None
        self._agreed_stop: signal.Signals | None = None
        self._sums: dict[str, Tensor] = {}
        self._passes: list[tuple[Tensor, tuple[str, ...]]] = []
        self._updates: list[_Report] = []
        self._reports: deque[tuple[int, list[_Report]]] = deque()
        self._reports_behind = steps_behind(self.device)
        self._bad_steps: list[str] = []
        self._losses: dict[str, list[float]] = {"first": [], "last": []}
        self._loss = math.nan
        self._whole, self._lately, self._mark = Speed(), Speed(), 0.0
        self._graphs = GraphWatch() if config.compile else None
        peak = peak_flops(self.device, config.precision)
        self._peak_flops = None if peak is None else peak * world.size
        self._waiting = 0.0
        self.first_step = 0
        self.numbers: dict[str, float] = {}
        """What else a loop carries from step to step; saved and restored with the rest."""
        self.take_meter: Callable[[], Meter] | None = None
        """What loading took since it was asked last; logged with the rest."""
        self._writer: SummaryWriter | None = None
        self._wandb: WandbLog | None = None
        seen = world.gather(self.fingerprints)
        if any(other != self.fingerprints for other in seen):
            self._give_up(SetupError(f"the processes of this training do not see the same data: {seen}"))
        self._checkpoint: Path | None = world.first(self._open_to_resume if resume else self._create)
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

    def codebook_file(self, step: int) -> Path:
        """Where the picture of the codebook's use after `step` goes."""
        return self.folder / "pictures" / f"codebook-{step + 1:08d}.png"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config.model_dump(mode="json"), "fingerprints": self.fingerprints}

    def _create(self) -> None:
        """Make the folder; only rank 0 does."""
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise SetupError(
                f"{self.folder} exists already: continue that run with --resume, or give --run another folder"
            )
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
        for leftover in self.checkpoints.glob(".*"):
            shutil.rmtree(leftover)
        return newest_checkpoint(self.folder)

    # -- state ----------------------------------------------------------------------------------------

    def restore(self, models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        """Name what checkpoints hold; when resuming, load it, so that the next step is the one that was due.

        Called once, after networks (on `device`) and optimizers are built; an optimizer has the name of its
        network.
        """
        self._models, self._optimizers = dict(models), dict(optimizers)
        if self._checkpoint is None:
            if self.world.rank > 0:  # the same weights everywhere, but noise of its own
                torch.manual_seed(self.config.seed + self.world.rank)
        else:
            self._load(self._checkpoint)
        self.world.first(self._open_log)

    def _load(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        training = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        self._check_processes(state)
        for name, model in self._models.items():
            load_model_state(model, load_file(checkpoint / f"{name}.safetensors"))
        for name, optimizer in self._optimizers.items():
            load_optimizer_state(self._models[name], optimizer, training["optimizers"][name])
        self._scaler.load_state_dict(training["scaler"])
        if self.world.rank < len(training["rng"]):
            rng = training["rng"][self.world.rank]
            torch.set_rng_state(rng["cpu"])
            if self.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        self._losses, self._bad_steps = state["losses"], state["bad_steps"]
        self.first_step, self.numbers = int(state["step"]), state["numbers"]
        self.console.print(f"{self.config.kind}: resumed after step {self.first_step} of {self.config.steps}")

    def _check_processes(self, state: Mapping[str, Any]) -> None:
        """A batch may be shared anew, unless what each process draws by itself is part of the training."""
        size, accumulate = self.world.size, self.config.data.accumulate
        before = state["processes"], state["config"]["data"]["accumulate"]
        if before == (size, accumulate):
            return
        was = f"{before[0]} processes (data.accumulate {before[1]})"
        if self.config.draws_noise:
            self._give_up(
                SetupError(
                    f"{self.folder} was trained by {was}, each of which draws noise of its own, so {size} "
                    f"(data.accumulate {accumulate}) would not continue the same training. Resume with as "
                    "many, or start a new run in another folder"
                )
            )
        self.console.print(
            f"{self.config.kind}: until now trained by {was}, now by {size} (data.accumulate {accumulate}): "
            "the batches are the same, sums round differently"
        )

    def _give_up(self, error: SetupError) -> NoReturn:
        """End for a reason that every process found; rank 0 says it."""
        if self.world.rank > 0:
            raise SystemExit(2)
        raise error

    def save(self, steps_done: int) -> None:
        """Write checkpoint `steps_done` to a temporary folder, rename it, and drop all but the newest.

        No process goes on before it stands.
        """
        self._read_reports(behind=0)
        target = self.checkpoints / f"step-{steps_done:08d}"
        # The same step of the same run is the same state, so one that stands is never rewritten.
        if self.world.first(target.exists):
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        weights = {name: model_state(model) for name, model in self._models.items()}
        training = {
            "optimizers": {
                name: optimizer_state(self._models[name], optimizer)
                for name, optimizer in self._optimizers.items()
            },
            "scaler": self._scaler.state_dict(),
            "rng": self.world.gather(rng),
        }
        self.world.first(partial(self._write, target, steps_done, weights, training))

    def _write(
        self,
        target: Path,
        steps_done: int,
        weights: Mapping[str, Mapping[str, Tensor]],
        training: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint `target`; only rank 0 does."""
        temporary = self.checkpoints / f".{target.name}.partial"
        temporary.mkdir()
        for name, tensors in weights.items():
            contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        torch.save(training, temporary / "training.pt")
        state = {
            "step": steps_done,
            "numbers": self.numbers,
            "losses": self._losses,
            "bad_steps": self._bad_steps,
            "processes": self.world.size,
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
            yield step
            # Several processes stop only when all of them know.
            stop = self._stop_signal if self.world.size == 1 else self._agreed_stop
            if stop is not None:
                self.save(step + 1)
                raise TrainingInterrupted(
                    f"{stop.name}: stopped after step {step + 1} of {self.config.steps}; "
                    f"checkpoint written. Continue with --run {self.folder} --resume"
                )

    def autocast(self) -> torch.autocast:
        """Context of the forward pass: the configured precision on the run's device."""
        return autocast(self.device, self.config.precision)

    def compiled(self, function: Function) -> Function:
        """`function` (or a network) compiled, if the configuration says so."""
        return compiled(function, self.config.compile)

    def backward(self, loss: Tensor, keys: Sequence[str], terms: Mapping[str, Tensor] | None = None) -> None:
        """Gradients of a pass over the images `keys`, whose mean loss is the scalar `loss`; they add up.

        The passes of all processes count by their number of images, so that the sum is the gradient of the
        whole batch's mean. Of `terms` (scalars, means over the same images), `update` gives the means.
        """
        share = len(keys) / self.config.data.batch_size
        self._passes.append((loss.detach(), tuple(keys)))
        for name, term in {"loss": loss, **(terms or {})}.items():
            part = share * term.detach().float()
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        # Gradients are averaged over processes, where they are to be added.
        self._scaler.scale(loss * (share * self.world.size)).backward()  # type: ignore[no-untyped-call]

    def update(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> dict[str, Tensor]:
        """Clip the gradient to `max_grad_norm` (L2, None: unclipped) and take one step of `optimizer`.

        Returns scalars on the device: `loss` and the terms of `backward`, means over the whole batch of all
        processes, and `grad_norm` before clipping. Without a finite loss and gradient the weights stay as they
        are, in every process; once that happened in three steps running, `finish_step` raises
        TrainingDivergedError, naming the images.
        """
        told = [
            torch.full((), float(self._stop_signal == number), device=self.device) for number in STOP_SIGNALS
        ]
        sums = self.world.sum(torch.stack([*self._sums.values(), *told]))
        means = dict(zip(self._sums, sums, strict=False))

        self._scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            if (scale := group.get("gradient_scale", 1.0)) != 1.0:
                torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], scale)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = math.inf if max_grad_norm is None else max_grad_norm
        norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
        no_loss, no_gradient = ~means["loss"].isfinite(), ~norm.isfinite()
        # The protocol of gradient scalers, with which a fused optimizer skips a step without the host knowing.
        optimizer.found_inf = (no_loss | no_gradient).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)

        # Under fp16 an infinite gradient is how the scaler finds its scale.
        bad = no_loss if self._scaler.is_enabled() else no_loss | no_gradient
        known = [means["loss"], norm, bad, *sums[len(means) :], *(loss for loss, _ in self._passes)]
        report = torch.stack([value.detach().float() for value in known])
        self._updates.append(_Report.of(report, [keys for _, keys in self._passes]))
        self._sums, self._passes = {}, []
        return means | {"grad_norm": norm}

    def forget_step(self) -> None:
        """Drop what a step left that did not come to its end."""
        self._sums, self._passes, self._updates = {}, [], []
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: networks, and two moments of every number that is learnt."""
        size = 0
        for name, model in self._models.items():
            size += sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
            if name in self._optimizers:
                learnt = (p for group in self._optimizers[name].param_groups for p in group["params"])
                size += sum(2 * p.numel() * p.element_size() for p in learnt)
        return size

    def finish_step(
        self, step: int, scalars: Mapping[str, float | Tensor], work: StepWork | None = None
    ) -> None:
        """Count the step, watch for divergence, log `scalars` at the interval; time stops here.

        With `work`, what all processes did in it, the log has tokens and operations a second too.
        """
        if self._scaler.is_enabled():
            self._scaler.update()
        self._reports.append((step, self._updates))
        self._updates = []
        due = self.due(step, self.config.intervals.log_every_steps)
        self._read_reports(behind=0 if due else self._reports_behind)
        seconds = time.perf_counter() - self._mark
        for speed in (self._whole, self._lately):
            speed.add(seconds, self.config.data.batch_size, work)
        if self._graphs is not None and work is not None:
            self._graphs.step(work.kind)
        loading = meter_scalars(self.take_meter()) if due and self.take_meter else {}
        self._waiting = loading.get("loader/wait_share", self._waiting)
        shown = f"loss {self._loss:.4f}  {self._whole.images / self._whole.seconds:.1f} images/s"
        if self._waiting >= SHOWN_WAIT_SHARE:
            shown += f"  {self._waiting:.0%} waiting for data"
        self._progress.update(self._task, completed=step + 1, speed=shown)
        if due:
            graphs = {} if self._graphs is None else self._graphs.scalars()
            rates = self._lately.rates(self._peak_flops) | graphs
            self.log(step, {"loss": self._loss, **rates, **loading, **scalars})
            self._lately = Speed()
            if not self.console.is_terminal:
                self.console.print(f"{self.config.kind}: step {step + 1}/{self.config.steps}  {shown}")

    def _read_reports(self, behind: int) -> None:
        """Learn how the steps went, all but the newest `behind`."""
        while len(self._reports) > behind:
            step, updates = self._reports.popleft()
            read = [(report.read(), report.passes) for report in updates]
            self._loss = read[0][0][0] if read else math.nan  # of the first optimizer, the network's
            if math.isfinite(self._loss):
                self._losses["first"] = [*self._losses["first"], self._loss][:AVERAGED_STEPS]
                self._losses["last"] = [*self._losses["last"], self._loss][-AVERAGED_STEPS:]
            bad = []
            for (loss, norm, is_bad, *rest), passes in read:
                stops, losses = rest[: len(STOP_SIGNALS)], rest[len(STOP_SIGNALS) :]
                for number, processes in zip(STOP_SIGNALS, stops, strict=True):
                    if processes:
                        self._agreed_stop = number
                if is_bad:
                    images = ", ".join(self._suspects(losses, passes))
                    bad.append(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: {images}")
            self._watch(bad)

    def _suspects(self, losses: Sequence[float], passes: Sequence[tuple[str, ...]]) -> list[str]:
        """Images of the passes, of all processes, whose own loss is not finite; all images if there is none."""
        sure = [
            key for loss, keys in zip(losses, passes, strict=True) if not math.isfinite(loss) for key in keys
        ]
        found = self.world.gather((sure, [key for keys in passes for key in keys]))
        return [key for one, _ in found for key in one] or [key for _, every in found for key in every]

    def _watch(self, bad: Sequence[str]) -> None:
        self._bad_steps = [*self._bad_steps, "; ".join(bad)] if bad else []
        if len(self._bad_steps) >= MAX_NON_FINITE_STEPS:
            self._give_up(
                TrainingDivergedError(
                    f"{self.folder}: no finite loss in {MAX_NON_FINITE_STEPS} steps running. Look at these "
                    f"images or lower the learning rate. {'; '.join(self._bad_steps)}"
                )
            )

    def due(self, step: int, every_steps: int) -> bool:
        """Whether something done every so many steps is due after `step`; it always is after the last."""
        return (step + 1) % every_steps == 0 or step + 1 == self.config.steps

    def log(self, step: int, scalars: Mapping[str, float | Tensor]) -> None:
        """Write `scalars` to the curves under the number of steps done."""
        if self._writer is not None:
            numbers = {
                name: value.item() if isinstance(value, Tensor) else value for name, value in scalars.items()
            }
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step + 1)
            if self._wandb is not None:
                self._wandb.log(step + 1, numbers)

    def summary(self, measured: Mapping[str, float]) -> dict[str, Any]:
        """First and last loss (means over some steps), speed of all processes, what was `measured`."""
        self._read_reports(behind=0)
        count = min(AVERAGED_STEPS, max(self.config.steps // 2, 1))
        first, last = self._losses["first"][:count], self._losses["last"][-count:]
        summary = {
            "kind": self.config.kind,
            "run": str(self.folder),
            "steps": self.config.steps,
            "first_loss": sum(first) / len(first),
            "last_loss": sum(last) / len(last),
            "images_per_second": None,  # of a run that was done already
            **self._whole.rates(self._peak_flops),
            **({} if self._graphs is None else self._graphs.scalars()),
            **measured,
        }
        if self.world.rank == 0:
            write_json(self.folder / "summary.json", summary)
        return summary

    # -- context --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self.restore_signals()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.close(done=error is None)
        if isinstance(error, TrainingInterrupted):
            self.console.print(str(error))

    def _open_log(self) -> None:
        """Open the curves; only rank 0 does."""
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged after its last checkpoint is logged again.
        self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.first_step + 1)
        if self.config.wandb_project is not None:
            from training.wandb_log import WandbLog

            self._wandb = WandbLog(self.config.wandb_project, self.folder, self.config)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = signal.Signals(number)
        self.restore_signals()  # a second signal ends the process at once

    def restore_signals(self) -> None:
        """Give signals the meaning that they had outside: this run is not one to be stopped after a step."""
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
