"""One file that says which corpus this is, to compare another one with, or the same one later.

    corpus_lock: 1
    fingerprint: <sha256 of all below that is compared>
    made_with: {catalog: 2, shards: 1}
    datasets:
      amos:
        licence: CC BY 4.0                     # told, not compared: so is made_with
        images: {ingested: 498, excluded: {uneven_slices: 2}}
        normalisation: [3]
        entry: [<sha256>]                      # of the fields of datasets.yaml that shape the result
        catalog: <sha256>                      # of all values of the ingested images
        sources: <sha256>                      # of the sha256 of the files that they were made of
        voxels: <sha256>                       # of the sha256 of their shards; `repack` changes it alone
        weights: <sha256>                      # of their sampling weights
        left_out: <sha256>                     # of the images that were not ingested, and why
        split: <sha256>                        # of the subjects held out
    mix: {name: all, fingerprint: <sha256>, leave_out: [msd-brain-tumour]}

It holds hashes and counts: no times, no hosts, no keys and no subjects. Equal corpora give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from catalog.corpus import Corpus
from catalog.errors import SetupError
from catalog.mix import Mix, load_mix, mix_names
from catalog.query import CatalogDigest, catalog_digests
from catalog.schema import SCHEMA_VERSION
from catalog.selection import CopiesUnknownError, Selection
from catalog.split import split_fingerprints

LOCK_FORMAT = 1
"""Of the file; a later one is refused."""

LOCK_FILE = "corpus.lock"
"""How it is called by default, and in run folders and checkpoints."""

_HASHED = {
    "entry": "its entry in datasets.yaml",
    "sources": "the files it was made of",
    "voxels": "the files that hold its voxels",
    "weights": "sampling weights",
    "split": "who is held out for validation",
}
"""What a hash of a dataset tells when it differs; `catalog` and `left_out` are told in more words."""

_TOLD = ("images", "normalisation", "catalog", "left_out")

_NOT_COMPARED = "licence"

Lock = dict[str, Any]
"""A lock as plain data."""


class Difference(NamedTuple):
    """One way in which a corpus is not the locked one."""

    dataset: str
    """Id, or empty where it is not about one dataset."""
    what: str
    """added | removed | images | excluded | normalisation | entry | sources | ... | mix | duplicates"""
    text: str
    """The same in words."""


def lock_corpus(
    corpus: Corpus,
    mix_name: str,
    mix: Mix,
    selection: Selection,
    *,
    shards_version: int,
    licences: Mapping[str, str | None],
    digests: Mapping[str, CatalogDigest] | None = None,
    splits: Mapping[str, str] | None = None,
) -> Lock:
    """The lock of a corpus as a mix draws from it.

    Args:
        shards_version: version of the layout of shards that this program writes.
        licences: as datasets.yaml states them, by dataset.
        digests, splits: of `catalog_digests` and `split_fingerprints`, where the caller has them.

    Raises SetupError as `catalog_digests` and `split_fingerprints`.
    """
    digests = catalog_digests(corpus) if digests is None else digests
    splits = split_fingerprints(corpus, digests)[1] if splits is None else splits
    compared: Lock = {
        "datasets": {
            name: _dataset(digests[name], splits[name], licences.get(name)) for name in sorted(digests)
        },
        "mix": _mix(mix_name, mix, selection),
    }
    versions = {"catalog": SCHEMA_VERSION, "shards": shards_version}
    return {
        "corpus_lock": LOCK_FORMAT,
        "fingerprint": _fingerprint(compared),
        "made_with": versions,
    } | compared


def lock_text(lock: Lock) -> str:
    """The file."""
    return yaml.safe_dump(lock, sort_keys=False, allow_unicode=True, width=110)


def read_lock(text: str, origin: str) -> Lock:
    """What a lock file holds. Raises SetupError that names `origin` if it is none, changed, or too new."""
    try:
        lock = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SetupError(f"{origin} is no lock of a corpus: {' '.join(str(error).split())}.") from error
    if not isinstance(lock, dict) or "corpus_lock" not in lock:
        raise SetupError(
            f"{origin} is no lock of a corpus: it does not begin with corpus_lock. Name another file."
        )
    if lock["corpus_lock"] != LOCK_FORMAT:
        raise SetupError(
            f"{origin} has format {lock['corpus_lock']!r} of a lock, this program knows format {LOCK_FORMAT}. "
            "Install the version of pumit-data that wrote it, or a later one."
        )
    try:
        intact = lock["fingerprint"] == _fingerprint(lock) and {"name", "fingerprint"} <= lock["mix"].keys()
        intact &= all(fields.keys() >= {*_HASHED, *_TOLD} for fields in lock["datasets"].values())
    except (KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise SetupError(
            f"{origin} was changed after it was written: it does not agree with its own fingerprint. "
            "Get it anew."
        )
    return lock


def check_lock(corpus: Corpus, locked: Lock, shards_version: int) -> list[Difference]:
    """In what a corpus differs from the locked one, with the mix of the name that was locked.

    Raises SetupError if the corpus cannot be read, or its mix has become wrong.
    """
    found, name = [], locked["mix"]["name"]
    mix, dedup = Mix(), "duplicates" in locked["mix"]
    try:
        if name in mix_names(corpus):
            mix = load_mix(corpus, name)
            selection = Selection(corpus, mix, dedup=dedup)
        else:
            found.append(Difference("", "mix", f"there is no mix {name} in the corpus"))
            selection = Selection(corpus, mix)
    except CopiesUnknownError as error:
        found.append(Difference("", "duplicates", str(error)))
        selection = Selection(corpus, Mix())
    now = lock_corpus(corpus, name, mix, selection, shards_version=shards_version, licences={})
    told = {difference.what for difference in found}
    return [one for one in differences(locked, now) if one.dataset or not told] + found


def differences(locked: Lock, now: Lock) -> list[Difference]:
    """In what a corpus differs from the locked one: by dataset, then its mix; none if it is the same."""
    found = []
    for name in sorted(locked["datasets"].keys() | now["datasets"].keys()):
        if name not in now["datasets"]:
            found.append(Difference(name, "removed", "is in the lock, and not in the corpus"))
        elif name not in locked["datasets"]:
            found.append(Difference(name, "added", "is in the corpus, and not in the lock"))
        else:
            found += [
                Difference(name, what, text)
                for what, text in _of_dataset(locked["datasets"][name], now["datasets"][name])
            ]
    return found + [Difference("", what, text) for what, text in _of_mix(locked["mix"], now["mix"])]


def _dataset(digest: CatalogDigest, split: str, licence: str | None) -> Lock:
    images: dict[str, Any] = {}
    for status in sorted(digest.outcomes, key=("ingested", "excluded", "failed").index):
        reasons = digest.outcomes[status]
        images[status] = sum(reasons.values()) if status == "ingested" else dict(sorted(reasons.items()))
    return {
        "licence": licence,
        "images": images,
        "normalisation": digest.normalisation_versions,
        "entry": digest.entry_hashes,
        "catalog": digest.fingerprint,
        "sources": digest.parts["source_hash"],
        "voxels": digest.parts["shard_sha256"],
        "weights": digest.parts["sampling_weight"],
        "left_out": digest.others,
        "split": split,
    }


def _mix(name: str, mix: Mix, selection: Selection) -> Lock:
    prints = dict(selection.fingerprints)
    return {"name": name, "fingerprint": prints.pop("mix")} | prints | mix.content


def _fingerprint(lock: Lock) -> str:
    datasets = {
        name: {field: value for field, value in fields.items() if field != _NOT_COMPARED}
        for name, fields in lock["datasets"].items()
    }
    # What a mix is called changes no draw.
    mix = {field: value for field, value in lock["mix"].items() if field != "name"}
    return hashlib.sha256(json.dumps([datasets, mix], sort_keys=True).encode()).hexdigest()


def _of_dataset(then: Lock, now: Lock) -> Iterator[tuple[str, str]]:
    before, after = then["images"].get("ingested", 0), now["images"].get("ingested", 0)
    if before != after:
        yield "images", f"{_count(before, 'image')} ingested, now {after:,}"
    counts = [
        f"{reason} was {old:,}, is {new:,}"
        for status in ("excluded", "failed")
        for reason in sorted(then["images"].get(status, {}).keys() | now["images"].get(status, {}).keys())
        for old, new in [(at["images"].get(status, {}).get(reason, 0) for at in (then, now))]
        if old != new
    ]
    if then["left_out"] != now["left_out"]:
        yield "excluded", f"excluded or failed: {'; '.join(counts) or 'as many, but not the same images'}"
    if then["normalisation"] != now["normalisation"]:
        yield "normalisation", f"normalisation was {_some(then)}, is {_some(now)}: it was ingested again"
    named = [field for field in _HASHED if then[field] != now[field]]
    yield from ((field, f"{_HASHED[field]} changed") for field in named)
    told = {"sources", "voxels", "weights"} & set(named)
    if then["catalog"] != now["catalog"] and not told and before == after:
        yield "catalog", "what the catalog says of its images changed"


def _of_mix(then: Lock, now: Lock) -> Iterator[tuple[str, str]]:
    if then["fingerprint"] != now["fingerprint"]:
        name = now["name"]
        fields = sorted(
            field
            for field in (then.keys() | now.keys()) - {"name", "fingerprint", "duplicates"}
            if then.get(field) != now.get(field)
        )
        what = f"the mix {name} changed" if then["name"] == name else f"the mix was {then['name']}, is {name}"
        yield "mix", f"{what}: {'; '.join(_change(field, then, now) for field in fields)}"
    if then.get("duplicates") != now.get("duplicates"):
        if "duplicates" not in then or "duplicates" not in now:
            yield "duplicates", f"copies were {_kept(then)}, are {_kept(now)}"
        else:
            yield "duplicates", "other images are taken for copies"


def _change(field: str, then: Lock, now: Lock) -> str:
    old, new = (json.dumps(mix.get(field), ensure_ascii=False) for mix in (then, now))
    return f"{field} was {old}, is {new}"


def _kept(mix: Lock) -> str:
    return "left out" if "duplicates" in mix else "drawn as any image"


def _some(lock: Lock) -> str:
    return " and ".join(map(str, lock["normalisation"])) or "none"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s were' if number != 1 else ' was'}"
