// Background jobs.

import { el, svg } from "./dom.js";
import { bytes, count, duration, moment, number, percent } from "./format.js";
import { figure, line, scales, thinned } from "./chart.js";

const OPEN = 6;
const MOST_POINTS = 400;
const STORE = "liveprune-curves";

/** The best fitness of each job over its evaluations, as far as this tab has seen it. */
export class Curves {
  constructor(store) {
    this.store = store;
    const kept = JSON.parse(store.getItem(STORE) ?? "[]");
    this.points = new Map(kept);
  }

  see(jobs) {
    let news = false;
    for (const { id, best, cost } of jobs) {
      const at = cost.evaluations;
      if (typeof best?.fitness !== "number" || typeof at !== "number") continue;
      const points = this.points.get(id) ?? [];
      const last = points.at(-1);
      if (last && last[0] === at && last[1] === best.fitness) continue;
      if (last && last[0] > at) points.length = 0;
      points.push([at, best.fitness]);
      this.points.set(id, points.length > MOST_POINTS ? points.filter((_, i) => i % 2) : points);
      news = true;
    }
    const known = new Set(jobs.map(({ id }) => id));
    for (const id of this.points.keys()) if (!known.has(id)) this.points.delete(id);
    if (news) this.store.setItem(STORE, JSON.stringify([...this.points]));
  }
}

export function jobs(list, curves) {
  if (!list.length) {
    return el("p", null, "No jobs yet. Find a variant in the background, for example with ",
      el("code", null, "liveprune jobs start --method reap --live-statistics --experts 0.5 --name half"), ".");
  }
  const rest = list.slice(OPEN);
  return [
    el("ul", { class: "cards wide" }, list.slice(0, OPEN).map((job) => card(job, curves))),
    rest.length > 0 && el("details", null, el("summary", null, `${count(rest.length)} older`),
      el("ul", { class: "cards wide" }, rest.map((job) => card(job, curves)))),
  ];
}

function card(job, curves) {
  const { request, progress, best, cost } = job;
  const running = job.state === "running";
  return el("li", { class: "card", "data-key": job.id },
    el("h3", null, request.tag, " ", el("span", { class: "plain" }, `by ${request.method} `),
      el("span", { class: `badge ${job.state}` },
        running && job.cancel_asked ? "stopping" : job.state), " ",
      el("code", { class: "digest" }, job.id.slice(0, 8))),
    running && typeof progress.ratio === "number" && el("p", { class: "progress" },
      el("progress", { max: 1, value: progress.ratio, "aria-label": `Progress of ${request.tag}` }),
      ` ${percent(progress.ratio, 2)}`),
    el("dl", { class: "facts" },
      fact("Budget", budget(request)),
      running && progress.stage && fact("Stage", stage(progress)),
      running && typeof progress.seconds_left === "number" &&
        fact("Left", `about ${duration(progress.seconds_left)}`),
      best && typeof best.fitness === "number" && fact("Best fitness", number(best.fitness, 4)),
      job.finished !== null && job.started !== null && fact("Took", duration(job.finished - job.started)),
      fact(job.finished === null ? (job.started === null ? "Asked" : "Began") : "Ended",
        moment(job.finished ?? job.started ?? job.created)),
      Object.entries(COSTS).map(([name, [label, format]]) =>
        typeof cost[name] === "number" && fact(label, format(cost[name]))),
      job.attempt > 0 && fact("Went on after crashes", count(job.attempt))),
    job.error && el("p", { class: "bad" }, job.error),
    curve(job, curves.points.get(job.id) ?? []));
}

const COSTS = {
  cpu_seconds: ["CPU time", duration],
  engine_seconds: ["Engine time", duration],
  tokens: ["Tokens", count],
  evaluations: ["Evaluations", count],
};

function fact(name, value) {
  return el("div", null, el("dt", null, name), el("dd", null, value));
}

function budget({ experts, target_memory: memory }) {
  if (memory !== null && memory !== undefined) return `${bytes(memory)} of weights`;
  if (experts === null || experts === undefined) return "by its settings";
  const share = typeof experts === "string" && experts.startsWith("0.");
  if (share) return `${percent(Number(experts))} of the experts`;
  return `${Array.isArray(experts) ? experts.join(", ") : experts} experts a layer`;
}

function stage({ stage: name, done, total }) {
  return total ? `${name}, ${count(done)} of ${count(total)}` : name;
}

function curve(job, points) {
  if (points.length < 2) return null;
  const values = points.map(([, fitness]) => fitness);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const at = scales([first, last], [low, high]);
  const steps = [];
  for (const [x, y] of thinned(points)) {
    if (steps.length) steps.push([at.x(x), steps.at(-1)[1]]);
    steps.push([at.x(x), at.y(y)]);
  }
  return figure({
    key: "curve",
    caption: `Best fitness, from ${number(values[0], 4)} to ${number(values.at(-1), 4)} ` +
      "while this tab looked on",
    top: number(high, 4), bottom: number(low, 4),
    left: `${count(first)} evaluations`, right: count(last),
    marks: svg("path", { class: "line", d: line(steps) }),
  });
}
