// Who has the engine's memory.

import { el, svg } from "./dom.js";
import { bytes, count, percent } from "./format.js";

const OWNERS = [
  ["expert_bytes", "Expert rows", "experts"],
  ["spare_bytes", "Spare rows, for merged experts", "spare"],
  ["other_weight_bytes", "Other weights", "other"],
  ["kv_bytes", "KV cache", "kv"],
];

/** Bytes that the engine has in use. */
export function used(status) {
  return OWNERS.reduce((sum, [field]) => sum + status[field], 0);
}

export function memory(status) {
  const target = status.memory_target_bytes;
  const total = used(status);
  const whole = Math.max(total, target ?? 0);
  const parts = OWNERS.map(([field, name, kind]) => ({ name, kind, size: status[field] }));
  if (target !== null && target > total) {
    parts.push({ name: "Free, below the target", kind: "free", size: target - total });
  }
  return [
    bar(parts, whole),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Memory by owner" },
      el("table", { class: "numbers legend" },
        el("thead", null, el("tr", null,
          el("th", { scope: "col" }, "Owner"),
          el("th", { scope: "col" }, "Memory"),
          el("th", { scope: "col" }, "Share"))),
        el("tbody", null, parts.map(({ name, kind, size }) => el("tr", null,
          el("th", { scope: "row" }, swatch(kind), name),
          el("td", null, bytes(size)),
          el("td", null, whole ? percent(size / whole, 2) : "–")))),
        el("tfoot", null,
          el("tr", null,
            el("th", { scope: "row" }, target === null ? "Together" : "Target"),
            el("td", null, bytes(target ?? total)), el("td")),
          target !== null && total > target && el("tr", { class: "bad" },
            el("th", { scope: "row" }, "Above the target"),
            el("td", null, bytes(total - target)), el("td"))))),
    el("p", { class: "quiet" }, notes(status)),
  ];
}

function notes(status) {
  if (!status.kv_max_blocks) {
    return "Sizes are those of the checkpoint’s files; this server does not know its KV cache.";
  }
  return `KV cache: ${count(status.kv_blocks)} of at most ${count(status.kv_max_blocks)} blocks. ` +
    `The operating system counts ${bytes(status.process_bytes)} for the engine’s workers.`;
}

function bar(parts, whole) {
  let from = 0;
  const shown = parts.filter(({ size }) => size > 0).map(({ kind, size }) => {
    const start = from;
    from += (size / whole) * 100;
    return svg("rect", {
      class: kind, fill: fills(kind), x: `${start}%`, y: 0,
      width: `${(size / whole) * 100}%`, height: 28,
    });
  });
  // The table below says the same in numbers.
  return svg("svg", { class: "memory-bar", width: "100%", height: 28, "aria-hidden": true },
    stripes(), shown);
}

function fills(kind) {
  return kind === "spare" ? "url(#stripes)" : null;
}

function stripes() {
  return svg("defs", null, svg("pattern", {
    id: "stripes", width: 6, height: 6, patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)",
  }, svg("rect", { class: "stripe-ground", width: 6, height: 6 }),
  svg("rect", { class: "stripe", width: 2, height: 6 })));
}

function swatch(kind) {
  return svg("svg", { class: "swatch", width: 12, height: 12, "aria-hidden": true },
    svg("rect", { class: kind, fill: fills(kind), width: 12, height: 12 }));
}
