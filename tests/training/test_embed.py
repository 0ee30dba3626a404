"""Features of a corpus: of whole images, the same however often the work stops, without what is broken."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import catalog.store
import cli
import training
from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.query import load_catalog
from catalog.store import location
from shards.layout import SHARD_FILE
from tests.blob_server import Blobs, Web, blob_server
from tests.commands import run
from tests.conftest import REPOSITORY
from tests.object_store import Fault, proxy_to
from tests.training.conftest import IMAGES, blobs, write_corpus
from training.embed import EmbeddingConfig, plan_embedding
from training.pretrained import export_pretrained
from training.tiles import tile_shares, tile_starts
from training.vit import UniversalViT, ViTConfig

CPU = torch.device("cpu")
SPACING = {key: (z or math.nan, 1.0, 1.0) for key, _, _, z in IMAGES}


def make_model(folder: Path, crop: tuple[int, int, int]) -> Path:
    """A ViT that was trained on crops of so many tokens."""
    torch.manual_seed(0)
    export_pretrained(UniversalViT(ViTConfig(dim=16, depth=2, heads=2, position_grid=crop)), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of crops of one token along the depth and three along the others."""
    return make_model(tmp_path_factory.mktemp("model") / "vit", (1, 3, 3))


@pytest.fixture
def own_corpus(tmp_path: Path) -> Path:
    """A corpus that a test may damage."""
    return write_corpus(tmp_path / "corpus")


def embed(
    corpus: Any, model: Path, folder: Path, *, batch_size: int = 5, workers: int = 0, **config: Any
) -> Any:
    work = plan_embedding(corpus, model, EmbeddingConfig(**{"number": "float32", **config}))
    return work.write(folder, CPU, batch_size=batch_size, workers=workers)


def table(folder: Path) -> pandas.DataFrame:
    return pandas.read_parquet(folder / "features")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@given(st.integers(1, 60), st.integers(1, 20))
def test_tiles_cover_an_axis_evenly_and_no_more_than_needed(grid: int, longest: int) -> None:
    tile = min(grid, longest)
    starts = tile_starts(grid, tile)
    assert len(starts) == math.ceil(grid / tile)
    assert {at for start in starts for at in range(start, start + tile)} == set(range(grid))
    steps = np.diff(starts)
    assert not len(steps) or steps.max() - steps.min() <= 1
    counted = np.zeros(grid)
    for start in starts:
        counted[start : start + tile] += tile_shares(grid, tile)[start : start + tile]
    np.testing.assert_allclose(counted, 1)


def test_a_small_image_has_the_features_that_its_user_gets(toy_corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "vit", (20, 9, 9))
    embed(toy_corpus, model, tmp_path / "out", level="tokens")
    vit, rows = training.load_vit(model), table(tmp_path / "out")
    assert list(rows.key) == [key for key, *_ in IMAGES]
    assert list(rows.tiles) == [1] * len(IMAGES)
    for seed, (row, (key, _, shape, _)) in enumerate(zip(rows.itertuples(), IMAGES, strict=True)):
        image = torch.from_numpy(blobs(shape, seed))[None] / 255
        with torch.no_grad():
            expected = vit.forward_features(image, SPACING[key])
        last_Cdhw = expected.stages[-1][0].numpy()
        tokens = zarr.open_array(tmp_path / "out" / row.tokens_path, mode="r")
        count = math.prod(row.grid)
        found = tokens[row.tokens_first : row.tokens_first + count].reshape(*row.grid, -1)
        np.testing.assert_allclose(row.class_token, expected.whole[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(row.patch_mean, last_Cdhw.mean(axis=(1, 2, 3)), atol=1e-4)
        np.testing.assert_allclose(np.moveaxis(found, -1, 0), last_Cdhw, atol=1e-4)


def test_a_large_image_is_the_mean_of_its_tiles(toy_corpus: Path, model: Path, tmp_path: Path) -> None:
    embed(toy_corpus, model, tmp_path / "out", level="tokens", where="key = 'c'")
    (row,) = table(tmp_path / "out").itertuples()
    vit = training.load_vit(model)
    image = torch.from_numpy(blobs((1, 12, 70, 66), 2))[None] / 255
    assert (row.da_level, row.tiles) == (2, 3 * 2 * 2)
    assert list(row.grid) == [3, 5, 5]
    classes, tokens, seen = [], np.zeros((3, 5, 5, 16)), np.zeros((3, 5, 5, 1))
    for z, y, x in product((0, 1, 2), (0, 2), (0, 2)):
        with torch.no_grad():
            tile = image[..., 4 * z : 4 * z + 4, 16 * y : 16 * y + 48, 16 * x : 16 * x + 48]
            found = vit.forward_features(tile, SPACING["c"])
        classes.append(found.whole[0].numpy())
        tokens[z, y : y + 3, x : x + 3] += np.moveaxis(found.stages[-1][0].numpy(), 0, -1)[0]
        seen[z, y : y + 3, x : x + 3] += 1
    np.testing.assert_allclose(row.class_token, np.mean(classes, axis=0), atol=1e-5)
    np.testing.assert_allclose(row.patch_mean, (tokens / seen).mean(axis=(0, 1, 2)), atol=1e-5)
    stored = zarr.open_array(tmp_path / "out" / row.tokens_path, mode="r")[:]
    np.testing.assert_allclose(stored.reshape(tokens.shape), tokens / seen, atol=1e-5)


def test_neither_workers_nor_batches_change_the_features(toy_corpus: Path, model: Path, tmp_path: Path) -> None:
    embed(toy_corpus, model, tmp_path / "one", batch_size=4)
    embed(toy_corpus, model, tmp_path / "two", batch_size=4, workers=2)
    embed(toy_corpus, model, tmp_path / "large", batch_size=32)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for name in ("class_token", "patch_mean"):
        one, large = (np.stack(table(tmp_path / folder)[name]) for folder in ("one", "large"))
        np.testing.assert_allclose(one, large, atol=1e-4)


def test_only_the_images_asked_for(toy_corpus: Path, model: Path, tmp_path: Path) -> None:
    summary = embed(
        toy_corpus, model, tmp_path / "out", split="train", where="modality <> 'CT'", number="float16"
    )
    rows = table(tmp_path / "out")
    expected = load_catalog(Corpus(toy_corpus), ["key", "modality"], split="train").to_pylist()
    assert set(rows.key) == {row["key"] for row in expected if row["modality"] != "CT"}
    assert set(rows.split) == {"train"}
    assert rows.class_token[0].dtype == np.float16
    assert set(rows.columns) == {
        *("dataset", "key", "modality", "split", "da_level", "tiles", "class_token", "patch_mean")
    }
    assert summary["by_modality"] == {"MRI": 1, "fundus": 1}
    with pytest.raises(SetupError, match=r"no image of .* is left"):
        plan_embedding(toy_corpus, model, EmbeddingConfig(where="key = 'none'"))


def test_a_folder_holds_features_of_one_kind(toy_corpus: Path, model: Path, tmp_path: Path) -> None:
    embed(toy_corpus, model, tmp_path / "out", where="key = 'e'")
    before = contents(tmp_path / "out")
    embed(toy_corpus, model, tmp_path / "out", where="key = 'e'")
    assert contents(tmp_path / "out") == before
    with pytest.raises(SetupError, match="differ in: corpus, images, tiles_by_da_level, where"):
        embed(toy_corpus, model, tmp_path / "out", where="key in ('e', 'a')")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="something else than features"):
        embed(toy_corpus, model, tmp_path / "mine")


def shard_of(corpus: Path, key: str) -> Path:
    (row,) = [row for row in load_catalog(Corpus(corpus)).to_pylist() if row["key"] == key]
    return corpus / "shards" / row["shard_path"] / SHARD_FILE


def test_an_image_that_cannot_be_read_is_told_and_tried_again(
    own_corpus: Path, model: Path, tmp_path: Path
) -> None:
    file = shard_of(own_corpus, "d")
    sound = file.read_bytes()
    file.write_bytes(sound[: len(sound) // 2])
    summary = embed(own_corpus, model, tmp_path / "out", level="tokens", workers=1)
    (failed,) = summary["failed_images"]
    assert (failed["dataset"], failed["key"], failed["reason"]) == ("toy", "d", "unreadable")
    assert "toy/d" in failed["message"]
    assert summary["embedded"] == len(IMAGES) - 1
    assert summary["failed_by_reason"] == {"unreadable": 1}
    assert "d" not in set(table(tmp_path / "out").key)
    file.write_bytes(sound)
    assert embed(own_corpus, model, tmp_path / "out", level="tokens")["failed"] == 0
    embed(own_corpus, model, tmp_path / "fresh", level="tokens")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_what_is_not_finite_is_told(toy_corpus: Path, model: Path, tmp_path: Path) -> None:
    work = plan_embedding(toy_corpus, model, EmbeddingConfig(where="key in ('e', 'f')", number="float16"))
    with torch.no_grad():
        work.backbone.vit.norm.weight.fill_(1e6)
    summary = work.write(tmp_path / "out", CPU, batch_size=8, workers=0)
    assert summary["failed_by_reason"] == {"not_finite": 2}
    assert table(tmp_path / "out").empty


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import pyarrow.parquet as pq
from training.embed import EmbeddingConfig, plan_embedding

whole, written = pq.write_table, 0

def write_table(table, file, **options):
    global written
    whole(table, file, **options)
    written += 1
    if written == 3:
        os.truncate(file, 100)
        os.kill(os.getpid(), signal.SIGKILL)

pq.write_table = write_table
data, model, folder = map(Path, sys.argv[1:])
work = plan_embedding(data, model, EmbeddingConfig(level="tokens"))
work.write(folder, torch.device("cpu"), batch_size=16, workers=1)
"""


@pytest.mark.slow
def test_a_killed_command_goes_on(toy_corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "vit", (1, 2, 1))
    folder = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, toy_corpus, model, folder],
        cwd=REPOSITORY,
        capture_output=True,  # which its worker holds as well: so this waits for the end of that, too
        timeout=120,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr
    done = {path: path.stat().st_mtime_ns for path in (folder / "features").glob("[!.]*")}
    assert len(done) == 2
    assert not (folder / "summary.json").exists()
    ended = run(
        "pumit-train", "embed", model, "--data", toy_corpus, "--out", folder, "--level", "tokens", "--json"
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert summary["embedded"] == len(IMAGES)
    assert summary["parts"] >= 3
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    embed(toy_corpus, model, tmp_path / "whole", level="tokens", number="float16", batch_size=16)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_command_says_what_it_would_do_and_what_failed(own_corpus: Path, model: Path, tmp_path: Path) -> None:
    arguments = ["embed", model, "--data", own_corpus, "--out", tmp_path / "out", "--where", "key >= 'e'"]
    planned = CliRunner().invoke(cli.train, [*map(str, arguments), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "2 images in 8 tiles (8 of level 5)" in planned.output
    assert not (tmp_path / "out").exists()
    shard_of(own_corpus, "f").unlink()
    ended = CliRunner().invoke(cli.train, [*map(str, arguments), "--workers", "0"])
    assert ended.exit_code == 1, ended.output
    assert "Embedded: 1. Failed: 1." in ended.output
    assert "toy/f" in ended.output


def test_a_corpus_in_a_store_is_embedded_and_its_outage_is_no_fault_of_images(
    toy_corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog.store, "RETRIES", 0)
    blobs = Blobs()
    for name, content in contents(toy_corpus).items():
        blobs.put(f"/corpus/{name}", content)
    blobs.put("/corpus/catalog/datasets.txt", b"toy\n")
    with blob_server(Web, blobs) as port, proxy_to(port) as proxy:
        place = location(f"http://127.0.0.1:{proxy.port}/corpus")
        embed(toy_corpus, model, tmp_path / "near")
        proxy.faults = [Fault("status", path="shards/", times=99, status=403)]
        with pytest.raises(SetupError, match=r"toy.a .*access denied"):
            embed(place, model, tmp_path / "far")
        assert not list((tmp_path / "far" / "features").iterdir())
        proxy.faults = []
        embed(place, model, tmp_path / "far")
        assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_the_page_on_features_is_true(
    toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs/features.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    make_model(Path("universal-vit"), (5, 10, 10))
    Path("demo").symlink_to(toy_corpus)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in commands.splitlines():
        ended = CliRunner().invoke(cli.train, [*shlex.split(line, comments=True)[1:], "--workers", "0"])
        assert ended.exit_code == 0, ended.output
    seen: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, seen)
    assert seen["features"].stages[-1].shape == (1, 16, 5, 10, 10)
    assert set(seen["table"].split) == {"train"}
    assert seen["tokens"].shape == (*seen["row"].grid, 16)
    assert seen["predicted"].shape == (1, 3, 64, 64, 32)
