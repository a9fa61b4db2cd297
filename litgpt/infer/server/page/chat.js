// The page: conversations, their messages, and keys.

import { ServerError, streamChat } from "./client.js";
import { copyText } from "./clipboard.js";
import { showMarkdown } from "./markdown.js";
import { buildBody, getModel, loadModels, openSettings, watchSettings } from "./settings.js";
import * as storage from "./storage.js";

const byId = (id) => document.getElementById(id);
const [sidebar, shade, log, scroll, input, newTitle] = ["sidebar", "shade", "log", "scroll", "input", "new-title"].map(byId);
const narrow = window.matchMedia("(max-width: 760px)"), isTouched = window.matchMedia("(pointer: coarse)");

let conversations = storage.listConversations();
let current = conversations.find(({ id }) => id === storage.loadCurrent()) ?? storage.createConversation();
let deleted = null;
const requests = new Map(); // conversation id -> AbortController of the answer that is written
const errors = new Map(); // conversation id -> ServerError
const articles = new WeakMap(); // message -> its element

function createButton(label, className, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = className;
  button.textContent = label;
  if (action) button.addEventListener("click", action);
  return button;
}

const focusInput = () => { if (!isTouched.matches) input.focus(); };
const getTitle = ({ title, messages }) => title || messages[0]?.content.replace(/\s+/g, " ").slice(0, 60) || "New conversation";

function showNotice(text, canUndo = false) {
  const notice = byId("notice");
  notice.hidden = !text;
  notice.querySelector("span").textContent = text;
  byId("undo").hidden = !canUndo;
}

// Run what writes to the browser's storage, which may be full or not allowed.
function store(write) {
  try {
    write();
  } catch (error) {
    showNotice(`This browser did not store the conversation (${error.name}); delete some, or allow storage.`);
  }
}

function save(conversation) {
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.push(conversation);
  conversations.sort((a, b) => b.updated - a.updated);
  store(() => storage.saveConversation(conversation));
}

function forget(conversation) {
  conversations = conversations.filter((other) => other !== conversation);
  store(() => storage.removeConversation(conversation.id));
}

// Messages

function createArticle(message) {
  const article = document.createElement("article"), text = document.createElement("div"), foot = document.createElement("footer");
  const isUser = message.role === "user";
  article.className = isUser ? "user" : "assistant";
  article.setAttribute("aria-label", isUser ? "You" : "Model");
  text.className = "text";
  if (isUser) text.textContent = message.content;
  const copy = createButton("Copy", "copy");
  const note = document.createElement("span");
  note.className = "note";
  foot.append(note, copy);
  if (!isUser) foot.append(createButton("Regenerate", "again", regenerate));
  article.append(text, foot);
  return article;
}

function showMessage(message, isLast) {
  if (!articles.has(message)) articles.set(message, createArticle(message));
  const article = articles.get(message), foot = article.lastElementChild;
  const isWriting = isLast && requests.has(current.id) && message.role === "assistant";
  if (message.role === "assistant" && article.shown !== message.content) {
    showMarkdown(article.querySelector(".text"), message.content);
    article.shown = message.content;
  }
  article.classList.toggle("writing", isWriting);
  foot.querySelector(".note").textContent = isWriting && !message.content ? "Waiting for the first token" : message.note ?? "";
  foot.querySelector(".copy").hidden = isWriting;
  const again = foot.querySelector(".again");
  if (again) again.hidden = !isLast || isWriting;
  return article;
}

const isAtEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
const scrollToEnd = () => { scroll.scrollTop = scroll.scrollHeight; };

function showMessages() {
  const stays = isAtEnd(), { messages } = current, isBusy = requests.has(current.id), error = errors.get(current.id);
  log.setAttribute("aria-busy", `${isBusy}`); // read out when the answer is whole
  messages.forEach((message, index) => {
    const article = showMessage(message, index === messages.length - 1), old = log.children[index];
    if (old !== article) log.insertBefore(article, old ?? null);
  });
  while (log.children.length > messages.length) log.lastElementChild.remove();
  byId("empty").hidden = messages.length > 0;
  const needsAnswer = !isBusy && messages.at(-1)?.role === "user";
  byId("problem").hidden = !error && !needsAnswer;
  byId("problem").querySelector("span").textContent = error?.message ?? "This message has no answer.";
  byId("enter-key").hidden = error?.status !== 401;
  byId("retry").hidden = byId("edit").hidden = !needsAnswer;
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  if (stays) scrollToEnd();
}

let frame = 0;
const showMessagesSoon = () => { frame ||= requestAnimationFrame(() => { frame = 0; showMessages(); }); };

// Conversations

function showConversations() {
  const items = conversations.map((conversation) => {
    const item = document.createElement("li");
    const button = createButton(getTitle(conversation), "", () => openConversation(conversation));
    if (conversation.id === current.id) button.setAttribute("aria-current", "true");
    item.append(button);
    return item;
  });
  byId("conversations").replaceChildren(...items);
  byId("title").textContent = getTitle(current);
  document.title = current.messages.length ? `${getTitle(current)} - Chat` : "Chat";
  byId("rename").hidden = byId("delete").hidden = !current.messages.length;
}

function openConversation(conversation) {
  current = conversation;
  storage.saveCurrent(current.id);
  showNotice("");
  finishRename(false);
  openSidebar(false);
  showConversations();
  showMessages();
  scrollToEnd();
  focusInput();
}

function openNew() {
  openConversation(current.messages.length ? storage.createConversation() : current);
}

function deleteCurrent() {
  requests.get(current.id)?.abort();
  deleted = current;
  forget(current);
  openConversation(storage.createConversation());
  showNotice(`Deleted: ${getTitle(deleted)}`, true);
}

function undoDelete() {
  save(deleted);
  openConversation(deleted);
}

function startRename() {
  newTitle.value = getTitle(current);
  newTitle.hidden = false;
  byId("title").hidden = true;
  newTitle.select();
}

function finishRename(isAccepted) {
  if (newTitle.hidden) return;
  newTitle.hidden = true;
  byId("title").hidden = false;
  if (!isAccepted || !newTitle.value.trim()) return;
  current.title = newTitle.value.trim();
  save(current);
  showConversations();
}

function openSidebar(isOpen) {
  const isShown = isOpen || !narrow.matches, hadFocus = sidebar.contains(document.activeElement);
  sidebar.classList.toggle("open", isOpen);
  sidebar.inert = !isShown;
  shade.hidden = !(isOpen && narrow.matches);
  byId("menu").setAttribute("aria-expanded", `${isOpen}`);
  if (isOpen) byId("new").focus();
  else if (hadFocus && narrow.matches) byId("menu").focus();
}

// Answers

function describeAnswer(usage, seconds, reason) {
  const count = usage?.completion_tokens ?? 0, parts = [`${count} ${count === 1 ? "token" : "tokens"}`];
  if (count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`); // without the prompt's time
  if (reason === "length") parts.push("maximum reached");
  return parts.join(", ");
}

// Stream an answer into a message.
async function readAnswer(body, signal, message) {
  let first = 0, last = 0, usage, reason;
  for await (const piece of streamChat(body, storage.loadKey(), signal)) {
    const [choice] = piece.choices, text = choice?.delta?.content;
    if (text || choice?.finish_reason) last = performance.now();
    first ||= last;
    message.content += text ?? "";
    reason = choice?.finish_reason ?? reason;
    usage = piece.usage ?? usage;
    showMessagesSoon();
  }
  message.note = describeAnswer(usage, (last - first) / 1000, reason);
}

// Write the next message of a conversation; `old` is kept if there is none.
async function answer(conversation, old) {
  const controller = new AbortController(), message = { role: "assistant", content: "" }, { messages } = conversation;
  const body = buildBody(messages);
  errors.delete(conversation.id);
  requests.set(conversation.id, controller);
  messages.push(message);
  showMessages();
  scrollToEnd();
  try {
    await readAnswer(body, controller.signal, message);
    if (!getModel()) loadModels().then(showModel, () => {});
  } catch (error) {
    if (message.content) message.note = error.name === "AbortError" ? "stopped" : "incomplete";
    if (error.status === 404) loadModels().then(showModel, () => {}); // the server has another model now
    if (error.name !== "AbortError") errors.set(conversation.id, error instanceof ServerError ? error : new ServerError(`${error}`));
  }
  requests.delete(conversation.id);
  if (!message.content && !message.note) messages.splice(messages.indexOf(message), 1, ...(old ? [old] : []));
  if (conversations.includes(conversation)) save(conversation);
  showConversations();
  showMessages();
}

function sendMessage() {
  const text = input.value.trim();
  if (!text || requests.has(current.id)) return;
  showNotice("");
  const last = current.messages.at(-1)?.role === "user" ? `${current.messages.pop().content}\n\n` : ""; // was not answered
  current.messages.push({ role: "user", content: last + text });
  input.value = "";
  fitInput();
  save(current);
  storage.saveCurrent(current.id);
  showConversations();
  answer(current);
  focusInput();
}

function regenerate() {
  if (requests.has(current.id)) return;
  answer(current, current.messages.at(-1)?.role === "assistant" ? current.messages.pop() : undefined);
  focusInput();
}

// Take a message that has no answer back to the field.
function editMessage() {
  const { content } = current.messages.pop();
  errors.delete(current.id);
  input.value = input.value ? `${content}\n\n${input.value}` : content;
  fitInput();
  if (current.messages.length) save(current);
  else forget(current);
  showConversations();
  showMessages();
  input.focus();
}

function stop() {
  if (!requests.has(current.id)) return;
  requests.get(current.id).abort();
  focusInput();
}

// The model of the server, which a key or another choice may have changed.

function showModel() {
  const model = getModel();
  byId("model-line").textContent = model ? `${model.name}, ${model.context.toLocaleString("en")} tokens of context` : "";
  byId("greeting").textContent = model ? `Ask ${model.name}.` : "";
}

async function updateModel() {
  try {
    await loadModels();
    errors.delete(current.id);
  } catch (error) {
    errors.set(current.id, error);
  }
  showModel();
  showMessages();
}

// Keys and events

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, 220)}px`;
}

const isField = (element) => element.matches("input, textarea, select");

document.addEventListener("keydown", (event) => {
  if (byId("settings").open || event.isComposing) return;
  const isShortcut = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k";
  if (isShortcut || (event.key === "/" && !isField(event.target))) {
    event.preventDefault();
    if (narrow.matches) openSidebar(false);
    input.focus();
  } else if (event.key === "Escape") {
    if (!newTitle.hidden) finishRename(false);
    else if (!shade.hidden) openSidebar(false);
    else stop();
  }
});

input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  sendMessage();
});
input.addEventListener("input", fitInput);
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); sendMessage(); });
newTitle.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.isComposing) finishRename(true);
});
newTitle.addEventListener("blur", () => finishRename(true));
log.addEventListener("click", ({ target }) => {
  if (!target.matches("button.copy")) return;
  const code = target.closest(".code");
  copyText(code ? code.querySelector("code").textContent : target.closest("article").message.content, target);
});
for (const [id, action] of Object.entries({
  stop, new: openNew, rename: startRename, delete: deleteCurrent, undo: undoDelete, retry: regenerate, edit: editMessage,
  menu: () => openSidebar(!sidebar.classList.contains("open")),
  "open-settings": () => openSettings(), "enter-key": () => openSettings("key"),
})) byId(id).addEventListener("click", action);
shade.addEventListener("click", () => openSidebar(false));
narrow.addEventListener("change", () => openSidebar(false));
watchSettings(updateModel);
window.addEventListener("pagehide", () => requests.forEach((_, id) => {
  const conversation = conversations.find((other) => other.id === id);
  if (conversation) store(() => storage.saveConversation(conversation));
}));
// Another tab has changed a conversation.
window.addEventListener("storage", ({ key }) => {
  if (!storage.isConversationEntry(key)) return;
  const own = conversations.filter(({ id }) => requests.has(id)), isOwn = ({ id }) => own.some((other) => other.id === id);
  conversations = [...own, ...storage.listConversations().filter((other) => !isOwn(other))].sort((a, b) => b.updated - a.updated);
  current = conversations.find(({ id }) => id === current.id) ?? current;
  showConversations();
  showMessages();
});

openSidebar(false);
showConversations();
showMessages();
scrollToEnd();
fitInput();
focusInput();
updateModel();
