"""What to cite for a dataset, as datasets.yaml states it and as BibTeX."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from ingest.declared import Declared, Text

_GENERATION = re.compile(r" (?:Jr\.?|Sr\.?|I{2,3}|IV)$")


class Citation(Declared):
    """One reference that the publisher of a dataset asks to cite."""

    kind: Literal["article", "inproceedings", "dataset"] = "article"
    authors: Text
    """In BibTeX's form: `Surname, Given and Surname, Given and others`."""
    title: Text
    year: Annotated[int, Field(ge=1900, le=2100)]
    venue: Text | None = None
    """Journal, proceedings, or who publishes the data."""
    doi: Annotated[str, Field(pattern=r"^10\.\d{4,}/\S+$")] | None = None

    @property
    def short(self) -> str:
        """`Ji et al. 2022`, or both surnames of two authors."""
        names = [name.split(",")[0].strip() for name in self.authors.split(" and ")]
        return f"{names[0] if len(names) == 1 else self._joined(names)} {self.year}"

    @staticmethod
    def _joined(names: list[str]) -> str:
        return " and ".join(names) if len(names) == 2 and names[1] != "others" else f"{names[0]} et al."

    def bibtex(self, mark: str = "") -> str:
        """One BibTeX entry; titles keep their capitals, and `mark` ends its key."""
        venue = {"article": "journal", "inproceedings": "booktitle", "dataset": "publisher"}[self.kind]
        fields = {
            "author": self.authors,
            "title": f"{{{self.title}}}",
            venue: self.venue,
            "year": str(self.year),
            "doi": self.doi,
        }
        lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value is not None]
        kind = "misc" if self.kind == "dataset" else self.kind
        return f"@{kind}{{{self.key}{mark},\n" + ",\n".join(lines) + "\n}"

    @property
    def key(self) -> str:
        """Surname, year and first long word of the title, in ASCII."""
        words = (word for word in re.findall(r"\w+", self.title) if len(word) > 3)
        surname = _GENERATION.sub("", self.authors.split(",")[0]).split(" ")[-1]
        text = f"{surname}{self.year}{next(words, 'data')}".lower()
        return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", text))


def bibliography(citations: Sequence[Citation]) -> list[str]:
    """The references as BibTeX entries with different keys: `ji2022amos`, or `ji2022amosa`, `ji2022amosb`."""
    keys = [citation.key for citation in citations]
    seen: Counter[str] = Counter()
    entries = []
    for citation, key in zip(citations, keys, strict=True):
        entries.append(citation.bibtex(chr(ord("a") + seen[key]) if keys.count(key) > 1 else ""))
        seen[key] += 1
    return entries
