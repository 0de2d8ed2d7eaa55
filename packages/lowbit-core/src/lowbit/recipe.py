"""Recipes: which format each parameter gets, as an ordered list of rules that survives a trip through JSON.

Rules speak of parameters, not modules, by their fully qualified name. The first rule that matches a parameter decides
it, so exceptions stand before what they are exceptions to:

    Recipe((
        Rule.of("lm_head.weight", None),
        Rule.of("*.experts.gate_up_proj", "MXFP4", k_axis=-2),
        Rule.of("*", "INT4_G128", modules=["Linear"]),
    ))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, Final, cast

from lowbit.activation import Activation
from lowbit.errors import FormatError, RecipeError
from lowbit.format import Format

VERSION: Final = 1
"""The version of the JSON schema that this lowbit writes, and the newest that it reads."""

_REGEX = "re:"
_GLOB = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do with the parameters that `match` names: quantize them to `weight`, or keep them where it is None.

    `match` is a name, a glob (it holds one of `*?[`; `*` crosses dots), or `re:` and a regular expression for the whole
    name. Letter case counts.

    Raises:
        RecipeError: the match is empty, its regular expression is malformed, `modules` is empty, or activations are
            quantized where the weight is not.
    """

    match: str
    weight: Format | None
    activation: Activation | None = None
    # The dim the operator sums over, along which groups run: -1 in a Linear's (N, K), -2 in experts stored (E, K, N).
    k_axis: int = -1
    # Only parameters of a module that is, or inherits from, a class of one of these names; None: of any module.
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a model is seen."""
        if not self.match:
            raise RecipeError("a rule's match is empty; '*' matches every parameter")
        if self.modules is not None and not self.modules:
            raise RecipeError(f"rule {self.match!r} allows no module class; leave modules out to allow all")
        if self.activation is not None and self.weight is None:
            raise RecipeError(
                f"rule {self.match!r} quantizes activations ({self.activation}) and keeps the weight; "
                "give it a weight format, or no activation"
            )
        if self.match.startswith(_REGEX):
            try:
                re.compile(self.match.removeprefix(_REGEX))
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"rule {self.match!r} holds a malformed regular expression: {error}") from error

    @classmethod
    def of(
        cls,
        match: str,
        weight: Format | str | None,
        *,
        activation: Activation | str | None = None,
        k_axis: int = -1,
        modules: Iterable[str] | None = None,
    ) -> Rule:
        """A rule whose formats may be given as spec strings or names, and its one module class as a string.

        Raises:
            FormatError: a spec does not follow the grammar.
            RecipeError: as the class.
        """
        return cls(
            match,
            Format.parse(weight) if isinstance(weight, str) else weight,
            Activation.parse(activation) if isinstance(activation, str) else activation,
            k_axis,
            None if modules is None else (modules,) if isinstance(modules, str) else tuple(modules),
        )

    def matches(self, name: str, modules: Iterable[str] = ()) -> bool:
        """Whether the rule speaks of parameter `name`, owned by a module of classes `modules` (its MRO; () unknown)."""
        return self.matches_name(name) and (self.modules is None or not set(self.modules).isdisjoint(modules))

    @property
    def exact(self) -> bool:
        """Whether `match` is a name, not a pattern."""
        return not self.match.startswith(_REGEX) and _GLOB.isdisjoint(self.match)

    def matches_name(self, name: str) -> bool:
        """Whether `match` alone fits `name`, whatever module owns the parameter."""
        if self.exact:
            return self.match == name
        if self.match.startswith(_REGEX):
            return re.fullmatch(self.match.removeprefix(_REGEX), name) is not None
        return fnmatchcase(name, self.match)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules in the order they are asked; the first that matches a parameter decides it."""

    rules: tuple[Rule, ...]

    def resolve(self, name: str, modules: Iterable[str] = ()) -> Rule | None:
        """The one rule that decides parameter `name` of a module of classes `modules`; None where no rule matches."""
        return next((rule for rule in self.rules if rule.matches(name, modules)), None)

    def to_json(self) -> str:
        """The recipe as JSON; `Recipe.from_json(recipe.to_json()) == recipe`."""
        rules = [
            {
                "match": rule.match,
                "weight": None if rule.weight is None else str(rule.weight),
                "activation": None if rule.activation is None else str(rule.activation),
                "k_axis": rule.k_axis,
                "modules": rule.modules,
            }
            for rule in self.rules
        ]
        return json.dumps({"version": VERSION, "rules": rules}, indent=2)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe that `text` holds; formats may be named as `Rule.of` takes them, and defaults left out.

        Raises:
            RecipeError: the text is not JSON, is of another version, or has keys or values that the schema has not.
        """
        try:
            document: object = json.loads(text, object_pairs_hook=_unique)
        except RecipeError:
            raise
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"the recipe is not JSON: {error}") from error
        # A newer version may have keys of which this one knows nothing, so the version is judged before the rest.
        version = cast("dict[str, object]", document).get("version") if isinstance(document, dict) else None
        if type(version) is int and version != VERSION:
            raise RecipeError(
                f"the recipe needs a lowbit that reads recipe version {version}; this one reads {VERSION}"
            )
        fields = _fields(cast("object", document), "the recipe", {"version": (int,), "rules": (list,)})
        return Recipe(tuple(_rule(rule, f"rule {number}") for number, rule in enumerate(fields["rules"], 1)))


_RULE: dict[str, tuple[type, ...]] = {
    "match": (str,),
    "weight": (str, NoneType),
    "activation": (str, NoneType),
    "k_axis": (int,),
    "modules": (list, NoneType),
}
_JSON_NAMES = {str: "a string", int: "a whole number", list: "an array", NoneType: "null"}


def _rule(value: object, where: str) -> Rule:
    fields = _fields(value, where, _RULE, optional=("activation", "k_axis", "modules"))
    if any(type(name) is not str for name in fields.get("modules") or ()):
        raise RecipeError(f"{where}: modules holds {fields['modules']}; needed are class names, as strings")
    try:
        return Rule.of(**fields)
    except (FormatError, RecipeError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _fields(
    value: object, where: str, kinds: dict[str, tuple[type, ...]], *, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON object `value`, once its keys and their types are those of `kinds`."""
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is {json.dumps(value):.40}; needed is an object with {', '.join(kinds)}")
    fields = cast("dict[str, Any]", value)
    if unknown := fields.keys() - kinds.keys():
        raise RecipeError(f"{where} has unknown keys {', '.join(sorted(unknown))}; known are {', '.join(kinds)}")
    for key, allowed in kinds.items():
        if key not in fields:
            if key not in optional:
                raise RecipeError(f"{where} has no {key}; needed is {_either(allowed)}")
        # Not isinstance: JSON's true is no number.
        elif type(fields[key]) not in allowed:
            raise RecipeError(f"{where}: {key} is {json.dumps(fields[key]):.40}; needed is {_either(allowed)}")
    return fields


def _either(kinds: tuple[type, ...]) -> str:
    return " or ".join(_JSON_NAMES[kind] for kind in kinds)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise RecipeError(f"an object repeats a key among {', '.join(key for key, _ in pairs)}; write each once")
    return fields
