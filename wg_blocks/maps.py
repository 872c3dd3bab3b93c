"""Maps: a height field becomes a relief picture, and a relief picture gives back the facts that it shows.

The palette is a table of colours, each of which stands for one (class, height band, shade), and no colour occurs
twice. So the classes of a picture are read back exactly from its pixels after any lossless round trip, and every fact
is measured on the picture alone. A picture with a single pixel outside of the table is no such map: `measure` then
reports what can be said of any picture (`kind: "picture"`) and claims nothing about land or water.
"""

from __future__ import annotations

import io
import itertools
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from wg_core import Block, Port, current_context
from wg_core.errors import PortValueError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Classes by height: name, lower bound in metres, number of bands, colour at the lower and at the upper end.
_HEIGHTS: Final = (
    ("abyss", -4000.0, 6, (28, 62, 104), (38, 84, 130)),
    ("deep", -1400.0, 6, (40, 90, 137), (62, 124, 166)),
    ("shelf", -450.0, 6, (68, 132, 173), (106, 170, 198)),
    ("shallows", -100.0, 5, (118, 181, 204), (168, 214, 218)),
    ("beach", 0.0, 2, (233, 219, 176), (224, 212, 160)),
    ("lowland", 20.0, 8, (146, 180, 112), (170, 194, 118)),
    ("hills", 200.0, 8, (182, 199, 121), (214, 207, 134)),
    ("upland", 600.0, 8, (213, 196, 128), (192, 158, 106)),
    ("mountain", 1200.0, 8, (184, 147, 103), (156, 126, 104)),
    ("rock", 2000.0, 6, (160, 140, 126), (190, 180, 174)),
    ("snow", 2600.0, 8, (226, 228, 232), (250, 251, 253)),
)
_TOP: Final = 4200.0
# Drawn classes: name, colour.
_DRAWN: Final = (("lake", (96, 160, 200)), ("river", (58, 118, 172)), ("coast", (94, 80, 66)))

CLASSES: Final = tuple(h[0] for h in _HEIGHTS) + tuple(d[0] for d in _DRAWN)
SEA: Final = 4  # classes below this index are sea
LAKE, RIVER, COAST = (CLASSES.index(name) for name in ("lake", "river", "coast"))
SHADES: Final = 40

KILOMETRES: Final = 64.0  # what one side of a map spans; sets how steep a metre of height looks
MIN_BODY: Final = 0.0004  # smallest counted land body or lake, as a share of the picture
MAX_LAKE: Final = 0.02  # largest lake below the sea's level, as a share of the picture; more is an inland sea
MIN_RIVER: Final = 0.04  # shortest counted river, as a share of the picture's side
_EIGHT: Final = ((1, 1, 1), (1, 1, 1), (1, 1, 1))


class Layers(NamedTuple):
    """What a map shows for each pixel: class, height band (0 where drawn over) and shade, each uint8 [H, W]."""

    classes: NDArray[np.uint8]
    bands: NDArray[np.uint8]
    shades: NDArray[np.uint8]


# --- palette ---------------------------------------------------------------------------------------------------------


def band_edges() -> list[tuple[int, int, float, float]]:
    """All height bands from the sea floor up: (class, band, lower metres, upper metres)."""
    bands: list[tuple[int, int, float, float]] = []
    for index, (_, low, count, _, _) in enumerate(_HEIGHTS):
        high = _HEIGHTS[index + 1][1] if index + 1 < len(_HEIGHTS) else _TOP
        step = (high - low) / count
        bands += [(index, band, low + band * step, low + (band + 1) * step) for band in range(count)]
    return bands


@lru_cache(maxsize=1)
def _palette() -> tuple[Any, Any, Any]:
    """Colours uint8 [classes, bands, shades, 3], the sorted packed colours, and (class, band, shade) for each."""
    import numpy as np

    most = max(h[2] for h in _HEIGHTS)
    colours = np.zeros((len(CLASSES), most, SHADES, 3), np.uint8)
    owner: dict[tuple[int, int, int], tuple[int, int, int]] = {}

    def put(key: tuple[int, int, int], colour: tuple[int, int, int]) -> None:
        nudge = 0
        while colour in owner:  # step to the nearest free colour: blue first, then red, then green
            nudge += 1
            channel, by = (2, 0, 1)[nudge % 3], (1, -1)[(nudge // 3) % 2] * (1 + nudge // 6)
            moved = list(colour)
            moved[channel] = min(255, max(0, moved[channel] + by))
            colour = (moved[0], moved[1], moved[2])
        owner[colour] = key
        colours[key] = colour

    for index, (_, _, count, low, high) in enumerate(_HEIGHTS):
        # The sea is shaded less than the land, so that it reads as one calm surface.
        dark, light = (0.93, 1.04) if index < SEA else (0.66, 1.12)
        for band in range(count):
            at = (band + 0.5) / count
            for shade in range(SHADES):
                factor = dark + (light - dark) * shade / (SHADES - 1)
                # Shadows turn slightly blue and lights slightly warm, as on printed relief maps.
                warm = (shade / (SHADES - 1) - 0.6) * (0 if index < SEA else 10)
                mixed = [a + (b - a) * at for a, b in zip(low, high, strict=True)]
                values = (mixed[0] * factor + warm, mixed[1] * factor + warm * 0.4, mixed[2] * factor - warm)
                red, green, blue = (min(255, max(0, round(v))) for v in values)
                put((index, band, shade), (red, green, blue))
    for index, (_, colour) in enumerate(_DRAWN, len(_HEIGHTS)):
        put((index, 0, 0), colour)

    packed = np.array([(r << 16) | (g << 8) | b for r, g, b in owner], np.int64)
    order = np.argsort(packed)
    return colours, packed[order], np.array(list(owner.values()), np.uint8)[order]


def paint(layers: Layers) -> NDArray[np.uint8]:
    """The picture of `layers`, uint8 [H, W, 3]."""
    return _palette()[0][layers.classes, layers.bands, layers.shades]


def decode(rgb: NDArray[np.uint8]) -> Layers | None:
    """The layers that a picture uint8 [H, W, 3] shows, or None where a colour is not of the palette."""
    import numpy as np

    _, packed, keys = _palette()
    wide = rgb.astype(np.int64)
    codes = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    at = np.minimum(np.searchsorted(packed, codes), len(packed) - 1)
    if not np.array_equal(packed[at], codes):
        return None
    found = keys[at]
    return Layers(found[..., 0], found[..., 1], found[..., 2])


# --- water on land ---------------------------------------------------------------------------------------------------


def fill_depressions(height: NDArray[np.float64]) -> NDArray[np.float64]:
    """The surface on which water runs off from every cell, to the sea (below 0) or over the border.

    Priority flood with a tiny slope over filled ground (Barnes, Lehman, Mulla 2014, doi:10.1016/j.cageo.2013.04.024).
    A cell from which lower neighbours lead out keeps its height, so only the catchments of pits are flooded.
    """
    import heapq

    import numpy as np

    rows, cols = height.shape
    field = np.pad(height, 1, constant_values=np.inf)
    out = np.pad(height < 0, 1)
    out[1], out[-2], out[:, 1], out[:, -2] = True, True, True, True
    wide = cols + 2
    around = (-wide - 1, -wide, -wide + 1, -1, 1, wide - 1, wide, wide + 1)
    inner = (np.arange(rows)[:, None] + 1) * wide + np.arange(cols) + 1
    flat, leaves = field.ravel(), out.ravel()

    near = np.stack([flat[inner + step] for step in around])
    lowest = inner + np.array(around)[near.argmin(0)]
    down = np.arange(flat.size)
    down[inner] = np.where((near.min(0) < height) & ~leaves[inner], lowest, inner)
    while not np.array_equal(down, further := down[down]):
        down = further
    dry = leaves[down]
    dry[np.isinf(flat)] = True

    shores = inner[dry[inner] & ~np.logical_and.reduce([dry[inner + step] for step in around])]
    filled, done = flat.tolist(), dry.tolist()
    heap = list(zip(flat[shores].tolist(), shores.tolist(), strict=True))
    heapq.heapify(heap)
    while heap:
        level, cell = heapq.heappop(heap)
        for step in around:
            at = cell + step
            if not done[at]:
                done[at] = True
                if filled[at] <= level:
                    filled[at] = level + 1e-4
                heapq.heappush(heap, (filled[at], at))
    return np.array(filled).reshape(rows + 2, wide)[1:-1, 1:-1].copy()


def drainage(filled: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Two flat arrays: where a cell drains (its steepest lower neighbour, or itself), and how many drain through it."""
    import numpy as np

    rows, cols = filled.shape
    padded = np.pad(filled, 1, constant_values=np.inf)
    index = np.arange(filled.size).reshape(rows, cols)
    best, target = np.zeros(filled.shape), index.copy()
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            if dr or dc:
                drop = (filled - padded[1 + dr : 1 + dr + rows, 1 + dc : 1 + dc + cols]) / math.hypot(dr, dc)
                steeper = drop > best
                best, target = np.where(steeper, drop, best), np.where(steeper, index + dr * cols + dc, target)
    down = target.ravel()
    area = [1.0] * filled.size
    downwards = np.argsort(-filled.ravel(), kind="stable")
    downwards = downwards[down[downwards] != downwards]
    for cell, below in zip(downwards.tolist(), down[downwards].tolist(), strict=True):
        area[below] += area[cell]
    return down, np.array(area)


def _water(height: NDArray[np.float64], grid: int = 128) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Lakes and rivers of a height field as two masks of its size; found on a coarser grid, drawn on the fine one."""
    import numpy as np
    from PIL import Image, ImageDraw
    from scipy import ndimage

    rows, cols = height.shape
    sea = height < 0
    # Water below the sea's level but cut off from the border: a lake when small, an inland sea when large.
    label, count = ndimage.label(sea)
    small = np.flatnonzero(np.bincount(label.ravel(), minlength=count + 1) < MAX_LAKE * height.size)
    lakes = sea & np.isin(label, [i for i in small.tolist() if i not in _rim(label)])

    scale = max(1.0, max(rows, cols) / grid)
    shape = (max(2, round(rows / scale)), max(2, round(cols / scale)))
    coarse = resample(height, shape) if scale > 1 else height
    filled = fill_depressions(coarse)
    # A basin stands full to where it spills over; the shore follows the fine field.
    level = np.where((coarse >= 0) & (filled - coarse > 4.0), filled, -np.inf)
    level = ndimage.grey_dilation(level, size=3)
    at = np.ix_(np.arange(rows) * shape[0] // rows, np.arange(cols) * shape[1] // cols)
    basins, basin_count = ndimage.label((height < level[at]) & ~sea)
    if basin_count:
        sizes = np.bincount(basins.ravel(), minlength=basin_count + 1)
        lakes |= np.isin(basins, 1 + np.flatnonzero(sizes[1:] >= 2 * MIN_BODY * height.size))

    down, area = drainage(filled)
    land = (coarse >= 0).ravel()
    river = land & (area >= 0.0032 * coarse.size)
    fed = np.zeros(river.size, bool)
    fed[down[river]] = True
    mask = Image.new("L", (cols, rows))
    draw = ImageDraw.Draw(mask)
    fy, fx = rows / shape[0], cols / shape[1]
    drawn: set[int] = set()
    heads = np.flatnonzero(river & ~fed)
    for head in heads[np.argsort(-area[heads], kind="stable")].tolist():
        path = [head]
        while land[path[-1]] and int(down[path[-1]]) != path[-1] and (path[-1] not in drawn or len(path) == 1):
            path.append(int(down[path[-1]]))
        if len(path) < max(6, 0.06 * max(shape)) and path[-1] not in drawn:
            continue
        drawn.update(path)
        widths = [1 if area[c] < 0.02 * coarse.size else 2 if area[c] < 0.09 * coarse.size else 3 for c in path]
        points = _smooth([((c % shape[1] + 0.5) * fx - 0.5, (c // shape[1] + 0.5) * fy - 0.5) for c in path])
        for i in range(len(points) - 1):
            draw.line([points[i], points[i + 1]], fill=255, width=widths[i * (len(path) - 1) // (len(points) - 1)])
    rivers = (np.asarray(mask) > 0) & ~sea & ~lakes
    return lakes, rivers


def _smooth(points: list[tuple[float, float]], rounds: int = 2) -> list[tuple[float, float]]:
    """Corner cutting (Chaikin 1974, doi:10.1016/0146-664X(74)90028-8); both ends stay."""
    for _ in range(rounds):
        cut = [points[0]]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            cut += [(0.75 * x0 + 0.25 * x1, 0.75 * y0 + 0.25 * y1), (0.25 * x0 + 0.75 * x1, 0.25 * y0 + 0.75 * y1)]
        points = [*cut, points[-1]]
    return points


def resample(field: NDArray[Any], shape: tuple[int, int], order: int = 1) -> NDArray[np.float64]:
    """A field at another size, pixel centres aligned (cubic with `order=3`)."""
    import numpy as np
    from scipy import ndimage

    rows, cols = field.shape
    y = (np.arange(shape[0]) + 0.5) * rows / shape[0] - 0.5
    x = (np.arange(shape[1]) + 0.5) * cols / shape[1] - 0.5
    grid = np.meshgrid(y, x, indexing="ij")
    return ndimage.map_coordinates(field.astype(np.float64), grid, order=order, mode="nearest")


# --- drawing ---------------------------------------------------------------------------------------------------------


def layers_of(height: NDArray[Any]) -> Layers:
    """What the map of a height field [H, W] (metres, sea below 0) shows, before it is painted.

    Raises: PortValueError for a field that is not two-dimensional, is smaller than 8 x 8 or is not finite.
    """
    import numpy as np
    from scipy import ndimage

    field = np.asarray(height, np.float64)
    if field.ndim != 2 or min(field.shape) < 8 or not np.isfinite(field).all():
        raise PortValueError(f"height is a finite field [H, W] of 8 x 8 metres values or more, not {list(field.shape)}")
    edges = band_edges()
    index = np.clip(np.searchsorted([low for _, _, low, _ in edges], field, side="right") - 1, 0, len(edges) - 1)
    classes = np.array([c for c, _, _, _ in edges], np.uint8)[index]
    bands = np.array([b for _, b, _, _ in edges], np.uint8)[index]

    # Light from the north-west, 45 degrees high; steepness is exaggerated so that plains read too.
    metres = KILOMETRES * 1000 / max(field.shape)
    low, high = ndimage.gaussian_filter(field, 0.7), ndimage.gaussian_filter(field, 3.0)
    shade = np.zeros(field.shape)
    for surface, weight in ((low, 0.6), (high, 0.4)):
        gy, gx = np.gradient(surface * 5.0 / metres)
        lit = (1.0 + gx * 0.7071 + gy * 0.7071) / np.sqrt(1 + gx**2 + gy**2) * 0.7071
        shade += weight * lit
    shades = np.clip(np.rint((shade - 0.7071) / 0.62 * (SHADES - 1) + 0.68 * (SHADES - 1)), 0, SHADES - 1)

    lakes, rivers = _water(field)
    sea = (field < 0) & ~lakes
    coast = ~sea & ~lakes & ndimage.binary_dilation(sea)
    for mask, drawn in ((rivers, RIVER), (coast, COAST), (lakes, LAKE)):
        classes[mask], bands[mask] = drawn, 0
    shades[classes >= len(_HEIGHTS)] = 0
    return Layers(classes, bands, shades.astype(np.uint8))


def render(height: NDArray[Any]) -> NDArray[np.uint8]:
    """The relief map of a height field [H, W] (metres, sea below 0), uint8 [H, W, 3]."""
    return paint(layers_of(height))


# --- measuring -------------------------------------------------------------------------------------------------------


def direction(x: float, y: float) -> str:
    """The compass word for a place on a map (x to the east, y to the south, both 0..1); "centre" in the middle."""
    dx, dy = x - 0.5, y - 0.5
    if math.hypot(dx, dy) < 0.12:
        return "centre"
    words = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
    return words[round(math.atan2(dy, dx) / (math.pi / 4)) % 8]


def _bodies(mask: NDArray[np.bool_], least: float, structure: Any = None) -> tuple[Any, list[int], list[int]]:
    """Labels of a mask, and ids and sizes of its connected parts of `least` pixels or more, largest first."""
    import numpy as np
    from scipy import ndimage

    labels, count = ndimage.label(mask, structure)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = [i for i in range(1, count + 1) if sizes[i] >= least]
    kept.sort(key=lambda i: (-sizes[i], i))
    return labels, kept, [int(sizes[i]) for i in kept]


def _rim(labels: NDArray[Any]) -> set[int]:
    """The labels that occur on the border."""
    import numpy as np

    return set(np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])).tolist())


def facts_of(layers: Layers) -> dict[str, Any]:
    """The facts that a map shows, as JSON.

    `land_share`: rivers are land, lakes are not. `land_bodies`: connected land with its lakes; `islands`: those that do
    not touch the border; `largest_land_share`: of the land with its lakes. `inland_seas`: seas that do not touch the
    border. `lakes`, `lake_share`. `rivers`: connected systems; `longest_river`: its straight reach in map sides.
    `coast`: edges between land and sea pixels; `coast_ratio`: the same in perimeters of the map. `highest`: {class,
    metres: [from, to], x, y, direction} or None. `classes`: the share of each.
    """
    import numpy as np
    from scipy import ndimage

    classes = layers.classes
    pixels, side = classes.size, max(classes.shape)
    sea, lake, river = classes < SEA, classes == LAKE, classes == RIVER
    land = ~sea & ~lake
    least = MIN_BODY * pixels
    labels, bodies, sizes = _bodies(~sea, least)
    rim = _rim(labels)
    _, lakes, _ = _bodies(lake, least)
    sea_labels, seas, _ = _bodies(sea, least)
    sea_rim = _rim(sea_labels)
    river_labels, _, _ = _bodies(river, 1, np.array(_EIGHT))
    reaches = [math.hypot(*((s.stop - s.start) / side for s in box)) for box in ndimage.find_objects(river_labels)]
    reaches = [r for r in reaches if r >= MIN_RIVER]
    coast = int((sea[1:] & land[:-1]).sum() + (land[1:] & sea[:-1]).sum())
    coast += int((sea[:, 1:] & land[:, :-1]).sum() + (land[:, 1:] & sea[:, :-1]).sum())
    counts = np.bincount(classes.ravel(), minlength=len(CLASSES))
    return {
        "kind": "map",
        "width": int(classes.shape[1]),
        "height": int(classes.shape[0]),
        "land_share": round(float(land.mean()), 4),
        "land_bodies": len(bodies),
        "islands": sum(1 for body in bodies if body not in rim),
        "largest_land_share": round(sizes[0] / int((~sea).sum()), 4) if sizes else 0.0,
        "lakes": len(lakes),
        "inland_seas": sum(1 for body in seas if body not in sea_rim),
        "lake_share": round(float(lake.mean()), 4),
        "rivers": len(reaches),
        "longest_river": round(max(reaches, default=0.0), 3),
        "coast": coast,
        "coast_ratio": round(coast / (2 * sum(classes.shape)), 3),
        "highest": _highest(layers, land),
        "classes": {CLASSES[i]: round(n / pixels, 4) for i, n in enumerate(counts.tolist()) if n},
    }


def _highest(layers: Layers, land: NDArray[np.bool_]) -> dict[str, Any] | None:
    """The highest band on land and the middle of its largest patch; None where nothing but drawn pixels is land."""
    import numpy as np

    ground = land & (layers.classes < len(_HEIGHTS))
    if not ground.any():
        return None
    level = np.where(ground, layers.classes.astype(np.int32) * 64 + layers.bands, -1)
    top = int(level.max())
    labels, ids, _ = _bodies(level == top, 1, np.array(_EIGHT))
    ys, xs = np.nonzero(labels == ids[0])
    rows, cols = land.shape
    x, y = float((xs.mean() + 0.5) / cols), float((ys.mean() + 0.5) / rows)
    low, high = next((lo, hi) for c, b, lo, hi in band_edges() if c * 64 + b == top)
    return {
        "class": CLASSES[top // 64],
        "metres": [round(low), round(high)],
        "x": round(x, 3),
        "y": round(y, 3),
        "direction": direction(x, y),
    }


def picture_facts(rgb: NDArray[np.uint8]) -> dict[str, Any]:
    """What can be said of any picture uint8 [H, W, 3]: size, brightness, contrast, colour; nothing on land."""
    import numpy as np

    grey = rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    mean = rgb.reshape(-1, 3).mean(axis=0)
    return {
        "kind": "picture",
        "width": int(rgb.shape[1]),
        "height": int(rgb.shape[0]),
        "brightness": round(float(grey.mean()), 3),
        "contrast": round(float(grey.std()), 3),
        "mean_colour": [round(float(v)) for v in mean],
    }


def measure(rgb: NDArray[np.uint8]) -> dict[str, Any]:
    """The facts of a picture uint8 [H, W, 3]: `facts_of` for a map of this palette, else `picture_facts`."""
    layers = decode(rgb)
    return picture_facts(rgb) if layers is None else facts_of(layers)


def _count(number: int, one: str, many: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[number] if number < len(words) else number} {one if number == 1 else many}"


def sentence(facts: dict[str, Any]) -> str:
    """The facts of one picture as plain sentences; nothing is added to what was measured."""
    if facts["kind"] != "map":
        bright = "bright" if facts["brightness"] > 0.66 else "dark" if facts["brightness"] < 0.33 else "half bright"
        return f"The picture is no relief map; it is {bright} and {facts['width']} by {facts['height']} pixels in size."
    land = facts["land_share"]
    parts = [f"Land covers {land:.0%} of the map." if land else "The map shows open water without land."]
    if facts["land_bodies"]:
        off = facts["land_bodies"] - facts["islands"]
        bodies = [_count(facts["islands"], "island", "islands")] if facts["islands"] else []
        bodies += [_count(off, "land mass", "land masses") + " running off the edge"] if off else []
        parts.append(f"It shows {' and '.join(bodies)}.")
        if facts["land_bodies"] > 1:
            parts.append(f"The largest holds {facts['largest_land_share']:.0%} of the land.")
    if (high := facts["highest"]) is not None:
        where = "in the centre" if high["direction"] == "centre" else f"in the {high['direction']}"
        kind = {"rock": "bare rock", "mountain": "mountains"}.get(high["class"], high["class"])
        parts.append(f"The highest ground lies {where}: {kind}, between {high['metres'][0]} and {high['metres'][1]} m.")
    if land:
        reach = f", the longest reaching over {facts['longest_river']:.0%} of the map's side" if facts["rivers"] else ""
        seas = f", {_count(facts['inland_seas'], 'inland sea', 'inland seas')}" if facts["inland_seas"] else ""
        lakes = _count(facts["lakes"], "lake", "lakes")
        parts.append(f"It has {_count(facts['rivers'], 'river', 'rivers')}{reach}{seas} and {lakes}.")
    return " ".join(parts)


# --- PNG and block ---------------------------------------------------------------------------------------------------


def to_png(rgb: NDArray[np.uint8]) -> bytes:
    """A picture uint8 [H, W, 3] as PNG; equal pixels give equal bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(rgb, "RGB").save(out, "PNG", compress_level=9)
    return out.getvalue()


def from_png(data: bytes, what: str = "picture") -> NDArray[np.uint8]:
    """The pixels uint8 [H, W, 3] of an image file's bytes.

    Raises: PortValueError where the bytes are no readable image.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise PortValueError(f"{what}: the {len(data)} bytes are no readable image ({error})") from error


class MeasureMap(Block):
    """Measures every picture among the artifacts.

    Input `artifacts` {slot: [Artifact]}: those of `slot` are opened through the run's blob store.
    Outputs: `facts`, one {artifact_id, ...} for each picture in order, and `sentences`, one text for each.

    Raises: PortValueError for an artifact that has no id or is no readable image.
    """

    ports = (
        Port("artifacts", "in", "dict", description="artifacts by slot"),
        Port("facts", "out", "list", description="measured facts, one entry for each picture"),
        Port("sentences", "out", "list", description="the same facts as plain sentences"),
    )

    def __init__(self, *, slot: str = "images") -> None:
        super().__init__()
        self.slot = slot

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        blobs = current_context().blobs
        facts: list[dict[str, Any]] = []
        for number, artifact in enumerate(inputs["artifacts"].get(self.slot, ())):
            where = f"artifacts.{self.slot}[{number}]"
            if not isinstance(artifact.get("id"), str):
                raise PortValueError(f"{where} has no id; an artifact is {{id: sha256, media_type, slot, ...}}")
            facts.append({"artifact_id": artifact["id"], **measure(from_png(blobs.get(artifact["id"]), where))})
        return {"facts": facts, "sentences": [sentence(f) for f in facts]}
