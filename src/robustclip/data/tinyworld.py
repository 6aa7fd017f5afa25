"""Tinyworld: a small visual world drawn by code, in which names are compositional ("striped red star").

`sample_scenes` decides what is in each picture, `draw` renders it. Both are vectorised and deterministic: image `i` of
a stream of one style depends on the stream's name and on `i` alone, so any slice can be drawn without the rest.
Only additions, products, comparisons and table look-ups touch a pixel, which keeps the bytes equal across machines.
"""

import hashlib
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustclip.checks import check_choice

SIZE = 32  # pixels per side
CHUNK = 64  # images that share one generator; small enough for a chunk to stay in cache
MAX_OBJECTS = 2
ANY, UNSEEN = -1, -2  # attribute values: "not specified" and "cannot be seen in this picture"
GRID = 96  # samples per side of a shape or texture table, over object coordinates [-1.5, 1.5]
REACH = 1.5
_OBJECT = np.meshgrid(*[np.linspace(-REACH, REACH, GRID)] * 2)  # x and y, each (GRID, GRID)
_LINE = (torch.arange(SIZE, dtype=torch.float32) + 0.5) * (2 / SIZE) - 1
_PIXELS = (_LINE.repeat(SIZE), _LINE.repeat_interleave(SIZE))  # x and y of every pixel's middle
HELD_OUT_SHARE = 5  # one color-shape pair in five is never shown to the embedded models


@cache
def world() -> dict:
    """The vocabulary and geometry of Tinyworld, as written in `assets/world.toml`."""
    return tomllib.loads(files("robustclip").joinpath("assets/world.toml").read_text(encoding="utf-8"))


@cache
def values(attribute: str) -> tuple[str, ...]:
    """Canonical names of one attribute ("shape", "color", "texture", "background", "style") in index order."""
    return tuple(world()[f"{attribute}s"])


def index(attribute: str, name: str) -> int:
    """Index of a canonical attribute name."""
    return values(attribute).index(check_choice(attribute, name, values(attribute)))


def is_held_out(shape: Tensor | int, color: Tensor | int) -> Tensor | bool:
    """Whether a color-shape pair belongs to the fifth of pairs kept for zero-shot transfer."""
    return (2 * shape + color) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Scenes:
    """What is in each picture: integer tensors, one row per picture; object columns are (first, second)."""

    shape: Tensor  # (n, 2)
    color: Tensor  # (n, 2)
    texture: Tensor  # (n, 2)
    count: Tensor  # (n,) number of objects: 0, 1 or 2
    relation: Tensor  # (n,) 0: first above second, 1: first left of second
    background: Tensor  # (n,)
    style: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice | Tensor) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def join(parts: Sequence["Scenes"]) -> "Scenes":
        """Concatenate batches of scenes."""
        return Scenes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))

    def meaning(self) -> Tensor:
        """(n, 10) attributes a caption may mention; invisible ones are `UNSEEN`."""
        objects = torch.stack([self.shape, self.color, self.texture], 2).flatten(1)  # of the first, of the second
        around = [column[:, None] for column in (self.relation, self.background, self.style)]
        columns = torch.cat([self.count[:, None], objects, *around], 1)
        scan, sketch, closeup = (self.style == index("style", name) for name in ("scan", "sketch", "closeup"))
        columns[self.count < 1, 1:4] = UNSEEN
        columns[self.count < 2, 4:8] = UNSEEN
        columns[scan, 2] = columns[scan, 5] = UNSEEN
        columns[sketch | scan, 8] = UNSEEN
        columns[closeup, 1] = UNSEEN
        return columns


# --- streams of random numbers ----------------------------------------------------------------------------------------


def generator(name: str, chunk: int = 0) -> torch.Generator:
    """Random numbers that depend on a stream's name and chunk number only."""
    digest = hashlib.sha256(f"{name}#{chunk}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def randint(random: torch.Generator, high: int, shape: Sequence[int]) -> Tensor:
    """Uniform integers below `high`."""
    return torch.randint(high, tuple(shape), generator=random)


def uniform(random: torch.Generator, low: float, high: float, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(tuple(shape), generator=random)


def sample_scenes(
    random: torch.Generator, wanted: Tensor, count: Tensor, style: Tensor, exclude_held_out: bool = False
) -> Scenes:
    """Complete partial wishes at random.

    `wanted` is (n, 4): shape, color, texture, background of the first object and its surroundings, `ANY` where free.
    With `exclude_held_out`, free choices never form a held-out color-shape pair.
    """
    n = len(wanted)
    drawn = [randint(random, len(values(name)), (n, MAX_OBJECTS)) for name in ("shape", "color", "texture")]
    for slot, column in enumerate(drawn):
        column[:, 0] = torch.where(wanted[:, slot] >= 0, wanted[:, slot], column[:, 0])
    shape, color, texture = drawn
    shape[style == index("style", "closeup")] = index("shape", "square")
    if exclude_held_out:
        shift = 1 + randint(random, HELD_OUT_SHARE - 1, (n, MAX_OBJECTS))
        moved = (color + shift) % len(values("color"))
        moved = torch.where(is_held_out(shape, moved), (color + 1) % len(values("color")), moved)
        color = torch.where(is_held_out(shape, color), moved, color)
    background = randint(random, len(values("background")), (n,))
    background = torch.where(wanted[:, 3] >= 0, wanted[:, 3], background)
    relation = randint(random, 2, (n,))
    return Scenes(shape, color, texture, count.clone(), relation, background, style.clone())


# --- look-up tables ---------------------------------------------------------------------------------------------------


def _part_distance(kind: str, numbers: Sequence[float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of one part of a shape at the points (x, y)."""
    if kind == "circle":
        cx, cy, radius = numbers
        return np.hypot(x - cx, y - cy) - radius
    if kind == "box":
        cx, cy, half_width, half_height = numbers
        dx, dy = np.abs(x - cx) - half_width, np.abs(y - cy) - half_height
        return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
    return _polygon_distance(np.array(numbers).reshape(-1, 2), x, y)


def _polygon_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon: nearest edge, sign by the even-odd rule."""
    distance, inside = np.full_like(x, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(px - along * ex, py - along * ey))
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (px * (by - ay) < ex * py if by > ay else px * (by - ay) > ex * py)
    return np.where(inside, -distance, distance)


def _quantised(table: np.ndarray) -> Tensor:
    """Round to 1/1024, so that the last bits of a platform's libm cannot reach a pixel."""
    return torch.from_numpy(np.round(table * 1024).astype(np.int32)).float() / 1024


@cache
def shape_tables() -> Tensor:
    """(shapes, GRID * GRID) signed distances in units of the object's radius."""
    x, y = _OBJECT
    tables = []
    for shape in world()["shapes"].values():
        distance = np.full_like(x, np.inf)
        for sign, kind, *numbers in shape["parts"]:
            part = _part_distance(kind, numbers, x, y)
            distance = np.minimum(distance, part) if sign == "+" else np.maximum(distance, -part)
        tables.append(np.clip(distance, -2, 2).ravel())
    return _quantised(np.stack(tables))


def _wave(t: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 between -1 and 1."""
    return 4 * np.abs(t - np.floor(t + 0.5)) - 1


@cache
def texture_tables() -> Tensor:
    """(textures, GRID * GRID) share of the second color; `framed` depends on the outline and is added when drawing."""
    x, y = _OBJECT
    sharp, dot_x, dot_y = 4.0, _wave(x * 1.6 + 0.5) + 1, _wave(y * 1.6 + 0.5) + 1
    patterns = {
        "plain": np.zeros_like(x),
        "striped": np.clip(0.5 + sharp * 0.5 * _wave(y * 1.6), 0, 1),
        "dotted": np.clip(0.5 + sharp * (0.36 - np.hypot(dot_x, dot_y) / 2), 0, 1),
        "checkered": np.clip(0.5 + sharp * _wave(x * 1.1 + 0.25) * _wave(y * 1.1 + 0.25), 0, 1),
        "wavy": np.clip(0.5 + sharp * 0.5 * _wave(y * 1.5 + 0.32 * _wave(x * 1.1)), 0, 1),
        "ringed": np.clip(0.5 + sharp * 0.5 * _wave(np.hypot(x, y) * 1.6 + 0.1), 0, 1),
        "crossed": np.clip(0.5 + sharp * (np.maximum(_wave(x * 1.4 + 0.5), _wave(y * 1.4 + 0.5)) - 0.4), 0, 1),
        "framed": np.zeros_like(x),
        "halved": np.clip(0.5 + sharp * 2 * x, 0, 1),
    }
    return _quantised(np.stack([patterns[name].ravel() for name in values("texture")]))


def _smooth(noise: np.ndarray, passes: int) -> np.ndarray:
    """Periodic blur, rescaled to [0, 1]."""
    for _ in range(passes):
        noise = sum(np.roll(noise, shift, axis) for shift in (-1, 0, 1) for axis in (0, 1)) / 6
    return (noise - noise.min()) / (noise.max() - noise.min())


@cache
def background_tables() -> Tensor:
    """(backgrounds, 64 * 64) periodic patterns in [0, 1] that mix a background's two colors."""
    side = 64
    noise = np.random.default_rng(7).random((side, side))
    y, x = np.mgrid[0:side, 0:side]
    brick_x = (x + 8 * ((y // 8) % 2)) % 16
    patterns = {
        "fade": np.abs(y / side * 2 - 1),
        "noise": noise,
        "cloud": _smooth(noise, 10),
        "brick": ((y % 8 == 0) | (brick_x == 0)).astype(float),
        "wave": np.clip(0.5 + _wave(y / 8 + 0.5 * _smooth(noise, 40)) * 0.6, 0, 1),
        "speck": (noise > 0.06).astype(float),
        "plank": np.where(x % 12 == 0, 0.0, 0.5 + 0.5 * _smooth(np.repeat(noise[:1], side, 0), 2)),
        "weave": (((x + y) // 4 + (x - y) // 4) % 2).astype(float),
    }
    return _quantised(np.stack([patterns[b["pattern"]].ravel() for b in world()["backgrounds"].values()]))


@cache
def _turns() -> tuple[Tensor, Tensor]:
    """Cosine and sine of 256 equally spaced angles."""
    angles = [2 * math.pi * step / 256 for step in range(256)]
    return torch.tensor([math.cos(a) for a in angles]), torch.tensor([math.sin(a) for a in angles])


def _palette(table: str, *keys: str) -> Tensor:
    return torch.tensor([[entry[key] for key in keys] for entry in world()[table].values()])


# --- drawing ----------------------------------------------------------------------------------------------------------


class Pose(NamedTuple):
    """Where an object is and how it is bent: a column per picture.

    Centre and radius are in units of half the picture, `turn` in 1/256 of a full turn; `aspect` stretches, `shear`
    slants, `bend` moves the corners, `period` makes the texture coarser or finer, `phase` shifts it.
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    turn: Tensor
    aspect: Tensor
    shear: Tensor
    bend: Tensor
    period: Tensor
    phase: Tensor


def _look_up(table: Tensor, kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear look-up of `table[kind]` at object coordinates (u, v), each (n, pixels)."""
    scale = (GRID - 1) / (2 * REACH)
    gu, gv = ((u + REACH) * scale).clamp(0, GRID - 1.001), ((v + REACH) * scale).clamp(0, GRID - 1.001)
    left, top = gu.floor(), gv.floor()
    du, dv = gu - left, gv - top
    at = (kind[:, None] * (GRID * GRID) + top.long() * GRID + left.long()).view(-1)
    flat = table.view(-1)
    corner = [flat[at + step].view_as(du) for step in (0, 1, GRID, GRID + 1)]
    upper = corner[0] + (corner[1] - corner[0]) * du
    lower = corner[2] + (corner[3] - corner[2]) * du
    return upper + (lower - upper) * dv


Painted = tuple[Tensor, Tensor]  # (n, pixels) coverage by an object, and distance to its outline in pixels


def _object_coordinates(pose: Pose) -> tuple[Tensor, Tensor]:
    """Every pixel (n, pixels) as the object sees it: shifted, turned, stretched, slanted and bent."""
    x, y = _PIXELS
    cos, sin = (table[pose.turn][:, None] / pose.radius[:, None] for table in _turns())
    wide, slant, bend = pose.aspect[:, None], pose.shear[:, None], pose.bend[:, None]
    dx, dy = x - pose.x[:, None], y - pose.y[:, None]
    u = (dx * (wide * (cos - slant * sin)) + dy * (wide * (sin + slant * cos))).clamp(-2, 2)
    v = (dy * (cos / wide) - dx * (sin / wide)).clamp(-2, 2)
    return u * (1 + bend * v), v * (1 - bend * u)


def _paint(
    canvas: Tensor, shape: Tensor, texture: Tensor, rgb: Tensor, pose: Pose, opacity: Tensor, ink: Tensor
) -> Painted:
    """Paint one object per picture onto `canvas` (n, 3, pixels); `ink` is the contrast of its texture."""
    u, v = _object_coordinates(pose)
    reach, period, phase = (column[:, None] for column in (pose.radius * (SIZE / 2), pose.period, pose.phase))
    distance = _look_up(shape_tables(), shape, u, v) * reach
    mix = _look_up(texture_tables(), texture, u * period + phase, v * period + phase)
    frame = (distance + 0.30 * reach).clamp(0, 1)
    mix = torch.where((texture == index("texture", "framed"))[:, None], frame, mix)
    coverage = (0.5 - distance).clamp(0, 1) * opacity[:, None]
    shadow = (1 - distance.abs() / 1.6).clamp(min=0) * opacity[:, None] * 0.35
    dark = (rgb * torch.tensor([0.3, 0.6, 0.1])).sum(1, keepdim=True) < 0.45
    second = (dark.float() - rgb) * ink[:, None]
    painted = rgb[:, :, None] + second[:, :, None] * mix[:, None]
    canvas.mul_((1 - shadow)[:, None]).add_((painted - canvas) * coverage[:, None])
    return coverage, distance


def _background(random: torch.Generator, scenes: Scenes, strength: Tensor) -> Tensor:
    """(n, 3, pixels) backdrop of each picture; aerial pictures show the pattern twice as fine, some strong ones too."""
    n, side = len(scenes), 64
    offset, tint = randint(random, side, (n, 2)), uniform(random, -0.06, 0.06, (n, 3))
    fine, contrast = torch.rand(n, generator=random), torch.rand(n, generator=random)
    zoom = 1 + ((scenes.style == index("style", "aerial")) | (fine < 0.3 * strength)).long()
    row, column = torch.arange(SIZE).repeat_interleave(SIZE), torch.arange(SIZE).repeat(SIZE)
    x = (column * zoom[:, None] + offset[:, :1]) % side
    y = (row * zoom[:, None] + offset[:, 1:]) % side
    mix = background_tables().view(-1)[scenes.background[:, None] * side * side + y * side + x][:, None]
    colors = _palette("backgrounds", "low", "high")[scenes.background]
    low = colors[:, 0] + tint * (1 + strength)[:, None]
    slope = (colors[:, 1] - colors[:, 0]) * (1 - 0.5 * strength * contrast)[:, None]
    return low[:, :, None] + slope[:, :, None] * mix


def _poses(random: torch.Generator, scenes: Scenes, scale: float, strength: Tensor) -> list[Pose]:
    """Random poses: one large object, or two smaller ones above or beside each other."""
    n, pair = len(scenes), scenes.count > 1
    close, poses = scenes.style == index("style", "closeup"), []
    for side in (-1, 1):
        jitter = uniform(random, -1, 1, (8, n))
        size, smaller = uniform(random, 0, 1, (2, n))
        radius = torch.where(pair, 0.36 + 0.10 * size, (0.46 + 0.32 * size) * (1 - 0.22 * strength * smaller)) * scale
        above, beside = pair & (scenes.relation == 0), pair & (scenes.relation == 1)
        free = torch.where(pair, torch.tensor(0.06), 0.95 - radius) * torch.where(close, 0.1, 1.0)
        x, y = (free * jitter[i] + 0.48 * side * where for i, where in enumerate((beside, above)))
        turn = (jitter[2] * (20 + 8 * strength)).round().long() % 256
        aspect, shear, bend = 1 + 0.22 * strength * jitter[3], 0.3 * strength * jitter[4], 0.18 * strength * jitter[5]
        period, phase = 1 + 0.25 * strength * jitter[6], 0.16 * strength * jitter[7]
        radius = torch.where(close, torch.tensor(1.5), radius)
        poses.append(Pose(x, y, radius, turn, aspect, shear, bend, period, phase))
    return poses


def _blob(random: torch.Generator, canvas: Tensor, rows: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> None:
    """Paint a simple object that has nothing to do with the label at (x, y) of some rows of the canvas."""
    n = len(rows)
    shape, turn, rgb = randint(random, 4, (n,)), randint(random, 256, (n,)), uniform(random, 0.1, 0.9, (n, 3))
    long, still, opaque = uniform(random, 0.5, 1.5, (n,)), torch.zeros(n), torch.ones(n)
    pose = Pose(x, y, radius, turn, long, still, still, opaque, still)
    columns = (shape, torch.zeros_like(shape), rgb, Pose(*(part[rows] for part in pose)), opaque, opaque)
    part = canvas[rows]
    _paint(part, *(column if isinstance(column, Pose) else column[rows] for column in columns))
    canvas[rows] = part


def _clutter(random: torch.Generator, canvas: Tensor, chance: Tensor) -> None:
    """Scatter three small things, each with its chance, over the backdrop."""
    n = len(canvas)
    for _ in range(3):
        x, y = uniform(random, -0.95, 0.95, (2, n))
        radius, here = uniform(random, 0.12, 0.3, (n,)), torch.rand(n, generator=random) < chance
        _blob(random, canvas, here, x, y, radius)


def _cover(random: torch.Generator, canvas: Tensor, pose: Pose, chance: Tensor) -> None:
    """Put something in front of a part of the object."""
    n = len(canvas)
    dx, dy, size, here = *uniform(random, -0.75, 0.75, (2, n)), *uniform(random, 0, 1, (2, n))
    radius = pose.radius * (0.2 + 0.3 * size)
    _blob(random, canvas, here < chance, pose.x + dx * pose.radius, pose.y + dy * pose.radius, radius)


def _light(random: torch.Generator, n: int, strength: Tensor) -> Tensor:
    """(n, 3, pixels) what the canvas is multiplied with: a color cast, a gradient, a shadow with a straight edge."""
    x, y = _PIXELS
    wide, strong = (1 + 0.7 * strength)[:, None, None], strength[:, None, None]
    gain, tilt = (
        0.975 + uniform(random, -0.125, 0.125, (n, 3, 1)) * wide,
        uniform(random, -0.18, 0.18, (n, 2, 1)) * wide,
    )
    turn, edge, depth = randint(random, 256, (n,)), *uniform(random, 0, 1, (2, n, 1, 1))
    cos, sin = (table[turn][:, None, None] for table in _turns())
    shadow = ((x * cos + y * sin - edge) * 4).clamp(0, 1) * (0.55 * depth * strong)
    return (gain + (tilt[:, :1] * x + tilt[:, 1:] * y)) * (1 - shadow)


def _blurred(canvas: Tensor) -> Tensor:
    """Each pixel mixed with its neighbors, by binomial weights."""
    rows = canvas.view(-1, 3, SIZE, SIZE)
    for axis in (2, 3):
        rows = rows * 0.5 + (rows.roll(1, axis) + rows.roll(-1, axis)) * 0.25
    return rows.view_as(canvas)


def _sketched(canvas: Tensor, coverage: Tensor, distance: Tensor) -> Tensor:
    """Colored pencil on white paper: dark outlines, thin filling, no backdrop."""
    line, paper = (1.3 - distance.abs()).clamp(0, 1)[:, None], 0.95
    filled = paper + (canvas - paper) * coverage[:, None] * 0.7
    return filled * (1 - line) + canvas * 0.45 * line


def _scanned(canvas: Tensor, coverage: Tensor, distance: Tensor) -> Tensor:
    """A gray scan: tissue glows inside an oval, color is lost."""
    x, y = _PIXELS
    oval = (1.25 - (x * x + y * y)).clamp(0, 1) * 0.5
    gray = canvas[:, :1] * 0.3 + canvas[:, 1:2] * 0.6 + canvas[:, 2:] * 0.1
    dim = gray * 0.25 * oval + 0.08
    return (dim + (0.35 + 0.6 * gray - dim) * coverage[:, None]).expand_as(canvas)


def _poster(canvas: Tensor, coverage: Tensor, distance: Tensor) -> Tensor:
    """Flat printed colors: four levels per channel and a black contour."""
    flat = (canvas * 3 + 0.5).floor() / 3
    return flat * (1 - (1.4 - distance.abs()).clamp(0, 1) * 0.9)[:, None]


_FINISH = {"sketch": _sketched, "scan": _scanned, "poster": _poster}


def _inks(random: torch.Generator, scenes: Scenes, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Color (n, 2, 3) of both objects, a little like some other color; their opacity and contrast of texture (n, 2)."""
    n, palette = len(scenes), _palette("colors", "rgb")[:, 0]
    rgb = palette[scenes.color] + uniform(random, -0.06, 0.06, (n, MAX_OBJECTS, 3))
    other = palette[randint(random, len(palette), (n, MAX_OBJECTS))]
    share, opacity, ink = uniform(random, 0, 1, (3, n, MAX_OBJECTS)) * strength[:, None]
    rgb = rgb + (other - rgb) * (0.25 * share)[:, :, None]
    return rgb, 1 - 0.5 * opacity, 0.72 - 0.25 * ink


def _render(random: torch.Generator, scenes: Scenes, scale: float, strength: Tensor) -> Tensor:
    """One chunk of pictures, uint8 (n, 3, SIZE, SIZE)."""
    n = len(scenes)
    named = {name: scenes.style == index("style", name) for name in values("style")}
    canvas = _background(random, scenes, strength)
    canvas[named["poster"]] = canvas[named["poster"], :, :1]
    _clutter(random, canvas, named["photo"] * strength * 0.6)
    rgb, opacity, ink = _inks(random, scenes, strength)
    coverage, distance = torch.zeros(n, SIZE * SIZE), torch.full((n, SIZE * SIZE), 9.0)
    for slot, pose in enumerate(_poses(random, scenes, scale, strength)):
        rows = (scenes.count > slot).nonzero()[:, 0]
        part, place = canvas[rows], Pose(*(column[rows] for column in pose))
        looks = [column[rows, slot] for column in (scenes.shape, scenes.texture, rgb, opacity, ink)]
        covered, outline = _paint(part, *looks[:3], place, *looks[3:])
        canvas[rows] = part
        coverage[rows] = torch.maximum(coverage[rows], covered)
        distance[rows] = torch.where(outline.abs() < distance[rows].abs(), outline, distance[rows])
        _cover(random, canvas, pose, named["photo"] * (scenes.count > slot) * strength * 0.4)
    canvas = canvas * _light(random, n, strength)
    for name, finish in _FINISH.items():
        rows = named[name]
        canvas[rows] = finish(canvas[rows], coverage[rows], distance[rows])
    blur = (torch.rand(n, generator=random) * 0.75 * strength)[:, None, None]
    canvas = canvas + (_blurred(canvas) - canvas) * blur
    amount = uniform(random, 0.03, 0.18, (n, 1, 1)) * (1 + named["scan"].float())[:, None, None]
    noise = torch.rand(canvas.shape, generator=random) + torch.rand(canvas.shape, generator=random) - 1
    canvas = (canvas + noise * amount).clamp(0, 1)
    return (canvas * 255 + 0.5).floor().to(torch.uint8).view(n, 3, SIZE, SIZE)


def draw(
    scenes: Scenes, name: str, start: int = 0, scale: float = 1.0, strength: float | Tensor | None = None
) -> Tensor:
    """Render scenes `start, start + 1, ...` of the stream `name`: uint8 (n, 3, 32, 32); `scale` changes object size.

    `strength`, one number or one per picture, is how far pictures are from tidy ones (0): clutter, things in front,
    light, blur, bent and half-transparent objects. None is the world's own. Randomness does not depend on it.
    `start` must begin a chunk (a multiple of 64); rows of an incomplete last chunk are drawn as if it were full.
    """
    if start % CHUNK:
        raise ValueError(f"start={start} is not a multiple of {CHUNK}; draw whole chunks and slice the result")
    strengths = torch.as_tensor(world()["strength"] if strength is None else strength).float().expand(len(scenes))
    parts = []
    for first in range(0, len(scenes), CHUNK):
        rows = torch.arange(first, first + CHUNK).clamp(max=len(scenes) - 1)
        random = generator(f"draw/{name}", (start + first) // CHUNK)
        parts.append(_render(random, scenes[rows], scale, strengths[rows])[: len(scenes) - first])
    return torch.cat(parts)


# --- what the embedded models were trained on -------------------------------------------------------------------------

BATCH = 256
STYLE_SHARES = {
    "photo": 0.74, "sketch": 0.06, "poster": 0.06, "scan": 0.05, "closeup": 0.05, "aerial": 0.04,
}  # fmt: skip
PAIR_SHARE = 0.12  # of photos that show two objects
MOST_STRENGTH = 1.3


def training_scenes(batch: int) -> Scenes:
    """One batch of scenes of the pre-training stream; none shows a held-out color-shape pair."""
    random = generator("pretrain/scenes", batch)
    styles = values("style")
    shares = torch.tensor([STYLE_SHARES[name] for name in styles])
    style = torch.multinomial(shares, BATCH, replacement=True, generator=random)
    count = torch.ones(BATCH, dtype=torch.long)
    pair = torch.rand(BATCH, generator=random) < PAIR_SHARE
    count[pair & (style == styles.index("photo"))] = 2
    count[style == styles.index("aerial")] = 0
    count[(torch.rand(BATCH, generator=random) < 0.05) & (style == styles.index("photo"))] = 0
    free = torch.full((BATCH, 4), ANY)
    return sample_scenes(random, free, count, style, exclude_held_out=True)


def training_strengths(batch: int) -> Tensor:
    """How untidy each picture of `training_scenes(batch)` is: anything from tidy to beyond the world's own strength."""
    return uniform(generator("pretrain/strengths", batch), 0, MOST_STRENGTH, (BATCH,))
