"""How tensors lie in a file: safetensors, JSON, or torch's own format read without code. Others are added by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from wg_core.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


class Backend(Protocol):
    """Writes and reads one file of named tensors; they come contiguous, on the CPU, and share no memory."""

    suffix: str

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None: ...
    def read(self, path: Path) -> dict[str, Tensor]: ...


class Safetensors:
    """The default: safe, mapped into memory on reading."""

    suffix = ".safetensors"

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        import safetensors.torch

        safetensors.torch.save_file(tensors, path)

    def read(self, path: Path) -> dict[str, Tensor]:
        import safetensors.torch

        return safetensors.torch.load_file(path)


class Json:
    """Readable structure, bytes as base64: for tests and small blocks."""

    suffix = ".tensors.json"

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        import torch

        entries: dict[str, Any] = {}
        for name, tensor in tensors.items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            entries[name] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "base64": base64.b64encode(data).decode("ascii"),
            }
        path.write_text(json.dumps(entries), encoding="utf-8")

    def read(self, path: Path) -> dict[str, Tensor]:
        import torch

        tensors: dict[str, Tensor] = {}
        for name, entry in cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8"))).items():
            dtype = getattr(torch, entry["dtype"], None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"tensor {name!r} has unknown dtype {entry['dtype']!r}")
            data = bytearray(base64.b64decode(entry["base64"], validate=True))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(entry["shape"])
        return tensors


class TorchFile:
    """`torch.save` files, read with `weights_only=True`: nothing in the file is run."""

    suffix = ".pt"

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        import torch

        torch.save(tensors, path)

    def read(self, path: Path) -> dict[str, Tensor]:
        import torch

        found: Any = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(
            isinstance(v, torch.Tensor) for v in cast("dict[Any, Any]", found).values()
        ):
            raise ValueError("the file holds something else than named tensors")
        return cast("dict[str, Tensor]", found)


_BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Make a backend known under `name`. Raises: CheckpointError for a name that is taken by another."""
    known = _BACKENDS.setdefault(name, backend)
    if known is not backend:
        raise CheckpointError(f"checkpoint backend {name!r} is registered already as {type(known).__name__}")


def get_backend(name: str) -> Backend:
    """Raises: CheckpointError for an unknown name."""
    found = _BACKENDS.get(name)
    if found is None:
        raise CheckpointError(f"no checkpoint backend {name!r}; {did_you_mean(name, _BACKENDS)}")
    return found


def read_tensors(path: Path, backend: str | None = None) -> dict[str, Tensor]:
    """Named tensors of one file, the backend by name or by the file's suffix.

    Raises: FileNotFoundError, CheckpointError for an unreadable file.
    """
    if backend is None:
        backend = next((n for n, b in _BACKENDS.items() if path.name.endswith(b.suffix)), None)
        if backend is None:
            known = ", ".join(b.suffix for b in _BACKENDS.values())
            raise CheckpointError(f"{path}: no checkpoint backend reads {path.suffix or 'such'} files; known: {known}")
    reader = get_backend(backend)
    try:
        return reader.read(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is no readable {backend} file: {type(error).__name__}: {error}") from error


register_backend("safetensors", Safetensors())
register_backend("json", Json())
register_backend("torch", TorchFile())
