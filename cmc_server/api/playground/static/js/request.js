// Request bodies. What a body holds is what the code panel shows, but for what only the page itself looks at.

/** @typedef {{model: string, system: string, temperature: number, seed: number, maxTokens: number}} Settings */
/** @typedef {{name: string, strength: number}} Choice */
/** @typedef {{role: string, content: string}} Message */

export const CHAT = "v1/chat/completions";
export const COMPLETIONS = "v1/completions";
/** Alternatives shown for a token. */
export const ALTERNATIVES = 5;
/** As many as vLLM gives by default: what is needed to set the base model to a temperature. */
export const MOST_ALTERNATIVES = 20;

/**
 * A chat request. Whatever else a model's own defaults would do to its probabilities is switched off, so that the
 * delta is the only difference between two answers.
 * @param {Settings} settings
 * @param {Message[]} messages
 * @param {Choice[]} deltas
 */
export function chatBody(settings, messages, deltas) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const { temperature, seed } = settings;
  const sampling = temperature > 0 ? { seed, top_p: 1, top_k: 0, min_p: 0 } : {};
  return {
    model: settings.model,
    messages: [...system, ...messages],
    max_tokens: settings.maxTokens,
    temperature,
    ...sampling,
    repetition_penalty: 1,
    cmc: { deltas: deltas.filter((delta) => delta.strength !== 0) },
  };
}

/**
 * The same request with what the page wants to see of it.
 * @param {object} body
 * @param {boolean} withProbabilities
 */
export function observed(body, withProbabilities) {
  const probabilities = withProbabilities ? { logprobs: true, top_logprobs: ALTERNATIVES } : {};
  return { ...body, ...probabilities, return_token_ids: true };
}

/**
 * How likely the base model finds an answer, token by token: a completion request that reads prompt and answer as
 * the very tokens that they were, and is asked about its prompt.
 * @param {Settings} settings
 * @param {number[]} tokens prompt and answer
 */
export function scoreBody(settings, tokens) {
  const isExact = settings.temperature === 0 || settings.temperature === 1;
  return {
    model: settings.model,
    prompt: tokens,
    max_tokens: 1,
    temperature: 0,
    prompt_logprobs: isExact ? ALTERNATIVES : MOST_ALTERNATIVES,
    cmc: { deltas: [] },
  };
}
