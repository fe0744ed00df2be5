/* The map of heads: a grid of buttons, a row per layer, coloured by any column; arrow keys move, Enter opens a card. */
"use strict";

headprobe.section("heads", (root, data, page) => {
  const many = data.runs.length > 1;
  const start = location.hash;
  const columns = new Map(); // of all runs, by key, in order
  for (const run of data.runs) for (const column of run.columns) if (!columns.has(column.key)) columns.set(column.key, column);

  const places = data.runs.map((run) => run.heads_per_layer.flatMap((heads, layer) => Array.from({ length: heads }, (_, head) => ({ layer, head }))));
  const wide = Math.max(...data.runs.flatMap((run) => run.heads_per_layer)) <= 8 && !many; // cells with room
  const named = ({ layer, head }) => `${layer}.${head}`;

  // -- which column colours the map --

  const choice = page.html("select", { id: "column", change: () => paint() });
  for (const group of new Set([...columns.values()].map((column) => column.group))) {
    const own = [...columns.values()].filter((column) => column.group === group);
    choice.append(
      page.html("optgroup", { label: group }, own.map((column) => page.html("option", { value: column.key }, column.label))),
    );
  }
  const highlight = page.html("button", { type: "button", "aria-pressed": "false", class: "toggle", click: () => toggleHighlighting() }, "Highlight heads");
  const legend = page.html("div", { class: "legend" });
  const key = page.html("p", { class: "key" });

  function toggleHighlighting() {
    const on = document.body.classList.toggle("highlighting");
    highlight.setAttribute("aria-pressed", String(on));
  }

  // -- the cells --

  const maps = data.runs.map((run, number) => grid(run, number));
  const cells = maps.flatMap((map) => map.cells);

  function grid(run, number) {
    const name = page.runs[number];
    const widest = Math.max(...run.heads_per_layer);
    const own = [];
    const rows = run.heads_per_layer.map((heads, layer) => {
      const row = Array.from({ length: heads }, (_, head) => {
        const button = page.html("button", { type: "button", class: "cell", tabindex: "-1", "data-head": `${layer}.${head}`, "data-run": number });
        own.push({ button, number, layer, head, index: own.length });
        return page.html("div", { role: "gridcell" }, button);
      });
      return page.html("div", { role: "row", class: "layer" }, [
        page.html("div", { role: "rowheader", class: "name" }, String(layer)),
        page.html("div", { role: "presentation", class: "cells" }, row),
      ]);
    });
    own[0].button.tabIndex = 0;
    const table = page.html("div", { role: "grid", class: widest > 14 ? "heads broad" : "heads", "aria-label": `Heads of ${name}, a row per layer`, style: { "--widest": widest, "--half": Math.ceil(widest / 2), "--layers": rows.length } }, rows);
    table.addEventListener("keydown", (event) => move(event, own, run.heads_per_layer));
    const title = many ? page.html("h3", {}, page.html("bdi", {}, name)) : null;
    return { cells: own, element: page.html("div", { class: "map" }, [title, page.html("div", { class: "axis-name", "aria-hidden": "true" }, "layer"), table]) };
  }

  /** Move the focus within a map; only one of its cells is reached by Tab. */
  function move(event, own, heads) {
    const now = own.find((cell) => cell.button === event.target);
    if (!now || event.altKey || event.ctrlKey || event.metaKey) return;
    let { layer, head } = now;
    const last = heads.length - 1;
    if (event.key === "ArrowRight") head += 1;
    else if (event.key === "ArrowLeft") head -= 1;
    else if (event.key === "ArrowDown") layer += 1;
    else if (event.key === "ArrowUp") layer -= 1;
    else if (event.key === "Home") head = 0;
    else if (event.key === "End") head = heads[layer] - 1;
    else if (event.key === "PageUp") layer = 0;
    else if (event.key === "PageDown") layer = last;
    else return;
    event.preventDefault();
    layer = Math.min(last, Math.max(0, layer));
    head = Math.min(heads[layer] - 1, Math.max(0, head));
    focus(own, own.find((cell) => cell.layer === layer && cell.head === head));
  }

  function focus(own, cell) {
    own.forEach((other) => (other.button.tabIndex = other === cell ? 0 : -1));
    cell.button.focus();
  }

  // -- colours and texts --

  const columnOf = (run, name) => run.columns.find((column) => column.key === name);
  const differs = (column, index) => {
    if (column.differs === "q") return column.q[index] !== null && column.q[index] < 0.05;
    if (column.differs === "interval") return column.low[index] !== null && (column.low[index] > 0 || column.high[index] < 0);
    return false;
  };

  /** A value with its unit and what is known of its uncertainty, in words. */
  function spoken(column, index) {
    const value = column.values[index];
    if (value === null) return "not measured";
    const unit = column.unit ? ` ${column.unit}` : "";
    const low = column.low && column.low[index];
    const limits = Number.isFinite(low) ? `, 95% interval ${page.number(low)} to ${page.number(column.high[index])}` : "";
    const error = column.se && Number.isFinite(column.se[index]) ? `, standard error ${page.number(column.se[index], 2)}` : "";
    return `${page.number(value)}${unit}${limits}${error}`;
  }

  function paint() {
    const column = columns.get(choice.value);
    const own = data.runs.map((run) => columnOf(run, choice.value));
    const [low, high] = page.extent(own.map((one) => (one ? one.values : []))) || [0, 1];
    let marked = false;
    for (const { button, number, layer, head, index } of cells) {
      const one = own[number];
      const value = one ? one.values[index] : null;
      const marks = Boolean(one) && differs(one, index);
      marked = marked || marks;
      button.style.background = page.ramp(value, low, high, column.kind);
      button.style.color = page.ink(value, low, high, column.kind);
      button.classList.toggle("differs", marks);
      button.classList.toggle("empty", value === null);
      const place = `Layer ${layer}, head ${head}`;
      const text = one ? spoken(one, index) : "not measured in this run";
      button.setAttribute("aria-label", `${place}: ${column.label} ${text}${marks ? "; differs from nothing" : ""}`);
      button.title = `${place}\n${text}`;
      button.replaceChildren(page.html("span", {}, short(value, low, high)));
    }
    legend.replaceChildren(page.colourBar({ low, high, kind: column.kind || "sequential", label: column.unit ? `${column.label} (${column.unit})` : column.label, width: 300 }));
    const rule = { q: "q below 0.05, corrected for the number of heads", interval: "the 95% interval leaves out 0, not corrected for the number of heads" }[column.differs];
    key.replaceChildren();
    if (rule) key.append(page.html("span", { class: "dot", "aria-hidden": "true" }), ` ${rule}${marked ? "" : ": none here"}. `);
    if (column.note) key.append(`${column.note}. `);
    if (cells.some(({ button }) => button.classList.contains("empty"))) key.append(page.html("span", { class: "hatched", "aria-hidden": "true" }), " not measured. ");
  }

  /** A number that fits into a cell; all cells of a map have the same decimals. */
  function short(value, low, high) {
    if (value === null) return "";
    const size = Math.max(Math.abs(low), Math.abs(high));
    const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : size >= 0.01 ? 3 : 4;
    const text = page.fixed(value, wide ? Math.min(4, digits + 1) : digits);
    if (wide) return text;
    return /[1-9]/.test(text) ? text.replace(/^(−?)0\./, "$1.") : "0"; // no room for a leading zero
  }

  /** The maps as one SVG: what the buttons show, drawn again. */
  root.exportSVG = () => {
    const around = root.querySelector(".maps").getBoundingClientRect();
    const theme = getComputedStyle(document.body);
    const text = (content, x, y, fill, anchor = "middle", size = "11px") =>
      page.svg("text", { x, y, fill, "text-anchor": anchor, "font-size": size, "font-family": theme.fontFamily }, content);
    const marks = [];
    for (const title of root.querySelectorAll(".map h3, .map .name, .map .axis-name")) {
      const box = title.getBoundingClientRect();
      if (box.width) marks.push(text(title.textContent, box.left - around.left, box.top - around.top + box.height * 0.84, theme.color, "start", getComputedStyle(title).fontSize));
    }
    for (const { button } of cells) {
      const box = button.getBoundingClientRect();
      const style = getComputedStyle(button);
      const [x, y] = [box.left - around.left, box.top - around.top];
      marks.push(page.svg("rect", { x, y, width: box.width, height: box.height, rx: 3, fill: style.backgroundColor }));
      const label = button.querySelector("span");
      if (label.getClientRects().length) marks.push(text(label.textContent, x + box.width / 2, y + box.height / 2 + 4, style.color));
      if (button.classList.contains("differs")) marks.push(page.svg("circle", { cx: x + box.width - 5, cy: y + 5, r: 2, fill: style.color }));
    }
    const bar = page.styled(legend.querySelector("svg"));
    bar.setAttribute("y", around.height + 10);
    return page.svg("svg", { width: around.width, height: around.height + 10 + Number(bar.getAttribute("height")) }, [marks, bar]);
  };

  /** All columns of all runs as one table, a row per run and head: what the CSV button saves. */
  root.exportTable = () => {
    const table = {
      run: places.flatMap((own, number) => own.map(() => page.runs[number])),
      layer: places.flatMap((own) => own.map(({ layer }) => layer)),
      head: places.flatMap((own) => own.map(({ head }) => head)),
    };
    const parts = { values: "", low: "_low", high: "_high", se: "_se", p: "_p", q: "_q", least: "_least", most: "_most" };
    for (const name of columns.keys()) {
      for (const [part, end] of Object.entries(parts)) {
        const own = data.runs.map((run) => (columnOf(run, name) || {})[part]);
        if (own.some(Boolean)) table[name + end] = places.flatMap((heads, number) => own[number] || heads.map(() => null));
      }
    }
    return table;
  };

  // -- all together --

  root.append(
    page.html("div", { class: "controls" }, [page.html("label", { for: "column" }, "Colour by"), choice, highlight]),
    page.html("div", { class: many ? "maps many" : "maps" }, maps.map((map) => map.element)),
    page.html("div", { class: "under" }, [legend, key]),
  );
  paint();

  /** The cell of a head, which gets the focus back when its card closes. */
  page.cellOf = (head, run = 0) => {
    const cell = cells.find((one) => one.number === run && named(one) === head);
    return cell && { focus: () => focus(maps[run].cells, cell) };
  };
  headprobe.card(data, page, { places, named, start });
});
