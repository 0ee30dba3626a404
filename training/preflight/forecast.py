"""From what was measured to the whole run: its time, what limits it, and what to set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.config import RunConfig
from training.limits import Figures, judge_loader
from training.preflight.codes import FULL_SHARE, Finding
from training.preflight.measure import LevelSpeed

_SPARE = 1.25
"""Of workers: so many more than just keep up, for batches that are larger than others."""
_USED = 0.9
"""Share of a memory that is planned with."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The whole run, without validation, checkpoints and the exchange of gradients."""

    step_seconds: float
    """Mean over DA levels as the corpus draws them, and with what is waited for data."""
    compute_seconds: float
    """Of these, the step itself."""
    loader_seconds: float
    """What loading a batch takes all workers."""
    images_per_second: float
    hours: float
    device_hours: float
    """Times processes."""
    checkpoint_bytes: int
    disk_bytes: int
    limit: Literal["loader", "compute", "memory"]
    settings: dict[str, int]
    """Proposed: data.workers, data.accumulate."""
    most_crops: int | None
    """Of a pass, as memory allows; None where it is not known."""
    changes: list[str]
    """What else would make it quicker."""


def forecast(
    config: RunConfig,
    levels: Sequence[LevelSpeed],
    loader: Figures,
    *,
    processes: int,
    memory_bytes: int | None,
    checkpoint_bytes: int,
    disk_bytes: int,
) -> Forecast:
    """Put together steps of one of `processes` and a loader that feeds all of them."""
    known = sum(one.share for one in levels)
    compute = sum(one.share * one.seconds for one in levels) / known
    load = config.data.batch_size / max(loader.stored_rate, 1e-9)
    waits = load > compute if config.data.workers else load > 0.25 * compute
    step = max(compute, load) if config.data.workers else compute + load
    accumulate = max(one.accumulate for one in levels)
    settings: dict[str, int] = {}
    if accumulate != config.data.accumulate:
        settings["data.accumulate"] = accumulate
    busy = 1e-3 * (loader.plan_ms + loader.decode_ms) * config.data.batch_size
    workers = min(math.ceil(_SPARE * busy / compute / processes), max(loader.cores // processes, 1))
    if waits and workers > config.data.workers:
        settings["data.workers"] = workers
    hours = config.steps * step / 3600
    return Forecast(
        step_seconds=step,
        compute_seconds=compute,
        loader_seconds=load,
        images_per_second=config.data.batch_size / step,
        hours=hours,
        device_hours=hours * processes,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=disk_bytes,
        limit="loader" if waits else "memory" if "data.accumulate" in settings else "compute",
        settings=settings,
        most_crops=most_crops(levels, memory_bytes),
        changes=judge_loader(loader).change if waits else [],
    )


def most_crops(levels: Sequence[LevelSpeed], memory_bytes: int | None) -> int | None:
    """Crops of a pass that fit at every level, by the memory of passes of two sizes; None where not known."""
    if memory_bytes is None:
        return None
    found = []
    for one in levels:
        if one.memory_bytes is None or one.memory_half_bytes is None:
            continue
        whole, half = -(-one.crops // one.accumulate), -(-(one.crops // 2) // one.accumulate)
        if whole > half and (each := (one.memory_bytes - one.memory_half_bytes) / (whole - half)) > 0:
            found.append(whole + int((_USED * memory_bytes - one.memory_bytes) / each))
    return max(min(found), 1) if found else None


def told(config: RunConfig, levels: Sequence[LevelSpeed], plan: Forecast, memory: int | None) -> list[Finding]:
    """What the figures say against the run, and how they came about."""
    found = []
    if plan.limit == "loader":
        found.append(
            Finding(
                "loader_limits",
                f"with {config.data.workers} workers a process, a batch takes {plan.loader_seconds:.2g} s "
                f"to load and {plan.compute_seconds:.2g} s to learn from",
            )
        )
    if "data.accumulate" in plan.settings:
        passes = plan.settings["data.accumulate"]
        found.append(
            Finding("memory_short", f"data.accumulate={passes} fits, {config.data.accumulate} does not")
        )
    peak = max((one.memory_bytes for one in levels if one.memory_bytes is not None), default=0)
    if memory is not None and peak > FULL_SHARE * memory:
        found.append(Finding("memory_tight", f"{peak / 1e9:.1f} GB of {memory / 1e9:.1f} GB"))
    if smaller := [one for one in levels if 0 < one.crops < one.of_crops]:
        text = ", ".join(f"level {one.level}: {one.crops} of {one.of_crops} crops" for one in smaller)
        found.append(Finding("smaller_batch_measured", text))
    if estimated := [str(one.level) for one in levels if not one.crops]:
        found.append(Finding("level_estimated", f"level {', '.join(estimated)}"))
    return found
