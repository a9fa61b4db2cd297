// Elements of the page. Texts of runs are only ever text, never markup.

export function build(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const section = (title, ...children) => build("section", {}, build("h2", {}, title), ...children);

export function buildTable(header, rows, className = "") {
  const cells = (tag, values) => values.map((value, i) => build(i ? tag : "th", {}, value));
  return build("div", { class: "wide-table" }, build("table", { class: className },
    ...(header ? [build("tr", {}, ...header.map((value) => build("th", {}, value)))] : []),
    ...rows.map((row) => build("tr", {}, ...cells("td", row)))));
}

// Replace an element's children if what they show has changed, so that open parts and the focus stay.
export function update(element, value, show) {
  const text = JSON.stringify(value);
  if (element.dataset.shown === text) return;
  element.dataset.shown = text;
  element.replaceChildren(...[show(value)].flat().filter(Boolean));
}

export function formatBytes(bytes) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (bytes >= unit) return `${(bytes / unit).toPrecision(3)} ${name}`;
  return `${bytes} B`;
}

export function formatAge(seconds) {
  for (const [unit, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= unit) return `${Math.floor(seconds / unit)} ${name} ago`;
  return "now";
}

// Call work now and every few seconds, while the page is visible, until the signal.
export async function poll(work, seconds, signal) {
  while (!signal.aborted) {
    if (!document.hidden) await work();
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}
