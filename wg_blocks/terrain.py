"""Terrain: blocks that make the map of a place, by a diffusion model or by spectral noise.

Both build a height field from the same four wishes and draw it with the same hand (`wg_blocks.maps`):

- `form` and `place` give the layout, a smooth field of where land and water lie. A place keeps its layout, so the same
  place drawn again is recognised; without a place the layout follows the seed.
- `seed` gives the noise, hence everything finer than the layout.
- `ruggedness` gives steepness: the condition of the model, or the slope of the noise spectrum.
- `land_share` sets the level of the sea: the quantile of the field that leaves this share above water.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from wg_core import Block, Port, current_context
from wg_core.errors import CheckpointError, PortValueError
from wg_core.execution.context import derive_seed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMS: Final = ("free", "island", "archipelago", "coast", "inland")
GRID: Final = 128  # cells per side of the field that the model makes
SIZES: Final = (64, 1024)  # pictures per side, from and to
MAX_SEED: Final = 2**63 - 1

_PORTS: Final = (
    Port("land_share", "in", "number", optional=True, schema={"type": "number", "minimum": 0, "maximum": 1},
         description="share of the map above the sea, 0 all water to 1 all land"),
    Port("ruggedness", "in", "number", optional=True, schema={"type": "number", "minimum": 0, "maximum": 1},
         description="0 gentle plains to 1 high mountains"),
    Port("form", "in", "text", optional=True, schema={"type": "string", "enum": list(FORMS)},
         description="how land and water lie"),
    Port("place", "in", "text", optional=True, tag="place", schema={"type": "string", "maxLength": 64},
         description="the place that the map shows; it keeps its outline from map to map"),
    Port("seed", "in", "number", optional=True, schema={"type": "integer", "minimum": 0, "maximum": MAX_SEED},
         description="equal seeds and wishes give equal maps"),
    Port("image", "out", "image", description="relief map, float32 [1, 3, H, W] in 0..1"),
    Port("height", "out", "tensor", description="metres above the sea, float32 [1, 1, H, W]"),
)  # fmt: skip


def spectral(shape: tuple[int, int], beta: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Random field with power falling as 1/frequency**beta; mean 0, variance 1."""
    import numpy as np

    # A field of twice the size, cut to a quarter, so that opposite borders do not match.
    rows, cols = 2 * shape[0], 2 * shape[1]
    reach = np.hypot(np.fft.fftfreq(rows)[:, None] * rows, np.fft.rfftfreq(cols)[None] * cols)
    reach[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((rows, cols))) / np.maximum(reach, 2.0) ** (beta / 2)
    field = np.fft.irfft2(spectrum, (rows, cols))[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def layout(form: str, rng: np.random.Generator, size: int = GRID) -> NDArray[np.float64]:
    """Where land and water lie for a form: a smooth field [size, size], about -1..1, high where land is."""
    import numpy as np

    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    noise = spectral((size, size), 3.4, rng)
    shore = 22.0 * np.clip((x**4 + y**4) ** 0.25 + 0.06 * noise - 0.74, 0, None) ** 2  # sinks towards the border
    if form == "island":
        cx, cy, turn = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.uniform(0, np.pi)
        u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        field = 1.5 - 2.4 * np.hypot(u, 1.25 * v) + 0.45 * noise
        field -= shore
    elif form == "archipelago":
        field = spectral((size, size), 2.6, rng)
        field -= smoothed(field, size / 9)
        field = field / field.std() + 0.25 * noise - shore
    elif form == "coast":
        turn = rng.uniform(0, 2 * np.pi)
        field = 1.3 * (x * np.cos(turn) + y * np.sin(turn)) + 0.55 * noise
    elif form == "inland":
        field = 0.8 * noise + 1.1 * np.maximum(x**2, y**2)
    else:
        field = noise
    return np.tanh(0.75 * (field - np.median(field)) / max(float(field.std()), 1e-6))


def smoothed(field: NDArray[Any], sigma: float) -> NDArray[Any]:
    """Gaussian smoothing."""
    from scipy import ndimage

    return ndimage.gaussian_filter(field, sigma)


def to_metres(field: NDArray[Any], land_share: float, ruggedness: float) -> NDArray[np.float64]:
    """A field of any unit as metres above a sea that leaves `land_share` of the cells at 0 or higher."""
    import numpy as np

    ordered = np.sort(field, axis=None)
    dry = round(land_share * ordered.size)  # cells above the sea
    if dry == 0:
        sea = ordered[-1] + 1e-3
    elif dry == ordered.size:
        sea = ordered[0]
    else:
        sea = (ordered[-dry] + ordered[-dry - 1]) / 2
    above = field - sea
    spread = max(float(field.std()), 1e-6)
    height = np.zeros(field.shape)
    for part, full, power in ((above >= 0, 450.0 + 2300.0 * ruggedness, 1.5), (above < 0, -2400.0, 1.4)):
        if part.any():
            size = np.abs(above[part])
            reach = max(float(np.quantile(size, 0.985)), 1e-9)
            scaled = (size / reach) ** power
            # Past the reach heights grow slowly, so that peaks differ in height and yet stay on the palette.
            scaled = np.where(scaled > 1, 1 + 0.35 * np.tanh(scaled - 1), scaled)
            height[part] = full * min(1.1, max(0.3, 0.25 + 0.45 * reach / spread)) * scaled
    return np.where(above >= 0, height, np.minimum(height, -1e-3))


def erode(height: NDArray[np.float64], rounds: int = 4, strength: float = 0.035) -> NDArray[np.float64]:
    """Land worn by running water: rivers cut valleys and small pits fill up; the few largest basins stay as lakes.

    `height` in metres [H, W], sea below 0; land stays land. Each round solves the stream power law with exponents
    1/2 for area and 1 for slope, implicitly downstream to upstream (Braun, Willett 2013,
    doi:10.1016/j.geomorph.2012.10.008).
    """
    import numpy as np
    from scipy import ndimage

    from wg_blocks.maps import drainage, fill_depressions

    land = height >= 0
    filled = fill_depressions(height)
    basins, count = ndimage.label(land & (filled - height > 15.0))
    sizes = np.bincount(basins.ravel(), minlength=count + 1)[1:]
    kept = [i + 1 for i in np.argsort(-sizes, kind="stable")[:4].tolist() if sizes[i] >= 0.0015 * height.size]
    depth = np.where(np.isin(basins, kept), filled - height, 0.0)

    surface = filled
    for turn in range(rounds):
        if turn:
            surface = fill_depressions(surface)
        down, area = drainage(surface)
        upwards = np.argsort(surface, axis=None, kind="stable")
        upwards = upwards[(land.ravel() & (down != np.arange(down.size)))[upwards]]
        flat = surface.ravel().tolist()
        for cell, below, cut in zip(
            upwards.tolist(), down[upwards].tolist(), (strength * np.sqrt(area[upwards])).tolist(), strict=True
        ):
            level = flat[below]
            flat[cell] = (flat[cell] + cut * (level if level > 0 else 0.0)) / (1 + cut)
        surface = np.array(flat).reshape(height.shape)
        surface += 0.06 * np.where(land, ndimage.laplace(surface, mode="nearest"), 0.0)  # slopes creep
    surface = fill_depressions(np.where(land, np.maximum(surface, 0.5), height)) - depth
    return np.where(land, np.maximum(surface, 0.5), height)


class Relief(Block):
    """Maps of spectral noise: no model, small and deterministic.

    `size` is the picture's side in pixels (64 to 1024).
    """

    ports = _PORTS

    def __init__(self, *, size: int = 384) -> None:
        super().__init__()
        if not isinstance(size, int) or not SIZES[0] <= size <= SIZES[1]:
            raise PortValueError(f"size is the picture's side, {SIZES[0]} to {SIZES[1]} pixels, not {size!r}")
        self.size = size

    def field(self, guide: NDArray[np.float64], ruggedness: float, rng: np.random.Generator) -> NDArray[np.float64]:
        """The height field [128, 128] in any unit, made from a layout of that size."""
        return guide + (0.18 + 0.12 * ruggedness) * spectral((GRID, GRID), 3.2 - 0.5 * ruggedness, rng)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        from wg_blocks.maps import render, resample

        land_share = _bounded(inputs, "land_share", 0.5)
        ruggedness = _bounded(inputs, "ruggedness", 0.5)
        form = inputs.get("form", "free")
        if form not in FORMS:
            raise PortValueError(f"form is one of {', '.join(FORMS)}, not {form!r}")
        seed = int(inputs["seed"]) if "seed" in inputs else current_context().node_seed()
        if not 0 <= seed <= MAX_SEED:
            raise PortValueError(f"seed is 0 to {MAX_SEED}, not {seed}")
        place = " ".join(str(inputs.get("place", "")).casefold().split())
        outline = derive_seed(0, "place", place, form) if place else derive_seed(seed, "layout")
        guide = layout(form, np.random.default_rng(outline))
        field = self.field(guide, ruggedness, np.random.default_rng(derive_seed(seed, "noise")))

        shape = (self.size, self.size)
        fine = resample(field, shape, order=3)
        # Detail finer than a cell of the field, strong where the field is steep, so that coasts do not look rounded.
        rough = spectral(shape, 2.4, np.random.default_rng(derive_seed(seed, "detail")))
        rough -= smoothed(rough, 1.5 * self.size / GRID)
        steep = smoothed(np.hypot(*np.gradient(fine)), 4.0 * self.size / GRID) * self.size / GRID
        fine += (0.3 + 0.3 * ruggedness) * steep * rough / float(rough.std())
        height = to_metres(fine, land_share, ruggedness)
        coarse = resample(height, (min(GRID, self.size),) * 2)
        worn = height + resample(erode(coarse) - coarse, shape, order=1)
        height = np.where(height >= 0, np.clip(worn, 0.5, 4199.0), height).astype(np.float32)
        image = render(height).astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        return {"image": np.ascontiguousarray(image), "height": height[None, None]}


def _bounded(inputs: dict[str, Any], name: str, default: float) -> float:
    value = float(inputs.get(name, default))
    if not 0 <= value <= 1:
        raise PortValueError(f"{name} is 0 to 1, not {value}")
    return value


class TerrainDiffusion(Relief):
    """Maps by a one-step consistency model of terrain: a UNet, 128 x 128 heights, run by onnxruntime.

    The network removes Gaussian noise of standard deviation `sigma` from a field in -1..1, under a difficulty in 0..1.
    It was made for terrain on the scale of walking robots (its own heights are 0..22 m); here the field is read again
    on the scale of landscapes. The layout enters as the field under the noise: large shapes outlast noise of a `sigma`
    near 1 and everything smaller is the network's. `refine` lists lower noise levels of further passes, by default one.
    `checkpoint_ref` is the network's name in the model store, `terrain-consistency`.

    Source of the method: Song et al. 2023, Consistency Models, arXiv:2303.01469 (sampling and editing, algorithm 1).
    Raises at the first run: MissingModelError; CheckpointError for a file that is no such network.
    """

    def __init__(
        self,
        *,
        checkpoint_ref: str,
        size: int = 384,
        sigma: float = 1.2,
        refine: list[float] | None = None,
    ) -> None:
        super().__init__(size=size)
        levels = [sigma, *(refine if refine is not None else [0.35])]
        if any(not 0.002 <= s <= 80 for s in levels) or sorted(levels, reverse=True) != levels:
            raise PortValueError(f"noise levels fall and lie in 0.002 to 80, not {levels}")
        self.checkpoint_ref = checkpoint_ref
        self.levels = levels
        self._session: Any = None

    def materialize(self) -> None:
        """Open the network, once."""
        if self._session is not None:
            return
        import onnxruntime

        from wg_blocks.store import ModelStore

        path = ModelStore().path(self.checkpoint_ref)
        if path.is_dir():
            found = sorted(path.glob("*.onnx"))
            if len(found) != 1:
                raise CheckpointError(
                    f"{path} holds {len(found)} .onnx files, not one; pull {self.checkpoint_ref!r} again"
                )
            path = found[0]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("WG_TORCH_THREADS") or 1)
        options.inter_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no public base class
            raise CheckpointError(f"{path} is no network that onnxruntime can open: {error}") from error
        names = ({i.name for i in session.get_inputs()}, {o.name for o in session.get_outputs()})
        if names != ({"noisy", "sigma", "difficulty"}, {"denoised"}):
            raise CheckpointError(
                f"{path} takes {sorted(names[0])} and gives {sorted(names[1])}; not the terrain network"
            )
        self._session = session

    def weight_hash(self) -> str:
        """The sha256 of the network's file, as the model store knows it."""
        from wg_blocks.store import ModelStore

        return str(ModelStore().info(self.checkpoint_ref)["sha256"])

    def close(self) -> None:
        self._session = None

    def field(self, guide: NDArray[np.float64], ruggedness: float, rng: np.random.Generator) -> NDArray[np.float64]:
        import numpy as np

        self.materialize()
        sample = guide.astype(np.float32) * np.float32(0.8)
        for sigma in self.levels:
            noisy = sample + np.float32(sigma) * rng.standard_normal((GRID, GRID), dtype=np.float32)
            feeds = {
                "noisy": noisy[None, None],
                "sigma": np.array([sigma], np.float32),
                "difficulty": np.array([ruggedness], np.float32),
            }
            sample = self._session.run(["denoised"], feeds)[0][0, 0]
        current_context().add_usage(self.checkpoint_ref, calls=len(self.levels))
        return smoothed(sample.astype(np.float64), 1.2)
