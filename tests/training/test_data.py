"""What a run sees of a corpus: the same however its catalog is read, and nothing half changed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

import training.data
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import CatalogDigest, catalog_digests, load_catalog
from catalog.sampling import CropGeometry
from catalog.schema import CATALOG_SCHEMA
from catalog.write import merge_dataset
from training.config import load_preset
from training.data import Candidates, choose_images, open_data, plan_batches
from training.images import IMAGE_COLUMNS
from training.plan import BatchPlanner

COLUMNS = [*IMAGE_COLUMNS, "modality"]


def rows_of(dataset: str, held_out: bool, seed: int) -> pa.Table:
    draw = random.Random(seed)
    rows = [
        {
            "dataset": dataset,
            "key": f"{number:03d}",
            "subject": f"{number}",
            "status": "ingested",
            "split": "validation" if held_out and draw.random() < 0.3 else "train",
            "modality": draw.choice(["CT", "MRI", "XR", None]),
            "source_path": "a",
            "entry_hash": "0",
            "normalisation_version": 1,
        }
        for number in range(draw.randrange(1, 60))
    ]
    return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA).select(COLUMNS)


def coded(table: pa.Table) -> pa.Table:
    for name in ("dataset", "split", "modality"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    return table


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_candidates_hold_all_that_would_be_chosen(held_out: bool, count: int) -> None:
    tables = [rows_of(dataset, held_out, seed) for seed, dataset in enumerate(["a", "b", "c"])]
    candidates = Candidates(count)
    for table in tables:
        for start in range(0, table.num_rows, 10):
            piece = coded(table.slice(start, 10))
            assert candidates.seen(piece) is piece
    chosen, were_held_out = choose_images(candidates.table(), count)
    assert were_held_out == held_out
    expected, _ = choose_images(pa.concat_tables(tables), count)
    assert chosen.to_pylist() == expected.to_pylist()


def test_batches_are_those_of_the_whole_table(toy_corpus: Path) -> None:
    corpus, crop = Corpus(toy_corpus), CropGeometry(tokens_z=1, tokens_x=2)
    whole = BatchPlanner(load_catalog(corpus, split="train"), crop, 6, 4)
    streamed = plan_batches(corpus, crop, 6, 4, Candidates(3))
    assert [streamed.plan(step) for step in range(20)] == [whole.plan(step) for step in range(20)]


def test_a_catalog_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, toy_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toy_corpus, tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")

    def meanwhile(given: Corpus) -> dict[str, CatalogDigest]:
        row = {**load_catalog(given).to_pylist()[0], "key": "late"}
        merge_dataset(given, "toy", [row], [])
        return catalog_digests(given)

    monkeypatch.setattr(training.data, "catalog_digests", meanwhile)
    config = load_preset("tokenizer", "tiny", ["data.tokens_z=1", "data.tokens_x=2", "data.batch_size=2"])
    with pytest.raises(SetupError, match="changed while it was read"):
        open_data(corpus.root, config)
