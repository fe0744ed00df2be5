/* Spectra: delta log amplitude over frequency, a line for each head in the colour of its layer, and the stream's. */
"use strict";

headprobe.section("spectra", (root, data, page) => {
  const f = headprobe.figures;
  const Z95 = 1.96;
  const NAMES = { head: "outputs of heads", contribution: "what heads add to the stream", stream_before: "stream before attention", stream_after: "stream after attention" };
  const MODELS = { baseline: "whole model", masked: "masked model", change: "change" };
  const runs = data.runs;
  const all = (run) => Object.values(run.models).flat();
  const profiles = f.union(runs, (run) => all(run).map((line) => line.profile));
  const series = f.union(runs, (run) => all(run).map((line) => line.series));
  const ofHeads = series.filter((name) => !name.startsWith("stream"));
  const ofStream = series.filter((name) => name.startsWith("stream"));
  const state = { heads: ofHeads[0], stream: ofStream.at(-1), profile: profiles[0], model: "baseline" };
  const last = Math.max(...runs.filter(Boolean).flatMap((run) => all(run).map((line) => line.layer)));

  const parts = page.html("div", {});
  const named = (names) => names.map((name) => [name, NAMES[name] || name]);
  root.append(f.controls(state, [
    { key: "heads", label: "First figure", options: named(ofHeads) },
    { key: "stream", label: "Second figure", options: named(ofStream) },
    { key: "profile", label: "Frequencies", buttons: true, options: profiles.map((name) => [name, name === "radial" ? "rings" : name]) },
    { key: "model", label: "Of", buttons: true, options: f.union(runs, (run) => Object.keys(run.models)).map((name) => [name, MODELS[name]]) },
  ], () => draw()), parts);
  const draw = f.fitted(parts, (width) => {
    parts.append(f.layerBar(last, width));
    const wide = f.panelWidth(width, 2, 320, 640);
    f.perRun(parts, runs, width, (run, part) => {
      part.append(page.html("div", { class: "panels" }, [state.heads, state.stream].filter(Boolean).map((name) => panel(run, name, wide))));
    });
  });

  function linesOf(run, name) {
    return (run.models[state.model] || []).filter((line) => line.series === name && line.profile === state.profile);
  }

  function limits() {
    const values = runs.filter(Boolean).flatMap((run) => [state.heads, state.stream].flatMap((name) => linesOf(run, name).map((line) => line.delta)));
    return page.extent(values);
  }

  function about(run) {
    const profile = state.profile === "radial" ? "rings of frequencies" : `${state.profile} of the transform`;
    return state.model === "baseline" || !run.mask ? profile : `${profile}; ${MODELS[state.model]}: ${run.mask}`;
  }

  function highest() {
    return Math.max(...runs.filter(Boolean).flatMap((run) => all(run).filter((line) => line.profile === state.profile).flatMap((line) => line.frequency)));
  }

  function panel(run, name, width) {
    const lines = linesOf(run, name);
    const extent = limits();
    if (!lines.length || !extent) return page.html("p", { class: "note" }, `No spectra of ${NAMES[name] || name} in this run.`);
    const plot = page.plot({
      width, height: 370, margin: { top: 46, right: 18 },
      x: { domain: [0, highest()], label: "frequency (π rad/sample)" },
      y: { domain: page.nice([Math.min(0, extent[0]), Math.max(0, extent[1])]), label: `${state.model === "change" ? "change of " : ""}delta log amplitude` },
      label: `Spectra: ${NAMES[name] || name}`,
    });
    f.title(plot, (NAMES[name] || name).replace(/^./, (letter) => letter.toUpperCase()), about(run));
    plot.inner.append(page.svg("line", { class: "zero", x1: 0, x2: plot.width, y1: plot.y(0), y2: plot.y(0) }));
    const points = lines.flatMap((line) => line.heads.flatMap((head, row) => drawLine(plot, line, head, row)));
    f.points(plot, points, `Spectra: ${NAMES[name] || name}`);
    return plot.svg;
  }

  function drawLine(plot, line, head, row) {
    const values = line.delta[row];
    const known = line.frequency.map((frequency, place) => [frequency, values[place], place]).filter(([, value]) => value !== null);
    if (!known.length) return [];
    const name = head < 0 ? null : `${line.layer}.${head}`;
    const colour = f.layerColour(line.layer, last);
    const d = known.map(([frequency, value], place) => `${place ? "L" : "M"}${plot.x(frequency).toFixed(1)} ${plot.y(value).toFixed(1)}`).join("");
    plot.inner.append(page.svg("path", { class: "line", d, stroke: colour, "stroke-width": name ? 1.5 : 2.2, "data-head": name }));
    return known.slice(1).map(([frequency, value, place]) => {
      const [x, y] = [plot.x(frequency), plot.y(value)];
      const reach = Z95 * (line.error[row][place] ?? NaN);
      const what = name ? `Head ${name}` : `Layer ${line.layer}, ${NAMES[line.series] || line.series}`;
      return { x, y, head: name, series: `${line.layer} ${head}`, lines: [what, `frequency ${page.number(frequency)} π`, `delta log amplitude ${f.estimate(value, value - reach, value + reach)}`] };
    });
  }

  root.exportTable = () => f.table(runs, (run) => Object.entries(run.models).flatMap(([model, lines]) => lines.flatMap((line) =>
    line.heads.flatMap((head, row) => line.frequency.map((frequency, place) => ({
      model, series: line.series, profile: line.profile, layer: line.layer, head, frequency, delta_log_amplitude: line.delta[row][place], delta_se: line.error[row][place],
    }))))));
});
