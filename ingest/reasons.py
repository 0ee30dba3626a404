"""Why an image is not in the corpus, and what was repaired in one that is: every code, in one place.

docs/exclusions.md is generated from it.
"""

from __future__ import annotations

EXCLUSIONS: dict[str, str] = {
    "declared": "datasets.yaml names the image as one to leave out, with the reason given there.",
    "excluded_by_user": "overrides.yaml in the raw folder names the image, with the reason given there.",
    "duplicate": "Another file of the dataset has the same bytes, and is kept.",
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
    "not_finite": "Voxels are NaN or infinite, or too large for 32-bit floats.",
    "burned_in_annotation": "The header says that text is drawn into the pixels, which may name the patient.",
    "transparent": "The image has transparent pixels.",
    "volume_count": "The file has not the number of volumes that datasets.yaml or dataset.json names.",
    "unsupported_layout": "More axes or channels than an image has here.",
}
"""Reason codes of excluded images: the image is unfit by rule. No failure."""

FAILURES: dict[str, str] = {
    "unreadable": "The file could not be opened or decoded.",
    "no_permission": "The process may not read the file.",
    "vanished": "The file was there at discovery and is gone.",
    "outside_root": "A link or '..' in the path leads outside the dataset's folder; nothing there is read.",
    "not_a_file": "A folder, pipe, socket, device or endless link has the name of an image file.",
    "unusable_name": "The name has control characters, is no Unicode, or ends as the key of a volume does.",
    "too_large": "More voxels or images than the limit, a file of that size, or memory can hold.",
    "worker_lost": "The worker process died while it read the image, most likely for lack of memory.",
    "internal": "A fault of this program: an error that no rule foresees. Please report it.",
}
"""Reason codes of failed images: the run ends with exit code 1, and a rerun tries them again."""

REMEDIES: dict[str, str] = {
    "excluded_by_user": "To take it back, delete its entry from overrides.yaml and ingest again.",
    "spacing_missing": "Take the original, not a converted copy, or write the true spacing into its header.",
    "spacing_invalid": "Take the original, not a converted copy, or write the true spacing into its header.",
    "uneven_slices": "Download the series again; if it was taken so, resample it to even steps.",
    "mixed_orientation": "Keep the scans in folders of their own, and leave the localizer out.",
    "mixed_shapes": "Keep the scans in folders of their own, and leave the localizer out.",
    "gantry_tilt": "Resample it to perpendicular axes if it is needed.",
    "sheared_affine": "Take the original instead of a registered copy, or resample it to perpendicular axes.",
    "no_pixels": "Compare its size with the publisher's; a report or a plan belongs elsewhere.",
    "constant": "Look at it: an empty or a lost image is best left out of the dataset.",
    "empty_crop": "Look at it: a mask or an empty image is best left out of the dataset.",
    "not_finite": "Take the original, or replace what is no number by the value of the background.",
}
"""What to do, for the codes whose messages tell only what was found; the others' advice is in the message."""

GEOMETRY_FLAGS: dict[str, str] = {
    "unit_converted": "The file states lengths in metres or micrometres; they were converted to millimetres.",
    "pixdim_disagrees": "A NIfTI file's `pixdim` is over 1 % off its affine; the affine was believed.",
    "gantry_tilt": "Slices are shifted against their normal, by up to 30 degrees; spacing is along the normal.",
    "orthonormalised": "The affine's axes are perpendicular but for rounding, and were taken as perpendicular.",
    "in_plane_anisotropic": "The in-plane spacings differ by more than 1 %, and in a volume by at most 10 %.",
    "invalid_spacing_dropped": "A 2-D image's pixel size is zero, negative or infinite, and was dropped.",
    "modality_lut_ignored": "A DICOM file holds a lookup table instead of a rescale; stored values were kept.",
    "negative_slope": "The rescale slope is negative; stored values were reversed: bright stays bright.",
    "inverted": "A DICOM image in MONOCHROME1 was inverted: bright stays bright.",
    "equal_channels": "The three colour channels are equal; one was kept.",
    "banner_possible": "An ultrasound image is lit outside its scan regions: text there may name the patient.",
    "exif_rotated": "The picture was turned upright as its EXIF orientation says.",
}
"""What readers and geometry repaired or noticed: the values of `geometry_flags`."""


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


def full_message(outcome: ExcludedImage | FailedImage) -> str:
    """What was found, and what to do."""
    remedy = REMEDIES.get(outcome.reason)
    return f"{outcome.message.removesuffix('.')}. {remedy}" if remedy else outcome.message


def as_markdown() -> str:
    """The page docs/exclusions.md: `python -m ingest.reasons > docs/exclusions.md`."""

    def table(head: str, texts: dict[str, str]) -> list[str]:
        return [
            f"| {head} | meaning |",
            "| --- | --- |",
            *(f"| `{name}` | {text} |" for name, text in texts.items()),
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
        *table("code", EXCLUSIONS),
        "",
        "## Failed: could not be read",
        "",
        "The run ends with exit code 1, and a rerun tries again.",
        "",
        *table("code", FAILURES),
        "",
        "One failure stands for the whole file or series: of a 4-D file that breaks off in the middle, or "
        "whose checksum is wrong, no volume is kept.",
        "",
        "# What was repaired or noticed",
        "",
        "Column `geometry_flags` of a row, ingested or not, holds any of these.",
        "",
        *table("flag", GEOMETRY_FLAGS),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
