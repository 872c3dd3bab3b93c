"""The language model stand-in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from wg_blocks.json_schema import problems
from wg_blocks.llm_fake import FakeLLM
from wg_blocks.llm_local import CausalLM
from wg_core.errors import ConfigError, OutputContractError

OUTCOME = {
    "$defs": {"id": {"type": "string", "pattern": "^[a-z][a-z_]{2,24}$"}},
    "type": "object",
    "properties": {
        "narrative": {"type": "string", "minLength": 40, "maxLength": 200},
        "when": {"type": "string", "format": "date"},
        "changes": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "op": {"enum": ["add", "update", "retire"]},
                    "id": {"$ref": "#/$defs/id"},
                    "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                    "level": {"type": "integer", "multipleOf": 5, "minimum": -12, "maximum": 40},
                    "next": {"anyOf": [{"$ref": "#/$defs/id"}, {"type": "null"}]},
                },
                "required": ["op", "id", "weight", "level", "next"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["narrative", "when", "changes"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"name": {"enum": ["a", "b"]}, "below": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["name", "below"],
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize("schema", [OUTCOME, TREE], ids=["outcome", "recursive"])
def test_instances_are_valid_equal_by_seed_and_differ_by_seed(schema: dict) -> None:
    answers = [FakeLLM().run({"prompt": "p", "schema": schema, "params": {"seed": s}})["data"] for s in range(12)]
    assert all(problems(schema, a) == [] for a in answers)
    assert len({str(a) for a in answers}) > 5
    assert answers[3] == FakeLLM().run({"prompt": "p", "schema": schema, "params": {"seed": 3}})["data"]


def test_text_depends_on_prompt_context_and_seed() -> None:
    fake = FakeLLM()
    base = fake.run({"prompt": "p", "params": {"seed": 1}})
    assert base == fake.run({"prompt": "p", "params": {"seed": 1}})
    for other in ({"prompt": "q"}, {"prompt": "p", "context": "c"}, {"prompt": "p", "system": "s"}):
        assert fake.run({**other, "params": {"seed": 1}})["text"] != base["text"]
    assert base["text"].endswith(".") and base["usage"]["completion_tokens"] == len(base["text"].split())


def test_same_ports_and_settings_as_the_real_one() -> None:
    assert FakeLLM.ports == CausalLM.ports and FakeLLM.role == CausalLM.role
    with pytest.raises(ConfigError, match="temprature"):
        FakeLLM().run({"prompt": "p", "params": {"temprature": 1}})
    out = FakeLLM().run({"prompt": ["a", "b"], "schema": {"type": "boolean"}})
    assert len(out["text"]) == len(out["data"]) == 2


def test_scripted_answers_come_in_turn_and_are_checked() -> None:
    fake = FakeLLM(script=["one", {"n": 2}])
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert fake.run({"prompt": "p"})["text"] == "one"
    assert fake.run({"prompt": "p", "schema": schema})["data"] == {"n": 2}
    assert fake.run({"prompt": "p"})["text"] == "one"
    with pytest.raises(OutputContractError, match="breaks the schema"):
        FakeLLM(script=[{"n": "x"}]).run({"prompt": "p", "schema": schema})
    with pytest.raises(OutputContractError, match="no JSON"):
        FakeLLM(script=["prose"]).run({"prompt": "p", "schema": schema})


def test_what_has_no_instance_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no valid instance"):
        FakeLLM().run({"prompt": "p", "schema": {"type": "integer", "not": {"type": "number"}}})


def test_it_imports_no_model_library() -> None:
    code = (
        "import sys; from wg_blocks.llm_fake import FakeLLM; import wg_blocks.llm_local, wg_blocks.text;"
        "FakeLLM().run({'prompt': 'p', 'schema': {'type': 'string'}});"
        "bad = {'torch', 'transformers', 'numpy', 'llguidance'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
