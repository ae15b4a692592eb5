from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from liveprune.patches.live_counts import LayerCounts, VariantCounts
from liveprune.pruning.calibration.statistics import LayerStatistics, RoutingStatistics
from liveprune.pruning.errors import DataError, EngineError, VariantError
from liveprune.pruning.plan import Plan
from liveprune.server.calibration_metrics import calibration_metrics
from liveprune.server.cli import app as command
from liveprune.server.live_calibration import LiveCalibration
from liveprune.server.registry import Registry
from liveprune.server.variant import Variant
from tests.server.fake_control import KEY, FakeControl, admin_app, ask, serving
from tests.server.fake_engine import EXPERTS, LAYERS, FakeEngine, fake_base, fake_plan

PLAN = fake_plan([0, 1, 2, 3])


def counts(tokens: float, share: Mapping[int, float] | None = None) -> VariantCounts:
    """Top-2; ``share`` of the choices by expert, the same in every layer."""
    of = np.array([(share or dict.fromkeys(range(EXPERTS), 1 / 8)).get(e, 0) for e in range(8)])
    gates = np.stack([2 * tokens * of, tokens * of, tokens * of / 2], 1)
    return VariantCounts(tokens, {index: LayerCounts(gates) for index in range(LAYERS)})


class World:
    """One server's live statistics; ``now`` is the clock."""

    def __init__(self, folder: Path) -> None:
        base = fake_base(folder / "base")
        self.folder = folder / "state"
        self.folder.mkdir(exist_ok=True)
        self.engine = FakeEngine(base)
        self.registry = Registry("m", [], self.engine.spec, 4)
        self.registry.adopt(self.registry.known["full"], 0)
        self.now = 1000.0
        self.calibration = LiveCalibration(
            self.engine,
            self.registry,
            self.folder,
            "print",
            half_life=100.0,
            now=lambda: self.now,
        )

    def serve(self, tag: str, plan: Plan) -> None:
        self.registry.known[tag] = Variant(tag, plan)
        self.registry.alias = tag

    def poll(self, **found: VariantCounts) -> None:
        self.engine.counts = found
        asyncio.run(self.calibration.poll())

    def calibrated(self, plan: Plan, share: list[float]) -> None:
        sums = np.zeros((EXPERTS, 3, 3))
        sums[:, 0, 0] = share
        layers = {i: LayerStatistics(sums.copy(), np.zeros(8), np.zeros(8)) for i in range(LAYERS)}
        path = self.calibration.calibrated_path(plan.digest)
        path.parent.mkdir(exist_ok=True)
        RoutingStatistics(layers, 10, "rows", "print").save(path)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_differences_are_taken_and_old_tokens_weigh_less(world: World) -> None:
    world.poll(base=counts(100))
    world.poll(base=counts(140))
    assert world.calibration.statistics().tokens == 140
    world.now += 100
    world.poll(base=counts(140))
    assert world.calibration.statistics().tokens == 70
    world.poll(base=counts(150))
    found = world.calibration.statistics()
    assert found.tokens == 80
    np.testing.assert_allclose(found.layers[1].counts, np.full(8, 80 * 2 / 8))
    world.poll(base=counts(4))  # the engine was started anew
    assert world.calibration.statistics().tokens == 84
    assert world.calibration.counted == {"base": 154}


def test_kept_over_a_restart_with_the_time_that_passed(world: World, tmp_path: Path) -> None:
    world.poll(base=counts(100))
    again = World(tmp_path)
    again.now = world.now + 200
    assert again.calibration.statistics().tokens == 25
    again.poll(base=counts(8))
    assert again.calibration.statistics().tokens == 33
    assert [path.name for path in (again.folder / "statistics").iterdir()] == ["base.safetensors"]


def test_a_damaged_file_is_put_aside(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.poll(base=counts(100))
    path = world.folder / "statistics" / "base.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    again = World(tmp_path)
    assert "put aside as base.damaged" in caplog.text
    with pytest.raises(DataError, match="found no counted tokens"):
        again.calibration.statistics()


def test_whose_tokens(world: World) -> None:
    """The full model's by default: a plan's traffic does not show what it pruned."""
    world.serve("half", PLAN)
    only = dict.fromkeys(range(4), 1 / 4)
    world.poll(base=counts(10), **{PLAN.digest: counts(30, only)})
    assert world.calibration.statistics().tokens == 10
    assert world.calibration.statistics("half").tokens == 30
    both = world.calibration.statistics("all")
    assert both.tokens == 40
    assert both.layers[0].counts.tolist() == [2.5 + 15] * 4 + [2.5] * 4
    with pytest.raises(VariantError, match="'other' is unknown"):
        world.calibration.statistics("other")


def test_what_nobody_remembers_is_not_in_the_sum(world: World) -> None:
    world.poll(base=counts(10), gone=counts(30))
    assert world.calibration.statistics("all").tokens == 10
    assert world.calibration.summary().variants == {"m:full": 10, "@gone": 30}
    assert world.calibration.counted_by_name() == {"m:full": 10}


def test_windows_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liveprune.server.live_calibration.MOST_VARIANTS", 3)
    world.poll(**{f"v{i}": counts(10 + i) for i in range(5)})
    assert set(world.calibration.summary().variants) == {"@v2", "@v3", "@v4"}
    names = {path.stem for path in (world.folder / "statistics").glob("*.safetensors")}
    assert names == {"v2", "v3", "v4"}
    world.now += 1000  # ten half-lives: hardly a hundredth of a token is left
    world.poll(v4=counts(14))
    assert not world.calibration.summary().variants
    assert not list((world.folder / "statistics").glob("*.safetensors"))


def test_drift_of_what_serves(world: World) -> None:
    world.serve("half", PLAN)
    world.calibrated(PLAN, [4, 4, 4, 4, 9, 9, 9, 9])
    world.poll(**{PLAN.digest: counts(999, dict.fromkeys(range(4), 1 / 4))})
    assert world.calibration.summary().why_no_drift == "found 999 tokens, expected at least 1000"
    world.poll(**{PLAN.digest: counts(2000, dict.fromkeys(range(4), 1 / 4))})
    drift = world.calibration.summary().drift
    assert drift is not None
    assert (drift.mean, drift.maximum) == (0, 0)
    world.poll(**{PLAN.digest: counts(1e9, {0: 1.0})})
    drift = world.calibration.summary().drift
    assert drift is not None
    # 1/4 each against all for one: 1 bit and more apart by the entropies.
    entropy = -(5 / 8) * np.log2(5 / 8) - 3 * (1 / 8) * np.log2(1 / 8)
    assert drift.mean == pytest.approx(entropy - 2 / 2, abs=1e-4)
    assert set(drift.layers) == {0, 1, 2}


def test_why_there_is_no_drift(world: World) -> None:
    world.poll(base=counts(5000))
    assert world.calibration.summary().why_no_drift == "the full model was not calibrated"
    world.serve("half", PLAN)
    world.poll(**{PLAN.digest: counts(5000)})
    assert "are not kept" in world.calibration.summary().why_no_drift


def test_usage_of_what_serves(world: World) -> None:
    world.poll(base=counts(100, {0: 0.5, 1: 0.25, 2: 0.25}))
    usage = world.calibration.summary().layers[2]
    assert (usage.max, usage.unused, usage.p50) == (0.5, 5, 0)


def test_polling_goes_on_when_the_engine_fails_and_ends_with_a_last_look(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        world.calibration._interval = 0.001
        world.engine.fail("statistics", times=2)
        async with world.calibration.running(), asyncio.timeout(20):
            while world.engine.calls["statistics"] < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            world.engine.counts = {"base": counts(7)}
            world.calibration._interval = 1e6
        assert world.calibration.statistics().tokens == 7

    asyncio.run(main())
    assert "live statistics are not up to date: injected before statistics" in caplog.text


def test_metrics(world: World) -> None:
    assert all(not family.samples for family in calibration_metrics(world.calibration, None))
    world.serve("half", PLAN)
    world.calibrated(PLAN, [4, 4, 4, 4, 9, 9, 9, 9])
    world.poll(base=counts(3), **{PLAN.digest: counts(2000, {0: 1.0}), "gone": counts(9)})
    found = {
        (sample.name, sample.labels["variant"]): sample.value
        for family in calibration_metrics(world.calibration, "m")
        for sample in family.samples
    }
    drift = found.pop(("liveprune_calibration_drift_ratio", "m:half"))
    assert 0.5 < drift < 0.6
    assert found == {
        ("liveprune_statistics_tokens_total", "m:full"): 3,
        ("liveprune_statistics_tokens_total", "m:half"): 2000,
        ("liveprune_calibration_drift_max_ratio", "m:half"): drift,
    }


def statistics_app(world: World, folder: Path) -> Any:
    app = admin_app(FakeControl(), folder)
    app.state.admin = type(app.state.admin)(
        **{**vars(app.state.admin), "calibration": world.calibration}
    )
    return app


def test_routes(world: World, tmp_path: Path) -> None:
    app = statistics_app(world, tmp_path)
    world.engine.counts = {"base": counts(64)}
    answer = ask(app, "GET", "/admin/v1/statistics").json()
    assert answer["tokens"] == {"m:full": 64}
    assert answer["serving"] == "m:full"
    assert answer["layers"]["1"]["max"] == 1 / 8
    assert answer["drift"] is None
    file = tmp_path / "got.safetensors"
    file.write_bytes(ask(app, "GET", "/admin/v1/statistics/file").content)
    found = RoutingStatistics.load(file)
    assert (found.tokens, found.model) == (64, "print")
    refused = ask(app, "GET", "/admin/v1/statistics/file?variant=other")
    assert refused.status_code == 422
    assert "'other' is unknown" in refused.json()["error"]["message"]
    assert ask(app, "GET", "/admin/v1/statistics", headers={}).status_code == 403
    world.engine.fail("statistics")
    assert ask(app, "GET", "/admin/v1/statistics").status_code == 503


def test_routes_where_nothing_is_counted(tmp_path: Path) -> None:
    answer = ask(admin_app(FakeControl(), tmp_path), "GET", "/admin/v1/statistics")
    assert answer.status_code == 501
    assert "--no-live-statistics" in answer.json()["error"]["message"]


def test_the_command(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEPRUNE_ADMIN_KEY", KEY)
    world.engine.counts = {"base": counts(64)}
    output = tmp_path / "live.safetensors"
    with serving(statistics_app(world, tmp_path)) as url:
        run = CliRunner().invoke(
            command, ["statistics", "--admin-url", url, "-o", str(output), "--json"]
        )
        assert run.exit_code == 0, run.output
        assert json.loads(run.stdout)["tokens"] == {"m:full": 64}
        shown = CliRunner().invoke(command, ["statistics", "--admin-url", url])
        assert "m:full: 64 tokens counted" in shown.stdout
        assert "no drift known: the full model was not calibrated" in shown.stdout
        again = CliRunner().invoke(command, ["statistics", "--admin-url", url, "-o", str(output)])
        assert isinstance(again.exception, FileExistsError)
        other = ["statistics", "--admin-url", url, "-o", str(tmp_path / "x"), "--variant", "other"]
        refused = CliRunner().invoke(command, other)
        assert isinstance(refused.exception, EngineError)
        assert not (tmp_path / "x").exists()
    assert RoutingStatistics.load(output).tokens == 64
