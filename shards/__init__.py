"""Voxels on disk: volumes and packs in Zarr, and back one box at a time."""
