// The chat: every turn has one message and two answers, and each answer goes on in a conversation of its own.

import { emptyAnswer, scoreAnswer, streamAnswer } from "./answer.js";
import { choices, named } from "./deltas.js";
import { announce, byId, el } from "./dom.js";
import { chatBody } from "./request.js";
import { settings } from "./settings.js";
import { showAnswer } from "./tokens.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./request.js").Message} Message */
/** @typedef {"base"|"steered"} Side */
/** @typedef {{answer: Answer, error: string|null, deltas: string, node: any, place: any, meta: any, label: any}} Half */
/** @typedef {{prompt: string, base: Half, steered: Half, summary: any, node: any}} Turn */

/** @type {Turn[]} */
let turns = [];
/** @type {Record<Side, AbortController|null>} */
const running = { base: null, steered: null };
let onState = () => {};

/** @param {() => void} listener called when an answer begins or ends */
export function watchChat(listener) {
  onState = listener;
}

export const isRunning = () => running.base !== null || running.steered !== null;
export const numTurns = () => turns.length;

/** The conversation of one side up to and with the last message. @param {Side} side @param {string} next @returns {Message[]} */
export function conversation(side, next) {
  const last = turns.at(-1);
  const past = next ? turns : turns.slice(0, -1);
  const prompt = next || (last ? last.prompt : "");
  const messages = past.flatMap((turn) => [
    { role: "user", content: turn.prompt }, { role: "assistant", content: turn[side].answer.text },
  ]);
  return [...messages, { role: "user", content: prompt }];
}

/** @param {string} prompt */
export async function send(prompt) {
  stop();
  const bodies = { base: conversation("base", prompt), steered: conversation("steered", prompt) };
  const turn = newTurn(prompt);
  turns.push(turn);
  byId("empty").hidden = true;
  byId("turns").append(turn.node);
  turn.node.scrollIntoView({ block: "nearest" });
  const sides = choices().length === 0 ? [run(turn, "base", bodies.base)] : [run(turn, "base", bodies.base), run(turn, "steered", bodies.steered)];
  await Promise.all(sides);
}

/** The last message once more, steered as the sliders are now. */
export async function steerAgain() {
  const turn = turns.at(-1);
  if (!turn || choices().length === 0) return;
  running.steered?.abort();
  await run(turn, "steered", conversation("steered", ""));
}

export function stop() {
  running.base?.abort();
  running.steered?.abort();
}

export function clear() {
  stop();
  turns = [];
  for (const node of byId("turns").querySelectorAll(".turn")) node.remove();
  byId("empty").hidden = false;
  onState();
}

/** @param {Turn} turn @param {Side} side @param {Message[]} messages */
async function run(turn, side, messages) {
  const half = turn[side];
  const chosen = side === "base" ? [] : choices();
  const now = settings();
  const controller = new AbortController();
  running[side] = controller;
  Object.assign(half, { answer: emptyAnswer(), error: null, deltas: named(chosen) });
  half.label.textContent = side === "base" ? "alone" : half.deltas || "every strength is 0";
  half.node.setAttribute("aria-busy", "true");
  half.place.style.minBlockSize = `${half.place.offsetHeight}px`; // nothing jumps while the new answer grows
  half.place.replaceChildren(el("p", { class: "waiting", text: "…" }));
  report(turn);
  onState();
  const isCurrent = () => running[side] === controller;
  try {
    await streamAnswer(chatBody(now, messages, chosen), side === "steered", controller.signal, (answer) => {
      if (!isCurrent()) return;
      half.answer = answer;
      showAnswer(half.place, answer);
      half.meta.textContent = count(answer);
    });
    if (side === "steered") await scoreAnswer(now, half.answer, controller.signal);
  } catch (error) {
    if (!controller.signal.aborted) half.error = error instanceof Error ? error.message : String(error);
  }
  if (!isCurrent()) return;
  running[side] = null;
  finish(half, controller.signal.aborted);
  report(turn);
  onState();
}

/** @param {Half} half @param {boolean} wasStopped */
function finish(half, wasStopped) {
  half.node.removeAttribute("aria-busy");
  half.place.style.minBlockSize = "";
  showAnswer(half.place, half.answer);
  const end = wasStopped ? " · stopped" : half.answer.finish === "length" ? " · cut at the limit" : "";
  half.meta.textContent = half.answer.ids.length ? count(half.answer) + end : wasStopped ? "stopped" : "";
  if (half.error) half.place.append(el("p", { class: "error", role: "alert", text: half.error }));
}

/** @param {Answer} answer */
const count = ({ ids }) => `${ids.length} ${ids.length === 1 ? "token" : "tokens"}`;

/** One line below the two answers, when both are there. @param {Turn} turn */
function report(turn) {
  const { base, steered, summary } = turn;
  const isDone = !isRunning() && !base.error && !steered.error && base.answer.finish && steered.answer.finish;
  summary.textContent = isDone ? difference(base.answer, steered.answer) : "\u00a0";
  if (isDone) announce(`Both answers are complete. ${summary.textContent}`);
}

/** @param {Answer} base @param {Answer} steered */
function difference(base, steered) {
  if (base.ids.join() === steered.ids.join()) return "The two answers are identical.";
  const same = base.ids.findIndex((id, index) => id !== steered.ids[index]);
  const share = Math.round((100 * steered.ids.length) / base.ids.length);
  const length = `The steered answer has ${share} % of the base answer's length`;
  return `${length}; their first ${same < 0 ? base.ids.length : same} tokens are the same.`;
}

/** @param {string} prompt @returns {Turn} */
function newTurn(prompt) {
  const base = newHalf("Base", "base");
  const steered = newHalf("Steered", "steered");
  const summary = el("p", { class: "summary", text: "\u00a0" });
  const both = el("div", { class: "pair" }, base.node, choices().length === 0 ? null : steered.node);
  const node = el("article", { class: "turn" }, el("p", { class: "question", text: prompt }), both, summary);
  return { prompt, base, steered, summary, node };
}

/** @param {string} title @param {Side} side @returns {Half} */
function newHalf(title, side) {
  const meta = el("span", { class: "meta" });
  const label = el("span", { class: "label" });
  const place = el("div", { class: "answer" });
  const node = el("section", { class: `card ${side}`, "aria-label": `${title} answer` },
    el("header", {}, el("h3", { text: title }), label, meta), place);
  return { answer: emptyAnswer(), error: null, deltas: "", node, place, meta, label };
}
