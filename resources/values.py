"""Values between ops and of assets: JSON files; media stay in the blob store and are named by their hash."""

import json
import os
import re
from pathlib import Path
from typing import Any

import dagster as dg

_PART = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


class JsonValues(dg.ConfigurableIOManager):
    """Writes each value as one JSON file below `root`.

    Values between ops lie under the id of their run, so that a re-execution finds them; the values of assets lie
    under their key and partition.
    """

    root: str

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write `obj`. Raises: TypeError if it is not JSON."""
        path = self._path(context)
        try:
            data = json.dumps(obj, ensure_ascii=False, allow_nan=False, sort_keys=True, indent=1)
        except (TypeError, ValueError) as error:
            where = "/".join(context.get_identifier())
            raise TypeError(
                f"output {where} is not JSON ({error}); put bytes into the world's blob store and return their hash"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_text(data, encoding="utf-8")
        os.replace(partial, path)
        if context.has_asset_key:
            context.add_output_metadata({"value": dg.MetadataValue.path(str(path))})

    def load_input(self, context: dg.InputContext) -> Any:
        """Read a value that an op or asset wrote. Raises: FileNotFoundError."""
        output = context.upstream_output
        if output is None:
            raise FileNotFoundError(f"input {context.name!r} has no upstream output to load")
        path = self._path(output, context)
        if not path.is_file():
            raise FileNotFoundError(f"no value at {path}; run the op or materialize the asset that makes it again")
        return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, output: dg.OutputContext, reader: dg.InputContext | None = None) -> Path:
        if output.has_asset_key:
            source = reader or output
            keyed = source.asset_partition_keys[0] if source.has_asset_partitions else "value"
            parts = ["assets", *output.asset_key.path, keyed]
        else:
            parts = ["runs", *output.get_identifier()]
        for part in parts:
            if not _PART.fullmatch(part) or part in {".", ".."}:
                raise ValueError(f"{part!r} cannot be part of a file name: use letters, digits, '_', '-' and '.'")
        return Path(self.root).joinpath(*parts).with_suffix(".json")
