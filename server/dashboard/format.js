// Numbers as people read them: with units, and no more digits than they deserve.

const MINUS = "\u2212";
const NBSP = "\u00a0";

const group = new Intl.NumberFormat("en");
const CLOCK = new Intl.DateTimeFormat("en", {
  hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});
const DAY = new Intl.DateTimeFormat("en", { day: "numeric", month: "short" });

function minus(text) {
  return text.replace("-", MINUS);
}

/** 12,345. */
export function count(value) {
  return group.format(value);
}

/** About three significant digits; never in exponents unless tiny. */
export function number(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4) return minus(value.toExponential(1));
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  const options = { maximumFractionDigits: Math.min(places, 6) };
  return minus(new Intl.NumberFormat("en", options).format(value));
}

/** With a sign, for differences. */
export function signed(value, digits = 3) {
  return (value > 0 ? "+" : "") + number(value, digits);
}

const SIZES = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];

/** 1.25 GiB. */
export function bytes(value) {
  const [size, unit] = SIZES.find(([least]) => Math.abs(value) >= least) ?? [1, "B"];
  return `${number(value / size)}${NBSP}${unit}`;
}

/** 42%. */
export function percent(ratio, digits = 3) {
  return `${number(ratio * 100, digits)}%`;
}

/** Time that something takes: 850 ms, 1.24 s, 3 min 20 s, 2 h 5 min. */
export function duration(seconds) {
  if (seconds < 0.9995) return `${number(seconds * 1000)}${NBSP}ms`;
  if (seconds < 59.5) return `${number(seconds)}${NBSP}s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return two(Math.floor(whole / 60), "min", whole % 60, "s");
  const minutes = Math.round(whole / 60);
  if (minutes < 48 * 60) return two(Math.floor(minutes / 60), "h", minutes % 60, "min");
  const hours = Math.round(minutes / 60);
  return two(Math.floor(hours / 24), "d", hours % 24, "h");
}

function two(large, largeUnit, small, smallUnit) {
  const first = `${large}${NBSP}${largeUnit}`;
  return small ? `${first} ${small}${NBSP}${smallUnit}` : first;
}

/** When something was: 14:03:22, on another day with the day before it. */
export function moment(seconds) {
  const date = new Date(seconds * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today ? CLOCK.format(date) : `${DAY.format(date)}, ${CLOCK.format(date)}`;
}

/** 4 or 4–6. */
export function span({ min, max }) {
  return min === max ? count(min) : `${count(min)}–${count(max)}`;
}

/** Ascending ids as ranges: 0–3, 7. */
export function ranges(ids) {
  const runs = [];
  for (const id of ids) {
    const last = runs.at(-1);
    if (last && last[1] === id - 1) last[1] = id;
    else runs.push([id, id]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : b === a + 1 ? `${a}, ${b}` : `${a}–${b}`)).join(", ");
}

// What experiments measure. Differences of rates are told in percentage points.
const SECONDS = { scale: 1, unit: `${NBSP}s`, gap: `${NBSP}s` };
const MILLISECONDS = { scale: 1000, unit: `${NBSP}ms`, gap: `${NBSP}ms` };
const RATE = { scale: 100, unit: "%", gap: `${NBSP}pp` };
const PLAIN = { scale: 1, unit: "", gap: "" };
const TOKENS = { scale: 1, unit: "", gap: "" };
const NATS = { scale: 1, unit: `${NBSP}nats`, gap: `${NBSP}nats` };

const METRICS = {
  ttft_seconds: ["Time to first token", "time"],
  inter_token_seconds: ["Time between tokens", "time"],
  e2e_seconds: ["End-to-end time", "time"],
  queue_seconds: ["Time in queue", "time"],
  prompt_tokens: ["Prompt tokens", TOKENS],
  output_tokens: ["Output tokens", TOKENS],
  error: ["Errors", RATE],
  length: ["Cut off by length", RATE],
  empty: ["Empty answers", RATE],
  loop: ["Loops", RATE],
  bad_json: ["Invalid JSON", RATE],
  bad_tool_call: ["Invalid tool calls", RATE],
  score: ["Clients’ score", RATE],
  agreement: ["Agreement with full", RATE],
  top1_agreement: ["Same first choice as full", RATE],
  kl: ["Divergence from full", NATS],
  log_likelihood_gap: ["Log-likelihood gap", NATS],
};

/** The order in which metrics are listed. */
export const METRIC_NAMES = Object.keys(METRICS);

/** What people call a measure such as `e2e_seconds p95`. */
export function measureName(label) {
  const [metric, statistic] = label.split(" ");
  const name = METRICS[metric]?.[0] ?? metric;
  return statistic ? `${name}, ${statistic}` : name;
}

/** One unit for all these values of a measure. */
export function unitOf(label, values) {
  const kind = METRICS[label.split(" ")[0]]?.[1] ?? PLAIN;
  if (kind !== "time") return kind;
  const sizes = values.filter((value) => value !== null && value !== undefined).map(Math.abs);
  return sizes.length && Math.max(...sizes) < 1 ? MILLISECONDS : SECONDS;
}

/** A value of a measure, with its unit. */
export function measured(label, value) {
  const { scale, unit } = unitOf(label, [value]);
  return `${number(value * scale)}${unit}`;
}
