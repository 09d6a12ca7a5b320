// One answer: streamed or whole, then scored by the base model.

import { postJson, postStream } from "./api.js";
import { CHAT, COMPLETIONS, observed, scoreBody } from "./request.js";
import { addBase } from "./shift.js";

/** @typedef {import("./shift.js").Token} Token */
/** @typedef {import("./request.js").Settings} Settings */
/**
 * @typedef {object} Answer
 * @property {string} text
 * @property {Token[]} tokens empty unless probabilities were asked for
 * @property {number[]} promptIds
 * @property {number[]} ids
 * @property {string|null} finish `stop`, `length`, or null while it runs
 * @property {boolean} isScored whether the tokens know what the base model thinks of them
 */

/** @returns {Answer} */
export const emptyAnswer = () => ({ text: "", tokens: [], promptIds: [], ids: [], finish: null, isScored: false });

/**
 * @param {object} body a chat request
 * @param {boolean} withProbabilities
 * @param {AbortSignal} signal
 * @param {(answer: Answer) => void} onMore called whenever there is more of it
 */
export async function streamAnswer(body, withProbabilities, signal, onMore) {
  const answer = emptyAnswer();
  for await (const event of postStream(CHAT, { ...observed(body, withProbabilities), stream: true }, signal)) {
    if (event.prompt_token_ids) answer.promptIds = event.prompt_token_ids;
    for (const choice of event.choices ?? []) {
      answer.text += choice.delta?.content ?? "";
      add(answer, choice);
    }
    onMore(answer);
  }
  return answer;
}

/**
 * @param {object} body a chat request
 * @param {AbortSignal} signal
 */
export async function wholeAnswer(body, signal) {
  const response = await postJson(CHAT, observed(body, true), signal);
  const answer = emptyAnswer();
  const [choice] = response.choices;
  answer.promptIds = response.prompt_token_ids;
  answer.text = choice.message.content ?? "";
  add(answer, choice);
  return answer;
}

/** @param {Answer} answer @param {any} choice */
function add(answer, choice) {
  answer.ids.push(...(choice.token_ids ?? []));
  for (const { token, logprob, top_logprobs } of choice.logprobs?.content ?? [])
    answer.tokens.push({ text: token, steered: logprob, steeredTop: top_logprobs.map(alternative), base: null, baseTop: [] });
  answer.finish = choice.finish_reason ?? answer.finish;
}

/** @param {{token: string, logprob: number}} top */
const alternative = ({ token, logprob }) => ({ text: token, logprob });

/**
 * Ask the base model about the tokens of a steered answer.
 * @param {Settings} settings
 * @param {Answer} answer
 * @param {AbortSignal} signal
 */
export async function scoreAnswer(settings, answer, signal) {
  if (answer.ids.length === 0 || answer.ids.length !== answer.tokens.length) return;
  const response = await postJson(COMPLETIONS, scoreBody(settings, [...answer.promptIds, ...answer.ids]), signal);
  const scores = response.choices[0].prompt_logprobs.slice(answer.promptIds.length);
  addBase(answer.tokens, answer.ids, scores, settings.temperature);
  answer.isScored = true;
}
