"""Sampling: the start of a loop, integration steps, guidance. Time runs from 1 (noise) to 0 (picture).

A solver finds its place in the loop in `loop_index` and `loop_total`, and from there goes to time 0 in equal steps,
wherever it began. Outside a loop it takes one of `num_steps` equal steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from wg_core import Port, current_context
from wg_core.assembly.roles import Guidance, Initializer, Solver
from wg_core.errors import ConfigError, PortValueError

LOOP_PORTS = (
    Port("loop_index", "in", "number", optional=True, description="iteration of the loop, from 0; given by the engine"),
    Port("loop_total", "in", "number", optional=True, description="steps of the loop; given by the engine"),
)


def _after(time: Any, step: int, steps: int) -> Any:
    """The time after step `step` of `steps`, when `time` is the one before it: equal steps down to 0."""
    left = steps - step
    return time * ((left - 1) / left)


def _wide(time: Any, latent: Any) -> Any:
    """`time` as something that multiplies `latent` [B,...]: a number, or one for each element of the batch."""
    if getattr(time, "ndim", 0) == 0:
        return time
    return time.reshape(-1, *[1] * (latent.ndim - 1))


class _Steps(Solver):
    """What the solvers share: how many steps there are, and which one this is."""

    ports = (*Solver.ports, *LOOP_PORTS)

    def __init__(self, *, num_steps: int | None = None) -> None:
        super().__init__()
        if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1):
            raise ConfigError(f"solver: num_steps is a whole number from 1, not {num_steps!r}")
        self.num_steps = num_steps

    def iterations(self, steps: int) -> int:
        """How many iterations of the loop make `steps` steps."""
        return steps

    def place(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """(iteration, steps) of this call. Raises: PortValueError for an iteration beyond the last."""
        steps = int(inputs.get("loop_total", self.num_steps or 1))
        index = int(inputs.get("loop_index", 0))
        if not 0 <= index < self.iterations(steps):
            raise PortValueError(f"{self.name}: iteration {index} of a loop of {steps} steps is beyond its end")
        return index, steps

    def next_time(self, inputs: dict[str, Any]) -> Any:
        index, steps = self.place(inputs)
        return _after(inputs["timestep"], index, steps)


class Euler(_Steps):
    """Euler's method for dx/dt = pred (a flow): x' = x + (t' - t) * pred."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        latent, time, after = inputs["latent"], inputs["timestep"], self.next_time(inputs)
        return {"next_latent": latent + _wide(after - time, latent) * inputs["pred"], "next_timestep": after}


class Heun(_Steps):
    """Heun's method for dx/dt = pred: two evaluations a step but one in the last, so 2N-1 iterations for N steps.

    The first evaluation of a step goes ahead as Euler does, the second goes back and takes the mean of both slopes;
    between the two the block remembers where the step began, for each running loop by itself.

    Raises: PortValueError where a second evaluation comes without its first.
    """

    def __init__(self, *, num_steps: int | None = None) -> None:
        super().__init__(num_steps=num_steps)
        self._begun: dict[int, tuple[Any, Any, Any]] = {}

    def iterations(self, steps: int) -> int:
        return 2 * steps - 1

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        iteration, steps = self.place(inputs)
        latent, time, pred = inputs["latent"], inputs["timestep"], inputs["pred"]
        step, second = divmod(iteration, 2)
        run = id(current_context().frame)
        if not second:
            after = _after(time, step, steps)
            self._begun.pop(run, None)
            if step < steps - 1:
                self._begun[run] = (latent, time, pred)
            return {"next_latent": latent + _wide(after - time, latent) * pred, "next_timestep": after}
        if run not in self._begun:
            raise PortValueError(
                f"{self.name}: iteration {iteration} completes a step that was not begun; loops begin at iteration 0"
            )
        start, before, slope = self._begun.pop(run)
        mean = (slope + pred) / 2
        return {"next_latent": start + _wide(time - before, start) * mean, "next_timestep": time}


class DDIM(_Steps):
    """DDIM without noise for the cosine schedule, alpha_bar(t) = cos(pi t / 2)^2 (at least 1e-4).

    `prediction` says what `pred` is: the noise (`epsilon`) or the picture (`x0`).

    Source: Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0; schedule after Nichol, Dhariwal
    2021. Raises: ConfigError for another prediction.
    """

    def __init__(self, *, num_steps: int | None = None, prediction: str = "epsilon") -> None:
        super().__init__(num_steps=num_steps)
        if prediction not in ("epsilon", "x0"):
            raise ConfigError(f"solver/ddim: prediction is 'epsilon' or 'x0', not {prediction!r}")
        self.prediction = prediction

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        latent, pred, after = inputs["latent"], inputs["pred"], self.next_time(inputs)
        now, then = (_wide(_alpha_bar(t), latent) for t in (inputs["timestep"], after))
        if self.prediction == "epsilon":
            noise, picture = pred, (latent - (1 - now) ** 0.5 * pred) / now**0.5
        else:
            picture = pred
            noise = (latent - now**0.5 * pred) / (1 - now + 1e-12) ** 0.5
        return {"next_latent": then**0.5 * picture + (1 - then) ** 0.5 * noise, "next_timestep": after}


def _alpha_bar(time: Any) -> Any:
    if isinstance(time, int | float):
        return max(math.cos(math.pi * time / 2) ** 2, 1e-4)
    return ((time * (math.pi / 2)).cos() ** 2).clamp(min=1e-4)


class ClassifierFree(Guidance):
    """Classifier-free guidance: uncond + scale * (cond - uncond).

    Source: Ho, Salimans 2022, https://arxiv.org/abs/2207.12598.
    """

    ports = (
        Port("pred_cond", "in", "tensor"),
        Port("pred_uncond", "in", "tensor"),
        Port("scale", "in", "number|tensor", default=5.0),
        Port("condition", "in", "tensor|dict", optional=True),
        Port("pred_guided", "out", "tensor"),
    )

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        cond, uncond = inputs["pred_cond"], inputs["pred_uncond"]
        return {"pred_guided": uncond + _wide(inputs["scale"], cond) * (cond - uncond)}


class Noise(Initializer):
    """Normal noise of `shape`, at time 1; an `init_latent` is noised to the time `strength` instead.

    The numbers follow the `seed` input, else the seed of the run and the node's place in it.

    Raises: ConfigError for a strength outside 0..1 or a bad shape.
    """

    def __init__(self, *, shape: Sequence[int] = (1, 4, 8, 8), strength: float = 1.0) -> None:
        super().__init__()
        if not 0 < strength <= 1:
            raise ConfigError(f"initializer/noise: strength lies above 0, up to 1, not {strength!r}")
        self.shape = _shape(shape)
        self.strength = strength

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        seed = int(inputs["seed"]) if "seed" in inputs else current_context().node_seed()
        init = inputs.get("init_latent")
        shape = list(init.shape) if init is not None else _shape(inputs["shape"]) if "shape" in inputs else self.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if init is None:
            return {"latent": noise, "timestep": 1.0}
        noise = noise.to(device=init.device, dtype=init.dtype)
        return {"latent": (1 - self.strength) * init + self.strength * noise, "timestep": self.strength}


def _shape(value: Sequence[Any]) -> list[int]:
    if not value or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value):
        raise ConfigError(f"initializer/noise: shape is a list of whole numbers from 1, not {list(value)!r}")
    return list(value)
