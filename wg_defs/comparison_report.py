"""A comparison of a LoRA world and its base for people: markdown for the page, one HTML file with the pictures."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from wg_defs.metadata import data_uri

PICTURE = 320
PICTURE_BYTES = 60_000

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2733;background:#fbfaf7}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.3rem .9rem;border-bottom:1px solid #d9d4c8;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem}
.pair>div{background:#fff;border:1px solid #e3ddcf;border-radius:6px;padding:1rem}h3{margin:.2rem 0}
img{max-width:100%;border-radius:4px}.lack{color:#a33}small{color:#667}
"""


def numbers(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The measured numbers, one row each: what, base, LoRA world."""
    sides = [report["base"], report["lora"]]
    stages = sorted({*sides[0]["by_stage"], *sides[1]["by_stage"]})
    rows = [("held-out loss, nats per token", *[f"{s['loss']:.4f}" for s in sides])]
    rows += [(f"  of these: {stage}", *[f"{s['by_stage'][stage]:.4f}" for s in sides]) for stage in stages]
    rows += [
        ("perplexity", *[f"{s['perplexity']:.2f}" for s in sides]),
        ("structures valid", *[_share(s["structures"]["valid_share"], s["structures"]["asked"]) for s in sides]),
        (
            "structures valid at the first try",
            *[_share(s["structures"]["first_try_share"], s["structures"]["asked"]) for s in sides],
        ),
        ("valid when decoding is free", *[_share(s["free"]["valid_share"], s["free"]["asked"]) for s in sides]),
        ("distinct words", *[_share(s["diversity"]["distinct_1"], s["diversity"]["words"]) for s in sides]),
        ("distinct pairs of words", *[_share(s["diversity"]["distinct_2"]) for s in sides]),
    ]
    return rows


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The measured numbers for a tracker, `compare/SIDE/NAME`; what was not measured is left out."""
    found: dict[str, float] = {}
    for side in ("base", "lora"):
        of = report[side]
        values = {
            "held_out_loss": of["loss"], "perplexity": of["perplexity"], "valid_share": of["structures"]["valid_share"],
            "first_try_share": of["structures"]["first_try_share"], "free_valid_share": of["free"]["valid_share"],
            "distinct_1": of["diversity"]["distinct_1"], "distinct_2": of["diversity"]["distinct_2"],
            **{f"held_out_loss_{stage}": loss for stage, loss in of["by_stage"].items()},
        }  # fmt: skip
        found.update({f"compare/{side}/{name}": float(value) for name, value in values.items() if value is not None})
    return found


def _share(value: float | None, of: int | None = None) -> str:
    if value is None:
        return "none asked"
    return f"{value:.0%}" + (f" of {of}" if of is not None else "")


def markdown(report: Mapping[str, Any], wrong: Sequence[str] = ()) -> str:
    """The comparison as markdown; texts that a model wrote stand in quotes."""
    base, lora = report["base"]["world_id"], report["lora"]["world_id"]
    lines = [f"# {lora} beside {base}", "", f"Equal seeds ({report['seed']}), steps of each: {report['steps']}.", ""]
    lines += [f"**{'Does not pass: ' + '; '.join(wrong) if wrong else 'Passes.'}**", ""]
    lines += [f"| | {base} | {lora} |", "|---|---:|---:|"]
    lines += [f"| {name} | {a} | {b} |" for name, a, b in numbers(report)]
    for pair in _pairs(report):
        lines += ["", f"## Step {pair[0]['number']}"]
        for name, step in zip((base, lora), pair, strict=True):
            lines += ["", f"**{name}**", ""]
            lines += [f"> {label}: {_one_line(text)}" for label, text in _texts(step)]
            lines += [f"> Picture: {name}" for name in step["pictures"]]
    return "\n".join(lines) + "\n"


def html(report: Mapping[str, Any], folder: Path, wrong: Sequence[str] = ()) -> str:
    """The comparison as one page that loads nothing: pictures of `folder` stand in it, texts are escaped."""
    base, lora = (escape(str(report[side]["world_id"])) for side in ("base", "lora"))
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{lora} beside {base}</title><style>{_STYLE}</style><h1>{lora} beside {base}</h1>"
        f"<p>Equal seeds ({report['seed']}), steps of each: {report['steps']}.</p>",
        f'<p class="lack">Does not pass: {escape("; ".join(wrong))}</p>' if wrong else "<p>Passes.</p>",
        f"<table><tr><th></th><th>{base}</th><th>{lora}</th></tr>",
        *(
            f'<tr><td>{escape(n)}</td><td class="n">{escape(a)}</td><td class="n">{escape(b)}</td></tr>'
            for n, a, b in numbers(report)
        ),
        "</table>",
    ]
    for pair in _pairs(report):
        parts.append(f'<h2>Step {pair[0]["number"]}</h2><div class="pair">')
        for name, step in zip((base, lora), pair, strict=True):
            texts = "".join(f"<p><small>{label}</small><br>{escape(text)}</p>" for label, text in _texts(step))
            shown = "".join(f'<img alt="{escape(file)}" src="{_picture(folder / file)}">' for file in step["pictures"])
            parts.append(f"<div><h3>{name}</h3>{texts}{shown}</div>")
        parts.append("</div>")
    return "".join(parts) + "</html>\n"


def write(report: Mapping[str, Any], folder: Path, wrong: Sequence[str] = ()) -> dict[str, Path]:
    """Write `report.json`, `report.md` and `report.html` to `folder`; gives their paths by suffix."""
    texts = {
        "json": json.dumps({**report, "wrong": list(wrong)}, indent=1, ensure_ascii=False) + "\n",
        "md": markdown(report, wrong),
        "html": html(report, folder, wrong),
    }
    files = {suffix: folder / f"report.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        files[suffix].write_text(text, encoding="utf-8")
    return files


def _pairs(report: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(report["base"]["lived"], report["lora"]["lived"], strict=True))


def _texts(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "error" in step:
        return [("Failed", str(step["error"]))]
    texts = [("Story", str(step["story"])), *(("Seen", text) for text in step["seen"]), ("Next", str(step["intent"]))]
    return [(label, text) for label, text in texts if text]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _picture(file: Path) -> str:
    return data_uri(file.read_bytes(), "JPEG", PICTURE, PICTURE_BYTES)
