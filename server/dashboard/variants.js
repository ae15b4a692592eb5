// Variants and their plans.

import { el } from "./dom.js";
import { bytes, count, span } from "./format.js";
import { legend, picture, table } from "./plan.js";

/** Names a plan that does not change: the tag under one digest. */
export function planKey(variant) {
  return `${variant.tag}@${variant.digest ?? "base"}`;
}

/** `plans`: by planKey, the layers, or an Error, or undefined while nobody asked. */
export function variants(status, plans) {
  const full = status.variants.find(({ tag }) => tag === "full");
  const shown = [...status.variants].sort((a, b) =>
    b.is_alias - a.is_alias || (b.state === "live") - (a.state === "live") ||
    a.tag.localeCompare(b.tag));
  return [
    el("ul", { class: "cards" },
      shown.map((variant) => card(variant, full, plans.get(planKey(variant))))),
    shown.length < 2 && el("p", { class: "quiet" }, "Only the base model is here. Add a variant with ",
      el("code", null, "liveprune variants add PLAN --name TAG"), ", or find one with ",
      el("code", null, "liveprune jobs start"), "."),
  ];
}

function card(variant, full, plan) {
  return el("li", { class: "card", "data-key": variant.name },
    el("h3", null, variant.tag, " ", badges(variant)),
    el("dl", { class: "facts" },
      fact("Experts a layer", full && variant !== full
        ? `${span(variant.experts)} of ${span(full.experts)}` : span(variant.experts)),
      fact("Active (top-k)", span(variant.top_k)),
      fact("Expert rows", variant.row_bytes ? bytes(variant.row_bytes) : "none resident"),
      fact("In flight", count(variant.in_flight))),
    el("details", { "data-plan": variant.name },
      el("summary", null, "Plan", el("span", { class: "unseen" }, ` of ${variant.tag}`),
        variant.digest && el("code", { class: "digest" }, variant.digest.slice(0, 12))),
      planOf(variant, plan)));
}

function fact(name, value) {
  return el("div", null, el("dt", null, name), el("dd", null, value));
}

function badges(variant) {
  return [
    el("span", { class: `badge ${variant.state}` }, variant.state),
    variant.is_alias && el("span", { class: "badge alias" }, "answers the bare name"),
    variant.is_previous && el("span", { class: "badge" }, "roll-back target"),
  ].filter(Boolean).flatMap((badge) => [badge, " "]);
}

function planOf(variant, plan) {
  if (plan === undefined) return el("p", { class: "quiet" }, "Loading…");
  if (plan instanceof Error) return el("p", { class: "bad" }, plan.message);
  return [
    legend(plan),
    picture(plan, variant.tag),
    el("details", null, el("summary", null, "As a table"), table(plan, variant.tag)),
  ];
}
