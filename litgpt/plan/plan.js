"use strict";
// Draws the memory of a step as areas on top of each other, and layouts as points of memory and time.
(() => {
  const HEIGHT = 300, LEFT = 58, RIGHT = 24, TOP = 22, BOTTOM = 34;
  const page = JSON.parse(document.getElementById("data").textContent);

  function drawGrid(width, x, y, rangeX, rangeY, nameX, nameY, withX) {
    const parts = charts.findTicks(...rangeY, 5, false).map((tick) =>
      `<line class="grid" x1="${LEFT}" x2="${width - RIGHT}" y1="${y(tick)}" y2="${y(tick)}"/>` +
      `<text x="${LEFT - 8}" y="${y(tick) + 4}" text-anchor="end">${charts.formatNumber(tick)}</text>`);
    for (const tick of withX ? charts.findTicks(...rangeX, Math.max(2, Math.floor(width / 110)), false) : [])
      parts.push(`<text x="${x(tick)}" y="${HEIGHT - 18}" text-anchor="middle">${charts.formatNumber(tick)}</text>`);
    parts.push(`<text x="${width - RIGHT}" y="${HEIGHT - 4}" text-anchor="end">${nameX}</text>`, `<text x="4" y="12">${nameY}</text>`);
    return parts;
  }

  const openSvg = (width, name) => `<svg width="${width}" height="${HEIGHT}" role="img" aria-label="${name}">`;

  function drawTimeline(figure, timeline) {
    const image = figure.querySelector(".image"), readout = figure.querySelector(".readout"), width = image.clientWidth;
    const sums = timeline.events.map(() => 0), rangeX = [0, timeline.last];
    const layers = timeline.parts.map((part) => {
      const below = [...sums];
      part.values.forEach((value, i) => { sums[i] += value; });
      return { ...part, below, above: [...sums] };
    });
    const most = Math.max(...sums), peak = sums.indexOf(most);
    const x = charts.buildScale(rangeX, LEFT, width - RIGHT, false), y = charts.buildScale([0, most * 1.05], HEIGHT - BOTTOM, TOP, false);
    const parts = drawGrid(width, x, y, rangeX, [0, most * 1.05], "allocations and releases", "GiB", true);
    timeline.phases.forEach(([name, start, end], i) => {
      const space = x(end) - x(start);
      if (i % 2) parts.push(`<rect class="band" x="${x(start)}" y="${TOP}" width="${space}" height="${HEIGHT - TOP - BOTTOM}"/>`);
      if (space > name.length * 7) parts.push(`<text x="${x(start) + space / 2}" y="${TOP - 8}" text-anchor="middle">${charts.escapeText(name)}</text>`);
    });
    // steps: what is held after an event is held until the next one
    const trace = (values, backward) => {
      const points = values.map((value, i) => [x(timeline.events[i]), x(timeline.events[i + 1] ?? timeline.last), y(value)]);
      const ordered = backward ? points.reverse().map(([from, to, at]) => [to, from, at]) : points;
      return ordered.map(([from, to, at]) => `${from.toFixed(1)} ${at.toFixed(1)}L${to.toFixed(1)} ${at.toFixed(1)}`).join("L");
    };
    for (const layer of layers)
      parts.push(`<path class="area ${layer.kind}" d="M${trace(layer.above, false)}L${trace(layer.below, true)}Z"/>`);
    const at = x(timeline.events[peak]), isLeft = at > width / 2;
    parts.push(`<g class="mark"><line x1="${at}" x2="${at}" y1="${TOP}" y2="${HEIGHT - BOTTOM}"/></g>`,
      `<text class="place" x="${at + (isLeft ? -6 : 6)}" y="${TOP + 10}" text-anchor="${isLeft ? "end" : "start"}">peak ${charts.formatNumber(most)} GiB</text>`);
    image.innerHTML = `${openSvg(width, "Memory during a step")}${parts.join("")}<line class="pointer" y1="${TOP}" y2="${HEIGHT - BOTTOM}" visibility="hidden"/></svg>`;
    const pointer = image.querySelector(".pointer");
    image.onpointerleave = () => { pointer.setAttribute("visibility", "hidden"); readout.textContent = ""; };
    image.onpointermove = image.onpointerdown = (event) => {
      const place = Math.min(width - RIGHT, Math.max(LEFT, event.clientX - image.getBoundingClientRect().left));
      let nearest = 0;
      timeline.events.forEach((value, i) => { if (x(value) <= place) nearest = i; });
      const phase = timeline.phases.find(([, start, end]) => start <= timeline.events[nearest] && timeline.events[nearest] < end);
      pointer.setAttribute("x1", place);
      pointer.setAttribute("x2", place);
      pointer.setAttribute("visibility", "visible");
      const held = layers.filter((layer) => layer.values[nearest] >= 0.002 * most).map((layer) => `${layer.name} ${charts.formatNumber(layer.values[nearest])}`);
      readout.textContent = [`${phase ? `${phase[0]}: ` : ""}${charts.formatNumber(sums[nearest])} GiB`, ...held].join(", ");
    };
  }

  function drawLayouts(figure, layouts, available) {
    const image = figure.querySelector(".image"), readout = figure.querySelector(".readout"), width = image.clientWidth;
    const widen = ([low, high]) => [Math.max(0, low - 0.08 * (high - low)), high + 0.08 * (high - low)];
    const rangeX = widen(charts.findRange([...layouts.map((layout) => layout.memory), available], false));
    const rangeY = widen(charts.findRange(layouts.map((layout) => layout.seconds), false));
    const x = charts.buildScale(rangeX, LEFT, width - RIGHT, false), y = charts.buildScale(rangeY, HEIGHT - BOTTOM, TOP, false);
    const parts = drawGrid(width, x, y, rangeX, rangeY, "GiB of the largest rank", "seconds per step", true);
    parts.push(`<line class="limit" x1="${x(available)}" x2="${x(available)}" y1="${TOP}" y2="${HEIGHT - BOTTOM}"/>`);
    layouts.forEach((layout, i) => parts.push(
      `<circle class="${layout.fits ? "first" : "fifth"}" cx="${x(layout.memory)}" cy="${y(layout.seconds)}" r="5"/>` +
      `<text class="place" x="${x(layout.memory) + 9}" y="${y(layout.seconds) + 4}">${i + 1}</text>`));
    image.innerHTML = `${openSvg(width, "Layouts")}${parts.join("")}</svg>`;
    image.onpointerleave = () => { readout.textContent = ""; };
    image.onpointermove = image.onpointerdown = (event) => {
      const box = image.getBoundingClientRect();
      const distances = layouts.map((layout) => Math.hypot(x(layout.memory) - event.clientX + box.left, y(layout.seconds) - event.clientY + box.top));
      const nearest = distances.indexOf(Math.min(...distances)), layout = layouts[nearest];
      readout.textContent = `${nearest + 1}: ${layout.settings}, ${layout.seconds.toFixed(2)} s, ${layout.memory.toFixed(1)} GiB`;
    };
  }

  function drawAll() {
    if (page.timeline) drawTimeline(document.getElementById("timeline"), page.timeline);
    if (page.layouts.length) drawLayouts(document.getElementById("layouts"), page.layouts, page.available);
  }
  window.addEventListener("resize", drawAll);
  drawAll();
})();
