// The server, as the page talks to it: relative addresses, so that a path prefix of a proxy is kept.

const KEY = "cmc-api-key";

/** What the server answered instead of what was asked. */
export class ServerError extends Error {
  /** @param {string} message @param {number} status */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** @returns {string} */
export const readKey = () => sessionStorage.getItem(KEY) ?? "";

/** @param {string} key */
export function keepKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/**
 * @param {string} path without a leading slash
 * @param {any} [body] sent as JSON by POST
 * @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
async function ask(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = readKey() ? { Authorization: `Bearer ${readKey()}` } : {};
  /** @type {RequestInit} */
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (!answer.ok) throw new ServerError(reason(await answer.text(), answer.status), answer.status);
  return answer;
}

/** The message of an error body, whatever its shape. @param {string} text @param {number} status */
function reason(text, status) {
  try {
    const body = JSON.parse(text);
    const error = body.error ?? body.reason ?? body.detail;
    const message = error?.message ?? error;
    return typeof message === "string" ? message : text;
  } catch {
    return text || `The server answered ${status}.`;
  }
}

/** @param {string} path @returns {Promise<any>} */
export const getJson = async (path) => (await ask(path)).json();

/** @param {string} path @param {any} body @param {AbortSignal} [signal] @returns {Promise<any>} */
export const postJson = async (path, body, signal) => (await ask(path, body, signal)).json();

/**
 * The JSON documents of a streamed answer.
 * @param {string} path
 * @param {any} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* postStream(path, body, signal) {
  const answer = await ask(path, body, signal);
  if (answer.body === null) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : (lines.pop() ?? "");
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "" || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message ?? data, event.error.code ?? 500);
      yield event;
    }
    if (done) return;
  }
}
