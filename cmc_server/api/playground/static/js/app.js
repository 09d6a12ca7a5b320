// The page: waits for the server, lists what it serves, and connects the parts.

import { getJson, keepKey, readKey, ServerError } from "./api.js";
import { clear, isRunning, numTurns, send, steerAgain, stop, watchChat } from "./chat.js";
import { chooseCode, showCode, startCode } from "./code.js";
import { showDeltas } from "./deltas.js";
import { byId } from "./dom.js";
import { hidePopover } from "./popover.js";
import { showModels } from "./settings.js";
import { showSweepDeltas, startSweep } from "./sweep.js";
import { startTabs } from "./tabs.js";

const WAIT_MS = 2000;
const CHECK_MS = 15000;
/** Pause before an answer is asked for again, so that holding an arrow key asks once. */
const SETTLE_MS = 350;

let isReady = false;
let isListed = false;
let settling = 0;

/** @param {"ready"|"wait"|"bad"} state @param {string} text */
function setStatus(state, text) {
  const status = byId("status");
  if (status.dataset.state === state && byId("status-text").textContent === text) return;
  status.dataset.state = state;
  byId("status-text").textContent = text;
}

/** @param {string} text empty hides it */
function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = text === "";
}

async function check() {
  try {
    await getJson("ready");
    isReady = true;
    if (!isListed) await list();
    if (isListed) setStatus("ready", "Ready");
  } catch (error) {
    isReady = false;
    const { message, status } = /** @type {ServerError} */ (error);
    setStatus(status === 503 ? "wait" : "bad", status === 503 ? `Not ready: ${message}` : message);
  }
  refresh();
  setTimeout(check, isReady ? CHECK_MS : WAIT_MS);
}

async function list() {
  try {
    const [models, deltas] = await Promise.all([getJson("v1/models"), getJson("v1/deltas")]);
    showModels(models.data);
    showDeltas(deltas.data, showCode, onStrength);
    showSweepDeltas(deltas.data.map((/** @type {any} */ delta) => delta.name));
    byId("legend").hidden = deltas.data.length === 0;
    isListed = true;
    setStatus("ready", "Ready");
    notice("");
    showCode();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    isListed = false;
    setStatus("bad", error.status === 401 ? "API key needed" : "Not listed");
    notice(error.status === 401 ? `The server asks for an API key (${error.message}). Enter it below Settings.` : error.message);
    if (error.status === 401) byId("settings").open = true;
  }
}

function useKey() {
  keepKey(byId("key").value.trim());
  void list().then(refresh);
}

function onStrength() {
  showCode();
  clearTimeout(settling);
  if (byId("live").checked && numTurns() > 0) settling = setTimeout(steerAgain, SETTLE_MS);
}

function refresh() {
  byId("send").disabled = !isReady || !isListed;
  byId("stop").disabled = !isRunning();
  byId("clear").disabled = numTurns() === 0;
  showCode();
}

/** @param {Event} [event] */
function submit(event) {
  event?.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (prompt === "" || byId("send").disabled) return;
  byId("prompt").value = "";
  byId("sweep-prompt").value = prompt;
  void send(prompt);
}

function start() {
  watchChat(refresh);
  startCode();
  startSweep();
  startTabs((view) => {
    hidePopover();
    if (view === "sweep") chooseCode("sweep");
    if (view === "chat") chooseCode("steered");
    showCode();
  });
  byId("composer").addEventListener("submit", submit);
  byId("prompt").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  for (const chip of document.querySelectorAll(".chip"))
    chip.addEventListener("click", () => {
      byId("prompt").value = chip.textContent;
      submit();
    });
  byId("key").value = readKey();
  byId("key").addEventListener("change", useKey);
  byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => event.preventDefault());
  document.querySelector(".page")?.addEventListener("input", showCode);
  void check();
}

start();
