// Conversations and settings in the browser's storage; the API key only as long as the tab is open.

const CONVERSATION = "litgpt.conversation.", CURRENT = "litgpt.current", SETTINGS = "litgpt.settings", KEY = "litgpt.key";

const memory = new Map(); // for browsers that allow no storage, until the page is closed

function read(kind, name) {
  try {
    return window[kind].getItem(name);
  } catch {
    return memory.get(name) ?? null;
  }
}

function write(kind, name, text) {
  try {
    window[kind].setItem(name, text);
  } catch {
    memory.set(name, text);
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const isConversation = (value) =>
  typeof value?.id === "string" && typeof value.title === "string" && Array.isArray(value.messages) &&
  value.messages.every((message) => typeof message?.role === "string" && typeof message.content === "string");

export const createConversation = () => ({
  id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`, title: "", updated: Date.now(), messages: [],
});

// All conversations, the last used first. Each has an entry of its own, so that tabs do not overwrite those of others.
export function listConversations() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(CONVERSATION));
  } catch { /* no storage */ }
  const found = names.map((name) => parse(read("localStorage", name))).filter(isConversation);
  return found.sort((a, b) => b.updated - a.updated);
}

// Throws an error if the storage is full, or not allowed.
export function saveConversation({ id, title, updated, messages }) {
  localStorage.setItem(CONVERSATION + id, JSON.stringify({ id, title, updated, messages }));
}

export const isConversationEntry = (name) => name === null || name.startsWith(CONVERSATION);
export const removeConversation = (id) => localStorage.removeItem(CONVERSATION + id);

// The conversation that this browser showed last.
export const loadCurrent = () => read("localStorage", CURRENT);
export const saveCurrent = (id) => write("localStorage", CURRENT, id);

export const loadSettings = () => ({ ...parse(read("localStorage", SETTINGS)) });
export const saveSettings = (settings) => write("localStorage", SETTINGS, JSON.stringify(settings));

export const loadKey = () => read("sessionStorage", KEY) ?? "";
export const saveKey = (key) => write("sessionStorage", KEY, key);
