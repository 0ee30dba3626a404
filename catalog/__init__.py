"""One Parquet row per image, pointing at its shard; and the arithmetic of spacing and sampling."""
