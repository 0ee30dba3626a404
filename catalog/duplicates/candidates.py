"""Which pairs of millions of images are worth a comparison: those of which some codes meet.

Codes wait on disk, in parts by bucket, and each part is sorted in memory. In a bucket a code is compared with
the next few only, in the order of the rest of their signs: one that is crowded, of images without much in them,
costs time in proportion to its size and not to its square.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catalog.duplicates.codes import MOST_DIFFERENT, Codes

NEIGHBOURS = 64
"""So many following codes of its bucket a code is compared with."""
_NEIGHBOURS_ACROSS = 4096
"""The same between two sides, where only buckets with codes of both are looked at."""
_PARTS = 128
_HELD = 1 << 22
_MEMORY = "1GB"
_SURE, _MEETINGS = 6, 2
"""A pair is worth it if the rests of two codes differ in at most _SURE signs, or _MEETINGS codes meet."""

_CODE = np.dtype([("bucket", "<u4"), ("rest", "<u4"), ("image", "<u4")])


class Candidates:
    """Takes codes of images and gives back pairs. Memory does not grow with them, up to 2^32 images."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where files may lie meanwhile, some 1.5 kB an image; by default that of temporary files."""
        self._folder = tempfile.TemporaryDirectory(prefix="pumit-data-codes-", dir=folder)
        self._held: list[npt.NDArray[np.void]] = []
        self._sizes = np.zeros(_PARTS, np.int64)

    def __enter__(self) -> Candidates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def add(self, codes: Codes) -> None:
        """`codes.image` holds the numbers of images."""
        entries = np.empty(len(codes.bucket), _CODE)
        entries["bucket"], entries["rest"], entries["image"] = codes.bucket, codes.rest, codes.image
        self._held.append(entries)
        if sum(map(len, self._held)) >= _HELD:
            self._spill()

    def pairs(
        self, source: npt.NDArray[np.uint64], side: npt.NDArray[np.bool_] | None = None
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Pairs (n, 2) of image numbers, the smaller first, each once and in order. To be called once.

        Args:
            source: by image; those of one source are no pair.
            side: by image; if given, only pairs of both sides are wanted.
        """
        import duckdb

        self._spill()
        scratch = Path(self._folder.name)
        with duckdb.connect(
            str(scratch / "pairs.duckdb"), config={"memory_limit": _MEMORY, "temp_directory": str(scratch)}
        ) as database:
            database.execute("CREATE TABLE meeting (a UINTEGER, b UINTEGER, different UTINYINT)")
            for number in range(_PARTS):
                for first, second, different in self._meetings(number, source, side):
                    meeting = pa.table({"a": first, "b": second, "different": different})
                    database.register("met", meeting)
                    database.execute("INSERT INTO meeting SELECT * FROM met")
                    database.unregister("met")
            found = database.sql(
                "SELECT a, b FROM meeting GROUP BY a, b HAVING min(different) <= $sure OR count(*) >= $often "
                "ORDER BY a, b",
                params={"sure": _SURE, "often": _MEETINGS},
            )
            for batch in found.to_arrow_reader(1 << 16):
                yield np.stack([batch.column(name).to_numpy().astype(np.int64) for name in ("a", "b")], axis=1)

    def _spill(self) -> None:
        if not self._held:
            return
        entries = np.concatenate(self._held)
        self._held = []
        part = entries["bucket"] % _PARTS
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=_PARTS))
        for number, chosen in enumerate(np.split(entries[order], ends[:-1])):
            with self._part(number).open("ab") as file:
                chosen.tofile(file)

    def _part(self, number: int) -> Path:
        return Path(self._folder.name) / f"codes-{number:03d}"

    def _meetings(
        self, number: int, source: npt.NDArray[np.uint64], side: npt.NDArray[np.bool_] | None
    ) -> Iterator[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], npt.NDArray[np.uint8]]]:
        """Image, other image and number of different signs of codes that meet in one part."""
        file = self._part(number)
        if not file.exists():
            return
        entries = np.fromfile(file, _CODE)
        file.unlink()
        if side is not None:
            here = side[entries["image"]]
            both = np.intersect1d(entries["bucket"][here], entries["bucket"][~here])
            entries = entries[np.isin(entries["bucket"], both)]
        order = np.lexsort((entries["image"], entries["rest"], entries["bucket"]))
        bucket, rest, image = (
            np.ascontiguousarray(entries[name][order]) for name in ("bucket", "rest", "image")
        )
        for distance in range(1, (NEIGHBOURS if side is None else _NEIGHBOURS_ACROSS) + 1):
            together = np.flatnonzero(bucket[distance:] == bucket[:-distance])
            if not len(together):
                break
            different = np.bitwise_count(rest[together] ^ rest[together + distance])
            near = different <= MOST_DIFFERENT
            first, second = image[together[near]], image[together[near] + distance]
            wanted = (first != second) & (source[first] != source[second])
            if side is not None:
                wanted &= side[first] != side[second]
            if wanted.any():
                first, second = first[wanted], second[wanted]
                yield np.minimum(first, second), np.maximum(first, second), different[near][wanted]
