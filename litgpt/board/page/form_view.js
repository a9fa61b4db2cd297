// The form of a new run: its fields come from the schema of a command, and its errors are those of the command line.

import { buildQuery, request } from "./client.js";
import { build, section } from "./elements.js";

const CHECK_AFTER = 400; // ms without a change

// The element of a field, and its input; changes of its class are shown below it.
function buildField(field, texts, onChange) {
  const id = `field-${field.key}`, value = texts[field.key] ?? "";
  const attributes = { id, name: field.key, "aria-describedby": `${id}-help ${id}-error`, autocomplete: "off", spellcheck: "false" };
  let input;
  if (field.is_mapping) input = build("textarea", { ...attributes, rows: "3", placeholder: "n_layer: 6" });
  else if (field.options.length && !field.is_free) input = build("select", attributes,
    build("option", { value: "" }, field.default ? `default: ${field.default}` : ""), ...field.options.map((option) => build("option", { value: option }, option)));
  else input = build("input", { ...attributes, type: "text", placeholder: field.default, ...(field.options.length && { list: `${id}-options` }) });
  input.value = value;
  const parts = [build("label", { for: id }, field.key + (field.is_required ? " *" : "")), input];
  if (field.is_free && field.options.length) parts.push(build("datalist", { id: `${id}-options` }, ...field.options.map((value) => build("option", { value }))));
  parts.push(build("p", { class: "wrong", id: `${id}-error`, hidden: true }), build("p", { class: "soft", id: `${id}-help` }, field.help));
  const element = build("div", { class: field.is_mapping ? "field long" : "field" }, ...parts);
  input.addEventListener("input", () => { texts[field.key] = input.value; onChange(field.key); });
  if (!Object.keys(field.classes).length) return element;
  const settings = build("div", { class: "fields" });
  const showSettings = () => {
    const fields = field.classes[input.value || field.default] ?? [];
    const required = fields.filter((inner) => inner.is_required || inner.key.endsWith(".lr")), others = fields.filter((inner) => !required.includes(inner));
    settings.replaceChildren(...required.map((inner) => buildField(inner, texts, onChange)), ...(others.length ? [build("details", { class: "field long" },
      build("summary", {}, `More settings of ${input.value || field.default}`), build("div", { class: "fields" }, ...others.map((inner) => buildField(inner, texts, onChange))))] : []));
  };
  input.addEventListener("input", () => {
    for (const key of Object.keys(texts)) if (key.startsWith(`${field.key}.`)) delete texts[key]; // of another class
    showSettings();
  });
  showSettings();
  return build("fieldset", { class: "class" }, element, settings);
}

function buildFields(form, texts, onChange) {
  const byKey = new Map(form.fields.map((field) => [field.key, field]));
  const others = form.fields.filter(({ key }) => !form.first.includes(key));
  const groups = Map.groupBy(others, ({ key }) => (key.includes(".") ? key.split(".")[0] : "general"));
  const show = (fields) => build("div", { class: "fields" }, ...fields.map((field) => buildField(field, texts, onChange)));
  return [section("Settings", show(form.first.map((key) => byKey.get(key)))), ...[...groups].map(([name, fields]) =>
    build("section", {}, build("details", { "data-group": name }, build("summary", {}, name), show(fields))))];
}

function clearErrors(form) {
  for (const error of form.querySelectorAll(".field > .wrong")) { error.hidden = true; error.textContent = ""; }
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

// Show an error at the field that it names, or at the first of the group that it names; false if there is none.
function showFieldError(form, error, hasFocus) {
  const param = error.param ?? "", inputs = [...form.elements].filter((input) => input.name);
  const input = inputs.find(({ name }) => name === param) ?? inputs.find(({ name }) => param && name.startsWith(`${param}.`));
  if (!input) return false;
  const place = document.getElementById(`${input.id}-error`);
  place.hidden = false;
  place.textContent = error.message;
  input.setAttribute("aria-invalid", "true");
  for (let parent = input.closest("details"); parent; parent = parent.parentElement.closest("details")) parent.open = true;
  if (hasFocus) input.focus();
  return true;
}

export async function showForm(view, [command = "pretrain", run], { signal, showProblem }) {
  view.append(build("h1", {}, "New run"));
  let form;
  try {
    form = await request(`api/form?${buildQuery({ command, ...(run && { run }) })}`, { signal });
  } catch (error) {
    showProblem(error);
    return;
  }
  const texts = form.values, changed = new Set();
  const choice = build("select", { id: "command", onchange: () => { location.hash = `#/new/${choice.value}`; } },
    ...form.commands.map((name) => build("option", { value: name, selected: name === command }, name)));
  const recipe = build("pre", { id: "recipe" }), message = build("p", { class: "wrong", role: "alert", id: "form-error", hidden: true });
  const start = build("button", { type: "submit", class: "primary", id: "start" }, "Start");
  const element = build("form", { novalidate: true, autocomplete: "off" },
    section("Command", build("div", { class: "field" }, choice)), ...buildFields(form, texts, onChange));
  element.id = "new-run";
  start.setAttribute("form", element.id);
  const gpu = build("select", { "aria-label": "GPU to fit on" }, build("option", { value: "" }, "any GPU"), ...form.gpus.map((name) => build("option", { value: name }, name)));
  const plan = build("button", { type: "button", id: "plan", onclick: runPlan }, "Plan"), planned = build("pre", { id: "planned", role: "status" });
  const side = build("aside", {}, section("Start", message, build("div", { class: "bar" }, start)),
    form.planned.includes(command) ? section("Plan", build("div", { class: "bar" }, gpu, plan), planned) : null, section("Recipe", recipe));
  view.append(build("div", { class: "new" }, element, side));
  let timer = null, number = 0;

  function showError(error, { hasFocus, isTyping }) {
    if (error.name === "AbortError") return;
    clearErrors(element);
    message.hidden = true;
    const isMissing = isTyping && error.param && !changed.has(error.param) && !texts[error.param]; // not filled in yet
    if (isMissing || showFieldError(element, error, hasFocus)) return;
    message.hidden = false;
    message.textContent = error.message;
  }
  async function send(path, body, options) {
    const own = ++number;
    try {
      const answer = await request(path, { body: { command, values: texts, ...body }, signal });
      if (own === number) { clearErrors(element); message.hidden = true; }
      return answer;
    } catch (error) {
      if (own === number) showError(error, options);
      return null;
    }
  }
  async function check() {
    const answer = await send("api/check", {}, { hasFocus: false, isTyping: true });
    if (answer) recipe.textContent = answer.recipe;
  }
  async function runPlan() {
    plan.disabled = true;
    planned.textContent = "Planning takes some seconds.";
    planned.textContent = (await send("api/plan", { gpu: gpu.value || null }, { hasFocus: true, isTyping: false }))?.plan ?? "";
    plan.disabled = false;
  }
  function onChange(key) {
    changed.add(key);
    clearTimeout(timer);
    timer = setTimeout(check, CHECK_AFTER);
  }
  signal.addEventListener("abort", () => clearTimeout(timer));
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearTimeout(timer);
    start.disabled = true;
    const answer = await send("api/start", {}, { hasFocus: true, isTyping: false });
    start.disabled = false;
    if (answer) location.hash = `#/run/${encodeURIComponent(answer.run)}`;
  });
  check();
}
