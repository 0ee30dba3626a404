"""What a run trains and validates on: plans from the catalog, held-out crops from the shards."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.lock import lock_corpus, lock_text
from catalog.mix import load_mix
from catalog.query import catalog_digests, dataset_ids, read_batches, remedy_of, united_fingerprint
from catalog.remote import open_corpus
from catalog.sampling import CropGeometry, Reals
from catalog.schema import CATALOG_SCHEMA
from catalog.selection import Selection
from catalog.split import split_fingerprints
from catalog.store import Location
from shards.cache import CacheConfig
from shards.layout import LAYOUT_VERSION
from shards.remote import Reader, open_reader
from training.config import DataConfig, RunConfig
from training.images import CODED_COLUMNS, IMAGE_COLUMNS, is_text
from training.loader import BatchLoader, RawBatch, make_loader, read_batch
from training.plan import BatchPlanner, ValidationPlanner
from training.world import World


@dataclass(frozen=True)
class LabelledImages:
    """Images, and what the catalog says that they show."""

    batches: list[RawBatch]
    """Centre crops, read once."""
    labels: dict[str, dict[str, str]]
    """Column of the catalog -> `dataset/key` -> its value, where it is known.

    `modality` is that before the slash; `body_part` counts where the dataset shows a single one.
    """


EVALUATED = CropGeometry(tokens_z=4, tokens_x=8)
"""Crops to evaluate a finished tokenizer on, if nothing else is asked for."""


@dataclass(frozen=True)
class RunData:
    """The corpus as one run sees it."""

    corpus: Corpus
    planner: BatchPlanner
    validation: list[RawBatch]
    """Centre crops to measure on, read once."""
    validation_name: str
    """Under which name measurements on them are logged: what they are, held out or not."""
    modalities: dict[str, str]
    """`dataset/key` of the validation images -> modality."""
    probed: tuple[LabelledImages, LabelledImages] | None
    """Training images for probes to learn from, and held-out ones to test them on; None without either."""
    trained_modalities: frozenset[str]
    """Those of the images that are trained on."""
    fingerprints: dict[str, str]
    """What a resumed run must find unchanged."""
    lock: str
    """The corpus in hashes and counts, as `pumit-data lock` writes it."""

    def loader(self, config: RunConfig, first_step: int, world: World) -> BatchLoader:
        """The training batches from `first_step` (counted from 0) to the end of the run."""
        last = config.steps - 1
        return make_loader(
            self.corpus,
            self.planner,
            first_step,
            last,
            config.data.workers,
            rank=world.rank,
            world=world.size,
            cache=cache_of(config.data),
        )


def open_data(place: Location, config: RunConfig, licences: Mapping[str, str | None] | None = None) -> RunData:
    """Plan the batches of a run and read its validation crops.

    `licences` of datasets by id, as datasets.yaml states them, are told in the lock of the corpus.

    Raises SetupError if nothing is ingested, there is no such mix, or no training image is left.
    """
    corpus = open_corpus(place)
    files = _files(corpus)
    crop = CropGeometry(tokens_z=config.data.tokens_z, tokens_x=config.data.tokens_x)
    mix = load_mix(corpus, config.data.mix)
    selection = Selection(corpus, mix, dedup=config.data.dedup)
    candidates = Candidates(max(config.validation_images, config.probed_images))
    planner = plan_batches(
        corpus, crop, config.data.batch_size, config.seed, candidates, selection, config.least_overlap
    )
    shown = CropGeometry(tokens_z=config.data.tokens_z, tokens_x=config.validation_tokens_x)
    reader = open_reader(corpus.shards, cache_of(config.data))
    digests = catalog_digests(corpus)
    split, splits = split_fingerprints(corpus, digests)
    fingerprints = {"split": split, "catalog": united_fingerprint(digests), **selection.fingerprints}
    lock = lock_corpus(
        corpus,
        config.data.mix,
        mix,
        selection,
        shards_version=LAYOUT_VERSION,
        licences=licences or {},
        digests=digests,
        splits=splits,
    )
    if _files(corpus) != files:
        raise SetupError(
            f"the catalog below {corpus.root} changed while it was read: wait for the ingest, then start again"
        )
    measured = _read_validation(reader, candidates, config.validation_images, shown, config.data.batch_size)
    probed = _read_probed(corpus, reader, candidates, config.probed_images, crop, config.data.batch_size)
    return RunData(
        corpus=corpus,
        planner=planner,
        validation=measured.batches,
        validation_name="validation" if measured.held_out else "training_images",
        modalities=measured.modalities,
        probed=probed,
        trained_modalities=candidates.modalities("train"),
        fingerprints=fingerprints,
        lock=lock_text(lock),
    )


@dataclass(frozen=True)
class Validation:
    """Images to measure a model on."""

    batches: list[RawBatch]
    """Centre crops."""
    modalities: dict[str, str]
    """`dataset/key` -> modality."""
    held_out: bool
    """False where the corpus is too small to hold anyone out."""


def open_validation(place: Location, images: int, crop: CropGeometry = EVALUATED) -> Validation:
    """Read up to `images` held-out images, of every dataset and modality, to evaluate a finished model on.

    By default `crop` is what the paper trains its tokenizer on. Raises SetupError if nothing is ingested.
    """
    corpus = open_corpus(place)
    candidates = Candidates(images)
    with contextlib.closing(ingested_tables(corpus, None)) as tables:
        for table in tables:
            candidates.seen(table)
    return _read_validation(open_reader(corpus.shards), candidates, images, crop, _EVALUATED_AT_ONCE)


def _read_validation(
    reader: Reader, candidates: Candidates, images: int, crop: CropGeometry, at_once: int
) -> Validation:
    chosen, held_out = choose_images(candidates.table(), images)
    planner = ValidationPlanner(chosen, crop, at_once)
    columns = (chosen[name].to_pylist() for name in ("dataset", "key", "modality"))
    return Validation(
        batches=[read_batch(reader, planner.plan(number)) for number in range(len(planner))],
        modalities={f"{dataset}/{key}": modality for dataset, key, modality in zip(*columns, strict=True)},
        held_out=held_out,
    )


def _read_probed(
    corpus: Corpus, reader: Reader, candidates: Candidates, images: int, crop: CropGeometry, at_once: int
) -> tuple[LabelledImages, LabelledImages] | None:
    """Up to `images` training images and half as many held-out ones; None without either."""
    table = candidates.table()
    learnt, tested = (_having(table, "split", split) for split in ("train", "validation"))
    if not (images and learnt.num_rows and tested.num_rows):
        return None

    def read(table: pa.Table, count: int) -> LabelledImages:
        chosen, _ = choose_images(table, count)
        planner = ValidationPlanner(chosen, crop, at_once)
        return LabelledImages(
            batches=[read_batch(reader, planner.plan(number)) for number in range(len(planner))],
            labels=_labels(corpus, chosen),
        )

    return read(learnt, images), read(tested, -(-images // 2))


def _labels(corpus: Corpus, chosen: pa.Table) -> dict[str, dict[str, str]]:
    labels: dict[str, dict[str, str]] = {"modality": {}, "body_part": {}}
    for row in chosen.select(["dataset", "key", "modality"]).to_pylist():
        if row["modality"]:
            labels["modality"][f"{row['dataset']}/{row['key']}"] = row["modality"].split("/")[0]
    for dataset in sorted(set(chosen["dataset"].to_pylist())):
        keys = chosen.filter(pc.equal(chosen["dataset"], dataset))["key"]
        path, columns = corpus.catalog_file(dataset), ["key", "body_part"]
        for table in read_batches(path, remedy_of(dataset), columns, schema=CATALOG_SCHEMA):
            for row in table.filter(pc.is_in(table["key"], keys.combine_chunks())).to_pylist():
                if len(row["body_part"] or ()) == 1:
                    labels["body_part"][f"{dataset}/{row['key']}"] = row["body_part"][0]
    return labels


_EVALUATED_AT_ONCE = 4


def cache_of(data: DataConfig) -> CacheConfig | None:
    """The local cache of a run, if it has one."""
    if data.cache_dir is None:
        return None
    return CacheConfig(folder=data.cache_dir, limit_bytes=int(data.cache_gb * 1e9))


def plan_batches(
    corpus: Corpus,
    crop: CropGeometry,
    batch_size: int,
    seed: int,
    candidates: Candidates,
    selection: Selection | None = None,
    least_overlap: float | None = None,
) -> BatchPlanner:
    """The planner of a corpus's training images; `candidates` takes note of those to validate on.

    Without `selection`, all are drawn by their sampling weight. `least_overlap` as of `BatchPlanner`. Raises
    SetupError if none can be drawn.
    """
    with contextlib.closing(training_tables(corpus, candidates, selection)) as tables:
        return BatchPlanner(tables, crop, batch_size, seed, least_overlap=least_overlap)


def training_tables(
    corpus: Corpus, candidates: Candidates, selection: Selection | None = None
) -> Generator[pa.Table]:
    """The training images in the order of dataset and key, some ten thousand rows at a time.

    What `selection` leaves out is neither trained nor validated on; the weights of the others are multiplied by
    their factors.
    """
    with contextlib.closing(ingested_tables(corpus, selection)) as tables:
        for table in tables:
            yield _having(candidates.seen(table), "split", "train")


def _files(corpus: Corpus) -> list[tuple[str, int, int]]:
    """What tells whether a file of the catalog was replaced: each dataset's inode and time of change."""
    stats = [(dataset, corpus.catalog_file(dataset).stat()) for dataset in corpus.datasets()]
    return [(dataset, stat.st_ino, stat.st_mtime_ns) for dataset, stat in stats]


def ingested_tables(corpus: Corpus, selection: Selection | None) -> Generator[pa.Table]:
    """The ingested images in the order of dataset and key, some ten thousand at a time.

    They have IMAGE_COLUMNS and modality. With `selection`, it is those that this leaves, their weights
    multiplied by its factors.
    """
    columns, dictionaries = [*IMAGE_COLUMNS, "modality"], [*CODED_COLUMNS, "modality"]
    read = list(dict.fromkeys([*columns, *(selection.columns if selection is not None else ())]))

    def images(dataset: str) -> Iterator[pa.Table]:
        path, remedy = corpus.catalog_file(dataset), remedy_of(dataset)
        for table in read_batches(path, remedy, read, schema=CATALOG_SCHEMA, dictionaries=dictionaries):
            yield _having(table, "status", "ingested")

    wanted = (name for name in dataset_ids(corpus) if selection is None or not selection.leaves_out(name))
    with contextlib.closing(_ahead(map(images, wanted))) as tables:
        for table in tables:
            yield table if selection is None else _weighted(table, selection.factors(table)).select(columns)


def _weighted(table: pa.Table, factors: Reals) -> pa.Table:
    """The rows with a factor above 0, their weights multiplied by it."""
    if (factors == 1).all():
        return table
    at = table.column_names.index("sampling_weight")
    weighted = pc.multiply(table["sampling_weight"], pa.array(factors))
    return table.set_column(at, table.schema.field(at), weighted).filter(pa.array(factors > 0))


def _ahead(datasets: Iterator[Iterator[pa.Table]]) -> Generator[pa.Table]:
    """The tables of one dataset after the other; some of the next ones are read while one is worked on."""
    with ThreadPoolExecutor(_READ_AT_ONCE) as readers:
        feeds = deque(_Feed(readers, tables) for tables in itertools.islice(datasets, _READ_AT_ONCE))
        while feeds:
            for feed in feeds:
                feed.top_up()
            table = feeds[0].take()
            if table is not None:
                yield table
                continue
            feeds.popleft()
            feeds.extend(_Feed(readers, tables) for tables in itertools.islice(datasets, 1))


class _Feed:
    """The tables of one dataset, which come one after the other: the next is always on its way."""

    def __init__(self, readers: ThreadPoolExecutor, tables: Iterator[pa.Table]) -> None:
        self._readers, self._tables = readers, tables
        self._ready: deque[pa.Table] = deque()
        self._coming: Future[pa.Table | None] | None = readers.submit(next, tables, None)

    def top_up(self) -> None:
        """Begin the next table if one has come, unless enough wait already."""
        if self._coming is not None and self._coming.done() and len(self._ready) < _TABLES_AHEAD:
            self._collect(self._coming)

    def take(self) -> pa.Table | None:
        """The next table; None behind the last."""
        if self._coming is not None and not self._ready:
            self._collect(self._coming)
        return self._ready.popleft() if self._ready else None

    def _collect(self, coming: Future[pa.Table | None]) -> None:
        table = coming.result()
        if table is None:
            self._coming = None
        else:
            self._ready.append(table)
            self._coming = self._readers.submit(next, self._tables, None)


_READ_AT_ONCE = 2
"""Datasets: of one alone, reading takes longer than what is done with what was read."""
_TABLES_AHEAD = 2


def _having(table: pa.Table, column: str, text: str) -> pa.Table:
    rows = is_text(table[column], text)
    return table if rows.all() else table.filter(pa.array(rows))


class Candidates:
    """The images that `choose_images` may choose: of each kind and split, the first by key."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken: Counter[tuple[str | None, ...]] = Counter()
        self._tables = [CATALOG_SCHEMA.empty_table().select([*IMAGE_COLUMNS, "modality"])]

    def seen(self, table: pa.Table) -> pa.Table:
        """Remember what matters of the next rows, which come in the order of dataset and key; returns them."""
        columns = [table[name].unify_dictionaries() for name in ("dataset", "split", "modality")]
        codes = [column.combine_chunks() for column in columns]
        kind = np.zeros(table.num_rows, np.int64)
        for code in codes:
            kind = kind * (len(code.dictionary) + 1) + code.indices.fill_null(len(code.dictionary)).to_numpy()
        for number in np.flatnonzero(np.bincount(kind)):
            rows = np.flatnonzero(kind == number)
            name = tuple(code[int(rows[0])].as_py() for code in codes)
            wanted = self._count - self._taken[name]
            if wanted > 0:
                self._taken[name] += len(rows[:wanted])
                self._tables.append(table.take(pa.array(rows[:wanted])).cast(self._tables[0].schema))
        return table

    def table(self) -> pa.Table:
        return pa.concat_tables(self._tables)

    def modalities(self, split: str) -> frozenset[str]:
        """Those of the images of a split."""
        return frozenset(name for _, of, name in self._taken if of == split and name is not None)


def choose_images(table: pa.Table, count: int) -> tuple[pa.Table, bool]:
    """Up to `count` rows to validate on, and whether they are held out.

    Data sets and modalities take turns, in the order of their names, so that few images still show every
    kind. A corpus too small to hold anyone out is measured on training images; their split column then
    says validation, as the planner of fixed crops asks.
    """
    held_out = table.filter(pc.equal(table["split"], "validation"))
    chosen = held_out if held_out.num_rows else table
    columns = (chosen[name].to_pylist() for name in ("dataset", "modality", "key"))
    kinds: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for row, (dataset, modality, key) in enumerate(zip(*columns, strict=True)):
        kinds[dataset, modality or ""].append((key, row))
    turns = sorted((turn, kind, row) for kind in kinds for turn, (_, row) in enumerate(sorted(kinds[kind])))
    chosen = chosen.take([row for _, _, row in turns[:count]])
    split = pa.array(["validation"] * chosen.num_rows, pa.string())
    return chosen.set_column(chosen.schema.get_field_index("split"), "split", split), held_out.num_rows > 0
