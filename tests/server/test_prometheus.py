"""What a real Prometheus makes of ``/metrics``."""

from __future__ import annotations

import time
from pathlib import Path

from liveprune.server.admin_api import make_app
from liveprune.server.audit import AuditLog
from liveprune.server.store.store import Store
from tests.server.fake_control import FakeControl, serving, view
from tests.server.full_metrics import decision, experiment, full_metrics
from tests.server.prometheus import promtool, running, until

RULES = Path(__file__).parent.parent.parent / "helm" / "liveprune" / "rules" / "liveprune.yaml"


def test_every_family_has_a_sample() -> None:
    """So that the tests here see all of them."""
    assert [family.name for family in full_metrics().collect() if not family.samples] == []


def test_promtool_has_no_complaint() -> None:
    page, _ = full_metrics().page("")
    found = promtool("check", "metrics", given=page.decode())
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_promtool_would_complain() -> None:
    found = promtool("check", "metrics", given="# HELP a_seconds A.\n# TYPE a counter\na 1\n")
    assert found.returncode != 0


def test_scraped(tmp_path: Path) -> None:
    control = FakeControl(known=[view("full"), view("e4")])
    experiments = [experiment("x", decision=decision("HOLD"))]
    metrics = full_metrics(control, experiments)
    store = Store(tmp_path, "m")
    app = make_app(
        control, keys=lambda: (), audit=AuditLog(store), roots=[tmp_path], metrics=metrics
    )
    with (
        serving(app) as url,
        running(tmp_path, url.removeprefix("http://"), RULES) as prometheus,
    ):

        def seen(promql: str, label: str, expected: dict[str, float]) -> None:
            found = until(lambda: prometheus.query(promql, label), lambda x: x == expected)
            assert found == expected

        seen("up", "job", {"trial-liveprune": 1})
        seen("liveprune_variant_info", "variant", {"tiny:full": 1, "tiny:e4": 1})
        seen("liveprune_experiment_verdict == 1", "verdict", {"HOLD": 1})
        swaps = 'liveprune_swap_duration_seconds_bucket{outcome="done",le=~"1.0|2.5"}'
        seen(swaps, "le", {"1.0": 0, "2.5": 1})
        # Prometheus looks back over five minutes: only a series that was marked as ended is gone.
        control.known = [view("full")]
        experiments[:] = [experiment("x", state="rolled_back", ended=time.time())]
        seen("liveprune_variant_info", "variant", {"tiny:full": 1})
        seen("liveprune_variant_row_bytes", "variant", {"tiny:full": 2400})
        seen("liveprune_experiment_verdict", "verdict", {})
        # The alerts are those of the chart, evaluated on what was scraped.
        seen('ALERTS{alertstate="firing"}', "alertname", {"LivepruneExperimentRolledBack": 1})

        def health() -> set[tuple[str, str]]:
            groups = prometheus.api("rules")["groups"]
            return {(x["health"], x.get("lastError", "")) for y in groups for x in y["rules"]}

        assert until(health, lambda x: x == {("ok", "")}) == {("ok", "")}
    store.close()
