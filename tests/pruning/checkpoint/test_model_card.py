"""The card states lineage, layers and how to run, and keeps the base model's licence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from liveprune.pruning.checkpoint.apply_config import apply_config
from liveprune.pruning.checkpoint.model_card import model_card
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Plan
from tests.checkpoints import edited, make_plan, merge_plan
from tests.forms import form_plan

TinyModel = Callable[..., Path]


def card_of(model: Path, plan: Plan) -> str:
    spec = ModelSpec.from_path(model)
    return model_card(model, plan, ModelSpec.from_config(apply_config(spec.config, plan, spec)))


def front_matter(card: str) -> dict[str, object]:
    parsed: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return parsed


def test_a_uniform_card(tiny_model: TinyModel) -> None:
    base = tiny_model("mixtral")
    plan = make_plan(base, [(0, 3, 4, 6)])
    card = card_of(base, plan)
    assert front_matter(card) == {
        "library_name": "transformers",
        "base_model": "org/base",
        "tags": ["pruning", "moe", "liveprune"],
    }
    assert "# org/base, 4 of 8 experts per layer" in card
    assert "| 2 | 8 | 4 | 2 | kept 0, 3, 4, 6 |" in card
    assert f"| plan | `{plan.digest}` |" in card
    assert "| method | `test` |" in card
    assert '| parameters | `{"a": 1}` |' in card
    assert "| seed | `3` |" in card
    assert "`transformers`, `vllm serve` and `liveprune serve` load it" in card


def test_cards_of_layers_that_differ(tiny_model: TinyModel) -> None:
    base = tiny_model("mixtral")
    card = card_of(base, make_plan(base, [(0, 1), (0, 1, 2), range(8)]))
    assert "# org/base, 2 to 8 of 8 experts per layer" in card
    assert "| 2 | 8 | 8 | 2 | none |" in card
    assert "per_layer_config" in card
    card = card_of(base, merge_plan(base, 4, router_map=True))
    assert "| 0 | 8 | 4 | 2 | merged, with a router map |" in card
    assert "need Liveprune" in card
    assert "| 0 | 8 | 2 | 2 | merged |" in card_of(base, merge_plan(base, 2, kept=(0, 1)))


@pytest.mark.parametrize(
    ("form", "change", "usage"),
    [
        ("constants", "kept 0, 3, 4, 6; the others constants", "those at -1 return a constant"),
        ("merge+map", "merged, with an expert map", "does each one's work"),
        ("neurons+map", "merged neuron by neuron, with an expert map", "does each one's work"),
        ("neurons+kept", "merged neuron by neuron", "`vllm serve` and `liveprune serve` load it"),
    ],
)
def test_cards_of_every_form(form: str, change: str, usage: str, tiny_model: TinyModel) -> None:
    base = tiny_model("mixtral")
    card = card_of(base, form_plan(base, form))
    assert f"| 1 | 8 | 4 | 2 | {change} |" in card
    assert usage in card
    assert ("need Liveprune" in card) == (form != "neurons+kept")


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "deepseek", "license_link": "LICENSE"},
        ),
        ("# No front matter", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a\n---\n", {}),
    ],
)
def test_the_licence_is_kept(
    readme: str, expected: dict[str, str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = edited(tiny_model("mixtral"), tmp_path / "m")
    (base / "README.md").write_text(readme)
    found = front_matter(card_of(base, make_plan(base, [(0, 1)])))
    assert {k: v for k, v in found.items() if k.startswith("license")} == expected
