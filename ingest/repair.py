"""Mend what a verification found: the damaged images alone are made anew, and the bytes end as they were.

An array is written under the name that the catalog has for it, from the images that the catalog names, and
takes its place only if it has the sha256 that the catalog tells. A split is drawn again, and likewise kept only
if it is the one that was recorded. Where the catalog itself is damaged, its rows are ingested again. Nothing is
deleted before what replaces it can be made.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catalog.corpus import Corpus
from catalog.durable import sync
from catalog.errors import SetupError
from catalog.index import write_index
from catalog.manifest import (
    DamagedManifestError,
    accepted_digests,
    digest_of,
    digest_when_written,
    publish,
    seal,
    settle,
    surviving_digests,
)
from catalog.scratch import NameSet
from catalog.store import Location, RemotePath, StoreError
from ingest.backfill import add_features
from ingest.discover import dataset_root
from ingest.findings import Finding, Verification
from ingest.found import FoundSources
from ingest.journal import Journal
from ingest.ledger import done_paths
from ingest.names import name_key
from ingest.outline import RawFolder
from ingest.overrides import overrides_of
from ingest.run import IngestPlan, IngestReport, planned
from ingest.source import ImageSource

if TYPE_CHECKING:
    import pyarrow as pa

    from ingest.spec import DatasetSpec

Row = dict[str, Any]

_PACK = re.compile(r"/(pack-\d+)-[^/]*$")
"""In the path of an array: the task that wrote it."""


def repair(
    corpus: Corpus,
    specs: Mapping[str, DatasetSpec],
    raw: RawFolder,
    outcome: Verification,
    workers: int | None,
    ingest: Callable[[list[IngestPlan]], list[IngestReport]],
) -> list[str]:
    """Mend what a verification found; returns what could not be mended, and why.

    Stale rows are left to an ordinary ingest, which is not to give back the bytes that were, and so are files
    that are none of the corpus outside of its shards.

    Args:
        corpus: of one in a store, a working copy that is published whole when this is done.
        specs: entries of datasets.yaml by id.
        raw: the raw folder, looked at only where something must be made anew.
        workers: processes that make arrays anew; by default one per core.
        ingest: runs plans, for damage that no smaller step can mend.

    Raises:
        SetupError: another process works on a dataset, or raw images are needed and are not there.
    """
    count = workers or len(os.sched_getaffinity(0))
    problems: list[str] = []
    plans: list[IngestPlan] = []
    for dataset in outcome.datasets:
        findings = [finding for finding in outcome.findings if finding.dataset == dataset]
        if all(finding.kind == "stale" for finding in findings):
            continue
        due, unmended = _Mender(corpus, dataset, specs.get(dataset), raw, count).mend(findings)
        problems += unmended
        plans += due
    for report in ingest(plans) if plans else ():
        problems += report.messages
    write_index(corpus.place)
    return problems


class _Mender:
    """Repairs one dataset of a corpus."""

    def __init__(
        self, corpus: Corpus, dataset: str, spec: DatasetSpec | None, raw: RawFolder, workers: int
    ) -> None:
        self._corpus, self._dataset, self._spec = corpus, dataset, spec
        self._raw, self._workers = raw, workers
        self._journal = Journal(corpus, dataset)

    def mend(self, findings: Sequence[Finding]) -> tuple[list[IngestPlan], list[str]]:
        """Mend what needs no ingest, and return the plans of the ingests that do the rest.

        Also returned: what could not be mended, and why.
        """
        with self._journal.lock():
            problems: list[str] = []
            if self._corpus.origin is not None:
                findings = [finding for finding in findings if not self._is_sound_here(finding)]
            kinds = ("damaged", "missing", "unproven")
            hurt = {self._corpus.root / finding.file for finding in findings if finding.kind in kinds}
            lost = {self._corpus.root / finding.file for finding in findings if _is_file_lost(finding)}
            if hurt & set(self._files()) or self._corpus.manifest_file(self._dataset) in hurt:
                lost |= self._seal_what_is_proven()
            split = self._corpus.split_file(self._dataset)
            if split in lost:
                problems += self._redraw()
            features = self._corpus.features_file(self._dataset)
            if features in lost:
                features.unlink(missing_ok=True)  # it follows from the arrays
            if lost & {self._corpus.catalog_file(self._dataset), self._corpus.preview_file(self._dataset)}:
                return self._plan_whole(self._placement()), problems
            self._finish_stopped_run(findings)
            table = self._table()
            if table is None:
                return [], problems
            table = self._with_hashes(table)
            self._remove_strays(findings, set(table["shard_path"].to_pylist()))
            wrong = {key for finding in findings if _is_row_wrong(finding) for key in finding.keys}
            arrays = {
                finding.file.removeprefix("shards/")
                for finding in findings
                if finding.file.startswith("shards/") and finding.kind in ("damaged", "missing")
            }
            unfit, more = self._rewrite(table, arrays)
            if features in lost:
                add_features(self._corpus, self._dataset, but=wrong | unfit)
            return self._plan_rows(table, wrong | unfit), problems + more

    def _is_sound_here(self, finding: Finding) -> bool:
        """Whether the working copy has the file that is damaged in the store: it only needs to be sent."""
        file = self._corpus.root / finding.file
        if finding.keys or file not in self._files() or not file.is_file():
            return False
        try:
            accepted = accepted_digests(self._corpus, self._dataset)
        except DamagedManifestError:
            return False
        return digest_of(file) in accepted.get(finding.file, set())

    def _files(self) -> tuple[Path, ...]:
        return self._corpus.files(self._dataset)

    def _table(self) -> pa.Table | None:
        from catalog.query import load_catalog

        if not self._corpus.catalog_file(self._dataset).is_file():
            return None
        return load_catalog(self._corpus, datasets=[self._dataset], status=None)

    def _seal_what_is_proven(self) -> set[Path]:
        """Write a damaged or incomplete manifest anew; returns the files that nothing vouches for.

        A file is proven by its hash in what is left of the manifest, or else by giving the same bytes when its
        values are written again: a flipped bit outside its pages, which have checksums, would not come back.
        """
        manifest = self._corpus.manifest_file(self._dataset)
        try:
            accepted, surviving = accepted_digests(self._corpus, self._dataset), set[str]()
        except DamagedManifestError:
            following = self._corpus.next_manifest_file(self._dataset)
            accepted, surviving = {}, surviving_digests(manifest) | surviving_digests(following)
        there = [path for path in self._files() if path.is_file()]
        if manifest.is_file() and {self._name(path) for path in there} <= accepted.keys():
            return set()
        digests = {name: min(known) for name, known in accepted.items()}
        unproven = set()
        for path in there:
            digest, name = digest_of(path), self._name(path)
            if digest in accepted.get(name, surviving):
                digests[name] = digest
            elif name not in accepted:
                if digest == self._digest_of_values(path):
                    digests[name] = digest
                else:
                    unproven.add(path)
        seal(self._corpus, self._dataset, digests)
        return unproven

    def _digest_of_values(self, path: Path) -> str | None:
        import pyarrow as pa

        from catalog.query import read_table
        from catalog.split import split_file
        from catalog.write import catalog_file, features_file, preview_file

        written = (catalog_file, preview_file, features_file, split_file)
        forms = dict(zip(self._files(), written, strict=True))
        try:
            table = read_table(path, remedy="")
        except SetupError:
            return None
        # Parquet has a name of its own for the elements of a list.
        fields = [
            field.with_type(pa.list_(field.type.value_type)) if pa.types.is_list(field.type) else field
            for field in table.schema
        ]
        as_written = table.cast(pa.schema(fields, metadata=table.schema.metadata))
        # An older version wrote its own columns.
        form = forms[path](self._corpus, self._dataset, [as_written])
        return digest_when_written(replace(form, schema=as_written.schema))

    def _redraw(self) -> list[str]:
        from catalog.split import hold_out

        split = self._corpus.split_file(self._dataset)
        expected = accepted_digests(self._corpus, self._dataset).get(self._name(split), set())
        subjects = self._sources().subjects()
        with tempfile.TemporaryDirectory(dir=self._journal.folder) as folder:
            scratch = Corpus(Path(folder))
            hold_out(scratch, self._dataset, subjects)
            drawn = scratch.split_file(self._dataset)
            if not drawn.is_file() or digest_of(drawn) not in expected:
                return [
                    f"{self._dataset}: the split grew with the dataset, and cannot be drawn again as it was. "
                    f"Restore {split} from a copy: a new draw may hold out subjects that models trained on."
                ]
            drawn.replace(split)
        sync(split.parent)
        return []

    def _finish_stopped_run(self, findings: Iterable[Finding]) -> None:
        from shards.write import remove_leftovers

        settle(self._corpus, self._dataset)
        self._journal.merge()
        remove_leftovers(self._corpus.shards_folder, self._dataset)
        for finding in findings:
            path = self._corpus.root / finding.file
            if finding.kind == "stray" and path.name.startswith(".tmp-") and path.is_file():
                path.unlink()

    def _remove_strays(self, findings: Iterable[Finding], referenced: set[str]) -> None:
        """Only below the dataset's shards, where nothing but arrays has a place; the rest is the user's."""
        for finding in findings:
            path = self._corpus.place / finding.file
            inside_an_array = finding.file.startswith("shards/") and finding.file.count("/") == 3
            # An array that no row named when it was looked at may have got one since, by the merge.
            if finding.kind == "stray" and path.exists() and (inside_an_array or path.is_file()):
                _remove(path)
        kept = NameSet()
        kept.add(referenced)
        self._journal.remove_unreferenced_shards(kept)

    def _with_hashes(self, table: pa.Table) -> pa.Table:
        """The catalog with the sha256 of arrays that were written before it was recorded, and are sound."""
        import pyarrow as pa

        from catalog.schema import CATALOG_SCHEMA
        from catalog.write import catalog_file
        from shards.check import checked_digest
        from shards.layout import SHARD_FILE, chunk_grid, pack_chunk, volume_chunk

        columns = [
            table[name].to_pylist() for name in ("shard_path", "shard_shape", "shard_index", "shard_sha256")
        ]
        known: dict[str, str | None] = {}
        for path, shape, index, sha256 in zip(*columns, strict=True):
            if path is not None and sha256 is None and path not in known:
                chunk = volume_chunk(tuple(shape)) if index is None else pack_chunk(tuple(shape))
                file = self._corpus.shards / path / SHARD_FILE
                try:
                    known[path] = checked_digest(file, chunk_grid(tuple(shape), chunk))[1]
                except StoreError:  # it says nothing about the array
                    raise
                except (ValueError, OSError):
                    known[path] = None  # to be made anew
        if not known:
            return table
        hashes = [known.get(path) or sha256 for path, *_, sha256 in zip(*columns, strict=True)]
        position = table.schema.get_field_index("shard_sha256")
        sealed = table.set_column(position, table.schema.field(position), pa.array(hashes, pa.string())).cast(
            CATALOG_SCHEMA
        )
        publish(self._corpus, self._dataset, [catalog_file(self._corpus, self._dataset, [sealed])])
        return sealed

    def _rewrite(self, table: pa.Table, arrays: set[str]) -> tuple[set[str], list[str]]:
        """Make damaged arrays anew; returns the keys of those that must be ingested instead, and problems."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from ingest.verify import worker_pool

        if not arrays:
            return set(), []
        names = [
            "key",
            "source_path",
            "source_hash",
            "shard_path",
            "shard_shape",
            "shard_index",
            "shard_sha256",
            "entry_hash",
        ]
        chosen = table.filter(pc.is_in(table["shard_path"], pa.array(sorted(arrays)))).select(names)
        rows: dict[str, list[Row]] = defaultdict(list)
        for row in chosen.to_pylist():
            rows[row["shard_path"]].append(row)
        sources = self._sources()
        found = {source.public_path: source for source in sources}
        origin = self._origin(sources.root)
        unfit: set[str] = set()
        problems = []
        jobs = {}
        with worker_pool(min(self._workers, len(rows)), processes=True) as pool:
            for path, members in rows.items():
                members.sort(key=lambda row: row["shard_index"] or 0)
                slots = [row["shard_index"] or 0 for row in members]
                size = 1 if members[0]["shard_index"] is None else members[0]["shard_shape"][0]
                if slots != list(range(size)) or members[0]["shard_sha256"] is None:
                    unfit |= {row["key"] for row in members}  # images of it were replaced since
                    continue
                if gone := sorted({row["source_path"] for row in members} - found.keys()):
                    problems.append(
                        f"shards/{path} cannot be made anew: {gone[0]} is no more below {sources.root}."
                    )
                    continue
                origins = [found[name] for name in dict.fromkeys(row["source_path"] for row in members)]
                lossless = members[0]["entry_hash"].startswith(sources.spec.entry_hash(lossless=True))
                jobs[path] = pool.submit(
                    remake_array, self._corpus, members, origins, origin, lossless=lossless
                )
            for path, job in jobs.items():
                if problem := job.result():
                    problems.append(f"shards/{path} cannot be made anew: {problem}")
        return unfit, problems

    def _sources(self) -> FoundSources:
        if self._spec is None:
            raise SetupError(
                f"{self._dataset}: no datasets.yaml has this entry, so its images cannot be found. Give --raw "
                "with the raw folder that holds it."
            )
        self._raw.outline(self._spec)
        root = dataset_root(self._spec, self._raw.folder)
        names = name_key(self._corpus) if self._spec.private_names else None
        return FoundSources(self._spec, root, names, overrides_of(self._dataset, self._raw.folder))

    def _planned(self, paths: Collection[str]) -> IngestPlan:
        """The plan of a call that ingests the sources of these paths and no others."""
        sources = self._sources()
        sources.select_paths(paths)
        return self._plan_of(sources)

    def _plan_of(self, sources: FoundSources) -> IngestPlan:
        return replace(planned(sources.spec, self._corpus, sources), origin=self._origin(sources.root))

    def _origin(self, root: Path) -> RemotePath | None:
        """Where the images lie, if the folder only outlines them."""
        return None if self._raw.origin is None else self._raw.origin_of(root)

    def _placement(self) -> pa.Table | None:
        """Which source lies in which array, if a damaged catalog can still tell."""
        from catalog.query import read_table

        try:
            return read_table(self._corpus.catalog_file(self._dataset), "", ["source_path", "shard_path"])
        except (SetupError, FileNotFoundError):
            return None

    def _plan_whole(self, placement: pa.Table | None) -> list[IngestPlan]:
        """Take the damaged catalog away, if all it held can be ingested again, call by call as it was."""
        sources, done = self._sources(), done_paths(self._journal.ledger_file)
        gone = sorted(done - {source.public_path for source in sources})
        if gone or not done:
            what = (
                f"{len(gone)} of its sources, such as {gone[0]}, are" if gone else "the list of what it held is"
            )
            where = sources.root if gone else self._journal.folder
            raise SetupError(
                f"{self._dataset}: the catalog is damaged, and {what} not in {where}, so it cannot be made "
                "anew as it was. Restore its files from a copy, or delete them and ingest what there is."
            )
        for path in self._files()[:3]:
            path.unlink(missing_ok=True)
        calls: dict[int, list[str]] = defaultdict(list)
        numbers = calls_of(placement) if placement is not None else {}
        for name in done:
            calls[numbers.get(name, 0)].append(name)
        return [self._planned(calls[number]) for number in sorted(calls)]

    def _plan_rows(self, table: pa.Table, keys: set[str]) -> list[IngestPlan]:
        """Take rows that are wrong, and their arrays, away, if they can be ingested again."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from catalog.write import merge_dataset

        if not keys:
            return []
        paths = set(table.filter(pc.is_in(table["key"], pa.array(sorted(keys))))["source_path"].to_pylist())
        sources = self._sources()
        there = sources.select_paths(paths)
        if there != len(paths):
            raise SetupError(
                f"{self._dataset}: {len(paths) - there} sources of wrong rows are not below {sources.root} "
                "any more. Put them back, or restore the corpus from a copy."
            )
        concerned = table.filter(pc.is_in(table["source_path"], pa.array(sorted(paths))))
        others = table.filter(pc.invert(pc.is_in(table["source_path"], pa.array(sorted(paths)))))
        merge_dataset(self._corpus, self._dataset, [], [], reread=paths)
        shared = set(others["shard_path"].to_pylist())
        for path in set(concerned["shard_path"].to_pylist()) - {None} - shared:
            _remove(self._corpus.shards / path)
        return [self._plan_of(sources)]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._corpus.root).as_posix()


def calls_of(placement: pa.Table) -> dict[str, int]:
    """Number of the ingest call that gives each 2-D source its array again, by source path.

    A pack of which one call ingested a part and a later call the rest lies in two arrays. Sources that share an
    array were ingested together; those of a pack that do not, one call after the other.
    """
    members: dict[str, set[str]] = defaultdict(set)
    columns = (placement[name].to_pylist() for name in ("source_path", "shard_path"))
    for source, array in zip(*columns, strict=True):
        if array is not None and _PACK.search(array):
            members[array].add(source)
    together: dict[str, set[str]] = {}
    packs: dict[str, str] = {}
    for array, sources in members.items():
        group = set().union(*(together.get(source, {source}) for source in sources))
        together |= dict.fromkeys(group, group)
        packs |= dict.fromkeys(sources, _PACK.findall(array)[0])
    numbers: dict[str, dict[int, int]] = defaultdict(dict)
    calls = {}
    for source in sorted(packs):
        of_pack = numbers[packs[source]]
        calls[source] = of_pack.setdefault(id(together[source]), len(of_pack))
    return calls


def _remove(path: Location) -> None:
    """Delete a file or folder, or the objects below a place, if there are any."""
    if isinstance(path, RemotePath):
        for item in path.walk():
            (path / item.name).unlink()
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remake_array(
    corpus: Corpus,
    rows: Sequence[Row],
    sources: Sequence[ImageSource],
    origin: RemotePath | None = None,
    *,
    lossless: bool = False,
) -> str | None:
    """Put an array in its place again, from the raw images; returns what stands against it, if anything.

    Args:
        rows: all of the array's, by shard_index.
        sources: the sources they come from.
        origin: where these lie, if their folder only outlines them.
        lossless: whether true floats had been kept as they are.
    """
    from ingest.outline import at_hand
    from ingest.reasons import FailedImage
    from ingest.task import images_of, use_one_thread
    from shards.layout import PROFILES
    from shards.write import write_pack, write_volume

    use_one_thread()
    images = {}
    hashes = {row["key"]: row["source_hash"] for row in rows}
    for source in sources:
        try:
            with at_hand(source, origin) as local:
                for image in images_of(local, lossless=lossless):
                    if not isinstance(image, dict) and image.row["key"] in hashes:
                        images[image.row["key"]] = image
        except FailedImage as outcome:
            return outcome.message
    for key, source_hash in hashes.items():
        if key not in images or images[key].row["source_hash"] != source_hash:
            return f"the raw file of {key} has changed since. `pumit-data ingest` takes the new one."
    target = corpus.shards / rows[0]["shard_path"]
    scratch = _beside(target)
    voxels = [images[row["key"]].voxels for row in rows]
    try:
        for profile in PROFILES:
            name = f"{profile}.zarr"
            if rows[0]["shard_index"] is None:
                stored = write_volume(scratch, name, voxels[0], profile)
            else:
                stored = write_pack(scratch, name, voxels, profile)
            if stored.sha256 == rows[0]["shard_sha256"]:
                _put(scratch / name, target)
                return None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return (
        "its images do not give the voxels that were recorded, so another version of PUMIT-data or of its "
        "libraries wrote them. Delete the array and ingest again to take what this version makes."
    )


def _beside(target: Location) -> Path:
    """A folder from which an array can be put in its place."""
    from shards.layout import TEMPORARY_PREFIX

    if isinstance(target, RemotePath):
        return Path(tempfile.mkdtemp(prefix="pumit-data-"))
    return target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


def _put(array: Path, target: Location) -> None:
    from shards.layout import METADATA_FILE, SHARD_FILE

    if isinstance(target, RemotePath):
        for name in (SHARD_FILE, METADATA_FILE):
            (target / name).write(array / name)
        return
    if target.exists():
        target.rename(array.parent / "ruin")
    array.rename(target)
    sync(target.parent)


def _is_file_lost(finding: Finding) -> bool:
    return finding.kind in ("damaged", "missing") and not finding.keys and finding.file.endswith(".parquet")


def _is_row_wrong(finding: Finding) -> bool:
    return finding.kind == "damaged" and bool(finding.keys) and finding.file.startswith("catalog/")
