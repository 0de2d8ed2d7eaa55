from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.activation import Activation
from lowbit.errors import FormatError, RecipeError
from lowbit.format import FORMATS, INT4_G128, INT8_ROW, MXFP4, NVFP4, Format
from lowbit.recipe import VERSION, Recipe, Rule


@pytest.mark.parametrize(
    ("match", "name", "expected"),
    [
        ("lm_head.weight", "lm_head.weight", True),
        ("lm_head.weight", "model.lm_head.weight", False),
        ("lm_head.weight", "lm_headXweight", False),
        ("lm_head", "lm_head.weight", False),
        ("*.down_proj.weight", "model.layers.3.mlp.down_proj.weight", True),
        ("*.down_proj.weight", "down_proj.weight", False),
        ("*.down_proj.weight", "model.layers.3.mlp.down_proj.weight_scale", False),
        ("layers.?.q.weight", "layers.7.q.weight", True),
        ("layers.?.q.weight", "layers.17.q.weight", False),
        ("layers.[0-2].q.weight", "layers.2.q.weight", True),
        ("layers.[!0-2].q.weight", "layers.2.q.weight", False),
        ("*.Q.weight", "layers.0.q.weight", False),
        (r"re:layers\.\d+\.q\.weight", "layers.17.q.weight", True),
        (r"re:layers\.\d+\.q", "layers.17.q.weight", False),
        (r"re:ayers\.\d+\.q\.weight", "layers.17.q.weight", False),
        ("re:.*", "anything", True),
    ],
)
def test_a_match_is_a_whole_name_a_glob_or_a_regular_expression(match, name, expected):
    assert Rule(match, INT8_ROW).matches(name) is expected


def test_modules_narrow_a_rule_to_classes_and_their_descendants():
    rule = Rule.of("*", "INT8_ROW", modules=["Linear", "Embedding"])
    assert rule.matches("a", ("LoraLinear", "Linear", "Module"))
    assert rule.matches("a", ("Embedding", "Module"))
    assert not rule.matches("a", ("LayerNorm", "Module"))
    assert not rule.matches("a")
    assert not Rule.of("b", "INT8_ROW", modules="Linear").matches("a", ("Linear",))


def test_the_first_rule_in_order_wins():
    keep, regex, glob = Rule("a.0.w", None), Rule("re:a\\..*", MXFP4), Rule("*", INT8_ROW)
    recipe = Recipe((keep, regex, glob))
    assert [recipe.resolve(name) for name in ("a.0.w", "a.1.w", "b")] == [keep, regex, glob]
    assert Recipe((glob, keep)).resolve("a.0.w") is glob
    assert Recipe((keep,)).resolve("b") is None


def test_a_rule_of_specs_equals_a_rule_of_formats():
    activation = Activation(Format.parse("e2m1:1x16:e4m3fn:tensor"), "local")
    spelled = Rule.of(
        "*", "e2m1:1x16:e4m3fn:tensor", activation="local:e2m1:1x16:e4m3fn:tensor", k_axis=1, modules="Linear"
    )
    assert spelled == Rule("*", NVFP4, activation, 1, ("Linear",))
    assert Rule.of("*", INT4_G128) == Rule.of("*", "int4_g128") == Rule("*", INT4_G128)
    assert Rule.of("*", None) == Rule("*", None)


def test_a_rule_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Rule("*", INT8_ROW).match = "a"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "", "weight": "INT8_ROW"}, "a rule's match is empty; '\\*' matches every parameter"),
        ({"match": "re:(", "weight": "INT8_ROW"}, r"rule 're:\(' holds a malformed regular expression: missing \)"),
        ({"match": "*", "weight": "INT8_ROW", "modules": ()}, r"rule '\*' allows no module class; leave modules out"),
        (
            {"match": "*", "weight": None, "activation": "dynamic:INT8_ROW"},
            r"rule '\*' quantizes activations \(dynamic:int8:1x\*:float32\) and keeps the weight; give it a weight",
        ),
    ],
)
def test_a_rule_that_says_nothing_sensible_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Rule.of(**arguments)


def test_a_misspelt_format_is_refused():
    with pytest.raises(FormatError, match="format 'INT9' is not one of"):
        Rule.of("*", "INT9")


@given(
    st.lists(
        st.builds(
            Rule,
            match=st.text(min_size=1).filter(lambda text: not text.startswith("re:")),
            weight=st.sampled_from([*FORMATS.values()]),
            activation=st.none() | st.sampled_from([Activation(INT8_ROW), Activation(NVFP4, "local")]),
            k_axis=st.integers(-4, 3),
            modules=st.none() | st.lists(st.text(), min_size=1).map(tuple),
        )
        | st.just(Rule("*.bias", None)),
    ).map(tuple)
)
def test_json_brings_a_recipe_back_equal(rules):
    recipe = Recipe(rules)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_json_may_be_written_by_hand():
    text = """{"version": 1, "rules": [
        {"match": "lm_head.weight", "weight": null},
        {"match": "*", "weight": "INT4_G128", "modules": ["Linear"]}
    ]}"""
    expected = Recipe((Rule.of("lm_head.weight", None), Rule.of("*", "INT4_G128", modules="Linear")))
    assert Recipe.from_json(text) == expected
    assert json.loads(expected.to_json())["rules"][1] == {
        "match": "*",
        "weight": "int4:1x128:bfloat16",
        "activation": None,
        "k_axis": -1,
        "modules": ["Linear"],
    }


def _document(**changes):
    return json.dumps({"version": VERSION, "rules": []} | changes)


def _one_rule(**changes):
    return _document(rules=[{"match": "*", "weight": None}, {"match": "*", "weight": "INT8_ROW"} | changes])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the recipe is not JSON: Expecting"),
        ("[" * 200_000, "the recipe is not JSON: maximum recursion depth"),
        ("[]", r"the recipe is \[\]; needed is an object with version, rules"),
        ('{"rules": []}', "the recipe has no version; needed is a whole number"),
        (_document(version="1"), 'version is "1"; needed is a whole number'),
        (_document(version=True), "version is true; needed is a whole number"),
        (_document(version=2, rulez={}), "needs a lowbit that reads recipe version 2; this one reads 1"),
        (_document(version=0), "needs a lowbit that reads recipe version 0; this one reads 1"),
        (_document(rule=1), "the recipe has unknown keys rule; known are version, rules"),
        (_document(rules={}), "rules is {}; needed is an array"),
        ('{"version": 1, "version": 1, "rules": []}', "an object repeats a key among version, version, rules"),
        (_document(rules=["*"]), r'rule 1 is "\*"; needed is an object with match, weight'),
        (_document(rules=[{"match": "*"}]), "rule 1 has no weight; needed is a string or null"),
        (_one_rule(wieght="INT8_ROW"), "rule 2 has unknown keys wieght; known are match, weight, activation, k_axis"),
        (_one_rule(match=None), "rule 2: match is null; needed is a string"),
        (_one_rule(weight=4), "rule 2: weight is 4; needed is a string or null"),
        (_one_rule(k_axis=True), "rule 2: k_axis is true; needed is a whole number"),
        (_one_rule(k_axis=1.0), "rule 2: k_axis is 1.0; needed is a whole number"),
        (_one_rule(modules="Linear"), 'rule 2: modules is "Linear"; needed is an array or null'),
        (_one_rule(modules=["Linear", 1]), r"rule 2: modules holds \['Linear', 1\]; needed are class names"),
        (_one_rule(weight="INT9"), "rule 2: format 'INT9' is not one of"),
        (_one_rule(activation="sometimes:INT8_ROW"), "rule 2: activation 'sometimes:INT8_ROW' must be"),
        (_one_rule(match="re:["), r"rule 2: rule 're:\[' holds a malformed regular expression"),
    ],
)
def test_json_that_is_not_a_recipe_is_refused_in_words(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(text)
