// One slider and one number for each delta.

import { byId, el, plain } from "./dom.js";

/** @typedef {import("./request.js").Choice} Choice */
/** @typedef {{name: string, description: string, strength: number, strength_bounds: [number, number], advised_range: [number, number]|null}} Delta */

const STEP = 0.05;
/** Width of the slider's thumb, as the style sheet has it. */
const THUMB = 20;

/** @type {Array<{delta: Delta, slider: any, node: any}>} */
let rows = [];

/**
 * @param {Delta[]} deltas
 * @param {() => void} onMove called while a strength moves
 * @param {() => void} onChange called when it has been chosen
 */
export function showDeltas(deltas, onMove, onChange) {
  const place = byId("deltas");
  // The first one is on, so that the first answer shows something; the others wait to be turned up.
  rows = deltas.map((delta, index) => row(delta, index === 0 ? delta.strength : 0, onMove, onChange));
  byId("live-row").hidden = rows.length === 0;
  place.replaceChildren(...rows.map(({ node }) => node));
  if (rows.length === 0)
    place.append(el("p", { class: "nothing" }, "No delta is loaded, so the model answers alone. Start the server with ",
      el("code", { text: "--delta NAME=PATH" }), "."));
}

/** What the sliders say now. @returns {Choice[]} */
export const choices = () => rows.map(({ delta, slider }) => ({ name: delta.name, strength: Number(slider.value) }));

/** "concise 1.25, forget-tofu 0.5", of those that do something. @param {Choice[]} deltas */
export const named = (deltas) =>
  deltas.filter(({ strength }) => strength !== 0).map(({ name, strength }) => `${name} ${plain(strength)}`).join(", ");

/** @param {Delta} delta @param {number} value @param {() => void} onMove @param {() => void} onChange @returns {any} */
function row(delta, value, onMove, onChange) {
  const [low, high] = delta.strength_bounds;
  const limits = { min: low, max: high };
  const slider = el("input", { type: "range", ...limits, step: STEP, value, id: `delta-${delta.name}`, title: "Double click: back to the default" });
  const number = el("input", { type: "number", ...limits, step: STEP, value, "aria-label": `Strength of ${delta.name}, as a number` });
  const set = (/** @type {string|number} */ to) => {
    slider.value = String(to);
    number.value = slider.value;
    slider.setAttribute("aria-valuetext", `${slider.value}${Number(slider.value) === 0 ? ", off" : ""}`);
    onMove();
  };
  slider.addEventListener("input", () => set(slider.value));
  slider.addEventListener("change", onChange);
  number.addEventListener("input", () => number.value !== "" && number.validity.valid && set(number.value));
  number.addEventListener("change", () => (set(number.value === "" ? slider.value : number.value), onChange()));
  const reset = () => (set(delta.strength), onChange());
  slider.addEventListener("dblclick", reset);
  slider.setAttribute("aria-valuetext", `${value}${value === 0 ? ", off" : ""}`);
  const node = el("div", { class: "delta" },
    el("div", { class: "delta-head" },
      el("label", { for: slider.id, text: delta.name }),
      el("button", { type: "button", class: "quiet", title: `Back to ${plain(delta.strength)}`, "aria-label": `Reset ${delta.name} to ${plain(delta.strength)}`, click: reset }, "reset"),
      number),
    el("p", { class: "hint" }, `${delta.description} `, el("span", { class: "nowrap", text: advice(delta) })),
    el("div", { class: "track" }, ...marks(delta), slider));
  return { delta, slider, node };
}

/** @param {Delta} delta */
const advice = ({ advised_range: range }) => (range ? `Advised: ${plain(range[0])} to ${plain(range[1])}.` : "");

/** The advised range and a few numbers along the slider. @param {Delta} delta */
function marks({ strength_bounds: [low, high], advised_range: advised }) {
  const at = (/** @type {number} */ value) => {
    const share = Math.min(1, Math.max(0, (value - low) / (high - low)));
    return `calc(${THUMB / 2}px + ${share} * (100% - ${THUMB}px))`;
  };
  const ticks = [...new Set([low, 0, 1, high])].filter((value) => value >= low && value <= high).map((value) => {
    const tick = el("span", { class: "tick", "aria-hidden": "true", text: plain(value) });
    tick.style.insetInlineStart = at(value);
    return tick;
  });
  if (!advised) return ticks;
  const [from, to] = advised;
  const band = el("span", { class: "advised" });
  band.style.insetInlineStart = at(from);
  band.style.inlineSize = `calc(${(to - from) / (high - low)} * (100% - ${THUMB}px))`;
  return [band, ...ticks];
}
