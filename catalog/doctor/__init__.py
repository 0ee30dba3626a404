"""What looks wrong in a corpus by its numbers: suspects to look at, told from the catalog and its previews
alone."""
