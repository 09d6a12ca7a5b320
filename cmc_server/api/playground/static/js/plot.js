// A strength sweep as two small plots above each other, drawn as SVG.

import { el, neighbour, plain, svg } from "./dom.js";

/** @typedef {{strength: number, tokens: number, shift: number|null, isCut: boolean}} Point */
/** @typedef {{title: string, unit: string, value: (point: Point) => number|null, kind: string}} Panel */

const HEIGHT = 150, LEFT = 40, RIGHT = 16, TOP = 14, BOTTOM = 24;

/** @type {Panel[]} */
const PANELS = [
  { title: "Length of the answer", unit: "tokens", value: (point) => point.tokens, kind: "length" },
  { title: "How far the delta moved it", unit: "mean change of log probability per token", value: (point) => point.shift, kind: "shift" },
];

/**
 * @param {HTMLElement} place
 * @param {number[]} strengths all that will be there, so that the axis stands still
 * @param {Map<number, Point>} points those that have come
 * @param {number|null} chosen
 * @param {(strength: number) => void} onChoose
 */
export function drawSweep(place, strengths, points, chosen, onChoose) {
  const width = Math.max(240, place.clientWidth - 28);
  const hadFocus = place.contains(document.activeElement);
  place.replaceChildren(...PANELS.map((panel) => figure(panel, width, strengths, points, chosen, onChoose)));
  if (hadFocus) /** @type {any} */ (place.querySelector(".point[tabindex='0']"))?.focus();
}

/** @param {Panel} panel @param {number} width @param {number[]} strengths @param {Map<number, Point>} points @param {number|null} chosen @param {(strength: number) => void} onChoose */
function figure(panel, width, strengths, points, chosen, onChoose) {
  const known = strengths.filter((strength) => points.has(strength) && panel.value(at(strength)) !== null);
  const values = known.map((strength) => Number(panel.value(at(strength))));
  const ticks = niceTicks(Math.min(0, ...values), Math.max(panel.kind === "length" ? 10 : 0.1, ...values));
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const [first, last] = [Math.min(...strengths), Math.max(...strengths)];
  const x = (/** @type {number} */ strength) => LEFT + ((strength - first) / (last - first || 1)) * (width - LEFT - RIGHT);
  const y = (/** @type {number} */ value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  function at(/** @type {number} */ strength) {
    return /** @type {Point} */ (points.get(strength));
  }
  const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "group", "aria-label": `${panel.title} by strength; the arrow keys move` });
  for (const tick of ticks)
    picture.append(svg("line", { class: tick === 0 ? "axis" : "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "y", x: LEFT - 8, y: y(tick) + 4, text: plain(tick) }));
  for (const strength of strengths) picture.append(svg("text", { class: "x", x: x(strength), y: HEIGHT - 4, text: plain(strength) }));
  picture.append(svg("polyline", { class: `line ${panel.kind}`, points: known.map((strength, index) => `${x(strength)},${y(values[index])}`).join(" ") }));
  const dots = known.map((strength, index) => {
    const point = at(strength);
    const isChosen = strength === chosen;
    const label = `Strength ${plain(strength)}: ${plain(values[index])} ${panel.unit}${point.isCut ? ", cut at the limit" : ""}`;
    return svg("g", {
      class: "point", role: "button", "aria-pressed": String(isChosen), "aria-label": label,
      tabindex: isChosen || (index === 0 && (chosen === null || !known.includes(chosen))) ? 0 : -1, click: () => onChoose(strength),
      keydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Enter" || event.key === " ") event.preventDefault();
        const to = neighbour(event, known, index) ?? (event.key === "Enter" || event.key === " " ? strength : undefined);
        if (to !== undefined) onChoose(to);
      },
    },
    svg("title", { text: label }),
    svg("circle", { class: "target", cx: x(strength), cy: y(values[index]), r: 16 }),
    svg("circle", { class: `dot ${panel.kind}${point.isCut ? " cut" : ""}`, cx: x(strength), cy: y(values[index]), r: isChosen ? 7 : 5 }));
  });
  picture.append(...dots);
  return el("figure", {}, el("figcaption", {}, el("strong", { text: panel.title }), ` ${panel.unit}${known.some((strength) => at(strength).isCut) ? "; open points were cut at the limit" : ""}`), picture);
}

/** Round numbers around a range. @param {number} low @param {number} high */
export function niceTicks(low, high) {
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough) ?? 10 * power;
  const ticks = [];
  for (let index = Math.floor(low / step); index <= Math.ceil(high / step); index += 1) ticks.push(index * step);
  return ticks;
}
