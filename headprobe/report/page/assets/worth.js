/* Shapley values of heads or layers, and interactions of two of them. */
"use strict";

headprobe.section("worth", (root, data, page) => {
  const f = headprobe.figures;
  const runs = data.runs.map((run) => run && { values: f.rows(run.values), together: f.rows(run.together) });
  const there = runs.filter(Boolean);
  const of = (name) => f.union(runs, (run) => [...run.values, ...run.together].map((row) => row[name]));
  const state = { ablation: of("ablation")[0], quantity: of("quantity").includes("nll_rise") ? "nll_rise" : "feature_distance", players: f.union(runs, (run) => run.values.map((row) => row.players))[0] };
  const kinds = f.union(runs, (run) => run.together.map((row) => setOf(row)));
  state.pairs = kinds[0];
  const overlays = [];
  const MOST_LISTED = 24;
  const MOST_ACROSS = 36; // pixels: longer names of columns are cut

  /** What the two parts of a row are: heads, layers, or other sets; and which index it is. */
  function setOf(row) {
    const both = (form) => form.test(row.a) && form.test(row.b);
    const what = both(/^\d+\.\d+$/) ? "heads" : both(/^\d+$/) ? "layers" : "sets";
    return `${row.kind} ${what}`;
  }
  const PAIRS = { "pairwise heads": "two heads", "pairwise layers": "two layers", "pairwise sets": "two sets", "shapley layers": "two layers, over all sets of the others" };

  const parts = page.html("div", {});
  root.append(f.controls(state, [
    { key: "quantity", label: "Loss", buttons: true, options: ["nll_rise", "drop_pp", "feature_distance"].filter((name) => of("quantity").includes(name)).map((name) => [name, f.SHORT[name]]) },
    { key: "ablation", label: "Ablation", buttons: true, options: of("ablation").map((kind) => [kind, kind]) },
    { key: "players", label: "Shapley values of", buttons: true, options: f.union(runs, (run) => run.values.map((row) => row.players)).map((name) => [name, name]) },
    { key: "pairs", label: "Interactions of", buttons: true, options: kinds.map((kind) => [kind, PAIRS[kind] || kind]) },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    overlays.length = 0;
    f.perRun(parts, runs, width, (run, part) => {
      part.append(page.html("div", { class: "panels" }, [shapley(run, width), interactions(run, width)]));
    });
    outline(page.selected());
  });

  function chosen(rows) {
    return rows.filter((row) => row.ablation === state.ablation && row.quantity === state.quantity);
  }
  function valuesOf(run) {
    return chosen(run.values).filter((row) => row.players === state.players);
  }

  function shapley(run, width) {
    const rows = valuesOf(run);
    if (!rows.length) return run.values.length ? page.html("p", { class: "note" }, "No Shapley values of this kind in this run.") : null;
    const domain = page.nice(page.extent([0, there.flatMap((one) => valuesOf(one).flatMap((row) => [row.value, row.value_low, row.value_high]))]), { zero: true });
    const layers = f.distinct(rows.map((row) => row.layer));
    const plot = page.plot({
      width, height: 360, margin: { top: 46 },
      x: { names: layers.map(String), label: "layer" },
      y: { domain, label: f.LABELS[state.quantity] },
      label: `Shapley values of ${state.players}`,
    });
    f.title(plot, `Shapley values of ${state.players}, ${state.ablation} ablation`, sampled(rows[0]));
    plot.inner.append(page.svg("line", { class: "zero", x1: 0, x2: plot.width, y1: plot.y(0), y2: plot.y(0) }));
    const points = layers.flatMap((layer, centre) => {
      const own = rows.filter((row) => row.layer === layer);
      const xs = f.spread(own.map((row) => row.value ?? NaN), plot.x(centre), plot.x.step);
      return own.map((row, place) => value(plot, row, xs[place]));
    });
    f.points(plot, points, `Shapley values of ${state.players}`);
    const holder = f.holder(width, plot.svg);
    holder.append(f.legend([{ text: "hollow: the interval holds 0", colour: 0, shape: 0, hollow: true, line: false }], width));
    return holder;
  }

  function sampled(row) {
    if (!row.orders) return "exact, over all sets of layers";
    return `${row.orders} random orders${row.reversed ? `, ${row.reversed} with their reverse` : ""}; bars: 95% over orders and images`;
  }

  function value(plot, row, x) {
    const head = Number.isFinite(row.head) ? `${row.layer}.${row.head}` : null;
    const y = plot.y(row.value ?? NaN);
    plot.inner.append(f.bar({ x, y: plot.y(row.value_low ?? NaN), y2: plot.y(row.value_high ?? NaN), colour: 0, head, width: 1.2, opacity: 0.65 }) || "");
    const node = f.dot({ x, y, colour: 0, radius: 4.6, hollow: !(row.value_low > 0 || row.value_high < 0), head });
    if (Number.isFinite(x) && Number.isFinite(y)) plot.inner.append(node);
    const lines = [head ? `Head ${head}` : `Layer ${row.layer}`, `share in the loss ${f.estimate(row.value, row.value_low, row.value_high, f.UNITS[state.quantity])}`];
    lines.push(`standard error over orders ${page.number(row.value_se_orders)}, over images ${page.number(row.value_se_images)}`);
    return { x, y, node, series: 0, lines };
  }

  // -- interactions: a matrix for each layer, or one of all parts --

  function interactions(run, width) {
    const rows = chosen(run.together).filter((row) => setOf(row) === state.pairs);
    if (!rows.length) return run.together.length ? page.html("p", { class: "note" }, "No interactions of this kind in this run.") : null;
    const limit = Math.max(...there.flatMap((one) => chosen(one.together).filter((row) => setOf(row) === state.pairs).map((row) => Math.abs(row.interaction ?? 0)))) || 1;
    const cells = new Map(rows.flatMap((row) => [[`${row.a} ${row.b}`, row], [`${row.b} ${row.a}`, row]]));
    const layerOf = (name) => name.split(".")[0];
    const same = state.pairs.endsWith("heads") ? rows.filter((row) => layerOf(row.a) === layerOf(row.b)) : [];
    const between = rows.filter((row) => !same.includes(row));
    const listed = same.length && between.length <= MOST_LISTED; // few pairs of two layers: a list below the matrices
    const within = same.length > 0 && listed;
    const names = f.distinct((within ? same : rows).flatMap((row) => [row.a, row.b])).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const groups = within ? [...f.byKey(names, layerOf).values()] : [names];
    const most = Math.max(...groups.map((own) => own.length));
    const beside = Math.max(150, Math.floor((width + 16) / groups.length) - 16); // as many as fit, as wide as they can
    const room = within ? Math.min(width - 4, groups.length > 6 ? 186 : Math.min(290, beside)) : Math.min(width - 4, 560);
    const unit = Math.max(2, Math.min(within ? 38 : 44, (room - (within ? 28 : 112)) / most));
    const holder = f.holder(width);
    const measure = `interaction (${f.UNITS[state.quantity]})`;
    const heading = `Interactions of ${PAIRS[state.pairs] || state.pairs}, ${state.ablation} ablation`;
    holder.append(f.heading(heading, width, page.runs.length > 1 ? 4 : 3), page.colourBar({ low: -limit, high: limit, kind: "diverging", label: measure }));
    holder.append(page.html("div", { class: "panels" }, groups.map((own) => matrix(own, cells, unit, limit, within, layerOf))));
    if (listed && between.length) holder.append(list(between, width));
    holder.append(page.html("p", { class: "note" }, `Above 0: both together cost more than the sum of each. Framed cell, full dot: told from 0 (q below ${data.clear_q}). Cell without a frame, hollow dot: not.`));
    return holder;
  }

  /** Pairs of heads of two layers, one below the other, with their intervals. */
  function list(rows, width) {
    const values = rows.flatMap((row) => [row.interaction, row.interaction_low, row.interaction_high]);
    const room = Math.ceil(Math.max(...rows.map((row) => f.textWidth(`${row.a} and ${row.b}`, 12)))) + 16;
    const plot = page.plot({
      width: Math.min(width, 900), height: 80 + 22 * rows.length, margin: { top: 34, left: room },
      x: { domain: page.nice(page.extent([values, 0]), { zero: true }), label: `interaction (${f.UNITS[state.quantity]})`, grid: true },
      y: { names: rows.map((row) => `${row.a} and ${row.b}`), ticks: rows.length },
      label: "Interactions of heads of two layers",
    });
    f.title(plot, "heads of two layers");
    plot.inner.append(page.svg("line", { class: "zero", x1: plot.x(0), x2: plot.x(0), y1: 0, y2: plot.height }));
    const points = rows.map((row, place) => {
      const [x, y] = [plot.x(row.interaction ?? NaN), plot.y(place)];
      plot.inner.append(f.bar({ x: plot.x(row.interaction_low ?? NaN), x2: plot.x(row.interaction_high ?? NaN), y, colour: 0, head: `${row.a} ${row.b}` }) || "");
      const node = f.dot({ x, y, colour: 0, radius: 4.6, hollow: !(row.bh_q < data.clear_q), head: `${row.a} ${row.b}` });
      if (Number.isFinite(x)) plot.inner.append(node);
      return { x, y, node, series: 0, lines: said(row.a, row.b, row) };
    });
    f.points(plot, points, "Interactions of heads of two layers");
    return plot.svg;
  }

  function said(a, b, row) {
    const unit = f.UNITS[state.quantity];
    const limits = f.estimate(row.interaction, row.interaction_low, row.interaction_high, unit);
    return [`${a} and ${b}`, `interaction ${limits}`, `both together ${page.number(row.rise_both)} ${unit}`, `q ${page.number(row.bh_q, 2)}`];
  }

  function matrix(names, cells, unit, limit, within, layerOf) {
    const text = (name) => (within ? name.split(".")[1] : name);
    const edge = { left: within ? 26 : Math.min(110, 14 + Math.max(...names.map((name) => f.textWidth(text(name), 12)))), top: within ? 38 : 22 };
    const side = Math.max(edge.left + unit * names.length + 2, 84);
    const height = Math.round(edge.top + unit * names.length + 4);
    const inner = page.svg("g", { transform: `translate(${edge.left},${edge.top})` });
    const svg = page.svg("svg", { viewBox: `0 0 ${side} ${height}`, width: side, height }, inner);
    const title = within ? `layer ${layerOf(names[0])}` : "";
    if (title) svg.append(page.svg("text", { class: "name", x: edge.left, y: 14 }, title));
    const widest = Math.max(...names.map((name) => f.textWidth(text(name), 12)));
    const [down, across] = [14, Math.min(widest, MOST_ACROSS) + 4].map((least) => Math.ceil(least / unit));
    names.forEach((name, place) => {
      const at = (place + 0.5) * unit;
      if (place % down === 0) svg.append(page.svg("text", { class: "tick", x: edge.left - 5, y: edge.top + at + 4, "text-anchor": "end" }, f.cut(text(name), edge.left - 8, 12)));
      if (place % across === 0) svg.append(page.svg("text", { class: "tick", x: edge.left + at, y: edge.top - 5, "text-anchor": "middle" }, f.cut(text(name), across * unit - 2, 12)));
    });
    const points = [];
    names.forEach((a, y) => names.forEach((b, x) => {
      const place = { x: x * unit + 0.5, y: y * unit + 0.5, width: Math.max(1, unit - 1), height: Math.max(1, unit - 1) };
      const row = cells.get(`${a} ${b}`);
      if (!row || !Number.isFinite(row.interaction)) return inner.append(page.svg("rect", { ...place, fill: a === b ? "var(--line)" : "var(--none)" }));
      points.push(cell(inner, a, b, row, place, unit, limit));
    }));
    const plot = { svg, inner };
    f.points(plot, points, `Interactions ${title}`);
    overlays.push({ names, unit, group: inner.appendChild(page.svg("g", {})) });
    return svg;
  }

  function cell(inner, a, b, row, place, unit, limit) {
    const clear = row.bh_q < data.clear_q;
    const node = page.svg("rect", { ...place, class: "pair", fill: page.ramp(row.interaction, -limit, limit, "diverging"), "fill-opacity": clear ? null : 0.45 });
    inner.append(node);
    const middle = [place.x + place.width / 2, place.y + place.height / 2];
    const text = page.fixed(row.interaction, state.quantity === "drop_pp" ? 1 : 2);
    if (unit >= 30 && f.textWidth(text, 11) < unit) {
      const fill = clear ? page.ink(row.interaction, -limit, limit, "diverging") : "var(--ink)";
      inner.append(page.svg("text", { class: "cell", x: middle[0], y: middle[1] + 4, "text-anchor": "middle", fill, "pointer-events": "none" }, text));
    }
    if (clear) inner.append(page.svg("rect", { x: place.x + 1, y: place.y + 1, width: Math.max(1, place.width - 2), height: Math.max(1, place.height - 2), fill: "none", stroke: "var(--ink)", "stroke-width": 1.2, "pointer-events": "none" }));
    const heads = [a, b].filter((name) => /^\d+\.\d+$/.test(name));
    return { x: middle[0], y: middle[1], node, series: a, lines: said(a, b, row), act: heads.length ? () => page.select(heads) : null };
  }

  /** Rows and columns of the selected heads get an outline. */
  function outline(heads) {
    const wanted = new Set(heads);
    for (const { names, unit, group } of overlays) {
      const places = names.map((name, place) => [name, place]).filter(([name]) => wanted.has(name));
      f.outline(group, places.map(([, place]) => place), names.length, unit);
    }
  }
  page.onSelect(outline);

  root.exportTable = () => f.table(runs, (run) => [
    ...run.values.map((row) => ({ table: "shapley", ...row })),
    ...run.together.map((row) => ({ table: "interactions", ...row })),
  ]);
});
