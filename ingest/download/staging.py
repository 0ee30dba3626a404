"""Where a download grows: beside the datasets, out of their sight, until it is whole."""

from __future__ import annotations

import fcntl
import filecmp
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from catalog.errors import SetupError
from ingest.download.unpack import DamagedArchiveError, unpack

_log = logging.getLogger(__name__)

RECORD = ".pumit-download.json"
"""In the folder of a dataset: what was downloaded. Written last, so it stands for a whole dataset."""


class Staging:
    """The unfinished download of one dataset, in `<raw>/.pumit-download/<id>/`.

    Discovery passes over names that begin with a dot, and the same file system makes the last step one rename.
    """

    def __init__(self, raw: Path, dataset: str) -> None:
        self.dataset = dataset
        self.root = raw / ".pumit-download" / dataset
        self.archives = self.root / "archives"
        """Files as they come, unfinished ones as `NAME.part`."""
        self.tree = self.root / "tree"
        """The dataset's folder to be."""
        self._unpacking = self.root / "unpacking"
        self._done = self.root / "done"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One download of a dataset at a time; the kernel frees the lock when the process dies.

        Raises SetupError when another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SetupError(f"{self.dataset}: another download into {self.root} is running.") from error
            yield

    def begin(self, entry: Mapping[str, Any]) -> None:
        """Go on with what is here, unless it was begun for another `download` entry: then begin anew."""
        file = self.root / "entry.json"
        text = json.dumps(entry, sort_keys=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            if self.tree.exists():
                _log.warning("%s: its `download` has changed; what came by the old one goes.", self.dataset)
            for folder in (self.archives, self.tree, self._done):
                shutil.rmtree(folder, ignore_errors=True)
            file.write_text(text, encoding="utf-8")
        self.tree.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)

    def note(self, name: str) -> Any:
        """What `finish` noted of a file: None where it is not finished."""
        file = self._done / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def finish(self, name: str, note: Mapping[str, Any]) -> None:
        """Note that all that comes out of a file is in the tree."""
        file = self._done / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_name(f"{file.name}.half")
        half.write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
        half.replace(file)

    @contextmanager
    def unpacked(self, archive: Path, limit: int, members: str | None = None) -> Iterator[Path]:
        """A folder with what is in an archive, for as long as the context lasts. Arguments as of `unpack`.

        Raises:
            DamagedArchiveError: after the archive was deleted, so that the next call fetches it anew.
            SetupError, OSError: as `unpack`.
        """
        shutil.rmtree(self._unpacking, ignore_errors=True)
        self._unpacking.mkdir()
        try:
            unpack(archive, self._unpacking, limit, members)
            yield self._unpacking
        except DamagedArchiveError:
            archive.unlink()
            raise
        finally:
            shutil.rmtree(self._unpacking, ignore_errors=True)

    def move_in(self, source: Path, into: str | None) -> None:
        """Move a file, or all that is in a folder, into the tree. Of two different files the first stays."""
        target = self.tree / into if into else self.tree
        files = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if _is_leaf(path)]
        for file in files:
            place = target / (file.name if file is source else file.relative_to(source))
            if place.exists() and not filecmp.cmp(place, file, shallow=False):
                _log.warning(
                    "%s: %s comes twice, with different content; the first is kept.", self.dataset, place.name
                )
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)

    def publish(self, target: Path, record: Mapping[str, Any]) -> None:
        """Make the tree the dataset's folder, in one step that either happens or does not."""
        (self.tree / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        os.sync()  # a crash must not leave empty files under names that look complete
        target.parent.mkdir(parents=True, exist_ok=True)
        self.tree.replace(target)

    def remove(self) -> None:
        """Remove what is left, and the common folder where no other download lies in it."""
        shutil.rmtree(self.root)
        try:
            self.root.parent.rmdir()
        except OSError:
            return


def _is_leaf(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()
