// Requests to the server that the page comes from.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message.replace(/\s+/g, " ").trim());
    this.status = status;
  }
}

async function send(path, key, options = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(options.body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(body?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

// The models of the server: their names, and the maximum number of tokens of a chat.
export async function listModels(key) {
  const { data } = await (await send("v1/models", key)).json();
  return data.map((model) => ({ name: model.id, context: model.max_model_len }));
}

// The data of server-sent events.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The pieces of an answer in OpenAI's form, as they arrive. Aborting ends the request, and the server stops generating.
export async function* streamChat(body, key, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const request = { method: "POST", body: JSON.stringify({ ...body, ...options }), signal };
  const response = await send("v1/chat/completions", key, request);
  for await (const event of readEvents(response.body)) {
    if (event === "[DONE]") return;
    const piece = JSON.parse(event);
    if (piece.error) throw new ServerError(piece.error.message);
    yield piece;
  }
  throw new ServerError("The connection to the server was lost.");
}
