// The page: which of its views the address names, and keys.

import { loadKey, saveKey, takeKey } from "./client.js";
import { showForm } from "./form_view.js";
import { showComparison, showRun } from "./run_view.js";
import { showRuns } from "./runs_view.js";

const view = document.getElementById("view"), problem = document.getElementById("problem");
const keyDialog = document.getElementById("key-dialog");
let closing = new AbortController();

function showProblem(error) {
  if (error?.name === "AbortError") return;
  problem.hidden = !error;
  problem.textContent = error?.message ?? "";
  if (error?.status === 401 && !keyDialog.open) keyDialog.showModal();
}

const VIEWS = { "": showRuns, run: showRun, compare: showComparison, new: showForm };

function route() {
  closing.abort();
  closing = new AbortController();
  const [name, ...parts] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  showProblem(null);
  view.replaceChildren();
  document.title = [...parts, "Board"].join(", ");
  const { signal } = closing;
  (VIEWS[name] ?? showRuns)(view, parts, { signal, showProblem: (error) => { if (!signal.aborted) showProblem(error); } });
}

keyDialog.addEventListener("close", () => {
  saveKey(document.getElementById("key").value);
  route();
});
window.addEventListener("hashchange", () => { route(); view.focus(); });
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, select, textarea") || keyDialog.open;
  if (event.key === "Escape" && !keyDialog.open) {
    if (isTyping) event.target.blur();
    else if (location.hash.length > 2) location.hash = "#/";
  }
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (!target) return;
  event.preventDefault();
  target.matches("input") ? target.focus() : target.click();
});

takeKey();
if (loadKey()) route();
else keyDialog.showModal();
