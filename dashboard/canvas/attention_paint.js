// Drawing of one attention map: cells, margins, labels, and what is lit above them.

const TALLEST = 620, WIDEST_CELL = 34, MARGIN = 40, LABEL = 13; // page pixels
const LEAST = 1e-4; // where the logarithmic scale ends

// The cells as a full rectangle; NaN where a pair is masked.
function rectangle(header, sent) {
  const { rows, columns, triangle, factor } = header;
  const cells = new Float32Array(rows * columns).fill(NaN);
  let at = 0;
  for (let row = 0; row < rows; row++) {
    const end = triangle ? row + 1 : columns;
    for (let column = 0; column < end; column++) cells[row * columns + column] = sent[at++] * factor;
  }
  return cells;
}

// The upper end of the colours, and words for the scale.
function scaleOf(map, kind, without) {
  const { header, cells } = map, from = without && header.first[1] === 0 ? 1 : 0, sizes = [];
  for (let i = 0; i < cells.length; i++) {
    if (i % header.columns >= from && Number.isFinite(cells[i])) sizes.push(Math.abs(cells[i]));
  }
  let largest = 0;
  for (const size of sizes) if (size > largest) largest = size;
  let high = header.signed ? Math.max(header.floor, largest) : from || largest > 1 ? largest || 1 : 1;
  if (kind === "clipped" && sizes.length) {
    const sorted = Float32Array.from(sizes).sort();
    high = Math.max(sorted[Math.floor(0.99 * (sorted.length - 1))], header.signed ? header.floor : 0) || high;
  }
  return { kind, high, low: header.signed ? -high : kind === "log" ? high * LEAST : 0, clipped: kind === "clipped" };
}

// Where a weight stands between nothing and most, 0 to 1; a change between -1 and 1.
function share(value, scale) {
  const size = Math.min(1, Math.abs(value) / scale.high);
  const at = scale.kind === "sqrt" ? Math.sqrt(size)
    : scale.kind === "log" ? (size > LEAST ? 1 - Math.log(size) / Math.log(LEAST) : 0) : size;
  return value < 0 ? -at : at;
}

const colourAt = (view, value) => {
  const at = share(value, view.scale);
  return view.colours[Math.round(view.map.header.signed ? 127.5 + 127.5 * at : 255 * Math.max(0, at))];
};

// Where everything stands, in page pixels. A cell is a whole number of screen pixels; where there are more cells than
// screen pixels, `fold` × `fold` of them share one, which shows the largest.
function layout(map, width, ratio, brush) {
  const { rows, columns, queries, received, entropy } = map.header;
  let longest = 0;
  for (const label of queries) longest = Math.max(longest, brush.measureText(label).width);
  const top = received ? MARGIN + 6 : 4;
  const right = entropy ? MARGIN + 10 : 4;
  // labels give way to cells that would otherwise share a screen pixel
  const left = Math.round(Math.min(longest + 34, 0.28 * width, Math.max(90, width - right - columns / ratio)));
  const room = Math.min((width - left - right) / columns, TALLEST / rows, WIDEST_CELL) * ratio;
  const fold = room < 1 ? Math.ceil(1 / room) : 1;
  const cell = (fold > 1 ? 1 / fold : Math.floor(room)) / ratio;
  let label = 0;
  for (const text of map.header.keys) label = Math.max(label, brush.measureText(text).width);
  const below = Math.min(label + 34, 96);
  return { left, top, right, below, cell, fold, ratio, wide: cell * columns, high: cell * rows,
    width: left + cell * columns + right, height: top + cell * rows + below };
}

function paint(view) {
  const { map, place, look } = view, { header } = map;
  const brush = fitted(view.plot, place.width, place.height, place.ratio);
  brush.font = `11px ${look.font}`;
  hatch(brush, place, look);
  brush.imageSmoothingEnabled = false;
  const image = pixels(view), { fold, cell } = place;
  brush.drawImage(image, place.left, place.top, image.width * cell * fold, image.height * cell * fold);
  brush.strokeStyle = look.ink;
  brush.globalAlpha = 0.35;
  brush.strokeRect(place.left - 0.5, place.top - 0.5, place.wide + 1, place.high + 1);
  brush.globalAlpha = 1;
  margins(brush, view);
  labels(brush, view, header.queries, 0);
  labels(brush, view, header.keys, 1);
}

// One picture point per cell (or per fold of cells); masked pairs stay clear, so that the hatching shows.
function pixels(view) {
  const { map, place } = view, { rows, columns } = map.header, fold = place.fold;
  const high = Math.ceil(rows / fold), wide = Math.ceil(columns / fold);
  const canvas = document.createElement("canvas");
  canvas.width = wide;
  canvas.height = high;
  const brush = canvas.getContext("2d"), image = brush.createImageData(wide, high);
  for (let y = 0; y < high; y++) {
    for (let x = 0; x < wide; x++) {
      const value = map.cells[largestIn(map, y * fold, x * fold, fold)];
      if (!Number.isFinite(value)) continue;
      const colour = colourAt(view, value), at = 4 * (y * wide + x);
      for (let i = 0; i < 3; i++) image.data[at + i] = colour[i];
      image.data[at + 3] = 255;
    }
  }
  brush.putImageData(image, 0, 0);
  return canvas;
}

// The place of the largest cell of a square; of its first cell where all are masked.
function largestIn(map, row, column, side) {
  const { rows, columns } = map.header;
  let best = row * columns + column;
  for (let y = row; y < Math.min(row + side, rows); y++) {
    for (let x = column; x < Math.min(column + side, columns); x++) {
      const value = map.cells[y * columns + x], held = map.cells[best];
      if (Number.isFinite(value) && !(Math.abs(held) >= Math.abs(value))) best = y * columns + x;
    }
  }
  return best;
}

function hatch(brush, place, look) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const lines = tile.getContext("2d");
  lines.strokeStyle = look.ink;
  lines.globalAlpha = 0.28;
  for (const at of [-6, 0, 6]) {
    lines.moveTo(at, 6);
    lines.lineTo(at + 6, 0);
  }
  lines.stroke();
  brush.fillStyle = brush.createPattern(tile, "repeat");
  brush.fillRect(place.left, place.top, place.wide, place.high);
}

// Exact bars: what each key receives above, the entropy of each query on the right.
function margins(brush, view) {
  const { map, place, look } = view, { block, shape } = map.header;
  const bars = (values, most, bar) => {
    const size = place.cell / block;
    values.forEach((value, i) => { if (value > 0) bar(i * size, Math.max(size, 1 / place.ratio), (MARGIN * value) / most); });
  };
  brush.fillStyle = look.ink;
  brush.globalAlpha = 0.6;
  if (map.received) {
    bars(map.received, map.mostReceived, (at, wide, high) =>
      brush.fillRect(place.left + at, place.top - 3 - high, wide, high));
  }
  if (map.entropy) {
    const even = Math.max(Math.log(Math.max(2, shape[1])), map.mostEntropy);
    bars(map.entropy, even, (at, high, wide) => brush.fillRect(place.left + place.wide + 4, place.top + at, wide, high));
  }
  brush.globalAlpha = 0.8;
  brush.textBaseline = "top";
  brush.textAlign = "right";
  if (map.received) brush.fillText("received", place.left - 5, 2);
  brush.textAlign = "left";
  if (map.entropy) {
    brush.fillText("entropy", place.left + place.wide + 4, place.top + place.high + 4);
    brush.fillText("(nats)", place.left + place.wide + 4, place.top + place.high + 16);
  }
  brush.globalAlpha = 1;
}

// Token labels, every n-th where they would touch.
function labels(brush, view, texts, side) {
  const { place, look, map } = view, step = Math.max(1, Math.ceil(LABEL / place.cell));
  brush.fillStyle = look.ink;
  brush.textBaseline = "middle";
  brush.textAlign = "right";
  for (let i = 0; i < texts.length; i += step) {
    const text = `${i * map.header.block + map.header.first[side]} ${texts[i]}`, middle = (i + 0.5) * place.cell;
    if (side === 0) {
      brush.fillText(shortened(brush, text, place.left - 8), place.left - 5, place.top + middle);
      continue;
    }
    brush.save();
    brush.translate(place.left + middle, place.top + place.high + 5);
    brush.rotate(-Math.PI / 2);
    brush.fillText(shortened(brush, text, place.below - 8), 0, 0);
    brush.restore();
  }
}

// What moves: the cross under the pointer, the chosen pair, the window being dragged.
function paintOver(view) {
  const { place, map, look, lit, drag } = view, { first, block, chosen } = map.header;
  const brush = fitted(view.over, place.width, place.height, place.ratio);
  const box = (row, column, high, wide) =>
    [place.left + column * place.cell, place.top + row * place.cell, wide * place.cell, high * place.cell];
  brush.fillStyle = look.ink;
  brush.strokeStyle = look.mark;
  if (lit) {
    brush.globalAlpha = 0.14;
    if (lit.row !== null) brush.fillRect(place.left, box(lit.row, 0, 1, 1)[1], place.wide, Math.max(1, place.cell));
    if (lit.column !== null) brush.fillRect(box(0, lit.column, 1, 1)[0], place.top, Math.max(1, place.cell), place.high);
    brush.globalAlpha = 1;
    if (lit.row !== null && lit.column !== null) outlined(brush, box(lit.row, lit.column, 1, 1), 1);
  }
  if (chosen) {
    const row = Math.floor((chosen[0] - first[0]) / block), column = Math.floor((chosen[1] - first[1]) / block);
    if (row >= 0 && column >= 0 && row < map.header.rows && column < map.header.columns) {
      outlined(brush, box(row, column, 1, 1), 2.5);
    }
  }
  if (drag && drag.moved) {
    const [r0, r1, c0, c1] = dragged(drag);
    brush.globalAlpha = 0.15;
    brush.fillRect(...box(r0, c0, r1 - r0, c1 - c0));
    brush.globalAlpha = 1;
    outlined(brush, box(r0, c0, r1 - r0, c1 - c0), 1.5);
  }
}

function outlined(brush, [x, y, wide, high], line) {
  const grow = Math.max(0, 5 - wide) / 2; // a cell of a pixel gets an outline that can be seen
  brush.lineWidth = line;
  brush.strokeRect(x - grow, y - grow, wide + 2 * grow, high + 2 * grow);
}

const dragged = ({ from, to }) => [
  Math.min(from.row, to.row), Math.max(from.row, to.row) + 1,
  Math.min(from.column, to.column), Math.max(from.column, to.column) + 1,
];
