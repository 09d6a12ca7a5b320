// The code panel: what is on the screen, as curl and as Python.

import { readKey } from "./api.js";
import { conversation } from "./chat.js";
import { choices } from "./deltas.js";
import { announce, byId } from "./dom.js";
import { chatBody } from "./request.js";
import { settings } from "./settings.js";
import { curl, curls, python, pythonSweep } from "./snippets.js";
import { sweepBody, sweepStrengths } from "./sweep.js";

export function startCode() {
  for (const radio of document.querySelectorAll("input[name=what]")) radio.addEventListener("change", showCode);
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(/** @type {any} */ (button)));
}

/** Which request to show. @param {string} what */
export function chooseCode(what) {
  const radio = document.querySelector(`input[name=what][value=${what}]`);
  /** @type {any} */ (radio).checked = true;
}

export function showCode() {
  const what = /** @type {any} */ (document.querySelector("input[name=what]:checked")).value;
  const origin = new URL(".", document.baseURI).href.replace(/\/$/, "");
  const hasKey = readKey() !== "";
  if (what === "sweep") {
    const strengths = sweepStrengths();
    byId("curl").textContent = curls(origin, hasKey, strengths.map(sweepBody));
    byId("python").textContent = pythonSweep(origin, hasKey, sweepBody(1), byId("sweep-delta").value, strengths);
    return;
  }
  const messages = conversation(what === "base" ? "base" : "steered", "");
  if (messages.at(-1)?.content === "") messages.splice(-1, 1, { role: "user", content: byId("prompt").value || "What is a black hole?" });
  const body = chatBody(settings(), messages, what === "base" ? [] : choices());
  byId("curl").textContent = curl(origin, hasKey, body);
  byId("python").textContent = python(origin, hasKey, body);
}

/** @param {HTMLButtonElement} button */
async function copy(button) {
  const source = byId(/** @type {string} */ (button.dataset.copy));
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    // Without https there is no clipboard; the selected text can still be copied by hand.
    getSelection()?.selectAllChildren(source);
    button.textContent = "Selected";
  }
  announce(`${button.textContent}.`);
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
