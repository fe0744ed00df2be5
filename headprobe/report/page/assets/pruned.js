/* The smaller model: what sets of heads cost and how fast they are, the chosen one, and what was folded where. */
"use strict";

headprobe.section("pruned", (root, data, page) => {
  const f = headprobe.figures;
  const runs = data.runs.map((run) => run && { ...run, setRows: f.rows(run.sets), speedRows: f.rows(run.speeds) });
  const there = runs.filter(Boolean);
  const measures = f.measures(["drop_pp", "nll_rise", "feature_distance"], (name) => there.some((run) => run.setRows.some((row) => Number.isFinite(row[name]))));
  const state = { quantity: measures[0][0] };
  const batches = f.distinct(there.flatMap((run) => run.speedRows.map((row) => row.batch))).sort((a, b) => a - b);
  const most = Math.max(...there.map((run) => run.heads));
  const RING = 9.5;
  const CELL = 22;
  const TITLE = 334; // of the figure of heads, which may have few of them
  const colourOf = (batch) => 1 + batches.indexOf(batch);
  const shapeOf = (batch) => 1 + batches.indexOf(batch);
  const limitOf = (row) => (state.quantity === "drop_pp" ? row.limit_pp : NaN);
  const ends = (row) => f.LIMITS[state.quantity].map((name) => row[name]);
  const ring = (x, y) => f.dot({ x, y, colour: "var(--ink)", shape: 0, radius: RING, ring: true });

  const parts = page.html("div", {});
  root.append(f.controls(state, [{ key: "quantity", label: "Loss", buttons: true, options: measures }], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    parts.append(f.legend(entries(), width));
    const wide = f.panelWidth(width, 2, 300, 560);
    const domains = { loss: losses(), speed: speeds() };
    f.perRun(parts, runs, width, (run, part) => {
      part.append(
        page.html("div", { class: "panels" }, [loss(run, wide, domains.loss), speed(run, wide, domains.speed)]),
        page.html("div", { class: "panels", style: "margin-top:14px" }, [folded(run, width), facts(run)]),
      );
    });
  });

  // -- what stands in both figures --

  function entries() {
    const sizes = batches.map((batch) => ({ text: `speed at batch ${batch}`, colour: colourOf(batch), shape: shapeOf(batch), line: false }));
    const tested = there.some((run) => run.setRows.some((row) => row.tested === 0));
    return [
      { text: "a set that was judged", colour: 0, shape: 0, line: false },
      ...(tested ? [{ text: "judged, behind the first that failed", colour: 0, shape: 0, hollow: true, line: false }] : []),
      ...sizes,
      { text: "the model that was written", colour: "var(--ink)", shape: 0, ring: true, line: false },
    ];
  }
  function losses() {
    const values = there.flatMap((run) => [0, state.quantity === "drop_pp" ? run.most_pp : NaN, ...run.setRows.flatMap((row) => [row[state.quantity], ...ends(row), limitOf(row)])]);
    return page.nice(page.extent(values), { zero: true });
  }
  function speeds() {
    const values = there.flatMap((run) => [1, run.wanted.speed, ...run.speedRows.flatMap((row) => [row.speed, row.speed_least, row.speed_most])]);
    return page.nice(page.extent(values), { room: 0.08 });
  }

  /** A dashed line with its name above it, or below. */
  function level(plot, value, text, above = true) {
    if (!Number.isFinite(value)) return;
    const y = plot.y(value);
    plot.inner.append(page.svg("line", { class: "baseline", x1: 0, x2: plot.width, y1: y, y2: y }));
    plot.inner.append(page.svg("text", { class: "tick over", x: plot.width - 2, y: above ? y - 5 : y + 14, "text-anchor": "end" }, text));
  }

  // -- what is lost --

  function loss(run, width, domain) {
    const rows = run.setRows.filter((row) => Number.isFinite(row[state.quantity]));
    const label = `${f.LABELS[state.quantity]} against heads removed`;
    const plot = page.plot({
      width, height: 320, margin: { top: 46 },
      x: { domain: [0, most], label: `heads removed (of ${run.heads})` },
      y: { domain, label: f.LABELS[state.quantity] },
      label,
    });
    const marks = rows.some((row) => Number.isFinite(limitOf(row)));
    f.title(plot, `${f.SHORT[state.quantity]}, ${run.ablation} ablation`, marks ? "bars: 95% interval; strokes: upper one-sided limit" : "bars: 95% interval");
    plot.inner.append(page.svg("line", { class: "zero", x1: 0, x2: plot.width, y1: plot.y(0), y2: plot.y(0) }));
    if (state.quantity === "drop_pp") level(plot, run.most_pp, `allowed: ${run.most_pp} points`);
    if (rows.length > 1) {
      const line = f.path([[plot.x(0), plot.y(0)], ...rows.map((row) => [plot.x(row.heads), plot.y(row[state.quantity])])]);
      plot.inner.append(page.svg("path", { class: "line", d: line, stroke: page.series[0], "stroke-width": 1.4, "stroke-opacity": 0.6 }));
    }
    f.points(plot, rows.map((row) => lost(plot, run, row)), label);
    return plot.svg;
  }

  function lost(plot, run, row) {
    const [x, y] = [plot.x(row.heads), plot.y(row[state.quantity])];
    const [low, high] = ends(row);
    plot.inner.append(f.bar({ x, y: plot.y(low), y2: plot.y(high), colour: 0, width: 1.2, opacity: 0.6 }) || "");
    if (Number.isFinite(limitOf(row))) plot.inner.append(f.bar({ x: x - 4, x2: x + 4, y: plot.y(limitOf(row)), y2: plot.y(limitOf(row)), colour: "var(--ink)", width: 1.6, opacity: 1 }));
    const node = f.dot({ x, y, colour: 0, shape: 0, radius: 4.2, hollow: row.tested === 0 });
    plot.inner.append(node, row.chosen ? ring(x, y) : "");
    const tests = row.tested === 0 ? "; behind the first that failed, so it counts for nothing" : "";
    return {
      x, y, node, series: 0,
      lines: [
        `${row.heads} of ${run.heads} heads removed${row.chosen ? ": the model that was written" : ""}`,
        `${f.SHORT[state.quantity]} ${f.loss(row, state.quantity)}, 95% interval, ${row.images} images`,
        ...(Number.isFinite(limitOf(row)) ? [`upper one-sided 95% limit ${page.number(row.limit_pp)} points${tests}`] : []),
      ],
    };
  }

  // -- how fast it is --

  function speed(run, width, domain) {
    const label = "Speed against heads removed";
    const plot = page.plot({
      width, height: 320, margin: { top: 46 },
      x: { domain: [0, most], label: `heads removed (of ${run.heads})` },
      y: { domain, label: "times as fast as the whole model" },
      label,
    });
    f.title(plot, "Measured speed", `bars: smallest and largest of the pairs; ${run.device}`);
    level(plot, 1, "the whole model", false);
    level(plot, run.wanted.speed, `asked for: ${run.wanted.speed} at batch ${run.wanted.batch}`);
    f.points(plot, run.speedRows.map((row) => timed(plot, run, row)), label);
    return plot.svg;
  }

  function timed(plot, run, row) {
    // Batch sizes of one set stand side by side, so that no bar hides another.
    const beside = 7 * (batches.indexOf(row.batch) - (batches.length - 1) / 2);
    const [x, y] = [plot.x(row.heads) + beside, plot.y(row.speed)];
    const colour = colourOf(row.batch);
    plot.inner.append(f.bar({ x, y: plot.y(row.speed_least), y2: plot.y(row.speed_most), colour, width: 1.6, opacity: 0.7 }) || "");
    const node = f.dot({ x, y, colour, shape: shapeOf(row.batch), radius: 4.6 });
    plot.inner.append(node, row.chosen ? ring(x, y) : "");
    return {
      x, y, node, series: row.batch,
      lines: [
        `${row.heads} of ${run.heads} heads removed, batch ${row.batch}${row.chosen ? ": the model that was written" : ": on the way to it"}`,
        `${page.fixed(row.speed, 2)} times as fast, pairs from ${page.fixed(row.speed_least, 2)} to ${page.fixed(row.speed_most, 2)}`,
        ...(row.chosen ? [`${page.number(row.ms_before)} to ${page.number(row.ms_after)} ms, medians of ${row.pairs} pairs${row.passes > 1 ? `, each timing the mean of ${row.passes} passes` : ""}`] : []),
      ],
    };
  }

  // -- what was folded --

  function folded(run, width) {
    const gone = new Set(run.gone);
    const widest = Math.max(...run.heads_per_layer);
    const texts = 170;
    const cell = Math.min(CELL, Math.floor((Math.min(width, 620) - texts - 70) / widest));
    const whole = Math.max(66 + cell * widest + texts, TITLE);
    const high = 34 + CELL * run.heads_per_layer.length;
    const layers = run.heads_per_layer.map((count, layer) => {
      const y = 26 + CELL * layer;
      const cells = Array.from({ length: count }, (_, head) => square(run, `${layer}.${head}`, 60 + cell * head, y, cell, gone));
      return [
        page.svg("text", { class: "tick", x: 52, y: y + 15, "text-anchor": "end" }, `layer ${layer}`),
        cells,
        page.svg("text", { class: "more", x: 68 + cell * widest, y: y + 15 }, run.folded[layer]),
      ];
    });
    return page.svg("svg", { viewBox: `0 0 ${whole} ${high}`, width: whole, height: high, role: "img", style: "max-width:100%" }, [
      page.svg("title", {}, `Heads that are gone: ${run.gone.join(", ")}`),
      page.svg("text", { class: "name", x: 0, y: 15 }, "Heads that are left, and what was folded"),
      layers,
    ]);
  }

  function square(run, head, x, y, cell, gone) {
    const size = cell - 4;
    const left = !gone.has(head);
    const box = page.svg("rect", { x, y, width: size, height: CELL - 4, rx: 2, fill: left ? page.series[0] : "var(--panel)", stroke: left ? "none" : "var(--muted)", "data-head": head, class: "dot" });
    box.append(page.svg("title", {}, `Head ${head} ${left ? "is left" : "is gone"}`));
    return left ? box : [box, page.svg("path", { d: `M${x + 4} ${y + 4}l${size - 8} ${CELL - 12}m0 ${12 - CELL}l${8 - size} ${CELL - 12}`, stroke: "var(--muted)", "stroke-width": 1.4, "pointer-events": "none" })];
  }

  function facts(run) {
    const change = ([before, after]) => `${page.number(before)} to ${page.number(after)} (${page.fixed((100 * (after - before)) / before, 1)}%)`;
    const fitted = run.fitted_on ? `, fitted on ${page.fixed(run.fitted_on, 0)} images` : "";
    const written = [
      ["Removed", `${run.count} of ${run.heads} heads, ${run.ablation === "zero" ? "nothing" : run.ablation} folded in${fitted}`],
      ["Parameters", change(run.parameters)],
      ["Multiply-adds", change(run.multiply_adds)],
      ...run.speedRows.filter((row) => row.chosen).map((row) => [`Batch of ${row.batch}`, `${page.number(row.ms_before)} to ${page.number(row.ms_after)} ms, ${page.fixed(row.speed, 2)} times as fast`]),
      ["Proof", `logits are the masked model's to ${page.number(run.proof.difference, 2)} of the largest, on ${run.proof.images} images`],
    ];
    return page.html("dl", { class: "readout" }, written.map(([name, text]) => [page.html("dt", {}, name), page.html("dd", {}, text)]));
  }

  root.exportTable = () => f.table(runs, (run) => [...run.setRows, ...run.speedRows]);
});
