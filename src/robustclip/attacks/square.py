"""Square Attack (Andriushchenko et al., 2020): random search that only asks the classifier for its scores."""

from functools import partial

import torch
from torch import Tensor

from robustclip.attacks.ascent import NORMS, Outcome, best_of
from robustclip.attacks.base import Attack, Classifier
from robustclip.attacks.losses import margin
from robustclip.checks import check_range
from robustclip.component import component
from robustclip.models import count_passes, uncount
from robustclip.randomness import own_noise

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries, where the share p of pixels is halved
CHUNK = 128  # queries for which random numbers are drawn at once
TOGETHER = 64  # images a classifier sees in hardly more time than one


@component
class Square(Attack):
    """Change one random square of the image at a time and keep what raises the margin; no gradient is used.

    `p_init` is the share of pixels in the first squares; it shrinks as queries are spent. When few images stand, their
    next squares are shown together; what comes after the first that helps is shown again, on top of it, and not counted
    before. Squares that change nothing are not shown. So what an image takes depends on no other one.
    """

    queries: int = 5000
    p_init: float = 0.8
    norm: str = "linf"
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("p_init", self.p_init, 0, 1)

    def passes(self, classes: int) -> tuple[int, int]:
        """One to see which images stand, and the queries."""
        return 1 + self.restarts * self.queries, 0

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The first image that fools, else the one of highest margin over all restarts."""
        seeds = (self.seed + 7919 * restart for restart in range(self.restarts))
        return best_of((partial(self._search, classifier, images, labels, seed) for seed in seeds), images)

    def _search(self, classifier: Classifier, images: Tensor, labels: Tensor, seed: int, standing: Tensor) -> Outcome:
        """One run on the images `standing`: the best, their margins, which fool; those that do leave at once."""
        search = Search(self, classifier, images[standing], labels[standing], seed)
        while len(rows := search.left()):
            search.ask(rows)
        return Outcome(search.best, search.highest, search.broken)

    def shares(self, queries: Tensor) -> Tensor:
        """The share p of the image's pixels in the squares of these queries."""
        halvings = torch.tensor(HALVINGS, device=queries.device)
        return self.p_init / 2.0 ** torch.bucketize(queries * 10_000 // self.queries, halvings).double()


class Search:
    """The state of one run: the best images so far, their margins, which of them fool, and the queries they took."""

    def __init__(self, attack: Square, classifier: Classifier, images: Tensor, labels: Tensor, seed: int) -> None:
        self.attack, self.classifier, self.images, self.labels, self.seed = attack, classifier, images, labels, seed
        self.squares = SQUARES[attack.norm](images, attack.eps)
        self.best = self.squares.start(images, own_noise(images.float(), seed, self.squares.at_start))
        self.highest, self.broken = self.judge(self.best, labels)
        self.asked = torch.ones_like(labels)
        self.noise = torch.empty(len(images), CHUNK, self.squares.each, device=images.device)
        self.chunk = torch.full_like(labels, -1)  # the queries, in chunks, that `noise` is for

    def left(self) -> Tensor:
        """The rows that still stand and have queries left."""
        return (~self.broken & (self.asked < self.attack.queries)).nonzero()[:, 0]

    def judge(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Margins, and which points fool."""
        scores = self.attack.look(self.classifier, points)
        return margin(scores, labels), self.attack.won(scores, labels)

    def ask(self, rows: Tensor) -> None:
        """Try the next squares of the images `rows`; the first that helps is taken."""
        asked = self.asked[rows]
        counts = (self.attack.queries - asked).minimum(CHUNK - asked % CHUNK).clamp(max=max(TOGETHER // len(rows), 1))
        place = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        square = torch.arange(len(place), device=rows.device) - (counts.cumsum(0) - counts)[place]
        self.draw(rows, asked // CHUNK)
        points, changed = self.propose(rows[place], asked[place] + square)
        place, square = place[changed], square[changed]
        with count_passes() as passes:
            helped, margins, won = self.compare(points, rows[place])
        first = counts.scatter_reduce(0, place[helped], square[helped], "amin")
        taken = helped & (square == first[place])
        uncount(passes.forward * int((square > first[place]).sum()) // max(1, len(points)))
        to = rows[place[taken]]
        self.best[to], self.highest[to], self.broken[to] = points[taken], margins[taken], won[taken]
        self.asked[rows] = asked + (first + 1).minimum(counts)

    def draw(self, rows: Tensor, chunks: Tensor) -> None:
        """Draw random numbers, uniform in [-1, 1], for the rows whose last ones were for other queries."""
        old = self.chunk[rows] != chunks
        for chunk in chunks[old].unique().tolist():
            new, shape = rows[old & (chunks == chunk)], self.noise.shape[1:]
            self.noise[new] = own_noise(self.images[new].float(), self.seed + 1_000_003 * (chunk + 1), shape)
            self.chunk[new] = chunk

    def propose(self, rows: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The best images of `rows`, each with the square of a query, and which of them that changes."""
        best, shares = self.best[rows], self.attack.shares(queries)
        points = self.squares.propose(self.images[rows], best, self.noise[rows, queries % CHUNK], shares)
        changed = (points != best).flatten(1).any(1)
        return points[changed], changed

    def compare(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which points are better than the best, their margins, and which fool."""
        if not len(points):
            return torch.zeros_like(rows, dtype=torch.bool), self.highest[rows], self.broken[rows]
        margins, won = self.judge(points, self.labels[rows])
        return won | (margins > self.highest[rows]), margins, won


class LinfSquares:
    """Pixels of a square become x + eps or x - eps, one sign for each color; all begin as vertical stripes."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.eps, self.sides = eps, images.shape[-2:]
        self.at_start, self.each = (3, 1, images.shape[-1]), 5  # numbers drawn per image, and per query

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """Stripes one pixel wide, of random sign."""
        return (images + self.eps * noise.sign().to(images)).clamp(0, 1)

    def propose(self, images: Tensor, best: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The best images, each with one new square; `noise` (n, 5) in [-1, 1], shares (n,)."""
        inside = window(noise[:, :2], lengths(shares, self.sides), self.sides)
        changed = images + self.eps * noise[:, 2:].sign().to(images)[:, :, None, None]
        return torch.where(inside, changed.clamp(0, 1), best)


class L2Squares:
    """Energy moves from one square to another, where it takes the shape of two opposite bumps."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.eps, self.sides = eps, images.shape[-2:]
        self.tile = max(min(self.sides) // 5, 1)
        self.tiles = [length // self.tile for length in self.sides]
        self.at_start, self.each = (4, *self.tiles), 8

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """A centered grid of bumps, 5 x 5 on most images."""
        tiles = self._bumps(self.tile, noise.movedim(1, -1).to(images))  # (n, rows, columns, 3, tile, tile)
        grid = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(images), 3, *(self.tile * count for count in self.tiles))
        top, left = ((length - part) // 2 for length, part in zip(self.sides, grid.shape[-2:], strict=True))
        delta = torch.zeros_like(images)
        delta[:, :, top : top + grid.shape[-2], left : left + grid.shape[-1]] = grid
        return self._within(images, delta)

    def propose(self, images: Tensor, best: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
        """The best images, each with one new pattern; `noise` (n, 8) in [-1, 1], shares (n,)."""
        sides = (lengths(shares, self.sides).clamp(min=3) | 1).clamp(max=min(self.sides))
        points = best.clone()
        for side in sides.unique().tolist():
            rows = sides == side
            points[rows] = self._move(images[rows], best[rows], noise[rows], side)
        return points

    def _move(self, images: Tensor, best: Tensor, noise: Tensor, side: int) -> Tensor:
        """Put the energy of two windows, and what the budget leaves, into the first: its old pattern plus a bump."""
        delta = best - images
        first, second = window(noise[:, :2], side, self.sides), window(noise[:, 2:4], side, self.sides)
        unused = (self.eps**2 - (delta**2).sum((1, 2, 3), keepdim=True)).clamp(min=0) / 3
        energy = unused + (delta**2 * (first | second)).sum((1, 2, 3), keepdim=True)
        added = self._bumps(side, noise[:, 4:].to(delta))
        pattern = torch.zeros_like(delta).masked_scatter_(first.expand_as(delta), added) + _unit(delta * first)
        delta = torch.where(first, _unit(pattern) * energy.sqrt(), delta.masked_fill(second, 0))
        return self._within(images, delta)

    def _bumps(self, side: int, noise: Tensor) -> Tensor:
        """Bumps (..., 3, side, side) from `noise` (..., 4): three signs, and a coin that says which way they lie."""
        shape = bumps(side).to(noise)
        lying = torch.where((noise[..., 3] > 0)[..., None, None], shape, shape.T)
        return noise[..., :3].sign()[..., None, None] * lying[..., None, :, :]

    def _within(self, images: Tensor, delta: Tensor) -> Tensor:
        return (images + self.eps * NORMS["l2"].ascend(delta)).clamp(0, 1)


SQUARES = {"linf": LinfSquares, "l2": L2Squares}


def lengths(shares: Tensor, sides: tuple[int, int]) -> Tensor:
    """Sides (n,) of squares that fill these shares of an image."""
    return (shares * sides[0] * sides[1]).sqrt().round().long().clamp(1, min(sides))


def window(noise: Tensor, side: Tensor | int, sides: tuple[int, int]) -> Tensor:
    """Which pixels (n, 1, h, w) lie in a square at the random place that `noise` (n, 2) in [-1, 1] names."""
    inside = []
    for place, length in zip(noise.T, sides, strict=True):
        last = torch.as_tensor(length - side, device=noise.device)
        first = ((place + 1) / 2 * (last + 1)).long().minimum(last)[:, None]
        pixels = torch.arange(length, device=noise.device)
        inside.append((pixels >= first) & (pixels < first + torch.as_tensor(side, device=noise.device).view(-1, 1)))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]


def bumps(side: int) -> Tensor:
    """Two opposite bumps, of unit length together: nested rectangles of height 1/k^2, the smallest with k = 1."""

    def bump(height: int) -> Tensor:
        distance = [(torch.arange(length) - length // 2).abs() for length in (height, side)]
        levels = 1 / torch.arange(1.0, max(height, side) // 2 + 2) ** 2
        level = levels.flip(0).cumsum(0).flip(0)[torch.maximum(distance[0][:, None], distance[1])]
        return level / level.norm()

    both = torch.cat([bump(side // 2), -bump(side - side // 2)])
    return both / both.norm()


def _unit(delta: Tensor) -> Tensor:
    """Each color of each image at unit length."""
    return delta / delta.norm(dim=(2, 3), keepdim=True).clamp(min=1e-12)
