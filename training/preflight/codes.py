"""Every code of a finding with its severity, meaning and advice; nobody else defines codes.

`python -m training.preflight.codes > docs/preflight.md` writes the page that lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

SHARDS_LOOKED_AT = 32
"""Arrays whose bytes are compared with their hashes."""
NARROW_SHARE = 0.02
"""Share of a codebook up to which its use is told of."""
FULL_SHARE = 0.8
"""Share of a disk's or a memory's free space from which a run is told to be tight."""


@dataclass(frozen=True)
class Code:
    """What a code stands for."""

    severity: Severity
    meaning: str
    """When a run has it."""
    advice: str
    """What to do."""


@dataclass(frozen=True)
class Finding:
    """Something that speaks against a run, or is good to know before it."""

    code: str
    text: str
    """What was found, with its numbers and names."""

    @property
    def severity(self) -> Severity:
        return CODES[self.code].severity


CODES: dict[str, Code] = {
    "data_unusable": Code(
        "error",
        "The corpus cannot be opened, its catalog cannot be read, or no image can be drawn: nothing is "
        "ingested, the mix leaves out everything, a crop cannot be read.",
        "Do what the message says; `pumit-data stats`, `mix show` and `verify` tell more.",
    ),
    "shard_damaged": Code(
        "error",
        f"Of up to {SHARDS_LOOKED_AT} arrays that the first steps read, one is missing or is not what the "
        "catalog says was written.",
        "`pumit-data verify` finds all of them, and `verify --repair` makes them anew.",
    ),
    "no_validation": Code(
        "error",
        "Nobody is held out for validation, so that the run would be measured on what it trains on.",
        "Ingest images of more subjects: one of each modality is held out where there are two or more.",
    ),
    "modality_not_validated": Code(
        "warning",
        "A modality that is trained on has no image among those that the run validates on.",
        "Raise `validation_images`; where the modality has one subject alone, ingest another.",
    ),
    "device_unusable": Code(
        "error",
        "The configured device or precision is not to be had on this machine.",
        "Do what the message says.",
    ),
    "schedule_too_long": Code(
        "error",
        "The learning rate of a network would still climb in the last step.",
        "Lower its `warmup_steps`, or raise `steps`.",
    ),
    "batch_too_small": Code(
        "error",
        "A process has fewer crops of a batch than it is to make passes.",
        "Lower `data.accumulate` or the number of processes, or raise `data.batch_size`.",
    ),
    "weights_unusable": Code(
        "error",
        "The weights to start from, or those of the perceptual loss, are missing or do not fit.",
        "Do what the message says.",
    ),
    "tokenizer_unusable": Code(
        "error",
        "Masked image modelling has no tokenizer, or it cannot be loaded.",
        "Give the --run folder of a finished `pumit-train tokenizer`, or an export of one, with --tokenizer.",
    ),
    "targets_unusable": Code(
        "error",
        "The targets that were computed ahead are missing, too few, or of other crops or another tokenizer.",
        "Write them with `pumit-train targets` and the settings of the run, or leave them out.",
    ),
    "tokenizer_other_corpus": Code(
        "error",
        "The tokenizer was trained on other images, or on images that this corpus holds out.",
        "Train a tokenizer on this corpus; or, if you mean it, say --other-corpus.",
    ),
    "tokenizer_from_elsewhere": Code(
        "note",
        "It is not known what the tokenizer was trained on; or it was another corpus, which --other-corpus "
        "allows.",
        "Nothing must be done. What it makes of your images: `pumit-train evaluate tokenizer`.",
    ),
    "codebook_collapsed": Code(
        "error",
        "The tokenizer gives all tokens of this corpus's validation images the same code: there is nothing to "
        "predict.",
        "Train it again with a larger `loss.diversity_weight`, or a smaller `loss.sharpness_weight`.",
    ),
    "codebook_narrow": Code(
        "warning",
        f"The likeliest codes of all validation tokens are less than {NARROW_SHARE:.0%} of the codebook.",
        "Look at `pumit-train evaluate tokenizer` before you spend days on its tokens.",
    ),
    "run_folder_taken": Code(
        "warning",
        "The --run folder is not empty.",
        "Continue that run with --resume, or name another folder.",
    ),
    "disk_too_small": Code(
        "error",
        "The disk of the --run folder has less free space than the checkpoints that are kept, and the one "
        "being written, take.",
        "Free space, name another folder, or lower `keep_checkpoints`.",
    ),
    "disk_nearly_full": Code(
        "warning",
        f"Checkpoints take more than {FULL_SHARE:.0%} of the free space on the disk of the --run folder.",
        "See that nothing else fills it.",
    ),
    "shm_too_small": Code(
        "error",
        "Batches travel from workers through /dev/shm, which has less room than those that wait there.",
        "Lower `data.workers` or `data.batch_size`; in a container give it more (docker run --shm-size).",
    ),
    "open_files_low": Code(
        "warning",
        "The limit of open files is near what workers and training need.",
        "`ulimit -n 65536` before the start.",
    ),
    "out_of_memory": Code(
        "error",
        "A step does not fit into memory even if passes have one crop.",
        "Smaller crops or a smaller network; of a ViT `model.recompute_blocks=true`, or `parallel=fsdp` on "
        "several GPUs.",
    ),
    "memory_short": Code(
        "warning",
        "A step does not fit into memory as configured, but it does in more passes.",
        "Set `data.accumulate` as proposed: the same step in less memory.",
    ),
    "memory_tight": Code(
        "warning",
        f"A step takes more than {FULL_SHARE:.0%} of the memory there is.",
        "Other programs, or the shapes of validation, may make it fail: a larger `data.accumulate` takes less.",
    ),
    "loss_not_finite": Code(
        "error",
        "The loss of one of the first steps is not finite.",
        "Lower the learning rate or the weight of a loss; use bf16 or fp32, not fp16; look at the images.",
    ),
    "loader_limits": Code(
        "warning",
        "The network waits for data.",
        "Do what is proposed; `pumit-data bench-loader` tells more.",
    ),
    "smaller_batch_measured": Code(
        "note",
        "A step of the whole batch would have taken longer than there was time: fewer crops were measured, and "
        "their time multiplied.",
        "--seconds 600 measures more of it.",
    ),
    "level_estimated": Code(
        "note",
        "The time of a DA level was not measured, but follows from that of the others and its operations.",
        "--seconds 600 measures more levels.",
    ),
    "measured_eagerly": Code(
        "note",
        "Compilation would have taken longer than there was time: steps were measured as they are without.",
        "Expect the run to be quicker, after some minutes at its start.",
    ),
}
"""By code, in the order of the examination."""


_PAGE = """\
# What `pumit-train doctor` looks for

<!-- Made by `python -m training.preflight.codes > docs/preflight.md` from training/preflight/codes.py. -->

`pumit-train doctor` makes a run's first steps on your machine and corpus, in about two minutes, before you
start one of days:

```sh
pumit-train doctor --kind tokenizer --preset paper --data /corpus --run runs/tokenizer
pumit-train doctor --kind mim --preset paper --data /corpus --tokenizer runs/tokenizer --run runs/mim --nproc 4
```

It takes the options of the training itself and writes nothing to its folder. An `error` is a run that cannot
end well: the command then ends with exit code 2, else with 0. `--json` has every figure.

| code | severity | a run has it when | what to do |
| --- | --- | --- | --- |
{codes}

## What it measures

- **Steps.** For each DA level that the corpus has, a real batch and the real network: a step of one crop
  to warm up, then steps of the share of the batch that one process has. If they take longer than `--seconds`
  allows, fewer crops are taken and their time multiplied; a level for which no time is left is estimated from
  its operations. Memory is the peak of the GPU's allocator, on a CPU that of the process. A discriminator takes
  part as if its gate were open; with `parallel=fsdp` the process has the whole network, not a shard.
- **The loader**, as `pumit-data bench-loader` does, with `data.workers` workers for each process.
- **What fits.** If a step runs out of memory, the smallest `data.accumulate` with which it does not is
  searched; on a GPU, the memory of half as many crops tells how many a pass could have.
- **The whole run.** Its steps times the mean step over DA levels, weighted as the corpus draws them, or the
  loader's time for a batch where that is longer (their sum without workers). Validation, checkpoints and the
  exchange of gradients between processes come on top: they are not in the figure.
"""


def page() -> str:
    """docs/preflight.md."""
    lines = (
        f"| `{name}` | {code.severity} | {code.meaning} | {code.advice} |"
        for name, code in sorted(CODES.items(), key=lambda item: SEVERITIES.index(item[1].severity))
    )
    return _PAGE.format(codes="\n".join(lines))


if __name__ == "__main__":
    print(page(), end="")
