/* Matrices of head similarity: small ones within layers, or one of all heads; by layer or clustered. */
"use strict";

headprobe.section("similarity", (root, data, page) => {
  const f = headprobe.figures;
  const SHADES = 40; // cells of like colours share a path: a matrix of 144 heads has 20,736 of them
  const MODELS = { baseline: "whole model", masked: "masked model", change: "change" };
  const runs = data.runs.map((run) => run && { ...run, order: inOrder(run), pairsOf: pairs(run) });
  // Runs that compare tokens and runs that compare images call the same measure by different names.
  const titles = (name) => f.union(runs, (run) => run.measures.filter((one) => one.name === name).map((one) => one.title));
  const measures = new Map(f.union(runs, (run) => run.measures.map((one) => one.name)).map((name) => [name, titles(name).join(" / ")]));
  const models = f.union(runs, (run) => run.measures.flatMap((one) => Object.keys(one.models)));
  const state = { measure: ["cka_unbiased", "svcca"].find((name) => measures.has(name)) || [...measures.keys()][0], order: "layer", model: "baseline" };
  const overlays = [];

  function inOrder(run) {
    const rows = run.layer.map((_, row) => row);
    return rows.sort((a, b) => run.layer[a] - run.layer[b] || run.head[a] - run.head[b]);
  }

  /** The pairs of rows that the numbers belong to, in their order: all of a layer, all, or those that are listed. */
  function pairs(run) {
    if (run.pairs) return run.pairs[0].map((first, place) => [first, run.pairs[1][place]]);
    const found = [];
    for (let a = 0; a < run.layer.length; a++) {
      for (let b = a + 1; b < run.layer.length; b++) if (!run.within || run.layer[a] === run.layer[b]) found.push([a, b]);
    }
    return found;
  }

  const parts = page.html("div", {});
  root.append(f.controls(state, [
    { key: "measure", label: "Similarity", options: [...measures] },
    { key: "model", label: "Of", buttons: true, options: models.map((model) => [model, MODELS[model]]) },
    { key: "order", label: "Order of heads", buttons: true, options: [["layer", "by number"], ["clustered", "similar ones together"]] },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    overlays.length = 0;
    const limit = changeLimit();
    parts.append(page.colourBar({ ...limit, label: barLabel() }));
    f.perRun(parts, runs, width, (run, part) => drawRun(run, part, width, limit));
    outline(page.selected());
  });

  function measureOf(run) {
    return run.measures.find((one) => one.name === state.measure)?.models[state.model];
  }

  function barLabel() {
    const name = measures.get(state.measure);
    return { baseline: name, masked: `${name}, masked model`, change: `change of ${name}` }[state.model];
  }

  function changeLimit() {
    if (state.model !== "change") return { low: 0, high: 1, kind: "sequential" };
    const most = Math.max(...runs.filter(Boolean).flatMap((run) => (measureOf(run)?.value || []).map(Math.abs)), 1) / 1000;
    return { low: -most, high: most, kind: "diverging" };
  }

  function drawRun(run, part, width, limit) {
    const model = measureOf(run);
    if (!model) {
      part.append(page.html("p", { class: "note" }, "This run has no such numbers."));
      return;
    }
    const cells = lookUp(run, model);
    const order = state.order === "clustered" && model.order ? model.order : run.order;
    const panels = page.html("div", { class: "panels" });
    const whole = !run.within;
    const groups = whole ? [order] : f.distinct(run.layer).map((layer) => order.filter((row) => run.layer[row] === layer));
    const most = Math.max(...groups.map((rows) => rows.length));
    const beside = Math.max(230, Math.floor((width + 16) / groups.length) - 16); // as many as fit, as wide as they can
    const room = Math.min(width - 8, whole ? 760 : groups.length > 6 ? 230 : Math.min(320, beside)) - (whole ? 42 : 28);
    const unit = Math.max(2, Math.min(38, room / most));
    groups.filter((rows) => rows.length > 1).forEach((rows) => panels.append(matrix(run, rows, cells, unit, limit, whole)));
    part.append(panels, page.html("p", { class: "note" }, notes(run, model)));
  }

  function notes(run, model) {
    const said = [`Over ${run.note}.`];
    if (run.mask && state.model !== "baseline") said.push(`Mask: ${run.mask}.`);
    if (model.floor) said.push("Pale: at or below the noise floor, what the same heads score on different images.");
    if (run.left_out.length) said.push(`Not on the page, but in similarity.npz: ${run.left_out.join(", ")}.`);
    return said.join(" ");
  }

  function lookUp(run, model) {
    const found = new Map();
    run.pairsOf.forEach(([a, b], place) => {
      const cell = (list) => (list && list[place] !== null ? list[place] / 1000 : NaN);
      const own = { value: cell(model.value), floor: cell(model.floor), low: cell(model.low), high: cell(model.high) };
      found.set(`${a} ${b}`, own);
      found.set(`${b} ${a}`, model.mirrored ? { ...own, value: cell(model.mirrored), low: NaN, high: NaN } : own);
    });
    return (a, b) => found.get(`${a} ${b}`);
  }

  function matrix(run, rows, cells, unit, limit, whole) {
    const edge = { left: whole ? 40 : 26, top: whole ? 20 : 38 };
    const size = [Math.max(84, Math.ceil(edge.left + unit * rows.length + 2)), Math.round(edge.top + unit * rows.length + 4)];
    const svg = page.svg("svg", { viewBox: `0 0 ${size.join(" ")}`, width: size[0], height: size[1], tabindex: 0, role: "application", "aria-roledescription": "matrix" });
    const inner = page.svg("g", { transform: `translate(${edge.left},${edge.top})` });
    const title = whole ? "All heads" : `layer ${run.layer[rows[0]]}`;
    svg.setAttribute("aria-label", `Similarity of heads, ${title}. Arrow keys move from cell to cell.`);
    if (!whole) svg.append(page.svg("text", { class: "name", x: edge.left, y: 14 }, title));
    inner.append(...paths(rows, cells, unit, limit), ...numbers(rows, cells, unit, limit));
    svg.append(inner, ...labels(run, rows, unit, edge, whole));
    moving(svg, inner, run, rows, cells, unit, edge);
    overlays.push({ run, rows, unit, group: inner.appendChild(page.svg("g", {})) });
    return svg;
  }

  /** One path for all cells of a shade, full or pale, and one for cells without a value. */
  function paths(rows, cells, unit, limit) {
    const found = new Map();
    const gap = unit > 8 ? 1 : 0;
    rows.forEach((a, y) => rows.forEach((b, x) => {
      const cell = a === b ? null : cells(a, b);
      const key = a === b ? "same" : cell && Number.isFinite(cell.value)
        ? `${Math.round(SHADES * Math.min(1, Math.max(0, (cell.value - limit.low) / (limit.high - limit.low))))}${cell.value <= cell.floor ? " pale" : ""}`
        : "none";
      const one = `M${(x * unit).toFixed(2)} ${(y * unit).toFixed(2)}h${(unit - gap).toFixed(2)}v${(unit - gap).toFixed(2)}h${(gap - unit).toFixed(2)}z`;
      found.set(key, (found.get(key) || "") + one);
    }));
    return [...found].map(([key, d]) => {
      if (key === "same") return page.svg("path", { d, fill: "var(--line)" });
      if (key === "none") return page.svg("path", { d, fill: "var(--none)" });
      const value = limit.low + (parseInt(key, 10) / SHADES) * (limit.high - limit.low);
      return page.svg("path", { d, fill: page.ramp(value, limit.low, limit.high, limit.kind), "fill-opacity": key.endsWith("pale") ? 0.38 : null });
    });
  }

  function numbers(rows, cells, unit, limit) {
    if (unit < 27) return [];
    return rows.flatMap((a, y) => rows.map((b, x) => {
      const cell = a === b ? null : cells(a, b);
      if (!cell || !Number.isFinite(cell.value)) return null;
      const fill = cell.value <= cell.floor ? "var(--ink)" : page.ink(cell.value, limit.low, limit.high, limit.kind);
      return page.svg("text", { class: "cell", x: (x + 0.5) * unit, y: (y + 0.5) * unit + 4, "text-anchor": "middle", fill }, page.fixed(cell.value, 2));
    })).filter(Boolean);
  }

  function labels(run, rows, unit, edge, whole) {
    const found = whole ? [page.svg("text", { class: "tick", x: 0, y: edge.top - 5 }, state.order === "layer" ? "layer" : "head")] : [];
    const put = (text, place) => {
      found.push(page.svg("text", { class: "tick", x: edge.left + place * unit, y: edge.top - 5, "text-anchor": "middle" }, text));
      found.push(page.svg("text", { class: "tick", x: edge.left - 5, y: edge.top + place * unit + 4, "text-anchor": "end" }, text));
    };
    if (!whole) rows.forEach((row, place) => put(run.head[row], place + 0.5));
    else if (state.order === "layer") {
      const layers = f.byKey(rows.map((row, place) => [row, place]), ([row]) => run.layer[row]);
      for (const [layer, own] of layers) {
        put(layer, own[0][1] + own.length / 2);
        if (own[0][1]) found.push(page.svg("path", { d: `M${edge.left + own[0][1] * unit} ${edge.top}v${rows.length * unit}M${edge.left} ${edge.top + own[0][1] * unit}h${rows.length * unit}`, stroke: "var(--panel)", "stroke-width": 1.4 }));
      }
    } else rows.forEach((row, place) => place % Math.ceil(16 / unit) || put(`${run.layer[row]}.${run.head[row]}`, place + 0.5));
    return found;
  }

  /** The cell under the pointer, or the one that the arrow keys went to. */
  function moving(svg, inner, run, rows, cells, unit, edge) {
    const cursor = page.svg("rect", { class: "cursor", width: unit, height: unit, visibility: "hidden" });
    svg.append(page.svg("g", { transform: `translate(${edge.left},${edge.top})` }, cursor));
    const name = (row) => `${run.layer[row]}.${run.head[row]}`;
    let at = [0, 1];
    const say = () => {
      const [y, x] = at;
      const cell = rows[y] === rows[x] ? null : cells(rows[y], rows[x]);
      const lines = [`Heads ${name(rows[y])} and ${name(rows[x])}`];
      if (rows[y] === rows[x]) lines.push("the same head");
      else if (!cell || !Number.isFinite(cell.value)) lines.push("no value");
      else {
        lines.push(`${measures.get(state.measure)} ${f.estimate(cell.value, cell.low, cell.high)}`);
        if (Number.isFinite(cell.floor)) lines.push(`noise floor ${page.number(cell.floor)}`);
      }
      cursor.setAttribute("x", x * unit);
      cursor.setAttribute("y", y * unit);
      cursor.setAttribute("visibility", "visible");
      const spot = new DOMPoint((x + 0.5) * unit, y * unit).matrixTransform(inner.getScreenCTM());
      f.tip.show(lines, spot.x, spot.y);
      return lines;
    };
    const hide = () => (cursor.setAttribute("visibility", "hidden"), f.tip.hide());
    const choose = () => page.select(f.distinct([name(rows[at[0]]), name(rows[at[1]])]));
    svg.addEventListener("pointermove", (event) => {
      const spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(inner.getScreenCTM().inverse());
      const next = [Math.floor(spot.y / unit), Math.floor(spot.x / unit)];
      if (next.some((one) => one < 0 || one >= rows.length)) return hide();
      at = next;
      say();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("click", choose);
    const speak = () => f.speak(say().join(", "));
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && speak());
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Enter" || event.key === " ") choose();
      else if (step) {
        at = at.map((one, place) => Math.min(rows.length - 1, Math.max(0, one + step[place])));
        speak();
      } else return;
      event.preventDefault();
    });
  }
  /** Rows and columns of the selected heads get an outline. */
  function outline(heads) {
    const wanted = new Set(heads);
    for (const { run, rows, unit, group } of overlays) {
      const places = rows.map((row, place) => [row, place]).filter(([row]) => wanted.has(`${run.layer[row]}.${run.head[row]}`));
      f.outline(group, places.map(([, place]) => place), rows.length, unit);
    }
  }
  page.onSelect(outline);

  root.exportTable = () => f.table(runs, (run) => {
    const model = measureOf(run);
    if (!model) return [];
    const cells = lookUp(run, model);
    return run.pairsOf.flatMap(([a, b]) => (model.mirrored ? [[a, b], [b, a]] : [[a, b]]).map(([row, column]) => ({
      measure: state.measure, model: state.model, layer_a: run.layer[row], head_a: run.head[row], layer_b: run.layer[column], head_b: run.head[column],
      ...Object.fromEntries(Object.entries(cells(row, column)).map(([name, value]) => [name, Number.isFinite(value) ? value : null])),
    })));
  });
});
