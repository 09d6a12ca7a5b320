// An answer token by token: marked by its shift, one tab stop, arrow keys, and a popover for the token at hand.

import { el, neighbour } from "./dom.js";
import { hidePopover, showPopover } from "./popover.js";
import { inWords, percent, units } from "./shift.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./shift.js").Unit} Unit */

/**
 * Show an answer; as plain text until the base model's view of it is known.
 * @param {HTMLElement} place
 * @param {Answer} answer
 */
export function showAnswer(place, answer) {
  if (!answer.isScored) {
    place.replaceChildren(el("p", { class: "text", text: answer.text }));
    return;
  }
  const list = el("p", {
    class: "text tokens", role: "listbox", "aria-orientation": "horizontal",
    "aria-label": "The steered answer token by token; the arrow keys move",
  });
  const shown = units(answer.tokens);
  const hasEnd = answer.finish === "stop" && shown.slice(0, -1).map((unit) => unit.text).join("") === answer.text;
  shown.forEach((unit, index) => list.append(piece(unit, index === 0, hasEnd && index === shown.length - 1)));
  watch(list);
  place.replaceChildren(el("p", { class: "sr", text: answer.text }), list);
}

/** @param {Unit} unit @param {boolean} isFirst @param {boolean} isEnd */
function piece(unit, isFirst, isEnd) {
  const [token] = unit.tokens;
  const change = `${percent(Number(token.base))} to ${percent(token.steered)}, ${inWords(Number(unit.shift))}`;
  const node = el("span", {
    class: isEnd ? "token end" : "token", role: "option", "aria-selected": "false", tabindex: isFirst ? 0 : -1,
    "data-level": unit.level, "aria-label": `${isEnd ? "end of the answer" : unit.text}: ${change}`,
  }, isEnd ? "end" : unit.text);
  node.unit = unit;
  node.isEnd = isEnd;
  return node;
}

/** @param {any} list */
function watch(list) {
  const tokenOf = (/** @type {Event} */ event) => /** @type {any} */ (event.target).closest(".token");
  const show = (/** @type {any} */ token) => token && showPopover(token, token.unit, token.isEnd);
  list.addEventListener("pointerover", (/** @type {PointerEvent} */ event) => event.pointerType === "mouse" && show(tokenOf(event)));
  list.addEventListener("pointerleave", (/** @type {PointerEvent} */ event) => {
    if (event.pointerType === "mouse" && !list.contains(document.activeElement)) hidePopover();
  });
  list.addEventListener("focusin", (/** @type {FocusEvent} */ event) => {
    const token = tokenOf(event);
    for (const other of list.children) {
      other.tabIndex = other === token ? 0 : -1;
      other.setAttribute("aria-selected", String(other === token));
    }
    show(token);
  });
  list.addEventListener("focusout", hidePopover);
  list.addEventListener("click", (/** @type {Event} */ event) => tokenOf(event)?.focus());
  list.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape") hidePopover();
    const items = [...list.children];
    neighbour(event, items, items.indexOf(document.activeElement))?.focus();
  });
}
