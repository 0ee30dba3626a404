"""Where a dataset comes from: how its publisher lets people have it, and how a program can fetch it.

Nothing here shapes an image: these fields never enter an entry's hash.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from ingest.declared import Declared, Regex, Text, checked_relative

Folder = Annotated[str, AfterValidator(checked_relative)]
Page = Annotated[str, Field(pattern=r"^https://[^\s]+$")]
Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]

AccessKind = Literal[
    "open download",
    "registration",
    "account login",
    "competition login",
    "challenge login",
    "signed agreement",
    "restricted",
    "included",
    "unknown",
]
"""What stands between a user and the files."""


class Access(Declared):
    """How the publisher offers a dataset."""

    kind: AccessKind
    host: Text | None = None
    collection: Text | None = None
    """What the host calls the dataset."""
    doi: Annotated[str, Field(pattern=r"^10\.\d{4,}/\S+$")] | None = None
    page: Page | None = None
    steps: tuple[Text, ...] = ()
    """What a person has to do, one sentence a step, where no program can or may do it."""

    @property
    def address(self) -> str | None:
        """The page, or what the DOI leads to."""
        return self.page or (f"https://doi.org/{self.doi}" if self.doi else None)


class OfferedFile(Declared):
    """One file that can be had by its address alone."""

    url: Url
    name: Text | None = None
    """File name; by default the last part of the address."""
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    size: PositiveInt | None = None
    """Bytes."""
    into: Folder | None = None
    """Folder inside the dataset's; by default that of the `download` itself."""
    unpack: bool = True
    """Whether an archive is unpacked. What is no archive stays as it is."""


class Download(Declared):
    """How `pumit-data download` gets a dataset: exactly one of the first five fields.

    Archives are unpacked, and what comes out must be the layout that the entry's `images` describe.
    """

    zenodo: tuple[PositiveInt, ...] = ()
    """Records, as in zenodo.org/records/NUMBER: names, sizes and md5 come from Zenodo's interface."""
    figshare: PositiveInt | None = None
    """Number of a public article; names, sizes and md5 come from figshare's interface."""
    files: tuple[OfferedFile, ...] = ()
    tcia: Text | None = None
    """Name of a public collection of The Cancer Imaging Archive. Series get the folders that the archive's own
    retriever gives them, with its metadata.csv."""
    s3: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{2,62}(/\S*)?$")] | None = None
    """`bucket/prefix` of a bucket that can be read without an account."""
    only: Regex | None = None
    """Of a record, article or bucket, only files whose name matches somewhere."""
    members: Regex | None = None
    """Of archives, only files whose path in the archive matches somewhere: annotations may take far more room
    than the images."""
    modalities: tuple[Text, ...] = ()
    """Of a collection, only series of these DICOM modalities (CT, MR): annotations can be many, and are of no
    use here. Empty stands for all."""
    into: Folder | None = None
    """Folder inside the dataset's where files and archives go."""
    gigabytes: Annotated[float, Field(gt=0)] | None = None
    """Size of the transfer in 10^9 bytes, where the publisher tells it and no `size` does."""

    @model_validator(mode="after")
    def _one_source(self) -> Download:
        given = [name for name in ("zenodo", "figshare", "files", "tcia", "s3") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("needs exactly one of `zenodo`, `figshare`, `files`, `tcia` and `s3`")
        return self

    @property
    def bytes(self) -> int | None:
        """Size of the transfer as far as the entry tells it."""
        sizes = [file.size for file in self.files]
        if sizes and None not in sizes:
            return sum(size or 0 for size in sizes)
        return round(self.gigabytes * 1e9) if self.gigabytes is not None else None
