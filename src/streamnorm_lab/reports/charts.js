// Figures drawn from the values that the page holds: a legend that hides methods, a logarithmic axis, values on hover.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
function element(tag, attributes = {}, ...children) {
  const made = /^(svg|g|path|line|circle|text|rect)$/.test(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const tip = element("div", { id: "tip", role: "status" });
document.body.append(tip);
function showTip(content, x, y) {
  tip.replaceChildren(...content);
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(innerWidth - width - 4, x + 14 + width > innerWidth ? x - width - 14 : x + 14)) + "px";
  tip.style.top = Math.max(4, Math.min(innerHeight - height - 4, y - height / 2)) + "px";
  tip.style.visibility = "visible";
}
const hideTip = () => { tip.style.visibility = "hidden"; };
addEventListener("scroll", hideTip, { passive: true });

function marker(shape, x, y, r) {
  const sides = { s: [4, .785, 1.25], D: [4, 0, 1.35], d: [4, 0, 1.2], "^": [3, -1.571, 1.25], v: [3, 1.571, 1.25], "<": [3, 3.142, 1.25],
    ">": [3, 0, 1.25], p: [5, -1.571, 1.15], h: [6, -1.571, 1.15], H: [6, 0, 1.15], 8: [8, .393, 1.1] }[shape];
  const star = { "*": [5, -1.571, .45], P: [4, 0, .42], X: [4, .785, .42] }[shape];
  if (!sides && !star) return element("circle", { cx: x, cy: y, r, class: "mark" });
  const corners = [];
  const [n, turn, inner] = sides || star;
  for (let k = 0; k < (star ? 2 * n : n); k++) {
    const angle = turn + k * Math.PI * (star ? 1 : 2) / n, size = r * (star ? (k % 2 ? inner : 1.4) : inner);
    corners.push(`${(x + size * Math.cos(angle)).toFixed(1)} ${(y + size * Math.sin(angle)).toFixed(1)}`);
  }
  return element("path", { d: `M${corners.join("L")}z`, class: "mark" });
}
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= raw * .999), found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return found.length > 1 || wanted > 20 || !(high > low) ? found : ticks(low, high, 1.5 * wanted);  // one number alone is no scale
}
function logTicks(low, high, wanted) {
  const found = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
    for (const f of [1, 2, 5]) if (f * 10 ** p >= low * .999 && f * 10 ** p <= high * 1.001) found.push(f * 10 ** p);
  const powers = found.filter(t => Math.abs(Math.log10(t) % 1) < 1e-6 || Math.abs(Math.log10(t) % 1) > 1 - 1e-6);
  const kept = found.length > wanted && powers.length > 1 ? powers : found;
  const every = Math.ceil(kept.length / wanted);
  return kept.filter((_, i) => i % every === 0);
}
const plain = value => Math.abs(value) >= 1000 ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

function build(figure) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const sheet = figure.querySelector(".sheet"), hidden = new Set();
  const labels = new Map();
  for (const row of chart.rows) for (const panel of row.panels) {
    for (const line of panel.lines) labels.set(line.label, line);
    for (const missing of panel.missing || []) if (!labels.has(missing.label)) labels.set(missing.label, { ...missing, marker: "X" });
  }
  const state = { log: Boolean(chart.log) };
  const keys = element("div", { class: "keys", role: "group", "aria-label": "Methods shown" });
  for (const [label, { colour, marker: shape }] of labels) {
    const icon = element("svg", { viewBox: "0 0 14 14", class: "line", style: `--c:${colour}`, "aria-hidden": "true" }, marker(shape, 7, 7, 5));
    const key = element("button", { class: "key", type: "button", "aria-pressed": "true", title: "Click: hide or show. Double click: this one alone" }, icon, label);
    const press = () => [...keys.querySelectorAll(".key")].forEach(k => k.setAttribute("aria-pressed", String(!hidden.has(k.textContent))));
    key.addEventListener("click", () => { hidden.has(label) ? hidden.delete(label) : hidden.add(label); press(); draw(); });
    key.addEventListener("dblclick", () => {
      const alone = hidden.size === labels.size - 1 && !hidden.has(label);
      hidden.clear();
      if (!alone) for (const other of labels.keys()) if (other !== label) hidden.add(other);
      press(); draw();
    });
    keys.append(key);
  }
  const xs = chart.rows.flatMap(row => row.panels.flatMap(panel => panel.lines.flatMap(line => line.x)));
  if (!chart.names && Math.min(...xs) > 0 && Math.max(...xs) > 3 * Math.min(...xs)) {
    const box = element("input", { type: "checkbox" });
    box.checked = state.log;
    box.addEventListener("change", () => { state.log = box.checked; draw(); });
    keys.append(element("label", {}, box, "logarithmic axis"));
  }
  const most = Math.max(...chart.rows.map(row => row.panels.length)), one = chart.rows.length === 1 && most === 1;
  const panels = element("div", { class: "panels" });
  const head = chart.subtitle ? [element("h3", {}, chart.title), element("p", {}, chart.subtitle)] : [];
  sheet.replaceChildren(...head, keys, panels);
  function draw() {
    hideTip();
    panels.replaceChildren();
    const columns = Math.max(1, Math.min(most, Math.floor(sheet.clientWidth / 145)));
    panels.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    for (const row of chart.rows) {
      if (!one) panels.append(element("p", { class: "row" }, row.label + (row.lower_is_better ? " (lower is better)" : "")));
      for (const panel of row.panels) {
        const svg = element("svg", { class: "plot", role: "img", "aria-label": `${chart.description}. ${panel.title}` });
        panels.append(element("div", {}, ...(panel.title ? [element("h4", {}, panel.title)] : []), svg));
        plot(svg, chart, row, panel, { hidden, log: state.log, one });
      }
    }
    panels.append(element("p", { class: "row axis" }, chart.x));
  }
  let width = 0;
  new ResizeObserver(() => { if (sheet.clientWidth && sheet.clientWidth !== width) { width = sheet.clientWidth; draw(); } }).observe(sheet);
}

function plot(svg, chart, row, panel, { hidden, log, one }) {
  const shown = panel.lines.filter(line => !hidden.has(line.label)), missing = (panel.missing || []).filter(m => !hidden.has(m.label));
  const width = svg.clientWidth, height = one ? Math.max(270, Math.min(430, width * .5)) : 170;
  svg.style.height = height + "px";
  const left = 44, right = 8, top = one ? 20 : 8, bottom = 22;
  // What is shown fits the axis: the range over all panels of the row, and within the whole row's where a method is cut off.
  let [low, high] = row.span;
  if (hidden.size) {
    const values = row.panels.flatMap(p => p.lines.filter(l => !hidden.has(l.label)).flatMap(l => chart.bands ? l.y : [...l.y, ...(l.low || []), ...(l.high || [])]));
    if (values.length) {
      const least = Math.min(...values), most = Math.max(...values), margin = .08 * (most - least || Math.abs(most) || 1);
      low = Math.max(low, least - margin); high = Math.min(high, most + margin);
      if (high <= low) [low, high] = row.span;
    }
  }
  const floor = missing.length ? (row.lower_is_better ? 0 : 30) : 0, ceiling = missing.length && row.lower_is_better ? 30 : 0;
  const y = v => top + ceiling + (high - v) / (high - low) * (height - top - bottom - floor - ceiling);
  const all = panel.lines.flatMap(line => line.x);
  const first = chart.names ? -.45 : Math.min(...all), last = chart.names ? chart.names.length - .55 : Math.max(...all);
  const to = log ? Math.log : v => v, inset = chart.names ? 0 : 10;
  const x = v => left + inset + (last > first ? (to(v) - to(first)) / (to(last) - to(first)) : .5) * (width - left - right - 2 * inset);
  for (const t of ticks(low, high, Math.max(3, height / 55)))
    svg.append(element("line", { x1: left, x2: width - right, y1: y(t), y2: y(t), class: "grid" }),
      element("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, plain(t) + (row.sign || "")));
  const base = height - bottom;
  svg.append(element("line", { x1: left, x2: width - right, y1: base, y2: base, class: "base" }));
  const room = width - left - right;
  const places = chart.names ? chart.names.map((_, i) => i) : one && new Set(all).size <= 12 && !log ? [...new Set(all)] :
    log ? logTicks(first, last, room / 52) : ticks(first, last, Math.max(2, room / 90));
  for (const t of places) svg.append(element("text", { x: x(t), y: base + 16, "text-anchor": "middle", ...(chart.names ? { class: "name" } : {}) }, chart.names ? chart.names[t] : plain(t)));
  if (one) svg.append(element("text", { x: 0, y: 8, "text-anchor": "start" }, row.label + (row.lower_is_better && !row.label.includes("lower") ? " (lower is better)" : "")));
  const step = chart.names ? Math.min(.28, 6 * (last - first) / room * shown.length) : 0;
  const shift = k => shown.length > 1 ? (k / (shown.length - 1) - .5) * step : 0;
  const inside = v => Math.max(low - .02 * (high - low), Math.min(high + .02 * (high - low), v));
  const breaks = new Set(chart.breaks || []);
  shown.forEach((line, k) => {
    const g = element("g", { class: "line" + (line.faint ? " faint" : ""), style: `--c:${line.colour}` });
    const at = line.x.map(v => x(chart.names ? v + shift(k) : v));
    if (chart.bands && line.low) {
      const corner = values => values.map((v, i) => `${at[i].toFixed(1)} ${y(inside(v)).toFixed(1)}`);
      g.append(element("path", { class: "area", d: `M${[...corner(line.high), ...corner(line.low).reverse()].join("L")}z` }));
    }
    let d = "", pen = "M";
    line.y.forEach((v, i) => {
      if (breaks.has(line.x[i])) pen = "M";
      const beyond = v > high + .03 * (high - low) || v < low - .03 * (high - low);
      d += `${pen}${at[i].toFixed(1)} ${y(inside(v)).toFixed(1)}`;
      pen = beyond && line.y[i + 1] !== undefined && (line.y[i + 1] > high || line.y[i + 1] < low) ? "M" : "L";
    });
    g.append(element("path", { d, class: chart.bands ? "" : "joint" }));
    if (!chart.bands) line.y.forEach((v, i) => {
      if (line.low && line.high[i] > line.low[i]) g.append(element("line", { x1: at[i], x2: at[i], y1: y(inside(line.low[i])), y2: y(inside(line.high[i])) }));
      if (v <= high && v >= low) g.append(marker(line.marker, at[i], y(v), one ? 5 : 2.6));
      if (line.ring === line.x[i]) g.append(element("circle", { class: "ring", cx: at[i], cy: y(inside(v)), r: 6 }));
    });
    svg.append(g);
  });
  for (const place of new Set(missing.map(m => m.x))) {
    const there = missing.filter(m => m.x === place), end = row.lower_is_better ? top : base;
    there.forEach((m, k) => svg.append(element("g", { class: "line", style: `--c:${m.colour}` }, marker("X", x(place) + 13 * (k - (there.length - 1) / 2), end, 4.5))));
    svg.append(element("text", { x: x(place), y: end + (row.lower_is_better ? 20 : -9), "text-anchor": "middle" }, width > 520 ? "cannot train" : "fails"));
  }
  const cross = element("line", { class: "cross", y1: top, y2: base, visibility: "hidden" });
  svg.append(cross);
  const candidates = [...new Set([...shown.flatMap(line => line.x), ...missing.map(m => m.x)])];
  const number = v => v.toFixed(row.digits ?? 1) + (row.sign || "");
  const point = event => {
    if (!candidates.length) return;
    const mouse = event.clientX - svg.getBoundingClientRect().left;
    const place = candidates.reduce((a, b) => Math.abs(x(b) - mouse) < Math.abs(x(a) - mouse) ? b : a);
    cross.setAttribute("x1", x(place)); cross.setAttribute("x2", x(place)); cross.setAttribute("visibility", "visible");
    const found = shown.map(line => [line, line.x.indexOf(place)]).filter(([, i]) => i >= 0);
    found.sort(([a, i], [b, j]) => (row.lower_is_better ? 1 : -1) * (a.y[i] - b.y[j]));
    const lines = found.map(([line, i]) => element("tr", {}, element("td", {}, element("span", { class: "dot", style: `--c:${line.colour}` }), line.label),
      element("td", {}, number(line.y[i])), element("td", {}, line.low && line.high[i] > line.low[i] ? `${number(line.low[i])} – ${number(line.high[i])}` : "")));
    const failing = missing.filter(m => m.x === place).map(m => element("tr", {}, element("td", {}, m.label), element("td", {}, "cannot train")));
    const where = chart.names ? chart.names[place] : `${plain(place)}`;
    showTip([element("b", {}, chart.names ? where : `${chart.x}: ${where}`), element("table", {}, element("tbody", {}, ...lines, ...failing))], event.clientX, event.clientY);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => { hideTip(); cross.setAttribute("visibility", "hidden"); });
}
document.querySelectorAll("figure.chart").forEach(build);
