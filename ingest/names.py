"""Keyed ids in place of names that may identify a patient.

Names of files and folders of a user's own dataset may be those of people. Catalog, shards and logs then hold
ids: the same name gives the same id with the same key, and without the key no name can be guessed and tried.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from catalog.corpus import Corpus
from catalog.errors import SetupError

_BYTES = 32
_SHOWN = 16
"""Characters of an id: 80 bits, so that among 10^9 names two equal ids are less likely than 10^-6."""


@dataclass(frozen=True)
class NameKey:
    """The secret that ids are made with."""

    secret: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"PUMIT-data names key\0" + self.secret).hexdigest()

    def id(self, dataset: str, kind: Literal["key", "subject", "path"], name: str) -> str:
        """Id of a name: lower-case letters and digits."""
        message = "\0".join((dataset, kind, name)).encode()
        digest = hmac.new(self.secret, message, hashlib.sha256).digest()
        return base64.b32encode(digest).decode().lower()[:_SHOWN]


def name_key(corpus: Corpus, given: Path | None = None, *, keep: bool = True) -> NameKey:
    """The key of a corpus: the user's, or one that is made once and lies in `private/`, which nobody exports.

    Args:
        given: file with the user's key, 64 hexadecimal digits; needed to build equal corpora in two places.
        keep: write a new key into the corpus; otherwise it serves this call only.

    Raises:
        SetupError: the file holds no key, cannot be read, or is another than the corpus was made with.
    """
    file = _key_file(corpus)
    present = _read(file) if file.exists() else None
    if given is not None:
        wanted = _read(given)
        if present not in (None, wanted):
            raise SetupError(
                f"{given} is not the key that {corpus.root} was made with; with two keys one image would have "
                f"two names. Use {file}, or another --data."
            )
        present_or_new = wanted
    else:
        present_or_new = present or NameKey(secrets.token_bytes(_BYTES))
    known = fingerprint_file(corpus)
    if known.is_file() and known.read_text(encoding="ascii") != present_or_new.fingerprint:
        raise SetupError(
            f"{corpus.place} was made with another key; with two keys one image would have two names. Give "
            "that of the machine where it was made first: --names-key FILE."
        )
    if keep and present is None:
        _write(file, present_or_new)
    return present_or_new


def fingerprint_file(corpus: Corpus) -> Path:
    """What tells other machines that write the same corpus whether they have its key, and not the key."""
    return corpus.private / "names.sha256"


def write_fingerprint(corpus: Corpus) -> None:
    """Note the fingerprint of the key of a corpus, if it has one."""
    if _key_file(corpus).is_file():
        fingerprint_file(corpus).write_text(_read(_key_file(corpus)).fingerprint, encoding="ascii")


def copy_key(source: Corpus, target: Corpus) -> None:
    """Give one corpus the key of another, if that has one."""
    if _key_file(source).is_file():
        _write(_key_file(target), _read(_key_file(source)))


def _key_file(corpus: Corpus) -> Path:
    return corpus.private / "names.key"


def _read(file: Path) -> NameKey:
    try:
        secret = bytes.fromhex(file.read_text(encoding="ascii"))
    except OSError as error:
        raise SetupError(f"the key {file} cannot be read: {error.strerror}.") from error
    except ValueError:
        secret = b""
    if len(secret) != _BYTES:
        raise SetupError(
            f"{file} holds no key: {2 * _BYTES} hexadecimal digits, as `openssl rand -hex {_BYTES}` makes them."
        )
    return NameKey(secret)


def _write(file: Path, key: NameKey) -> None:
    """Only the owner may read it; complete or not there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)
        with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=file.parent, prefix=".tmp-") as stream:
            stream.write(key.secret.hex() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            os.link(stream.name, file)
    except FileExistsError as error:
        raise SetupError(f"another ingest has just made {file}. Repeat the command.") from error
    except OSError as error:
        raise SetupError(
            f"cannot write {file}: {error.strerror}. Choose another folder with --data."
        ) from error
