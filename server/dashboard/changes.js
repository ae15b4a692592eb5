// The change under way, and the last ones.

import { el } from "./dom.js";
import { bytes, duration, moment, percent } from "./format.js";

const STEPS = ["queued", "making-room", "filling", "publishing", "canary", "scoring", "switching",
  "draining", "releasing", "growing"];
const MEANING = {
  queued: "accepted",
  "making-room": "the KV cache gives back what new rows need",
  filling: "expert rows are read or merged, and checked",
  publishing: "the routing tables become live",
  canary: "golden answers are compared",
  scoring: "candidates of a search answer",
  switching: "new requests go to the new variant",
  draining: "answers begun on the old variant end on it",
  releasing: "rows that nothing needs are given back",
  growing: "the KV cache takes the freed memory",
};
const KINDS = { add: "Add", remove: "Remove", swap: "Swap to", rollback: "Roll back to",
  score: "Score candidates on", generate: "Candidates answer on" };
const LAST = 5;
const LONGEST = 3;

/** A change in a few words. */
export function title(operation) {
  return `${KINDS[operation.kind] ?? operation.kind} ${operation.variant}`;
}

export function changes(current, ended) {
  const last = ended.filter(({ id, finished }) => finished !== null && id !== current?.id)
    .sort((a, b) => b.finished - a.finished).slice(0, LAST);
  return [
    current ? underWay(current)
      : el("p", null, "Nothing is under way. ",
        last.length ? null : ["Swap with ", el("code", null, "liveprune swap TAG"), "."]),
    last.length ? past(last) : null,
  ];
}

function underWay(operation) {
  const { bytes_done: done, bytes_total: total } = operation.progress;
  const reached = STEPS.indexOf(operation.state);
  const steps = STEPS.filter((step) => step in operation.seconds || step === operation.state);
  return el("article", { class: "under-way", "data-key": operation.id },
    el("h3", null, title(operation)),
    el("ol", { class: "steps" }, steps.map((step) => el("li",
      { "aria-current": step === operation.state ? "step" : null },
      el("span", { class: "step" }, step),
      el("span", { class: "quiet" }, STEPS.indexOf(step) < reached && step in operation.seconds
        ? duration(operation.seconds[step]) : MEANING[step])))),
    total > 0 && el("p", { class: "progress" },
      el("progress", { max: total, value: done, "aria-label": "Expert rows made resident" }),
      ` ${bytes(done)} of ${bytes(total)}, ${percent(done / total, 2)}`),
    operation.freed_bytes > 0 && el("p", null, `Freed: ${bytes(operation.freed_bytes)}`),
    noted(operation));
}

function past(operations) {
  return [
    el("h3", { "data-key": "past" }, "Last changes"),
    el("ul", { class: "past" }, operations.map((operation) => el("li", { "data-key": operation.id },
      el("p", null, title(operation), " ",
        el("span", { class: `badge ${operation.state}` }, operation.state)),
      operation.error && el("p", { class: "bad" }, operation.error),
      el("p", { class: "quiet" }, told(operation))))),
  ];
}

function told({ created, finished, seconds, freed_bytes: freed }) {
  const longest = Object.entries(seconds).sort((a, b) => b[1] - a[1]).slice(0, LONGEST)
    .filter(([, time]) => time >= 0.001)
    .map(([state, time]) => `${state} ${duration(time)}`);
  return [
    `${moment(finished)}, took ${duration(finished - created)}`,
    ...longest,
    freed > 0 && `freed ${bytes(freed)}`,
  ].filter(Boolean).join(" · ");
}

function noted({ error, notes }) {
  return [
    error && el("p", { class: "bad" }, error),
    notes.length > 0 && el("ul", { class: "quiet" }, notes.map((note) => el("li", null, note))),
  ];
}
