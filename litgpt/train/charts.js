"use strict";
// Draws charts: curves over steps, tokens or time, linear or logarithmic, smoothed, with values under the pointer.
const charts = (() => {
  const HEIGHT = 240, LEFT = 58, RIGHT = 24, TOP = 10, BOTTOM = 30;

  const escapeText = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const formatNumber = (value) => {
    const size = Math.abs(value);
    if (size >= 1e4) {
      const [unit, name] = size >= 1e12 ? [1e12, "T"] : size >= 1e9 ? [1e9, "B"] : size >= 1e6 ? [1e6, "M"] : [1e3, "k"];
      return `${parseFloat((value / unit).toPrecision(3))}${name}`;
    }
    return size && size < 1e-4 ? value.toExponential(1) : `${parseFloat(value.toPrecision(4))}`;
  };
  const formatTime = (seconds) => {
    const total = Math.round(seconds), pad = (n) => `${n}`.padStart(2, "0");
    return `${Math.floor(total / 3600)}:${pad(Math.floor(total / 60) % 60)}:${pad(total % 60)}`;
  };
  const formatX = (value, axis) => (axis === "time" ? formatTime(value) : formatNumber(value));

  // About `count` round numbers from low to high; powers of ten and their parts on a logarithmic axis.
  function findTicks(low, high, count, log, axis) {
    const ticks = [];
    if (log && high / low >= 3) {
      const parts = high / low > 1e3 ? [1] : [1, 2, 5];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const part of parts) ticks.push(part * 10 ** power);
    } else {
      const rough = (high - low) / count || 1;
      const unit = Math.max(axis ? 1 : 0, 10 ** Math.floor(Math.log10(rough))); // steps and tokens are integers
      const steps = axis === "time" ? [1, 5, 15, 60, 300, 900, 3600, 14400, 86400, 604800] : [1, 2, 5, 10].map((n) => n * unit);
      const step = steps.find((n) => n >= rough * 0.99) || rough;
      for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(n * step);
    }
    return ticks.filter((tick) => tick >= low && tick <= high);
  }

  // Exponential moving average, corrected for its start.
  function smoothValues(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  function findRange(values, log) {
    const shown = values.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
    if (!shown.length) return null;
    let low = shown[0], high = shown[0];
    for (const value of shown) { low = Math.min(low, value); high = Math.max(high, value); }
    if (low === high) [low, high] = log ? [low / 1.1, high * 1.1] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    return [low, high];
  }

  const buildScale = ([low, high], start, end, log) => {
    const map = log ? Math.log : (value) => value;
    return (value) => start + ((map(value) - map(low)) / (map(high) - map(low))) * (end - start);
  };

  // A path through the points; a missing value interrupts it, and a value alone is a small circle.
  function drawPath(xs, ys) {
    let path = "", open = false;
    const isKnown = (i) => Number.isFinite(ys[i]) && Number.isFinite(xs[i]);
    xs.forEach((x, i) => {
      if (isKnown(i) && !open && !isKnown(i + 1)) path += `M${(x - 2).toFixed(1)} ${ys[i].toFixed(1)}a2 2 0 1 0 4 0a2 2 0 1 0 -4 0`;
      else if (isKnown(i)) path += `${open ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`;
      open = isKnown(i);
    });
    return path;
  }

  function drawChart(figure, page, controls) {
    const chart = page.charts[figure.dataset.chart], image = figure.querySelector(".image"), width = image.clientWidth;
    const axis = controls.axis.value, logX = controls.logx.checked, logY = controls.logy.checked;
    const weight = Number(controls.smoothing.value);
    const curves = chart.curves.map((curve) => {
      const rows = page.rows[curve.rows];
      return { ...curve, xs: rows[axis], ys: smoothValues(rows[curve.name], curve.smooth ? weight : 0), raw: rows[curve.name] };
    });
    const rangeX = findRange(Object.values(page.rows).flatMap((rows) => rows[axis]), logX), rangeY = findRange(curves.flatMap((curve) => curve.raw), logY);
    if (!rangeX || !rangeY) { image.textContent = "No values above zero."; figure.pointAt = () => {}; return; }
    const x = buildScale(rangeX, LEFT, width - RIGHT, logX), y = buildScale(rangeY, HEIGHT - BOTTOM, TOP, logY);
    const parts = [];
    for (const tick of findTicks(...rangeY, 5, logY))
      parts.push(`<line class="grid" x1="${LEFT}" x2="${width - RIGHT}" y1="${y(tick)}" y2="${y(tick)}"/>` +
        `<text x="${LEFT - 8}" y="${y(tick) + 4}" text-anchor="end">${formatNumber(tick)}</text>`);
    for (const tick of findTicks(...rangeX, Math.max(2, Math.floor(width / 80)), logX, axis))
      parts.push(`<text x="${x(tick)}" y="${HEIGHT - 10}" text-anchor="middle">${formatX(tick, axis)}</text>`);
    for (const mark of page.marks) {
      const at = x(mark[axis]);
      if (at >= LEFT && at <= width - RIGHT)
        parts.push(`<g class="mark"><line x1="${at}" x2="${at}" y1="${TOP}" y2="${HEIGHT - BOTTOM}"/><title>${escapeText(mark.text)} at step ${mark.step}</title></g>`);
    }
    const place = (values) => values.map((value) => (value === null || (logY && value <= 0) ? null : y(value)));
    for (const curve of curves) {
      const xs = curve.xs.map(x);
      if (curve.smooth && weight) parts.push(`<path class="${curve.color} raw" d="${drawPath(xs, place(curve.raw))}"/>`);
      parts.push(`<path class="${curve.color}${curve.wide ? " wide" : ""}" d="${drawPath(xs, place(curve.ys))}"/>`);
    }
    image.innerHTML = `<svg width="${width}" height="${HEIGHT}" role="img" aria-label="${escapeText(chart.title)}">${parts.join("")}` +
      `<line class="pointer" y1="${TOP}" y2="${HEIGHT - BOTTOM}" visibility="hidden"/></svg>`;
    const pointer = image.querySelector(".pointer"), readout = figure.querySelector(".readout");

    // Show the values of the rows nearest to a position, which is a share of the width of the axis; null for none.
    figure.pointAt = (share) => {
      pointer.setAttribute("visibility", share === null ? "hidden" : "visible");
      if (share === null) { readout.textContent = ""; return; }
      const at = LEFT + share * (width - LEFT - RIGHT);
      pointer.setAttribute("x1", at);
      pointer.setAttribute("x2", at);
      const texts = curves.map((curve) => {
        let nearest = -1, distance = Infinity;
        curve.xs.forEach((value, i) => {
          const far = Math.abs(x(value) - at);
          if (curve.raw[i] !== null && far < distance) [nearest, distance] = [i, far];
        });
        if (nearest < 0) return "";
        const rows = page.rows[curve.rows];
        const when = `step ${rows.step[nearest].toLocaleString("en")}`;
        const shown = curve.smooth && weight ? `${formatNumber(curve.ys[nearest])} (${formatNumber(curve.raw[nearest])})` : formatNumber(curve.raw[nearest]);
        return `${curve.label} ${shown} at ${when}`.trim();
      });
      readout.textContent = texts.filter(Boolean).join(", ");
    };
  }

  // Draw the charts of a page in the elements with data-chart, and again when its controls or the window change.
  // Returns a function that draws other numbers of the same charts. An abort signal ends it.
  function connect(root, controls, page, signal) {
    const figures = [...root.querySelectorAll("[data-chart]")];
    const drawAll = () => figures.forEach((figure) => drawChart(figure, page, controls));
    const pointAll = (share) => figures.forEach((figure) => figure.pointAt(share));
    for (const figure of figures) {
      const image = figure.querySelector(".image");
      const point = (event) => {
        const box = image.getBoundingClientRect();
        const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
        pointAll(Math.min(1, Math.max(0, share)));
      };
      image.addEventListener("pointerdown", point);
      image.addEventListener("pointermove", point);
      image.addEventListener("pointerleave", () => pointAll(null));
    }
    controls.addEventListener("input", drawAll, { signal });
    window.addEventListener("resize", drawAll, { signal });
    controls.hidden = false;
    drawAll();
    return (newPage) => { page = newPage; drawAll(); };
  }

  return { connect, escapeText, formatNumber, formatTime, findTicks, findRange, buildScale, drawPath };
})();
