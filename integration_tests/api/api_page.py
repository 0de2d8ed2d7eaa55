"""docs/api.md: every public name of every distribution. `python integration_tests/api/api_page.py` writes it.

Public is what the modules below name in `__all__`, and the members of these classes that begin with no underscore. A
signature has what calls are written with: parameters and their defaults.
"""

from __future__ import annotations

import ast
import inspect
import sys
import typing
from importlib import import_module
from itertools import pairwise
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/api.md"
MODULES = {
    "lowbit-core": (
        "lowbit",
        *("lowbit.backends", "lowbit.bench", "lowbit.blocked", "lowbit.conventions", "lowbit.hadamard"),
        *("lowbit.observer", "lowbit.packing", "lowbit.testing"),
    ),
    "lowbit-algos": ("lowbit_algos",),
    "lowbit-hf": ("lowbit_hf",),
    "lowbit-moe": ("lowbit_moe",),
    "lowbit-pt2e": ("lowbit_pt2e",),
}
# Of defaults that are written out.
LONGEST = 40
# Methods that torch calls.
HOOKS = {"extra_repr", "fsdp_post_all_gather", "fsdp_pre_all_gather"}
BEGIN = "<!-- by integration_tests/api/api_page.py -->\n"


def page(text):
    """The page with the tables of what there is."""
    return text.partition(BEGIN)[0] + BEGIN + "".join(section(*each) for each in MODULES.items())


def section(distribution, modules):
    """The tables of a distribution, one for each of its public modules."""
    parts = [f"\n## {distribution}\n"]
    for name in modules:
        module = import_module(name)
        rows = [row for public in module.__all__ for row in rows_of(module, public)]
        lines = [f"| `{told}` | {kind} | {doc} |\n" for told, kind, doc in rows]
        parts += [f"\n### {name}\n\n{summary(module)}\n\n", "| name | kind | what it is |\n|---|---|---|\n", *lines]
    return "".join(parts)


def rows_of(module, name):
    """The row of a name, and those of its members if it is a class: how it is called, what kind it is, its docstring."""
    value = inspect.unwrap(getattr(module, name))
    if not inspect.isclass(value) or typing.get_origin(value):
        yield plain_row(module, name, value)
        return
    yield name + parameters(value), kind(value), summary(value)
    # What a public class before it has stands there.
    bases = [base for base in value.__mro__ if base.__module__.startswith("lowbit")]
    mine = [base for base in bases if base is value or base.__name__ not in module.__all__]
    for member in sorted({key for base in mine for key in vars(base) if not key.startswith("_")} - HOOKS):
        found = inspect.getattr_static(value, member)
        if isinstance(found, property):
            yield f"{name}.{member}", "property", summary(found)
        elif isinstance(found, (classmethod, staticmethod)) or inspect.isfunction(found):
            bound = not isinstance(found, staticmethod)
            told = parameters(getattr(found, "__func__", found), bound=bound)
            yield f"{name}.{member}{told}", kind(found), summary(getattr(value, member))


def plain_row(module, name, value):
    """The row of a function, a constant or a type."""
    if inspect.isfunction(value):
        return name + parameters(value), "function", summary(value)
    if isinstance(value, (dict, tuple, int)):
        return name, type(value).__name__, text_below(module, name)
    if type(value).__module__.startswith("lowbit"):
        return name, type(value).__name__, f"`{value}`"
    return name, "type", f"`{value}`".replace("typing.", "").replace("collections.abc.", "")


def kind(value):
    """What a class or a member of one is called."""
    kinds = {classmethod: "class method", staticmethod: "static method"}
    if not inspect.isclass(value):
        return kinds.get(type(value), "method")
    if typing.is_typeddict(value):
        return "dict"
    if getattr(value, "_is_protocol", False):
        return "protocol"
    return "error" if issubclass(value, Exception) else "class"


def parameters(value, *, bound=False):
    """A signature without types; of a dict its keys; nothing for what users catch or write, and do not make."""
    if inspect.isclass(value) and kind(value) == "dict":
        return f"({', '.join(f'{key}=...' for key in value.__annotations__)})"
    if inspect.isclass(value) and kind(value) != "class":
        return ""
    told = []
    for each in list(inspect.signature(value).parameters.values())[bound:]:
        default = each.empty if each.default is each.empty else Shown(each.default)
        told.append(each.replace(annotation=each.empty, default=default))
    return str(inspect.Signature(told))


class Shown:
    """A default as the page has it, alike on every machine and Python."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        value = self.value
        if value.__class__.__module__.startswith("lowbit"):
            return getattr(value, "name", None) or repr(str(value))
        if inspect.isfunction(value) or inspect.isclass(value):
            return value.__name__
        return repr(value) if len(repr(value)) < LONGEST and "<" not in repr(value) else "..."


def summary(value):
    """The first line of a docstring."""
    doc = inspect.getdoc(value)
    assert doc, f"{value} has no docstring"
    return doc.splitlines()[0].replace("|", "\\|")


def text_below(module, name):
    """The first line of the string below the statement that makes a constant, in whichever module that is."""
    value = getattr(module, name)
    for home in [found for key, found in sys.modules.items() if key.startswith("lowbit")]:
        if vars(home).get(name) is value:
            body = ast.parse(Path(home.__file__).read_text(encoding="utf-8")).body
            for statement, below in pairwise(body):
                if isinstance(statement, ast.AnnAssign) and statement.target.id == name:
                    return inspect.cleandoc(below.value.value).splitlines()[0]
    raise AssertionError(f"no annotated statement makes {name}")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
