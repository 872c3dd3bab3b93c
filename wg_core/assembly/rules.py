"""The wiring rules: which output of a role feeds which input of another. Data only; `wiring` applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wg_core.assembly.roles import KNOWN_ROLES
from wg_core.errors import ConfigError, NodeError, did_you_mean

# What may be said about a node for wiring; the first value holds where nothing is said.
HINTS: dict[str, tuple[str, ...]] = {"branch": ("cond", "uncond"), "codec": ("decode", "encode")}


@dataclass(frozen=True, slots=True)
class Rule:
    """Output `source_role.source_port` feeds input `target_role.target_port`.

    Where several rules feed one input that takes a single edge, the highest `priority` wins. `source_hints` and
    `target_hints` must hold on the nodes; `same` names hints that must agree; `itself` joins a node only to itself;
    `follows` names another input of the target that must be fed by the same node.
    """

    source_role: str
    source_port: str
    target_role: str
    target_port: str
    carry: bool = False
    priority: int = 0
    source_hints: Mapping[str, str] = field(default_factory=dict[str, str])
    target_hints: Mapping[str, str] = field(default_factory=dict[str, str])
    same: tuple[str, ...] = ()
    itself: bool = False
    follows: str | None = None


_rules: list[Rule] = []
_by_target: dict[str, list[tuple[int, Rule]]] = {}


def register_rule(rule: Rule) -> Rule:
    """Add a rule at the end of the table; the same one again changes nothing.

    Raises: ConfigError for an unknown role, a port that the role's contract lacks, or an unknown hint.
    """
    for role, port, direction in (
        (rule.source_role, rule.source_port, "out"),
        (rule.target_role, rule.target_port, "in"),
    ):
        contract = KNOWN_ROLES.get(role)
        if contract is None:
            raise ConfigError(
                f"wiring rule: unknown role {role!r}; {did_you_mean(role, KNOWN_ROLES)}; register_role makes one known"
            )
        ports = {p.name for p in contract.ports if p.direction == direction}
        if ports and port not in ports:
            raise ConfigError(f"wiring rule: role {role!r} has no {direction}put {port!r}; {did_you_mean(port, ports)}")
    for hints in (rule.source_hints, rule.target_hints, {name: HINTS.get(name, ("",))[0] for name in rule.same}):
        check_hints(hints, "wiring rule", ConfigError)
    if rule not in _rules:
        _by_target.setdefault(rule.target_role, []).append((len(_rules), rule))
        _rules.append(rule)
    return rule


def get_rules(source_role: str | None = None, target_role: str | None = None) -> list[Rule]:
    """The rules from one role to another, in table order; None is any role."""
    return [r for r in _rules if source_role in (None, r.source_role) and target_role in (None, r.target_role)]


def rules_into(role: str) -> list[tuple[int, Rule]]:
    """The rules that feed a role, each with its place in the table."""
    return _by_target.get(role, [])


def check_hints(hints: Mapping[str, str], owner: str, error: type[NodeError] | type[ConfigError] = NodeError) -> None:
    """Raises: `error` for an unknown hint or value."""
    for name, value in hints.items():
        if name not in HINTS:
            raise error(f"{owner}: unknown hint {name!r}; {did_you_mean(str(name), HINTS)}")
        if value not in HINTS[name]:
            raise error(f"{owner}: hint {name!r} is {value!r}; {did_you_mean(str(value), HINTS[name])}")


def hint(hints: Mapping[str, str], name: str) -> str:
    """What holds for a hint: the given value, else its default."""
    return hints.get(name, HINTS[name][0])


def _table() -> None:
    cond, uncond, encode, decode = {"branch": "cond"}, {"branch": "uncond"}, {"codec": "encode"}, {"codec": "decode"}
    branch = ("branch",)
    # A lone tokenizer serves both branches; one of the same branch is preferred. The mask comes with the tokens.
    for priority, same in ((1, branch), (0, ())):
        register_rule(Rule("tokenizer", "token_ids", "conditioner", "input", priority=priority, same=same))
    register_rule(Rule("tokenizer", "attention_mask", "conditioner", "attention_mask", follows="input"))
    register_rule(Rule("conditioner", "embedding", "backbone", "condition", same=branch))
    register_rule(Rule("conditioner", "embedding", "adapter", "condition", same=branch))
    register_rule(Rule("adapter", "adapted", "backbone", "adapter_features", same=branch))
    register_rule(Rule("backbone", "pred", "guidance", "pred_cond", source_hints=cond))
    register_rule(Rule("backbone", "pred", "guidance", "pred_uncond", source_hints=uncond))
    # Guidance stands between backbone and solver where there is one.
    register_rule(Rule("guidance", "pred_guided", "solver", "pred", priority=1))
    register_rule(Rule("backbone", "pred", "solver", "pred", source_hints=cond))
    # The loop: the next iteration of backbone and solver begins where the solver ended.
    for output, into in (("next_latent", "latent"), ("next_timestep", "timestep")):
        register_rule(Rule("solver", output, "backbone", into, carry=True))
        register_rule(Rule("solver", output, "solver", into, carry=True, itself=True))
    for port in ("latent", "timestep"):
        for role in ("backbone", "solver"):
            register_rule(Rule("initializer", port, role, port, priority=1))
    # The codec stays outside: an encoding one before the loop, a decoding one behind it.
    register_rule(Rule("codec", "encode_latent", "initializer", "init_latent", priority=1, source_hints=encode))
    for role in ("solver", "backbone"):
        register_rule(Rule("codec", "encode_latent", role, "latent", source_hints=encode))
    register_rule(Rule("solver", "next_latent", "codec", "decode_latent", target_hints=decode))


_table()
