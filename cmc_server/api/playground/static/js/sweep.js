// One prompt at many strengths of one delta.

import { scoreAnswer, wholeAnswer } from "./answer.js";
import { choices, named } from "./deltas.js";
import { announce, byId, el, plain } from "./dom.js";
import { drawSweep } from "./plot.js";
import { chatBody } from "./request.js";
import { numberOf, settings } from "./settings.js";
import { meanShift } from "./shift.js";
import { showAnswer } from "./tokens.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./plot.js").Point} Point */

/** Requests at once: the server batches them, and leaves room for others. */
const AT_ONCE = 4;

/** @type {Map<number, Answer>} */
let answers = new Map();
/** @type {number[]} */
let strengths = [];
/** @type {number|null} */
let chosen = null;
/** @type {AbortController|null} */
let running = null;

export function startSweep() {
  byId("sweep-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    void sweep();
  });
  byId("sweep-stop").addEventListener("click", () => running?.abort());
  new ResizeObserver(draw).observe(byId("plot"));
}

/** The deltas that a sweep can go over. @param {string[]} names */
export function showSweepDeltas(names) {
  byId("sweep-delta").replaceChildren(...names.map((name) => el("option", { value: name, text: name })));
  byId("sweep-run").disabled = names.length === 0;
}

/** The numbers in the field, without doubles, in order. @returns {number[]} */
export function sweepStrengths() {
  const numbers = byId("sweep-strengths").value.split(/[\s,;]+/).filter(Boolean).map(Number);
  return [...new Set(numbers.filter(Number.isFinite))].sort((one, other) => one - other);
}

/** The request of one point. @param {number} strength */
export function sweepBody(strength) {
  const swept = byId("sweep-delta").value;
  const deltas = choices().map((choice) => (choice.name === swept ? { name: swept, strength } : choice));
  const now = { ...settings(), maxTokens: numberOf(byId("sweep-max"), 96) };
  return chatBody(now, [{ role: "user", content: byId("sweep-prompt").value }], deltas);
}

async function sweep() {
  running?.abort();
  const controller = new AbortController();
  running = controller;
  [answers, strengths, chosen] = [new Map(), sweepStrengths(), null];
  byId("sweep-stop").disabled = false;
  byId("sweep-answer").replaceChildren(el("p", { class: "waiting", text: "…" }));
  byId("sweep-meta").textContent = "";
  draw();
  const waiting = strengths.map((strength) => ({ strength, body: sweepBody(strength) }));
  const now = settings();
  const work = async () => {
    for (let next = waiting.shift(); next && !controller.signal.aborted; next = waiting.shift()) {
      const answer = await wholeAnswer(next.body, controller.signal);
      await scoreAnswer(now, answer, controller.signal);
      if (running !== controller) return;
      answers.set(next.strength, answer);
      draw();
    }
  };
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    if (running === controller && chosen === null) choose(nearest());
    if (running === controller) announce(`The sweep is complete: ${answers.size} strengths.`);
  } catch (error) {
    if (!controller.signal.aborted) {
      controller.abort();
      const message = error instanceof Error ? error.message : String(error);
      byId("sweep-answer").replaceChildren(el("p", { class: "error", role: "alert", text: message }));
    }
  }
  if (running === controller) {
    running = null;
    byId("sweep-stop").disabled = true;
  }
}

/** The point nearest to what the slider says. */
function nearest() {
  const own = choices().find(({ name }) => name === byId("sweep-delta").value)?.strength ?? 1;
  return strengths.reduce((best, strength) => (Math.abs(strength - own) < Math.abs(best - own) ? strength : best), strengths[0]);
}

/** @param {number} strength */
function choose(strength) {
  const isNew = strength !== chosen;
  chosen = strength;
  draw();
  const answer = answers.get(strength);
  if (!answer || !isNew) return;
  const deltas = /** @type {any} */ (sweepBody(strength)).cmc.deltas;
  byId("sweep-answer-title").textContent = `Answer at strength ${plain(strength)}`;
  byId("sweep-meta").textContent = `${named(deltas) || "base"} · ${answer.ids.length} tokens${answer.finish === "length" ? " · cut at the limit" : ""}`;
  showAnswer(byId("sweep-answer"), answer);
}

function draw() {
  /** @type {Map<number, Point>} */
  const points = new Map();
  for (const [strength, answer] of answers)
    points.set(strength, { strength, tokens: answer.ids.length, shift: meanShift(answer.tokens), isCut: answer.finish === "length" });
  drawSweep(byId("plot"), strengths.length ? strengths : sweepStrengths(), points, chosen, choose);
}
