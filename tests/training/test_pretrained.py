"""Exports: what is written is what is loaded, from folders and from a hub; what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from catalog.errors import SetupError
from training.convert import import_weights
from training.mim import MaskedImageModel, MIMConfig
from training.pretrained import (
    export_pretrained,
    load_pretrained,
    load_tokenizer,
    load_vit,
    training_of,
)
from training.tokenizer import Tokenizer, TokenizerConfig, reference_names
from training.vit import UniversalViT, ViTConfig

TOKENIZER = TokenizerConfig(
    codebook_size=16,
    embedding_dim=8,
    feature_channels=16,
    encoder_channels=(8, 8, 16),
    decoder_channels=(16, 8, 8),
)
VIT = ViTConfig(dim=16, depth=2, heads=2, position_grid=(1, 2, 2))


def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TOKENIZER)


def vit() -> UniversalViT:
    torch.manual_seed(0)
    return UniversalViT(VIT)


def mim() -> MaskedImageModel:
    torch.manual_seed(0)
    return MaskedImageModel(MIMConfig(vit=VIT, codebook_size=16, mask_layer_ids=(0, 1)))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert type(one) is type(other)
    assert one.config == other.config
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("build", [tokenizer, vit, mim])
def test_export_and_load_are_inverse(build, tmp_path):
    export_pretrained(build(), tmp_path / "out" / "model")
    assert_same(load_pretrained(tmp_path / "out" / "model"), build())
    assert sorted(path.name for path in (tmp_path / "out" / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_a_vit_loads_without_the_head_of_its_pretraining(tmp_path):
    export_pretrained(mim(), tmp_path / "mim")
    assert_same(load_vit(tmp_path / "mim").vit, mim().vit)


def test_one_kind_is_not_taken_for_the_other(tmp_path):
    export_pretrained(tokenizer(), tmp_path / "tokenizer")
    export_pretrained(vit(), tmp_path / "vit")
    with pytest.raises(SetupError, match="tokenizer, not a ViT"):
        load_vit(tmp_path / "tokenizer")
    with pytest.raises(SetupError, match="ViT, not a tokenizer"):
        load_tokenizer(tmp_path / "vit")


def test_an_export_never_replaces_a_folder(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="exists already"):
        export_pretrained(vit(), tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_the_card_tells_what_is_known_and_no_folder_of_the_machine(tmp_path):
    trained = {
        "config": {
            "steps": 7,
            "tokenizer": "/home/jane/secret/run",
            "loss": {"lpips_weights_file": "/home/j/v"},
        },
        "measured": {"validation/psnr": 21.123456},
    }
    export_pretrained(tokenizer(), tmp_path / "model", trained)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "21.123" in card
    assert 'training.load_tokenizer("FOLDER")' in card
    assert "steps: 7" in card
    for file in (tmp_path / "model").iterdir():
        assert b"/home" not in file.read_bytes()


@pytest.mark.parametrize("place", ["nothing", "no/such/folder", "."])
def test_what_holds_no_model_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="holds no trained model"):
        load_pretrained(place)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda content: content[:30], "damaged"),
        ("config.json", lambda content: b"{}", "not written by"),
        ("config.json", lambda content: content.replace(b'"version": 1', b'"version": 2'), "version 2"),
        (
            "config.json",
            lambda content: content.replace(b'"codebook_size": 16', b'"codebook_size": 0'),
            "not valid",
        ),
        (
            "config.json",
            lambda content: content.replace(b'"codebook_size": 16', b'"codebook_size": 17'),
            "shape",
        ),
        ("config.json", lambda content: content.replace(b'"tokenizer"', b'"pickle"'), "not valid"),
        ("model.safetensors", lambda content: content[:-9], "not a readable safetensors"),
        ("model.safetensors", lambda content: b"", "not a readable safetensors"),
    ],
)
def test_a_damaged_export_is_refused(file, change, message, tmp_path):
    export_pretrained(tokenizer(), tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SetupError, match=message):
        load_pretrained(tmp_path / "model")


def test_a_missing_and_a_surplus_tensor_are_named(tmp_path):
    export_pretrained(tokenizer(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["quantizer.codebook"]
    save_file(tensors | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(SetupError, match="codebook is missing; extra is unexpected"):
        load_pretrained(tmp_path / "model")


# -- weights of others --------------------------------------------------------------------------------------

SMALL_TOKENIZER = ["model.codebook_size=16", "model.embedding_dim=8", "model.channels=[8,8,16]"]
SMALL_VIT = ["model.dim=16", "model.depth=2", "model.heads=2", "data.tokens_z=1", "data.tokens_x=2"]


def published(file: Path, extra: dict[str, torch.Tensor] | None = None) -> Tokenizer:
    """A checkpoint with the names of the published implementation, as its trainer saves them."""
    model = tokenizer()
    own = model.state_dict()
    tensors = {theirs: own[ours] for theirs, ours in reference_names(TOKENIZER).items()}
    torch.save({"state_dict": tensors | (extra or {}), "global_step": 3}, file)
    return model


def test_a_published_tokenizer_is_imported(tmp_path):
    model = published(tmp_path / "simple.ckpt", {"loss.discriminator.main.0.weight": torch.zeros(2)})
    report = import_weights("tokenizer", tmp_path / "simple.ckpt", tmp_path / "out", "paper", SMALL_TOKENIZER)
    assert report.unused == ("loss.discriminator.main.0.weight",)
    assert len(report.loaded) == len(list(model.parameters()))
    imported = load_tokenizer(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(imported.state_dict()[name], value)
    known = training_of(tmp_path / "out")
    assert known["source"] == "simple.ckpt"
    assert known["sha256"] == hashlib.sha256((tmp_path / "simple.ckpt").read_bytes()).hexdigest()


def test_an_unexpected_key_is_an_error_and_writes_nothing(tmp_path):
    published(tmp_path / "other.ckpt", {"vae.weight": torch.zeros(2)})
    with pytest.raises(SetupError, match=r"other\.ckpt.*vae\.weight is unexpected"):
        import_weights("tokenizer", tmp_path / "other.ckpt", tmp_path / "out", "paper", SMALL_TOKENIZER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["vit", "mim"])
def test_a_vit_is_imported_with_or_without_its_head(kind, tmp_path):
    save_file(mim().state_dict(), tmp_path / "mim.safetensors")
    import_weights(kind, tmp_path / "mim.safetensors", tmp_path / "out", "paper", SMALL_VIT)
    for name, value in mim().vit.state_dict().items():
        assert torch.equal(load_vit(tmp_path / "out").vit.state_dict()[name], value)


def test_an_encoder_alone_is_no_model_with_a_head(tmp_path):
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(SetupError, match="--kind vit"):
        import_weights("mim", tmp_path / "vit.safetensors", tmp_path / "out", "paper", SMALL_VIT)


# -- hub ----------------------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """What fetching a repository of a Hugging Face hub asks for."""

    folder: Path
    commit = "0123456789012345678901234567890123456789"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if self.path.startswith("/api/models/lab/pumit/tree/"):
            tree = [
                {"type": "file", "path": path.name, "oid": "0" * 40, "size": path.stat().st_size}
                for path in self.folder.iterdir()
            ]
            self._send(json.dumps(tree).encode(), body)
        elif self.path.startswith("/api/models/lab/pumit/"):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            self._send(json.dumps({"id": "lab/pumit", "sha": self.commit, "siblings": files}).encode(), body)
        elif self.path.startswith("/lab/pumit/resolve/"):
            self._send((self.folder / self.path.rpartition("/")[2]).read_bytes(), body)
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    export_pretrained(tokenizer(), tmp_path / "published")
    handler = type("Hub", (_Hub,), {"folder": tmp_path / "published"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _load_from(hub: str, name: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its settings when it is imported."""
    code = (
        "import sys\nfrom catalog.errors import SetupError\nfrom training.pretrained import load_tokenizer\n"
        "try:\n    print(sum(p.numel() for p in load_tokenizer(sys.argv[1]).parameters()))\n"
        "except SetupError as error:\n    sys.exit(f'refused: {error}')"
    )
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", code, name]
    return subprocess.run(
        command,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    )


def test_a_model_comes_from_a_hub(hub, tmp_path):
    fetched = _load_from(hub, "lab/pumit", tmp_path / "home")
    assert fetched.stdout.strip() == str(sum(p.numel() for p in tokenizer().parameters())), fetched.stderr
    absent = _load_from(hub, "lab/absent", tmp_path / "home")
    assert absent.returncode == 1
    assert "refused: lab/absent is no folder, and cannot be fetched from the hub" in absent.stderr
