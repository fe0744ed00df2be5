/* Masks under one ablation against the same masks under another: a panel for every two ablations. */
"use strict";

headprobe.section("ablations", (root, data, page) => {
  const f = headprobe.figures;
  const MOST_BARS = 60; // more intervals hide the dots; the numbers of each are on hover
  const runs = data.runs.map((run) => run && { ...run, found: f.rows(run.rows) });
  const there = runs.filter(Boolean);
  const families = f.union(runs, (run) => run.families.map((family) => family.family));
  const state = { family: families.includes("each:head") ? "each:head" : families[0], quantity: "" };
  const measures = f.measures(["nll_rise", "drop_pp", "feature_distance"], (name) => there.some((run) => run.found.some((row) => row.quantity === name)));
  state.quantity = measures[0][0];

  const parts = page.html("div", {});
  root.append(f.controls(state, [
    { key: "family", label: "Masks", options: families.map((family) => [family, family]) },
    { key: "quantity", label: "Measure", buttons: true, options: measures },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    const domain = page.nice(page.extent([0, there.flatMap((run) => shownOf(run))]), { zero: true });
    f.perRun(parts, runs, width, (run, part) => {
      const rows = rowsOf(run);
      const family = familyOf(run);
      if (!family || !rows.length) return part.append(page.html("p", { class: "note" }, "This run has no such masks."));
      const wide = f.panelWidth(width, f.most(runs, (one) => rowsOf(one).length), 300, 480);
      part.append(page.html("div", { class: "panels" }, rows.map((row) => panel(row, family, wide, domain))));
      const last = Math.max(...family.layers.filter((layer) => layer !== null), 0);
      if (family.layers.some((layer) => layer !== null)) part.append(f.layerBar(last, width));
      if (state.family === "each:layer" && rows.some((row) => row.ablation_b === "linear"))
        part.append(page.html("p", { class: "note" }, "With all heads of a layer gone linear ablation has none to predict from: it is mean ablation."));
    });
  });

  function rowsOf(run) {
    return run.found.filter((row) => row.test_family === state.family && row.quantity === state.quantity);
  }
  /** All that a panel draws of a run: costs and, where they are drawn, their intervals. */
  function shownOf(run) {
    const family = familyOf(run);
    const names = family?.masks.length <= MOST_BARS ? [state.quantity, ...f.LIMITS[state.quantity]] : [state.quantity];
    return Object.values(family?.kinds || {}).flatMap((costs) => names.flatMap((name) => costs[name] || []));
  }
  function familyOf(run) {
    return run.families.find((family) => family.family === state.family);
  }
  function plus(value) {
    return `${value > 0 ? "+" : ""}${page.fixed(value, 2)}`;
  }

  function agreement(row) {
    if (!Number.isFinite(row.spearman)) return "rank agreement not defined";
    const limits = Number.isFinite(row.spearman_low) ? ` [${plus(row.spearman_low)}, ${plus(row.spearman_high)}]` : "";
    return `rank agreement ${plus(row.spearman)}${limits}, ${row.masks} masks of ${row.test_family}`;
  }

  function panel(row, family, width, domain) {
    const [first, second] = [family.kinds[row.ablation_a], family.kinds[row.ablation_b]];
    const unit = f.UNITS[state.quantity];
    const plot = page.plot({
      width, height: Math.min(width + 30, 470), margin: { top: f.titleRoom(agreement(row), width) },
      x: { domain, label: `${row.ablation_a}: ${f.SHORT[state.quantity]} (${unit})`, grid: true },
      y: { domain, label: `${row.ablation_b}: ${f.SHORT[state.quantity]} (${unit})` },
      label: `${f.SHORT[state.quantity]} under ${row.ablation_a} and ${row.ablation_b}`,
    });
    f.title(plot, `${row.ablation_b} against ${row.ablation_a}`, agreement(row));
    plot.inner.append(page.svg("line", { class: "zero", x1: plot.x(domain[0]), y1: plot.y(domain[0]), x2: plot.x(domain[1]), y2: plot.y(domain[1]), "stroke-dasharray": "3 3" }));
    const last = Math.max(...family.layers.filter((layer) => layer !== null), 0);
    const points = family.masks.flatMap((mask, place) => mark(plot, { row, family, mask, place, first, second, last }));
    points.sort((a, b) => a.x - b.x);
    f.points(plot, points, `${row.ablation_b} against ${row.ablation_a}`);
    return plot.svg;
  }

  function mark(plot, { row, family, mask, place, first, second, last }) {
    const quantity = state.quantity;
    const [low, high] = f.LIMITS[quantity];
    const [a, b] = [first[quantity][place], second[quantity][place]];
    if (a === null || b === null) return [];
    const [x, y] = [plot.x(a), plot.y(b)];
    const heads = family.heads ? family.heads[place] : null;
    const layer = family.layers[place];
    const node = f.dot({ x, y, colour: layer === null ? 0 : f.layerColour(layer, last), radius: 5, head: heads });
    node.style.stroke = "var(--muted)";
    if (family.masks.length <= MOST_BARS) {
      const bars = { colour: "var(--muted)", head: heads, width: 0.9, opacity: 0.45 };
      const [left, right] = [low, high].map((limit) => f.inside(plot.x, first[limit][place] ?? NaN));
      const [lower, upper] = [low, high].map((limit) => f.inside(plot.y, second[limit][place] ?? NaN));
      plot.inner.append(f.bar({ ...bars, x: left, x2: right, y }) || "", f.bar({ ...bars, x, y: lower, y2: upper }) || "");
    }
    plot.inner.append(node);
    const said = (kind, costs) => `${kind}: ${f.estimate(costs[quantity][place], costs[low]?.[place], costs[high]?.[place], f.UNITS[quantity])}`;
    return [{ x, y, node, series: 0, lines: [mask, said(row.ablation_a, first), said(row.ablation_b, second)] }];
  }

  root.exportTable = () => f.table(runs, (run) => run.families.flatMap((family) => family.masks.flatMap((mask, place) =>
    Object.entries(family.kinds).map(([ablation, costs]) => ({
      test_family: family.family, mask, ablation, ...Object.fromEntries(Object.entries(costs).map(([name, values]) => [name, values[place]])),
    })))));
});
