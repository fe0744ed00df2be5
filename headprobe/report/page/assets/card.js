/* The card of a head: all that the run's files say of it. Its address is `#head=3.1`; the back button closes it. */
"use strict";

headprobe.card = (data, page, { places, named, start }) => {
  const dialog = page.html("dialog", { id: "card", "aria-labelledby": "card-title", class: "card" });
  document.body.append(dialog);
  const narrow = matchMedia("(max-width: 760px)");
  let opened = null; // {head, run, pushed, from}

  // -- opening, closing, addresses --

  function wanted() {
    const match = /^#head=(\d+\.\d+)(?:&run=(\d+))?$/.exec(location.hash);
    if (!match) return null;
    const runs = places.map((own) => own.some((place) => named(place) === match[1]));
    const run = match[2] === undefined ? runs.indexOf(true) : Number(match[2]);
    return runs[run] ? { head: match[1], run } : null;
  }

  page.open = (head, run) => {
    const target = `#head=${head}${run ? `&run=${run}` : ""}`;
    if (opened) history.replaceState(history.state, "", target);
    else {
      history.scrollRestoration = "manual"; // closing the card leaves the page where it is
      history.pushState({ card: true }, "", target);
    }
    show();
  };

  function show() {
    const target = wanted();
    if (!target) return hide();
    const from = opened ? opened.from : document.activeElement;
    opened = { ...target, from };
    fill(target.head, target.run);
    if (!dialog.open) narrow.matches ? dialog.showModal() : dialog.show();
    dialog.scrollTop = 0;
    document.getElementById("card-title").focus();
    if (!page.selected().includes(target.head)) page.select([target.head]);
  }

  function hide() {
    if (!opened) return;
    const { head, run, from } = opened;
    opened = null;
    dialog.close();
    const cell = page.cellOf(head, run);
    if (from && from !== document.body && from.isConnected && !from.matches("#card *")) from.focus({ preventScroll: true });
    else if (cell) cell.focus();
  }

  let leaving = false; // Escape in a card over the page comes twice, as a key and as the dialog's own wish to close

  function close() {
    if (leaving) return;
    leaving = Boolean(history.state && history.state.card);
    if (leaving) history.back(); // the address before; `popstate` hides the card
    else {
      history.replaceState(null, "", location.pathname + location.search);
      hide();
    }
  }

  addEventListener("popstate", () => {
    leaving = false;
    show();
  });
  addEventListener("hashchange", show);
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    close();
  });
  dialog.addEventListener("close", () => opened && !dialog.open && close()); // a browser closes it by itself on a second Escape
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (opened) close();
    else if (page.selected().length) page.select([]);
  });

  // -- what it shows --

  const h = page.html;
  const block = (title, ...children) => h("section", { class: "block" }, [h("h3", {}, title), ...children]);

  function fill(head, number) {
    const run = data.runs[number];
    const index = places[number].findIndex((place) => named(place) === head);
    const { layer, head: own } = places[number][index];
    const title = h("h2", { id: "card-title", tabindex: "-1" }, `Layer ${layer}, head ${own}`);
    const step = (by, text, mark) => {
      const other = places[number][index + by];
      return h("button", { type: "button", disabled: !other, "aria-label": text, click: () => other && page.open(named(other), number) }, mark);
    };
    dialog.replaceChildren(
      h("div", { class: "top-of-card" }, [
        title,
        h("div", { class: "steps" }, [
          step(-1, "Previous head", "‹"),
          step(1, "Next head", "›"),
          h("button", { type: "button", class: "close", "aria-label": "Close", click: close }, "×"),
        ]),
      ]),
      ...[switcher(head, number), costs(run, index), likeness(run, layer, own), images(run, layer, own), neighbours(run, index, number), worth(run, index)].filter(Boolean),
    );
  }

  /** Buttons for the runs that have this head, where there are several. */
  function switcher(head, number) {
    if (data.runs.length < 2) return h("p", { class: "of" }, h("bdi", {}, page.runs[0]));
    const having = data.runs.map((_, run) => run).filter((run) => places[run].some((place) => named(place) === head));
    const button = (run) => h("button", { type: "button", "aria-pressed": String(run === number), click: () => page.open(head, run) }, h("bdi", {}, page.runs[run]));
    return h("div", { class: "switch", role: "group", "aria-label": "Run" }, having.map(button));
  }

  /** What masking it costs under each ablation, and in words whether that differs from nothing. */
  function costs(run, index) {
    const own = run.columns.filter((column) => /^(nll_rise|drop_pp|feature_distance|feature_cosine)_/.test(column.key) && column.values[index] !== null);
    if (!own.length) return block("What masking it costs", h("p", {}, "This head alone was not masked in this run."));
    const rows = own.map((column) => h("li", {}, [
      h("p", { class: "cost" }, [h("span", {}, column.label), h("b", {}, page.number(column.values[index])), h("span", { class: "unit" }, column.unit)]),
      whisker(run, column, index),
      h("p", { class: "verdict" }, verdict(column, index)),
    ]));
    return block("What masking it costs", h("ul", { class: "costs" }, rows), h("p", { class: "small" }, "Ticks: the other heads. Dotted: no change."));
  }

  function verdict(column, index) {
    const [value, low, high, p, q] = ["values", "low", "high", "p", "q"].map((name) => (column[name] ? column[name][index] : null));
    const limits = Number.isFinite(low) ? `95% interval ${page.number(low)} to ${page.number(high)}. ` : "";
    const draws = column.least ? `Draws from ${page.number(column.least[index])} to ${page.number(column.most[index])}. ` : "";
    const tests = [["p", p], ["q", q]].filter(([, one]) => Number.isFinite(one)).map(([name, one]) => `${name} ${page.number(one, 2)}`);
    const tested = tests.length ? ` (${tests.join(", ")})` : "";
    const direction = value > 0 ? "a loss" : "a gain";
    let words = "";
    if (column.differs === "q" && Number.isFinite(q)) {
      if (q < 0.05) words = `Differs from the whole model: ${direction}, also corrected for the number of heads${tested}.`;
      else if (p < 0.05) words = `Would differ from nothing if it were the only head tested; not after correction for the number of heads${tested}.`;
      else words = `These images cannot tell it from no change${tested}.`;
    } else if (Number.isFinite(low) && column.differs) {
      words = low > 0 || high < 0 ? `Differs from the whole model: ${direction} (not corrected for the number of heads)${tested}.` : `These images cannot tell it from no change${tested}.`;
    } else if (tested) words = `Of draw 0:${tested}.`;
    return `${limits}${draws}${words}`;
  }

  /** All heads as ticks on one line, this one with its interval. */
  function whisker(run, column, index, height = 18) {
    const width = 380;
    const limits = page.extent([column.values, Number.isFinite(column.low && column.low[index]) ? [column.low[index], column.high[index]] : []]);
    const domain = page.nice(column.kind === "diverging" ? [Math.min(0, limits[0]), Math.max(0, limits[1])] : limits, { room: 0.02 });
    const x = page.scale(domain, [2, width - 2]);
    const middle = height / 2;
    const ticks = column.values.filter(Number.isFinite).map((value) => `M${x(value).toFixed(1)} ${middle - 5}v10`).join("");
    const drawn = [page.svg("path", { d: ticks, class: "others" })];
    if (column.kind === "diverging") drawn.unshift(page.svg("line", { x1: x(0), x2: x(0), y1: 0, y2: height, class: "zero" }));
    if (column.low && Number.isFinite(column.low[index])) {
      drawn.push(page.svg("line", { x1: x(column.low[index]), x2: x(column.high[index]), y1: middle, y2: middle, class: "interval" }));
    }
    drawn.push(page.svg("circle", { cx: x(column.values[index]), cy: middle, r: 5, class: "own" }));
    return page.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "strip", "aria-hidden": "true", preserveAspectRatio: "none" }, drawn);
  }

  // -- pictures --

  /** Draw bytes as colours on a canvas, without smoothing, again when the theme changes. */
  function canvas(values, height, width, label) {
    const element = h("canvas", { width, height, role: "img", "aria-label": label, class: "pixels" });
    const draw = () => {
      const colours = page.palette("sequential");
      const image = new ImageData(width, height);
      values.forEach((value, pixel) => image.data.set([...colours[value], 255], 4 * pixel));
      element.getContext("2d").putImageData(image, 0, 0);
    };
    draw();
    page.onTheme(draw, element);
    return element;
  }

  const unpacked = new Map();
  function bytes(owner, key, packed) {
    if (!unpacked.has(owner)) unpacked.set(owner, new Map());
    const own = unpacked.get(owner);
    if (!own.has(key)) own.set(key, page.bytes(packed));
    return own.get(key);
  }

  /** Its spectrum among those of all heads, and where it looks from a query. */
  function likeness(run, layer, head) {
    const parts = [spectrum(run, layer, head), offsets(run, layer, head)].filter(Boolean);
    return parts.length ? h("div", { class: "pair" }, parts) : null;
  }

  function spectrum(run, layer, head) {
    const all = run.spectra.flatMap((one) => one.values.map((values, row) => ({ frequency: one.frequency, values, own: one.layer === layer && one.heads[row] === head })));
    const mine = all.find((line) => line.own);
    const y = page.extent(all.map((line) => line.values));
    if (!mine || !y) return null;
    const plot = page.plot({
      width: 250, height: 200, margin: { left: 44, bottom: 42, right: 8 },
      x: { domain: [0, Math.max(...all.flatMap((line) => line.frequency))], label: "frequency (π rad/sample)", ticks: 3 },
      y: { domain: page.nice(y), label: "Δ log amplitude", ticks: 4 },
      label: `Spectrum of layer ${layer}, head ${head}, among all heads`,
    });
    plot.svg.querySelector(".label:last-of-type").classList.add("small");
    const path = (line) => line.frequency.map((one, bin) => (line.values[bin] === null ? "" : `${plot.x(one).toFixed(1)} ${plot.y(line.values[bin]).toFixed(1)}`)).filter(Boolean).join("L");
    plot.inner.append(
      page.svg("path", { d: all.filter((line) => !line.own).map((line) => `M${path(line)}`).join(""), class: "others" }),
      page.svg("path", { d: `M${path(mine)}`, class: "own-line" }),
    );
    return block("Spectrum of its output", plot.svg, h("p", { class: "small" }, "Grey: all other heads."));
  }

  function offsets(run, layer, head) {
    const found = run.offsets[layer];
    if (!found || !(found.most[head] > 0)) return null;
    const { shape, values } = bytes(found, "maps", found.maps);
    const [, height, width] = shape;
    const size = height * width;
    const map = canvas(values.subarray(head * size, (head + 1) * size), height, width, `Mean attention of layer ${layer}, head ${head}, by offset of the key from the query`);
    return block("Where it looks", h("div", { class: "framed" }, [map, h("span", { class: "query", "aria-hidden": "true", style: { "--w": width, "--h": height } })]),
      h("p", { class: "small" }, `The query is in the middle; deepest: ${page.number(found.most[head], 2)} of the weight.`));
  }

  /** A few images, and its attention over each. */
  function images(run, layer, head) {
    return headprobe.examples(run, layer, head, page, { block, bytes });
  }

  // -- other heads, and all numbers --

  function neighbours(run, index, number) {
    const measures = run.nearest.filter((measure) => measure.of[index].length);
    if (!measures.length) return null;
    const shown = h("div", {});
    const list = (measure) => shown.replaceChildren(h("ul", { class: "near" }, measure.of[index].map(([other, value, floor, above]) =>
      h("li", {}, [
        h("button", { type: "button", class: "head", click: () => page.open(named(places[number][other]), number) }, named(places[number][other])),
        h("span", { class: "meter", style: { "--share": Math.max(0, Math.min(1, value)), "--floor": Number.isFinite(floor) ? Math.max(0, Math.min(1, floor)) : 0 } }),
        h("span", {}, [page.number(value), above === false ? h("small", {}, " not above its floor") : null]),
      ]))));
    const choice = h("select", { "aria-label": "Measure of similarity", change: () => list(measures[choice.selectedIndex]) }, measures.map((measure) => h("option", {}, measure.measure)));
    list(measures[0]);
    return block("Nearest heads", choice, shown, h("p", { class: "small" }, "The notch is the noise floor: what the same two heads score on different images."));
  }

  function worth(run, index) {
    const rest = run.columns.filter((column) => !/^(nll_rise|drop_pp|feature_distance|feature_cosine)_/.test(column.key) && column.values[index] !== null);
    if (!rest.length) return null;
    const groups = [...new Set(rest.map((column) => column.group))];
    return block("All numbers", ...groups.map((group) => h("table", { class: "numbers" }, [
      h("caption", {}, group),
      h("thead", {}, h("tr", {}, ["Quantity", "Value", "Rank", "Among all heads"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rest.filter((column) => column.group === group).map((column) => line(run, column, index))),
    ])));
  }

  function line(run, column, index) {
    const known = column.values.filter(Number.isFinite);
    const rank = 1 + known.filter((value) => value > column.values[index]).length;
    const error = column.se && Number.isFinite(column.se[index]) ? h("small", {}, ` ±${page.number(column.se[index], 2)} s.e.`) : null;
    const limits = column.low && Number.isFinite(column.low[index]) ? h("small", {}, ` ${page.interval(column.low[index], column.high[index], 2)}`) : null;
    const [low, high] = page.extent(known);
    return h("tr", {}, [
      h("th", { scope: "row" }, [column.label, column.unit ? h("small", {}, ` ${column.unit}`) : null]),
      h("td", {}, [page.number(column.values[index]), error, limits]),
      h("td", {}, [`${rank}`, h("small", {}, ` of ${known.length}`)]),
      h("td", { class: "range" }, [whisker(run, column, index, 14), h("span", { class: "ends" }, [h("small", {}, page.number(low, 2)), h("small", {}, page.number(high, 2))])]),
    ]);
  }

  if (start.startsWith("#head=")) show();
};
