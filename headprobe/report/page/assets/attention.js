/* Statistics of heads by layer: a dot for each head, the means of layers, and where uniform attention would be. */
"use strict";

headprobe.section("attention", (root, data, page) => {
  const f = headprobe.figures;
  const Z95 = 1.96; // standard errors on either side of a mean that make a 95% interval
  const runs = data.runs;
  const there = runs.filter(Boolean);
  const columns = f.union(runs, (run) => Object.values(run.models).flatMap((model) => Object.keys(model.values)));
  const preferred = ["attention_distance_px", "entropy_nats"].filter((name) => columns.includes(name));
  const [left, right] = [...preferred, ...columns.filter((name) => !preferred.includes(name))];
  const hasMask = there.some((run) => run.models.masked);
  const hasChange = there.some((run) => run.models.change);
  const state = { left, right: right || left, show: "values" };
  const titled = (name) => (data.titles[name] || [name.replaceAll("_", " "), name.replaceAll("_", " ")]);

  const parts = page.html("div", {});
  const options = columns.map((name) => [name, titled(name)[0]]);
  root.append(f.controls(state, [
    { key: "left", label: "First figure", options },
    { key: "right", label: "Second figure", options },
    { key: "show", label: "Show", buttons: true, options: [["values", hasMask ? "before and after the mask" : "values"], ...(hasChange ? [["change", "change by the mask"]] : [])] },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    parts.append(f.legend(entries(), width));
    f.perRun(parts, runs, width, (run, part) => {
      const shown = f.distinct([state.left, state.right]);
      const wide = f.panelWidth(width, 2, 320, 640);
      part.append(page.html("div", { class: "panels" }, shown.map((name) => panel(run, name, wide))));
    });
  });

  function entries() {
    const items = [{ text: state.show === "change" ? "masked minus whole model, a head each" : "a head", colour: 0, shape: 0, line: false }];
    if (state.show === "values") {
      items.push({ text: "mean of the layer", colour: 0 });
      if ([state.left, state.right].some((name) => there.some((run) => run.models.baseline?.uniform[name]))) items.push({ text: "uniform attention", colour: "var(--ink)" });
      if (hasMask) items.push({ text: `masked: ${f.distinct(there.map((run) => run.mask).filter(Boolean)).join(", ")}`, colour: 1, shape: 0, ring: true, line: false });
    }
    return items;
  }

  function modelsOf(run) {
    return (state.show === "change" ? [run.models.change] : [run.models.baseline, run.models.masked]).filter(Boolean);
  }

  function limits(name) {
    const values = there.flatMap((run) => modelsOf(run).flatMap((model) => {
      const errors = model.errors[name] || [];
      const own = model.values[name] || [];
      const near = own.map((value, place) => [value - Z95 * (errors[place] || 0), value + Z95 * (errors[place] || 0), model.uniform[name]?.[place]]);
      return own.some((value) => value !== null) ? near.filter((_, place) => own[place] !== null).flat() : [];
    }));
    const extent = page.extent(values);
    if (!extent) return null;
    const [low, high] = extent;
    return page.nice(extent, { zero: state.show === "change" || (low >= 0 && low < 0.5 * high) });
  }

  function panel(run, name, width) {
    const domain = limits(name);
    const models = modelsOf(run).filter((model) => model.values[name]);
    if (!domain || !models.length) return page.html("p", { class: "note" }, `${titled(name)[0]}: no value in this run; run.json says why.`);
    const layers = f.distinct(models[0].layer);
    const plot = page.plot({
      width, height: 360, margin: { top: 34 },
      x: { names: layers.map(String), label: "layer" },
      y: { domain, label: (state.show === "change" ? "change of " : "") + titled(name)[1] },
      label: `${titled(name)[0]} of every head by layer`,
    });
    f.title(plot, titled(name)[0]);
    if (domain[0] < 0) plot.inner.append(page.svg("line", { class: "zero", x1: 0, x2: plot.width, y1: plot.y(0), y2: plot.y(0) }));
    const first = models[0];
    uniform(plot, first, name, layers);
    const xs = places(plot, first, name, layers);
    models.forEach((model, place) => state.show === "change" || means(plot, model, name, layers, place));
    if (models.length > 1) joined(plot, models, name, xs);
    const points = models.flatMap((model, place) => dots(plot, run, model, name, xs, place));
    f.points(plot, points, `${titled(name)[0]} of every head`);
    return plot.svg;
  }

  function places(plot, model, name, layers) {
    const found = new Array(model.layer.length).fill(NaN);
    layers.forEach((layer, centre) => {
      const own = model.layer.map((one, place) => [one, place]).filter(([one]) => one === layer).map(([, place]) => place);
      f.spread(own.map((place) => model.values[name][place] ?? NaN), plot.x(centre), plot.x.step).forEach((x, rank) => (found[own[rank]] = x));
    });
    return found;
  }

  function uniform(plot, model, name, layers) {
    const own = model.uniform[name];
    if (!own) return;
    layers.forEach((layer, centre) => {
      const value = own[model.layer.findIndex((one, place) => one === layer && own[place] !== null)];
      if (!Number.isFinite(value)) return;
      const half = 0.44 * plot.x.step;
      plot.inner.append(page.svg("line", { class: "uniform", x1: plot.x(centre) - half, x2: plot.x(centre) + half, y1: plot.y(value), y2: plot.y(value) }));
    });
  }

  function means(plot, model, name, layers, place) {
    const at = layers.map((layer, centre) => {
      const own = model.values[name].filter((value, head) => model.layer[head] === layer && value !== null);
      return own.length ? [plot.x(centre), plot.y(own.reduce((sum, value) => sum + value, 0) / own.length)] : null;
    });
    const d = at.map((one, centre) => (one ? `${at[centre - 1] ? "L" : "M"}${one.map((value) => value.toFixed(1)).join(" ")}` : "")).join("");
    plot.inner.append(page.svg("path", { class: "line", d, stroke: f.colour(place), "stroke-width": 1.8, "stroke-opacity": 0.4 }));
  }

  function joined(plot, [first, second], name, xs) {
    first.layer.forEach((layer, place) => {
      const line = f.bar({ x: xs[place], y: plot.y(first.values[name][place] ?? NaN), y2: plot.y(second.values[name][place] ?? NaN), colour: 1, head: `${layer}.${first.head[place]}`, width: 1, opacity: 0.6 });
      if (line) plot.inner.append(line);
    });
  }

  function dots(plot, run, model, name, xs, place) {
    const errors = model.errors[name] || [];
    return model.layer.flatMap((layer, row) => {
      const value = model.values[name][row];
      if (value === null || !Number.isFinite(xs[row])) return [];
      const head = `${layer}.${model.head[row]}`;
      const reach = Z95 * (errors[row] ?? NaN);
      const [x, y] = [xs[row], plot.y(value)];
      plot.inner.append(f.bar({ x, y: plot.y(value - reach), y2: plot.y(value + reach), colour: place, head, width: 1 }) || "");
      const node = f.dot({ x, y, colour: place, radius: (model.layer.length > 80 ? 3.2 : 4.4) + 1.8 * place, ring: place > 0, head });
      plot.inner.append(node);
      const what = state.show === "change" ? "change " : place ? `masked (${run.mask}) ` : "";
      const lines = [`Head ${head}`, `${what}${titled(name)[1]} ${f.estimate(value, value - reach, value + reach)}`];
      const even = model.uniform[name]?.[row];
      if (Number.isFinite(even)) lines.push(`uniform attention ${page.number(even)}`);
      return [{ x, y, node, series: place, lines }];
    });
  }

  root.exportTable = () => f.table(runs, (run) => Object.entries(run.models).flatMap(([model, own]) =>
    own.layer.map((layer, row) => ({
      model, layer, head: own.head[row],
      ...Object.fromEntries(Object.entries(own.values).flatMap(([name, values]) => [[name, values[row]], ...(own.errors[name] ? [[`${name}_se`, own.errors[name][row]]] : [])])),
    }))));
});
