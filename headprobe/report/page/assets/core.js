/* What every section of the page draws with: elements, scales, axes, colours, numbers, selecting heads, saving figures.
 *
 * A section's file calls headprobe.section(KEY, (root, data, page) => {...}); `page` is the object below. Data reach
 * the page as text only: no innerHTML anywhere.
 */
"use strict";

const headprobe = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const drawings = new Map();
  const page = {};

  // -- elements --

  /** Add children to an element: nodes, texts, numbers, arrays of them; null and undefined are left out. */
  function add(parent, children) {
    if (children === null || children === undefined) return parent;
    if (Array.isArray(children)) children.forEach((child) => add(parent, child));
    else parent.append(children instanceof Node ? children : String(children));
    return parent;
  }

  /** Set attributes: functions become listeners, `style` may be an object, null and false are left out. */
  function dress(element, attributes) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
      else if (name === "style" && typeof value === "object") {
        for (const [key, own] of Object.entries(value)) element.style.setProperty(key, own);
      } else if (PAINT.has(name) && /\(/.test(value)) element.style.setProperty(name, value); // var(), light-dark()
      else element.setAttribute(name, value === true ? "" : value);
    }
    return element;
  }
  const PAINT = new Set(["fill", "stroke", "stop-color", "color"]);

  page.svg = (tag, attributes, children) => add(dress(document.createElementNS(SVG, tag), attributes), children);
  page.html = (tag, attributes, children) => add(dress(document.createElement(tag), attributes), children);
  page.clear = (element) => (element.replaceChildren(), element);

  // -- numbers --

  const EMPTY = "–";
  const ENORMOUS = 1e9; // from here on a power of ten: a broken model loses any number of nats
  const minus = (text) => text.replace("-", "−");

  /** A number with so many significant digits (3); thousands are grouped, an empty cell is a dash. */
  page.number = (value, digits = 3) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return EMPTY;
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size >= 10 ** (digits - 1) && size < ENORMOUS) return minus(value.toLocaleString("en-US"));
    if (size >= 1e6 || size < 1e-4) return minus(value.toExponential(Math.max(0, digits - 1)));
    const places = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
    return minus(value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places }));
  };
  /** A number with so many decimals, as columns of one unit want it; what rounds to 0 has no sign. */
  page.fixed = (value, places = 2) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return EMPTY;
    if (Math.abs(value) >= ENORMOUS) return page.number(value);
    const text = value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
    return /[1-9]/.test(text) ? minus(text) : text.replace("-", "");
  };
  page.percent = (fraction, places = 1) => (Number.isFinite(fraction) ? `${page.fixed(100 * fraction, places)}%` : EMPTY);
  /** The limits of an interval in brackets; nothing where there are none. */
  page.interval = (low, high, digits = 3) =>
    Number.isFinite(low) && Number.isFinite(high) ? `[${page.number(low, digits)}, ${page.number(high, digits)}]` : "";

  /** Bytes that travelled as base64: {shape, values}, the values in C order. */
  page.bytes = (packed) => ({ shape: packed.shape, values: Uint8Array.from(atob(packed.u8), (one) => one.charCodeAt(0)) });

  /** The smallest and largest number of arrays in one another, leaving out empty cells; null where there is none. */
  page.extent = (values) => {
    const flat = [values].flat(Infinity).filter(Number.isFinite);
    return flat.length ? [Math.min(...flat), Math.max(...flat)] : null;
  };

  // -- scales and axes --

  /** Round numbers between two limits, about `count` of them. */
  page.ticks = (low, high, count = 5) => {
    if (!(high > low)) return [low];
    const raw = (high - low) / Math.max(1, count);
    const unit = 10 ** Math.floor(Math.log10(raw));
    const steps = [1, 2, 5, 10].map((factor) => factor * unit);
    const within = (step) => [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
    const wanted = Math.max(0, steps.findIndex((step) => step >= raw * 0.999));
    // One tick alone says nothing of the scale: then the next finer step.
    const step = [steps[wanted], ...steps.slice(0, wanted).reverse(), unit / 2, unit / 5].find((one) => within(one)[1] > within(one)[0]) || steps[wanted];
    const [first, last] = within(step);
    return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
  };

  /** A scale from a domain to a range: linear, or {log: true}. It has `domain`, `range`, `invert` and `ticks(count)`. */
  page.scale = (domain, range, { log = false } = {}) => {
    const [start, end] = log ? domain.map(Math.log10) : domain;
    const span = end - start || 1;
    const share = (value) => ((log ? Math.log10(value) : value) - start) / span;
    // JavaScript counts an empty cell, null, as 0: a mark of it would stand at a number that nobody measured.
    const scale = (value) => (value === null ? NaN : range[0] + share(value) * (range[1] - range[0]));
    scale.invert = (place) => {
      const value = start + ((place - range[0]) / (range[1] - range[0] || 1)) * span;
      return log ? 10 ** value : value;
    };
    scale.ticks = (count) => {
      if (!log) return page.ticks(Math.min(start, end), Math.max(start, end), count);
      const powers = page.ticks(Math.ceil(start), Math.floor(end), count).filter(Number.isInteger);
      return powers.map((power) => 10 ** power);
    };
    return Object.assign(scale, { domain, range, log });
  };

  /** Widen limits to round numbers around them, and by a share so that marks do not touch the frame. */
  page.nice = ([low, high], { zero = false, room = 0.04 } = {}) => {
    let [from, to] = zero ? [Math.min(0, low), Math.max(0, high)] : [low, high];
    if (from === to) [from, to] = [from - (Math.abs(from) || 1) / 2, to + (Math.abs(to) || 1) / 2];
    const width = to - from;
    return [zero && from === 0 ? 0 : from - room * width, zero && to === 0 ? 0 : to + room * width];
  };

  /** An SVG with axes. {svg, inner, x, y, width, height}: marks go into `inner`, at x(value) and y(value).
   *
   * Axes: {domain, label, log, ticks, format, names, grid}. With `names`, a list, the axis has a place for each: x(0) is
   * the first, and x.step the room of one. `label` of the plot is what a screen reader reads.
   */
  page.plot = ({ width = 640, height = 320, x, y, label, margin = {} }) => {
    const edge = { top: 12, right: 14, bottom: x.label ? 46 : 28, left: y.label ? 62 : 46, ...margin };
    const inner = { width: width - edge.left - edge.right, height: height - edge.top - edge.bottom };
    const xs = axisScale(x, [0, inner.width]);
    const ys = axisScale(y, y.names ? [0, inner.height] : [inner.height, 0]);
    const group = page.svg("g", { transform: `translate(${edge.left},${edge.top})` });
    const svg = page.svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "plot" }, [
      page.svg("title", {}, label),
      group,
    ]);
    const axes = page.svg("g", { class: "axes", "aria-hidden": "true" });
    for (const { place, text } of ticksOf(x, xs, inner.width / 70)) {
      if (x.grid) axes.append(page.svg("line", { class: "grid", x1: place, x2: place, y1: 0, y2: inner.height }));
      axes.append(page.svg("text", { class: "tick", x: place, y: inner.height + 18, "text-anchor": "middle" }, text));
    }
    for (const { place, text } of ticksOf(y, ys, inner.height / 46)) {
      if (y.grid !== false && !y.names) {
        axes.append(page.svg("line", { class: "grid", x1: 0, x2: inner.width, y1: place, y2: place }));
      }
      axes.append(page.svg("text", { class: "tick", x: -8, y: place + 4, "text-anchor": "end" }, text));
    }
    axes.append(page.svg("line", { class: "axis", x1: 0, x2: inner.width, y1: inner.height, y2: inner.height }));
    if (x.label) {
      axes.append(page.svg("text", { class: "label", x: inner.width / 2, y: inner.height + 38, "text-anchor": "middle" }, x.label));
    }
    if (y.label) {
      const turned = `translate(${14 - edge.left},${inner.height / 2}) rotate(-90)`;
      axes.append(page.svg("text", { class: "label", transform: turned, "text-anchor": "middle" }, y.label));
    }
    group.append(axes);
    const marks = page.svg("g", { class: "marks" });
    group.append(marks);
    return { svg, inner: marks, axes, x: xs, y: ys, width: inner.width, height: inner.height, edge };
  };

  function axisScale(axis, range) {
    if (!axis.names) return page.scale(axis.domain, range, { log: axis.log });
    const step = (range[1] - range[0]) / axis.names.length;
    const scale = (index) => range[0] + (index + 0.5) * step;
    return Object.assign(scale, { step: Math.abs(step), domain: [0, axis.names.length - 1], range });
  }

  function ticksOf(axis, scale, room) {
    if (axis.names) {
      const every = Math.max(1, Math.ceil(axis.names.length / Math.max(1, axis.ticks || room * 1.8)));
      return axis.names.flatMap((text, index) => (index % every ? [] : [{ place: scale(index), text }]));
    }
    const values = Array.isArray(axis.ticks) ? axis.ticks : scale.ticks(axis.ticks || Math.max(2, Math.round(room)));
    const format = axis.format || ((value) => minus(Math.abs(value) >= 1e6 ? Number(value.toPrecision(3)).toExponential() : String(value)));
    return values.map((value) => ({ place: scale(value), text: format(value) }));
  }

  // -- colours --

  page.series = Array.from({ length: 8 }, (_, index) => `var(--s${index})`);

  // From nothing (the colour of paper, or of a dark screen) to much; readable without telling red from green.
  const RAMPS = {
    sequential: {
      light: ["#f1f0ea", "#cfe0e3", "#8fbdce", "#4a8fb5", "#215f93", "#123a6b", "#0b1f45"],
      dark: ["#23282f", "#28415a", "#2b638a", "#3a8aa8", "#63b2b3", "#a6d5b8", "#f2f2cf"],
    },
    diverging: {
      light: ["#123a6b", "#2f74ad", "#85b4d3", "#f1f0ea", "#f0b67a", "#cf6a1c", "#7a3606"],
      dark: ["#d3e7ff", "#76b0ec", "#31628f", "#23282f", "#8f4d1c", "#e08a3c", "#ffe3bf"],
    },
  };
  const channels = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

  function mixed(stops, share) {
    const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    const [from, to] = [channels(stops[below]), channels(stops[below + 1])];
    return from.map((value, index) => Math.round(value + (place - below) * (to[index] - value)));
  }
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const themed = CSS.supports("color", "light-dark(#000, #fff)"); // browsers of before 2024 stay light
  const both = (light, dark) => (themed ? `light-dark(${light}, ${dark})` : light);

  /** Where a value stands between two limits, 0 to 1; diverging ramps have 0 in the middle. */
  function share(value, low, high, kind) {
    if (kind === "diverging") {
      const limit = Math.max(Math.abs(low), Math.abs(high)) || 1;
      return 0.5 + value / limit / 2;
    }
    return high > low ? (value - low) / (high - low) : 0.5;
  }

  /** A colour for a value: `sequential` from low to high, `diverging` about 0. It follows the theme by itself. */
  page.ramp = (value, low, high, kind = "sequential") => {
    if (!Number.isFinite(value)) return "var(--none)";
    const place = share(value, low, high, kind);
    return both(css(mixed(RAMPS[kind].light, place)), css(mixed(RAMPS[kind].dark, place)));
  };

  /** Black or white, whichever is read better on page.ramp's colour of the same value. */
  page.ink = (value, low, high, kind = "sequential") => {
    if (!Number.isFinite(value)) return "var(--muted)";
    const place = share(value, low, high, kind);
    return both(inkOn(mixed(RAMPS[kind].light, place)), inkOn(mixed(RAMPS[kind].dark, place)));
  };

  function inkOn(rgb) {
    const linear = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    return luminance > 0.179 ? "#000" : "#fff";
  }

  /** 256 colours `[red, green, blue]` of a ramp in the theme of now, for pixels of a canvas. */
  page.palette = (kind = "sequential") => {
    const stops = RAMPS[kind][page.theme()];
    return Array.from({ length: 256 }, (_, index) => mixed(stops, index / 255));
  };

  const repaints = [];
  page.theme = () => !themed ? "light" : document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  /** Call back when the theme changes, as long as `element` stands in the page: only canvases need that. */
  page.onTheme = (callback, element) => repaints.push({ callback, element });
  function themeChanged() {
    repaints.splice(0, Infinity, ...repaints.filter(({ element }) => element.isConnected));
    repaints.forEach(({ callback }) => callback());
  }

  /** A colour bar with its limits and unit, as SVG. */
  page.colourBar = ({ low, high, kind = "sequential", label, width = 220 }) => {
    // Diverging colours are symmetric about 0; the bar shows the part of them that the values need.
    const [from, to] = kind === "diverging" ? [Math.min(0, low), Math.max(0, high)] : [low, high];
    const places = Math.max(0, 1 - Math.floor(Math.log10(Math.max(Math.abs(from), Math.abs(to)) || 1)));
    const number = (value) => page.fixed(value, Math.min(places, 8)); // the same decimals at both ends
    const pieces = 64;
    const scale = page.scale([from, to], [0, width]);
    const bars = Array.from({ length: pieces }, (_, index) => {
      const fill = page.ramp(from + ((index + 0.5) / pieces) * (to - from), low, high, kind);
      return page.svg("rect", { x: (index * width) / pieces, y: 0, width: width / pieces + 0.6, height: 10, fill });
    });
    const inside = kind === "diverging" ? 0 : (from + to) / 2;
    const room = [scale(inside), width - scale(inside)].every((place) => place > 46);
    const alone = from === to; // all values are the same: one number, not the same one twice
    const ends = [[from, "start"], ...(room && !alone ? [[inside, "middle"]] : []), ...(alone ? [] : [[to, "end"]])];
    const texts = ends.map(([value, anchor]) => page.svg("text", { class: "tick", x: scale(value), y: 25, "text-anchor": anchor }, number(value)));
    const whole = Math.max(width, Math.ceil(7.4 * label.length)); // a long name needs more room than the bar
    return page.svg("svg", { viewBox: `0 0 ${whole} 44`, width: whole, height: 44, role: "img", class: "bar" }, [
      page.svg("title", {}, `Colours from ${number(from)} to ${number(to)}: ${label}`),
      bars,
      texts,
      page.svg("text", { class: "label", x: 0, y: 41 }, label),
    ]);
  };

  // -- heads that are selected, in every figure; the head whose card is open --

  let selected = new Set();
  const listeners = [];

  /** Select these heads, `"L.H"` each; none clears. Marks with `data-head` follow by themselves. */
  page.select = (heads) => {
    selected = new Set(heads);
    mark(document);
    listeners.forEach((callback) => callback([...selected]));
  };
  page.selected = () => [...selected];
  page.onSelect = (callback) => {
    listeners.push(callback);
    if (selected.size) queueMicrotask(() => callback([...selected])); // when its figure is drawn
  };
  page.toggle = (head) => page.select(selected.has(head) ? page.selected().filter((one) => one !== head) : [...selected, head]);

  function mark(root) {
    for (const element of root.querySelectorAll("[data-head]")) {
      const own = element.dataset.head.split(" "); // a pair of heads has two
      element.classList.toggle("selected", selected.size > 0 && own.some((head) => selected.has(head)));
      element.classList.toggle("faded", selected.size > 0 && !own.some((head) => selected.has(head)));
    }
  }
  // A figure that draws itself anew, as a slider moves, gets its marks again.
  const redrawn = new MutationObserver(() => selected.size && mark(document));

  /** Open a head's card; its address is `#head=3.1`. */
  page.open = (head) => {
    location.hash = `head=${head}`; // card.js, where a run has cards, does more
  };

  /** A click on a mark of a head opens its card; with shift, ctrl or cmd it adds the head to the selection. */
  document.addEventListener("click", (event) => {
    const target = event.target.closest("main [data-head]");
    if (!target) return;
    const head = target.dataset.head.split(" ")[0];
    const run = Number(target.dataset.run || target.closest("[data-run]")?.dataset.run || 0);
    if (event.shiftKey || event.ctrlKey || event.metaKey || document.body.classList.contains("highlighting")) page.toggle(head);
    else {
      page.select([head]);
      page.open(head, run);
    }
  });

  // -- frames and saving --

  function download(name, blob) {
    const link = page.html("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  const PROPERTIES = [
    ..."fill fill-opacity stroke stroke-width stroke-opacity stroke-dasharray stroke-linejoin stroke-linecap opacity".split(" "),
    ..."font-family font-size font-weight font-style text-anchor dominant-baseline stop-color display visibility".split(" "),
    ..."paint-order mix-blend-mode".split(" "),
  ];

  /** A copy of an SVG with its computed styles written out: it looks the same without the page's style sheet. */
  page.styled = styled;
  function styled(svg) {
    const copy = svg.cloneNode(true);
    const [from, to] = [svg, copy].map((root) => [root, ...root.querySelectorAll("*")]);
    from.forEach((element, index) => {
      const computed = getComputedStyle(element);
      to[index].removeAttribute("class");
      to[index].removeAttribute("style");
      for (const name of PROPERTIES) {
        const value = computed.getPropertyValue(name);
        if (value && value !== DEFAULTS[name]) to[index].setAttribute(name, value);
      }
    });
    return copy;
  }
  const DEFAULTS = {
    "fill-opacity": "1", "stroke-opacity": "1", "stroke-dasharray": "none", "stroke-linejoin": "miter", "stroke-linecap": "butt",
    opacity: "1", stroke: "none", "font-style": "normal", "dominant-baseline": "auto", display: "inline", visibility: "visible",
    "paint-order": "normal", "mix-blend-mode": "normal", "stop-color": "rgb(0, 0, 0)",
  };

  // Buttons are no part of a figure, but for the entries of a legend that are on.
  const UNSAVED = "button:not(.entry), .entry[aria-pressed=false]";

  /** One SVG of all that a figure shows, at the places it has on the screen, under its title.
   *
   * A drawing that is no SVG gives one itself: root.exportSVG().
   */
  function figureSVG(root, title) {
    const own = root.exportSVG ? [].concat(root.exportSVG()) : null;
    const shown = own || [...root.querySelectorAll("svg")].filter((svg) => svg.getClientRects().length && !svg.closest(UNSAVED));
    const boxes = shown.map((svg) => (own ? { left: 0, top: 0, ...sizeOf(svg) } : svg.getBoundingClientRect()));
    const [left, top] = ["left", "top"].map((side) => Math.min(...boxes.map((box) => box[side])));
    const edge = { left: 12, top: 40 };
    let [width, height] = [0, 0];
    const placed = shown.map((svg, index) => {
      const box = boxes[index];
      const copy = own ? svg : styled(svg);
      const place = { x: box.left - left + edge.left, y: box.top - top + edge.top, width: box.width, height: box.height };
      for (const [name, value] of Object.entries(place)) copy.setAttribute(name, value.toFixed(1));
      [width, height] = [Math.max(width, place.x + place.width), Math.max(height, place.y + place.height)];
      return copy;
    });
    const theme = getComputedStyle(document.body);
    const text = { fill: theme.color, "font-family": theme.fontFamily, "font-size": "16px", "font-weight": "600", x: edge.left, y: 24 };
    const size = { width: Math.ceil(Math.max(width, 9.5 * title.length) + 12), height: Math.ceil(height + 12) };
    return page.svg("svg", { xmlns: SVG, viewBox: `0 0 ${size.width} ${size.height}`, ...size }, [
      page.svg("rect", { width: "100%", height: "100%", fill: theme.backgroundColor }),
      page.svg("text", text, title),
      placed,
    ]);
  }
  const sizeOf = (svg) => ({ width: Number(svg.getAttribute("width")), height: Number(svg.getAttribute("height")) });

  const asText = (svg) => new XMLSerializer().serializeToString(svg);

  async function savePNG(name, svg) {
    const address = URL.createObjectURL(new Blob([asText(svg)], { type: "image/svg+xml" }));
    const image = new Image();
    image.src = address;
    await image.decode();
    const zoom = 2; // sharp on a slide
    const canvas = page.html("canvas", { width: svg.getAttribute("width") * zoom, height: svg.getAttribute("height") * zoom });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(address);
    canvas.toBlob((blob) => download(name, blob), "image/png");
  }

  function csv(table) {
    const names = Object.keys(table);
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const rows = Array.from({ length: Math.max(0, ...names.map((name) => table[name].length)) }, (_, row) =>
      names.map((name) => cell(table[name][row])).join(","),
    );
    return [names.map(cell).join(","), ...rows].join("\r\n") + "\r\n";
  }

  /** Give a figure its buttons. */
  function frame(element, section) {
    const root = element.querySelector(".drawing");
    const name = `headprobe-${section.key}`;
    const button = (text, action) => page.html("button", { type: "button", class: "save", "aria-label": `Save ${section.title} as ${text}`, click: action }, text);
    const buttons = [
      button("SVG", () => download(`${name}.svg`, new Blob([asText(figureSVG(root, section.title))], { type: "image/svg+xml" }))),
      button("PNG", () => savePNG(`${name}.png`, figureSVG(root, section.title))),
    ];
    // A drawing whose data are the table already gives it itself: root.exportTable().
    const table = () => (root.exportTable ? root.exportTable() : section.table);
    if (root.exportTable || Object.keys(section.table).length) {
      buttons.push(button("CSV", () => download(`${name}.csv`, new Blob([csv(table())], { type: "text/csv" }))));
    }
    element.querySelector(".tools").append(page.html("span", { class: "hint" }, "Save"), ...buttons);
  }

  // -- the whole page --

  function theme() {
    const button = document.getElementById("theme");
    button.hidden = !themed;
    const other = () => (page.theme() === "dark" ? "light" : "dark");
    const say = () => button.setAttribute("aria-label", `Switch to the ${other()} theme`);
    const changed = () => (say(), themeChanged());
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = other();
      changed();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
    say();
  }

  function copying() {
    for (const button of document.querySelectorAll("button[data-copy]")) {
      button.addEventListener("click", async () => {
        const text = document.getElementById(button.dataset.copy).textContent;
        try {
          await navigator.clipboard.writeText(text);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
          button.textContent = "Selected: press Ctrl+C";
        }
        setTimeout(() => (button.textContent = "Copy"), 2500);
      });
    }
  }

  function selecting() {
    const bar = document.getElementById("selection");
    const text = page.html("span", {});
    bar.append(text, page.html("button", { type: "button", click: () => page.select([]) }, "Clear"));
    page.onSelect((heads) => {
      bar.hidden = heads.length === 0;
      text.textContent = heads.length > 4 ? `${heads.length} heads highlighted` : `Highlighted: ${heads.join(", ")}`;
    });
  }

  const afterwards = [];
  /** Call back when all sections are drawn. */
  page.afterStart = (callback) => afterwards.push(callback);

  function start() {
    const data = JSON.parse(document.getElementById("data").textContent);
    page.runs = data.runs;
    page.version = data.version;
    page.data = (key) => (data.sections.find((section) => section.key === key) || {}).data;
    theme();
    copying();
    selecting();
    const left = [...data.sections];
    if (left.length) draw(left.shift()); // the map answers at once; what is below the first screen follows piece by piece
    const finish = () => {
      if (document.documentElement.dataset.ready) return;
      afterwards.forEach((callback) => callback());
      document.documentElement.dataset.ready = "yes";
      const target = /^#[\w-]+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
      if (target) target.scrollIntoView(); // figures above it have grown
    };
    const next = () => {
      if (left.length) draw(left.shift());
      left.length ? setTimeout(next) : finish();
    };
    addEventListener("beforeprint", () => {
      while (left.length) draw(left.shift());
      finish();
    });
    setTimeout(next);
  }

  /** Draw one section; what goes wrong in it leaves the others as they are. */
  function draw(section) {
    const element = document.getElementById(section.key);
    const root = element.querySelector(".drawing");
    try {
      if (drawings.has(section.key)) drawings.get(section.key)(root, section.data, page);
    } catch (error) {
      root.replaceChildren(page.html("p", { class: "notice" }, `This figure could not be drawn: ${error.message}`));
      console.error(section.key, error);
    }
    frame(element, section);
    if (selected.size) mark(root);
    redrawn.observe(root, { childList: true, subtree: true });
  }

  document.addEventListener("DOMContentLoaded", start);
  return { section: (key, draw) => drawings.set(key, draw), page };
})();
