"""The page's files, the plans that it draws, and who may have what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveprune.pruning.demo import model_path
from liveprune.pruning.layer_plan import LayerPlan
from liveprune.pruning.model_spec import ModelSpec
from liveprune.pruning.plan import Lineage, Plan
from liveprune.server.admin_dashboard import dashboard_files
from liveprune.server.layer_views import LayerView, layer_views
from tests.server.fake_control import KEY, FakeControl, admin_app, ask, view

FILES = sorted(dashboard_files())
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


@pytest.fixture
def app(tmp_path: Path) -> Any:
    return admin_app(FakeControl(), tmp_path)


def test_the_page_is_all_of_its_folder() -> None:
    folder = Path(__file__).parent.parent.parent / "server" / "dashboard"
    names = {f.name for f in folder.iterdir() if f.is_file() and f.suffix != ".py"}
    assert {"/", "/dashboard/"} == {path for path in FILES if path.endswith("/")}
    served = {path.rpartition("/")[2] for path in FILES if not path.endswith("/")}
    assert served == names - {"index.html"}


@pytest.mark.parametrize("path", FILES)
def test_each_file_is_open_and_strict(app: Any, path: str) -> None:
    answer = ask(app, "GET", path, headers={})
    assert answer.status_code == 200
    found = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    assert found == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    kind = kinds.get(path.rpartition(".")[2], "text/html")
    assert answer.headers["content-type"].startswith(kind)


def test_what_has_not_changed_is_not_sent_again(app: Any) -> None:
    first = ask(app, "GET", "/dashboard/app.js", headers={})
    held = {"If-None-Match": f'"other", {first.headers["etag"]}'}
    again = ask(app, "GET", "/dashboard/app.js", headers=held)
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = ask(app, "GET", "/dashboard/style.css", headers=held)
    assert other.status_code == 200
    assert other.headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/nothing.js",
        "/dashboard/__init__.py",
        "/dashboard/../admin_api.py",
        "/index.html",
    ],
)
def test_nothing_else_is_open(app: Any, path: str) -> None:
    assert ask(app, "GET", path, headers={}).status_code == 403
    assert ask(app, "GET", path).status_code == 404


def test_the_page_only_reads(app: Any) -> None:
    assert ask(app, "POST", "/", headers={}).status_code == 405
    scripts = b"".join(text for path, text in dashboard_files().items() if path.endswith(".js"))
    assert not re.search(rb"method\s*:", scripts)


def test_the_page_needs_nothing_from_elsewhere_and_has_nothing_inline() -> None:
    for path, content in dashboard_files().items():
        text = content.decode().replace('"http://www.w3.org/2000/svg"', "")
        assert "http:" not in text, path
        assert "https:" not in text, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    page = dashboard_files()["/"].decode()
    assert not re.search(r"\sstyle=|<style|\son\w+=|<script(?![^>]*\ssrc=)", page)


# Plans.


def test_a_plan_is_told_to_those_with_the_key(tmp_path: Path) -> None:
    control = FakeControl(known=[view("full"), view("e4", name="org/tiny:e4")])
    control.kept["e4"] = [LayerView(3, 8, 5, 2, (0, 2), (4, 5, 6), (7,))]
    app = admin_app(control, tmp_path)
    body = {
        "layers": [
            {
                "layer": 3,
                "experts": 8,
                "remaining": 5,
                "top_k": 2,
                "kept": [0, 2],
                "merged": [4, 5, 6],
                "constant": [7],
            }
        ]
    }
    for name in ("e4", "org/tiny:e4", "org%2Ftiny%3Ae4"):
        assert ask(app, "GET", f"/admin/v1/variants/{name}/plan").json() == body
    missing = ask(app, "GET", "/admin/v1/variants/e5/plan")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "NotFoundError"
    assert ask(app, "GET", "/admin/v1/variants/e4/plan", headers={}).status_code == 403
    assert KEY not in missing.text


def a_plan(*layers: LayerPlan) -> Plan:
    return Plan("qwen3_moe", len(layers), layers, Lineage("test"))


def only(layer: LayerPlan) -> LayerView:
    (found,) = layer_views(a_plan(layer), ModelSpec.from_path(model_path()))
    return found


def test_the_base_model_keeps_all() -> None:
    spec = ModelSpec.from_path(model_path())
    found = layer_views(None, spec)
    assert [(x.layer, x.experts, x.remaining, x.top_k) for x in found] == [
        (x.index, x.experts, x.experts, x.top_k) for x in spec.layers
    ]
    assert found[0].kept == tuple(range(spec.layers[0].experts))
    assert (found[0].merged, found[0].constant) == ((), ())


def test_kept_ids_are_kept_and_constants_are_told() -> None:
    assert only(LayerPlan(0, 4, 2, kept=(1, 3))) == LayerView(0, 4, 2, 2, (1, 3), (), ())
    constants = np.zeros((2, 8), dtype=np.float32)
    found = only(LayerPlan(0, 4, 2, kept=(1, 3), constants=constants))
    assert found == LayerView(0, 4, 2, 2, (1, 3), (), (0, 2))


def test_a_merge_matrix_tells_copies_from_mixtures() -> None:
    merge = np.array(
        [
            [1, 0, 0, 0, 0, 0],  # a copy of 0
            [0, 0.5, 0.5, 0, 0, 0],  # a mixture
            [0, 0, 0, 0.5, 0, 0],  # scaled: no longer 3
            [0.5, 0, 0, 0, 0.5, 0],  # 0 is there as a copy too
        ],
        dtype=np.float32,
    )
    found = only(LayerPlan(0, 6, 2, merge=merge, router_map=merge))
    assert found == LayerView(0, 6, 4, 2, (0,), (1, 2, 3, 4), ())


def test_neurons_tell_a_reordered_expert_from_a_mixture() -> None:
    # New expert 0 is old 2 with its neurons in another order; new 1 is gathered from 0 and 3; what
    # old 1 gives goes nowhere, and 3 has no share in neuron 0 of new 1 but in neuron 1.
    neurons = np.array([[2, 3], [-1, -1], [1, 0], [-1, 3]], dtype=np.int32)
    shares = np.array([1, 1, 1, 2], dtype=np.float32)
    layer = LayerPlan(0, 4, 1, neuron_map=neurons, neuron_shares=shares, expert_map=(1, 0, 0, 1))
    assert only(layer) == LayerView(0, 4, 2, 1, (2,), (0, 3), ())


def test_who_has_no_share_is_no_part() -> None:
    neurons = np.array([[0, 1], [0, 1], [2, 3]], dtype=np.int32)
    shares = np.array([1, 0, 1], dtype=np.float32)
    layer = LayerPlan(0, 3, 1, neuron_map=neurons, neuron_shares=shares, expert_map=(0, 0, 1))
    assert only(layer) == LayerView(0, 3, 2, 1, (0, 2), (), ())
