// A plan as a picture: a row for each layer, a column for each expert of the base model.

import { el, svg } from "./dom.js";
import { ranges } from "./format.js";

const KINDS = [
  ["kept", "kept"],
  ["merged", "part of a merged expert"],
  ["constant", "replaced by a constant"],
  ["dropped", "dropped"],
];
// Right ends of the columns of numbers. They stand first, to be seen where the picture is cut off.
const ENDS = { layer: 34, experts: 88, "top-k": 130 };
const LEFT = 142;
const HEAD = 18;

/** What the marks mean; shapes differ, not only colours. */
export function legend(layers) {
  const found = KINDS.filter(([kind]) => layers.some((layer) => idsOf(layer, kind).length));
  return el("ul", { class: "marks", "aria-hidden": true }, found.map(([kind, meaning]) => el("li", null,
    svg("svg", { width: 14, height: 14 }, mark(kind, 1, 1, 12)), ` ${meaning}`)));
}

/** The picture; `table` says the same to those who cannot see it. */
export function picture(layers, tag) {
  const columns = Math.max(...layers.map(({ experts }) => experts));
  const cell = columns <= 16 ? 18 : columns <= 64 ? 11 : columns <= 128 ? 8 : 6;
  const row = Math.max(cell, 15);
  const size = cell - (cell > 8 ? 3 : 1);
  const width = LEFT + columns * cell + 2;
  const height = HEAD + layers.length * row + 2;
  const drawn = Object.fromEntries(KINDS.map(([kind]) => [kind, ""]));
  layers.forEach((layer, i) => {
    for (const [kind] of KINDS) {
      for (const id of idsOf(layer, kind)) {
        drawn[kind] += path(kind, LEFT + id * cell + (cell - size) / 2,
          HEAD + i * row + (row - size) / 2, size);
      }
    }
  });
  const every = columns <= 16 ? 1 : columns <= 64 ? 8 : 32;
  const numbers = Array.from({ length: Math.ceil(columns / every) }, (_, i) => i * every);
  const middle = (i) => HEAD + i * row + row / 2 + 4;
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Picture of the plan of ${tag}` },
    svg("svg", { class: "plan", width, height, role: "img", "aria-label": summary(layers) },
      Object.entries(ENDS).map(([name, x]) => svg("text", { x, y: 12, class: "end quiet" }, name)),
      numbers.map((id) =>
        svg("text", { x: LEFT + id * cell + cell / 2, y: 12, class: "middle quiet" }, id)),
      layers.map((layer, i) => {
        const values = { layer: layer.layer, experts: layer.remaining, "top-k": layer.top_k };
        return Object.entries(ENDS).map(([name, x]) =>
          svg("text", { x, y: middle(i), class: "end" }, values[name]));
      }),
      KINDS.map(([kind]) => drawn[kind] && svg("path", { class: `mark-${kind}`, d: drawn[kind] }))));
}

export function table(layers, tag) {
  const kinds = KINDS.filter(([kind]) => kind === "kept" ||
    layers.some((layer) => idsOf(layer, kind).length));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Table of the plan of ${tag}` },
    el("table", { class: "numbers" },
      el("caption", null, `Experts of ${tag}, by their number in the base model`),
      el("thead", null, el("tr", null, ["Layer", "Experts", "Top-k"].map((name) =>
        el("th", { scope: "col" }, name)), kinds.map(([, meaning]) =>
        el("th", { scope: "col", class: "ids" }, meaning[0].toUpperCase() + meaning.slice(1))))),
      el("tbody", null, layers.map((layer) => el("tr", null,
        el("th", { scope: "row" }, layer.layer),
        el("td", null, `${layer.remaining} of ${layer.experts}`),
        el("td", null, layer.top_k),
        kinds.map(([kind]) => el("td", { class: "ids" }, ranges(idsOf(layer, kind)) || "none")))))));
}

function summary(layers) {
  const after = layers.reduce((sum, { remaining }) => sum + remaining, 0);
  const before = layers.reduce((sum, { experts }) => sum + experts, 0);
  return `${layers.length} layers, ${after} of ${before} experts; the table below lists them`;
}

function idsOf(layer, kind) {
  if (kind !== "dropped") return layer[kind];
  const there = new Set([...layer.kept, ...layer.merged, ...layer.constant]);
  return Array.from({ length: layer.experts }, (_, id) => id).filter((id) => !there.has(id));
}

function mark(kind, x, y, size) {
  return svg("path", { class: `mark-${kind}`, d: path(kind, x, y, size) });
}

/** Kept: a square. Merged: a triangle. Constant: a ring of a square. Dropped: a dot. */
function path(kind, x, y, size) {
  if (kind === "kept") return `M${x} ${y}h${size}v${size}h${-size}z`;
  if (kind === "merged") return `M${x} ${y + size}h${size}l${-size / 2} ${-size}z`;
  if (kind === "constant") {
    return `M${x} ${y}h${size}v${size}h${-size}zM${x + 2} ${y + 2}v${size - 4}h${size - 4}v${4 - size}z`;
  }
  const dot = Math.max(size / 4, 1.5);
  const at = (size - dot) / 2;
  return `M${x + at} ${y + at}h${dot}v${dot}h${-dot}z`;
}
