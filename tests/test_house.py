"""The rules of the house, checked on the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("wg_core", "wg_blocks", "resources", "wg_defs")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
TEXTS = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".cfg", ""}


def project_files() -> list[Path]:
    """All files that belong to the project: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen",
    "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "marshal.loads", "shelve.open", "joblib.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "tempfile.mktemp", "input",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def breaches(source: str) -> list[str]:
    """Forbidden calls and imports in a module, each with its line."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}")
            unsafe = {"shell": True, "weights_only": False, "trust_remote_code": True, "verify": False, "allow_pickle": True}
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in unsafe and value is unsafe[keyword.arg]:
                    found.append(f"{node.lineno}: {name}({keyword.arg}={value})")
            if name in ("torch.load", "numpy.load", "np.load"):
                safe = {"torch.load": ("weights_only", True)}.get(name, ("allow_pickle", False))
                chosen = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                if chosen.get(safe[0]) is not safe[1]:
                    found.append(f"{node.lineno}: {name} without {safe[0]}={safe[1]}")
            if name.endswith(".extractall"):
                found.append(f"{node.lineno}: {name}")
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]  # type: ignore[attr-defined]
    return found


def test_there_are_sources() -> None:
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_unsafe_call_in_the_packages(path: Path) -> None:
    """Design 2.13: no pickle, eval, exec, unsafe yaml, shell, or loading that runs code."""
    assert breaches(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec('1')", "import pickle", "from pickle import loads", "import os; os.system('ls')",
        "yaml.load(t)", "subprocess.run(c, shell=True)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
        "t.extractall(d)", "x(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert breaches(source)
    assert not breaches("import yaml; yaml.safe_load(t); torch.load(f, weights_only=True); model.eval(); re.compile('a')")


def test_tests_use_real_things() -> None:
    """Design 2.11: no monkeypatching, no mocks."""
    unreal = re.compile(r"\bmonkeypatch\.(setattr|delattr|setitem)|unittest\.mock|\bMagicMock\b|\bmocker\b")
    found = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__) and unreal.search(p.read_text())]
    assert found == []


def machine_words() -> re.Pattern[str]:
    """Paths of machines and hosts of package registries: spelled apart, so that this file has none itself."""
    paths = [r"/wo" + r"rk/", r"/ho" + r"me/\w", r"/Us" + r"ers/\w", r"/ro" + r"ot/", r"[A-Z]:\\Us" + r"ers"]
    hosts = [r"pyp" + r"i\.org", r"python" + r"hosted", r"registry\.npm" + r"js", r"deb\.deb" + r"ian"]
    return re.compile("|".join(paths + hosts), re.IGNORECASE)


def test_no_file_names_a_machine() -> None:
    """The project speaks of the product only."""
    words = machine_words()
    found: list[str] = []
    for path in project_files():
        if path.suffix not in TEXTS or path.stat().st_size > 2_000_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if words.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_secret_and_no_large_file_is_kept() -> None:
    """Rules of the house: no secrets in files, and what is large is fetched, not kept."""
    secret = re.compile(r"sk-[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")
    for path in project_files():
        assert path.stat().st_size < 2_000_000, path
        if path.suffix in TEXTS:
            assert not secret.search(path.read_text(encoding="utf-8", errors="replace")), path


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}; import sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_importing_the_core_is_light() -> None:
    """Design 2: no torch, no numpy, no orchestrator, tracker or provider."""
    heavy = {"torch", "numpy", "dagster", "mlflow", "openai", "transformers", "diffusers", "scipy", "pandas", "PIL", "onnxruntime"}
    assert imported_by("from wg_core import *") & heavy == set()


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ("Block, Port", "graph pipeline stage world end_world"),
        ("Graph", "pipeline stage world end_world"),
        ("Graph, Pipeline", "stage world end_world"),
        ("Stage", "world end_world"),
        ("EndWorld", "graph pipeline stage world"),
    ],
)
def test_a_level_does_not_import_those_above_it(names: str, absent: str) -> None:
    """04 X-5, freedom of use: a program holds the levels that it names and those below them."""
    code = f"from wg_core import {names}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(run.stdout.split()).isdisjoint(f"wg_core.levels.{level}" for level in absent.split())


def test_all_public_names_are_there() -> None:
    """Design 4: each is imported at its first use; another is no attribute."""
    import wg_core

    assert all(getattr(wg_core, name) is not None for name in wg_core.__all__)
    assert set(wg_core.__all__) == set(wg_core._HOMES) <= set(dir(wg_core))
    with pytest.raises(AttributeError, match="Grph"):
        wg_core.Grph  # noqa: B018


def test_building_a_graph_is_light_too() -> None:
    """Design 2: torch is imported only when a block needs it."""
    statement = "from wg_core import Graph, Block, Port; import blocks_for_tests as b; b.chain(b.Affine()).run({'x': 1})"
    assert not {"torch", "numpy"} & imported_by(f"import sys; sys.path.insert(0, 'tests'); {statement}")


def test_importing_the_core_is_quick() -> None:
    """Design 2: under 0.3 s of processor time, as the best of several fresh interpreters (the machine may be busy)."""

    code = "import time; began = time.process_time(); import wg_core; print(time.process_time() - began)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(8)]
    best = min(float(run.stdout) for run in runs)
    assert best < 0.3, f"{best:.2f} s"


def raised_classes() -> set[str]:
    """Names of the engine's error classes that its code raises."""
    known = {n.name for n in ast.parse((ROOT / "wg_core/errors.py").read_text()).body if isinstance(n, ast.ClassDef)}
    raised: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised.add(dotted(node.exc.func).split(".")[-1])
    return raised & known


def test_every_error_that_is_raised_has_a_test() -> None:
    """01 A-2: each class of the family that the code raises is expected by name in some test."""
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py") if p.name != Path(__file__).name)
    raised = raised_classes()
    assert len(raised) > 15
    imports = re.compile(r"^(from .*|import .*|    \w+,)$", re.MULTILINE)  # a name that is only imported proves nothing
    used = set(re.findall(r"\b\w+\b", imports.sub("", tests)))
    assert raised - used == set()


def test_the_family_of_errors() -> None:
    """01 F-1: one root, a builtin beside it, messages without the quotes of KeyError."""
    from wg_core import errors

    family = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.WGError)]
    for cls in family:
        assert cls.__doc__
        if cls not in (errors.WGError, errors.AbortRun):
            assert any(base.__module__ == "builtins" and base not in (Exception, object) for base in cls.__mro__), cls
        if cls is not errors.ValidationError:
            assert str(cls("plain words")) == "plain words"


def test_every_module_says_what_it_is() -> None:
    """House: one file, one concept; its first line says which."""
    silent = [
        str(p.relative_to(ROOT)) for p in SOURCES if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert silent == []


def test_numbers_and_flags_of_a_file_are_strict() -> None:
    """02 S-14: what JSON Schema calls a number, integer or boolean is one for the loader; a text never is."""
    source = (ROOT / "wg_core" / "assembly" / "models.py").read_text(encoding="utf-8")
    fields = [line.strip() for line in source.splitlines() if re.match(r"    \w+: (int|float|bool)\b", line)]
    assert fields == [], "use Whole, Real and Flag"
