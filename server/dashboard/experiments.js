// Experiments: arms, what is proven, what was decided.

import { el } from "./dom.js";
import { count, measured, measureName, METRIC_NAMES, moment, number, percent } from "./format.js";
import { findings } from "./findings.js";
import { decisionTable, history } from "./history.js";

export const ACTIVE = ["scheduled", "running"];
const MEANING = {
  INVALID: "The units do not fall into the arms by their shares: nothing can be compared.",
  ROLLBACK: "A guardrail is proven worse than its margin.",
  SHIP: "All that was asked is proven.",
  HOLD: "Not enough is proven yet.",
};
const GLYPHS = { INVALID: "✕", ROLLBACK: "↩", SHIP: "✓", HOLD: "…" };
const QUANTILES = ["p50", "p95", "p99"];

/** `decided`: by name, the decisions, the oldest first; undefined while they are loading. */
export function experiments(list, decided) {
  if (!list.length) {
    return el("p", null, "No experiments. An experiment splits the traffic of the bare name over variants ",
      "and tells which is better; start one with ",
      el("code", null, "liveprune experiments start FILE.json"), ".");
  }
  const active = list.filter(({ state }) => ACTIVE.includes(state));
  const ended = list.filter(({ state }) => !ACTIVE.includes(state));
  return [
    !active.length && el("p", { "data-key": "none" }, "None is running."),
    active.map((experiment) => el("article", { class: "card experiment", "data-key": experiment.name },
      el("h3", null, experiment.name, " ", badges(experiment)),
      body(experiment, decided.get(experiment.name)))),
    ended.map((experiment) => el("details",
      { class: "card experiment", "data-key": experiment.name, "data-experiment": experiment.name },
      el("summary", null, el("h3", null, experiment.name, " ", badges(experiment))),
      body(experiment, decided.get(experiment.name)))),
  ];
}

function badges({ state, definition }) {
  return [
    el("span", { class: `badge ${state}` }, state.replace("_", " ")), " ",
    definition.dry_run && el("span", { class: "badge" }, "dry run"),
  ];
}

function body(experiment, decisions) {
  const { decision } = experiment;
  return [
    experiment.reason && el("p", null, `Ended ${moment(experiment.ended)}: ${experiment.reason}`),
    experiment.paused && el("p", { class: "bad" }, `Paused here: ${experiment.paused}`),
    decision ? verdict(decision) : el("p", { class: "quiet" }, "Nothing decided yet."),
    el("p", { class: "quiet" }, facts(experiment)),
    el("div", { class: "evidence" },
      el("div", null, el("h4", null, "Arms"), arms(experiment)),
      decision && el("div", null,
        el("h4", null, "What is proven"), findings(experiment, decision))),
    el("details", { open: ACTIVE.includes(experiment.state) },
      el("summary", null, "Intervals over time"), over(decisions, (list) => history(experiment, list))),
    el("details", null, el("summary", null, "Decisions and actions"), over(decisions, (list) => decisionTable(experiment, list))),
  ];
}

function over(decisions, draw) {
  if (decisions === undefined) return el("p", { class: "quiet" }, "Loading…");
  if (decisions instanceof Error) return el("p", { class: "bad" }, decisions.message);
  return draw(decisions);
}

function verdict({ verdict: word, arm, reasons, time, actions, withheld }) {
  return el("div", { class: `verdict ${word.toLowerCase()}` },
    el("p", null,
      el("strong", null, el("span", { "aria-hidden": true }, `${GLYPHS[word]} `), word, arm && ` ${arm}`),
      ` ${MEANING[word]} `, el("span", { class: "quiet" }, moment(time))),
    reasons.length > 0 && el("ul", null, reasons.map((reason) => el("li", null, reason))),
    actions.length > 0 && el("p", null, `Done: ${actions.join(", ")}.`),
    withheld.length > 0 && el("p", null, `Withheld: ${withheld.join(", ")}.`));
}

function facts({ definition, started, phase, phase_started: since, decision }) {
  return [
    `splits ${definition.model}`,
    started === null ? "not started" : `since ${moment(started)}`,
    phase > 0 && since !== null && `${count(phase)} ${phase === 1 ? "change" : "changes"} of shares, the last ${moment(since)}`,
    definition.ramp?.length > 0 && `ramp ${definition.ramp.map((step) => percent(step)).join(", ")}`,
    `chance of a false decision at most ${percent(definition.alpha)}`,
    decision && `shares as promised: p = ${number(decision.mismatch_p)}`,
  ].filter(Boolean).join(" · ");
}

function arms({ arms: list, definition, name }) {
  const metrics = METRIC_NAMES.filter((metric) => list.some((arm) => arm.metrics[metric]?.count));
  const rules = [definition.primary, ...definition.guardrails].filter((rule) => rule !== null);
  const asked = new Set(rules.map(({ metric }) => metric));
  const line = (label, value) => el("tr", null, el("th", { scope: "row" }, label),
    list.map((arm) => el("td", null, value(arm))));
  const metricLine = (metric) => line(measureName(metric), (arm) => {
    const found = arm.metrics[metric];
    if (!found?.count) return "–";
    const ends = QUANTILES.filter((p) => found[p] !== null && found[p] !== undefined)
      .map((p) => el("small", null, `${p} ${measured(metric, found[p])}`));
    return [measured(metric, found.mean), ...ends];
  });
  const table = (label, rows) => el("div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": `${label} of ${name}` },
    el("table", { class: "numbers arms" },
      el("thead", null, el("tr", null, el("td"), list.map((arm) => el("th", { scope: "col" }, arm.name,
        el("small", null, arm.variant, arm.name === definition.control && ", control", arm.shadow && ", shadow"))))),
      el("tbody", null, rows)));
  const others = metrics.filter((metric) => !asked.has(metric));
  return [
    table("Arms", [
      line("Share", (arm) => percent(arm.share)),
      line("Units", (arm) => count(arm.units)),
      line("Requests", (arm) => count(arm.requests)),
      metrics.filter((metric) => asked.has(metric)).map(metricLine),
    ]),
    others.length > 0 && el("details", null, el("summary", null, "All that is measured"),
      table("Other metrics", others.map(metricLine))),
  ];
}
