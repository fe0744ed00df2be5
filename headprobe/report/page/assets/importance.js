/* Scores against measured costs: a dot for each head, and the rank correlation of every score in a table of dots. */
"use strict";

headprobe.section("importance", (root, data, page) => {
  const f = headprobe.figures;
  const MANY_DECADES = 30; // a positive score whose largest value is so many times its median has a logarithmic axis
  const MOST_BARS = 60; // more intervals hide the dots; the numbers of each are on hover
  const SOURCES = { calibration: ["of calibration images", 0], judged: ["of the images that judge: shares their noise", 1], "": ["of no image", 6] };
  const runs = data.runs.map((run) => run && { ...run, found: f.rows(run.rows) });
  const there = runs.filter(Boolean);
  const of = (name) => f.union(runs, (run) => run.found.map((row) => row[name]));
  const keyOf = (row) => `${row.rows} ${row.score}`;
  const best = () => there[0].found.find((row) => row.ablation === state.ablation && row.target === state.target && row.scope === "all" && row.rows === "calibration" && Number.isFinite(row.spearman)) || there[0].found[0];
  const state = { ablation: of("ablation")[0], target: of("target")[0] };
  state.score = keyOf(best());

  const parts = page.html("div", {});
  const scores = new Map(there.flatMap((run) => run.found.map((row) => [keyOf(row), `${row.score}${row.rows === "judged" ? " (judged images)" : ""}`])));
  const controls = page.html("div", {});
  root.append(controls, parts);
  const dress = () => page.clear(controls).append(f.controls(state, [
    { key: "score", label: "Score", options: [...scores] },
    { key: "ablation", label: "Ablation", buttons: true, options: of("ablation").map((kind) => [kind, kind]) },
    { key: "target", label: "Predicts", buttons: true, options: of("target").map((target) => [target, f.SHORT[target]]) },
  ], () => draw()));
  dress();
  const draw = f.fitted(parts, (width) => {
    const wide = width >= 820;
    f.perRun(parts, runs, width, (run, part) => {
      const sizes = (wide ? [width * 0.46 - 16, width * 0.54] : [Math.min(width, 560), width]).map(Math.floor);
      // What explains the list stands beside it, where it would leave room empty.
      const beside = f.holder(sizes[0], [scatter(run, sizes[0]), f.legend(entries(run), sizes[0]), about(run).map((text) => page.html("p", { class: "note" }, text))]);
      beside.classList.add("stays");
      part.append(page.html("div", { class: "panels" }, [beside, correlations(run, sizes[1])]));
    });
  });

  function about(run) {
    const rule = run.found.map((row) => row.calibration).find(Boolean);
    const from = (rows) => run.found.filter((row) => row.rows === rows);
    const chosen = Math.max(...from("calibration").map((row) => row.images_chosen), 0);
    const judged = page.number(Math.max(...run.found.map((row) => row.images_judged)), 1);
    const own = listed(run);
    const none = own.filter((row) => !Number.isFinite(row.spearman)).length;
    const left = none ? [`${none} ${none === 1 ? "score gives" : "scores give"} no order of the heads (empty, or the same everywhere).`] : [];
    if (rule === "same") return [`Scores and costs are of the same ${judged} images: they share their noise, so correlations flatter.`, ...left];
    const of = [
      ...(chosen ? [`blue scores are of ${page.number(chosen, 1)} calibration images`] : []),
      ...(from("judged").length ? [`orange ${chosen ? "ones" : "scores"} of the ${judged} judged images that the costs are of`] : []),
    ];
    const said = of.length ? of.join(", ") : `costs are of ${judged} images`;
    return [`${said[0].toUpperCase()}${said.slice(1)}.`, ...left];
  }

  /** All scores over all heads, under the ablation and for the loss chosen. */
  function listed(run) {
    return run.found.filter((row) => row.ablation === state.ablation && row.target === state.target && row.scope === "all");
  }

  function entries(run) {
    const kinds = f.distinct(listed(run).filter((row) => Number.isFinite(row.spearman)).map((row) => row.rows));
    const items = kinds.map((kind) => ({ text: SOURCES[kind][0], colour: SOURCES[kind][1], shape: SOURCES[kind][1] % 3 }));
    return [...items, { text: "within layers", colour: "var(--muted)", shape: 2, hollow: true, line: false }, { text: "ceiling", colour: "var(--ink)", dash: "5 4" }];
  }

  function rowOf(run, scope = "all", key = state.score) {
    return run.found.find((row) => row.ablation === state.ablation && row.target === state.target && row.scope === scope && keyOf(row) === key);
  }

  function scatter(run, width) {
    const score = run.scores.find((one) => keyOf(one) === state.score);
    const costs = run.costs[state.ablation];
    const holder = f.holder(width);
    if (!score || !costs) return page.html("p", { class: "note" }, "This run has no such score.");
    const known = score.values.map((value, place) => place).filter((place) => score.values[place] !== null && costs[state.target][place] !== null);
    const xs = known.map((place) => score.values[place]);
    const row = rowOf(run);
    const extent = page.extent(xs);
    if (!extent) return page.html("p", { class: "note" }, `${score.score} has no value in this run; run.json says why.`);
    const median = [...xs].sort((a, b) => a - b)[Math.floor(xs.length / 2)];
    const log = extent[0] > 0 && extent[1] > MANY_DECADES * median;
    const [low, high] = f.LIMITS[state.target];
    const all = there.flatMap((one) => [low, high, state.target].map((name) => one.costs[state.ablation]?.[name] || []));
    const last = Math.max(...run.layer);
    const plot = page.plot({
      width, height: 380, margin: { top: 46 },
      x: { domain: log ? [extent[0] / 1.2, extent[1] * 1.2] : page.nice(extent), log, label: `${score.score}${log ? ", logarithmic" : ""}`, format: (value) => page.number(value, 2) },
      y: { domain: page.nice(page.extent([all, 0]), { zero: true }), label: f.LABELS[state.target] },
      label: `${score.score} of each head against ${f.LABELS[state.target]}`,
    });
    f.title(plot, score.score, row ? `rank correlation ${signed(row)}, ${state.ablation} ablation` : "");
    plot.inner.append(page.svg("line", { class: "zero", x1: 0, x2: plot.width, y1: plot.y(0), y2: plot.y(0) }));
    const points = known.map((place) => {
      const head = `${run.layer[place]}.${run.head[place]}`;
      const [x, y] = [plot.x(score.values[place]), plot.y(costs[state.target][place])];
      const colour = f.layerColour(run.layer[place], last);
      if (known.length <= MOST_BARS) plot.inner.append(f.bar({ x, y: plot.y(costs[low][place] ?? NaN), y2: plot.y(costs[high][place] ?? NaN), colour: "var(--muted)", head, width: 1, opacity: 0.6 }) || "");
      const node = f.dot({ x, y, colour, radius: 5, head });
      node.style.stroke = "var(--muted)";
      plot.inner.append(node);
      return { x, y, node, series: 0, lines: [`Head ${head}`, `${score.score} ${page.number(score.values[place])}`, `${f.SHORT[state.target]} ${f.estimate(costs[state.target][place], costs[low][place], costs[high][place], f.UNITS[state.target])}`] };
    });
    points.sort((a, b) => a.x - b.x);
    f.points(plot, points, `${score.score} of each head against what it costs`);
    holder.append(plot.svg, f.layerBar(last, width));
    return holder;
  }

  function plus(value, digits = 2) {
    return (Number.isFinite(value) ? `${value > 0 ? "+" : ""}${page.fixed(value, digits)}` : "not defined");
  }
  function signed(row, name = "spearman") {
    return plus(row[name]) + (Number.isFinite(row[`${name}_low`]) ? ` [${plus(row[`${name}_low`])}, ${plus(row[`${name}_high`])}]` : "");
  }

  function correlations(run, width) {
    const own = listed(run);
    const rows = own.filter((row) => Number.isFinite(row.spearman));
    const ceiling = own.reduce((best, row) => (row.heads > best.heads ? row : best), own[0] || { heads: 0 }).ceiling;
    const longest = Math.max(0, ...rows.map((row) => f.textWidth(row.score, 12, 600)));
    const room = Math.ceil(Math.min(longest, Math.max(110, width * 0.4 - 14))) + 14;
    const names = rows.map((row) => parted(row.score, room - 14));
    const unit = names.some((lines) => lines.length > 1) ? 30 : 21;
    const holder = f.holder(width);
    const plot = page.plot({
      width, height: 96 + unit * rows.length, margin: { top: 46, left: room, right: 16, bottom: 46 },
      x: { domain: [-1.04, 1.04], ticks: [-1, -0.5, 0, 0.5, 1], label: width < 500 ? "rank correlation (Spearman)" : "Spearman's rank correlation with the cost", grid: true },
      y: { names: rows.map(() => "") },
      label: `Rank correlation of ${rows.length} scores with ${f.LABELS[state.target]}, ${state.ablation} ablation`,
    });
    f.title(plot, "All scores, strongest first", `${state.ablation} ablation; ceiling ${Number.isFinite(ceiling) ? page.fixed(ceiling, 2) : "not defined"}`);
    plot.inner.append(page.svg("line", { class: "zero", x1: plot.x(0), x2: plot.x(0), y1: 0, y2: plot.height }));
    for (const side of Number.isFinite(ceiling) ? [-ceiling, ceiling] : []) plot.inner.append(page.svg("line", { class: "baseline", x1: plot.x(side), x2: plot.x(side), y1: 0, y2: plot.height }));
    const points = rows.map((row, place) => mark(plot, run, row, place, names[place]));
    f.points(plot, points, "Rank correlation of every score");
    holder.append(plot.svg);
    return holder;
  }

  /** A name in two lines, parted behind an underscore, where it is wider than the room for it. */
  function parted(name, room) {
    if (f.textWidth(name, 12, 600) <= room) return [name];
    const lines = f.wrapped(name.replaceAll("_", "_ "), room, 12, 600).map((line) => line.replaceAll("_ ", "_"));
    return lines.length > 2 ? [lines[0], f.cut(lines.slice(1).join(""), room, 12, 600)] : lines;
  }

  function mark(plot, run, row, place, name) {
    const y = plot.y(place);
    const colour = SOURCES[row.rows][1];
    const within = rowOf(run, "within_layers", keyOf(row));
    const chosen = keyOf(row) === state.score;
    const style = chosen ? { "font-weight": 600, fill: "var(--ink)" } : null;
    name.forEach((line, number) => plot.inner.append(page.svg("text", { class: "tick", x: -8, y: y + 4 + 13 * (number - (name.length - 1) / 2), "text-anchor": "end", style }, line)));
    plot.inner.append(f.bar({ x: plot.x(row.spearman_low), x2: plot.x(row.spearman_high), y: y - 3, colour, width: 2 }) || "");
    if (within && Number.isFinite(within.spearman)) {
      plot.inner.append(f.bar({ x: plot.x(within.spearman_low), x2: plot.x(within.spearman_high), y: y + 4, colour: "var(--muted)", width: 1 }) || "");
      plot.inner.append(f.dot({ x: plot.x(within.spearman), y: y + 4, colour: "var(--muted)", shape: 2, radius: 2.6, hollow: true }));
    }
    const node = f.dot({ x: plot.x(row.spearman), y: y - 3, colour, shape: colour % 3, radius: chosen ? 6.5 : 4.6 });
    plot.inner.append(node);
    const lines = [row.score, `over all heads ${signed(row)}`];
    if (within) lines.push(`within layers ${signed(within)}`);
    lines.push(`Kendall ${signed(row, "kendall")}`, `${row.heads} heads; ceiling ${Number.isFinite(row.ceiling) ? page.fixed(row.ceiling, 2) : "not defined"}`, SOURCES[row.rows][0]);
    const act = () => {
      state.score = keyOf(row);
      dress();
      draw();
    };
    return { x: plot.x(row.spearman), y: y - 3, node, series: 0, lines, act };
  }

  root.exportTable = () => f.table(runs, (run) => run.found);
});
