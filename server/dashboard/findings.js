// What is proven about each measure: its interval against its margin.

import { el, svg } from "./dom.js";
import { count, measured, measureName, percent, signed, unitOf } from "./format.js";

const MARKS = { better: "✓", within: "✓", worse: "✕", unclear: "?", "no data": "–" };
const MIDDLE = 15;

/** The rule that an experiment has for a finding: direction, margin, and whether it is relative. */
export function ruleOf(definition, finding) {
  const rules = finding.role === "primary" ? [definition.primary] : definition.guardrails;
  const found = rules.find(({ metric, statistic }) =>
    finding.measure === (statistic === "mean" ? metric : `${metric} ${statistic}`));
  return { better: "lower", relative: false, margin: 0, ...found };
}

/** In a finding's own scale: where the arms would be equal, and how they are. */
export function places(finding, rule) {
  const sign = rule.better === "lower" ? 1 : -1;
  const scale = rule.relative ? 1 + sign * rule.margin : 1;
  const known = finding.control !== null && finding.treatment !== null;
  return {
    equal: rule.relative ? (known ? finding.control * (1 - scale) : null) : 0,
    estimate: known ? finding.treatment - finding.control * scale : null,
  };
}

export function findings(experiment, decision) {
  const arms = [...new Set(decision.findings.map(({ arm }) => arm))];
  return [
    arms.map((arm) => [
      arms.length > 1 && el("h5", { "data-key": `${arm}-heading` }, arm),
      el("ul", { class: "findings", "data-key": arm },
        decision.findings.filter((finding) => finding.arm === arm)
          .map((finding) => row(finding, ruleOf(experiment.definition, finding)))),
    ]),
    el("p", { class: "quiet" }, "Bars: where the difference from the control arm lies, at every look ",
      "at once. Dashed: the limit; shaded: the wrong side of it. Proven when a bar lies on one side."),
  ];
}

function row(finding, rule) {
  const { measure, role, state } = finding;
  const key = `${role} ${measure}`;
  return el("li", { "data-key": key, class: `finding ${state.replace(" ", "-")}` },
    el("p", { class: "measure" },
      el("strong", null, measureName(measure)), " ",
      el("span", { class: "plain" }, role === "primary"
        ? `primary, ${rule.better} is better` : `guardrail, ${allowed(rule, measure)}`)),
    el("p", { class: "state" }, el("span", { "aria-hidden": true }, `${MARKS[state]} `), state),
    state !== "no data" && interval(finding, rule),
    el("p", { class: "said" }, said(finding, rule)));
}

function allowed(rule, measure) {
  const worse = rule.better === "lower" ? "more" : "less";
  if (rule.relative) return `at most ${percent(rule.margin)} ${worse}`;
  const { scale, gap } = unitOf(measure, [rule.margin]);
  return `at most ${signed(rule.margin * scale).replace("+", "")}${gap} ${worse}`;
}

function said(finding, rule) {
  if (finding.state === "no data") return "Nothing measured in both arms yet.";
  const { measure, lower, upper, limit } = finding;
  const { scale, gap } = unitOf(measure, [lower, upper, limit]);
  const end = (value) => value === null ? "unbounded" : `${signed(value * scale)}${gap}`;
  const sign = rule.better === "lower" ? 1 : -1;
  const of = rule.relative ? ` from ${percent(1 + sign * rule.margin)} of the control’s` : "";
  return `${measured(measure, finding.treatment)} against ${measured(measure, finding.control)}; ` +
    `difference${of}: ${end(lower)} to ${end(upper)}, limit ${end(limit)}; ` +
    `${count(finding.count)} values`;
}

function interval(finding, rule) {
  const { lower, upper, limit } = finding;
  const { equal, estimate } = places(finding, rule);
  const known = [lower, upper, limit, equal, estimate].filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const pad = (high - low || Math.abs(high) || 1) * 0.12;
  const at = (value) => `${(((value - low + pad) / (high - low + 2 * pad)) * 100).toFixed(2)}%`;
  const [from, to] = [lower === null ? "0%" : at(lower), upper === null ? "100%" : at(upper)];
  const harm = rule.better === "lower" ? [at(limit), "100%"] : ["0%", at(limit)];
  const width = `${parseFloat(harm[1]) - parseFloat(harm[0])}%`;
  const upright = (kind, x, top, bottom) =>
    svg("line", { class: kind, x1: x, x2: x, y1: top, y2: bottom });
  // The line of text below says the same in numbers.
  return svg("svg", { class: "interval", width: "100%", height: 2 * MIDDLE, "aria-hidden": true },
    svg("rect", { class: "wrong", x: harm[0], y: 0, width, height: 2 * MIDDLE }),
    equal !== null && upright("equal", at(equal), 0, 2 * MIDDLE),
    upright("limit", at(limit), 0, 2 * MIDDLE),
    svg("line", { class: "bar", x1: from, x2: to, y1: MIDDLE, y2: MIDDLE }),
    lower !== null && upright("bar", from, MIDDLE - 5, MIDDLE + 5),
    upper !== null && upright("bar", to, MIDDLE - 5, MIDDLE + 5),
    estimate !== null && svg("circle", { class: "estimate", cx: at(estimate), cy: MIDDLE, r: 4 }));
}
