"""Raw folders to voxels and catalog rows."""
