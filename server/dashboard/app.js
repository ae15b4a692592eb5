// The page: asks for the key, listens, and shows what it hears. It changes nothing on the server.

import { get, listen, Refused } from "./api.js";
import { changes, title } from "./changes.js";
import { el, show } from "./dom.js";
import { ACTIVE, experiments } from "./experiments.js";
import { bytes, count, percent } from "./format.js";
import { Curves, jobs } from "./jobs.js";
import { memory, used } from "./memory.js";
import { planKey, variants } from "./variants.js";

const KEY = "liveprune-admin-key";
const MOST_DECISIONS = 5000;
const by = (id) => document.getElementById(id);

const heard = { status: null, experiments: null, jobs: null, problems: {} };
const operations = new Map();
const plans = new Map();
const decided = new Map();
const curves = new Curves(sessionStorage);
let key = sessionStorage.getItem(KEY);
let listening = new AbortController();

function say(text) {
  show(by("announcer"), text);
}

// The key.

function ask(reason = "") {
  listening.abort();
  sessionStorage.removeItem(KEY);
  key = null;
  by("gate").hidden = false;
  for (const id of ["board", "sections", "forget"]) by(id).hidden = true;
  connection("");
  show(by("key-error"), reason);
  by("key").setAttribute("aria-invalid", String(reason !== ""));
  by("key").value = "";
  by("key").focus();
}

function open(given) {
  key = given;
  listening.abort();
  listening = new AbortController();
  connection("waiting", "Connecting…");
  const { signal } = listening;
  listen(key, { open: opened, event, lost }, signal).catch((error) => {
    if (signal.aborted) return;
    ask(error instanceof Refused ? `Refused: ${error.message}.` : `Failed: ${error.message}.`);
  });
}

function opened() {
  sessionStorage.setItem(KEY, key);
  const first = !by("gate").hidden;
  by("gate").hidden = true;
  for (const id of ["board", "sections", "forget"]) by(id).hidden = false;
  show(by("key-error"));
  connection("live", "Live");
  if (first) by("main").focus();
  for (const { name, state } of heard.experiments ?? []) {
    if (ACTIVE.includes(state)) decided.delete(name); // some may have been missed
  }
  lookBack();
}

function lost(reason, seconds) {
  connection("lost", `Not live: ${reason}; tried again in ${seconds} s`);
}

function connection(state, text = "") {
  by("connection").className = `connection ${state}`;
  show(by("connection"), text);
}

// What is heard.

function event(name, body) {
  const before = heard[name];
  heard[name] = name === "problems" ? body : body[name] ?? body;
  if (name === "status") {
    const [was, is] = [before?.operation, heard.status.operation];
    if (before && (was?.id !== is?.id || was?.state !== is?.state)) {
      if (is) say(`${title(is)}: ${is.state}`);
      lookBack();
    }
  } else if (name === "experiments") {
    for (const experiment of heard.experiments) {
      const was = before?.find((other) => other.name === experiment.name)?.decision?.verdict;
      const is = experiment.decision?.verdict;
      if (before && is && is !== was) say(`Experiment ${experiment.name}: ${is}`);
      follow(experiment);
    }
  } else if (name === "jobs") {
    curves.see(heard.jobs);
  }
  draw();
}

/** Learn how the last operations ended: the status tells only of the one under way. */
async function lookBack() {
  const asked = key;
  try {
    const { operations: list } = await get("/admin/v1/operations", asked);
    const known = operations.size > 0;
    for (const operation of list) {
      const was = operations.get(operation.id);
      operations.set(operation.id, operation);
      if (known && operation.finished !== null && !was?.finished) {
        say(`${title(operation)}: ${operation.state}`);
      }
    }
    draw();
  } catch {
    // The stream says what is wrong with the connection; the next change asks again.
  }
}

async function follow({ name, state, decision }) {
  const list = decided.get(name);
  if (Array.isArray(list)) {
    if (decision && decision.id !== list.at(-1)?.id) list.push(decision);
    if (list.length > MOST_DECISIONS) list.splice(0, list.length - MOST_DECISIONS);
  } else if (list === undefined && ACTIVE.includes(state)) {
    await load(decided, name, async () =>
      (await get(`/admin/v1/experiments/${encodeURIComponent(name)}/decisions`, key)).decisions);
  }
}

const loading = new Set();

/** Put what `fetched` gives, or its error, into a map once, and draw it. */
async function load(map, name, fetched) {
  if (loading.has(name)) return;
  loading.add(name);
  try {
    map.set(name, await fetched());
  } catch (error) {
    map.set(name, error);
  } finally {
    loading.delete(name);
  }
  draw();
}

// Disclosures load what they show when they are opened first. Their event does not bubble.
document.addEventListener("toggle", ({ target }) => {
  if (!target.open) return;
  if (target.dataset.plan) loadPlan(target.dataset.plan);
  const name = target.dataset.experiment;
  if (name && !decided.has(name)) {
    load(decided, name, async () =>
      (await get(`/admin/v1/experiments/${encodeURIComponent(name)}/decisions`, key)).decisions);
  }
}, true);

function loadPlan(name) {
  const variant = heard.status?.variants.find((other) => other.name === name);
  if (!variant || plans.has(planKey(variant))) return;
  const path = `/admin/v1/variants/${encodeURIComponent(variant.tag)}/plan`;
  load(plans, planKey(variant), async () => (await get(path, key)).layers);
}

// What is shown.

const SECTIONS = {
  memory: ["status", () => memory(heard.status)],
  changes: ["status", () => changes(heard.status.operation, [...operations.values()])],
  variants: ["status", () => variants(heard.status, plans)],
  experiments: ["experiments", () => experiments(heard.experiments, decided)],
  jobs: ["jobs", () => jobs(heard.jobs, curves)],
};

function draw() {
  const { status } = heard;
  if (status) {
    show(by("model"), status.model);
    document.title = `${status.model} · Liveprune`;
    show(by("overview"), overview());
  }
  for (const [id, [source, drawn]] of Object.entries(SECTIONS)) {
    const reason = heard.problems[source];
    show(by(`${id}-body`),
      reason && el("p", { class: "bad", "data-key": "problem" },
        `${heard[source] ? "Not up to date" : "Not known"}: ${reason}.`),
      heard[source] ? drawn() : reason ? null : el("p", { class: "quiet" }, "Loading…"));
  }
}

function overview() {
  const { status, experiments: tried, jobs: worked, problems } = heard;
  const target = status.memory_target_bytes;
  const running = (list) => list?.filter(({ state }) => state === "running") ?? [];
  const words = running(tried).map(({ decision }) => decision?.verdict).filter(Boolean);
  const ready = status.ready && !problems.status;
  return [
    figure("Answers", ready ? status.alias.slice(status.alias.lastIndexOf(":") + 1) : "nobody",
      ready ? `of ${status.variants.filter(({ state }) => state === "live").length} live variants` : "no variant can answer"),
    figure("Memory", bytes(used(status)), target === null ? "no target" : `${percent(used(status) / target, 2)} of ${bytes(target)}`),
    figure("In flight", count(status.variants.reduce((sum, variant) => sum + variant.in_flight, 0)), "requests"),
    figure("Experiments", count(running(tried).length), words.length ? [...new Set(words)].join(", ") : "running"),
    figure("Jobs", count(running(worked).length), "running"),
  ];
}

function figure(name, value, detail) {
  return el("div", null, el("dt", null, name), el("dd", null, value, el("small", null, detail)));
}

// Begin.

by("key-form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  const given = by("key").value.trim();
  if (/^[\x21-\x7e]+$/.test(given)) open(given);
  else ask("Refused: a key has letters, digits and signs of ASCII only.");
});
by("forget").addEventListener("click", () => ask());
if (key === null) ask();
else open(key);
