"""What a run trains and validates on: plans from the catalog, held-out crops from the shards."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from catalog.corpus import Corpus
from catalog.query import fingerprint, load_catalog
from catalog.remote import open_corpus
from catalog.sampling import CropGeometry
from catalog.split import split_fingerprint
from catalog.store import Location
from shards.read import ShardReader
from training.config import RunConfig
from training.loader import BatchLoader, RawBatch, make_loader, read_batch
from training.plan import BatchPlanner, ValidationPlanner
from training.run import World


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
    fingerprints: dict[str, str]
    """What a resumed run must find unchanged."""

    def loader(self, config: RunConfig, first_step: int, world: World) -> BatchLoader:
        """The training batches from `first_step` (counted from 0) to the end of the run."""
        last = config.steps - 1
        return make_loader(
            self.corpus, self.planner, first_step, last, config.data.workers, rank=world.rank, world=world.size
        )


def open_data(place: Location, config: RunConfig) -> RunData:
    """Plan the batches of a run and read its validation crops.

    Raises SetupError if nothing is ingested or no training image is left.
    """
    corpus = open_corpus(place)
    table = load_catalog(corpus)
    crop = CropGeometry(tokens_z=config.data.tokens_z, tokens_x=config.data.tokens_x)
    training = table.filter(pc.equal(table["split"], "train"))
    planner = BatchPlanner(training, crop, config.data.batch_size, config.seed)
    measured, held_out = choose_images(table, config.validation_images)
    shown = CropGeometry(tokens_z=config.data.tokens_z, tokens_x=config.validation_tokens_x)
    batches = ValidationPlanner(measured, shown, config.data.batch_size)
    reader = ShardReader(corpus.shards)
    columns = (measured[name].to_pylist() for name in ("dataset", "key", "modality"))
    return RunData(
        corpus=corpus,
        planner=planner,
        validation=[read_batch(reader, batches.plan(number)) for number in range(len(batches))],
        validation_name="validation" if held_out else "training_images",
        modalities={f"{dataset}/{key}": modality for dataset, key, modality in zip(*columns, strict=True)},
        fingerprints={"split": split_fingerprint(corpus, corpus.datasets()), "catalog": fingerprint(table)},
    )


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
