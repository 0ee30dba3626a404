"""Features of a corpus's images on disk, part by part: a part is there whole or not at all.

    FOLDER/embedding.json          what they are of: the weights, the images, the form of the features
    FOLDER/features/00000.parquet  a row for each image of the part, in the order of dataset and key
    FOLDER/tokens/00000.zarr       patch tokens of these images one after the other, where they were asked for
    FOLDER/summary.json            written when all parts are there

`pandas.read_parquet("FOLDER/features")` reads them all. What could not be embedded has no row: the file's
metadata and the summary name it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from catalog.durable import remove_unfinished, replacing, sync, unfinished
from catalog.errors import SetupError
from training.claimed import claimed
from training.run import write_json

FORMAT = "pumit-data features"
VERSION = 1

_IDENTITY, _SUMMARY = "embedding.json", "summary.json"
_FEATURES, _TOKENS = "features", "tokens"
_FAILED = b"pumit_failed"
_TOKEN_ROWS = 1024
"""Tokens of a chunk."""


@dataclass(frozen=True)
class Failure:
    """An image without features."""

    dataset: str
    key: str
    reason: str
    """unreadable | not_finite"""
    message: str


class FeatureStore:
    """The folder of one embedding, open for one process."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], parts: int) -> None:
        """See `open_store`."""
        self.folder = folder
        self._identity = dict(identity)
        self._parts = parts

    def missing(self) -> list[int]:
        """Parts to be made: those that are not there, and those in which an image failed."""
        return [part for part in range(self._parts) if self._failures(part) != []]

    def write(
        self, part: int, rows: pa.Table, tokens: npt.NDArray[Any] | None, failures: Sequence[Failure]
    ) -> None:
        """Add a part; `tokens` (T, C) are those of its images in their order."""
        file = self._file(part)
        remove_unfinished(file)
        if tokens is not None:
            rows = rows.append_column(
                "tokens_path", pa.array([self._tokens(part)] * rows.num_rows, pa.string())
            )
            _write_tokens(self.folder / self._tokens(part), tokens)
        told = json.dumps([asdict(failure) for failure in failures]).encode()
        with replacing(file) as temporary:
            table = rows.replace_schema_metadata({_FAILED: told})
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    def finish(self) -> dict[str, Any]:
        """Write and return the summary: what there is, and which images failed, of all parts."""
        images: Counter[str] = Counter()
        levels: Counter[str] = Counter()
        failures = []
        for part in range(self._parts):
            failures += self._failures(part) or []
            table = pq.read_table(self._file(part), columns=["modality", "da_level"], partitioning=None)
            images.update(str(modality) for modality in table["modality"].to_pylist())
            levels.update(str(level) for level in table["da_level"].to_pylist())
        summary = self._identity | {
            "embedded": sum(images.values()),
            "failed": len(failures),
            "by_modality": dict(sorted(images.items())),
            "by_da_level": dict(sorted(levels.items())),
            "failed_by_reason": dict(sorted(Counter(failure["reason"] for failure in failures).items())),
            "failed_images": failures,
        }
        write_json(self.folder / _SUMMARY, summary)
        return summary

    def _failures(self, part: int) -> list[dict[str, str]] | None:
        """The images of a part that failed; None if the part is not there."""
        file = self._file(part)
        try:
            metadata = pq.read_schema(file).metadata or {}
            failures: list[dict[str, str]] = json.loads(metadata[_FAILED])
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise SetupError(f"{file} is damaged: {error}. Delete it and repeat the command.") from error
        return failures

    def _file(self, part: int) -> Path:
        return self.folder / _FEATURES / f"{part:05d}.parquet"

    def _tokens(self, part: int) -> str:
        return f"{_TOKENS}/{part:05d}.zarr"


@contextmanager
def open_store(folder: Path, identity: Mapping[str, Any], parts: int) -> Iterator[FeatureStore]:
    """Open `folder` to begin the embedding that `identity` (plain data) tells of, or to go on with it.

    Raises SetupError if the folder holds something else, or another process writes to it.
    """
    identity = {"format": FORMAT, "version": VERSION, **identity}
    with claimed(folder / _IDENTITY, identity, "features"):
        (folder / _FEATURES).mkdir(exist_ok=True)
        yield FeatureStore(folder, identity, parts)


def _write_tokens(folder: Path, tokens: npt.NDArray[Any]) -> None:
    """A Zarr array (T, C) in one file, in place of what an earlier process may have left."""
    import zarr

    folder.parent.mkdir(exist_ok=True)
    for leftover in folder.parent.glob(f".tmp-*-{folder.name}"):
        shutil.rmtree(leftover)
    shutil.rmtree(folder, ignore_errors=True)
    temporary = unfinished(folder)
    count, channels = tokens.shape
    array = zarr.create_array(
        str(temporary),
        shape=tokens.shape,
        dtype=tokens.dtype,
        chunks=(_TOKEN_ROWS, channels),
        shards=(-(-max(count, 1) // _TOKEN_ROWS) * _TOKEN_ROWS, channels),
    )
    array[:] = np.ascontiguousarray(tokens)
    for path in temporary.rglob("*"):
        sync(path)
    temporary.rename(folder)
    sync(folder.parent)
