"""Catalog and shards to weights."""
