"""What datasets.yaml knows of the datasets: one in full, or all in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from catalog.errors import SetupError
from ingest.citation import bibliography
from ingest.layout import Layout
from ingest.spec import DatasetSpec

_COLUMNS: list[tuple[int, str]] = [
    (0, "id"),
    (150, "title"),
    (0, "dim"),
    (0, "modalities"),
    (0, "body parts"),
    (110, "formats"),
    (110, "licence"),
    (130, "access"),
    (0, "ingested"),
]
"""Columns of the list, each with the width in characters from which on it has room."""
_WIDTH_WITH_SEQUENCES = 110


def chosen(
    specs: Iterable[DatasetSpec], modality: str | None = None, body_part: str | None = None
) -> list[DatasetSpec]:
    """The datasets that have a modality, or one of its sequences, and a body part; case does not matter.

    Raises:
        SetupError: no dataset has it.
    """
    kept = list(specs)
    if modality is not None:
        kept = _having("modality", modality, kept, {spec.id: _with_kinds(spec.modalities) for spec in kept})
    if body_part is not None:
        kept = _having("body part", body_part, kept, {spec.id: spec.body_parts for spec in kept})
    return kept


def _having(
    what: str, wanted: str, specs: Sequence[DatasetSpec], values: Mapping[str, list[str]]
) -> list[DatasetSpec]:
    kept = [spec for spec in specs if wanted.casefold() in map(str.casefold, values[spec.id])]
    if not kept:
        known = ", ".join(sorted({value for has in values.values() for value in has}))
        raise SetupError(f"No dataset here has the {what} {wanted!r}. There are: {known}.")
    return kept


def _with_kinds(modalities: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for modality in modalities for name in (modality.split("/")[0], modality)))


def list_as_json(specs: Iterable[DatasetSpec], ingested: set[str]) -> list[dict[str, Any]]:
    """The facts of the list, one entry a dataset."""
    facts = {"id", "title", "folder", "licence", "access", "download", "citation", "published", "left_out"}
    return [
        spec.model_dump(mode="json", include=facts) | _derived(spec) | {"ingested": spec.id in ingested}
        for spec in specs
    ]


def _derived(spec: DatasetSpec) -> dict[str, Any]:
    names = ("modalities", "body_parts", "dimensions", "formats")
    return {name: getattr(spec, name) for name in names}


def list_table(specs: Sequence[DatasetSpec], ingested: set[str], width: int) -> Table:
    """The datasets as a table of `width` characters: a narrow one has fewer columns."""
    shown = [name for least, name in _COLUMNS if width >= least]
    table = Table(title=f"{len(specs)} datasets", title_justify="left")
    for name in shown:
        table.add_column(name, no_wrap=name in ("id", "dim"), overflow="fold")
    for spec in specs:
        cells = {
            "id": spec.id,
            "title": spec.title,
            "dim": _dimensions(spec),
            "modalities": _kinds(spec, with_sequences=width >= _WIDTH_WITH_SEQUENCES),
            "body parts": ", ".join(spec.body_parts),
            "formats": ", ".join(spec.formats),
            "licence": spec.licence or "not stated",
            "access": spec.access.kind if spec.access is not None else "unknown",
            "ingested": "yes" if spec.id in ingested else "",
        }
        table.add_row(*(Text(cells[name]) for name in shown))
    return table


def _kinds(spec: DatasetSpec, *, with_sequences: bool) -> str:
    """`CT, MRI (T1, T2)`, or the kinds alone."""
    sequences: dict[str, list[str]] = {}
    for modality in spec.modalities:
        kind, _, sequence = modality.partition("/")
        sequences.setdefault(kind, []).extend([sequence] if sequence else [])
    told = {
        kind: f" ({', '.join(names)})" if names and with_sequences else "" for kind, names in sequences.items()
    }
    return ", ".join(f"{kind}{names}" for kind, names in told.items())


def _dimensions(spec: DatasetSpec) -> str:
    return ", ".join(f"{dimension}-D" for dimension in spec.dimensions)


def as_json(spec: DatasetSpec, ingested: bool) -> dict[str, Any]:
    """The whole entry, what follows from it, and its references in BibTeX."""
    return (
        spec.model_dump(mode="json")
        | _derived(spec)
        | {
            "layout": Layout(spec).tree(),
            "bibtex": bibliography(spec.citation),
            "ingested": ingested,
        }
    )


def render(spec: DatasetSpec, ingested: bool, console: Console) -> None:
    """Print all that is known of a dataset."""
    console.print(Text.assemble((spec.title, "bold"), f" ({spec.id})"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(no_wrap=False, overflow="fold")
    for label, value in [*_facts(spec), *how_to_obtain(spec), ("ingested", "yes" if ingested else "no")]:
        facts.add_row(label, Text(value))
    console.print(facts)
    console.print(f"\nExpected in the raw folder, below {spec.folder}/ or {spec.id}/, any of:", markup=False)
    console.print(Padding(_tree(spec), (0, 2)))
    for label, items in _remarks(spec):
        console.print(f"\n{label}:")
        for item in items:
            console.print(Text(f"  - {item}"))
    if spec.citation:
        console.print("\nTo cite:\n")
        for reference in bibliography(spec.citation):
            console.print(reference, markup=False)


def how_to_obtain(spec: DatasetSpec) -> list[tuple[str, str]]:
    """Where the publisher offers the dataset and under which conditions, as (label, text)."""
    access = spec.access
    told = [("licence", spec.licence or "not stated"), ("access", access.kind if access else "unknown")]
    if access is not None:
        offered = ", ".join(filter(None, [access.host, access.collection, access.address]))
        told.append(("offered at", offered or "unknown"))
    if spec.download is not None:
        told.append(("to get it", f"pumit-data download {spec.id}"))
    elif access is not None:
        steps = enumerate(access.steps, start=1)
        told += [("to get it" if number == 1 else "", f"{number}. {step}") for number, step in steps]
    return told


def _facts(spec: DatasetSpec) -> list[tuple[str, str]]:
    facts = [
        ("dimension", _dimensions(spec)),
        ("modalities", _kinds(spec, with_sequences=True)),
        ("body parts", ", ".join(spec.body_parts)),
        ("formats", ", ".join(spec.formats)),
        ("sampling weight", f"{spec.sampling_weight:g}"),
    ]
    if told := _published(spec):
        facts.append(("published", told))
    if spec.left_out:
        facts.append(("left out", f"of --all and the default mix: {spec.left_out}"))
    return facts


def _published(spec: DatasetSpec) -> str:
    published = spec.published
    parts = ", ".join(f"{part.name} {part.images or '?'}" for part in published.parts)
    told = [
        f"{published.images} images" if published.images else "",
        f"{published.subjects} subjects" if published.subjects else "",
        f"{published.gigabytes:g} GB" if published.gigabytes else "",
        f"parts: {parts}" if parts else "",
        published.note or "",
    ]
    return "; ".join(filter(None, told))


def _remarks(spec: DatasetSpec) -> list[tuple[str, list[str]]]:
    remarks = [
        ("Left out by name", [f"{rule.reason} ({rule.match})" for rule in spec.exclusions]),
        ("Good to know", list(spec.notes)),
    ]
    return [(label, items) for label, items in remarks if items]


def _tree(spec: DatasetSpec) -> Tree:
    tree = Tree(Text(f"{spec.folder}/"))
    _grow(tree, Layout(spec).tree())
    return tree


def _grow(tree: Tree, names: Mapping[str, Any]) -> None:
    for name, below in names.items():
        # A folder with one thing in it needs no line of its own.
        while len(below) == 1:
            only, further = next(iter(below.items()))
            name, below = f"{name}/{only}", further
        _grow(tree.add(Text(f"{name}/" if below else name)), below)
