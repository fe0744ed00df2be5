/* The ladder: a slider over the measured steps of an order; what is lost so far, and which heads are gone. */
"use strict";

headprobe.section("ladder", (root, data, page) => {
  const f = headprobe.figures;
  const runs = data.runs.map((run) => run && { ...run, points: f.rows(run.rows), step: null });
  const there = runs.filter(Boolean);
  const orders = f.union(runs, (run) => Object.keys(run.orders));
  const kinds = f.union(runs, (run) => run.points.map((point) => point.ablation));
  const inAll = (own) => (one) => there.every((run) => own(run).includes(one));
  const shared = (names, own) => (names.some(inAll(own)) ? names.filter(inAll(own)) : names);
  // Without labels the curve is the mean cosine of the feature with the unmasked one.
  const main = there.some((run) => Number.isFinite(run.baseline.top1)) ? "top1" : "feature_cosine";
  const state = best(shared(orders, (run) => Object.keys(run.orders)), shared(kinds, (run) => run.points.map((point) => point.ablation)));

  /** The order and ablation that keep most accuracy in the first run, on average over the steps. */
  function best(names, ablations) {
    let found = { order: names[0], ablation: ablations[0] };
    let most = -1;
    for (const order of names) for (const ablation of ablations) {
      const own = there[0].points.filter((point) => point.order === order && point.ablation === ablation);
      const kept = own.reduce((sum, point) => sum + (point[main] ?? 0), 0) / own.length;
      if (kept > most) [most, found] = [kept, { order, ablation }];
    }
    return found;
  }

  const named = (order) => {
    const found = order.match(/^(keep_)?(.*?)grow_(.+)_(least|most)(_rescored)?$/);
    return found ? `${found[2]}${found[3]}, ${found[4]} first${found[5] ? ", scored anew" : ""}${found[1] ? ", the other way round" : ""}` : order.replaceAll("_", " ");
  };
  const pointsOf = (run) => run.points.filter((point) => point.order === state.order && point.ablation === state.ablation);
  const randomOf = (run) => run.points.filter((point) => point.orders > 1 && point.order === "random" && point.ablation === state.ablation);

  const parts = page.html("div", {});
  root.append(f.controls(state, [
    { key: "order", label: "Order of removal", options: orders.map((order) => [order, named(order)]) },
    { key: "ablation", label: "Ablation", buttons: true, options: kinds.map((kind) => [kind, kind]) },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => f.perRun(parts, runs, width, (run, part) => ladder(run, part, width)));

  function ladder(run, part, width) {
    const points = pointsOf(run);
    if (!points.length) {
      part.append(page.html("p", { class: "note" }, "This run has no such order under this ablation."));
      return;
    }
    run.step = Math.min(run.step ?? Math.round(points.length / 3), points.length);
    const wide = width >= 860;
    const left = page.html("div", {});
    const right = page.html("div", {});
    part.append(page.html("div", { class: `ladder${wide ? " wide" : ""}` }, [left, right]));
    const slider = page.html("input", { type: "range", min: 0, max: points.length, step: 1, "aria-label": "Step of removal" });
    slider.value = run.step;
    const readout = page.html("dl", { class: "readout" });
    const map = page.html("div", {});
    const chart = page.html("div", {});
    const newly = page.html("p", { class: "note newly" });
    const step = (by) => page.html("button", { type: "button", "aria-label": by > 0 ? "Next step" : "Step before", click: () => {
      slider.value = Number(slider.value) + by;
      slider.dispatchEvent(new Event("input"));
    } }, by > 0 ? "+" : "−");
    left.append(page.html("div", { class: "steps" }, [step(-1), slider, step(1)]), readout, newly);
    right.append(page.html("div", { class: "panels" }, [map, chart]));
    const room = wide ? width - 408 : width;
    const show = () => {
      say(run, points, readout, newly, slider);
      const side = Math.min(room >= 600 ? 230 : room, 34 * Math.max(...run.heads_per_layer) + 50);
      page.clear(map).append(drawMap(run, side));
      page.clear(chart).append(drawChart(run, points, Math.min(620, room >= 600 ? room - side - 18 : room)));
    };
    slider.addEventListener("input", () => {
      run.step = Number(slider.value);
      show();
      page.select(gone(run, run.step));
    });
    show();
  }

  function gone(run, step) {
    return run.orders[state.order].slice(0, step).flat();
  }

  function say(run, points, readout, newly, slider) {
    const point = points[run.step - 1];
    const heads = run.heads_per_layer.reduce((sum, count) => sum + count, 0);
    const rows = [
      ["removed", `${point ? point.heads_removed : 0} of ${heads} heads`, "large"],
    ];
    if (main === "top1") rows.push(
      ["top-1 accuracy", page.percent(point ? point.top1 : run.baseline.top1), "large"],
      ["drop", point ? f.loss(point, "drop_pp") : "none: the whole model"],
      ["NLL rise", point ? f.loss(point, "nll_rise") : "none"],
    );
    else rows.push(
      ["feature cosine", point ? page.number(point.feature_cosine) : "1", "large"],
      ["distance", point ? f.loss(point, "feature_distance") : "none: the whole model"],
    );
    const random = point && randomOf(run).find((one) => one.heads_removed === point.heads_removed);
    if (random) rows.push([`${random.orders} random orders`, main === "top1" ? `drop ${f.loss(random, "drop_pp")}` : f.loss(random, "feature_cosine")]);
    page.clear(readout).append(...rows.flatMap(([name, text, size]) => [page.html("dt", {}, name), page.html("dd", { class: size }, text)]));
    const now = run.step ? run.orders[state.order][run.step - 1] : [];
    newly.textContent = run.step ? `New at this step: ${now.join(", ")}.` : "Move the slider to remove heads; they are highlighted in every figure.";
    slider.setAttribute("aria-valuetext", `${rows[0][1]} removed, ${rows[1][0]} ${rows[1][1]}, ${rows[2][0]} ${rows[2][1]}`);
  }

  function drawMap(run, width) {
    const most = Math.max(...run.heads_per_layer);
    const layers = run.heads_per_layer.length;
    const cell = Math.min(30, (width - 40) / most);
    const high = Math.min(cell, 26);
    const taken = new Set(gone(run, run.step));
    const now = new Set(run.step ? run.orders[state.order][run.step - 1] : []);
    const size = [Math.ceil(40 + cell * most + 4), Math.ceil(24 + high * layers + 44)];
    const cells = run.heads_per_layer.flatMap((count, layer) => Array.from({ length: count }, (_, head) => {
      const name = `${layer}.${head}`;
      const fill = now.has(name) ? page.series[1] : taken.has(name) ? "var(--muted)" : "var(--panel)";
      return page.svg("rect", { x: 40 + head * cell + 1.5, y: 22 + layer * high + 1.5, width: cell - 3, height: high - 3, rx: 2, fill, stroke: taken.has(name) ? fill : "var(--muted)", "stroke-opacity": 0.55 });
    }));
    const every = Math.ceil(layers / 14);
    const labels = run.heads_per_layer.map((_, layer) => layer % every ? null : page.svg("text", { class: "tick", x: 34, y: 22 + (layer + 0.5) * high + 4, "text-anchor": "end" }, layer));
    const key = [[page.series[1], "new"], ["var(--muted)", "gone"], ["var(--panel)", "there"]].map(([fill, text], place) => [
      page.svg("rect", { x: 2 + place * 62, y: size[1] - 15, width: 11, height: 11, rx: 2, fill, stroke: "var(--muted)" }),
      page.svg("text", { class: "tick", x: 17 + place * 62, y: size[1] - 5 }, text),
    ]);
    return page.svg("svg", { viewBox: `0 0 ${Math.max(size[0], 186)} ${size[1]}`, width: Math.max(size[0], 186), height: size[1], role: "img" }, [
      page.svg("title", {}, `Heads that are gone at this step: ${[...taken].join(", ") || "none"}`),
      page.svg("text", { class: "label", x: 2, y: 14 }, "layers down, heads across"),
      labels, cells, key,
    ]);
  }

  function drawChart(run, points, width) {
    const most = Math.max(...there.flatMap((one) => pointsOf(one).map((point) => point.heads_removed)), 1);
    const plot = page.plot({
      width, height: 314, margin: { top: 46 },
      x: { domain: [0, most], label: "heads removed" },
      y: main === "top1" ? { domain: [0, 104], label: f.LABELS.top1, ticks: [0, 20, 40, 60, 80, 100] } : { domain: [Math.min(0, ...points.map((point) => point.feature_cosine ?? 0)), 1.04], label: f.LABELS.feature_cosine },
      label: `${f.SHORT[main]} along the order ${named(state.order)}, ${state.ablation} ablation`,
    });
    f.title(plot, named(state.order), `${state.ablation} ablation`);
    const scale = main === "top1" ? 100 : 1;
    const base = scale * run.baseline[main];
    const ends = (point) => (main === "top1" ? [base - (point.drop_low_pp ?? NaN), base - (point.drop_high_pp ?? NaN)] : [point.feature_cosine_low ?? NaN, point.feature_cosine_high ?? NaN]);
    const level = (value) => plot.y(main === "top1" ? Math.min(100, Math.max(0, value)) : Math.min(1, value)); // limits of a drop may lie where no accuracy can
    const at = (point) => [plot.x(point.heads_removed), plot.y(scale * point[main])];
    const band = randomOf(run).filter((point) => point.heads_removed <= most);
    if (band.length > 1) {
      const edge = (end) => band.map((point) => [plot.x(point.heads_removed), level(ends(point)[end])]);
      const d = f.band(edge(0), edge(1));
      if (d) plot.inner.append(page.svg("path", { d, fill: page.series[6], "fill-opacity": 0.18 }));
      const [x, y] = at(band[Math.floor(band.length / 2)]);
      plot.inner.append(page.svg("text", { class: "tick over", x: x - 4, y: y + 4, "text-anchor": "middle" }, "random orders"));
    }
    plot.inner.append(page.svg("line", { class: "baseline", x1: 0, x2: plot.width, y1: plot.y(base), y2: plot.y(base) }));
    plot.inner.append(page.svg("path", { class: "line", d: `M${[[plot.x(0), plot.y(base)], ...points.map(at)].map((place) => place.map((one) => one.toFixed(1)).join(" ")).join("L")}`, stroke: page.series[0], "stroke-width": 2 }));
    const marks = points.map((point, place) => {
      const [x, y] = at(point);
      const own = place + 1 === run.step;
      plot.inner.append(f.bar({ x, y: level(ends(point)[0]), y2: level(ends(point)[1]), colour: own ? 1 : 0, width: own ? 2.4 : 1.1 }) || "");
      const node = f.dot({ x, y, colour: own ? 1 : 0, shape: own ? 2 : 0, radius: own ? 7 : 3.6 });
      plot.inner.append(node);
      return { x, y, node, series: 0, lines: [`${point.heads_removed} heads removed`, ...(main === "top1" ? [`top-1 ${page.percent(point.top1)}`, `drop ${f.loss(point, "drop_pp")}`] : [`feature cosine ${f.loss(point, "feature_cosine")}`])] };
    });
    f.points(plot, marks, `${f.SHORT[main]} along the order`);
    return plot.svg;
  }

  root.exportTable = () => f.table(runs, (run) => Object.entries(run.orders).flatMap(([order, steps]) =>
    run.points.filter((point) => point.order === order).map((point, place, all) => {
      const step = all.filter((one) => one.ablation === point.ablation).indexOf(point);
      return { ...point, heads: steps.slice(0, step + 1).flat().join(" ") };
    })));
});
