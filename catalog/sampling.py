"""How often an image is drawn at each level of anisotropy, and with which scales, in closed form.

A batch holds images of one DA level only, and the level is that of the *scaled* spacings. So instead of
drawing images and scales and sorting them into levels, the level is drawn first: for every image the
probability of each level under random scaling is known exactly (`level_probabilities`), and scales can be
drawn conditional on a level without rejection (`draw_scales`).

With in-plane scale x ~ U(low, high) or 1, depth scale z ~ U(0.8, 1.25) or 1, and DA the anisotropy of the
image, level a means  bound[a] <= DA * z / x < bound[a + 1].  Four cases mix: no scaling, in-plane, depth,
both. The first three are intervals of uniform distributions; for the last, the density of x given the level
is piecewise linear, so its integral is piecewise quadratic and has a closed inverse.

Scales above 1 mean a larger field of view (coarser voxels), as in the paper's sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from catalog.spacing import MAX_DA_LEVEL

Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LEVELS = MAX_DA_LEVEL + 1

# The outermost bounds are ends that no scaled anisotropy passes; finite, so that no quotient is 0/0 or inf/inf.
_BOUNDS = np.array([2.0**-40, 2, 4, 8, 16, 32, 2.0**40])
_FLATTEST, _THICKEST = 2.0**-30, 2.0**30


@dataclass(frozen=True, kw_only=True, slots=True)
class CropGeometry:
    """Size of a training crop: a fixed number of tokens, whatever the level."""

    tokens_z: int
    """Tokens along depth of a 3-D crop (tokenizer 4, ViT 5); one slice at level 5 is one token."""
    tokens_x: int
    """Tokens along height and along width (tokenizer 8, ViT 10)."""
    stride: int = 16
    """Voxels per token in-plane, and along depth at level 0."""

    def __post_init__(self) -> None:
        for name in ("tokens_z", "tokens_x", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def side(self) -> int:
        """Height and width of a crop, in voxels."""
        return self.stride * self.tokens_x

    @property
    def max_read_slices(self) -> int:
        """Most slices that are read for one crop, however it is rotated (reference implementation)."""
        return int(1.5 * self.tokens_z * self.stride)

    def depth_stride(self, level: int) -> int:
        """Slices per token at a DA level."""
        _check_level(level)
        return max(self.stride >> level, 1)

    def tokens(self, level: int) -> tuple[int, int, int]:
        """Tokens (depth, height, width) of a crop at a DA level."""
        _check_level(level)
        return (1 if level == MAX_DA_LEVEL else self.tokens_z, self.tokens_x, self.tokens_x)

    def size(self, level: int) -> tuple[int, int, int]:
        """Voxels (D, H, W) of a crop at a DA level."""
        return (self.tokens(level)[0] * self.depth_stride(level), self.side, self.side)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRules:
    """Distribution of the random scales (defaults: the paper's, both stages)."""

    in_plane: tuple[float, float] = (0.75, 2.0)
    """Range of the in-plane scale; the upper end is lowered to where the crop fills the image."""
    in_plane_p: float = 0.5
    """Probability that the in-plane scale is drawn at all."""
    depth: tuple[float, float] = (0.8, 1.25)
    """Range of the depth scale of nearly isotropic images."""
    depth_p: float = 0.3
    """Probability that a nearly isotropic image's depth scale is drawn at all."""
    isotropic_ratio: float = 1.5
    """An image is nearly isotropic if spacing_z is at most this many times its smaller in-plane spacing."""

    def __post_init__(self) -> None:
        for name in ("in_plane", "depth"):
            low, high = getattr(self, name)
            if not 0 < low < high < np.inf:
                raise ValueError(f"{name} must be a range 0 < low < high, got ({low}, {high})")
        for name in ("in_plane_p", "depth_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ImageScales:
    """What the scales of n images may be. All arrays have shape (n,)."""

    rules: ScaleRules
    anisotropy: Reals
    """spacing_z / min(spacing_y, spacing_x) before scaling; a very large number for 2-D."""
    low: Reals
    """Lower end of the in-plane scale."""
    high: Reals
    """Upper end of the in-plane scale; equals `low` where the image is too small to vary."""
    nearly_isotropic: npt.NDArray[np.bool_]
    """Whether the depth may be scaled, and the image rotated out of its plane."""

    def take(self, rows: npt.NDArray[Any]) -> ImageScales:
        """The same for some of the images, in the order of `rows`."""
        return ImageScales(
            self.rules, self.anisotropy[rows], self.low[rows], self.high[rows], self.nearly_isotropic[rows]
        )


def image_scales(
    spacing_zyx: Reals, sides: npt.NDArray[Any], crop: CropGeometry, rules: ScaleRules
) -> ImageScales:
    """Scale ranges of n images.

    Args:
        spacing_zyx: (n, 3) in mm; NaN where unknown. An image without z spacing is 2-D.
        sides: (n,) shorter in-plane size of each image in voxels.
        crop: its side limits the in-plane scale: at `high` the crop spans the whole shorter side.
        rules: the distributions.

    An image shorter than `rules.in_plane[0]` of the crop has the single in-plane scale `low` (the reference
    implementation's range is reversed there).

    Raises:
        ValueError: an image with z spacing lacks an in-plane spacing, or a spacing is not positive.
    """
    z, in_plane = spacing_zyx[:, 0], np.minimum(spacing_zyx[:, 1], spacing_zyx[:, 2])
    flat = np.isnan(z)
    if not np.all(flat | ((z > 0) & (in_plane > 0))):
        raise ValueError("a 3-D image needs three positive spacings")
    anisotropy = np.divide(z, in_plane, out=np.full(len(z), _THICKEST), where=~flat)
    low = np.full(len(z), rules.in_plane[0])
    return ImageScales(
        rules=rules,
        anisotropy=np.clip(anisotropy, _FLATTEST, _THICKEST),
        low=low,
        high=np.clip(sides / crop.side, low, rules.in_plane[1]),
        nearly_isotropic=~flat & (z <= rules.isotropic_ratio * in_plane),
    )


def level_probabilities(scales: ImageScales) -> Reals:
    """Probability of every DA level for n images under random scaling: (n, 6), rows sum to 1."""
    rules = scales.rules
    # The scaled anisotropy lies between these, so an image has two or three levels and the others cost nothing.
    # The room is for rounding: what a level at the edge comes to is computed all the same.
    shrink = np.where(scales.nearly_isotropic, min(rules.depth[0], 1), 1) / np.maximum(scales.high, 1)
    grow = np.where(scales.nearly_isotropic, max(rules.depth[1], 1), 1) / np.minimum(scales.low, 1)
    least, most = scales.anisotropy * shrink * (1 - 1e-12), scales.anisotropy * grow * (1 + 1e-12)
    probabilities = np.zeros((len(scales.anisotropy), LEVELS))
    for level in range(LEVELS):
        rows = np.flatnonzero((most >= _BOUNDS[level]) & (least < _BOUNDS[level + 1]))
        probabilities[rows, level] = _level_probability(scales.take(rows), level)
    return probabilities


def draw_scales(scales: ImageScales, levels: npt.NDArray[Any], uniforms: Reals) -> tuple[Reals, Reals]:
    """Draw (depth scale, in-plane scale) of n images from their distribution given the level.

    Args:
        scales: ranges of the n images.
        levels: (n,) the level each image shall have; must be possible for it.
        uniforms: (n, 3) independent numbers in [0, 1): for the case, the in-plane and the depth scale.

    Returns:
        Two arrays (n,). The scaled anisotropy lies in the level's interval up to rounding.

    Raises:
        ValueError: an image cannot have the level asked for.
    """
    masses = _case_masses(scales, levels)
    impossible = np.flatnonzero(masses.sum(axis=0) <= 0)
    if impossible.size:
        row = impossible[0]
        raise ValueError(f"image {row} (DA {scales.anisotropy[row]:.4g}) never has level {levels[row]}")
    case = _pick(masses.T, uniforms[:, 0])
    in_plane = np.ones(len(case))
    depth = np.ones(len(case))
    for chosen, draw in ((1, _draw_in_plane), (2, _draw_depth), (3, _draw_both)):
        rows = np.flatnonzero(case == chosen)
        if not rows.size:
            continue
        depth[rows], in_plane[rows] = draw(
            scales.take(rows), levels[rows], uniforms[rows, 1], uniforms[rows, 2]
        )
    return depth, in_plane


def _check_level(level: int) -> None:
    if not 0 <= level <= MAX_DA_LEVEL:
        raise ValueError(f"a DA level is 0 to {MAX_DA_LEVEL}, got {level}")


def _case_masses(scales: ImageScales, levels: npt.NDArray[Any]) -> Reals:
    """P(scaled not at all, in-plane, in depth, in both; and the image has the level): (4, n)."""
    rules = scales.rules
    masses = np.zeros((4, len(scales.anisotropy)))
    masses[:3] = _single_masses(scales, levels)
    rows = np.flatnonzero(scales.nearly_isotropic)
    if rows.size:
        both = _both(scales.take(rows), levels[rows])[2].sum(axis=1)
        masses[3, rows] = rules.in_plane_p * rules.depth_p * both
    return masses


def _single_masses(scales: ImageScales, levels: npt.NDArray[Any]) -> Reals:
    """The same of the first three cases, in which at most one scale is drawn: (3, n)."""
    rules, da = scales.rules, scales.anisotropy
    lower, upper = _BOUNDS[levels], _BOUNDS[levels + 1]
    p_x = rules.in_plane_p
    p_z = np.where(scales.nearly_isotropic, rules.depth_p, 0.0)
    masses = np.zeros((3, len(da)))
    masses[0] = (1 - p_x) * (1 - p_z) * ((lower <= da) & (da < upper))
    masses[1] = p_x * (1 - p_z) * (_in_plane_cdf(scales, da / lower) - _in_plane_cdf(scales, da / upper))
    masses[2] = (1 - p_x) * p_z * (_depth_cdf(rules, upper / da) - _depth_cdf(rules, lower / da))
    return masses


def _level_probability(scales: ImageScales, level: int) -> Reals:
    """Probability of one level for n images: (n,). The sum of `_case_masses`, up to rounding, without knots."""
    masses = _single_masses(scales, np.full(len(scales.anisotropy), level))
    rows = np.flatnonzero(scales.nearly_isotropic)
    if rows.size:
        rules, part = scales.rules, scales.take(rows)
        lower, upper = _BOUNDS[level] / part.anisotropy, _BOUNDS[level + 1] / part.anisotropy
        both = _ratio_cdf(part, upper) - _ratio_cdf(part, lower)
        # Where no pair of scales has the level, rounding must not leave it a chance.
        possible = (upper * part.high > rules.depth[0]) & (lower * part.low < rules.depth[1])
        masses[0, rows] += rules.in_plane_p * rules.depth_p * np.where(possible, both, 0).clip(0)
    probability: Reals = masses.sum(axis=0)
    return probability


def _ratio_cdf(scales: ImageScales, bound: Reals) -> Reals:
    """P(depth scale / in-plane scale < bound), given that both are drawn: a mean over in-plane scales x.

    P(depth scale < bound x) is 0, then linear, then 1 in x; its integral is 0, then a parabola, then linear.
    """
    low, high = scales.rules.depth

    def integral(x: Reals) -> Reals:
        value = bound * x
        rise: Reals = (np.clip(value, low, high) - low) ** 2 / (2 * (high - low))
        return (rise + np.maximum(value - high, 0)) / bound

    width = scales.high - scales.low
    certain = _depth_cdf(scales.rules, bound * scales.low)
    return np.divide(integral(scales.high) - integral(scales.low), width, out=certain, where=width > 0)


def _in_plane_cdf(scales: ImageScales, value: Reals) -> Reals:
    """P(in-plane scale <= value), given that it is drawn. A range of length 0 is one certain value."""
    width = scales.high - scales.low
    certain = (value >= scales.low).astype(np.float64)
    return np.clip(np.divide(value - scales.low, width, out=certain, where=width > 0), 0, 1)


def _depth_cdf(rules: ScaleRules, value: Reals) -> Reals:
    """P(depth scale <= value), given that it is drawn."""
    low, high = rules.depth
    return np.clip((value - low) / (high - low), 0, 1)


def _both(scales: ImageScales, levels: npt.NDArray[Any]) -> tuple[Reals, Reals, Reals]:
    """The distribution of the in-plane scale, jointly with the level, when both scales are drawn.

    Returns knots v (n, 6), density at the knots (n, 6) and mass between them (n, 5), where the in-plane scale
    is low + v * (high - low), v in [0, 1]. The density is linear between knots, so the masses are exact.
    """
    lower = (_BOUNDS[levels] / scales.anisotropy)[:, None]
    upper = (_BOUNDS[levels + 1] / scales.anisotropy)[:, None]
    low, width = scales.low[:, None], (scales.high - scales.low)[:, None]
    depth = np.array(scales.rules.depth)
    kinks = np.concatenate([depth / lower, depth / upper], axis=1)
    # A range of length 0 has a constant density: any knots will do.
    inner = np.clip(np.divide(kinks - low, width, out=np.zeros_like(kinks), where=width > 0), 0, 1)
    ends = np.broadcast_to([0.0, 1.0], (len(low), 2))
    knots = np.sort(np.concatenate([ends, inner], axis=1), axis=1)
    x = low + knots * width
    density = _depth_cdf(scales.rules, upper * x) - _depth_cdf(scales.rules, lower * x)
    masses = np.diff(knots, axis=1) * (density[:, 1:] + density[:, :-1]) / 2
    return knots, density, masses


def _draw_in_plane(scales: ImageScales, levels: npt.NDArray[Any], u_x: Reals, _: Reals) -> tuple[Reals, Reals]:
    below = _in_plane_cdf(scales, scales.anisotropy / _BOUNDS[levels + 1])
    up_to = _in_plane_cdf(scales, scales.anisotropy / _BOUNDS[levels])
    v = up_to - u_x * (up_to - below)  # the level's interval is open below and closed above in x
    return np.ones_like(v), scales.low + v * (scales.high - scales.low)


def _draw_depth(scales: ImageScales, levels: npt.NDArray[Any], _: Reals, u_z: Reals) -> tuple[Reals, Reals]:
    ones = np.ones_like(u_z)
    return _depth_given(scales, levels, ones, u_z), ones


def _draw_both(scales: ImageScales, levels: npt.NDArray[Any], u_x: Reals, u_z: Reals) -> tuple[Reals, Reals]:
    knots, density, masses = _both(scales, levels)
    segment = _pick(masses, u_x)[:, None]
    total = masses.sum(axis=1, keepdims=True)
    row = np.arange(len(masses))[:, None]
    before = (np.cumsum(masses, axis=1) - masses)[row, segment]
    rest = np.maximum(u_x[:, None] * total - before, 0)
    start, end = knots[row, segment], knots[row, segment + 1]
    g0, g1 = density[row, segment], density[row, segment + 1]
    length = end - start
    # Solves g0 s + (g1 - g0) s^2 / (2 length) = rest in the form that does not cancel.
    slope = np.divide(g1 - g0, length, out=np.zeros_like(length), where=length > 0)
    root = g0 + np.sqrt(np.clip(g0**2 + 2 * slope * rest, 0, None))
    step = np.divide(2 * rest, root, out=np.zeros_like(root), where=root > 0)
    v = (start + np.clip(step, 0, length))[:, 0]
    x = scales.low + v * (scales.high - scales.low)
    return _depth_given(scales, levels, x, u_z), x


def _depth_given(scales: ImageScales, levels: npt.NDArray[Any], in_plane: Reals, u: Reals) -> Reals:
    """Depth scale given the in-plane scale and the level."""
    low, high = scales.rules.depth
    from_ = _depth_cdf(scales.rules, _BOUNDS[levels] / scales.anisotropy * in_plane)
    to = _depth_cdf(scales.rules, _BOUNDS[levels + 1] / scales.anisotropy * in_plane)
    return low + (high - low) * (from_ + u * (to - from_))


def _pick(masses: Reals, uniforms: Reals) -> Integers:
    """Index drawn with probability proportional to `masses` (n, k), by one uniform number each: (n,)."""
    cumulative = np.cumsum(masses, axis=1)
    index = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(axis=1)
    # u * total may round up to total: the last entry of any mass is meant then.
    last = masses.shape[1] - 1 - np.argmax(masses[:, ::-1] > 0, axis=1)
    picked: Integers = np.minimum(index, last)
    return picked
