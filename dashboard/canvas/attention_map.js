// One attention map that answers the pointer and the keyboard.

const SCALES = [["linear", "linear"], ["sqrt", "square root"], ["log", "logarithm"], ["clipped", "up to the 99th percentile"]];
const NAMES = { linear: "linear", sqrt: "square root", log: "logarithmic", clipped: "cut at the 99th percentile" };
const kept = {}; // the reader's choice of colours, for every map of this tab

export default function (component) {
  draw(component, open, (view) => take(view, component.data), refresh);
}

function open(view) {
  const { part } = view;
  part("scale").addEventListener("change", (event) => {
    kept[view.map.header.signed ? "signed" : "plain"] = event.target.value;
    refresh(view);
  });
  part("without").addEventListener("change", (event) => {
    kept.without = event.target.checked;
    refresh(view);
  });
  part("whole").addEventListener("click", () => view.send({ window: null }));
  pointing(view);
  walking(view);
}

function take(view, data) {
  const { header, arrays } = unpack(data, (h) => [
    ["f2", h.triangle ? (h.rows * (h.rows + 1)) / 2 : h.rows * h.columns],
    ...(h.received ? [["f4", h.received]] : []), ...(h.entropy ? [["f4", h.entropy]] : []),
  ]);
  const map = { header, cells: rectangle(header, arrays[0]) };
  if (header.received) map.received = arrays[1];
  if (header.entropy) map.entropy = arrays[arrays.length - 1];
  const most = (values) => (values || []).reduce((a, b) => (b > a ? b : a), 0) || 1;
  map.mostReceived = most(map.received);
  map.mostEntropy = most(map.entropy);
  const old = view.map && view.map.header;
  if (!old || old.rows !== header.rows || old.columns !== header.columns) view.cursor = null;
  Object.assign(view, { map, lit: view.cursor, drag: null });
  view.tip.hidden = true;

  view.part("title").textContent = header.title;
  view.part("note").textContent = header.note;
  view.part("whole").hidden = !header.windowed;
  view.part("rest").hidden = header.first[1] !== 0 || header.signed;
  view.plot.setAttribute("aria-label", `${header.alt} Arrow keys choose a pair, Enter opens it, Shift with an arrow key goes to the next head.`);
  const select = view.part("scale");
  select.replaceChildren(...SCALES.filter(([name]) => !header.signed || name !== "log").map(([name, text]) => new Option(text, name)));
  const wanted = kept[header.signed ? "signed" : "plain"] || header.scale;
  select.value = header.signed && wanted === "log" ? "linear" : wanted;
  view.part("without").checked = Boolean(kept.without);
  strips(view);
}

function refresh(view) {
  const { map, root } = view, { header } = map;
  view.width = root.clientWidth;
  if (!view.width) return; // on a hidden tab; the observer calls again
  view.look = theme(root);
  view.colours = ramp(header.signed, view.look.dark);
  view.scale = scaleOf(map, view.part("scale").value, !view.part("rest").hidden && view.part("without").checked);
  const brush = view.plot.getContext("2d");
  brush.font = `11px ${view.look.font}`;
  view.place = layout(map, view.width, window.devicePixelRatio || 1, brush);
  legend(view);
  paint(view);
  light(view, view.lit);
}

function legend(view) {
  const { scale, colours, part, map, place } = view, stops = 16;
  part("low").textContent = header_low(scale);
  part("high").textContent = `${scale.clipped ? "≥ " : ""}${digits(scale.high)} ${map.header.unit}, ${NAMES[scale.kind]}`;
  part("bar").style.background = `linear-gradient(to right, ${Array.from({ length: stops + 1 }, (_, i) => {
    const t = i / stops; // the bar is even in colour; where a weight stands on it is said by the kind of scale
    return css(colours[Math.round(255 * t)]);
  }).join(", ")})`;
  const masked = map.cells.some((value) => !Number.isFinite(value));
  part("hatch").hidden = part("hatched").hidden = !masked;
  if (place.fold > 1) {
    const block = map.header.block * place.fold;
    part("note").textContent = `each dot = largest of ${block} × ${block}`;
  } else part("note").textContent = map.header.note;
}

const header_low = (scale) => (scale.kind === "log" ? `≤ ${digits(scale.low)}` : `${scale.clipped && scale.low ? "≤ " : ""}${digits(scale.low)}`);

// Two lines of tokens, linked with the map both ways.
function strips(view) {
  const { header } = view.map;
  [["queries", "query", 0], ["keys", "key", 1]].forEach(([name, side, axis]) => {
    const strip = view.part(name);
    strip.hidden = !header.strips;
    if (!header.strips) return strip.replaceChildren();
    const text = JSON.stringify(header[name]);
    if (strip.text === text && strip.first === header.first[axis]) return;
    Object.assign(strip, { text, first: header.first[axis] });
    strip.replaceChildren(...header[name].map((token, i) => {
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.textContent = token;
      chip.title = `${side} ${i + header.first[axis]}`;
      const lit = side === "query" ? { row: i, column: null } : { row: null, column: i };
      chip.setAttribute("role", "button");
      chip.tabIndex = i ? -1 : 0; // one stop of the Tab key per strip; the arrow keys go on from there
      for (const come of ["pointerenter", "focus"]) chip.addEventListener(come, () => light(view, lit));
      for (const go of ["pointerleave", "blur"]) chip.addEventListener(go, () => light(view, view.cursor));
      chip.addEventListener("keydown", (event) => {
        const next = { ArrowRight: chip.nextElementSibling, ArrowLeft: chip.previousElementSibling }[event.key];
        if (event.key === "Enter") chip.click();
        if (!next) return;
        event.preventDefault();
        chip.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
      chip.addEventListener("click", () => view.send({ token: i + header.first[axis], side }));
      return chip;
    }));
  });
}

// Light a row, a column or a cell: on the map, in the strips, and in words.
function light(view, lit) {
  view.lit = lit;
  paintOver(view);
  const { header, cells } = view.map;
  if (!header.strips) return;
  const chips = (name, at, weight) => [...view.part(name).children].forEach((chip, i) => {
    chip.classList.toggle("lit", i === at);
    const value = weight ? weight(i) : NaN, colour = Number.isFinite(value) ? colourAt(view, value) : null;
    chip.style.background = colour ? css(colour) : "";
    chip.style.color = colour ? inkOn(colour) : "";
  });
  const at = (row, column) => cells[row * header.columns + column];
  const [row, column] = lit ? [lit.row, lit.column] : [null, null];
  chips("keys", column, row === null ? null : (i) => at(row, i));
  chips("queries", row, column === null || row !== null ? null : (i) => at(i, column));
}

// Words for what is under the pointer; never HTML.
function words(view, { row, column }) {
  const { map } = view, { header } = map, lines = [];
  if (row !== null && column !== null) {
    const value = map.cells[row * header.columns + column], most = header.block > 1 ? "largest " : "";
    lines.push(`${named(view, 0, row)} → ${named(view, 1, column)}`);
    lines.push(Number.isFinite(value) ? `${most}${header.unit} ${header.signed && value > 0 ? "+" : ""}${digits(value)}` : "masked: this query does not see this key");
  } else lines.push(row !== null ? named(view, 0, row) : named(view, 1, column));
  if (column !== null && map.received) lines.push(`key receives ${digits(largestOf(view, map.received, column))}`);
  if (row !== null && map.entropy) lines.push(`entropy of the query ${digits(largestOf(view, map.entropy, row))} nats`);
  return lines;
}

function named(view, side, index) {
  const { block, first, shape, queries, keys } = view.map.header, token = (side ? keys : queries)[index];
  const from = index * block, to = Math.min(from + block, shape[side]) - 1;
  if (from === to) return `${side ? "key" : "query"} ${from + first[side]} ${token}`;
  return `${side ? "keys" : "queries"} ${from + first[side]} to ${to + first[side]} from ${token}`;
}

function largestOf(view, values, index) {
  const { block } = view.map.header;
  return values.subarray(index * block, (index + 1) * block).reduce((a, b) => (b > a || Number.isNaN(a) ? b : a), NaN);
}

// What lies under a point of the canvas; row or column is null over a margin or a label.
function under(view, event, held = false) {
  const { place, map } = view, box = view.plot.getBoundingClientRect();
  const x = event.clientX - box.left - place.left, y = event.clientY - box.top - place.top;
  const clamp = (at, count) => Math.min(count - 1, Math.max(0, Math.floor(at / place.cell)));
  let row = clamp(y, map.header.rows), column = clamp(x, map.header.columns);
  if (held) return { row, column };
  if (x < 0 || x >= place.wide) column = null;
  if (y < 0 || y >= place.high) row = null;
  if (row === null && column === null) return null;
  if (place.fold > 1 && row !== null && column !== null) {
    const best = largestIn(map, row - (row % place.fold), column - (column % place.fold), place.fold);
    row = Math.floor(best / map.header.columns);
    column = best % map.header.columns;
  }
  return { row, column };
}

function pointing(view) {
  const { plot } = view;
  plot.addEventListener("pointermove", (event) => {
    if (view.drag) {
      view.drag.to = under(view, event, true);
      view.drag.moved ||= Math.hypot(event.clientX - view.drag.x, event.clientY - view.drag.y) > 4;
      return paintOver(view);
    }
    const at = under(view, event);
    light(view, at || view.cursor);
    tell(view, at, event);
  });
  plot.addEventListener("pointerleave", () => {
    if (view.drag) return;
    light(view, view.cursor);
    view.tip.hidden = true;
  });
  plot.addEventListener("pointerdown", (event) => {
    const at = under(view, event);
    if (event.button || event.pointerType === "touch" || !at || at.row === null || at.column === null) return;
    view.drag = { x: event.clientX, y: event.clientY, from: under(view, event, true), to: under(view, event, true), moved: false };
    plot.setPointerCapture(event.pointerId);
    view.tip.hidden = true;
  });
  plot.addEventListener("pointercancel", () => { view.drag = null; paintOver(view); });
  plot.addEventListener("pointerup", () => {
    const drag = view.drag;
    view.drag = null;
    if (!drag || !drag.moved) return;
    view.brushed = true;
    paintOver(view);
    const { block, first, shape } = view.map.header, [r0, r1, c0, c1] = dragged(drag);
    const place = (cell, side) => Math.min(cell * block, shape[side]) + first[side];
    view.send({ window: [place(r0, 0), place(r1, 0), place(c0, 1), place(c1, 1)] });
  });
  plot.addEventListener("click", (event) => {
    const at = under(view, event);
    if (view.brushed || event.detail > 1 || !at) {
      view.brushed = false; // the click that ends a drag, or the second of a double click
      return;
    }
    view.cursor = at.row !== null && at.column !== null ? at : null;
    light(view, at);
    view.part("said").textContent = words(view, at).join(", ");
    opening(view, at);
  });
  plot.addEventListener("dblclick", (event) => under(view, event) && view.send({ window: null }));
}

function opening(view, { row, column }) {
  const { block, first } = view.map.header;
  if (row !== null && column !== null) view.send({ cell: [row * block + first[0], column * block + first[1]] });
  else if (row !== null) view.send({ token: row * block + first[0], side: "query" });
  else view.send({ token: column * block + first[1], side: "key" });
}

function tell(view, at, event) {
  const { tip, plot } = view;
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = words(view, at).join("\n");
  const box = plot.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const room = view.root.clientWidth - tip.offsetWidth - 2;
  tip.style.left = `${Math.max(0, Math.min(room, x + 14))}px`;
  tip.style.top = `${Math.max(0, y + 16 + tip.offsetHeight > box.height ? y - tip.offsetHeight - 10 : y + 16)}px`;
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function walking(view) {
  view.plot.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (step && (event.shiftKey || event.altKey)) {
      event.preventDefault();
      return view.send({ walk: step });
    }
    if (step) {
      const { header } = view.map, start = view.cursor || starting(view);
      const next = view.cursor ? { row: start.row + step[0], column: start.column + step[1] } : start;
      view.cursor = { row: Math.min(header.rows - 1, Math.max(0, next.row)), column: Math.min(header.columns - 1, Math.max(0, next.column)) };
    } else if (event.key === "Enter" && view.cursor) return view.send(sentCell(view));
    else if (event.key === "Escape") view.cursor = null;
    else return undefined;
    event.preventDefault();
    light(view, view.cursor);
    view.part("said").textContent = view.cursor ? words(view, view.cursor).join(", ") : "";
    return undefined;
  });
}

// The keyboard starts at the chosen pair, else at the largest cell.
function starting(view) {
  const { header } = view.map, { chosen, first, block } = header;
  if (chosen) {
    const row = Math.floor((chosen[0] - first[0]) / block), column = Math.floor((chosen[1] - first[1]) / block);
    if (row >= 0 && column >= 0 && row < header.rows && column < header.columns) return { row, column };
  }
  const best = largestIn(view.map, 0, 0, Math.max(header.rows, header.columns));
  return { row: Math.floor(best / header.columns), column: best % header.columns };
}

function sentCell(view) {
  const { first, block } = view.map.header;
  return { cell: [view.cursor.row * block + first[0], view.cursor.column * block + first[1]] };
}
