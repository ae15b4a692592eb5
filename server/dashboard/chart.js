// Lines over a span: drawn stretched, with their labels outside, so that text stays readable at any
// width.

import { el, svg } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 120;
const MOST = 240;

/** Of many things at most MOST, the last among them. */
export function thinned(items) {
  const step = Math.ceil(items.length / MOST);
  return items.filter((_, i) => (items.length - 1 - i) % step === 0);
}

/** From data to the chart's box. */
export function scales([left, right], [bottom, top]) {
  const wide = right - left || 1;
  const high = top - bottom || 1;
  const clip = (value) => Math.min(Math.max(value, -HEIGHT), 2 * HEIGHT);
  return {
    x: (value) => round(((value - left) / wide) * WIDTH),
    y: (value) => round(clip(HEIGHT - ((value - bottom) / high) * HEIGHT)),
    left: 0, right: WIDTH, top: 0, bottom: HEIGHT,
  };
}

function round(value) {
  return Math.round(value * 10) / 10;
}

/** A path through points that are in the box already. */
export function line(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x} ${y}`).join("");
}

/** A figure: `marks` in the box, and what its edges stand for. The caption says what it shows. */
export function figure({ key, caption, top, bottom, left, right, marks }) {
  return el("figure", { class: "chart", "data-key": key },
    el("figcaption", null, caption),
    el("div", { class: "plot", "aria-hidden": true },
      el("div", { class: "scale" }, el("span", null, top), el("span", null, bottom)),
      svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" }, marks)),
    el("div", { class: "ends", "aria-hidden": true }, el("span", null, left), el("span", null, right)));
}
