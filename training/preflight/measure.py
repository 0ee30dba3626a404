"""Steps of the real networks on real batches: time, memory and loss at each DA level, in the time there is."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from training.loader import RawBatch
from training.run import Run
from training.speed import StepWork

_TIMED = 5
"""Steps that are timed of each level, if there is time."""
_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class DoesNotFitError(Exception):
    """A step ran out of memory with one crop a pass."""


class NotFiniteError(Exception):
    """The loss or gradient of a step is not finite."""


@dataclass(frozen=True, kw_only=True)
class LevelSpeed:
    """What a step of one DA level takes a process, with its share of the batch."""

    level: int
    share: float
    """Of all steps."""
    crops: int
    """That were measured; fewer than its share of the batch where time was short, 0 if nothing was measured."""
    of_crops: int
    """Its share of the batch."""
    accumulate: int
    """Passes that it was made in."""
    seconds: float
    """Of the whole share: of fewer crops, multiplied."""
    flops: float
    """Of the whole share."""
    memory_bytes: int | None
    """Peak of the measured crops; of a GPU's allocator, on a CPU of the process."""
    memory_half_bytes: int | None
    """The same of half as many crops in as many passes, where that was measured."""


@dataclass(frozen=True)
class Steps:
    """How the doctor makes a step: `take` learns from a batch in some passes and returns its scalars."""

    run: Run
    take: Callable[[int, RawBatch, int], Mapping[str, float | torch.Tensor]]
    work: Callable[[RawBatch], StepWork]
    """What a step of a process's batch is."""


def measure_steps(
    steps: Steps, batches: Mapping[int, RawBatch], shares: Mapping[int, float], seconds: float
) -> list[LevelSpeed]:
    """Time a step of each level, a process's share of a batch, within some `seconds` (one crop at least).

    Levels that there was no time for are estimated by their operations. Raises DoesNotFitError if a level does
    not fit into memory, NotFiniteError if a loss is not finite.
    """
    measurement = _Measurement(steps)
    measured: list[LevelSpeed] = []
    deadline = time.perf_counter() + seconds
    waiting = sorted(batches, key=lambda level: -shares[level])
    left_out: list[int] = []
    for number, level in enumerate(waiting):
        now = time.perf_counter()
        if measured and now > deadline:
            left_out.append(level)
            continue
        until = now + max(deadline - now, 0) / (len(waiting) - number)
        measured.append(measurement.level(batches[level], shares[level], until))
    rate = sum(one.flops for one in measured) / sum(one.seconds for one in measured)
    estimated = [
        _estimated(batches[level], shares[level], measurement.accumulate, steps, rate) for level in left_out
    ]
    return sorted([*measured, *estimated], key=lambda one: one.level)


class _Measurement:
    """Makes the first steps of a run, and remembers how many passes a step takes to fit into memory."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._run = steps, steps.run
        self._device = steps.run.device
        self._done, self._last_seconds = 0, 0.0
        self.accumulate = steps.run.config.data.accumulate

    def level(self, whole: RawBatch, share: float, until: float) -> LevelSpeed:
        """Measure a step of one level, with as many crops of the batch as are made `until` then."""
        _forget_peak(self._device)
        crops, alone, half = len(whole.plan.samples), whole.first(1), None
        if not self._fits(alone, 1):
            raise DoesNotFitError(f"level {whole.level}, one crop of {whole.plan.crop_size} voxels (D, H, W)")
        seconds = self._last_seconds
        if seconds < until - time.perf_counter():
            seconds = self._step(alone, 1)  # the first one made what all others use
        taken = crops
        if self._device.type != "cuda" and time.perf_counter() + 2 * crops * seconds > until:
            taken = max(int((until - time.perf_counter()) / max(2 * seconds, 1e-9)), 1)
        batch = whole.first(taken)
        if taken > 1:
            if not self._fits(batch, self._passes(batch)):
                # With one crop a pass it fits: that was tried.
                self.accumulate = fewest(partial(self._fits, batch), self._passes(batch), taken)
            if self._device.type == "cuda":
                half = self._memory(whole.first(taken // 2))
            times = [self._timed(batch, fresh_peak=True)]
            while len(times) < _TIMED and time.perf_counter() + times[-1] < until:
                times.append(self._timed(batch, fresh_peak=False))
            seconds = min(times)
        return LevelSpeed(
            level=whole.level,
            share=share,
            crops=taken,
            of_crops=crops,
            accumulate=self.accumulate,
            seconds=seconds * crops / taken,
            flops=self._steps.work(whole).flops,
            memory_bytes=_peak(self._device),
            memory_half_bytes=half,
        )

    def _passes(self, batch: RawBatch) -> int:
        return min(self.accumulate, len(batch.plan.samples))

    def _timed(self, batch: RawBatch, *, fresh_peak: bool) -> float:
        if fresh_peak:
            _forget_peak(self._device)
        return self._step(batch, self._passes(batch))

    def _memory(self, batch: RawBatch) -> int | None:
        """Peak memory of a step."""
        self._timed(batch, fresh_peak=True)
        return _peak(self._device)

    def _step(self, batch: RawBatch, passes: int) -> float:
        """Seconds of the next step of the run."""
        began = time.perf_counter()
        scalars = self._steps.take(self._done, batch, passes)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began
        loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
        # Under fp16 an infinite gradient is how the scaler finds its scale.
        if not math.isfinite(loss) or not (math.isfinite(norm) or self._run.config.precision == "fp16"):
            keys = ", ".join(batch.keys[:4]) + (" ..." if len(batch.keys) > 4 else "")
            raise NotFiniteError(
                f"step {self._done}, level {batch.level}: loss {loss:.4g}, gradient norm {norm:.4g}: {keys}"
            )
        self._run.finish_step(self._done, {})
        self._done, self._last_seconds = self._done + 1, seconds
        return seconds

    def _fits(self, batch: RawBatch, passes: int) -> bool:
        """Whether a step does not run out of memory."""
        try:
            self._step(batch, passes)
        except (MemoryError, RuntimeError) as error:
            if not _is_of_memory(error):
                raise
            self._run.forget_step()
        else:
            return True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return False


def _estimated(batch: RawBatch, share: float, accumulate: int, steps: Steps, rate: float) -> LevelSpeed:
    flops = steps.work(batch).flops
    return LevelSpeed(
        level=batch.level,
        share=share,
        crops=0,
        of_crops=len(batch.plan.samples),
        accumulate=accumulate,
        seconds=flops / rate,
        flops=flops,
        memory_bytes=None,
        memory_half_bytes=None,
    )


def fewest(fits: Callable[[int], bool], too_few: int, enough: int) -> int:
    """The smallest number above `too_few`, up to `enough`, that fits; more fit where fewer do."""
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(middle):
            enough = middle
        else:
            too_few = middle
    return enough


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # a system that does not let us keeps the larger peak
            _FORGET_PEAK.write_text("5")


def _peak(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


def memory_limit(device: torch.device) -> int | None:
    """Bytes that there are for training; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:")), None)


def _is_of_memory(error: BaseException) -> bool:
    # On a CPU PyTorch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
