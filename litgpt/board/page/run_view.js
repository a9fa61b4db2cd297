// The page of a run, and that of several runs: their curves, figures, texts and settings, as they are written.

import { buildQuery, request } from "./client.js";
import { build, buildTable, formatBytes, poll, section, update } from "./elements.js";

let controlsText = null;

// The controls of the charts, as they are in a report.
async function buildControls() {
  controlsText ??= await (await fetch("page/chart_controls.html")).text();
  const template = document.createElement("template");
  template.innerHTML = controlsText;
  return template.content.firstElementChild;
}

function buildFigure(chart, number, getName) {
  const keys = chart.curves.map((curve) => build("span", { class: `key ${curve.color}` }, getName(curve)));
  return build("section", { "data-chart": `${number}` }, build("h2", {}, chart.title),
    ...(chart.curves.length > 1 || chart.curves[0].run !== undefined ? keys : []), build("div", { class: "image" }), build("div", { class: "readout" }));
}

// A function that draws the charts of a page below the controls, or only their new numbers.
async function openCharts(place, getName, signal) {
  const controls = await buildControls(), grid = build("div", { class: "charts" });
  place.append(controls, grid);
  let names = null, draw = null, inner = null;
  return (page) => {
    const now = JSON.stringify(page.charts);
    if (now === names) return draw(page);
    names = now;
    inner?.abort();
    inner = new AbortController();
    signal.addEventListener("abort", () => inner.abort());
    grid.replaceChildren(...page.charts.map((chart, number) => buildFigure(chart, number, getName)));
    if (page.charts.length) draw = charts.connect(grid, controls, page, inner.signal);
    else { draw = () => {}; controls.hidden = true; }
  };
}

const showTiles = (tiles) => tiles.map(([name, value]) => build("div", {}, build("dt", {}, name), build("dd", {}, value)));

function showSample({ step, prompt, text }) {
  const isLong = prompt.length > 100;
  const written = isLong ? [build("p", {}, text.trim()), build("details", {}, build("summary", {}, "Prompt"), build("p", {}, prompt.trim()))]
    : [build("p", {}, build("span", { class: "prompt" }, prompt), text)];
  return build("div", { class: "sample" }, build("div", { class: "step" }, `Step ${step}`), ...written);
}

function showSamples(samples) {
  if (!samples.length) return null;
  const earlier = samples.slice(0, -1).reverse();
  return section("Generated text", showSample(samples.at(-1)), earlier.length
    ? build("details", {}, build("summary", {}, `${earlier.length} earlier`), ...earlier.map(showSample)) : null);
}

const showFacts = (facts) => facts.length ? section("Run", build("dl", { class: "facts" },
  ...facts.flatMap(([name, value]) => [build("dt", {}, name), build("dd", {}, value)]))) : null;
function showExpert(layer, expert, [load, opacity]) {
  const bar = build("i");
  bar.style.opacity = opacity;
  return build("td", { title: `layer ${layer}, expert ${expert}: ${load}` }, bar);
}
const showLoad = (layers) => layers.length ? section("Experts",
  build("p", { class: "lead" }, "The load of each expert in the last saved step, relative to the mean of its layer; one row per layer."),
  build("table", { class: "load" }, ...layers.map(([layer, experts]) => build("tr", {}, build("th", {}, `${layer}`),
    ...experts.map((expert, number) => showExpert(layer, number, expert)))))) : null;
const showProfile = (text) => text ? section("Profile", build("div", { class: "wide-table" }, build("pre", { class: "wide" }, text))) : null;
const showData = (sets) => sets.length ? section("Data", build("dl", { class: "facts" },
  ...sets.flatMap(([name, lines]) => [build("dt", {}, name), build("dd", {}, ...lines.map((line) => build("div", {}, line)))]))) : null;
const showEvents = (events) => events.length ? section("Events", buildTable(["Step", "Event"], events.map(([step, text]) => [`${step}`, text]))) : null;
const showCheckpoints = (checkpoints) => checkpoints.length ? section("Checkpoints and models",
  buildTable(["Folder", "Size", "Files"], checkpoints.map(({ name, bytes, files }) => [name, formatBytes(bytes), `${files}`]))) : null;
const showRecipe = ([changes, recipe]) => recipe ? section("Recipe",
  ...(changes ? [build("p", { class: "lead" }, "What differs from the defaults:"), build("pre", {}, changes)] : []),
  build("details", {}, build("summary", {}, "Every setting"), build("pre", {}, recipe))) : null;
const showOutput = (output) => output ? section("Output", build("pre", { class: "output", tabindex: "0" }, output)) : null;
const showProblems = (problems) => problems.length ? build("ul", { class: "soft problems" }, ...problems.map((text) => build("li", {}, text))) : null;

function buildPlaces(view, names) {
  return Object.fromEntries(names.map((name) => {
    const place = build("div", { class: `place place-${name}` });
    view.append(place);
    return [name, place];
  }));
}

export async function showRun(view, [name], { signal, showProblem }) {
  view.append(build("h1", {}, name));
  const lead = build("p", { class: "lead" }), tiles = build("dl", { class: "tiles" });
  view.append(lead);
  const places = buildPlaces(view, ["actions", "figures", "problems", "samples", "curves", "checkpoints", "events", "output", "load", "facts", "data", "recipe", "profile"]);
  places.figures.append(tiles);
  let stamp = "", draw = null;
  async function act(path, text) {
    try {
      await request(path, { body: { run: name }, signal });
      showProblem(null);
      places.actions.querySelector("[role=status]").textContent = text;
      stamp = "";
    } catch (error) {
      showProblem(error);
    }
  }
  const stop = () => build("button", { type: "button", class: "stop", onclick: () => act("api/stop", "Asked to stop: it finishes its step and saves a checkpoint.") }, "Stop");
  const resume = () => build("button", { type: "button", class: "resume", onclick: () => act("api/resume", "Resumed: it reads its checkpoint first.") }, "Resume");
  const showActions = (run) => [build("div", { class: "bar" }, build("span", { class: "state", "data-state": run.state }, run.state),
    run.is_running ? stop() : run.state === "running" ? build("span", { class: "soft" }, "Its process is not known here; stop it where it was started.") : resume(),
    run.command ? build("a", { class: "button", href: `#/new/${encodeURIComponent(run.command)}/${encodeURIComponent(name)}` }, "Copy to a new run") : null,
    build("span", { class: "soft", role: "status" }))];
  poll(async () => {
    try {
      const run = await request(`api/run?${buildQuery({ run: name, stamp })}`, { signal });
      showProblem(null);
      if (!run) return;
      stamp = run.stamp;
      lead.textContent = [run.title, run.lead].filter(Boolean).join(" · ");
      update(places.actions, { is_running: run.is_running, state: run.state, command: run.command }, showActions);
      update(tiles, run.tiles, showTiles);
      update(places.problems, run.problems, showProblems);
      update(places.samples, run.samples, showSamples);
      update(places.checkpoints, run.checkpoints, showCheckpoints);
      update(places.events, run.events, showEvents);
      update(places.output, run.output, showOutput);
      update(places.facts, run.facts, showFacts);
      update(places.load, run.load, showLoad);
      update(places.data, run.data, showData);
      update(places.profile, run.profile, showProfile);
      update(places.recipe, [run.changes, run.recipe], showRecipe);
      draw ??= await openCharts(places.curves, (curve) => curve.label, signal);
      draw(run.page);
    } catch (error) {
      showProblem(error);
    }
  }, 1, signal);
}

export async function showComparison(view, names, { signal, showProblem }) {
  const places = buildPlaces(view, ["problems", "legend", "curves", "figures", "differences"]);
  places.legend.before(build("h1", {}, `Comparison of ${names.length} runs`));
  let stamp = "", draw = null, runs = [];
  const buildKey = ({ name, color }) => build("a", { href: `#/run/${encodeURIComponent(name)}`, class: `key ${color}` }, name);
  const showRows = (title, rows) => section(title, rows.length ? buildTable(["", ...runs.map(buildKey)], rows.map(([key, values]) => [key, ...values]))
    : build("p", { class: "lead" }, "None."));
  poll(async () => {
    try {
      const query = new URLSearchParams([...names.map((name) => ["run", name]), ["stamp", stamp]]);
      const comparison = await request(`api/comparison?${query}`, { signal });
      showProblem(null);
      if (!comparison) return;
      ({ stamp, runs } = comparison);
      update(places.legend, runs, () => runs.map(buildKey));
      update(places.problems, comparison.problems, showProblems);
      update(places.figures, comparison.tiles, (rows) => showRows("Figures", rows));
      update(places.differences, comparison.differences, (rows) => showRows("Settings that differ", rows));
      draw ??= await openCharts(places.curves, (curve) => runs[curve.run].name, signal);
      draw(comparison.page);
    } catch (error) {
      showProblem(error);
    }
  }, 1, signal);
}
