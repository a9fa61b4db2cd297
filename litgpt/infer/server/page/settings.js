// The settings of requests, and the dialog that changes them.

import { listModels } from "./client.js";
import * as storage from "./storage.js";

const dialog = document.getElementById("settings"), form = dialog.querySelector("form"), fields = form.elements;
const DEFAULT_MAX_TOKENS = 512;
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let settings = storage.loadSettings(), models = [];

// The model of the next request: its name, and the maximum number of tokens of a chat; undefined if it is not known.
export const getModel = () => models.find(({ name }) => name === settings.model) ?? models[0];

// All settings; null for the value of the server. Its maximum of tokens is often too small for a chat.
function getSettings() {
  const model = getModel(), defaults = model && { max_tokens: Math.min(DEFAULT_MAX_TOKENS, Math.floor(model.context / 2)) };
  return { ...defaults, ...settings, model: model?.name };
}

// The body of a request for the next message.
export function buildBody(messages) {
  const { model, system, ...values } = getSettings();
  const body = { ...(model && { model }), messages: messages.map(({ role, content }) => ({ role, content })) };
  if (system?.trim()) body.messages.unshift({ role: "system", content: system });
  for (const name of NUMBERS) if (typeof values[name] === "number") body[name] = values[name];
  return body;
}

// List the models of the server; if it does not answer, those known before stay.
export async function loadModels() {
  models = await listModels(storage.loadKey());
}

export function openSettings(field = "model") {
  const values = getSettings();
  fields.model.replaceChildren(...models.map(({ name }) => new Option(name)));
  for (const name of ["model", "system", ...NUMBERS]) fields[name].value = values[name] ?? "";
  fields.key.value = storage.loadKey();
  dialog.showModal();
  fields[field].focus();
}

// Store each change that is valid.
function changeSetting({ target: { name, value, validity } }) {
  if (!validity.valid) return;
  if (name === "key") {
    storage.saveKey(value);
    return;
  }
  const isNumber = NUMBERS.includes(name);
  settings = { ...settings, [name]: isNumber ? (value === "" ? null : Number(value)) : value };
  storage.saveSettings(settings);
}

// Call `done` each time that the dialog has been closed.
export function watchSettings(done) {
  form.addEventListener("input", changeSetting);
  dialog.addEventListener("close", done);
}
