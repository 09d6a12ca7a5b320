// Small helpers around the DOM.

/**
 * An element of the page that is known to be there.
 * @param {string} id
 * @returns {any}
 */
export const byId = (id) => document.getElementById(id);

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, any>} [props] attributes; functions become listeners, `class` and `text` are short forms
 * @param {...(Node|string|null|undefined)} children
 * @returns {any}
 */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. @param {string} tag @param {Record<string, any>} [props] @param {...(Node|string)} children @returns {any} */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

/** @param {Element} node @param {Record<string, any>} props @param {Array<Node|string|null|undefined>} children */
function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}

/** Tell people who listen instead of looking. @param {string} text */
export function announce(text) {
  byId("live-region").textContent = text;
}

/** A number as people write it: at most two decimals, a real minus sign. @param {number} value */
export function plain(value) {
  return String(Math.round(value * 100) / 100).replace("-", "−");
}

/**
 * Arrow keys, Home and End within a row of elements of which one can be reached by Tab.
 * @param {KeyboardEvent} event
 * @param {any[]} items
 * @param {number} at
 * @returns {any} the element to go to, if the key moves at all
 */
export function neighbour(event, items, at) {
  const last = items.length - 1;
  /** @type {Record<string, number>} */
  const targets = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
  if (!(event.key in targets) || event.altKey || event.ctrlKey || event.metaKey) return undefined;
  event.preventDefault();
  return items[Math.min(last, Math.max(0, targets[event.key]))];
}
