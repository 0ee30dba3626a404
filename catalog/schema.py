"""Every column of the catalog with its type, unit and meaning; nobody else defines columns.

One row is one image: a single-modality 2-D or 3-D image. Excluded and failed images have rows too, with
what is known of them, so that per dataset #discovered = #ingested + #excluded + #failed.

`python -m catalog.schema > docs/catalog.md` writes the page that describes them.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 2
"""Of catalog, previews and splits. 1: without shard_sha256, which reads as null then."""


def _column(
    name: str, kind: pa.DataType, meaning: str, *, unit: str | None = None, required: bool = False
) -> pa.Field:
    metadata = {"description": meaning} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=not required, metadata=metadata)


_TEXT, _INT, _REAL = pa.string(), pa.int32(), pa.float64()

_COLUMNS = [
    _column("dataset", _TEXT, "id of the dataset in datasets.yaml", required=True),
    _column("key", _TEXT, "name of the image, unique in its dataset", required=True),
    _column("subject", _TEXT, "public case id of the person; split and leakage go by it", required=True),
    _column("status", _TEXT, "ingested | excluded | failed", required=True),
    _column("reason", _TEXT, "reason code when not ingested (docs/exclusions.md)"),
    _column("message", _TEXT, "what was found, in words, when not ingested"),
    _column("modality", _TEXT, "modality, with the sequence after a slash: CT, MRI/T1, XR"),
    _column("upstream_modality", _TEXT, "the same in the words of the reference implementation"),
    _column("body_part", pa.list_(_TEXT), "body parts the dataset shows"),
    _column("dimension", pa.int8(), "2 or 3"),
    _column("shape_c", _INT, "channels stored: 1, or 3 for colour 2-D images"),
    _column("shape_d", _INT, "slices along the depth axis", unit="voxel"),
    _column("shape_h", _INT, "rows", unit="voxel"),
    _column("shape_w", _INT, "columns", unit="voxel"),
    _column("spacing_z", _REAL, "distance of slices; null for 2-D (acts as infinite)", unit="mm"),
    _column("spacing_y", _REAL, "distance of rows; null where a 2-D image has none", unit="mm"),
    _column("spacing_x", _REAL, "distance of columns; null where a 2-D image has none", unit="mm"),
    _column("da", _REAL, "degree of anisotropy, spacing_z / min(spacing_y, spacing_x); null for 2-D"),
    _column("da_level", pa.int8(), "floor(log2(da)) clipped to 0..5; 5 for 2-D"),
    _column("stored_dtype", _TEXT, "numpy dtype of the stored voxels"),
    _column("slope", _REAL, "real value = slope * stored + intercept"),
    _column("intercept", _REAL, "real value = slope * stored + intercept"),
    _column("window_low", _REAL, "maps to 0 in training, in real units (HU for CT)"),
    _column("window_high", _REAL, "maps to 1 in training, in real units (HU for CT)"),
    _column("intensity_mean", _REAL, "mean over all voxels, in real units"),
    _column("intensity_std", _REAL, "standard deviation (ddof 0) over all voxels, in real units"),
    _column("intensity_median", _REAL, "median over all voxels, in real units"),
    _column("intensity_min", _REAL, "minimum, in real units"),
    _column("intensity_max", _REAL, "maximum, in real units"),
    _column("intensity_p0_5", _REAL, "0.5 percentile over the voxels above the minimum, in real units"),
    _column("intensity_p99_5", _REAL, "99.5 percentile over the voxels above the minimum, in real units"),
    _column("original_shape", pa.list_(_INT), "spatial shape in the file, axes as stored there"),
    _column("original_spacing", pa.list_(_REAL), "spacing in the file, axes as stored there", unit="mm"),
    _column(
        "original_orientation",
        _TEXT,
        "axes of the file as towards-codes (RAS, LPS); null if unknown",
    ),
    _column("geometry_flags", pa.list_(_TEXT), "what was repaired or is unusual, sorted"),
    _column("depth_axis", _TEXT, "anatomical direction of the depth axis: SI, AP, LR; null if unknown"),
    _column("depth_rule", _TEXT, "declared | metadata | anisotropy | default | overridden; null for 2-D"),
    _column("crop_box", pa.list_(_INT), "z0, z1, y0, y1, x0, x1 (end exclusive) in the reordered image"),
    _column("resize_factor", _REAL, "in-plane size after / before the resize; 1 when none"),
    _column("sampling_weight", _REAL, "image weight x dataset weight"),
    _column("split", _TEXT, "train | validation", required=True),
    _column("shard_path", _TEXT, "array that holds the voxels, relative to shards/"),
    _column(
        "shard_shape",
        pa.list_(_INT),
        "shape of that array: (C, D, H, W) or, for a pack, (N, C, H, W)",
    ),
    _column("shard_index", _INT, "index of the image in its pack; null for a volume"),
    _column("stored_bytes", pa.int64(), "bytes the voxels take on disk, compressed", unit="byte"),
    _column("shard_sha256", _TEXT, "sha256 of the file that holds the voxels of that array"),
    _column("source_path", _TEXT, "file or folder, relative to the dataset root", required=True),
    _column("source_hash", _TEXT, "sha256 of the source files"),
    _column(
        "entry_hash",
        _TEXT,
        "sha256 of the fields of datasets.yaml that shape the result; then + and a hash of overrides, if any",
        required=True,
    ),
    _column("normalisation_version", _INT, "version of the normalisation rules", required=True),
]

CATALOG_SCHEMA = pa.schema(_COLUMNS, metadata={"pumit_schema_version": str(SCHEMA_VERSION)})

PREVIEW_SCHEMA = pa.schema(
    [
        _column("dataset", _TEXT, "id of the dataset", required=True),
        _column("key", _TEXT, "key of the image in the catalog", required=True),
        _column("preview", pa.binary(), "PNG: mid-planes with true aspect, window applied"),
    ],
    metadata={"pumit_schema_version": str(SCHEMA_VERSION)},
)
"""The sibling of the catalog that holds pictures, so that the catalog itself stays small."""

FEATURES_SCHEMA = pa.schema(
    [
        _column("dataset", _TEXT, "id of the dataset", required=True),
        _column("key", _TEXT, "key of the image in the catalog", required=True),
        _column("features_version", _INT, "version of the rules that made them", required=True),
        _column(
            "voxel_hash",
            pa.binary(16),
            "equal for equal shape and real values, whatever the dtype",
            required=True,
        ),
        _column(
            "pictures",
            pa.binary(),
            "16 grey levels, two cells a byte: 48 x 48 of a 2-D image, 3 x 32 x 32 of slabs through a volume",
            required=True,
        ),
    ],
    metadata={"pumit_schema_version": str(SCHEMA_VERSION)},
)
"""The sibling that holds what an image is found again by: a search for duplicates reads nothing else of it."""

DUPLICATES_SCHEMA = pa.schema(
    [
        _column("group", pa.int64(), "number of the group, from 0", required=True),
        _column("dataset", _TEXT, "id of the dataset", required=True),
        _column("key", _TEXT, "key of the image in the catalog", required=True),
        _column("kind", _TEXT, "exact: another of the group has the same values | near", required=True),
        _column("kept", pa.bool_(), "the one member that trains", required=True),
    ],
    metadata={"pumit_schema_version": str(SCHEMA_VERSION)},
)
"""One row per image that has a duplicate, sorted by group, dataset and key."""


_PAGE = """\
# The catalog

<!-- Made by `python -m catalog.schema > docs/catalog.md` from the columns in catalog/schema.py. -->

One row an image, ingested or not; one Parquet file a dataset, `catalog/dataset=ID/images.parquet` below the
corpus, sorted by key. Version {version} of the schema, which stands in each file as `pumit_schema_version`.

## Columns

| column | type | unit | meaning |
| --- | --- | --- | --- |
{columns}

Types are those of Arrow; a type with `not null` always has a value.

## Previews

`catalog/dataset=ID/previews.parquet` holds pictures of the ingested images, apart: the catalog stays small.

| column | type | unit | meaning |
| --- | --- | --- | --- |
{previews}

## Features

`catalog/dataset=ID/features.parquet` holds what `pumit-data duplicates` compares of the ingested images.
Images of an earlier version of PUMIT-data may lack there, until that command adds them.

| column | type | unit | meaning |
| --- | --- | --- | --- |
{features}

## Duplicates

`catalog/duplicates.parquet` holds what the last `pumit-data duplicates` found: a row for each image that has a
duplicate. `duplicates.sha256` beside it is its checksum, as `sha256sum -c` reads it in the corpus.

| column | type | unit | meaning |
| --- | --- | --- | --- |
{duplicates}

## Reading it

On the command line the table `images` has these columns:

```sh
pumit-data query "SELECT modality, count(*), median(spacing_z) FROM images GROUP BY ALL" --data corpus
```

In Python, with every checksum compared, as an Arrow table that all libraries for tables take:

```python
from pathlib import Path
from catalog.corpus import Corpus
from catalog.query import load_catalog

images = load_catalog(Corpus(Path("corpus")), status=None)
```

Without PUMIT-data. The folder names repeat the column `dataset`, so readers are told not to make it twice.

```python
import pandas
from glob import glob

files = sorted(glob("corpus/catalog/*/images.parquet"))
frame = pandas.concat(pandas.read_parquet(file, partitioning=None) for file in files)
```

```python
import polars

frame = polars.read_parquet("corpus/catalog/*/images.parquet", hive_partitioning=False)
```

```python
import duckdb

frame = duckdb.sql("FROM read_parquet('corpus/catalog/*/images.parquet', hive_partitioning = false)")
```
"""


def page() -> str:
    """docs/catalog.md."""
    schemas = {
        "columns": CATALOG_SCHEMA,
        "previews": PREVIEW_SCHEMA,
        "features": FEATURES_SCHEMA,
        "duplicates": DUPLICATES_SCHEMA,
    }
    tables = {name: "\n".join(map(_line, schema)) for name, schema in schemas.items()}
    return _PAGE.format(version=SCHEMA_VERSION, **tables)


def _line(field: pa.Field) -> str:
    kind = f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type)
    words = [f"`{field.name}`", kind if field.nullable else f"{kind}, not null"]
    words += [field.metadata.get(b"unit", b"").decode(), field.metadata[b"description"].decode()]
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


if __name__ == "__main__":
    print(page(), end="")
