"""Synthetic bitewing radiographs with exact masks, for the demo, tests and first experiments.

A scene is drawn in coordinates whose unit is half the shorter side of the image: two rows of teeth
meet near the middle, each crown an enamel cap over dentine with a pulp chamber inside, the roots in
trabecular bone, with carious lesions and restorations. Structures attenuate the beam by A along
each ray and the film shows 1 - exp(-A) (Beer-Lambert), so that the grey levels of the classes
overlap as on real films: a root, bone and a carious crown may be equally grey and distinguishable
only by their position.

The masks hold the seven classes of flags/categories.json; soft tissue and air are background.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from guided_diffusion.images.image_io import write_image
from guided_diffusion.images.masks import write_mask
from guided_diffusion.runtime.errors import UserError

BACKGROUND, ENAMEL, BONE, DENTINE, OTHER, CARIES, PULP = range(7)
SUPERSAMPLING = 3  # odd: the mask is the class of the middle sample, the centre of its pixel


def make_phantom(seed: int, size: tuple[int, int] = (256, 256)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one radiograph and its mask, a function of (seed, size).

    :param size: (height, width) in pixels.
    :return: two uint8 [H x W]; the mask holds classes 0 to 6.
    :raises UserError: if a side is below 1.
    """
    height, width = size
    if height < 1 or width < 1:
        raise UserError(f"phantoms of {height}x{width} pixels: both sides must be at least 1")
    rng = np.random.default_rng(seed)
    scene = _Scene(rng, height, width)
    jaws = [_Jaw(rng, scene, upper) for upper in (True, False)]
    _add_disease(rng, [tooth for jaw in jaws for tooth in jaw.teeth if scene.shows(tooth.centre)])
    for jaw in jaws:
        jaw.draw(scene)
    middle = SUPERSAMPLING // 2
    mask = scene.label[middle::SUPERSAMPLING, middle::SUPERSAMPLING].copy()
    return _expose(rng, scene), mask


def write_dataset(
    folder: str,
    num_unlabelled: int,
    num_train: int,
    num_val: int,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
) -> None:
    """Write distinct phantoms as PNG files in the layout that the scripts expect:

    unlabelled/*.png, Split/TRAIN/{IMG,MASK}/*.png, Split/VAL/{IMG,MASK}/*.png
    """
    parts = (
        ("unlabelled", "", "film", num_unlabelled),
        ("Split/TRAIN/IMG", "Split/TRAIN/MASK", "train", num_train),
        ("Split/VAL/IMG", "Split/VAL/MASK", "val", num_val),
    )
    for part, (image_dir, mask_dir, stem, count) in enumerate(parts):
        for index in range(count):
            own = np.random.SeedSequence([seed, part, index]).generate_state(1, np.uint64)[0]
            image, mask = make_phantom(int(own), size)
            name = f"{stem}_{index:04d}.png"
            write_image(os.path.join(folder, image_dir, name), image)
            if mask_dir:
                write_mask(os.path.join(folder, mask_dir, name), mask)


class _Scene:
    """The sampled plane: coordinates u (right) and v (down), attenuation and class per sample."""

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.unit = min(height, width) / 2  # in pixels
        rows, cols = height * SUPERSAMPLING, width * SUPERSAMPLING
        y = ((np.arange(rows, dtype=np.float32) + 0.5) / SUPERSAMPLING - height / 2) / self.unit
        x = ((np.arange(cols, dtype=np.float32) + 0.5) / SUPERSAMPLING - width / 2) / self.unit
        y, x = np.meshgrid(y, x, indexing="ij")
        self.x, self.y = x, y
        angle = math.radians(rng.normal(0, 2.5))
        zoom = rng.uniform(0.9, 1.1)
        bend = rng.uniform(-0.02, 0.05)  # the curve of Spee
        self.u = (x * math.cos(angle) - y * math.sin(angle)) / zoom
        self.v = (x * math.sin(angle) + y * math.cos(angle)) / zoom + bend * self.u**2
        self.v += np.float32(rng.uniform(-0.1, 0.1))
        self.reach = width / 2 / self.unit / zoom
        self.label = np.zeros((rows, cols), np.uint8)
        self.attenuation = np.zeros((rows, cols), np.float32)
        self.trabeculae = _texture(rng, self, ((4, 0.5), (10, 0.7), (20, 0.5)))
        self.soft_tissue = rng.uniform(0.12, 0.25) + 0.04 * _texture(rng, self, ((1.0, 1.0),))

    def shows(self, u: float) -> bool:
        """Whether a structure at the horizontal position u is in the image."""
        return abs(u) < self.reach - 0.1


def _texture(
    rng: np.random.Generator, scene: _Scene, octaves: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Band-limited noise of unit variance, one float per sample.

    :param octaves: (cells per unit of the scene, strength) of each.
    """
    rows, cols = scene.u.shape
    total = np.zeros((rows, cols), np.float32)
    for cells, strength in octaves:
        shape = [max(3, math.ceil(n / SUPERSAMPLING / scene.unit * cells)) for n in (rows, cols)]
        coarse = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
        total += strength * np.asarray(coarse.resize((cols, rows), Image.Resampling.BICUBIC))
    return (total - total.mean()) / max(float(total.std()), 1e-6)


@dataclass
class _Blob:
    """An ellipse with a wavy edge, in tooth coordinates (p across, q towards the root)."""

    p: float
    q: float
    width: float
    height: float
    phase: float
    contrast: float = 0.0

    def depth(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """1 in the centre, 0 on the edge, negative outside."""
        x, y = (p - self.p) / self.width, (q - self.q) / self.height
        angle = np.arctan2(y, x)
        edge = 1 + 0.12 * np.sin(3 * angle + self.phase) + 0.07 * np.sin(5 * angle - self.phase)
        return 1 - np.hypot(x, y) / edge


@dataclass
class _Tooth:
    """Sizes in scene units; p runs across the tooth, q from the biting edge towards the root."""

    centre: float
    width: float
    crown: float
    root: float
    molar: bool
    upper: bool
    tilt: float
    cusp: float
    enamel: float
    pulp: float
    lesions: list[_Blob] = field(default_factory=list)
    fillings: list[_Blob] = field(default_factory=list)
    full_crown: bool = False
    root_filled: bool = False

    def half_width(self, q: np.ndarray) -> np.ndarray:
        """Half the width of the outline at q: corner, contact bulge, neck, root trunk, tip."""
        crown, root = self.crown, self.root
        neck, trunk, tip = (0.42, 0.39, 0.3) if self.molar else (0.37, 0.31, 0.1)
        at = np.array([-0.1, 0.0, 0.14, 0.4, 0.7, 1.0]) * crown
        at = np.append(at, [crown + 0.5 * root, crown + 0.95 * root, crown + root])
        wide = np.array([0.3, 0.37, 0.46, 0.5, 0.47, neck, trunk, tip, 0.0]) * self.width
        fine = np.linspace(at[0], at[-1], 160)
        kernel = np.hanning(15)[1:-1]
        profile = np.pad(np.interp(fine, at, wide), 6, mode="edge")
        profile = np.convolve(profile, kernel / kernel.sum(), mode="valid")
        return np.interp(q, fine, profile, right=0).astype(np.float32)

    def half_fork(self, q: np.ndarray) -> np.ndarray:
        """Half the distance between the two roots of a lower molar; negative where they are one."""
        if not self.molar or self.upper:
            return np.full_like(q, -1)
        depth = (q - self.crown) / self.root - 0.28
        return np.where(depth > 0, 0.19 * self.width * np.sqrt(np.clip(depth, 0, 1)), -1)

    def biting_surface(self, p: np.ndarray) -> np.ndarray:
        """Where the crown begins, as q: two cusps and a fossa, or one cusp."""
        turn = 2 * np.pi * p / self.width
        wave = 1 + np.cos(2 * turn) if self.molar else 1 - np.cos(turn)
        return self.cusp * wave / 2

    def canals(self, p: np.ndarray, q: np.ndarray, outline: np.ndarray) -> np.ndarray:
        """Where the pulp is: a chamber with two horns, then one canal per root."""
        along = np.clip((q - self.crown) / self.root, 0, 1)
        radius = self.pulp * (0.032 - 0.017 * along)
        if self.molar:
            roots = 0.42 * outline + np.maximum(self.half_fork(q), 0) / 2
            canal = np.abs(np.abs(p) - roots * np.minimum(0.7 + 2 * along, 1)) < radius
            roof, chamber = 0.52 * self.crown, 0.19 * self.width * self.pulp
        else:
            canal = np.abs(p) < radius
            roof, chamber = 0.46 * self.crown, 0.15 * self.width * self.pulp
        floor = self.crown + 0.1 * self.root
        deep = np.clip((q - roof) / (floor - roof), 0, 1)
        room = np.abs(p) < chamber * (1 - 0.4 * deep)
        horns = 0.1 * self.crown * np.cos(np.pi * p / chamber)
        room &= (q > roof + horns) & (q < floor)
        return room | (canal & (q > floor - 0.08))

    def draw(self, scene: _Scene, jaw: "_Jaw") -> None:
        columns = np.flatnonzero((np.abs(scene.u - self.centre) < self.width).any(axis=0))
        if not columns.size:
            return
        window = np.s_[:, columns[0] : columns[-1] + 1]
        q = jaw.q[window]
        p = scene.u[window] - self.centre - math.tan(self.tilt) * (q - 0.2)
        outline = self.half_width(q)
        to_side = np.minimum(outline - np.abs(p), np.abs(p) - self.half_fork(q))  # signed distance
        inside = (to_side > 0) & (q > self.biting_surface(p))
        root = np.where((q > 0.9 * self.crown) & (outline > 0), to_side, -1)
        jaw.near_root[window] = np.maximum(jaw.near_root[window], root)

        kind = self.tissue(p, q, outline, to_side)
        # a cylinder is densest in its middle; the sides of the neck look burnt out
        thickness = np.sqrt(np.clip(1 - (p / np.maximum(outline, 1e-3)) ** 2, 0, 1))
        dense = 0.45 + 0.65 * thickness
        dense[kind == ENAMEL] = 1.6 + 0.5 * thickness[kind == ENAMEL]
        dense[kind == PULP] -= 0.55
        metal = self.metal(p, q, kind == PULP)
        for lesion in self.lesions:
            depth = lesion.depth(p, q)
            kind[depth > 0] = CARIES
            dense *= 1 - lesion.contrast * np.clip(0.35 + 1.5 * depth, 0, 1) * (depth > 0)
        kind[metal], dense[metal] = OTHER, 4.0

        label, attenuation = scene.label[window], scene.attenuation[window]
        in_bone = 0.8 * jaw.bone[window] * (q > jaw.crest(scene.u[window]))
        total = scene.soft_tissue[window] + dense + in_bone
        label[inside] = kind[inside]
        attenuation[inside] = np.maximum(total, attenuation * (kind == DENTINE))[inside]

    def tissue(
        self, p: np.ndarray, q: np.ndarray, outline: np.ndarray, to_side: np.ndarray
    ) -> np.ndarray:
        """The class of each sample inside the tooth, if it were healthy."""
        below = np.clip(1 - q / self.crown, 0, 1)
        core = to_side > self.enamel * below**0.6
        core &= q > 0.6 * self.biting_surface(p) + 1.3 * self.enamel
        enamel = (q < self.crown) & ~core
        pulp = core & (to_side > 0.03) & self.canals(p, q, outline)
        return np.where(enamel, ENAMEL, np.where(pulp, PULP, DENTINE)).astype(np.uint8)

    def metal(self, p: np.ndarray, q: np.ndarray, pulp: np.ndarray) -> np.ndarray:
        """Where the restorations are."""
        metal = np.zeros(p.shape, bool)
        for filling in self.fillings:
            metal |= filling.depth(p, q) > 0
        if self.full_crown:
            metal |= q < (0.92 + 0.08 * np.cos(2 * np.pi * p / self.width)) * self.crown
        if self.root_filled:
            metal |= pulp & (q > 0.8 * self.crown)
        return metal


class _Jaw:
    """One row of teeth in its bone. q: distance from the biting plane towards the roots."""

    def __init__(self, rng: np.random.Generator, scene: _Scene, upper: bool):
        plane = rng.uniform(0.005, 0.05)
        self.q = (-scene.v if upper else scene.v) - np.float32(plane)
        self.teeth = _row_of_teeth(rng, scene.reach, upper)
        self.level = 0.46 + rng.uniform(0.05, 0.17)  # bone recedes with age
        self.wave = (rng.uniform(0.005, 0.03), rng.uniform(5, 9), rng.uniform(0, 6.3))
        density = rng.uniform(0.42, 0.68)
        self.bone = density * np.clip(1 + 0.3 * scene.trabeculae, 0.15, None)
        self.near_root = np.full_like(self.q, -1)  # signed distance to the nearest root

    def crest(self, u: np.ndarray) -> np.ndarray:
        """Where the alveolar bone begins, as q."""
        height, frequency, phase = self.wave
        return self.level + height * np.sin(frequency * u + phase)

    def draw(self, scene: _Scene) -> None:
        here = self.q > -0.03
        depth = self.q - self.crest(scene.u)
        gum = 0.3 / (1 + np.exp(np.clip(-(depth + 0.13) / 0.025, -50, 50)))
        bone = depth > 0
        scene.label[bone] = BONE
        cortex = 0.16 * np.exp(-np.clip(depth, 0, None) / 0.03)
        total = scene.soft_tissue + gum + np.where(bone, self.bone + cortex, 0)
        scene.attenuation[here] = total[here]
        for tooth in self.teeth:
            tooth.draw(scene, self)
        bone = scene.label == BONE
        ligament = bone & (self.near_root > -0.022)
        lamina_dura = bone & ~ligament & (self.near_root > -0.055)
        scene.attenuation[ligament] *= 0.72
        scene.attenuation[lamina_dura] += 0.17


def _row_of_teeth(rng: np.random.Generator, reach: float, upper: bool) -> list[_Tooth]:
    """Premolars on one side, molars on the other, from beyond the left edge to beyond the right."""
    teeth = []
    scale = rng.uniform(0.92, 1.08)
    border = rng.uniform(-0.7, 0.7)
    molars_right = rng.random() < 0.5
    age = rng.uniform(0.75, 1.25)
    edge = -reach - rng.uniform(0.5, 1.0)
    while edge < reach + 0.4:
        molar = (edge > border) == molars_right
        width = scale * (rng.uniform(0.56, 0.66) if molar else rng.uniform(0.38, 0.44))
        tooth = _Tooth(
            centre=edge + width / 2,
            width=width,
            crown=scale * rng.uniform(0.44, 0.5),
            root=scale * rng.uniform(0.72, 0.95),
            molar=molar,
            upper=upper,
            tilt=rng.normal(0, 0.035),
            cusp=rng.uniform(0.03, 0.08),
            enamel=scale * rng.uniform(0.07, 0.095),
            pulp=age * rng.uniform(0.85, 1.15),
        )
        if rng.random() > 0.03:  # else extracted
            teeth.append(tooth)
        edge += width + rng.uniform(0.0, 0.02)
    return teeth


def _add_disease(rng: np.random.Generator, teeth: list[_Tooth]) -> None:
    """Restorations in some teeth, caries in others: between neighbours or under the fossa."""
    if not teeth:
        return
    order = [teeth[i] for i in rng.permutation(len(teeth))]
    restored = order[: rng.integers(1, 4)]
    healthy = order[len(restored) :]
    for tooth in restored:
        _restore(rng, tooth)
    for tooth in healthy[: rng.integers(1, 5)]:
        tooth.lesions.append(_lesion(rng, tooth))


def _restore(rng: np.random.Generator, tooth: _Tooth) -> None:
    """A full crown, or a filling, with or without a second one at a side."""
    width, crown = tooth.width, tooth.crown
    style = rng.random()
    if style < 0.2:
        tooth.full_crown = True
        tooth.root_filled = rng.random() < 0.5
        return
    middle = rng.uniform(-0.1, 0.1) * width
    size = rng.uniform(0.2, 0.33) * width
    depth = rng.uniform(0.2, 0.34) * crown
    phase = rng.uniform(0, 6.3)
    tooth.fillings.append(_Blob(middle, 0.1 * crown, size, depth, phase))
    if style > 0.6:
        p = rng.choice([-1, 1]) * 0.42 * width
        tooth.fillings.append(_Blob(p, 0.3 * crown, 0.16 * width, 0.32 * crown, phase))


def _lesion(rng: np.random.Generator, tooth: _Tooth) -> _Blob:
    """Caries under the fossa of a molar, or at the side of any tooth."""
    phase, contrast = rng.uniform(0, 6.3), rng.uniform(0.45, 0.65)
    if tooth.molar and rng.random() < 0.3:
        p = rng.uniform(-0.1, 0.1) * tooth.width
        q = tooth.cusp + 1.25 * tooth.enamel
        width, height = rng.uniform(0.11, 0.2) * tooth.width, rng.uniform(0.08, 0.13)
    else:
        q = rng.uniform(0.42, 0.68) * tooth.crown
        p = rng.choice([-1, 1]) * float(tooth.half_width(np.array([q]))[0])
        width, height = rng.uniform(0.09, 0.18), rng.uniform(0.07, 0.13)
    return _Blob(p, q, width, height, phase, contrast)


def _expose(rng: np.random.Generator, scene: _Scene) -> np.ndarray:
    """Expose the film: its curve, blur, grain and uneven illumination; uint8 [H x W]."""
    film = 1 - np.exp(-rng.uniform(0.8, 1.05) * scene.attenuation)
    rows, cols = film.shape
    s = SUPERSAMPLING
    film = film.reshape(rows // s, s, cols // s, s).mean(axis=(1, 3))
    film = _blur(film, 0.25 + scene.unit * rng.uniform(0.003, 0.009))
    middle = s // 2
    x, y = scene.x[middle::s, middle::s], scene.y[middle::s, middle::s]
    grain = rng.standard_normal((2, *film.shape)).astype(np.float32)
    grain = grain[0] + 1.5 * _blur(grain[1], 0.8)
    film = np.maximum(film, 0) ** rng.uniform(1.0, 1.5)  # rounding leaves values just below 0
    film = rng.uniform(0.0, 0.08) + film * rng.uniform(0.85, 1.0)
    film *= 1 + rng.uniform(-0.1, 0.1) * x + rng.uniform(-0.1, 0.1) * y
    film += rng.uniform(0.01, 0.025) * grain
    return np.round(255 * np.clip(film, 0, 1)).astype(np.uint8)


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with `sigma` in pixels; edge pixels are repeated."""
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1, dtype=np.float32) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        wide = np.pad(picture, pad, mode="edge")
        length = picture.shape[axis]
        picture = np.zeros_like(picture)
        for k, weight in enumerate(kernel):
            picture += weight * np.take(wide, range(k, k + length), axis=axis)
    return picture
