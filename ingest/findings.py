"""What a verification found wrong in a corpus: for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

Kind = Literal["damaged", "missing", "stray", "stale", "unfinished", "unproven"]

_AMOUNTS = ("rows", "arrays", "size")
_SHOWN_KEYS = 3
_SHOWN_FINDINGS = 40


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is not as it should be."""

    dataset: str
    file: str
    """File or array, relative to the corpus."""
    kind: Kind
    """stale: right, but made by rules of another time. unfinished: a run was stopped. unproven: nothing is
    recorded to compare with."""
    problem: str
    remedy: str
    images: int = 0
    """Number of images concerned, where it is known."""
    keys: tuple[str, ...] = ()
    """Their keys; of stale rows the first few."""


@dataclass
class Amount:
    """How much of a dataset was compared."""

    rows: int = 0
    arrays: int = 0
    size: int = 0
    """Bytes."""


@dataclass
class Verification:
    """The outcome of one verification."""

    datasets: list[str]
    deep: bool
    read: dict[str, Amount] = field(default_factory=dict)
    """By dataset."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be looked at, and why; no damage."""

    def after_repair(self, verify: Callable[[list[str]], Verification]) -> tuple[Verification, list[Finding]]:
        """What is true after a repair, and what it mended; only datasets that were not sound are read again."""
        touched = sorted({finding.dataset for finding in self.findings} & set(self.datasets))
        again = verify(touched) if touched else Verification([], self.deep)
        elsewhere = [finding for finding in self.findings if finding.dataset not in touched]
        final = replace(
            self,
            read=self.read | again.read,
            findings=sorted(again.findings + elsewhere),
            notes=list(again.notes),
        )
        places = {(finding.file, finding.kind) for finding in final.findings}
        return final, [finding for finding in self.findings if (finding.file, finding.kind) not in places]


def verification_as_json(outcome: Verification, repaired: Sequence[Finding]) -> dict[str, Any]:
    """All that was found, and what `--repair` mended before."""
    return {
        "sound": not outcome.findings,
        **asdict(outcome),
        "repaired": [asdict(finding) for finding in repaired],
    }


def render_verification(outcome: Verification, repaired: Sequence[Finding], console: Console) -> None:
    """Print a table of what is wrong and what to do, or one line where all is sound."""
    columns = ("dataset", "file", "images", "what", "problem")
    for title, findings in (("Repaired", repaired), ("Verify", outcome.findings)):
        if not findings:
            continue
        table = Table(title=title, title_justify="left")
        remedies = findings is outcome.findings
        for column in (*columns, "what to do") if remedies else columns:
            table.add_column(column, overflow="fold")
        for finding in findings[:_SHOWN_FINDINGS]:
            keys = ", ".join(finding.keys[:_SHOWN_KEYS])
            more = finding.images - min(len(finding.keys), _SHOWN_KEYS)
            shown = f"{keys} and {more} more" if keys and more > 0 else keys
            cells = (finding.dataset, finding.file, shown, finding.kind, finding.problem, finding.remedy)
            table.add_row(*map(escape, cells[: len(table.columns)]))
        console.print(table)
        if len(findings) > _SHOWN_FINDINGS:
            console.print(f"and {len(findings) - _SHOWN_FINDINGS} more: --json lists them all")
    for note in outcome.notes:
        console.print(note, markup=False)
    number = len(outcome.findings)
    rows, arrays, size = (sum(getattr(read, name) for read in outcome.read.values()) for name in _AMOUNTS)
    datasets = "dataset" if len(outcome.datasets) == 1 else "datasets"
    verdict = "sound" if not number else "1 finding" if number == 1 else f"{number} findings"
    console.print(
        f"{verdict}: {rows} rows and {arrays} arrays of {len(outcome.datasets)} {datasets}, "
        f"{decimal(size)} compared with their sha256"
        f"{', statistics computed anew from the voxels' if outcome.deep else ''}."
    )
