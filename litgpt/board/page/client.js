// Requests to the server that the page comes from, with the key, which is kept until the tab is closed.

const KEY = "litgpt.board.key";

let memory = null; // for browsers that allow no storage

export function loadKey() {
  try { return sessionStorage.getItem(KEY) ?? memory ?? ""; } catch { return memory ?? ""; }
}

export function saveKey(key) {
  memory = key;
  try { sessionStorage.setItem(KEY, key); } catch { /* kept in memory */ }
}

// Take the key from the address that the command prints, so that it is in no bookmark and in no history.
export function takeKey() {
  const match = location.hash.match(/^#key=([^&]+)$/);
  if (!match) return;
  saveKey(decodeURIComponent(match[1]));
  history.replaceState(null, "", `${location.pathname}#/`);
}

export class ServerError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param; // the field that is wrong
  }
}

// The JSON value of an answer; null for one without a body.
export async function request(path, { body, signal } = {}) {
  const headers = { Authorization: `Bearer ${loadKey()}`, ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The board does not answer; its command may have ended.");
  }
  if (response.status === 204) return null;
  const answer = await response.json().catch((error) => { if (error.name === "AbortError") throw error; return null; });
  if (response.ok) return answer;
  throw new ServerError(answer?.error?.message ?? `The board answered with status ${response.status}.`, response.status, answer?.error?.param);
}

export const buildQuery = (values) => new URLSearchParams(values).toString();
