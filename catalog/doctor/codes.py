"""Every code of a finding with its severity, meaning and advice; nobody else defines codes.

`python -m catalog.doctor.codes > docs/doctor.md` writes the page that lists them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from catalog.doctor.robust import BEYOND, LEAST, MOST_SHARE
from catalog.errors import SetupError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

BRIGHTEST_AIR, DARKEST_TISSUE = -150.0, -100.0
"""HU. An image whose bright end is below the one is of air; whose minimum is above the other has no air or
fat."""
DENSE_MEAN, DENSE_BRIGHT = 300.0, 1000.0
"""HU. Mean and bright end of an image without air beyond which it is no masked or clipped image, but bone
alone."""
LOWEST_HU, HIGHEST_HU = -1300.0, 4000.0
"""HU: air with the noise of a sharp kernel, and metal: beyond them nothing is measured, only computed."""
NARROW_HU = 256.0
"""Range of values, in HU, in which air and tissue have no room: a display window of 8 bits or less."""
FEWEST_STEPS = 7
"""Stored steps between the dark and the bright end up to which an image is as good as constant, or a mask."""
EMPTY_MEAN, EMPTY_CROP = 0.02, 0.02
"""Mean over bright end, both above the minimum, and share of the file's voxels that the crop kept."""
LONGEST_MM, SHORTEST_MM = 2500.0, 10.0
"""Extents of an image that no scan of a person goes beyond: longer than a table, or less than a finger nail."""
IN_PLANE = 0.01
"""Relative difference of the in-plane spacings beyond which they are told of; in 2-D images IN_PLANE_2D."""
IN_PLANE_2D = 0.10
NEAR_GREY_MEAN, NEAR_GREY_P99 = 4.0, 16.0
"""Grey levels of 255 by which the channels of a preview differ, in the mean and in 99 % of its pixels, at
most."""
PREVIEWS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Code:
    """What a code stands for."""

    severity: Severity
    title: str
    """In a few words, for headings."""
    meaning: str
    """When an image has it."""
    advice: str
    """What to look at, and what to do."""


_EXCLUDE = "exclude it in overrides.yaml"

CODES: dict[str, Code] = {
    "ct_intercept": Code(
        "error",
        "CT not in Hounsfield units",
        f"CT that has no voxel below {DARKEST_TISSUE:g} HU, a mean above {DENSE_MEAN:g} and a bright end "
        f"(p99.5) above {DENSE_BRIGHT:g} HU, as where the intercept of -1024 is missing; or whose bright end "
        f"is below {BRIGHTEST_AIR:g} HU, as where it was subtracted twice.",
        "Compare slope and intercept with the original. Take the original instead of the converted copy, or "
        f"{_EXCLUDE}.",
    ),
    "ct_outside_hu": Code(
        "warning",
        "CT beyond Hounsfield units",
        f"CT whose dark end (p0.5) is below {LOWEST_HU:g} HU, or whose bright end (p99.5) is above "
        f"{HIGHEST_HU:g} HU: one voxel in 200 or more has a value that no tissue, air or bone has.",
        "Look for a wrong slope or intercept, padding that the header does not declare, or a rescaling.",
    ),
    "ct_narrow": Code(
        "warning",
        "CT with a narrow range",
        f"CT whose values span {NARROW_HU:g} HU or less, which holds either air or tissue, not both: rescaled "
        "to 8 bits or to 0 to 1, or clipped to a display window.",
        "Take the original. The loader's window does not make up for what was clipped.",
    ),
    "ct_masked": Code(
        "note",
        "CT without air",
        f"CT that has no voxel below {DARKEST_TISSUE:g} HU, but a mean that tissue can have: masked to an "
        "organ, skull-stripped, or clipped at the dark end.",
        "Fine where the dataset says so. Else look for a wrong intercept of some hundred HU.",
    ),
    "near_constant": Code(
        "error",
        "near-constant image, or a mask",
        f"Dark and bright end (p0.5 and p99.5 of the voxels above the minimum) are {FEWEST_STEPS} stored steps "
        "apart or less.",
        f"Most often a label map among the images: extend `ignore` of its entry. Else {_EXCLUDE}.",
    ),
    "mostly_empty": Code(
        "warning",
        "mostly empty image",
        "More than half of the voxels have the minimum, and the mean above it is less than "
        f"{EMPTY_MEAN:.0%} of the bright end above it; or the crop to the foreground kept less than "
        f"{EMPTY_CROP:.0%} of a volume's voxels.",
        f"Look for lost slices, a mask, or a scan that was broken off, and {_EXCLUDE}.",
    ),
    "impossible_extent": Code(
        "error",
        "impossible size in mm",
        f"An extent of a volume, slices times spacing, is more than {LONGEST_MM:g} mm, or none is more than "
        f"{SHORTEST_MM:g} mm (not looked at in OCT).",
        "The spacing is in another unit than millimetres, or belongs to another axis: correct the header, or "
        f"{_EXCLUDE}.",
    ),
    "spacing_outlier": Code(
        "warning",
        "unusual spacing",
        "Spacing between slices or in-plane is unlike that of the dataset's images of this modality.",
        "A factor of 10 or 25.4 is a unit, a swap with another image's is a wrong axis; else it may be a scout "
        "or another protocol, which does no harm.",
    ),
    "shape_outlier": Code(
        "note",
        "unusual shape",
        "Slices, rows or columns are unlike those of the dataset's images of this modality.",
        "Look for cut or joined series, localizers, and axes that changed places.",
    ),
    "intensity_outlier": Code(
        "warning",
        "unusual intensities",
        "Dark end (p0.5), mean or bright end (p99.5) is unlike that of the dataset's images of this modality; "
        "in MRI and PET compared as factors, elsewhere as differences, in real units.",
        "Look for another rescaling, an inverted image, an artefact, or an image of another modality.",
    ),
    "mixed_group": Code(
        "note",
        "several protocols in one group",
        "So many images of this dataset and modality are unlike its median that they are no outliers but a "
        "second kind; none of them is told of by itself.",
        "`pumit-data stats --by dataset,modality` and the report show the spread. Split the modality in its "
        "entry if the kinds have names.",
    ),
    "depth_rule_disagrees": Code(
        "warning",
        "depth axis in doubt",
        "Header or entry name one depth axis and the spacings another: the named one was overridden because "
        "its in-plane spacings differ by more than 10 % (rule `overridden`), or it was taken although another "
        "axis' spacing differs most.",
        "Look at the preview: the first picture must be a slice as it was scanned. If not, set `depth_axis` of "
        f"its entry, or {_EXCLUDE}.",
    ),
    "depth_axis_unlike_siblings": Code(
        "warning",
        "another depth axis than its siblings",
        "Nearly all images of the dataset and modality were scanned along one anatomical axis, this one along "
        "another.",
        "Look at the preview. Sagittal or coronal scans may be meant; a wrong orientation is not.",
    ),
    "orientation_unlike_siblings": Code(
        "note",
        "another orientation than its siblings",
        "The axes of the file run otherwise than in nearly all files of the dataset and modality.",
        "Ingest turned it as its header says. Look at the preview: if it shows the patient upside down or "
        "turned, the header is wrong.",
    ),
    "orientation_missing": Code(
        "warning",
        "no orientation, though its siblings have one",
        "The file does not say how its axes run, and nearly all files of the dataset and modality do. It was "
        "stored as it lies in the file, and may be turned or mirrored.",
        f"Take the original, not a converted copy, or {_EXCLUDE}.",
    ),
    "in_plane_anisotropy": Code(
        "warning",
        "unequal in-plane spacings",
        f"The spacings of rows and columns differ by more than {IN_PLANE:.0%} (2-D images: {IN_PLANE_2D:.0%}).",
        "In a scan they are equal: look for a wrong depth axis, or a resampled copy.",
    ),
    "colour_unexpected": Code(
        "warning",
        "colour in a grey modality",
        "A radiograph, ultrasound, CT, MRI, PET or OCT image has three different channels. (The previews of "
        f"the first {PREVIEWS_LOOKED_AT:,} of a dataset and modality are looked at: `grey_as_colour`.)",
        "Look for Doppler, coloured annotations, screenshots, or a wrong modality.",
    ),
    "grey_as_colour": Code(
        "warning",
        "grey stored as colour",
        "Three channels that differ, in the preview, as little as by the rounding of a JPEG.",
        "It takes three times the space, and is stored as colour. Take the original, or convert it to grey.",
    ),
    "equal_channels": Code(
        "note",
        "grey in a file with colours",
        "The three channels of the file are equal; ingest kept one, and nothing is lost.",
        "Nothing must be done. It tells of a converted copy, which may have lost more than colours.",
    ),
    "channels_unlike_siblings": Code(
        "warning",
        "colour where siblings are grey, or the reverse",
        "The image has another number of channels than nearly all of the dataset and modality.",
        "Look for scans of paper, screenshots, or images in another place than they belong.",
    ),
}
"""By code, in the order in which they are shown within a severity."""


_PAGE = """\
# What doctor looks for

<!-- Made by `python -m catalog.doctor.codes > docs/doctor.md` from catalog/doctor/codes.py. -->

`pumit-data doctor` reads the catalog, and few previews, and no voxel. It tells what looks wrong by its numbers:
nothing of it is proven, and an image may be as it should be. So findings are no failures: the command ends with
0 unless the call is wrong, whatever it finds; `--json` is for scripts that want to be stricter.

| code | severity | an image has it when | what to do |
| --- | --- | --- | --- |
{codes}

An `error` cannot be an image as it should be, a `warning` deserves a look, a `note` is good to know.

## What is unusual

Images are compared within their dataset and modality, if there are at least {least} that have the value. Robust
z is the distance from the median in units of 1.4826 times the median of such distances, on the image's side of
the median: for values of a normal distribution, standard deviations. Spacings, shapes, and intensities of MRI
and PET are compared by their logarithms, so that a factor counts and not the unit. The unit of the distances is
not less than 5 % for spacings, 10 % for shapes and for intensities of MRI and PET, and 2 % of the usual range
of intensities elsewhere: in a group of equal images small differences are nothing. Beyond {beyond:g} an image
is an outlier.

If more than {share:.0%} of a group (and more than one image) lie beyond, the group is a mixture: one
`mixed_group` tells of it, and no image. In the same way an image is unlike its siblings where at least
{rest:.0%} of them, or all but it, have the same value.

## Leaving images out

```sh
pumit-data doctor --data /corpus --out suspects.html      # each suspect beside a usual image
pumit-data doctor --data /corpus --exclude ct_intercept --exclude spacing_outlier:amos \\
    --write-overrides /scans/overrides.yaml
pumit-data ingest amos --raw /scans --data /corpus        # decides anew what the file names, and nothing else
```

`overrides.yaml` lies in the raw folder and is yours: read it, delete what you think is fine, add what you saw.

```yaml
- dataset: amos
  key: amos_0001                # or glob: "amos_05*"; KEY#0003 is one volume of a file with several
  action: exclude
  reason: spacing 10 times that of its siblings
  finding: spacing_outlier      # may be left out
```

Images that it names stay in the catalog as excluded, with the reason code `excluded_by_user`; their voxels
leave the corpus. A volume that is left out costs no reading of others. 2-D images share an array, so that the
other images of a pack are read again. Whom the validation set holds out, and how files share a weight, does not
change. Without its entry the image comes back as it was, to the same bytes.
"""


def check_codes(codes: Iterable[str]) -> None:
    """Raise SetupError for what is no code; the message names the closest and all."""
    for code in codes:
        if code not in CODES:
            close = difflib.get_close_matches(code, CODES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SetupError(f"there is no finding {code!r}.{hint} Known: {', '.join(CODES)}.")


def page() -> str:
    """docs/doctor.md."""
    lines = (
        f"| `{name}` | {code.severity} | {code.meaning} | {code.advice[0].upper()}{code.advice[1:]} |"
        for name, code in sorted(CODES.items(), key=lambda item: SEVERITIES.index(item[1].severity))
    )
    return _PAGE.format(
        codes="\n".join(lines), least=LEAST, beyond=BEYOND, share=MOST_SHARE, rest=1 - MOST_SHARE
    )


if __name__ == "__main__":
    print(page(), end="")
