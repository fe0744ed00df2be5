/* Each head index among draws of one random head from each of its layers. */
"use strict";

headprobe.section("indices", (root, data, page) => {
  const f = headprobe.figures;
  const runs = data.runs.map((run) => run && { ...run, found: f.rows(run.rows) });
  const there = runs.filter(Boolean);
  const measures = f.measures(["nll_rise", "drop_pp", "feature_distance"], (name) => there.some((run) => run.found.some((row) => row.quantity === name)));
  const state = { quantity: measures[0][0] };

  const parts = page.html("div", {});
  root.append(f.controls(state, [
    { key: "quantity", label: "Measure", buttons: true, options: measures },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    parts.append(f.legend([
      { text: "the index", colour: 1, shape: 2, line: false },
      { text: "a draw of random heads", colour: "color-mix(in srgb, var(--s0) 40%, var(--panel))", shape: 0, line: false },
      { text: "middle 95% of the draws", colour: 0 },
    ], width));
    const values = there.flatMap((run) => [...run.found.filter((row) => row.quantity === state.quantity).map((row) => row.value), ...run.draws.map((draws) => draws[state.quantity] || [])]);
    const domain = page.nice(page.extent([values, 0]), { zero: true });
    f.perRun(parts, runs, width, (run, part) => {
      const kinds = f.distinct(run.found.map((row) => row.ablation));
      const wide = f.panelWidth(width, f.most(runs, (one) => new Set(one.found.map((row) => row.ablation)).size), 320, 560);
      part.append(page.html("div", { class: "panels" }, kinds.map((kind) => panel(run, kind, wide, domain))));
      const few = run.found.filter((row) => !Number.isFinite(row.p));
      if (few.length) part.append(page.html("p", { class: "note" }, "Where there is no p, there are fewer than 99 draws."));
    });
  });

  function panel(run, kind, width, domain) {
    const rows = run.found.filter((row) => row.ablation === kind && row.quantity === state.quantity);
    const plot = page.plot({
      width, height: 92 + Math.max(34, Math.min(46, 400 / rows.length)) * rows.length, margin: { top: 34, right: 64, left: 74 },
      x: { domain, label: f.LABELS[state.quantity], grid: true },
      y: { names: rows.map((row) => row.mask), ticks: rows.length },
      label: `Each index beside random heads, ${kind} ablation`,
    });
    f.title(plot, `${kind} ablation`);
    plot.inner.append(page.svg("line", { class: "zero", x1: plot.x(0), x2: plot.x(0), y1: 0, y2: plot.height }));
    const points = rows.map((row, place) => mark(plot, run, row, place));
    f.points(plot, points, `Each index beside random heads, ${kind} ablation`);
    return plot.svg;
  }

  function mark(plot, run, row, place) {
    const y = plot.y(place);
    const draws = run.draws.find((one) => one.ablation === row.ablation && one.layers === row.layers);
    const values = (draws?.[state.quantity] || []).filter(Number.isFinite);
    // Spread without chance, so that the same run looks the same: each dot at its place in a fixed pattern.
    const dots = values.map((value, number) => `M${plot.x(value).toFixed(1)} ${(y + 0.6 * plot.y.step * (((number * 0.6180339887) % 1) - 0.5)).toFixed(1)}h0`);
    plot.inner.append(page.svg("path", { d: dots.join(""), stroke: page.series[0], "stroke-width": 4, "stroke-linecap": "round", "stroke-opacity": 0.34, fill: "none" }));
    plot.inner.append(f.bar({ x: plot.x(row.draws_low), x2: plot.x(row.draws_high), y, colour: 0, width: 2.2, opacity: 1 }) || "");
    const node = f.dot({ x: plot.x(row.value), y, colour: 1, shape: 2, radius: 6.5 });
    const p = Number.isFinite(row.p) ? `p ${page.number(row.p, 2)}` : "no p";
    plot.inner.append(node, page.svg("text", { class: "tick", x: plot.width + 8, y: y + 4 }, p));
    const unit = f.UNITS[state.quantity];
    const lines = [
      `${row.mask}, ${row.ablation} ablation, layers ${row.layers}`,
      `${f.SHORT[state.quantity]} ${page.number(row.value)} ${unit}`,
      `${row.draws} draws: mean ${page.number(row.draws_mean)}, middle 95% ${page.interval(row.draws_low, row.draws_high)}`,
      `above ${page.number(row.percentile, 3)}% of the draws; ${p}, q ${page.number(row.bh_q, 2)} (smallest p possible ${page.number(row.p_smallest, 2)})`,
    ];
    const index = Number((row.mask.match(/\d+/) || [])[0]);
    return { x: plot.x(row.value), y, node, series: "indices", lines, act: () => page.select(f.headsOf(run.heads_per_layer, (_, head) => head === index)) };
  }

  root.exportTable = () => f.table(runs, (run) => run.found);
});
