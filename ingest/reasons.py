"""Why an image is not in the corpus: every code, in one place. docs/exclusions.md is generated from it."""

from __future__ import annotations

EXCLUSIONS: dict[str, str] = {
    "declared": "datasets.yaml names the image as one to leave out, with the reason given there.",
    "spacing_missing": "A 3-D file states no spacing.",
    "spacing_invalid": "A spacing is zero, negative, infinite or not a number.",
    "in_plane_spacing": "The in-plane spacings differ by more than 10 % and no other depth axis repairs it.",
    "uneven_slices": "Slice positions along the normal are not evenly spaced.",
    "missing_slices": "A gap in the slice positions: at least one slice of the series is missing.",
    "duplicate_slices": "Several slices lie at one position and do not form separate volumes.",
    "mixed_orientation": "The slices of the series are not parallel: a localizer or a mixed series.",
    "mixed_shapes": "The slices of the series differ in size or pixel format.",
    "single_slice": "A 3-D dataset's series or file has one slice: there is no depth to speak of.",
    "gantry_tilt": "Slices are shifted against their normal by more than 30 degrees.",
    "sheared_affine": "The affine's axes are not perpendicular beyond rounding.",
    "colour_volume": "A 3-D file holds colours instead of intensities.",
    "no_pixels": "The file has no pixel data, or an axis of length zero.",
    "constant": "All voxels have one value.",
    "empty_crop": "No voxel is above the crop threshold in all channels.",
    "not_finite": "Voxels are NaN or infinite.",
    "transparent": "The image has transparent pixels.",
    "unsupported_layout": "More axes or channels than an image has here.",
}
"""Reason codes of excluded images: the image is unfit by rule. No failure."""

FAILURES: dict[str, str] = {
    "unreadable": "The file could not be opened or decoded.",
    "no_permission": "The process may not read the file.",
    "vanished": "The file was there at discovery and is gone.",
    "outside_root": "A link or '..' in the path leads outside the dataset's folder; nothing there is read.",
    "too_large": "The header announces more voxels than the limit, or memory does not hold them.",
    "worker_lost": "The worker process died while it read the image, most likely for lack of memory.",
}
"""Reason codes of failed images: the run ends with exit code 1, and a rerun tries them again."""


class ExcludedImage(Exception):  # noqa: N818 - an outcome, not an error of the program
    """The image is unfit by a rule of the paper or of datasets.yaml; its row tells why."""

    def __init__(self, reason: str, message: str) -> None:
        if reason not in EXCLUSIONS:
            raise ValueError(f"unknown exclusion code {reason!r}")
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[ExcludedImage], tuple[str, str]]:
        return type(self), (self.reason, self.message)


class FailedImage(Exception):  # noqa: N818
    """The image could not be read; its row tells why, and a rerun tries again."""

    def __init__(self, reason: str, message: str) -> None:
        if reason not in FAILURES:
            raise ValueError(f"unknown failure code {reason!r}")
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[FailedImage], tuple[str, str]]:
        return type(self), (self.reason, self.message)


def as_markdown() -> str:
    """The page docs/exclusions.md: `python -m ingest.reasons > docs/exclusions.md`."""

    def table(codes: dict[str, str]) -> list[str]:
        return [
            "| code | meaning |",
            "| --- | --- |",
            *(f"| `{code}` | {text} |" for code, text in codes.items()),
        ]

    lines = [
        "# Why an image is not in the corpus",
        "",
        "Every image that a dataset's rule finds gets a row in the catalog. A row that is not `ingested` "
        "carries one of these codes in `reason`, and in `message` what was found and what to do.",
        "",
        "## Excluded: unfit by rule",
        "",
        "The paper leaves out images that are corrupted or lack consistent spacing. An exclusion is no "
        "failure: the run ends with exit code 0, and a rerun does not try again unless the file or its "
        "entry changes.",
        "",
        *table(EXCLUSIONS),
        "",
        "## Failed: could not be read",
        "",
        "The run ends with exit code 1, and a rerun tries again.",
        "",
        *table(FAILURES),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
