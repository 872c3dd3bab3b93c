"""Maps: what is measured on the pixels is what the height field holds."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from wg_blocks import maps
from wg_blocks.maps import MeasureMap
from wg_blocks.terrain import FORMS, Relief, spectral, to_metres
from wg_core import current_context
from wg_core.errors import PortValueError

SEEDS = st.integers(0, 2**32)
SHARES = st.floats(0, 1)


def field(seed: int, land_share: float, shape: tuple[int, int] = (96, 128), beta: float = 3.0) -> np.ndarray:
    return to_metres(spectral(shape, beta, np.random.default_rng(seed)), land_share, 0.6)


def through_png(rgb: np.ndarray) -> np.ndarray:
    return maps.from_png(maps.to_png(rgb))


def rim(labels: np.ndarray) -> set[int]:
    return {int(v) for v in np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))}


def test_no_colour_stands_for_two_things():
    _, packed, keys = maps._palette()
    expected = sum(count * maps.SHADES for _, _, count, _, _ in maps._HEIGHTS) + len(maps._DRAWN)
    assert len(packed) == len(keys) == expected
    assert len(np.unique(packed)) == expected


@settings(max_examples=25, deadline=None)
@given(SEEDS, SHARES)
def test_layers_survive_png(seed: int, land_share: float):
    layers = maps.layers_of(field(seed, land_share))
    back = maps.decode(through_png(maps.paint(layers)))
    assert back is not None
    for drawn, read in zip(layers, back, strict=True):
        assert np.array_equal(drawn, read)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SHARES, st.floats(1.8, 3.6))
def test_facts_of_the_pixels_are_facts_of_the_height_field(seed: int, land_share: float, beta: float):
    # proves 03 O-2: everything on the left is read from PNG bytes, everything on the right from the heights
    height = field(seed, land_share, beta=beta)
    facts = maps.measure(through_png(maps.render(height)))
    sea_or_low, pixels = height < 0, height.size

    # Land: the cells above the sea, less the lakes that stand in basins above the sea.
    enclosed = np.zeros(height.shape, bool)
    labels, count = ndimage.label(sea_or_low)
    for body in set(range(1, count + 1)) - rim(labels):
        if (labels == body).sum() < maps.MAX_LAKE * pixels:
            enclosed |= labels == body
    assert facts["land_share"] <= (~sea_or_low).mean() + 1e-4
    high_lakes = facts["lake_share"] - enclosed.mean()
    assert high_lakes >= -1e-4
    assert facts["land_share"] + high_lakes == pytest.approx((~sea_or_low).mean(), abs=3e-4)

    # Bodies: connected parts of everything that is not open sea.
    ground = ~(sea_or_low & ~enclosed)
    labels, count = ndimage.label(ground)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    bodies = [i for i in range(1, count + 1) if sizes[i] >= maps.MIN_BODY * pixels]
    assert facts["land_bodies"] == len(bodies)
    assert facts["islands"] == len([b for b in bodies if b not in rim(labels)])
    if bodies:
        assert facts["largest_land_share"] == pytest.approx(sizes[bodies].max() / ground.sum(), abs=1e-3)

    # Highest ground: the top of the field, unless a river, a lake or the coast is drawn over it.
    seen = maps.layers_of(height).classes
    bare = (seen >= maps.SEA) & (seen < maps.LAKE)
    assert (facts["highest"] is not None) == bare.any()
    if facts["highest"]:
        low, high = facts["highest"]["metres"]
        assert low - 1 <= height[bare].max() <= high + 1
        assert 0 <= facts["highest"]["x"] <= 1 and 0 <= facts["highest"]["y"] <= 1
    assert sum(facts["classes"].values()) == pytest.approx(1, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.floats(300, 4100))
def test_a_lone_peak_is_found_where_it_stands(x: float, y: float, top: float):
    rows, cols = 96, 96
    yy, xx = np.mgrid[0:rows, 0:cols] + 0.5
    height = (top + 500) * np.exp(-(((xx / cols - x) ** 2 + (yy / rows - y) ** 2) / 0.02)) - 500
    facts = maps.measure(through_png(maps.render(height)))
    assert facts["land_bodies"] == 1
    high = facts["highest"]
    assert abs(high["x"] - x) < 0.06 and abs(high["y"] - y) < 0.06
    assert high["direction"] == maps.direction(high["x"], high["y"])
    assert high["metres"][0] <= height.max() + 1
    assert high["metres"][1] >= min(height.max(), 4200) * 0.75


def test_counted_shapes():
    height = np.full((128, 128), -300.0)
    height[10:30, 10:30] = 150.0  # island
    height[60:90, 60:100] = 800.0  # island with a lake below the sea's level
    height[70:76, 70:80] = -20.0
    height[:, 120:] = 50.0  # land that runs off the map
    facts = maps.measure(maps.render(height))
    assert (facts["land_bodies"], facts["islands"], facts["lakes"], facts["inland_seas"]) == (3, 2, 1, 0)
    assert facts["lake_share"] == pytest.approx(60 / 128**2, abs=1e-4)
    assert facts["coast"] == 4 * 20 + 2 * (30 + 40) + 128
    assert facts["highest"]["class"] == "upland" and facts["highest"]["metres"] == [750, 825]


def test_a_large_enclosed_water_is_an_inland_sea():
    height = np.full((64, 64), 400.0)
    height[16:48, 16:48] = -200.0
    facts = maps.measure(maps.render(height))
    assert (facts["inland_seas"], facts["lakes"], facts["land_bodies"]) == (1, 0, 1)


def test_a_valley_has_one_river_that_reaches_the_sea():
    yy, xx = np.mgrid[0:128, 0:128].astype(float)
    height = 900 * (1 - yy / 127) + 12 * abs(xx - 64) + 30.0
    height[120:] = -200.0
    layers = maps.layers_of(height)
    facts = maps.facts_of(layers)
    assert facts["rivers"] >= 1 and facts["longest_river"] > 0.3
    river = layers.classes == maps.RIVER
    assert river[40:119, 60:69].any(axis=1).all()  # along the valley, down to the sea
    assert not (river & (height < 0)).any()


def test_water_runs_off_everywhere():
    height = field(5, 0.7, (64, 64), beta=2.0)
    filled = maps.fill_depressions(height)
    assert (filled >= height - 1e-9).all()
    down, area = maps.drainage(filled)
    flat, inner = filled.ravel(), np.zeros((64, 64), bool)
    inner[1:-1, 1:-1] = True
    land = (inner & (height >= 0)).ravel()
    assert (flat[down[land]] < flat[land]).all()
    ends = down == np.arange(down.size)
    assert area[ends].sum() == pytest.approx(height.size)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SHARES, st.sampled_from([0.01, 40.0, 900.0]))
def test_a_flood_stands_no_higher_than_it_must(seed: int, land_share: float, step: float):
    # with coarse steps the ground has plateaus and equal pits
    height = np.rint(field(seed, land_share, (20, 33), beta=2.0) / step) * step
    filled = maps.fill_depressions(height)
    around = np.pad(filled, 1, constant_values=np.inf)
    steps = [(r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    spill = np.min([around[r : r + 20, c : c + 33] for r, c in steps], axis=0)
    held = height < 0
    held[0], held[-1], held[:, 0], held[:, -1] = True, True, True, True
    expected = np.where(held | (height > spill), height, spill + 1e-4)
    assert np.array_equal(filled, expected)


@pytest.mark.parametrize(("share", "word"), [(0.0, "without land"), (1.0, "100%")])
def test_extremes(share: float, word: str):
    facts = maps.measure(maps.render(field(3, share)))
    if share:
        assert facts["land_share"] + facts["lake_share"] == pytest.approx(1, abs=1e-3)
    else:
        assert facts["land_share"] == 0 and facts["highest"] is None
        assert word in maps.sentence(facts)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SHARES)
def test_sentences_say_the_measured_numbers(seed: int, land_share: float):
    facts = maps.measure(maps.render(field(seed, land_share, (64, 64))))
    text = maps.sentence(facts)
    if facts["land_share"]:
        assert f"{facts['land_share']:.0%}" in text
    if facts["highest"]:
        assert str(facts["highest"]["metres"][0]) in text
    assert text.endswith(".") and len(text) < 600


def test_another_picture_gets_no_claims_about_land():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    facts = maps.measure(rgb)
    assert facts["kind"] == "picture" and (facts["width"], facts["height"]) == (50, 40)
    assert "land_share" not in facts
    assert "no relief map" in maps.sentence(facts)


def test_one_foreign_pixel_makes_it_another_picture():
    rgb = maps.render(field(1, 0.5)).copy()
    assert maps.measure(rgb)["kind"] == "map"
    rgb[3, 4] = (255, 0, 255)
    assert maps.measure(rgb)["kind"] == "picture"


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros(9), np.full((16, 16), np.nan)])
def test_bad_fields_are_refused(bad: np.ndarray):
    with pytest.raises(PortValueError, match="height is a finite field"):
        maps.render(bad)


def test_png_bytes_are_deterministic_and_carry_no_time():
    rgb = maps.render(field(2, 0.4))
    data = maps.to_png(rgb)
    assert data == maps.to_png(rgb.copy())
    with Image.open(io.BytesIO(data)) as image:
        assert not image.info


def test_measure_block_reads_artifacts_from_the_blob_store():
    blobs = current_context().blobs
    height = Relief(size=128).run({"seed": 4, "form": "island", "land_share": 0.3})["height"][0, 0]
    sha = blobs.put(maps.to_png(maps.render(height)))
    other = blobs.put(b"some text")
    artifacts = {"images": [{"id": sha, "slot": "images"}], "texts": [{"id": other, "slot": "texts"}]}
    out = MeasureMap().run({"artifacts": artifacts}, strict_types=True)
    assert [f["artifact_id"] for f in out["facts"]] == [sha]
    assert out["facts"][0]["islands"] >= 1
    assert len(out["sentences"]) == 1 and "island" in out["sentences"][0]
    assert MeasureMap().run({"artifacts": {}}) == {"facts": [], "sentences": []}


def test_measure_block_names_what_it_cannot_read():
    sha = current_context().blobs.put(b"no image")
    with pytest.raises(PortValueError, match=r"artifacts\.images\[0\].*no readable image"):
        MeasureMap().run({"artifacts": {"images": [{"id": sha}]}})
    with pytest.raises(PortValueError, match=r"artifacts\.images\[0\] has no id"):
        MeasureMap().run({"artifacts": {"images": [{}]}})


def test_every_form_has_a_direction_word():
    words = {maps.direction(x, y) for x in np.linspace(0, 1, 9) for y in np.linspace(0, 1, 9)}
    assert len(words) == 9 and len(FORMS) == 5
    assert maps.direction(0.9, 0.5) == "east" and maps.direction(0.5, 0.1) == "north"
    assert maps.direction(0.1, 0.9) == "south-west"
