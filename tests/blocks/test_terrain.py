"""Terrain: equal wishes give equal maps, and wishes are kept."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wg_blocks import maps
from wg_blocks.store import ModelStore
from wg_blocks.terrain import FORMS, Relief, TerrainDiffusion, erode, layout, spectral, to_metres
from wg_core.errors import MissingModelError, PortValueError

SIZE = 128


def pixels(image: np.ndarray) -> np.ndarray:
    return np.rint(image[0].transpose(1, 2, 0) * 255).astype(np.uint8)


@settings(max_examples=5, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(FORMS),
    st.sampled_from([None, "Harbour of Lys", "x"]),
)
def test_relief_is_deterministic_and_keeps_the_land_share(seed, land_share, ruggedness, form, place):
    wishes = {"seed": seed, "land_share": land_share, "ruggedness": ruggedness, "form": form}
    if place:
        wishes["place"] = place
    first, again = Relief(size=SIZE).run(wishes, strict_types=True), Relief(size=SIZE).run(wishes)
    assert np.array_equal(first["image"], again["image"]) and np.array_equal(first["height"], again["height"])
    image, height = first["image"], first["height"]
    assert image.shape == (1, 3, SIZE, SIZE) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    assert height.shape == (1, 1, SIZE, SIZE) and np.isfinite(height).all()
    assert height.min() >= -4000 and height.max() <= 4200
    assert (height >= 0).mean() == pytest.approx(land_share, abs=1 / SIZE**2)
    facts = maps.measure(pixels(image))
    assert facts["kind"] == "map"
    assert facts["land_share"] <= land_share + 1e-3


def test_another_seed_gives_another_map():
    block = Relief(size=SIZE)
    one, two = (block.run({"seed": s})["image"] for s in (1, 2))
    assert not np.array_equal(one, two)


def test_without_a_seed_the_node_seed_rules():
    block = Relief(size=SIZE)
    assert np.array_equal(block.run({})["image"], block.run({})["image"])


def test_a_place_keeps_its_outline():
    block = Relief(size=SIZE)
    wishes = [{"place": "Lys", "seed": 1}, {"place": "  lys ", "seed": 2}, {"place": "Orm", "seed": 2}]
    one, same, other = ((block.run(w)["height"][0, 0] >= 0).astype(float) for w in wishes)
    assert not np.array_equal(one, same)
    assert (one == same).mean() > 0.85 > (one == other).mean()


def test_ruggedness_raises_the_ground():
    block = Relief(size=SIZE)
    tops = [block.run({"seed": 8, "ruggedness": r})["height"].max() for r in (0.0, 0.5, 1.0)]
    assert tops[0] < tops[1] < tops[2]


def test_forms_put_land_where_they_say():
    def ground(form: str, seed: int) -> np.ndarray:
        return Relief(size=SIZE).run({"form": form, "seed": seed, "land_share": 0.35})["height"][0, 0] >= 0

    for seed in range(3):
        island = ground("island", seed)
        assert island[40:88, 40:88].mean() > 0.6 and island[:6].mean() < 0.1
        inland = ground("inland", seed)
        assert inland[:6].mean() > inland[48:80, 48:80].mean() or inland[-6:].mean() > 0.2
        labels = maps.measure(maps.render(Relief(size=SIZE).run({"form": "archipelago", "seed": seed})["height"][0, 0]))
        assert labels["land_bodies"] >= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_to_metres_keeps_order_and_share(seed: int, land_share: float, ruggedness: float):
    field = spectral((24, 32), 2.5, np.random.default_rng(seed))
    height = to_metres(field, land_share, ruggedness)
    assert (height >= 0).sum() == round(land_share * field.size)
    order = np.argsort(field, axis=None)
    assert (np.diff(height.ravel()[order]) >= -1e-9).all()


def test_a_flat_field_has_no_share_to_give_but_stays_finite():
    assert np.isfinite(to_metres(np.zeros((16, 16)), 0.5, 0.5)).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_erosion_keeps_land_and_sea_and_drains_the_land(seed: int):
    height = to_metres(spectral((64, 64), 2.8, np.random.default_rng(seed)), 0.6, 0.7)
    worn = erode(height)
    assert np.array_equal(worn >= 0, height >= 0)
    assert np.array_equal(worn[height < 0], height[height < 0])

    def pits(h: np.ndarray) -> float:
        return float((maps.fill_depressions(h) - h > 1.0)[height >= 0].mean())

    assert pits(worn) <= pits(height) + 1e-9


def test_layouts_are_smooth_and_bounded():
    for form in FORMS:
        field = layout(form, np.random.default_rng(1))
        assert field.shape == (128, 128) and abs(field).max() <= 1


@pytest.mark.parametrize(
    "wish", [{"land_share": 1.2}, {"ruggedness": -0.1}, {"land_share": float("nan")}, {"form": "moon"}, {"seed": -1}]
)
def test_wishes_out_of_bounds_are_refused(wish):
    with pytest.raises(PortValueError, match=next(iter(wish))):
        Relief(size=SIZE).run(wish)


@pytest.mark.parametrize("size", [0, 63, 5000, "big"])
def test_bad_sizes_are_refused(size):
    with pytest.raises(PortValueError, match="size"):
        Relief(size=size)


def test_building_the_model_block_loads_nothing():
    block = TerrainDiffusion(checkpoint_ref="terrain-consistency", size=SIZE)
    assert block.config == {"checkpoint_ref": "terrain-consistency", "size": SIZE}
    assert (block.model_ref() or ())[2] == "terrain-consistency"


def test_a_missing_model_is_named():
    with pytest.raises(MissingModelError, match=r"file:no/such\.onnx"):
        TerrainDiffusion(checkpoint_ref="file:no/such.onnx", size=SIZE).run({"seed": 1})


def test_a_file_that_is_no_network_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    code = (
        "from wg_blocks.terrain import TerrainDiffusion\n"
        "from wg_core.errors import CheckpointError\n"
        f"block = TerrainDiffusion(checkpoint_ref={'file:' + str(tmp_path / 'bad.onnx')!r})\n"
        "try:\n    block.run({'seed': 1})\nexcept CheckpointError as error:\n    print(error)\n"
    )
    env = {**os.environ, "WG_MODEL_ROOTS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "bad.onnx is no network that onnxruntime can open" in done.stdout


@pytest.mark.parametrize("levels", [{"sigma": 0.0}, {"sigma": 0.3, "refine": [0.5]}, {"sigma": 100.0}])
def test_bad_noise_levels_are_refused(levels):
    with pytest.raises(PortValueError, match="noise levels"):
        TerrainDiffusion(checkpoint_ref="terrain-consistency", **levels)


@pytest.mark.slow
def test_the_model_draws_maps():
    # proves 03 O-1 (pictures by real inference) on the terrain model
    ModelStore().pull("terrain-consistency")
    block = TerrainDiffusion(checkpoint_ref="terrain-consistency", size=256)
    assert block.weight_hash().startswith("95be54b4a39d5832")
    wishes = {"seed": 11, "land_share": 0.5, "ruggedness": 0.7, "place": "Lys"}
    first, again = block.run(wishes), TerrainDiffusion(checkpoint_ref="terrain-consistency", size=256).run(wishes)
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], block.run({**wishes, "seed": 12})["image"])
    assert not np.array_equal(first["image"], Relief(size=256).run(wishes)["image"])  # no fallback took its place
    facts = maps.measure(pixels(first["image"]))
    assert facts["kind"] == "map" and facts["land_share"] + facts["lake_share"] == pytest.approx(0.5, abs=0.02)
    # The network answers to its condition: a harder terrain is rougher on the same layout and noise.
    guide = layout("free", np.random.default_rng(1))
    soft, hard = (block.field(guide, r, np.random.default_rng(2)) for r in (0.0, 1.0))
    assert not np.allclose(soft, hard)
    block.close()
    assert np.array_equal(block.run(wishes)["image"], first["image"])
