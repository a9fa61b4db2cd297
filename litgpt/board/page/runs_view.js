// The list of all runs: what each is, its last figures, and its curve.

import { request } from "./client.js";
import { build, formatAge, poll } from "./elements.js";

const MAX_COMPARED = 8, WIDTH = 120, HEIGHT = 28;
const chosen = new Set(); // names of the runs to compare, also while another view is open
const count = (value) => value?.toLocaleString("en") ?? "";

function drawCurve(points) {
  const shown = points.filter(([, loss]) => Number.isFinite(loss));
  const rangeX = charts.findRange(shown.map(([step]) => step), false), rangeY = charts.findRange(shown.map(([, loss]) => loss), false);
  if (!rangeX || !rangeY) return "";
  const x = charts.buildScale(rangeX, 1, WIDTH - 1, false), y = charts.buildScale(rangeY, HEIGHT - 2, 2, false);
  return `<svg width="${WIDTH}" height="${HEIGHT}" aria-hidden="true"><path class="first" d="${
    charts.drawPath(shown.map(([step]) => x(step)), shown.map(([, loss]) => y(loss)))}"/></svg>`;
}

function buildRow(name, onChoose) {
  const box = build("input", { type: "checkbox", "aria-label": `Compare ${name}`, checked: chosen.has(name), onchange: () => onChoose(name, box.checked) });
  const cells = Object.fromEntries(["about", "state", "curve", "step", "loss", "validation", "updated"].map((key) => [key, build("td", { class: key })]));
  const link = build("a", { href: `#/run/${encodeURIComponent(name)}` }, name), about = build("div", { class: "soft" });
  cells.about.append(link, about);
  return { row: build("tr", {}, build("td", { class: "choose" }, box), ...Object.values(cells)), cells, about, box };
}

function fillRow({ cells, about }, run) {
  const { last } = run, texts = {
    state: run.state ?? "",
    step: run.steps ? `${count(last.step ?? 0)} of ${count(run.steps)}` : count(last.step),
    loss: Number.isFinite(last.loss) ? last.loss.toFixed(4) : "",
    validation: Number.isFinite(last.val_loss) ? last.val_loss.toFixed(4) : "",
    updated: run.updated ? formatAge(Date.now() / 1000 - run.updated) : "",
  };
  about.textContent = run.problem ?? [run.task, run.model].filter(Boolean).join(" · ");
  about.classList.toggle("wrong", Boolean(run.problem));
  cells.state.title = run.end ?? "";
  cells.state.dataset.state = texts.state;
  for (const [key, text] of Object.entries(texts)) if (cells[key].textContent !== text) cells[key].textContent = text;
  const curve = JSON.stringify(run.curve);
  if (cells.curve.dataset.shown === curve) return;
  cells.curve.dataset.shown = curve;
  cells.curve.innerHTML = drawCurve(run.curve); // numbers only
}

export function showRuns(view, _parts, { signal, showProblem }) {
  const filter = build("input", { type: "search", placeholder: "Filter", "aria-label": "Filter runs by name", "data-key": "/", oninput: () => applyFilter() });
  const compare = build("button", { type: "button", "data-key": "c", onclick: () => {
    location.hash = `#/compare/${[...chosen].map(encodeURIComponent).join("/")}`;
  } });
  const body = build("tbody"), empty = build("p", { class: "lead", hidden: true });
  const header = ["", "Run", "State", "Loss curve", "Step", "Loss", "Validation", "Changed"];
  const table = build("table", { class: "runs" }, build("thead", {}, build("tr", {}, ...header.map((text) => build("th", { scope: "col" }, text)))), body);
  const keys = build("p", { class: "soft keys" }, "Keys: / filters, c compares the chosen runs, n opens the form of a new one, Esc returns to the list.");
  view.append(build("div", { class: "bar" }, filter, compare), build("section", {}, table, empty), keys);
  const rows = new Map();

  function showChosen() {
    compare.disabled = chosen.size < 2 || chosen.size > MAX_COMPARED;
    compare.textContent = chosen.size > MAX_COMPARED ? `At most ${MAX_COMPARED} can be compared` : `Compare ${chosen.size || ""}`.trim();
  }
  function onChoose(name, isChosen) {
    isChosen ? chosen.add(name) : chosen.delete(name);
    showChosen();
  }
  function applyFilter() {
    for (const [name, { row }] of rows) row.hidden = !name.toLowerCase().includes(filter.value.toLowerCase());
  }
  showChosen();

  poll(async () => {
    try {
      const { folder, runs } = await request("api/runs", { signal });
      document.getElementById("folder").textContent = folder;
      const names = new Set(runs.map(({ name }) => name));
      for (const [name, { row }] of rows) if (!names.has(name)) { row.remove(); rows.delete(name); }
      for (const name of chosen) if (!names.has(name)) chosen.delete(name);
      runs.forEach((run, place) => {
        if (!rows.has(run.name)) {
          rows.set(run.name, buildRow(run.name, onChoose));
          body.insertBefore(rows.get(run.name).row, body.children[place] ?? null);
        }
        fillRow(rows.get(run.name), run);
      });
      empty.hidden = runs.length > 0;
      empty.textContent = `There is no run in ${folder} yet.`;
      table.hidden = runs.length === 0;
      applyFilter();
      showChosen();
      showProblem(null);
    } catch (error) {
      showProblem(error);
    }
  }, 2, signal);
}
