/* What each layer costs: drop or rise with its interval, a mark for each ablation. */
"use strict";

headprobe.section("layers", (root, data, page) => {
  const f = headprobe.figures;
  const runs = data.runs.map((run) => run && { ...run, masks: f.rows(run.rows) });
  const there = runs.filter(Boolean);
  const kinds = f.union(runs, (run) => run.masks.map((row) => row.ablation));
  const measures = f.measures(["drop_pp", "nll_rise", "feature_distance"], (name) => there.some((run) => run.masks.some((row) => Number.isFinite(row[name]))));
  const state = { quantity: measures[0][0] };
  const shown = new Set(kinds);

  const parts = page.html("div", {});
  root.append(f.controls(state, [
    { key: "quantity", label: "Measure", buttons: true, options: measures },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    parts.append(f.legend(entries(), width, (key) => {
      if (!shown.delete(key)) shown.add(key);
      draw();
    }));
    const [low, high] = f.LIMITS[state.quantity];
    const values = there.flatMap((run) => run.masks.filter((row) => shown.has(row.ablation)).flatMap((row) => [row[low], row[high], row[state.quantity]]));
    const domain = page.nice(page.extent([values, 0]), { zero: true });
    const grid = page.html("div", { class: "panels" });
    const alone = there.length === 1;
    const wide = alone ? width : f.panelWidth(width, there.length, 330, 620);
    runs.forEach((run, place) => run && grid.append(panel(run, page.runs.length > 1 ? page.runs[place] : "", wide, domain)));
    parts.append(grid);
    const without = page.runs.filter((_, place) => !runs[place]);
    if (without.length) parts.append(page.html("p", { class: "note" }, `Without masks of whole layers: ${without.join(", ")}.`));
  });

  function entries() {
    const items = kinds.map((kind, place) => ({ text: `${kind} ablation`, key: kind, pressed: shown.has(kind), colour: place, shape: place, line: false }));
    return [...items, { text: "hollow: the interval holds 0", colour: "var(--muted)", shape: 0, hollow: true, line: false }];
  }

  function panel(run, name, width, domain) {
    const layers = run.heads_per_layer.map((_, layer) => String(layer));
    const plot = page.plot({
      width, height: 330, margin: { top: name ? 34 : 12 },
      x: { names: layers, label: "layer whose heads are masked" },
      y: { domain, label: f.LABELS[state.quantity] },
      label: `${f.LABELS[state.quantity]} without each layer ${name}`,
    });
    if (name) f.title(plot, name);
    plot.inner.append(page.svg("line", { class: "zero", x1: 0, x2: plot.width, y1: plot.y(0), y2: plot.y(0) }));
    const own = kinds.filter((kind) => shown.has(kind));
    const gap = Math.min(14, (0.7 * plot.x.step) / Math.max(1, own.length));
    const points = [];
    for (const row of run.masks.filter((one) => shown.has(one.ablation))) {
      const place = kinds.indexOf(row.ablation);
      const x = plot.x(row.layer) + gap * (own.indexOf(row.ablation) - (own.length - 1) / 2);
      points.push(mark(plot, run, row, x, place));
    }
    f.points(plot, points, `What each layer costs ${name}`);
    return plot.svg;
  }

  function mark(plot, run, row, x, place) {
    const [low, high] = f.LIMITS[state.quantity].map((limit) => row[limit]);
    const y = plot.y(row[state.quantity]);
    if (!row.draw) plot.inner.append(f.bar({ x, y: plot.y(low), y2: plot.y(high), colour: place }) || "");
    const clear = low > 0 || high < 0;
    const node = f.dot({ x, y, colour: place, shape: place, radius: row.draw ? 2.6 : 5, hollow: !clear });
    plot.inner.append(node);
    const lines = [`Layer ${row.layer}, ${row.ablation} ablation${row.draw ? `, draw ${row.draw}` : ""}`, ...measures.filter(([name]) => Number.isFinite(row[name])).map(([name, words]) => `${words} ${f.loss(row, name)}`)];
    if (Number.isFinite(row.bh_q)) lines.push(`p ${page.number(row.mcnemar_p, 2)}, q ${page.number(row.bh_q, 2)} (drop, within its family)`);
    return { x, y, node, series: row.ablation, lines, act: () => page.select(f.headsOf(run.heads_per_layer, (layer) => layer === row.layer)) };
  }

  root.exportTable = () => f.table(runs, (run) => run.masks);
});
