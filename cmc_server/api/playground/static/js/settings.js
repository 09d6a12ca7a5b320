// What the controls at the side say.

import { byId, el } from "./dom.js";

/** @typedef {import("./request.js").Settings} Settings */

/** @param {any} input @param {number} fallback */
function number(input, fallback) {
  return input.value !== "" && input.validity.valid ? Number(input.value) : fallback;
}

/** @returns {Settings} */
export function settings() {
  return {
    model: byId("model").value,
    system: byId("system").value,
    temperature: number(byId("temperature"), 0),
    seed: number(byId("seed"), 1),
    maxTokens: number(byId("max-tokens"), 160),
  };
}

/** @param {any} input @param {number} fallback @returns {number} */
export const numberOf = number;

/** The models to choose from: what the server serves, without the deltas. @param {any[]} models */
export function showModels(models) {
  const select = byId("model");
  const before = select.value;
  const names = models.filter((model) => model.owned_by !== "cmc-server").map((model) => model.id);
  select.replaceChildren(...names.map((name) => el("option", { value: name, text: name })));
  if (names.includes(before)) select.value = before;
}
