"""The dashboard page in a real browser, over a real admin server with made-up parts behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liveprune.pruning.errors import EngineError
from tests.server.browser import BINARY, Page, browsing
from tests.server.dashboard_world import World, decision, job, running, variant, world
from tests.server.fake_control import KEY, serving

REPOSITORY = Path(__file__).parent.parent.parent
EVIL = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium on PATH; scripts/get_chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browsing() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A tab without a key, which must not complain of anything in the test."""
    browser.open("about:blank")
    browser.size(1200, 900)
    browser.prefer(prefers_color_scheme="light")
    browser.complaints.clear()
    yield browser
    assert browser.run("window.violations ?? []") == []
    assert [x for x in browser.complaints if "status of 403" not in x] == []


@pytest.fixture
def made(tmp_path: Path) -> World:
    return world(tmp_path)


def enter(page: Page, key: str = KEY) -> None:
    page.wait("document.activeElement.id === 'key'")
    page.run("document.activeElement.value = ''")
    page.type(key)
    page.press("Enter")


def opened(page: Page, url: str) -> None:
    page.open(url)
    enter(page)
    page.wait("document.querySelector('#connection').innerText === 'Live'")
    page.wait("document.querySelector('#jobs-body .card, #jobs-body code')")


def section(page: Page, name: str) -> str:
    found: str = page.run(f"document.getElementById('{name}').innerText.replaceAll('\\u00a0', ' ')")
    return found


def test_the_key_is_asked_once_and_forgotten_when_told(page: Page, made: World) -> None:
    with serving(made.app) as url:
        page.open(url)
        enter(page, "wrong")
        page.wait("document.querySelector('#key-error').innerText.includes('not an admin key')")
        assert page.run("document.querySelector('#board').hidden")
        enter(page, "schlüssel")
        page.wait("document.querySelector('#key-error').innerText.includes('ASCII')")
        enter(page)
        page.wait("!document.querySelector('#board').hidden")
        assert page.run("document.querySelector('#gate').hidden")
        assert KEY not in page.run("document.documentElement.outerHTML + location.href")
        page.open(url)
        page.wait("!document.querySelector('#board').hidden")
        page.run("document.querySelector('#forget').click()")
        page.wait("document.activeElement.id === 'key'")
        assert page.run("document.querySelector('#board').hidden")
        assert KEY not in page.run("JSON.stringify([{...sessionStorage}, {...localStorage}])")
        page.open(url)
        page.wait("document.activeElement.id === 'key'")


def test_it_shows_what_there_is(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
        memory = section(page, "memory")
        for row in ("Expert rows\t12 GiB\t50%", "KV cache\t6.31 GiB\t26%", "Target\t24 GiB"):
            assert row in memory
        variants = section(page, "variants")
        for words in ("answers the bare name", "roll-back target", "18–48 of 64", "standby"):
            assert words in variants
        page.wait("document.querySelector('.past')")
        assert "needs 96 spare rows" in section(page, "changes")
        page.wait("document.querySelectorAll('.charts .band').length === 4")
        experiments = section(page, "experiments")
        for words in (
            "HOLD",
            "half: loop: unclear",
            "2.54 s against 2.84 s; difference: −460 ms to −148 ms, limit 0 ms",
            "guardrail, at most 5% less",
            "difference from 95% of the control’s",
        ):
            assert words in experiments
        states = page.run("[...document.querySelectorAll('.finding .state')].map(x => x.innerText)")
        assert states[:4] == ["✓ better", "? unclear", "✓ within", "✓ within"]
        jobs = section(page, "jobs")
        for words in ("32 experts a layer", "prune, 480 of 1,600", "16 min 48 s", "row 118"):
            assert words in jobs
        assert page.run("document.title") == "olmoe · Liveprune"


EDGES = """[...document.querySelectorAll('.findings')][0].querySelectorAll('.interval')"""


def test_an_interval_touches_the_wrong_side_unless_it_is_proven(page: Page, made: World) -> None:
    """Which side is wrong depends on the measure: more loops are, and less agreement."""
    with serving(made.app) as url:
        opened(page, url)
        page.wait("document.querySelectorAll('.charts .band').length === 4")
        drawn = page.run(
            f"[...{EDGES}].map((svg) => ['.wrong', '.bar', '.limit', '.estimate'].map((name) => {{"
            " const box = svg.querySelector(name).getBoundingClientRect();"
            " return [box.left, box.right]; }))"
        )
        sides = []
        for wrong, bar, limit, estimate in drawn:
            assert bar[0] < estimate[0] < estimate[1] < bar[1]
            middle = sum(limit) / 2
            assert min(abs(middle - wrong[0]), abs(middle - wrong[1])) < 1
            side = "right" if abs(middle - wrong[0]) < 1 else "left"
            touches = bar[1] > middle if side == "right" else bar[0] < middle
            sides.append((side, touches))
        assert sides == [("right", False), ("right", True), ("right", False), ("left", False)]
        charts = page.run(
            "[...document.querySelectorAll('.charts svg')].map((svg) => "
            "[svg.querySelector('.wrong'), svg.querySelector('.limit'), svg].map((x) => "
            "{ const box = x.getBoundingClientRect(); return [box.top, box.bottom]; }))"
        )
        above = [abs(wrong[1] - limit[0]) < 2 for wrong, limit, _ in charts]
        assert above == [True, True, True, False]
        assert all(box[0] < limit[0] < box[1] for _, limit, box in charts)


def test_a_plan_is_a_picture_and_a_table(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
        page.run("document.querySelector('[data-plan$=mixed] > summary').click()")
        page.wait("document.querySelector('svg.plan')")
        layers = made.control.plans["eep-mixed"]
        for kind, shown in (
            ("kept", sum(len(x.kept) for x in layers)),
            ("merged", sum(len(x.merged) for x in layers)),
            ("dropped", sum(64 - len(x.kept) - len(x.merged) for x in layers)),
        ):
            path = f"svg.plan .mark-{kind}"
            marks = page.run(
                f"document.querySelector('{path}').getAttribute('d').split('M').length"
            )
            assert marks == shown + 1
        page.run("document.querySelector('[data-plan] details > summary').click()")
        rows = page.run("[...document.querySelectorAll('[data-plan] tr')].map(x => x.innerText)")
        assert rows[0] == "Layer\tExperts\tTop-k\tKept\tPart of a merged expert\tDropped"
        assert rows[16].startswith("15\t18 of 64\t6\t")
        ids = rows[16].split("\t")[3].replace("–", "-").split(", ")
        listed = [
            i for a, _, b in (x.partition("-") for x in ids) for i in range(int(a), int(b or a) + 1)
        ]
        assert tuple(listed) == layers[15].kept
        # What the reader opened stays open, and the focus stays, when something changes.
        page.run("document.querySelector('[data-plan$=mixed] > summary').focus()")
        made.control.known[0] = variant("full", made.control.plans["full"], in_flight=77)
        page.wait("document.querySelector('#variants').innerText.includes('77')")
        assert page.run("document.activeElement.parentElement.dataset.plan") == "olmoe:eep-mixed"
        assert page.run("document.querySelector('svg.plan').checkVisibility()")


def test_changes_arrive_live_and_are_told_to_those_who_listen(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
        page.wait("document.querySelectorAll('.charts .band').length")
        assert page.run("document.querySelector('#announcer').innerText") == ""
        operation = made.control.begin_swap()
        page.wait("document.querySelector('#changes progress')?.value > 0")
        assert page.run("document.querySelector('#changes [aria-current]').innerText") == (
            "filling\nexpert rows are read or merged, and checked"
        )
        told = "document.querySelector('#announcer').textContent"
        page.wait(f"{told} === 'Swap to olmoe:eep-mixed: filling'")
        operation.state, operation.finished = operation.state.DONE, operation.created + 4
        page.wait(f"{told} === 'Swap to olmoe:eep-mixed: done'")
        page.wait("document.querySelector('.past').innerText.includes('eep-mixed')")
        body, decisions = running(75)
        shipped = decision(75, decisions[0].time).model_copy(
            update={"verdict": "SHIP", "arm": "half", "reasons": []}
        )
        made.experiments.found["halve"] = (
            body.model_copy(update={"decision": shipped}),
            [*decisions, shipped],
        )
        page.wait(f"{told} === 'Experiment halve: SHIP'")
        assert "SHIP half" in section(page, "experiments")
        page.run("document.querySelector('.experiment > details:last-child > summary').click()")
        page.wait(
            "document.querySelector('.experiment > details:last-child table').checkVisibility()"
        )
        rows = page.run(
            "[...document.querySelectorAll('.experiment:first-child > details:last-child tr')]"
            ".map(x => x.innerText.split('\\t').slice(1))"
        )
        assert rows[:3] == [
            ["Verdict", "Done", "Withheld"],
            ["SHIP half", "–", "–"],
            ["HOLD", "ramp", "–"],
        ]
        for _ in range(3):
            made.jobs.step(80)
            evaluations = f"{made.jobs.evaluations:,}"
            page.wait(f"document.querySelector('#jobs').innerText.includes('{evaluations}')")
        page.wait("document.querySelector('#jobs path.line')")
        steps = page.run("document.querySelector('#jobs path.line').getAttribute('d')")
        assert steps.count("L") == 6
        page.open(url)  # the curve outlives a reload
        page.wait("document.querySelector('#jobs path.line')")


def test_an_experiment_that_ended_is_folded_and_opens(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
        page.run("document.querySelector('[data-experiment=quarter] > summary').click()")
        page.run("document.querySelector('[data-experiment=quarter] > details > summary').click()")
        page.wait("document.querySelector('[data-experiment=quarter] .band')")
        assert "loop: worse: 0.068 against 0.0112" in section(page, "experiments")
        assert "ROLLBACK half" in section(page, "experiments")


def test_an_engine_that_does_not_answer_shows_and_comes_back(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
        made.control.error = EngineError("engine: no answer")
        page.wait("document.querySelector('#memory .bad')")
        assert "Not up to date: engine: no answer." in section(page, "memory")
        assert "nobody" in page.run("document.querySelector('#overview').innerText")
        assert "halve" in section(page, "experiments")
        made.control.error = None
        page.wait("!document.querySelector('#memory .bad')")


def test_a_server_that_goes_away_is_said_and_found_again(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
    page.wait("document.querySelector('#connection').innerText.startsWith('Not live')")
    assert "olmoe" in page.text()
    page.complaints[:] = [x for x in page.complaints if "ERR_CONNECTION_REFUSED" not in x]
    page.open("about:blank")
    page.complaints[:] = [x for x in page.complaints if "ERR_CONNECTION_REFUSED" not in x]


def test_a_new_server_says_what_to_run(page: Page, tmp_path: Path) -> None:
    with serving(world(tmp_path, empty=True).app) as url:
        opened(page, url)
        page.wait("document.querySelector('#experiments code')")
        assert "liveprune experiments start" in section(page, "experiments")
        assert "liveprune jobs start" in section(page, "jobs")
        assert "liveprune variants add" in section(page, "variants")
        assert "liveprune swap" not in section(page, "variants")


def test_names_are_text_and_nothing_else(page: Page, made: World) -> None:
    made.control.known.append(variant(EVIL, made.control.plans["reap-32"]))
    operation = made.control.begin_swap()
    operation.error, operation.notes = EVIL, [EVIL]
    body, decisions = running(20)
    name = EVIL.partition(">")[0] + ">"  # what can be part of a path
    made.experiments.found[name] = (
        body.model_copy(update={"name": name, "paused": EVIL, "reason": EVIL, "ended": 1.0}),
        decisions,
    )
    made.jobs.found.append(job("evil", made.jobs.found[1].state, error=EVIL))
    with serving(made.app) as url:
        opened(page, url)
        page.wait("document.querySelectorAll('.experiment').length === 3")
        assert page.run("document.querySelectorAll('img, main script').length") == 0
        assert page.run("window.broken") is None
        for name in ("changes", "variants", "experiments", "jobs"):
            assert EVIL in section(page, name)


@pytest.mark.parametrize("width", [320, 360, 768, 1440])
def test_it_fits(page: Page, made: World, width: int) -> None:
    made.control.begin_swap()
    with serving(made.app) as url:
        page.size(width, 800, phone=width < 400)
        opened(page, url)
        page.run("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
        page.wait("document.querySelectorAll('svg.plan').length === 3")
        page.wait("document.querySelectorAll('.charts .band').length === 7")
        # Not innerWidth, which grows with what does not fit on a phone.
        assert page.run("document.documentElement.scrollWidth") == width


def test_the_policy_is_in_force_and_its_breaches_are_seen(browser: Page, made: World) -> None:
    with serving(made.app) as url:
        browser.open(url)
        browser.run(
            "document.body.append(Object.assign(document.createElement('style'),"
            "{textContent: 'p {color: red}'}))"
        )
        browser.wait("window.violations.length === 1")
        assert browser.run("window.violations[0]") == "style-src-elem inline"
    browser.complaints.clear()


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core, injected by the browser itself: the page's policy would not let it in."""
    script = [sys.executable, str(REPOSITORY / "scripts" / "get_axe.py")]
    found = subprocess.run(script, check=False, capture_output=True, text=True)
    if found.returncode != 0:
        reason = f"no axe-core: {found.stderr.strip().splitlines()[-1]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return Path(found.stdout.strip()).read_text(encoding="utf-8")


def findings(page: Page, axe: str) -> list[Any]:
    page.run(f"{axe};0")
    found = page.run("axe.run(document).then((x) => JSON.stringify(x.violations))")
    return [
        (x["id"], x["impact"], [node["html"] for node in x["nodes"]]) for x in json.loads(found)
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_accessible(page: Page, made: World, axe: str, scheme: str, width: int) -> None:
    made.control.begin_swap()
    with serving(made.app) as url:
        page.size(width, 800, phone=width < 400)
        page.prefer(prefers_color_scheme=scheme)
        page.open(url)
        page.wait("document.activeElement.id === 'key'")
        assert findings(page, axe) == []
        opened(page, url)
        page.run("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
        page.wait("document.querySelectorAll('svg.plan').length === 3")
        page.wait("document.querySelectorAll('.charts .band').length === 7")
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
        assert findings(page, axe) == []


def test_axe_finds_what_is_wrong(page: Page, made: World, axe: str) -> None:
    with serving(made.app) as url:
        page.open(url)
        page.wait("document.activeElement.id === 'key'")
        page.run("document.querySelector('label').remove()")
        assert [(x[0], x[1]) for x in findings(page, axe)] == [
            ("label-title-only", "serious"),
            ("label", "critical"),
        ]


def test_the_keyboard_reaches_everything(page: Page, made: World) -> None:
    with serving(made.app) as url:
        opened(page, url)
        page.wait("document.activeElement.id === 'main'")
        page.run("document.querySelector('.skip').focus()")
        assert page.run("document.querySelector('.skip').getBoundingClientRect().top >= 0")
        seen = []
        page.press("Tab")
        while not page.run("document.activeElement === document.body"):
            name, outline = page.run(
                "[document.activeElement.innerText.split('\\n')[0],"
                " getComputedStyle(document.activeElement).outlineStyle]"
            )
            assert outline == "solid", name
            seen.append(name)
            page.press("Tab")
        assert seen[:6] == ["Forget key", "Memory", "Changes", "Variants", "Experiments", "Jobs"]
        assert seen.count("Plan") == 3
        assert seen[-3:-1] == ["Intervals over time", "Decisions and actions"]
        assert seen[-1].startswith("quarter")
