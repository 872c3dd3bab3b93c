"""What the page shows of a step: story, picture, times, tokens, reasons."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from wg_core.state.forms import BLOCKS

THUMBNAIL_BYTES = 20_000
"""The event log keeps every picture for good, so they are small."""

INLINE_BYTES = 980
"""The page shows markdown in place below 1000 characters, and behind a click above."""


def story(state: Mapping[str, Any] | None) -> str:
    """What happened in `state`, or what should happen next, as markdown; empty where nothing is told."""
    state = state or {}
    for block, field in (("outcome", "narrative"), ("intent", "text")):
        text = (state.get(block) or {}).get(field)
        if text:
            return str(text)
    return ""


def block_markdown(name: str, value: Any) -> str:
    """One block of a state as markdown."""
    if not value:
        return "(empty)"
    if name == "intent":
        return str(value.get("text", ""))
    if name == "outcome":
        changed = value.get("changes") or ()
        changes = "\n".join(f"- {c.get('op')} {c.get('kind')} **{c.get('id')}**" for c in changed)
        return f"{value.get('narrative', '')}\n\n{changes}".strip()
    if name == "descriptions":
        return "\n\n".join(str(item.get("text", "")) for item in value.get("items") or ())
    return f"```json\n{json.dumps(value, indent=1, ensure_ascii=False)[:8000]}\n```"


def pictures(state: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The artifacts of `state` that are images."""
    slots = (state or {}).get("artifacts") or {}
    found = [a for artifacts in slots.values() if isinstance(artifacts, Sequence) for a in artifacts]
    return [a for a in found if isinstance(a, Mapping) and str(a.get("media_type", "")).startswith("image/")]


def picture(state: Mapping[str, Any] | None, blobs: Any) -> dict[str, dg.MetadataValue]:
    """The first image of `state`: small inside the table, larger behind a click, and the path of the file."""
    for artifact in pictures(state):
        sha = str(artifact["id"])
        data = blobs.get(sha)
        shown: dict[str, dg.MetadataValue] = {
            "thumbnail": dg.MetadataValue.md(f"![]({data_uri(data, 'WEBP', 128, INLINE_BYTES)})"),
            "picture": dg.MetadataValue.md(f"![{sha[:12]}]({data_uri(data, 'JPEG', 320, THUMBNAIL_BYTES)})"),
            "picture_id": dg.MetadataValue.text(sha),
        }
        if hasattr(blobs, "path"):
            shown["picture_file"] = dg.MetadataValue.path(str(Path(blobs.path(sha)).resolve()))
        return shown
    return {}


def data_uri(data: bytes, form: str, size: int, most: int) -> str:
    """An image file as a `data:` URI of at most `most` characters, at most `size` pixels wide and high."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    while True:
        small = rgb.copy()
        small.thumbnail((size, size))
        for quality in (80, 50, 25, 8):
            out = io.BytesIO()
            small.save(out, form, quality=quality)
            uri = f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
            if len(uri) <= most or (size <= 8 and quality == 8):
                return uri
        size = size * 3 // 4


def record_metadata(record: Mapping[str, Any]) -> dict[str, dg.MetadataValue]:
    """One stage's record: whether and why it ran, what it read and wrote, seconds and tokens as numbers."""
    shown: dict[str, dg.MetadataValue] = {
        "ran": dg.MetadataValue.bool(bool(record.get("ran"))),
        "reason": dg.MetadataValue.text(str(record.get("reason") or "its blocks were there")),
        "read": dg.MetadataValue.text(", ".join(block_names(record.get("read") or ()))),
        "wrote": dg.MetadataValue.text(", ".join(block_names(record.get("wrote") or ()))),
    }
    shown.update(numbers([record]))
    if record.get("usage"):
        shown["models"] = dg.MetadataValue.text(", ".join(sorted(record["usage"])))
    return shown


def block_names(blocks: Iterable[int | str]) -> list[str]:
    """Names of blocks that are given by number or by name."""
    return [BLOCKS[block - 1] if isinstance(block, int) else block for block in blocks]


def numbers(records: Iterable[Mapping[str, Any]]) -> dict[str, dg.MetadataValue]:
    """Seconds, calls, tokens and cost, summed; numeric, so that the page plots them over the steps."""
    return {
        name: dg.MetadataValue.float(value) if name in ("seconds", "cost") else dg.MetadataValue.int(int(value))
        for name, value in totals(records).items()
    }


def totals(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds, model calls, tokens and cost of `records`, summed; cost where any model has a price."""
    total = {"seconds": 0.0, "model_calls": 0.0, "prompt_tokens": 0.0, "completion_tokens": 0.0}
    for record in records:
        total["seconds"] += float(record.get("seconds") or 0.0)
        for used in (record.get("usage") or {}).values():
            total["model_calls"] += used.get("calls", 0)
            total["prompt_tokens"] += used.get("prompt_tokens", 0)
            total["completion_tokens"] += used.get("completion_tokens", 0)
            if "cost" in used:
                total["cost"] = total.get("cost", 0.0) + used["cost"]
    total["seconds"] = round(total["seconds"], 4)
    total["tokens"] = total["prompt_tokens"] + total["completion_tokens"]
    return total


def node_table(nodes: Sequence[tuple[str, float]], most: int = 200) -> dict[str, dg.MetadataValue]:
    """Seconds of each node, in the order in which they ended."""
    if not nodes:
        return {}
    rows = [dg.TableRecord({"node": path, "seconds": round(seconds, 4)}) for path, seconds in nodes[:most]]
    return {"nodes": dg.MetadataValue.table(rows)}


def profile(nodes: Sequence[Any], file: Path, most: int = 200) -> dict[str, dg.MetadataValue]:
    """What a profile found: the seconds of each node, those that took the most by themselves first, and its file."""
    rows = [
        dg.TableRecord({"node": n.path, "calls": n.calls, "seconds": round(n.seconds, 4), "own_seconds": round(n.own, 4)})
        for n in nodes[:most]
    ]
    table = {"profile": dg.MetadataValue.table(rows)} if rows else {}
    return {**table, "profile_file": dg.MetadataValue.path(str(file))}


def stage_table(records: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    """The stages of a step, one row each."""
    rows = [
        dg.TableRecord(
            {
                "stage": str(r.get("role")),
                "ran": bool(r.get("ran")),
                "reason": str(r.get("reason") or ""),
                "seconds": round(float(r.get("seconds") or 0.0), 4),
                "tokens": int(totals([r])["tokens"]),
            }
        )
        for r in records
    ]
    return dg.MetadataValue.table(rows)
