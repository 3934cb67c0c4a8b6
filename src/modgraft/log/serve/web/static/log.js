// Comfort only: every page reads and works without this file.
"use strict";
const typing = (at) => at.closest("input, select, textarea, [contenteditable]");
let at = -1;

document.addEventListener("keydown", (key) => {
  if (key.ctrlKey || key.metaKey || key.altKey) return;
  if (key.key === "Escape" && typing(key.target)) return key.target.blur();
  if (typing(key.target)) return;
  if (key.key === "/") {
    key.preventDefault();
    document.querySelector("#q").focus();
  }
  if (key.key !== "j" && key.key !== "k") return;
  const stops = [...document.querySelectorAll("[data-stop]")].filter((stop) => !stop.closest("[hidden]"));
  if (!stops.length) return;
  at = Math.min(Math.max(at + (key.key === "j" ? 1 : -1), 0), stops.length - 1);
  const link = stops[at].querySelector("a");
  stops[at].scrollIntoView({ block: "center" });
  if (link) link.focus({ preventScroll: true });
});

for (const box of document.querySelectorAll("[data-filters]")) {
  box.hidden = false;
  box.querySelector("input").addEventListener("input", (change) => {
    const words = change.target.value.toLowerCase().split(/\s+/);
    for (const row of document.querySelectorAll("[data-row]")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
