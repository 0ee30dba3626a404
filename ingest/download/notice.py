"""What a user is told before a download, or instead of one."""

from __future__ import annotations

from pathlib import Path

from ingest.discover import expected_layout
from ingest.download.run import needs_consent
from ingest.spec import DatasetSpec


def notice(spec: DatasetSpec, raw: Path) -> str:
    """Title, licence, origin, what to cite, size and place of a dataset."""
    size = spec.download.bytes if spec.download is not None else None
    facts = {
        "licence": spec.licence or "not stated by the publisher",
        "from": _origin(spec),
        "cite": "; ".join(citation.short for citation in spec.citation),
        "size": f"{size / 1e9:.3g} GB" if size is not None else "",
        "into": str(raw / spec.folder),
    }
    lines = [f"{spec.id}: {spec.title}", *(f"  {name}: {fact}" for name, fact in facts.items() if fact)]
    return "\n".join([*lines, *(f"  note: {note}" for note in spec.notes)])


def consent_question(spec: DatasetSpec) -> str | None:
    """What to ask before a download; None where the licence asks for no more than naming the source."""
    if not needs_consent(spec.licence):
        return None
    if spec.licence is None:
        return "No licence is stated. Have you made sure that you may use the data as you intend?"
    return f"The licence is {spec.licence}. Will you use the data only as it allows?"


def steps(spec: DatasetSpec, raw: Path) -> str:
    """How a person gets a dataset that this program cannot or may not fetch."""
    kind = spec.access.kind if spec.access is not None else "unknown"
    told = list(spec.access.steps) if spec.access is not None else []
    if kind != "included":
        told += [f"Unpack it into {raw / spec.folder}.", f"pumit-data ingest {spec.id} --raw {raw}"]
    lines = [
        f"{spec.id}: {spec.title}",
        f"  licence: {spec.licence or 'not stated by the publisher'}",
        f"  from: {_origin(spec)}",
        f"  This command cannot fetch it (access: {kind}).",
        *(f"  {number}. {step}" for number, step in enumerate(told, start=1)),
        f"  {expected_layout(spec)}",
    ]
    return "\n".join(lines)


def _origin(spec: DatasetSpec) -> str:
    if spec.access is None:
        return "unknown"
    return ", ".join(filter(None, (spec.access.host, spec.access.collection, spec.access.address))) or "unknown"
