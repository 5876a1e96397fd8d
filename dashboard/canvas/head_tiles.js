// Layers × heads, one tile a head: a small map or a number. A tile answers the pointer and the keyboard.

const MASKED = 255, LARGEST_TILE = 84, LEFT = 34, TOP = 22, PREVIEW = 192;

export default function (component) {
  draw(component, open, (view) => take(view, component.data), refresh);
}

function take(view, data) {
  const { header, arrays } = unpack(data, (h) => [
    h.kind === "map" ? ["u1", h.present.length * h.rows * h.columns] : ["f4", h.layers.length * h.heads.length],
  ]);
  header.at = new Map((header.present || []).map((tile, i) => [tile, i]));
  Object.assign(view, { header, values: arrays[0] });
  const { layers, heads } = header, inside = (at) => at && at.layer < layers.length && at.head < heads.length;
  if (!inside(view.cursor)) view.cursor = null;
  view.tip.hidden = true;
  view.lit = view.cursor;
  view.part("title").textContent = header.title;
  view.part("note").textContent = header.note;
  view.part("low").textContent = digits(header.low);
  view.part("high").textContent = `${digits(header.high)} ${header.unit}`;
  view.plot.setAttribute("aria-label", `${header.alt} Arrow keys choose a head, Enter opens it, Shift with Enter pins it.`);
}

function open(view) {
  const { plot } = view;
  plot.addEventListener("pointermove", (event) => {
    const at = under(view, event);
    light(view, at || view.cursor);
    tell(view, at, event);
  });
  plot.addEventListener("pointerleave", () => {
    light(view, view.cursor);
    view.tip.hidden = true;
  });
  plot.addEventListener("click", (event) => {
    const at = under(view, event);
    if (!at || event.detail > 1) return;
    view.cursor = at;
    opening(view, event.shiftKey || event.ctrlKey || event.metaKey);
  });
  plot.addEventListener("keydown", (event) => walk(view, event));
}

function opening(view, pin) {
  const { layers, heads } = view.header, { layer, head } = view.cursor;
  view.send({ [pin ? "pin" : "head"]: [layers[layer], heads[head]] });
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function walk(view, event) {
  const { layers, heads, chosen } = view.header, step = STEPS[event.key];
  if (event.key === "Enter" && view.cursor) {
    event.preventDefault();
    return opening(view, event.shiftKey || event.ctrlKey);
  }
  if (event.key === "Escape") view.cursor = null;
  else if (!step || event.altKey || event.ctrlKey) return;
  else if (view.cursor) {
    const kept = (at, count) => Math.min(count - 1, Math.max(0, at));
    view.cursor = { layer: kept(view.cursor.layer + step[0], layers.length), head: kept(view.cursor.head + step[1], heads.length) };
  } else {
    const layer = chosen ? layers.indexOf(chosen[0]) : 0, head = chosen ? heads.indexOf(chosen[1]) : 0;
    view.cursor = { layer: Math.max(0, layer), head: Math.max(0, head) };
  }
  event.preventDefault();
  light(view, view.cursor);
  view.part("said").textContent = view.cursor ? words(view, view.cursor) : "";
}

function refresh(view) {
  const { header, root } = view;
  view.width = root.clientWidth;
  if (!view.width) return; // on a hidden tab; the observer calls again
  const ratio = window.devicePixelRatio || 1, { layers, heads } = header;
  view.look = theme(root);
  view.colours = ramp(header.signed, view.look.dark);
  const tile = Math.max(4, Math.min(LARGEST_TILE, Math.floor((view.width - LEFT - 4) / heads.length)));
  const room = header.height ? Math.max(4, Math.floor((header.height - TOP - 4) / layers.length)) : Infinity;
  const flat = header.kind === "map" ? tile : Math.min(room, Math.max(14, Math.min(tile, 36)));
  view.place = { tile, flat, ratio, gap: tile > 12 ? 2 : 1, width: LEFT + tile * heads.length + 4, height: TOP + flat * layers.length + 4 };
  view.part("bar").style.background = `linear-gradient(to right, ${Array.from({ length: 17 }, (_, i) => css(view.colours[Math.round((255 * i) / 16)])).join(", ")})`;
  paint(view);
  light(view, view.lit);
}

function paint(view) {
  const { header, place, look } = view, { layers, heads } = header;
  const brush = fitted(view.plot, place.width, place.height, place.ratio);
  layers.forEach((_, layer) => heads.forEach((__, head) => {
    const x = LEFT + head * place.tile, y = TOP + layer * place.flat, wide = place.tile - place.gap, high = place.flat - place.gap;
    if (header.kind === "map") {
      const image = mapOf(view, layer, head, Math.round(wide * place.ratio));
      if (image) brush.drawImage(image, x, y, wide, high);
      else missing(brush, x, y, wide, high, look);
    } else number(brush, view, layer, head, [x, y, wide, high]);
  }));
  brush.fillStyle = look.ink;
  brush.font = `11px ${look.font}`;
  brush.textBaseline = "middle";
  const every = (room, need) => Math.max(1, Math.ceil(need / room));
  brush.textAlign = "right";
  layers.forEach((layer, i) => i % every(place.flat, 13) || brush.fillText(String(layer), LEFT - 6, TOP + (i + 0.5) * place.flat - 1));
  brush.textAlign = "center";
  heads.forEach((head, i) => i % every(place.tile, 22) || brush.fillText(String(head), LEFT + (i + 0.5) * place.tile, TOP - 7));
}

function missing(brush, x, y, wide, high, look) {
  brush.strokeStyle = look.ink;
  brush.globalAlpha = 0.25;
  brush.strokeRect(x + 0.5, y + 0.5, wide - 1, high - 1);
  brush.globalAlpha = 1;
}

// A number as a colour, and in words where there is room.
function number(brush, view, layer, head, [x, y, wide, high]) {
  const value = valueAt(view, layer, head);
  if (!Number.isFinite(value)) return missing(brush, x, y, wide, high, view.look);
  const colour = colourOf(view, value);
  brush.fillStyle = css(colour);
  brush.fillRect(x, y, wide, high);
  if (wide < 34 || high < 13) return undefined;
  brush.font = `11px ${view.look.font}`;
  brush.fillStyle = inkOn(colour);
  brush.textAlign = "center";
  brush.textBaseline = "middle";
  const text = wide > 44 ? digits(value) : String(Number(value.toPrecision(2)));
  brush.fillText(shortened(brush, text, wide - 2), x + wide / 2, y + high / 2);
  return undefined;
}

const valueAt = (view, layer, head) => view.values[layer * view.header.heads.length + head];

function colourOf(view, value) {
  const { low, high } = view.header, at = high > low ? (value - low) / (high - low) : 0;
  return view.colours[Math.round(255 * Math.min(1, Math.max(0, at)))];
}

// One head's small map at `side` screen pixels; a pixel shows the largest of the cells under it. Masked pairs stay clear.
function mapOf(view, layer, head, side) {
  const { header, values, colours } = view, { rows, columns } = header;
  const index = header.at.get(layer * header.heads.length + head);
  if (index === undefined || side < 1) return null;
  const start = index * rows * columns, canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const brush = canvas.getContext("2d"), image = brush.createImageData(side, side);
  const range = (at, count) => [Math.floor((at * count) / side), Math.max(Math.floor((at * count) / side) + 1, Math.floor(((at + 1) * count) / side))];
  for (let y = 0; y < side; y++) {
    const [r0, r1] = range(y, rows);
    for (let x = 0; x < side; x++) {
      const [c0, c1] = range(x, columns);
      let best = -1;
      for (let row = r0; row < r1; row++) {
        for (let column = c0; column < c1; column++) {
          const value = values[start + row * columns + column];
          if (value !== MASKED && value > best) best = value;
        }
      }
      if (best >= 0) image.data.set([...colours[Math.round((best * 255) / 254)], 255], 4 * (y * side + x));
    }
  }
  brush.putImageData(image, 0, 0);
  return canvas;
}

function light(view, lit) {
  view.lit = lit;
  const { header, place, look } = view;
  if (!place) return;
  const brush = fitted(view.over, place.width, place.height, place.ratio);
  const around = (layer, head, line, colour) => {
    if (layer < 0 || head < 0) return;
    brush.lineWidth = line;
    brush.strokeStyle = colour;
    brush.strokeRect(LEFT + head * place.tile - 1, TOP + layer * place.flat - 1, place.tile, place.flat);
  };
  const placed = ([layer, head]) => [header.layers.indexOf(layer), header.heads.indexOf(head)];
  for (const pin of header.pins) {
    const [layer, head] = placed(pin), size = Math.min(10, place.flat / 2);
    if (layer < 0 || head < 0) continue;
    const x = LEFT + (head + 1) * place.tile - place.gap, y = TOP + layer * place.flat;
    brush.fillStyle = look.mark;
    brush.beginPath();
    brush.moveTo(x - size, y);
    brush.lineTo(x, y);
    brush.lineTo(x, y + size);
    brush.fill();
  }
  if (header.chosen) around(...placed(header.chosen), 3, look.mark);
  if (lit) around(lit.layer, lit.head, 1.5, look.ink);
}

function under(view, event) {
  const { place, header } = view, box = view.plot.getBoundingClientRect();
  const head = Math.floor((event.clientX - box.left - LEFT) / place.tile), layer = Math.floor((event.clientY - box.top - TOP) / place.flat);
  return layer < 0 || head < 0 || layer >= header.layers.length || head >= header.heads.length ? null : { layer, head };
}

function words(view, { layer, head }) {
  const { header } = view, at = [header.layers[layer], header.heads[head]];
  const is = (pair) => pair && pair[0] === at[0] && pair[1] === at[1];
  const said = [`head ${at[0]}.${at[1]}`];
  if (header.kind === "number") {
    const value = valueAt(view, layer, head);
    said.push(Number.isFinite(value) ? `${header.signed && value > 0 ? "+" : ""}${digits(value)} ${header.unit}` : "no value");
  } else if (!header.at.has(layer * header.heads.length + head)) said.push("no map");
  if (is(header.chosen)) said.push("chosen");
  if (header.pins.some(is)) said.push("pinned");
  return said.join(", ");
}

function tell(view, at, event) {
  const { tip, plot, part, header } = view;
  tip.hidden = !at;
  if (!at) return;
  part("words").textContent = words(view, at);
  const larger = part("larger"), image = header.kind === "map" && mapOf(view, at.layer, at.head, PREVIEW);
  larger.hidden = !image;
  if (image) {
    larger.width = larger.height = PREVIEW;
    larger.getContext("2d").drawImage(image, 0, 0);
  }
  const box = plot.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  tip.style.left = `${Math.max(0, Math.min(view.root.clientWidth - tip.offsetWidth - 2, x + 14))}px`;
  tip.style.top = `${y + 16}px`; // may reach over the lower edge: the picture is small where there are few layers
}
