/* What masks cost in one run against the same masks in another, and beside it the surest differences. */
"use strict";

headprobe.section("compare", (root, data, page) => {
  const f = headprobe.figures;
  const MOST_BARS = 60; // more intervals hide the dots; the numbers of each are on hover
  const MOST_LISTED = 16;
  const pairs = data.pairs.map((pair) => ({ ...pair, rows: f.rows(pair.rows), ranks: f.rows(pair.ranks) }));
  const state = { pair: "0", family: pairs[0].first, ablation: "", quantity: "" };
  const names = (pair) => [pair.a, pair.b];

  const bar = page.html("div", {});
  const parts = page.html("div", {});
  root.append(bar, parts, page.html("div", {}, data.refused.map((text) => page.html("p", { class: "note" }, text))));
  choices();
  const draw = f.fitted(parts, (width) => {
    const pair = pairs[Number(state.pair)];
    const family = pair.families.find((one) => one.family === state.family);
    const rows = shownOf(pair, family);
    const wide = f.panelWidth(width, 2, 320, 560);
    const last = Math.max(...family.layers.filter((layer) => layer !== null), 0);
    parts.append(page.html("div", { class: "panels" }, [scatter(pair, family, rows, wide, last), listed(pair, family, rows, wide)]));
    if (family.layers.some((layer) => layer !== null)) parts.append(f.layerBar(last, width));
    const test = pair.why ? `Two-sample tests, since ${pair.why}.` : "Paired tests: both runs judged the very same images.";
    parts.append(page.html("p", { class: "note" }, test));
    if (pair.said.length) parts.append(page.html("ul", { class: "note" }, pair.said.map((text) => page.html("li", {}, text))));
  });

  /** The controls of the pair that is chosen; what it does not have gives way to what it has. */
  function choices() {
    const pair = pairs[Number(state.pair)];
    const families = pair.families.map((one) => one.family);
    if (!families.includes(state.family)) state.family = pair.first;
    const inFamily = new Set(pair.families.find((one) => one.family === state.family).masks);
    const own = pair.rows.filter((row) => inFamily.has(row.mask));
    const have = (key) => f.distinct(own.map((row) => row[key]));
    const quantities = Object.keys(data.quantities).filter((name) => have("quantity").includes(name));
    if (!have("ablation").includes(state.ablation)) state.ablation = have("ablation")[0];
    if (!quantities.includes(state.quantity)) state.quantity = quantities[0];
    page.clear(bar).append(f.controls(state, [
      { key: "pair", label: "Runs", options: pairs.map((one, place) => [String(place), names(one).join(" | ")]) },
      { key: "family", label: "Masks", options: families.map((name) => [name, name || "named one by one"]) },
      { key: "ablation", label: "Ablation", options: have("ablation").map((name) => [name, name]) },
      { key: "quantity", label: "Measure", buttons: true, options: quantities.map((name) => [name, capital(data.quantities[name].name)]) },
    ], (key) => {
      if (key === "pair" || key === "family") choices();
      draw();
    }));
  }
  function capital(text) {
    return text[0].toUpperCase() + text.slice(1);
  }
  /** A row for each mask of the form, in its order. */
  function shownOf(pair, family) {
    const own = pair.rows.filter((row) => row.ablation === state.ablation && row.quantity === state.quantity);
    const found = new Map(own.map((row) => [row.mask, row]));
    return family.masks.flatMap((mask, place) => (found.has(mask) ? [{ ...found.get(mask), place }] : []));
  }
  function differs(row) {
    return Number.isFinite(row.bh_q) && row.bh_q <= data.level;
  }
  function unit() {
    return data.quantities[state.quantity].unit;
  }
  function said(row, name) {
    return f.estimate(row[name], row[`${name}_low`], row[`${name}_high`], unit());
  }
  function lines(pair, row) {
    const [one, other] = names(pair);
    const p = Number.isFinite(row.p) ? `p ${page.number(row.p, 2)}${Number.isFinite(row.bh_q) ? `, q ${page.number(row.bh_q, 2)}` : ""}` : "not tested";
    return [row.mask, `${one}: ${said(row, "value_a")}`, `${other}: ${said(row, "value_b")}`, `difference: ${said(row, "b_minus_a")}`, p];
  }
  function plus(value) {
    return `${value > 0 ? "+" : ""}${page.fixed(value, 2)}`;
  }
  function agreement(pair, family) {
    const row = pair.ranks.find((one) => one.test_family === family.family && one.ablation === state.ablation && one.quantity === state.quantity);
    if (!row || !Number.isFinite(row.spearman)) return "rank agreement not defined";
    const limits = Number.isFinite(row.spearman_low) ? ` [${plus(row.spearman_low)}, ${plus(row.spearman_high)}]` : "";
    const ceiling = Number.isFinite(row.ceiling) ? `, noise allows ${page.fixed(row.ceiling, 2)}` : "";
    return `rank agreement ${plus(row.spearman)}${limits}${ceiling}`;
  }

  function scatter(pair, family, rows, width, last) {
    const bars = rows.length <= MOST_BARS;
    const columns = ["value_a", "value_b"].flatMap((name) => (bars ? [name, `${name}_low`, `${name}_high`] : [name]));
    const domain = page.nice(page.extent(rows.flatMap((row) => columns.map((name) => row[name]))) || [0, 1], { zero: state.quantity !== "feature_cosine" });
    const what = capital(data.quantities[state.quantity].name);
    const [one, other] = names(pair).map((name) => f.cut(unit() ? `${name} (${unit()})` : name, width - 110, 13));
    const plot = page.plot({
      width, height: Math.min(width + 30, 480), margin: { top: 46 },
      x: { domain, label: one, grid: true }, y: { domain, label: other },
      label: `${what} of ${rows.length} masks in ${names(pair).join(" and ")}`,
    });
    const differing = rows.filter(differs).length;
    f.title(plot, `${what} of ${family.family || "masks"} under ${state.ablation}`, agreement(pair, family));
    plot.inner.append(page.svg("line", { class: "zero", x1: plot.x(domain[0]), y1: plot.y(domain[0]), x2: plot.x(domain[1]), y2: plot.y(domain[1]), "stroke-dasharray": "3 3" }));
    const points = rows.flatMap((row) => {
      if (!Number.isFinite(row.value_a) || !Number.isFinite(row.value_b)) return [];
      const [x, y] = [plot.x(row.value_a), plot.y(row.value_b)];
      const layer = family.layers[row.place];
      const head = family.heads ? family.heads[row.place] : null;
      const node = f.dot({ x, y, colour: layer === null ? 0 : f.layerColour(layer, last), radius: 5, head });
      node.style.stroke = "var(--muted)";
      if (bars) {
        const look = { colour: "var(--muted)", head, width: 0.9, opacity: 0.45 };
        const ends = (scale, name) => ["low", "high"].map((end) => f.inside(scale, row[`${name}_${end}`] ?? NaN));
        const [left, right] = ends(plot.x, "value_a");
        const [lower, upper] = ends(plot.y, "value_b");
        plot.inner.append(f.bar({ ...look, x: left, x2: right, y }) || "", f.bar({ ...look, x, y: lower, y2: upper }) || "");
      }
      plot.inner.append(node);
      if (differs(row)) plot.inner.append(f.dot({ x, y, colour: "var(--s1)", radius: 9, ring: true }));
      return [{ x, y, node, series: 0, lines: lines(pair, row) }];
    });
    points.sort((a, b) => a.x - b.x);
    f.points(plot, points, `${what}, ${differing} of ${rows.length} masks differ`);
    return plot.svg;
  }

  /** The surest differences, with their intervals; those of few masks in the masks' order. */
  function listed(pair, family, rows, width) {
    const tested = rows.filter((row) => Number.isFinite(row.p));
    if (!tested.length) return page.html("p", { class: "note" }, "These runs do not have what a test of the differences needs.");
    const order = [...tested].sort((a, b) => a.p - b.p || Math.abs(b.b_minus_a) - Math.abs(a.b_minus_a));
    const shown = tested.length > MOST_LISTED ? order.slice(0, MOST_LISTED) : tested;
    const [one, other] = names(pair);
    const domain = page.nice(page.extent([0, shown.flatMap((row) => [row.b_minus_a, row.b_minus_a_low, row.b_minus_a_high])]), { zero: true });
    const longest = Math.min(0.4 * width, Math.max(...shown.map((row) => f.textWidth(row.mask, 12))) + 14);
    const plot = page.plot({
      width, height: 92 + 24 * shown.length, margin: { top: 46, left: Math.max(46, longest) },
      x: { domain, label: `difference${unit() ? ` (${unit()})` : ""}`, grid: true, ticks: 4 },
      y: { names: shown.map((row) => f.cut(row.mask, longest - 10, 12)), ticks: shown.length },
      label: `Differences of ${shown.length} masks`,
    });
    const count = `${rows.filter(differs).length} of ${rows.length} differ`;
    f.title(plot, shown.length < tested.length ? `The ${shown.length} surest differences: ${count}` : `Differences: ${count}`, `right: costs more in ${other} than in ${one}`);
    plot.inner.append(page.svg("line", { class: "zero", x1: plot.x(0), x2: plot.x(0), y1: 0, y2: plot.height }));
    const points = shown.map((row, place) => {
      const [x, y] = [plot.x(row.b_minus_a), plot.y(place)];
      const head = family.heads ? family.heads[row.place] : null;
      const colour = differs(row) ? 1 : 0;
      const node = f.dot({ x, y, colour, shape: colour, head, radius: 4.5, hollow: !differs(row) });
      const [left, right] = ["b_minus_a_low", "b_minus_a_high"].map((name) => f.inside(plot.x, row[name] ?? NaN));
      plot.inner.append(f.bar({ x: left, x2: right, y, colour, head }) || "", node);
      return { x, y, node, series: place, lines: lines(pair, row) };
    });
    f.points(plot, points, `Differences: ${count}`);
    return plot.svg;
  }

  root.exportTable = () => {
    const rows = pairs.flatMap((pair) => pair.rows.map((row) => ({ run_a: names(pair)[0], run_b: names(pair)[1], test: pair.test, ...row })));
    const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
    return Object.fromEntries(columns.map((name) => [name, rows.map((row) => row[name])]));
  };
});
