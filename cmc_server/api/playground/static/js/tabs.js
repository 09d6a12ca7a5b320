// The three views.

import { neighbour } from "./dom.js";

/** @param {(name: string) => void} onShow called with the id of the view that is shown */
export function startTabs(onShow) {
  const tabs = /** @type {any[]} */ ([...document.querySelectorAll("[role=tab]")]);
  const show = (/** @type {any} */ chosen) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      const view = document.getElementById(tab.getAttribute("aria-controls"));
      if (view) view.hidden = !isChosen;
    }
    onShow(chosen.getAttribute("aria-controls"));
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const to = neighbour(event, tabs, index);
      if (!to) return;
      to.focus();
      show(to);
    });
  });
}
