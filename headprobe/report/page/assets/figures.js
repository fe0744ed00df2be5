/* What the figures of the sections have in common: rows of tables, controls, panels of several runs, legends, and the
 * numbers of a point on hover and keyboard focus. Nothing is computed here but where things stand. */
"use strict";

headprobe.figures = (() => {
  const page = headprobe.page;
  const figures = {};

  // -- tables --

  const decoded = (column) => (Array.isArray(column) ? column : column.at.map((place) => column.of[place]));

  /** The rows of a table that stands by column, texts coded or not. */
  figures.rows = (columns) => {
    const names = Object.keys(columns || {});
    const lists = names.map((name) => decoded(columns[name]));
    return Array.from({ length: lists.length ? lists[0].length : 0 }, (_, row) =>
      Object.fromEntries(names.map((name, place) => [name, lists[place][row]])),
    );
  };

  /** Rows as columns, for the CSV button; of several runs the first column says which. */
  figures.table = (runs, rowsOf) => {
    const rows = runs.flatMap((run, place) =>
      run ? rowsOf(run, place).map((row) => (page.runs.length > 1 ? { run: page.runs[place], ...row } : row)) : [],
    );
    const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
    return Object.fromEntries(names.map((name) => [name, rows.map((row) => row[name])]));
  };

  figures.distinct = (values) => [...new Set(values)];
  figures.byKey = (rows, key) => {
    const found = new Map();
    for (const row of rows) found.set(key(row), [...(found.get(key(row)) || []), row]);
    return found;
  };
  /** What any run has, in the order of the first that has it. */
  figures.union = (runs, of) => figures.distinct(runs.filter(Boolean).flatMap(of));

  // -- words --

  figures.LABELS = { top1: "top-1 accuracy (%)", nll: "NLL (nats)", nll_rise: "NLL rise (nats)", drop_pp: "top-1 drop (percentage points)", feature_distance: "feature distance (of its length)", feature_cosine: "mean cosine of the feature" };
  figures.SHORT = { nll_rise: "NLL rise", drop_pp: "Top-1 drop", feature_distance: "Feature distance", top1: "Accuracy", nll: "NLL", feature_cosine: "Feature cosine" };
  figures.UNITS = { nll_rise: "nats", drop_pp: "pp", feature_distance: "", feature_cosine: "" };
  figures.LIMITS = { nll_rise: ["nll_rise_low", "nll_rise_high"], drop_pp: ["drop_low_pp", "drop_high_pp"], feature_distance: ["feature_distance_low", "feature_distance_high"], feature_cosine: ["feature_cosine_low", "feature_cosine_high"] };
  /** The measures, in the given order, that some row of a run has; a run without labels has those of features alone. */
  figures.measures = (names, has) => names.filter(has).map((name) => [name, figures.SHORT[name]]);

  /** An estimate with its interval and unit: `17.4 [11.2, 25.1] pp`. */
  figures.estimate = (value, low, high, unit = "") => {
    if (!Number.isFinite(low) || !Number.isFinite(high)) return [page.number(value), unit].filter(Boolean).join(" ");
    // All three with the decimals that give the largest of them three digits.
    const size = Math.max(Math.abs(value), Math.abs(low), Math.abs(high)) || 1;
    const places = Math.min(8, Math.max(0, 2 - Math.floor(Math.log10(size))));
    const [middle, from, to] = [value, low, high].map((one) => page.fixed(one, places));
    return [`${middle} [${from}, ${to}]`, unit].filter(Boolean).join(" ");
  };
  figures.loss = (row, quantity) => {
    const [low, high] = figures.LIMITS[quantity];
    return figures.estimate(row[quantity], row[low], row[high], figures.UNITS[quantity]);
  };

  // -- colours and shapes: every line and dot differs by both --

  const SHAPES = [
    (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    (r) => `M${-r * 0.9} ${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
    (r) => `M0 ${-r * 1.3}L${r * 1.3} 0L0 ${r * 1.3}L${-r * 1.3} 0z`,
    (r) => `M0 ${-r * 1.2}L${r * 1.15} ${r * 0.85}H${-r * 1.15}z`,
    (r) => `M0 ${r * 1.2}L${r * 1.15} ${-r * 0.85}H${-r * 1.15}z`,
    (r) => `M${-r * 0.4} ${-r * 1.2}h${r * 0.8}v${r * 0.8}h${r * 0.8}v${r * 0.8}h${-r * 0.8}v${r * 0.8}h${-r * 0.8}v${-r * 0.8}h${-r * 0.8}v${-r * 0.8}h${r * 0.8}z`,
  ];
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

  figures.shape = (place, radius) => SHAPES[place % SHAPES.length](radius);
  figures.colour = (place) => page.series[place % page.series.length];
  figures.dash = (place) => DASHES[place % DASHES.length];

  /** A dot: `shape` and `colour` are numbers or a CSS colour; hollow ones have the paper's colour inside. */
  figures.dot = ({ x, y, colour, shape = 0, radius = 5, hollow = false, ring = false, head = null, rim = true }) => {
    if (!Number.isFinite(x) || !Number.isFinite(y)) return page.svg("g", {}); // what has no value has no mark
    const own = typeof colour === "number" ? figures.colour(colour) : colour;
    const paint = hollow || ring ? { fill: ring ? "none" : "var(--panel)", stroke: own, "stroke-width": 1.8 } : { fill: own, stroke: rim ? "var(--panel)" : null, "stroke-width": 0.8 };
    return page.svg("path", { class: "dot", d: figures.shape(shape, radius), transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, "data-head": head, ...paint });
  };

  /** A line with so many layers of the model between pale and dark; the palest is dark enough to see. */
  figures.layerColour = (layer, last) => page.ramp(0.3 + 0.7 * (last > 0 ? layer / last : 1), 0, 1);

  /** Which colour a layer has, as SVG. */
  figures.layerBar = (last, width) => {
    const shown = Math.min(width, 26 * (last + 1) + 60);
    const step = (shown - 52) / (last + 1);
    const every = Math.max(1, Math.ceil(20 / step));
    const cells = Array.from({ length: last + 1 }, (_, layer) => [
      page.svg("rect", { x: 46 + layer * step, y: 4, width: step + 0.4, height: 11, fill: figures.layerColour(layer, last) }),
      layer % every ? null : page.svg("text", { class: "tick", x: 46 + (layer + 0.5) * step, y: 29, "text-anchor": "middle" }, layer),
    ]);
    return page.svg("svg", { viewBox: `0 0 ${shown} 34`, width: shown, height: 34, role: "img", class: "bar" }, [
      page.svg("title", {}, `Colours of layers 0 to ${last}, from pale to dark`),
      page.svg("text", { class: "label", x: 0, y: 14 }, "layer"),
      cells,
    ]);
  };

  /** The path of a line through points `[x, y]`, which breaks where one has no value. */
  figures.path = (points) => {
    const known = points.map((point) => point.every(Number.isFinite));
    const text = (point) => point.map((one) => one.toFixed(1)).join(" ");
    return points.map((point, place) => (known[place] ? `${known[place - 1] ? "L" : "M"}${text(point)}` : "")).join("");
  };

  /** The path of a band between two edges; points without both limits are left out. */
  figures.band = (upper, lower) => {
    const known = upper.map((_, place) => place).filter((place) => [...upper[place], ...lower[place]].every(Number.isFinite));
    const text = ([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`;
    return known.length > 1 ? `M${[...known.map((place) => text(upper[place])), ...known.reverse().map((place) => text(lower[place]))].join("L")}Z` : null;
  };

  // -- texts that saved figures keep: they are SVG --

  const ruler = document.createElement("canvas").getContext("2d");
  let family = "";
  figures.textWidth = (text, size = 13, weight = 400) => {
    family = family || getComputedStyle(document.body).fontFamily; // asked once: it makes the browser lay out the page
    ruler.font = `${weight} ${size}px ${family}`;
    return ruler.measureText(text).width;
  };

  /** A text cut to a width, with an ellipsis. */
  figures.cut = (text, width, size = 13, weight = 400) => {
    if (figures.textWidth(text, size, weight) <= width) return text;
    const letters = Array.from(text);
    while (letters.length > 1 && figures.textWidth(letters.join("") + "…", size, weight) > width) letters.pop();
    return letters.join("") + "…";
  };

  /** Lines of words that fit a width. */
  figures.wrapped = (text, width, size = 13, weight = 400) => {
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (figures.textWidth(longer, size, weight) <= width || !lines.at(-1)) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.map((line) => figures.cut(line, width, size, weight));
  };

  /** A heading that is read as one and saved with the figure. */
  figures.heading = (text, width, level = 3) =>
    page.html(`h${level}`, { class: "panel-name" }, [
      page.html("span", { class: "unseen" }, text),
      page.svg("svg", { viewBox: `0 0 ${width} 22`, width, height: 22, "aria-hidden": "true" }, [
        page.svg("text", { class: "name", x: 0, y: 16 }, figures.cut(text, width - 4, 14, 600)),
      ]),
    ]);

  /** A legend. Items: {text, colour, shape, dash, hollow, band, key, pressed}; those with a key are buttons. */
  figures.legend = (items, width, toggle) =>
    page.html("div", { class: "legend" }, items.map((item) => {
      const lines = figures.wrapped(item.text, width - 60, 13);
      const wide = Math.ceil(Math.max(...lines.map((line) => figures.textWidth(line, 13)))) + 40;
      const high = 3 + 17 * lines.length;
      const colour = typeof item.colour === "number" ? figures.colour(item.colour) : item.colour;
      const swatch = page.svg("svg", { viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, "aria-hidden": "true" }, [
        item.band ? page.svg("rect", { x: 2, y: 4, width: 26, height: 12, fill: colour, "fill-opacity": 0.22 }) : null,
        item.line === false ? null : page.svg("line", { x1: 2, x2: 28, y1: 10, y2: 10, stroke: colour, "stroke-width": item.thin ? 1 : 2, "stroke-dasharray": item.dash || null }),
        item.shape === undefined ? null : figures.dot({ x: 15, y: 10, colour: item.colour, shape: item.shape, radius: 4.5, hollow: item.hollow, ring: item.ring }),
        lines.map((line, place) => page.svg("text", { class: "legend-text", x: 35, y: 14.5 + 17 * place }, line)),
      ]);
      if (!item.key) return page.html("span", { class: "entry" }, [page.html("span", { class: "unseen" }, item.text), swatch]);
      const button = page.html("button", { type: "button", class: "entry", "aria-pressed": String(item.pressed), "aria-label": item.text }, swatch);
      button.addEventListener("click", () => toggle(item.key));
      return button;
    }));

  // -- controls --

  /** Selects and rows of buttons: [{key, label, options: [[value, text], ...], buttons}]; one option is not shown. */
  figures.controls = (state, choices, changed) =>
    page.html("div", { class: "controls" }, choices.filter((choice) => choice.options.length > 1).map((choice) => {
      const set = (value) => {
        state[choice.key] = value;
        changed(choice.key);
      };
      if (choice.buttons) {
        return page.html("div", { class: "choice", role: "group", "aria-label": choice.label }, [
          page.html("span", { class: "choice-label", "aria-hidden": "true" }, choice.label),
          page.html("span", { class: "segments" }, choice.options.map(([value, text]) => {
            const button = page.html("button", { type: "button", "aria-pressed": String(state[choice.key] === value), "data-value": value }, text);
            button.addEventListener("click", () => {
              for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
              set(value);
            });
            return button;
          })),
        ]);
      }
      const select = page.html("select", { change: () => set(select.value) }, choice.options.map(([value, text]) =>
        page.html("option", { value, selected: state[choice.key] === value }, text),
      ));
      return page.html("label", { class: "choice" }, [page.html("span", { class: "choice-label" }, choice.label), select]);
    }));

  /** Draw into an element, and again when its width changes; draw(width) gets the pixels there are. */
  figures.fitted = (element, draw) => {
    let last = 0;
    const redraw = (force = true) => {
      const width = Math.floor(element.clientWidth || element.parentElement.clientWidth || 640);
      if (!force && Math.abs(width - last) < 8) return;
      last = width;
      const focus = focused(element);
      tip.hide();
      page.clear(element);
      draw(width);
      if (focus) element.querySelectorAll(focus.what)[focus.place]?.focus({ preventScroll: true });
    };
    new ResizeObserver(() => redraw(false)).observe(element);
    redraw();
    return redraw;
  };

  /** Which button of a drawing has the focus, so that drawing anew does not lose it. */
  function focused(element) {
    const what = "button.entry, input";
    const place = [...element.querySelectorAll(what)].indexOf(document.activeElement);
    return place < 0 ? null : { what, place };
  }

  /** A part of the drawing for every run, under its name where there are several; those without it are named. */
  figures.perRun = (element, runs, width, draw) => {
    runs.forEach((run, place) => {
      const part = page.html("div", { class: "run" });
      element.append(part);
      if (page.runs.length > 1) part.append(figures.heading(page.runs[place], width));
      if (run) draw(run, part, place);
      else part.append(page.html("p", { class: "note" }, "This run has no table for this figure."));
    });
  };

  /** How wide panels are that stand side by side, at least `least` pixels each. */
  figures.panelWidth = (width, count, least = 300, most = 620) => {
    const columns = Math.max(1, Math.min(count, Math.floor((width + 16) / (least + 16))));
    return Math.min(most, Math.floor((width - 16 * (columns - 1)) / columns));
  };

  /** The most panels that any run has, so that all of them have the same width. */
  figures.most = (runs, count) => Math.max(2, ...runs.filter(Boolean).map(count));

  /** A title inside of a plot's upper margin: bold, and below it lines that are not, as many as the margin has room for. */
  figures.title = (plot, text, more = "") => {
    const left = -plot.edge.left + 2;
    const width = plot.width + plot.edge.left + plot.edge.right - 6;
    plot.axes.append(page.svg("text", { class: "name", x: left, y: -plot.edge.top + 15 }, figures.cut(text, width, 14, 600)));
    if (!more) return;
    const room = Math.max(1, Math.floor((plot.edge.top - 16) / 15));
    const lines = figures.wrapped(more, width, 12);
    const shown = lines.length > room ? [...lines.slice(0, room - 1), figures.cut(lines.slice(room - 1).join(" "), width, 12)] : lines;
    shown.forEach((line, place) => plot.axes.append(page.svg("text", { class: "more", x: left, y: -plot.edge.top + 32 + 15 * place }, line)));
  };

  /** The upper margin that a title needs with so wide a text below it. */
  figures.titleRoom = (more, width) => 31 + 15 * (more ? figures.wrapped(more, width - 6, 12).length : 0);

  // -- the numbers of a point --

  const tip = (() => {
    const box = page.html("div", { class: "tip", "aria-hidden": "true", hidden: true });
    const show = (lines, left, top) => {
      if (!box.isConnected) document.body.append(box);
      page.clear(box).append(...lines.map((line, place) => page.html("div", { class: place ? "" : "first-line" }, line)));
      box.hidden = false;
      const size = box.getBoundingClientRect();
      const x = Math.min(Math.max(6, left - size.width / 2), document.documentElement.clientWidth - size.width - 6);
      const above = top - size.height - 12;
      box.style.left = `${x}px`;
      box.style.top = `${above > 4 ? above : top + 14}px`;
    };
    const hide = () => (box.hidden = true);
    document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
    document.addEventListener("scroll", hide, { passive: true, capture: true });
    return { show, hide };
  })();
  figures.tip = tip;

  const live = page.html("div", { class: "unseen", "aria-live": "polite" });
  document.addEventListener("DOMContentLoaded", () => document.body.append(live));
  /** Say something to screen readers. */
  figures.speak = (text) => live.replaceChildren(text);

  /** Let points say their numbers: the nearest one to the pointer, and by keyboard with the arrow keys.
   *
   * Points: {x, y, lines, node, series, act}: where in the plot, what is said, its mark, which of several lines it is
   * on; `act` is done on a click or Enter where the mark is not one of a head. Without marks, `head` says whose it is.
   */
  figures.points = (plot, points, label) => {
    const known = points.filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y));
    if (!known.length) return;
    const { svg } = plot;
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", `${label}. Arrow keys move from point to point.`);
    let hot = null;
    const light = (point) => {
      if (hot && hot.node) hot.node.classList.remove("hot");
      if (shared) shared.style.opacity = point ? 1 : 0;
      hot = point;
      if (hot) hot.node.classList.add("hot");
    };
    const screen = (point) => {
      const at = new DOMPoint(point.x, point.y).matrixTransform(plot.inner.getScreenCTM());
      return [at.x, at.y];
    };
    const say = (point) => {
      lend(point);
      light(point);
      tip.show(point.lines, ...screen(point));
    };
    // Points without a mark of their own, as there are thousands, share one that goes where the pointer or the keys are.
    let shared = null;
    const nodes = new Map();
    known.forEach((point, place) => {
      if (!point.node) return;
      nodes.set(point.node, point);
      dressed(point, place === 0);
    });
    if (!nodes.size) {
      shared = figures.dot({ x: 0, y: 0, colour: "var(--ink)", radius: 4.5 });
      shared.style.opacity = 0;
      plot.inner.append(shared);
      lend(known[0]);
      shared.setAttribute("tabindex", "0");
    }
    function dressed(point, first) {
      point.node.setAttribute("role", point.act || point.node.dataset.head ? "button" : "img");
      point.node.setAttribute("aria-label", point.lines.join(", "));
      point.node.setAttribute("tabindex", first ? "0" : "-1");
    }
    function lend(point) {
      if (!shared) return;
      known.forEach((one) => one.node === shared && delete one.node);
      point.node = shared;
      nodes.clear();
      nodes.set(shared, point);
      if (point.head) shared.dataset.head = point.head;
      else delete shared.dataset.head;
      shared.setAttribute("transform", `translate(${point.x.toFixed(1)},${point.y.toFixed(1)})`);
      dressed(point, true);
    }
    svg.addEventListener("focusin", (event) => nodes.has(event.target) && say(nodes.get(event.target)));
    svg.addEventListener("focusout", () => (light(null), tip.hide()));
    svg.addEventListener("keydown", (event) => nodes.has(event.target) && onKey(event, nodes.get(event.target)));
    svg.addEventListener("click", (event) => {
      const point = nodes.get(event.target);
      if (!point || !point.act) return;
      event.stopPropagation();
      point.act(event);
    });
    const go = (point) => {
      if (shared) {
        say(point);
        figures.speak(point.lines.join(", "));
        return;
      }
      known.forEach((one) => one.node.setAttribute("tabindex", one === point ? "0" : "-1"));
      point.node.focus({ preventScroll: true });
    };
    function onKey(event, point) {
      const away = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        point.node.dispatchEvent(new MouseEvent("click", { bubbles: true, shiftKey: event.shiftKey }));
      } else if (away) {
        event.preventDefault();
        go(beside(point, away) || point);
      } else if (event.key === "Home" || event.key === "End") {
        event.preventDefault();
        go(event.key === "Home" ? known[0] : known.at(-1));
      }
    }
    // Left and right along a line, in its order; up and down to the nearest point in that direction.
    function beside(point, [dx, dy]) {
      const own = known.filter((one) => one.series === point.series);
      if (dx) return own[own.indexOf(point) + dx] || known[known.indexOf(point) + dx];
      const there = known.filter((one) => (one.y - point.y) * dy > 0.5);
      const cost = (one) => Math.abs(one.y - point.y) + 3 * Math.abs(one.x - point.x);
      return there.sort((a, b) => cost(a) - cost(b))[0];
    }
    const nearest = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.inner.getScreenCTM().inverse());
      const far = (point) => Math.hypot(point.x - at.x, point.y - at.y);
      const found = known.reduce((best, point) => (far(point) < far(best) ? point : best));
      return far(found) < 28 ? found : null;
    };
    svg.addEventListener("pointermove", (event) => {
      const point = nearest(event);
      if (point) say(point);
      else (light(null), tip.hide());
      svg.style.cursor = point && (point.act || point.head || point.node.dataset.head) ? "pointer" : "";
    });
    svg.addEventListener("pointerleave", () => (light(null), tip.hide()));
    svg.addEventListener("click", (event) => {
      const point = nearest(event);
      if (!point || nodes.has(event.target) || event.target.closest("[role=button]")) return;
      say(point);
      const keys = { shiftKey: event.shiftKey, ctrlKey: event.ctrlKey, metaKey: event.metaKey };
      point.node.dispatchEvent(new MouseEvent("click", { bubbles: true, ...keys }));
    });
  };

  /** A vertical or horizontal interval; nothing where there is none. */
  figures.bar = ({ x, y, x2 = x, y2 = y, colour, head = null, width = 1.4, opacity = 0.75 }) =>
    [x, y, x2, y2].every(Number.isFinite)
      ? page.svg("line", { class: "interval", x1: x, x2, y1: y, y2, stroke: typeof colour === "number" ? figures.colour(colour) : colour, "stroke-width": width, "stroke-opacity": opacity, "data-head": head })
      : null;

  /** A value cut where the axis ends: marks stay inside of their plot. */
  figures.inside = (scale, value) => {
    const [low, high] = [Math.min(...scale.domain), Math.max(...scale.domain)];
    return Number.isFinite(value) ? scale(Math.min(high, Math.max(low, value))) : NaN;
  };

  /** Something of a figure that is no wider than the room there is. */
  figures.holder = (width, children) => page.html("div", { style: { width: `${width}px`, "max-width": "100%" } }, children);

  /** x of each dot of a layer: beside its middle in the order of the heads, so that no dot hides another. */
  figures.spread = (values, centre, step) => {
    const gap = Math.min((0.72 * step) / Math.max(values.length - 1, 1), 9);
    return values.map((value, place) => (Number.isFinite(value) ? centre + gap * (place - (values.length - 1) / 2) : NaN));
  };

  /** Marks beside the rows and columns of a matrix that are selected; of few also lines around their cells. */
  figures.outline = (group, places, count, unit) => {
    page.clear(group);
    const whole = unit * count;
    const still = { "pointer-events": "none" };
    for (const place of places) {
      const at = place * unit;
      group.append(page.svg("path", { ...still, class: "marker", d: `M${at + 1} -1.5h${unit - 2}M-1.5 ${at + 1}v${unit - 2}` }));
      if (places.length > 3) continue;
      group.append(page.svg("rect", { ...still, class: "outline", x: 0, y: at, width: whole, height: unit }), page.svg("rect", { ...still, class: "outline", x: at, y: 0, width: unit, height: whole }));
    }
  };

  /** All heads of a layer, or all heads of an index, as the page names them. */
  figures.headsOf = (headsPerLayer, belongs) =>
    headsPerLayer.flatMap((count, layer) => Array.from({ length: count }, (_, head) => [layer, head]).filter(([, head]) => belongs(layer, head)).map(([, head]) => `${layer}.${head}`));

  return figures;
})();
