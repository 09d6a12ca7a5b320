// A request as a curl command and as a Python program. Pure functions.

/** Name of the environment variable that holds the API key. */
export const KEY_VARIABLE = "CMC_API_KEY";
/** Parameters that OpenAI's Python client knows by name; others travel in `extra_body`. */
const KNOWN = ["model", "messages", "max_tokens", "temperature", "top_p", "seed"];

/** @param {string} text one argument for a shell */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/**
 * @param {string} origin address of the server, without a trailing slash
 * @param {boolean} hasKey
 * @param {object} body
 */
export function curl(origin, hasKey, body) {
  const key = hasKey ? ` -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";
  return `curl ${origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(body, null, 2))}`;
}

/** @param {any[]} bodies */
function joined(bodies) {
  return bodies.map((body) => JSON.stringify(body)).join("\n");
}

/**
 * The same for several bodies, one line each.
 * @param {string} origin
 * @param {boolean} hasKey
 * @param {object[]} bodies
 */
export function curls(origin, hasKey, bodies) {
  const key = hasKey ? ` -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";
  const call = `curl -s ${origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d "$body"`;
  return `while read -r body; do\n  ${call}; echo\ndone <<'BODIES'\n${joined(bodies)}\nBODIES`;
}

/**
 * @param {string} origin
 * @param {boolean} hasKey
 * @param {any} body
 */
export function python(origin, hasKey, body) {
  return `${opening(origin, hasKey)}\nanswer = client.chat.completions.create(\n${call(body, "    ")}\n)\nprint(answer.choices[0].message.content)`;
}

/**
 * @param {string} origin
 * @param {boolean} hasKey
 * @param {any} body that of any point of the sweep
 * @param {string} delta
 * @param {number[]} strengths
 */
export function pythonSweep(origin, hasKey, body, delta, strengths) {
  const others = body.cmc.deltas.filter((/** @type {any} */ choice) => choice.name !== delta);
  const swept = `{"name": ${literal(delta)}, "strength": strength}`;
  const deltas = [...others.map((/** @type {any} */ choice) => literal(choice)), swept].join(", ");
  const text = call({ ...body, cmc: { deltas: [] } }, "        ").replace('"cmc": {"deltas": []}', `"cmc": {"deltas": [${deltas}]}`);
  return `${opening(origin, hasKey)}\nfor strength in ${literal(strengths)}:\n    answer = client.chat.completions.create(\n${text}\n    )\n` +
    `    print(strength, answer.usage.completion_tokens, answer.choices[0].message.content)`;
}

/** @param {string} origin @param {boolean} hasKey */
function opening(origin, hasKey) {
  const key = hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"';
  const client = `client = OpenAI(base_url="${origin}/v1", api_key=${key})`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI\n\n${client}`;
}

/** @param {any} body @param {string} indent */
function call(body, indent) {
  const known = KNOWN.filter((name) => name in body).map((name) => `${indent}${name}=${literal(body[name])},`);
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !KNOWN.includes(name)));
  return [...known, `${indent}extra_body=${literal(extra)},`].join("\n");
}

/** A JSON value as Python writes it. @param {any} value @returns {string} */
export function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, inner]) => `${literal(name)}: ${literal(inner)}`).join(", ")}}`;
  return JSON.stringify(value);
}
