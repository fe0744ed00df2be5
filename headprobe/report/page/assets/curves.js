/* Curves of orders of removal: accuracy or NLL against the heads that are gone, a panel for each run and ablation. */
"use strict";

headprobe.section("curves", (root, data, page) => {
  const f = headprobe.figures;
  const MOST_LINES = 7; // more lines cannot be told apart: the others are off until they are asked for
  const runs = data.runs.map((run) => run && { ...run, points: f.rows(run.rows), singles: f.rows(run.single), areas: f.rows(run.areas) });
  const there = runs.filter(Boolean);
  const measures = f.measures(["top1", "nll", "feature_cosine"], (name) => there.some((run) => Number.isFinite(run.baseline[name])));
  const state = { quantity: measures[0][0], along: differ(there.map((run) => run.heads)) ? "share" : "heads" };

  const orders = f.union(runs, (run) => run.points.map((point) => point.order));
  const means = new Set(there.flatMap((run) => run.points.filter((point) => point.orders > 1).map((point) => point.order)));
  const scored = orders.filter((order) => !means.has(order));
  const shown = new Set([...means, ...largest(), ...(scored.length + means.size ? [] : ["single"])]);
  const hasSingles = there.some((run) => run.singles.length);

  function differ(values) {
    return new Set(values).size > 1;
  }
  function largest() {
    const area = (order) => Math.max(0, ...there.flatMap((run) => run.areas.filter((row) => row.order === order).map((row) => row.area ?? row.feature_area)));
    return [...scored].sort((a, b) => area(b) - area(a)).slice(0, MOST_LINES);
  }

  /** What people call an order; names that are not ours stay as they are. */
  function named(order) {
    const found = order.match(/^(keep_)?(.*?)grow_(.+)_(least|most)(_rescored)?$/);
    if (found) return `${found[2]}${found[3]}, ${found[4]} first${found[5] ? ", scored anew" : ""}${found[1] ? ", the other way round" : ""}`;
    if (!means.has(order)) return order.replace(/^(.*)random_seed_(\d+)$/, "$1random order $2");
    const own = there.flatMap((run) => run.points.filter((point) => point.order === order));
    const counts = f.distinct(own.map((point) => point.orders)).sort((a, b) => a - b);
    const bands = f.distinct(own.map((point) => (point.interval === "one more order" ? "where one more lies with 95%" : "smallest to largest")));
    const count = counts.length > 1 ? `${counts[0]} to ${counts.at(-1)}` : counts[0];
    return `${order === "random" ? "random orders" : order}: mean of ${count}; band: ${bands.join(", of fewer than 10 ")}`;
  }
  const colourOf = (order) => (means.has(order) ? page.series[6] : scored.indexOf(order) % 6);
  const look = (order) => ({ colour: colourOf(order), shape: means.has(order) ? undefined : scored.indexOf(order), dash: means.has(order) ? "" : f.dash(Math.floor(scored.indexOf(order) / 6)) });

  // A point's height and its limits: of accuracy from the drop's, of NLL from the rise's.
  const scale = () => (state.quantity === "top1" ? 100 : 1);
  function heights(run, point) {
    const base = run.baseline[state.quantity];
    // Limits of a drop may lie where no accuracy can.
    const cut = (value) => Math.min(100, Math.max(0, value));
    const beside = (rise) => (rise === null ? NaN : base + rise);
    if (state.quantity === "top1") return [100 * point.top1, cut(100 * base - point.drop_high_pp), cut(100 * base - point.drop_low_pp), point.drop_low_pp];
    if (state.quantity === "feature_cosine") return [point.feature_cosine, point.feature_cosine_low, point.feature_cosine_high, point.feature_cosine_low];
    return [point.nll, beside(point.nll_rise_low), beside(point.nll_rise_high), point.nll_rise_low];
  }
  const along = (run, point) => (state.along === "share" ? (100 * point.heads_removed) / run.heads : point.heads_removed);

  const parts = page.html("div", {});
  const redraw = () => draw();
  root.append(f.controls(state, [
    { key: "quantity", label: "Measure", buttons: true, options: measures },
    { key: "along", label: "Heads removed", buttons: true, options: differ(there.map((run) => run.heads)) ? [["share", "share of all"], ["heads", "number"]] : [["heads", "number"]] },
  ], redraw), parts);
  const draw = f.fitted(parts, (width) => {
    parts.append(f.legend(entries(), width, (key) => {
      if (!shown.delete(key)) shown.add(key);
      draw();
    }));
    const domains = limits();
    f.perRun(parts, runs, width, (run, part) => {
      const kinds = f.distinct([...run.points, ...run.singles].map((point) => point.ablation));
      const wide = f.panelWidth(width, f.most(runs, (one) => new Set(one.points.map((point) => point.ablation)).size), 300, 560);
      const panels = page.html("div", { class: "panels" });
      kinds.forEach((kind) => panels.append(panel(run, kind, wide, domains)));
      part.append(panels);
    });
  });

  function entries() {
    const items = [{ text: "no head removed", colour: "var(--ink)", dash: "5 4" }];
    for (const order of orders) {
      items.push({ text: named(order), key: order, pressed: shown.has(order), band: means.has(order), ...look(order) });
    }
    if (hasSingles) items.push({ text: "each random order", key: "single", pressed: shown.has("single"), colour: page.series[6], thin: true });
    return items;
  }

  function limits() {
    const ys = there.filter((run) => Number.isFinite(run.baseline[state.quantity])).flatMap((run) => [
      scale() * run.baseline[state.quantity],
      ...run.points.filter((point) => shown.has(point.order)).flatMap((point) => heights(run, point).slice(0, 3)),
      ...(shown.has("single") ? run.singles.map((point) => (point[state.quantity] === null ? NaN : scale() * point[state.quantity])) : []),
    ]);
    const xs = there.flatMap((run) => [...run.points, ...run.singles].map((point) => along(run, point)));
    const top = state.quantity === "top1" ? 100 : page.extent(ys)[1];
    return { x: [0, page.extent(xs)[1]], y: state.quantity === "top1" ? [0, 104] : page.nice([0, top], { zero: true }) };
  }

  function panel(run, kind, width, domains) {
    const plot = page.plot({
      width, height: Math.round(Math.min(360, Math.max(270, width * 0.72))), margin: { top: 30 },
      x: { domain: domains.x, label: state.along === "share" ? "heads removed (% of all)" : "heads removed" },
      y: { domain: domains.y, label: f.LABELS[state.quantity], ticks: state.quantity === "top1" ? [0, 20, 40, 60, 80, 100] : null },
      label: `${f.LABELS[state.quantity]} against heads removed, ${kind} ablation`,
    });
    f.title(plot, `${kind} ablation`);
    const base = plot.y(scale() * run.baseline[state.quantity]);
    plot.inner.append(page.svg("line", { class: "baseline", x1: 0, x2: plot.width, y1: base, y2: base }));
    if (shown.has("single")) singles(plot, run, kind);
    const points = [];
    for (const order of [...means, ...scored].filter((name) => shown.has(name))) {
      const own = run.points.filter((point) => point.order === order && point.ablation === kind);
      if (own.length) points.push(...line(plot, run, own, order));
    }
    f.points(plot, points, `Curves of heads removed, ${kind} ablation`);
    return plot.svg;
  }

  function path(plot, run, own, height) {
    const base = run.baseline[state.quantity];
    const start = [plot.x(0), plot.y(base === null ? base : scale() * base)];
    return f.path([start, ...own.map((point) => [plot.x(along(run, point)), plot.y(height(point))])]);
  }

  function line(plot, run, own, order) {
    const { colour, shape, dash } = look(order);
    const paint = typeof colour === "number" ? f.colour(colour) : colour;
    const mean = means.has(order);
    if (mean) {
      const edge = (place) => own.map((point) => [plot.x(along(run, point)), plot.y(heights(run, point)[place])]);
      const d = f.band(edge(2), edge(1));
      if (d) plot.inner.append(page.svg("path", { class: "band", d, fill: paint, "fill-opacity": 0.2 }));
    } else {
      own.forEach((point) => {
        const [, low, high, known] = heights(run, point);
        if (Number.isFinite(known)) plot.inner.append(f.bar({ x: plot.x(along(run, point)), y: plot.y(low), y2: plot.y(high), colour: paint, width: 1.1, opacity: 0.55 }));
      });
    }
    plot.inner.append(page.svg("path", { class: "line", d: path(plot, run, own, (point) => heights(run, point)[0]), stroke: paint, "stroke-width": mean ? 2.4 : 1.8, "stroke-dasharray": dash || null }));
    return own.map((point) => {
      const [x, y] = [plot.x(along(run, point)), plot.y(heights(run, point)[0])];
      const node = f.dot({ x, y, colour, shape: shape || 0, radius: mean ? 1.6 : 4, rim: !mean });
      plot.inner.append(node);
      return { x, y, node, series: order, lines: words(run, point) };
    });
  }

  function words(run, point) {
    const quantity = { top1: "drop_pp", nll: "nll_rise" }[state.quantity] || state.quantity;
    const what = point.orders > 1 ? (point.interval === "one more order" ? "band of one more order" : point.interval) : "95% interval";
    return [
      point.orders > 1 ? `${point.order.replaceAll("_", " ")} orders: mean of ${point.orders}` : named(point.order),
      `${point.heads_removed} of ${run.heads} heads removed, ${point.ablation} ablation`,
      ...(state.quantity === "top1" ? [`top-1 ${page.percent(point.top1)}`] : state.quantity === "nll" ? [`NLL ${page.number(point.nll)} nats`] : []),
      `${f.SHORT[quantity]} ${f.loss(point, quantity)}`,
      `In brackets: ${what}`,
    ];
  }

  function singles(plot, run, kind) {
    const own = f.byKey(run.singles.filter((point) => point.ablation === kind), (point) => point.order);
    for (const points of own.values()) {
      const d = path(plot, run, points, (point) => (point[state.quantity] === null ? NaN : scale() * point[state.quantity]));
      plot.inner.append(page.svg("path", { class: "line", d, stroke: page.series[6], "stroke-width": 0.8, "stroke-opacity": 0.65 }));
    }
  }

  root.exportTable = () => f.table(runs, (run) => [...run.points, ...run.singles]);
});
