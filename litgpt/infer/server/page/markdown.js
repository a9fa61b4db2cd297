// Markdown of answers as elements. All text is set as text, so no answer can add markup, and links are http(s) only.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8; // of lists and quotes in each other

const INLINE = new RegExp([
  /(?<!`)(?<tick>`+)(?!`)(?<code>.+?)(?<!`)\k<tick>(?!`)/,
  /\[(?<label>[^[\]]+)\]\((?<target>https?:\/\/[^\s()<>]+)\)/,
  /(?<url>https?:\/\/[^\s()<>"'`*]*[^\s()<>"'`*.,;:!?])/,
  /\*\*(?=\S)(?<bold>.+?)(?<=\S)\*\*/,
  /(?<![\w*])\*(?=[^\s*])(?<italic>[^*]*[^\s*])\*(?![\w*])/,
  /(?<!\w)_(?=[^\s_])(?<slanted>[^_]*[^\s_])_(?!\w)/,
  /\\(?<escaped>[*_`])/,
].map((part) => part.source).join("|"), "gs");

function create(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function createLink(address) {
  const link = create("a");
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

function addInline(parent, text) {
  const add = (element, inner) => { addInline(element, inner); parent.append(element); };
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const { code, label, target, url, bold, italic, slanted, escaped } = match.groups;
    parent.append(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (code !== undefined) parent.append(create("code", "", code.replace(/^ (.*\S.*) $/s, "$1")));
    else if (label !== undefined) add(createLink(target), label);
    else if (url !== undefined) { const link = createLink(url); link.textContent = url; parent.append(link); }
    else if (bold !== undefined) add(create("strong"), bold);
    else if (escaped !== undefined) parent.append(escaped);
    else add(create("em"), italic ?? slanted);
  }
  parent.append(text.slice(end));
  return parent;
}

function createCode(lines, language) {
  const block = create("div", "code"), bar = create("div", "bar"), button = create("button", "copy", "Copy");
  const code = create("code", "", lines.join("\n")), pre = create("pre");
  button.type = "button";
  button.setAttribute("aria-label", "Copy the code");
  bar.append(create("span", "", language), button);
  pre.tabIndex = 0; // wide code is scrolled with the arrow keys
  pre.append(code);
  block.append(bar, pre);
  return block;
}

const splitRow = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function createTable(lines) {
  const frame = create("div", "table"), table = create("table"), [header, , ...rows] = lines.map(splitRow);
  const addRow = (parent, cells, tag) => {
    const row = create("tr");
    header.forEach((_, index) => row.append(addInline(create(tag), cells[index] ?? "")));
    parent.append(row);
  };
  const head = create("thead"), body = create("tbody");
  addRow(head, header, "th");
  rows.forEach((cells) => addRow(body, cells, "td"));
  table.append(head, body);
  frame.append(table);
  frame.tabIndex = 0;
  return frame;
}

// Whether a line starts an item with a number; undefined if it starts none.
const isOrdered = (line) => { const item = line.match(ITEM); return item ? /\d/.test(item[2]) : undefined; };

// Items of a list with their lines; those of an item are indented, and blank lines may separate them.
function createList(lines, depth) {
  const ordered = isOrdered(lines[0]), list = create(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(lines[0].match(ITEM)[2], 10);
  let item = [], indent = 0;
  const finish = () => {
    if (!item.length) return;
    const element = create("li");
    addBlocks(element, item, depth + 1);
    list.append(element);
  };
  for (const line of lines) {
    const match = line.match(ITEM);
    if (match && (!item.length || match[1].length < indent)) {
      finish();
      indent = match[0].trimEnd().length + 1;
      item = [line.slice(match[0].length)];
    } else {
      const margin = line.length - line.trimStart().length;
      item.push(line.slice(Math.min(indent, margin)));
    }
  }
  finish();
  return list;
}

const isTable = (lines, at) => lines[at].includes("|") && lines[at + 1]?.includes("|") && DIVIDER.test(lines[at + 1]);
const startsBlock = (lines, at) =>
  [FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(lines[at])) || isTable(lines, at);

function findEnd(lines, start, continues) {
  let end = start + 1;
  while (end < lines.length && continues(lines[end], end)) end++;
  return end;
}

// The blocks of a text: the number of the line after each, and what creates its element.
function* splitBlocks(lines, depth) {
  let at = 0, end = 0;
  for (; at < lines.length; at = end) {
    const line = lines[at], first = at, fence = line.match(FENCE), heading = line.match(HEADING);
    const take = (continues) => { end = findEnd(lines, first, continues); return lines.slice(first, end); };
    if (!line.trim()) {
      end = at + 1;
      continue;
    }
    if (fence) {
      const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const inner = take((other) => !closing.test(other)).slice(1);
      end = Math.min(end + 1, lines.length);
      yield [first, end, () => createCode(inner, fence[2])];
    } else if (heading) {
      end = at + 1;
      yield [first, end, () => addInline(create(`h${Math.min(6, heading[1].length + 1)}`), heading[2])];
    } else if (RULE.test(line)) {
      end = at + 1;
      yield [first, end, () => create("hr")];
    } else if (isTable(lines, at)) {
      const rows = take((other) => other.includes("|"));
      yield [first, end, () => createTable(rows)];
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      const inner = take((other) => QUOTE.test(other)).map((other) => other.replace(QUOTE, ""));
      yield [first, end, () => { const quote = create("blockquote"); addBlocks(quote, inner, depth + 1); return quote; }];
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      const continuesList = (other) => /^\s/.test(other) || (isOrdered(other) === isOrdered(line) && !RULE.test(other));
      const items = take((other, index) => other.trim()
        ? continuesList(other) || (lines[index - 1].trim() && !startsBlock(lines, index))
        : continuesList(lines.slice(index + 1).find((next) => next.trim()) ?? ""));
      yield [first, end, () => createList(items, depth)];
    } else {
      const inner = take((other, index) => other.trim() && !startsBlock(lines, index));
      yield [first, end, () => addInline(create("p"), inner.join("\n"))];
    }
  }
}

function addBlocks(parent, lines, depth) {
  for (const [, , build] of splitBlocks(lines, depth)) parent.append(build());
}

// Show a text in an element; blocks that have not changed since the last call keep their elements.
export function showMarkdown(parent, text) {
  const lines = text.split(/\r?\n/), sources = (parent.sources ??= []);
  let count = 0;
  for (const [start, end, build] of splitBlocks(lines, 0)) {
    const source = lines.slice(start, end).join("\n"), old = parent.children[count];
    if (!old) parent.append(build());
    else if (sources[count] !== source) old.replaceWith(build());
    sources[count++] = source;
  }
  while (parent.children.length > count) parent.lastElementChild.remove();
}
