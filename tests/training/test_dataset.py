"""The dataset for other people's loops: the same batches in theirs, and from any state on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from catalog.errors import SetupError
from catalog.sampling import CropGeometry
from tests.conftest import REPOSITORY
from training.augment import render
from training.dataset import PumitDataset
from training.loader import make_loader

CROP = CropGeometry(tokens_z=1, tokens_x=2)
STEPS = 7
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def dataset(place: Path, **options: Any) -> PumitDataset:
    return PumitDataset(place, CROP, 4, steps=STEPS, seed=3, **options)


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value.nan_to_num(-1), other[name].nan_to_num(-1))
        if isinstance(value, torch.Tensor)
        else value == other[name]
        for name, value in one.items()
    )


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [batch["step"] for batch in found] == [batch["step"] for batch in expected]
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def batches(toy_corpus: Path) -> list[dict[str, Any]]:
    return list(dataset(toy_corpus))


def test_batches_are_those_of_our_trainers(toy_corpus: Path, batches: list[dict[str, Any]]) -> None:
    source = dataset(toy_corpus)
    ours = make_loader(source._corpus, source._planner, 0, STEPS - 1, workers=0)
    for batch, raw in zip(batches, ours, strict=True):
        crops = render(raw, torch.device("cpu"))
        assert torch.equal(batch["image"], crops.voxels)
        assert batch["image"].shape == (4, 3, *CROP.size(batch["level"]))
        assert (batch["level"], batch["keys"], batch["step"]) == (raw.level, list(raw.keys), raw.step)
    assert len(source) == STEPS
    assert len({batch["level"] for batch in batches}) > 1


def test_raw_batches_are_rendered_on_the_device(toy_corpus: Path, batches: list[dict[str, Any]]) -> None:
    for batch, ready in zip(dataset(toy_corpus, augment="device"), batches, strict=True):
        assert torch.equal(render(batch["raw"], torch.device("cpu")).voxels, ready["image"])


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_every_state_goes_on_exactly(toy_corpus: Path, rank: int, world: int) -> None:
    """Save before every batch, restore in a new object, replay, compare."""
    source = dataset(toy_corpus, rank=rank, world=world)
    expected, states = [], [json.loads(json.dumps(source.state_dict()))]
    for batch in source:
        expected.append(batch)
        states.append(json.loads(json.dumps(source.state_dict())))
        assert source.state_after(batch) == source.state_dict()
    assert len(expected) == STEPS
    for number, state in enumerate(states):
        restored = dataset(toy_corpus, rank=rank, world=world)
        restored.load_state_dict(state)
        assert restored.state_dict() == state
        assert_same(list(restored), expected[number:])


def test_ranks_share_the_batch(toy_corpus: Path, batches: list[dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(dataset(toy_corpus)))
    for number, whole in enumerate(batches):
        assert torch.equal(torch.cat([part[number]["image"] for part in parts]), whole["image"])


@few_cores
@pytest.mark.parametrize("kind", ["ours", "plain", "forked"])
def test_workers_keep_the_order(toy_corpus: Path, batches: list[dict[str, Any]], kind: str) -> None:
    source = dataset(toy_corpus)
    if kind == "ours":
        loader: DataLoader[Any] = source.loader(2)
    else:
        context = "forkserver" if kind == "plain" else "fork"
        loader = DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context=context)
    if kind == "forked":
        with pytest.raises(RuntimeError, match="forked"):
            list(loader)  # this process has read shards
        return
    assert_same(list(loader), batches)


@few_cores
@pytest.mark.parametrize(("saved", "resumed"), [pytest.param(2, 0, marks=pytest.mark.slow), (0, 2)])
def test_the_loader_has_one_state_for_any_number_of_workers(
    toy_corpus: Path, batches: list[dict[str, Any]], saved: int, resumed: int
) -> None:
    loader = dataset(toy_corpus).loader(saved)
    assert loader.state_dict()["step"] == 0
    for batch in loader:
        if batch["step"] == 2:
            break  # workers have read further
    later = dataset(toy_corpus).loader(resumed)
    later.load_state_dict(loader.state_dict())
    assert_same(list(later), batches[3:])


@few_cores
def test_torchdata(toy_corpus: Path, batches: list[dict[str, Any]]) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        return StatefulDataLoader(
            dataset(toy_corpus), batch_size=None, num_workers=2, multiprocessing_context="forkserver"
        )

    first = loader()
    for batch in first:
        if batch["step"] == 3:
            state = first.state_dict()
            break
    later = loader()
    later.load_state_dict(state)
    assert_same(list(later), batches[4:])


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 5}, {"crop": [1, 3]}, {"catalog": "other"}])
def test_a_foreign_state_is_refused(toy_corpus: Path, change: dict[str, Any]) -> None:
    source = dataset(toy_corpus)
    with pytest.raises(SetupError, match=f"another {next(iter(change))}"):
        source.load_state_dict(source.state_dict() | change)


def test_what_cannot_be(toy_corpus: Path) -> None:
    with pytest.raises(SetupError, match="no preset"):
        PumitDataset(toy_corpus, "paper", 4, steps=1)
    with pytest.raises(SetupError, match="at least 1"):
        PumitDataset(toy_corpus, CROP, 4, steps=0)
    worker = dataset(toy_corpus)
    worker.load_state_dict(worker.state_dict() | {"step": 3, "workers": 2})
    with pytest.raises(SetupError, match="one of 2 workers"):
        next(iter(worker))


def test_lightning_trains_and_resumes(toy_corpus: Path, batches: list[dict[str, Any]], tmp_path: Path) -> None:
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv3d(3, 1, 1)
            self.seen: list[int] = []

        def training_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
            self.seen.append(batch["step"])
            assert same(batch, batches[batch["step"]])
            return self.layer(batch["image"]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(**options: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, **quiet, **options)

    saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first, later = Module(), Module()
    trainer(callbacks=[saving]).fit(first, dataset(toy_corpus).loader())
    trainer().fit(
        later, dataset(toy_corpus).loader(), ckpt_path=tmp_path / "saved/step=3.ckpt", weights_only=True
    )
    assert (first.seen, later.seen) == (list(range(STEPS)), list(range(3, STEPS)))


def test_monai_trains(toy_corpus: Path, batches: list[dict[str, Any]]) -> None:
    from monai.data import ThreadDataLoader
    from monai.networks.nets import UNet
    from monai.transforms import Compose, RandGaussianNoised

    network = UNet(2, 3, 3, channels=(4, 8), strides=(2,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    noise = Compose([RandGaussianNoised("image", prob=1.0)])
    steps = []
    for batch in ThreadDataLoader(dataset(toy_corpus), batch_size=None, collate_fn=dict, num_workers=0):
        assert same(batch, batches[batch["step"]])
        slices = noise(batch)["image"][:, :, 0]
        loss = (network(slices) - batch["image"][:, :, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(batch["step"])
    assert steps == list(range(STEPS))


def code() -> Iterator[str]:
    page = (REPOSITORY / "docs/loader.md").read_text(encoding="utf-8")
    yield from re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@few_cores
def test_the_example_of_the_page(
    toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = code()
    (tmp_path / "demo").symlink_to(toy_corpus)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/loader.md", "exec"), {"__name__": "example"})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "1", "2"]
