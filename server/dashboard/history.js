// How intervals narrowed, and what was decided and done.

import { el, svg } from "./dom.js";
import { figure, line, scales, thinned } from "./chart.js";
import { measureName, moment, signed, unitOf } from "./format.js";
import { places, ruleOf } from "./findings.js";

const LAST = 20;

/** A chart for each measure of each treatment arm; `decisions`: the oldest first. */
export function history(experiment, decisions) {
  if (decisions.length < 2) {
    return el("p", { class: "quiet" }, "Needs two decisions; intervals narrow with every request.");
  }
  const shown = thinned(decisions);
  const arms = new Set(decisions.at(-1).findings.map(({ arm }) => arm));
  return [
    el("div", { class: "charts" }, decisions.at(-1).findings.map((newest) =>
      chart(experiment, shown, newest, arms.size > 1))),
    el("p", { class: "quiet" }, "Band: where the difference lies. Line: as measured. Dashed: the ",
      "limit; shaded: the wrong side of it. Upright: shares changed, or the experiment ended."),
  ];
}

function chart(experiment, decisions, newest, severalArms) {
  const same = ({ arm, measure, role }) =>
    arm === newest.arm && measure === newest.measure && role === newest.role;
  const points = decisions.map((decision) => ({
    time: decision.time, done: decision.actions.filter((action) => action !== "notify"),
    ...decision.findings.find(same),
  })).filter(({ state }) => state !== undefined && state !== "no data");
  const key = `${newest.arm} ${newest.role} ${newest.measure}`;
  const name = measureName(newest.measure) + (severalArms ? ` of ${newest.arm}` : "");
  if (points.length < 2) {
    return el("figure", { class: "chart", "data-key": key },
      el("figcaption", null, name, el("span", { class: "plain" }, "nothing to draw yet")));
  }
  const rule = ruleOf(experiment.definition, newest);
  const [low, high] = domain(points);
  const times = [points[0].time, points.at(-1).time];
  const at = scales(times, [low, high]);
  const { scale, gap } = unitOf(newest.measure, [low, high]);
  const label = (value) => `${signed(value * scale)}${gap}`;
  const below = points.map((point) => [at.x(point.time), at.y(point.lower ?? -Infinity)]);
  const above = points.map((point) => [at.x(point.time), at.y(point.upper ?? Infinity)]);
  const estimates = points.map((point) => [at.x(point.time), at.y(places(point, rule).estimate)]);
  const limit = at.y(newest.limit);
  const wrong = rule.better === "lower" ? [-120, limit] : [limit, 240];
  return figure({
    key,
    caption: [name, " ", el("span", { class: "plain" }, `limit ${label(newest.limit)}`)],
    top: label(high), bottom: label(low), left: moment(times[0]), right: moment(times[1]),
    marks: [
      svg("rect", { class: "wrong", x: 0, y: wrong[0], width: at.right, height: Math.max(0, wrong[1] - wrong[0]) }),
      svg("path", { class: "band", d: `${line([...above, ...below.reverse()])}z` }),
      svg("path", { class: "line", d: line(estimates) }),
      svg("path", { class: "limit", d: `M0 ${limit}H${at.right}` }),
      points.filter(({ done }) => done.length).map(({ time }) =>
        svg("path", { class: "action", d: `M${at.x(time)} 0V${at.bottom}` })),
    ],
  });
}

/** What the chart spans: the newer half whole, so that the first wide intervals do not flatten it. */
function domain(points) {
  const newer = points.slice(Math.floor(points.length / 2));
  const known = newer.flatMap(({ lower, upper, limit }) => [lower, upper, limit])
    .filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const pad = (high - low || Math.abs(high) || 1) * 0.1;
  return [low - pad, high + pad];
}

/** What was decided, where it was something new, and what was done about it. */
export function decisionTable({ name }, decisions) {
  const news = decisions.filter((decision, i) => {
    const before = decisions[i - 1];
    return !before || before.verdict !== decision.verdict || before.arm !== decision.arm ||
      decision.actions.length > 0 || before.withheld.join() !== decision.withheld.join();
  }).reverse().slice(0, LAST);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Decisions of ${name}` },
    el("table", null,
      el("thead", null, el("tr", null, ["Time", "Verdict", "Done", "Withheld"].map((name) =>
        el("th", { scope: "col" }, name)))),
      el("tbody", null, news.map(({ id, time, verdict, arm, actions, withheld }) =>
        el("tr", { "data-key": String(id) },
          el("th", { scope: "row" }, moment(time)),
          el("td", null, arm ? `${verdict} ${arm}` : verdict),
          el("td", null, actions.join(", ") || "–"),
          el("td", null, withheld.join(", ") || "–"))))));
}
