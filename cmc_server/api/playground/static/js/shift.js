// How much a delta changed the probability of a token. Pure functions.

/** @typedef {{text: string, logprob: number}} Alternative */
/**
 * @typedef {object} Token
 * @property {string} text empty where the token is only a part of a character
 * @property {number} steered log probability with the deltas
 * @property {Alternative[]} steeredTop
 * @property {number|null} base log probability without them, once it is known
 * @property {Alternative[]} baseTop
 */
/** @typedef {Record<string, {logprob: number, decoded_token: string|null}>} Score */
/** @typedef {{text: string, tokens: Token[], shift: number|null, level: number}} Unit */

/** Lower bounds of the levels, as factors of probability. */
export const FACTORS = [1.25, 2, 8];

/**
 * Give each token the base model's view of it.
 *
 * Steered log probabilities are those after the temperature, the base model's come without one. At 0 (greedy; nothing
 * is divided) and 1 they are the same kind. In between the base model's are set to the temperature too: its most
 * likely tokens exactly, the small rest by the middle of its bounds.
 * @param {Token[]} tokens
 * @param {number[]} ids
 * @param {Score[]} scores
 * @param {number} temperature
 */
export function addBase(tokens, ids, scores, temperature) {
  tokens.forEach((token, index) => {
    const score = scores[index];
    const change = temperature === 0 || temperature === 1 ? 0 : logNormaliser(score, temperature);
    const set = (/** @type {number} */ logprob) => (temperature === 0 ? logprob : logprob / temperature - change);
    token.base = set(score[ids[index]].logprob);
    token.baseTop = Object.values(score)
      .sort((one, other) => other.logprob - one.logprob)
      .slice(0, 5)
      .map(({ decoded_token, logprob }) => ({ text: decoded_token ?? "", logprob: set(logprob) }));
  });
}

/**
 * Log of the sum over the vocabulary of p^(1/T), for 0 < T < 1, from the most likely tokens. Each of the others has at
 * most the probability of the last one listed, so their sum lies between 0 and rest * last^(1/T - 1).
 * @param {Score} score
 * @param {number} temperature
 */
export function logNormaliser(score, temperature) {
  const logprobs = Object.values(score).map(({ logprob }) => logprob);
  const sum = logprobs.reduce((total, logprob) => total + Math.exp(logprob / temperature), 0);
  const rest = Math.max(0, 1 - logprobs.reduce((total, logprob) => total + Math.exp(logprob), 0));
  // The answer's own token is listed too, however unlikely; the bound is that of the most likely twenty.
  const last = logprobs.sort((one, other) => other - one)[Math.min(logprobs.length, 20) - 1];
  return Math.log(sum + (rest * Math.exp(last * (1 / temperature - 1))) / 2);
}

/**
 * What is shown as one piece: a token, or those that make up one character, whose joint probability counts.
 * @param {Token[]} tokens
 * @returns {Unit[]}
 */
export function units(tokens) {
  /** @type {Unit[]} */
  const result = [];
  /** @type {Token[]} */
  let parts = [];
  tokens.forEach((token, index) => {
    parts.push(token);
    if (token.text === "" && index < tokens.length - 1) return;
    const shift = parts.every((part) => part.base !== null) ? sum(parts, (part) => part.steered - Number(part.base)) : null;
    result.push({ text: token.text, tokens: parts, shift, level: level(shift) });
    parts = [];
  });
  return result;
}

/** -3 to 3: how strongly a shift is marked. @param {number|null} shift */
export function level(shift) {
  if (shift === null) return 0;
  const size = FACTORS.filter((factor) => Math.abs(shift) >= Math.log(factor)).length;
  return shift < 0 ? -size : size;
}

/** Mean change of the log probability over an answer's tokens. @param {Token[]} tokens @returns {number|null} */
export function meanShift(tokens) {
  if (tokens.length === 0 || tokens.some((token) => token.base === null)) return null;
  return sum(tokens, (token) => token.steered - Number(token.base)) / tokens.length;
}

/** "3.2 times likelier", for people. @param {number} shift */
export function inWords(shift) {
  const factor = Math.exp(Math.abs(shift));
  if (factor < 1.05) return "about as likely as before";
  const text = factor < 10 ? factor.toFixed(1) : factor < 10000 ? Math.round(factor).toLocaleString("en") : "over 10,000";
  return shift > 0 ? `${text} times likelier` : `${text} times less likely`;
}

/** A probability in percent. @param {number} logprob */
export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return "100 %";
  return value < 0.1 ? "< 0.1 %" : `${value.toFixed(value < 10 ? 1 : 0)} %`;
}

/** @param {Token[]} tokens @param {(token: Token) => number} value */
const sum = (tokens, value) => tokens.reduce((total, token) => total + value(token), 0);
