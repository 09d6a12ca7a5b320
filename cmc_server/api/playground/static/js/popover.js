// What the base model and the steered one would have said in a token's place.

import { byId, el } from "./dom.js";
import { inWords, percent } from "./shift.js";

/** @typedef {import("./shift.js").Alternative} Alternative */
/** @typedef {import("./shift.js").Unit} Unit */

const GAP = 8;

/**
 * @param {HTMLElement} anchor
 * @param {Unit} unit
 * @param {boolean} isEnd whether it is the token that ends the answer
 */
export function showPopover(anchor, unit, isEnd) {
  const popover = byId("popover");
  const [token] = unit.tokens;
  const shift = Number(unit.shift);
  const sign = shift < 0 ? "−" : "+";
  popover.replaceChildren(
    el("p", { class: "popover-title" }, el("code", { text: isEnd ? "end of answer" : visible(unit.text) }), el("strong", { text: inWords(shift) })),
    el("div", { class: "popover-lists" },
      alternatives("Base", token.baseTop, token.text, "base"),
      alternatives("Steered", token.steeredTop, token.text, "steered")),
    el("p", { class: "popover-note", text: `Here: ${percent(Number(token.base))} → ${percent(token.steered)} · log probability ${sign}${Math.abs(shift).toFixed(2)}` }),
  );
  popover.hidden = false;
  document.querySelector("[aria-describedby=popover]")?.removeAttribute("aria-describedby");
  anchor.setAttribute("aria-describedby", "popover");
  place(popover, anchor);
}

export function hidePopover() {
  byId("popover").hidden = true;
}

/** @param {string} title @param {Alternative[]} list @param {string} chosen @param {string} kind */
function alternatives(title, list, chosen, kind) {
  const rows = list.map(({ text, logprob }) => {
    const bar = el("i", { "aria-hidden": "true" });
    bar.style.inlineSize = `calc(${Math.exp(logprob)} * (100% - 4em))`;
    return el("li", { class: text === chosen ? "chosen" : null },
      bar, el("code", { text: visible(text) }), el("span", { text: percent(logprob) }));
  });
  return el("section", { class: kind }, el("h4", { text: title }), el("ol", {}, ...rows));
}

/** Spaces and line ends that can be seen. @param {string} text */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "part of a character";

/** Below the token if there is room, else above; never past the sides. @param {HTMLElement} popover @param {HTMLElement} anchor */
function place(popover, anchor) {
  const box = anchor.getClientRects()[0];
  const { offsetWidth: width, offsetHeight: height } = popover;
  const fitsBelow = box.bottom + GAP + height <= innerHeight || box.top < height + GAP;
  const top = fitsBelow ? box.bottom + GAP : box.top - height - GAP;
  const left = Math.min(Math.max(GAP, box.left - 24), document.body.clientWidth - width - GAP);
  popover.style.insetBlockStart = `${top + scrollY}px`;
  popover.style.insetInlineStart = `${left}px`;
}

document.addEventListener("keydown", (event) => event.key === "Escape" && hidePopover());
