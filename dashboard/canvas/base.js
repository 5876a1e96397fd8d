// What every canvas here needs: reading the bytes that Python packed, colours that grow evenly, and words of numbers.

const views = new WeakMap();

// Draws a component in its place, which `open` makes ready once. `refresh` draws it again where its width changes: a place
// that is not laid out yet has none. There is nothing to undo: the watch goes with the place. Streamlit undoes a drawing that
// another has overtaken after that other, and would end the watch of both.
function draw({ parentElement, setTriggerValue }, open, take, refresh) {
  const root = parentElement.querySelector("section.map");
  let view = views.get(root);
  if (!view) {
    const part = (name) => root.querySelector(`.${name}`);
    view = { root, part, plot: part("plot"), over: part("over"), tip: part("tip"), lit: null, cursor: null };
    view.watch = new ResizeObserver(() => view.width !== root.clientWidth && refresh(view));
    view.watch.observe(root);
    open(view);
    views.set(root, view);
  }
  view.send = (event) => setTriggerValue("event", event);
  take(view);
  refresh(view);
}

// The header and the arrays behind it. `kinds` maps a header to [[kind, length], ...]; kinds are f2, f4 and u1.
function unpack(bytes, kinds) {
  const buffer = bytes.slice().buffer; // a copy starts on a whole word; the message may not
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + whole(length);
  const arrays = kinds(header).map(([kind, count]) => {
    const size = { f2: 2, f4: 4, u1: 1 }[kind];
    if (at + count * size > buffer.byteLength) throw new Error("the numbers do not fill the map");
    const part = kind === "f4" ? new Float32Array(buffer, at, count)
      : kind === "u1" ? new Uint8Array(buffer, at, count) : halves(new Uint16Array(buffer, at, count));
    at += whole(count * size);
    return part;
  });
  return { header, arrays };
}

const whole = (length) => length + ((4 - (length % 4)) % 4);

// IEEE 754 half precision, https://en.wikipedia.org/wiki/Half-precision_floating-point_format
function halves(words) {
  const out = new Float32Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const sign = words[i] & 0x8000 ? -1 : 1, exponent = (words[i] >> 10) & 31, fraction = words[i] & 1023;
    out[i] = exponent === 31 ? NaN
      : sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }
  return out;
}

// A colour of OKLab (Ottosson 2020) as [red, green, blue]; equal steps of lightness look equal.
function oklch(lightness, chroma, degrees) {
  const a = chroma * Math.cos((degrees * Math.PI) / 180), b = chroma * Math.sin((degrees * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => {
    const y = x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, y)));
  });
}

// 256 colours from nothing to most; on a dark page from dark to bright. Signed ones run from blue over nothing to red.
function ramp(signed, dark) {
  return Array.from({ length: 256 }, (_, i) => {
    if (!signed) {
      const t = i / 255;
      return dark ? oklch(0.22 + 0.72 * t, 0.02 + 0.11 * Math.sin(Math.PI * t), 250)
        : oklch(0.98 - 0.64 * t, 0.005 + 0.14 * Math.sin(Math.PI * Math.min(1, 0.8 * t)), 252);
    }
    const t = (i - 127.5) / 127.5, size = Math.abs(t), hue = t > 0 ? 28 : 255;
    return dark ? oklch(0.24 + 0.5 * size, 0.17 * size, hue) : oklch(0.97 - 0.5 * size, 0.18 * size, hue);
  });
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#16202b" : "#f6f8fa");

function theme(element) {
  const style = getComputedStyle(element);
  const named = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
  const ground = named("--st-background-color", "#ffffff");
  const [r, g, b] = rgbOf(ground);
  return {
    dark: 0.299 * r + 0.587 * g + 0.114 * b < 128,
    ground,
    ink: named("--st-text-color", "#31333f"),
    mark: named("--st-primary-color", "#e4572e"),
    font: named("--st-font", "sans-serif"),
  };
}

function rgbOf(colour) {
  const brush = document.createElement("canvas").getContext("2d");
  brush.fillStyle = colour;
  brush.fillRect(0, 0, 1, 1);
  return brush.getImageData(0, 0, 1, 1).data;
}

// Three digits, as few signs as that takes.
function digits(value) {
  if (!Number.isFinite(value)) return "none";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e4 ? value.toExponential(size < 6e-5 ? 1 : 2) : value.toPrecision(3);
}

// Room for `width` × `height` page pixels at the sharpness of the screen; gives a brush that counts in page pixels.
function fitted(canvas, width, height, ratio) {
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${canvas.width / ratio}px`;
  canvas.style.height = `${canvas.height / ratio}px`;
  const brush = canvas.getContext("2d");
  brush.setTransform(ratio, 0, 0, ratio, 0, 0);
  return brush;
}

// Text cut to a width; tokens reach the page as text alone.
function shortened(brush, text, width) {
  if (brush.measureText(text).width <= width) return text;
  let keep = text.length;
  while (keep > 1 && brush.measureText(text.slice(0, keep) + "…").width > width) keep--;
  return text.slice(0, keep) + "…";
}
