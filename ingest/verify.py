"""Read a corpus back and prove it: every file as its manifest says, every row with its voxels and numbers.

The manifest vouches for the catalog, the catalog for the shards; each file is read once. A plain verification
decodes no voxel: it hashes in threads, which is as fast as the disk. A deep one decodes every voxel once, in
processes, and computes the statistics again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.index import is_listed
from catalog.manifest import DamagedManifestError, accepted_digests, digest_of, read_manifest, surviving_digests
from catalog.spacing import da_level, degree_of_anisotropy
from catalog.store import Location, RemotePath, StoreError
from ingest.findings import Amount, Finding, Kind, Verification
from ingest.journal import Journal
from ingest.lease import refuse_writer
from ingest.overrides import Overrides, as_text, declared_hash, source_key

if TYPE_CHECKING:
    import pyarrow as pa

    from ingest.spec import DatasetSpec
    from shards.remote import Reader

Row = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read)."""

STATISTICS_TOLERANCE = 1e-9
"""Of mean and standard deviation, relative to the image's range: their sums may round differently on another
processor. All other statistics must agree to the last bit."""

_STATISTICS = ("mean", "std", "median", "min", "max", "p0_5", "p99_5")
_FEATURE_COLUMNS = ("features_version", "voxel_hash", "pictures")
_STALE_KEYS_SHOWN = 20
_COLUMNS = [
    *("key", "status", "reason", "message", "dimension", "source_path", "entry_hash", "normalisation_version"),
    *("shape_c", "shape_d", "shape_h", "shape_w", "stored_dtype", "slope", "intercept"),
    *("spacing_z", "spacing_y", "spacing_x", "da", "da_level", "window_low", "window_high"),
    *(f"intensity_{name}" for name in _STATISTICS),
    *("shard_path", "shard_shape", "shard_index", "stored_bytes", "shard_sha256"),
]


def verify(
    corpus: Corpus,
    specs: Mapping[str, DatasetSpec],
    datasets: Collection[str] | None = None,
    *,
    overrides: Mapping[str, Overrides] | None = None,
    deep: bool = False,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Compare all files of a corpus with what is recorded of them. Nothing is written.

    Args:
        specs: entries of datasets.yaml by id, to tell stale rows; a dataset without one gets a note.
        datasets: only these; by default all there are.
        overrides: what the user leaves out, by dataset; None: not known, and so not compared.
        deep: also decode every voxel and compare the statistics computed from them with those of its row.
        workers: threads, or processes for `deep`; by default one per core. In memory are at most so many
            volumes (`deep`) and the columns compared, of one dataset at a time.

    Raises:
        SetupError: there is no corpus or no such dataset, an ingest is running, or a catalog is of a later
            version.
    """
    known = _datasets(corpus)
    if not known:
        raise SetupError(
            f"there is no corpus in {corpus.place}. Type `make ingest DATASET=...` with the id of a dataset "
            "(`pumit-data list`), or give --data."
        )
    if unknown := sorted(set(datasets or ()) - set(known)):
        raise SetupError(f"{corpus.place} holds nothing of {', '.join(unknown)}, only {', '.join(known)}.")
    chosen = known if datasets is None else sorted(set(datasets))
    outcome = Verification(chosen, deep)
    count = workers or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        for dataset in chosen:
            stack.enter_context(_no_ingest(corpus, dataset))
        if datasets is None:
            outcome.findings += _stray_tops(corpus, known)
            outcome.findings += _duplicates(corpus)
        pool = stack.enter_context(worker_pool(count, processes=deep))
        total = sum(_size_on_disk(corpus, dataset) for dataset in chosen)
        for dataset in chosen:
            work = _Work(corpus, dataset, outcome, pool, count, total, progress)
            _verify_dataset(work, specs, None if overrides is None else overrides.get(dataset, Overrides()))
    outcome.findings.sort()
    return outcome


@dataclass(frozen=True)
class _Work:
    """What verifying one dataset needs and fills."""

    corpus: Corpus
    dataset: str
    outcome: Verification
    pool: Executor
    workers: int
    total: int
    progress: Progress

    def found(
        self, path: Location, kind: Kind, problem: str, remedy: str = "", keys: Iterable[str] = ()
    ) -> None:
        names = tuple(keys)
        file = self.corpus.name_of(path)
        default = f"pumit-data verify {self.dataset} --repair --raw ..."
        self.outcome.findings.append(
            Finding(self.dataset, file, kind, problem, remedy or default, len(names), names)
        )

    def read(self, size: int) -> None:
        self.amount.size += size
        self.progress(sum(amount.size for amount in self.outcome.read.values()), self.total)

    @property
    def amount(self) -> Amount:
        return self.outcome.read.setdefault(self.dataset, Amount())


@dataclass(frozen=True)
class _Array:
    """One array and the rows it holds voxels of; travels to a worker."""

    shards: Location
    path: str
    rows: list[Row]
    deep: bool


@dataclass(frozen=True)
class _ArrayOutcome:
    size: int
    problems: list[str]
    of_rows: dict[str, list[str]]
    """Problems by key."""
    strays: list[str]


def _verify_dataset(work: _Work, specs: Mapping[str, DatasetSpec], overrides: Overrides | None) -> None:
    from catalog.query import read_table, remedy_of
    from catalog.schema import CATALOG_SCHEMA

    corpus, dataset = work.corpus, work.dataset
    stopped = _unfinished(work)
    _stray_files(work)
    trusted = _published_files(work)
    catalog = corpus.catalog_file(dataset)
    if not catalog.is_file():
        if not stopped:
            _stray_arrays(work, set())
        return
    _look_up(work)
    if not trusted:
        work.outcome.notes.append(
            f"{dataset}: its arrays were not compared, for the catalog that knows their sha256 is damaged."
        )
        return
    try:
        table = read_table(catalog, remedy_of(dataset), columns=_COLUMNS, schema=CATALOG_SCHEMA)
    except SetupError as error:
        if "is damaged" not in str(error):
            raise
        work.found(catalog, "damaged", str(error))
        return
    work.amount.rows += table.num_rows
    table = _with_features(work, table)
    _stale_rows(work, table, specs, overrides)
    if not stopped:
        _stray_arrays(work, set(table["shard_path"].to_pylist()))
    for array, outcome in _checked(work, table):
        work.amount.arrays += 1
        work.read(outcome.size)
        keys = [row["key"] for row in array.rows]
        path = corpus.shards / array.path
        if outcome.problems:
            missing = all("missing" in problem for problem in outcome.problems)
            work.found(path, "missing" if missing else "damaged", "; ".join(outcome.problems), keys=keys)
        for key, of_row in outcome.of_rows.items():
            work.found(catalog, "damaged", f"{array.path}: {'; '.join(of_row)}", keys=[key])
        for name in outcome.strays:
            work.found(path / name, "stray", "no file of an array", keys=())


def _with_features(work: _Work, table: pa.Table) -> pa.Table:
    """The rows with a digest of their features, which a deep verification compares; null where they have
    none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from catalog.duplicates import missing_features
    from catalog.query import read_batches, remedy_of

    corpus, dataset = work.corpus, work.dataset
    file = corpus.features_file(dataset)
    digests = pa.nulls(table.num_rows, pa.binary(16))
    damaged = any(corpus.root / finding.file == file for finding in work.outcome.findings)
    if not damaged and (lacking := missing_features(corpus, dataset)):
        work.outcome.notes.append(
            f"{dataset}: {lacking} images have no features yet, by which duplicates are found. "
            "`pumit-data duplicates` adds them."
        )
    if work.outcome.deep and not damaged and file.is_file():
        keys, found = [], []
        for part in read_batches(file, remedy_of(dataset)):
            keys += part["key"].to_pylist()
            columns = (part[name].to_pylist() for name in _FEATURE_COLUMNS)
            found += [_digest_of_features(*values) for values in zip(*columns, strict=True)]
        places = pc.index_in(table["key"], pa.array(keys, pa.string()))
        digests = pa.array(found, pa.binary(16)).take(places)
    return table.append_column("features", digests)


def _digest_of_features(version: int, voxel_hash: bytes, pictures: bytes) -> bytes | None:
    """Null of another version's, with which nothing here can be compared."""
    from catalog.duplicates.pictures import FEATURES_VERSION

    if version != FEATURES_VERSION:
        return None
    return hashlib.blake2b(voxel_hash + pictures, digest_size=16).digest()


def _published_files(work: _Work) -> bool:
    """Compare the files of the manifest; returns whether the catalog may be believed."""
    corpus, dataset = work.corpus, work.dataset
    manifest = corpus.manifest_file(dataset)
    files = corpus.files(dataset)
    surviving: set[str] = set()
    accepted: dict[str, set[str]] = {}
    published: Collection[str] = ()
    try:
        accepted, published = accepted_digests(corpus, dataset), read_manifest(manifest).keys()
    except DamagedManifestError:
        surviving = surviving_digests(manifest) | surviving_digests(corpus.next_manifest_file(dataset))
        work.found(manifest, "damaged", "it does not agree with its own checksum")
    else:
        if not manifest.is_file() and not accepted and any(path.is_file() for path in files):
            work.found(manifest, "missing", "nothing is recorded to compare the dataset's files with")
    trusted = True
    for path in files:
        name = path.relative_to(corpus.root).as_posix()
        expected = accepted.get(name)
        if not path.is_file():
            # What is only in the next manifest was never there, and a dataset begins with its split.
            begun = not accepted and any(other.is_file() for other in (*files, manifest))
            if name in published or (path == files[0] and begun and not manifest.is_file()):
                work.found(path, "missing", "the file is missing")
            continue
        try:
            digest = digest_of(path)
        except OSError as error:
            work.found(path, "damaged", f"it cannot be read: {error.strerror or error}")
            trusted &= path != corpus.catalog_file(dataset)
            continue
        work.read(path.stat().st_size)
        if expected is not None and digest not in expected:
            work.found(path, "damaged", "it does not have the sha256 that the manifest tells")
            trusted &= path != corpus.catalog_file(dataset)
        elif expected is None and digest not in surviving:
            work.found(path, "unproven", "the manifest does not know it")
    return trusted


def _unfinished(work: _Work) -> bool:
    """Whether a stopped run has left something to finish; arrays that no row names may then be its."""
    corpus, dataset = work.corpus, work.dataset
    again = f"pumit-data ingest {dataset}: it goes on where it stopped"
    if corpus.next_manifest_file(dataset).is_file():
        path = corpus.next_manifest_file(dataset)
        work.found(path, "unfinished", "a run was stopped while it replaced files", again)
    tasks = Journal(corpus, dataset).unmerged()
    if tasks:
        problem = f"a run was stopped: {tasks} of its tasks are done, and not in the catalog yet"
        work.found(corpus.catalog_file(dataset), "unfinished", problem, again)
    return tasks > 0 or corpus.next_manifest_file(dataset).is_file()


def _stale_rows(
    work: _Work, table: pa.Table, specs: Mapping[str, DatasetSpec], overrides: Overrides | None
) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    from ingest.image import NORMALISATION_VERSION

    def report(stale: pa.Table, problem: str, remedy: str) -> None:
        if stale.num_rows:
            keys = tuple(stale["key"].slice(0, _STALE_KEYS_SHOWN).to_pylist())
            file = work.corpus.catalog_file(work.dataset).relative_to(work.corpus.root).as_posix()
            work.outcome.findings.append(
                Finding(work.dataset, file, "stale", problem, remedy, stale.num_rows, keys)
            )

    again = f"pumit-data ingest {work.dataset} --raw ..."
    versions = table["normalisation_version"]
    old = f"made by an earlier version of the normalisation; it is {NORMALISATION_VERSION} now"
    report(table.filter(pc.less(versions, NORMALISATION_VERSION)), old, again)
    new = f"made by a later version of the normalisation; this program has {NORMALISATION_VERSION}"
    report(table.filter(pc.greater(versions, NORMALISATION_VERSION)), new, "install that version of pumit-data")
    spec = specs.get(work.dataset)
    if spec is None:
        work.outcome.notes.append(
            f"{work.dataset}: no datasets.yaml has this entry, so whether it changed since was not looked at. "
            "Entries of your own lie in the raw folder: give --raw."
        )
        return
    entries = [spec.entry_hash(), spec.entry_hash(lossless=True)]
    of_entry = pc.utf8_slice_codeunits(table["entry_hash"], 0, len(entries[0]))
    of_overrides = pc.utf8_slice_codeunits(table["entry_hash"], len(entries[0]))
    changed = pc.invert(pc.is_in(of_entry, pa.array(entries)))
    report(table.filter(changed), "the entry in datasets.yaml has changed since", again)
    if overrides is None:
        if pc.any(pc.not_equal(of_overrides, "")).as_py():
            work.outcome.notes.append(
                f"{work.dataset}: whether overrides.yaml has changed since was not looked at. It lies in the "
                "raw folder: give --raw."
            )
        return
    if overrides:
        keys = table["key"].to_pylist()
        texts = (as_text(overrides.of(source_key(key))) for key in keys)
        expected = pa.array([declared_hash("", text) for text in texts], pa.string())
    else:
        expected = pa.scalar("")
    differing = pc.and_not(pc.not_equal(of_overrides, expected), changed)
    report(table.filter(differing), "what overrides.yaml says of it has changed since", again)


def _stray_tops(corpus: Corpus, known: Collection[str]) -> Iterator[Finding]:
    """What lies directly in catalog/, splits/ and shards/ and belongs to no dataset."""
    from shards.layout import dataset_folder

    ours: set[Location] = {corpus.split_file(dataset) for dataset in known}
    ours |= {corpus.shards / dataset_folder(dataset) for dataset in known}
    ours |= {corpus.catalog_file(dataset).parent for dataset in known}
    ours |= {corpus.duplicates_file, corpus.duplicates_digest_file}
    ours |= {split.parent / f".tmp-{split.name}" for split in ours}  # these are told of with their dataset
    ours |= {corpus.index_file, corpus.duplicates_file}
    folders: list[Location] = [corpus.root / "catalog", corpus.split_file("x").parent, corpus.shards]
    for folder in folders:
        for path in _children(folder):
            if path not in ours:
                name = corpus.name_of(path)
                yield Finding("", name, "stray", "no file of a corpus", "move it elsewhere or delete it")


def _look_up(work: _Work) -> None:
    if not is_listed(work.corpus.root, work.dataset):
        work.found(work.corpus.index_file, "damaged", f"it does not name {work.dataset}")


def _duplicates(corpus: Corpus) -> Iterator[Finding]:
    """What is wrong with the file of duplicates, which belongs to no dataset."""
    from catalog.duplicates import recorded_digest

    file, name = corpus.duplicates_file, corpus.name_of(corpus.duplicates_file)
    beside = corpus.name_of(corpus.duplicates_digest_file)
    remedy = "pumit-data duplicates writes it anew"
    if not file.is_file():
        if corpus.duplicates_digest_file.exists():
            yield Finding("", name, "missing", f"only its checksum, {beside}, is there", remedy)
        return
    try:
        recorded, digest = recorded_digest(corpus), digest_of(file)
    except OSError as error:
        yield Finding("", name, "damaged", f"it cannot be read: {error.strerror or error}", remedy)
        return
    if recorded is None:
        yield Finding("", name, "unproven", f"{beside} does not tell its sha256", remedy)
    elif recorded != digest:
        yield Finding("", name, "damaged", f"it does not have the sha256 that {beside} tells", remedy)


def _stray_files(work: _Work) -> None:
    """What lies in the dataset's folder of the catalog, or as its split, and is no file of a corpus."""
    corpus, dataset = work.corpus, work.dataset
    files = corpus.files(dataset)
    manifests = [corpus.manifest_file(dataset), corpus.next_manifest_file(dataset)]
    folder, split = corpus.catalog_file(dataset).parent, corpus.split_file(dataset)
    there = {*(folder.iterdir() if folder.is_dir() else ()), split.with_name(f".tmp-{split.name}")}
    for path in sorted(there - {*files, *manifests}):
        if not path.name.startswith(".tmp-"):
            work.found(path, "stray", "no file of a corpus", "move it elsewhere or delete it")
        elif path.exists():
            work.found(path, "stray", "left by a run that was stopped")


def _stray_arrays(work: _Work, referenced: set[str | None]) -> None:
    from shards.layout import dataset_folder

    folder = work.corpus.shards / dataset_folder(work.dataset)
    named = {name for name in map(_any_profile, referenced - {None}) if name is not None}
    for path in _children(folder):
        name = f"{folder.name}/{path.name}"
        if name not in referenced:
            problem = "no row of the catalog names it"
            remedy = f"pumit-data verify {work.dataset} --repair removes it, as the next ingest does"
            if _any_profile(name) in named:
                problem = "left by a repack that was stopped"
                remedy = f"repeat that pumit-data repack {work.dataset}, or let --repair remove it"
            work.found(path, "stray", problem, remedy)


def _any_profile(path: str | None) -> str | None:
    """What the names of one array in all codec profiles share; None of a path that is no array's."""
    from shards.layout import in_profile

    try:
        return None if path is None else in_profile(path, "fast")
    except ValueError:
        return None


def _checked(work: _Work, table: pa.Table) -> Iterator[tuple[_Array, _ArrayOutcome]]:
    """Every array of a dataset with its outcome, as they come; few are in flight at a time."""
    from concurrent.futures.process import BrokenProcessPool

    waiting = _arrays(work, table)
    running: dict[Future[_ArrayOutcome], _Array] = {}
    try:
        while True:
            for array in waiting:
                running[work.pool.submit(_check_array, array)] = array
                if len(running) >= 4 * work.workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise SetupError(
            f"{work.dataset}: a process that read its arrays died, most likely for lack of memory. "
            "Try again with fewer --workers."
        ) from error
    finally:
        for future in running:
            future.cancel()


def _arrays(work: _Work, table: pa.Table) -> Iterator[_Array]:
    """The arrays that rows name. Rows that name none are looked at on the way."""
    import pyarrow.compute as pc

    without = table.filter(pc.or_(pc.is_null(table["shard_path"]), pc.not_equal(table["status"], "ingested")))
    for row in without.select(["key", "status", "reason", "message", "shard_path"]).to_pylist():
        explained = row["status"] != "ingested" and row["reason"] and row["message"] and not row["shard_path"]
        if not explained:
            catalog = work.corpus.catalog_file(work.dataset)
            work.found(
                catalog, "damaged", f"the row is {row['status']} without what that takes", keys=[row["key"]]
            )
    rows = table.filter(pc.and_(pc.is_valid(table["shard_path"]), pc.equal(table["status"], "ingested")))
    if rows.num_rows == 0:
        return
    unproven = rows.filter(pc.is_null(rows["shard_sha256"]))
    if unproven.num_rows:
        keys = unproven["key"].slice(0, _STALE_KEYS_SHOWN).to_pylist()
        problem = "written before the sha256 of shards was recorded; only the checksums inside were compared"
        file = work.corpus.catalog_file(work.dataset).relative_to(work.corpus.root).as_posix()
        remedy = f"pumit-data verify {work.dataset} --repair"
        work.outcome.findings.append(
            Finding(work.dataset, file, "unproven", problem, remedy, unproven.num_rows, tuple(keys))
        )
    ordered = rows.take(pc.sort_indices(rows, sort_keys=[("shard_path", "ascending"), ("key", "ascending")]))
    ends = pc.run_end_encode(ordered["shard_path"].combine_chunks()).run_ends.to_pylist()
    start = 0
    for end in ends:
        members = ordered.slice(start, end - start).to_pylist()
        yield _Array(work.corpus.shards, members[0]["shard_path"], members, work.outcome.deep)
        start = end


def _check_array(array: _Array) -> _ArrayOutcome:
    """Compare an array with its rows. Runs in a worker."""
    from shards.check import problems_of_array
    from shards.layout import SHARD_FILE

    first = array.rows[0]
    of_rows = {row["key"]: found for row in array.rows if (found := problems_of_row(row))}
    shape, is_pack = first["shard_shape"], first["shard_index"] is not None
    shared = ("shard_shape", "stored_dtype", "shard_sha256")
    for row in array.rows:
        if any(row[name] != first[name] for name in shared):
            of_rows.setdefault(row["key"], []).append(
                "rows of one array do not agree on its shape, type or sha256"
            )
    slots = [row["shard_index"] if is_pack else 0 for row in array.rows]
    for slot, row in zip(slots, array.rows, strict=True):
        if slots.count(slot) > 1:
            of_rows.setdefault(row["key"], []).append("several rows name the same image of the array")
    if of_rows:
        return _ArrayOutcome(0, [], of_rows, [])
    stored: list[int | None] = [None] * (shape[0] if is_pack else 1)
    for slot, row in zip(slots, array.rows, strict=True):
        stored[slot] = row["stored_bytes"]
    folder = array.shards / array.path
    try:
        problems, strays = problems_of_array(
            folder,
            tuple(shape),
            first["stored_dtype"],
            is_pack=is_pack,
            stored_bytes=stored,
            sha256=first["shard_sha256"],
        )
        size = _size(folder / SHARD_FILE)
        if not problems and array.deep:
            of_rows = {
                row["key"]: found for row in array.rows if (found := problems_of_voxels(array.shards, row))
            }
    except StoreError:  # says nothing about the array
        raise
    except OSError as error:  # a disk that fails is what this is here to find
        return _ArrayOutcome(0, [f"it cannot be read: {error.strerror or error}"], {}, [])
    return _ArrayOutcome(size, problems, of_rows, strays)


def _size(file: Location) -> int:
    """Bytes of a file; 0 if it is not there."""
    if isinstance(file, RemotePath):
        return file.size() if file.is_file() else 0
    return file.stat().st_size if file.is_file() else 0


def problems_of_row(row: Row) -> list[str]:
    """What cannot be true of an ingested row, without a look at its voxels."""
    problems = []
    size = [row[f"shape_{axis}"] for axis in "cdhw"]
    shape, index = row["shard_shape"], row["shard_index"]
    if None in size or not shape or len(shape) != 4 or not row["stored_dtype"] or row["stored_bytes"] is None:
        return ["shape, type or size is missing"]
    if index is None and shape != size:
        problems.append(f"its shape {size} is not that of its array {shape}")
    if index is not None:
        inside = 0 <= index < shape[0] and size[:2] == [shape[1], 1]
        if not (inside and size[2] <= shape[2] and size[3] <= shape[3]):
            problems.append(f"an image {index} of shape {size} does not fit its pack {shape}")
    told = {name: row[f"intensity_{name}"] for name in _STATISTICS}
    told |= {name: row[name] for name in ("slope", "intercept", "window_low", "window_high")}
    if any(value is None or not math.isfinite(value) for value in told.values()):
        problems.append("statistics are missing or not finite")
    elif not (
        told["min"] <= told["p0_5"] <= told["p99_5"] <= told["max"]
        and told["min"] <= told["median"] <= told["max"]
        and told["min"] <= told["mean"] <= told["max"]
        and told["std"] > 0
        and told["slope"] > 0
        and told["window_low"] < told["window_high"]
    ):
        problems.append("statistics contradict each other")
    z, y, x = (row[f"spacing_{axis}"] for axis in "zyx")
    da = None if z is None or y is None or x is None else degree_of_anisotropy((z, y, x))
    if (row["da"], row["da_level"]) != (da, da_level(da)):
        problems.append("degree of anisotropy and spacing contradict each other")
    return problems


@functools.cache
def _reader(shards: Location) -> Reader:
    """One for each process: threads and connections of a remote one serve all rows."""
    from shards.remote import open_reader

    return open_reader(shards)


def problems_of_voxels(shards: Location, row: Row) -> list[str]:
    """Read the voxels of a row, and compare the statistics computed from them with those it holds."""
    from ingest.features import features
    from ingest.intensity import percentile_window, statistics
    from ingest.reasons import ExcludedImage
    from shards.chunks import Wanted
    from shards.remote import read_box

    box = ((0, row["shape_d"]), (0, row["shape_h"]), (0, row["shape_w"]))
    try:
        wanted = Wanted(
            row["shard_path"], tuple(row["shard_shape"]), row["stored_dtype"], row["shard_index"], box
        )
        voxels = read_box(_reader(shards), wanted)
        found = statistics(voxels)
    except (SetupError, ExcludedImage) as error:
        return [str(error)]
    real = found.in_real_units(row["slope"], row["intercept"])
    exact = {"median": real.median, "min": real.minimum, "max": real.maximum, "p0_5": real.p0_5}
    exact |= {"p99_5": real.p99_5}
    problems = [
        f"intensity_{name} is {row[f'intensity_{name}']!r}, its voxels give {value!r}"
        for name, value in exact.items()
        if row[f"intensity_{name}"] != value
    ]
    tolerance = STATISTICS_TOLERANCE * (real.maximum - real.minimum)
    problems += [
        f"intensity_{name} is {row[f'intensity_{name}']!r}, its voxels give {value!r}"
        for name, value in (("mean", real.mean), ("std", real.std))
        if abs(row[f"intensity_{name}"] - value) > tolerance
    ]
    windows = [percentile_window(found)]
    if row["dimension"] == 2 and row["stored_dtype"] == "uint8":
        windows.append((0.0, 255.0))  # of 8-bit pictures
    in_units = [tuple(row["slope"] * end + row["intercept"] for end in window) for window in windows]
    if (row["window_low"], row["window_high"]) not in in_units:
        problems.append("its window is not that of its voxels")
    if not problems and row["features"] is not None:
        recomputed = features(voxels, row).columns()
        if _digest_of_features(*(recomputed[name] for name in _FEATURE_COLUMNS)) != row["features"]:
            problems.append("its features are not those of its voxels")
    return problems


def _datasets(corpus: Corpus) -> list[str]:
    """Every dataset that any part of the corpus holds something of."""
    catalogs = {path.name.removeprefix("dataset=") for path in (corpus.root / "catalog").glob("dataset=*")}
    splits = {path.stem for path in corpus.split_file("x").parent.glob("[!.]*.parquet")}
    arrays = {
        unquote(path.name)
        for path in _children(corpus.shards)
        if not path.name.startswith(".") and path.is_dir()
    }
    return sorted(catalogs | splits | arrays)


def _children(folder: Location) -> list[Location]:
    """What lies in a folder, if it is there, by name. What a web server has beside it, nobody can see."""
    hidden = isinstance(folder, RemotePath) and folder.is_web
    found: Iterable[Location] = folder.iterdir() if not hidden and folder.is_dir() else ()
    return sorted(found, key=lambda path: path.name)


def _size_on_disk(corpus: Corpus, dataset: str) -> int:
    """Bytes that a verification will read, about, by the catalog: for the progress bar no file is listed."""
    import pyarrow.compute as pc

    from catalog.query import load_catalog

    total = sum(file.stat().st_size for file in corpus.files(dataset) if file.is_file())
    try:
        table = load_catalog(corpus, columns=["stored_bytes"], datasets=[dataset])
    except SetupError:
        return total  # told in full when its turn comes
    return total + int(pc.sum(table["stored_bytes"]).as_py() or 0)


@contextmanager
def _no_ingest(corpus: Corpus, dataset: str) -> Iterator[None]:
    """Keep an ingest of the dataset from starting meanwhile. A copied corpus has no lock, and no ingest."""
    if corpus.origin is not None:
        refuse_writer(corpus.origin, dataset)
    path = Journal(corpus, dataset).folder / "lock"
    try:
        handle = path.open("rb")
    except (FileNotFoundError, PermissionError):
        yield
        return
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(
                f"{dataset}: an ingest into {corpus.root} is running. Verify when it has ended."
            ) from error
        yield


@contextmanager
def worker_pool(workers: int, *, processes: bool) -> Iterator[Executor]:
    """Threads, for what reads and hashes, or processes, for what computes; a single worker is a thread."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    pool: Executor
    if processes and workers > 1:
        # TensorStore's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    else:
        pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C reaches the whole group, and one answer is enough; nobody is to outlive a killed driver."""
    import multiprocessing
    import signal
    from threading import Thread

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = multiprocessing.parent_process()

    def end_with_driver() -> None:
        if driver is not None:
            driver.join()
            os._exit(1)

    Thread(target=end_with_driver, daemon=True).start()
