(scale) => {
  // Colours of relevance, whether text on them is white, and numbers in words: as in scale.py and
  // text.py. scale: positive and negative colour stops, white first.
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const ramps = [scale.positive, scale.negative].map((stops) => stops.map(rgb));
  function colour(x) {
    const stops = ramps[x >= 0 ? 0 : 1], at = Math.min(1, Math.abs(x)) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
    return stops[low].map((from, c) => Math.round(from + part * (stops[low + 1][c] - from)));
  }
  // Whether white text has more contrast than black (WCAG 2).
  function dark(shade) {
    const [r, g, b] = shade.map((c) => c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const light = 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    return 1.05 / light > light / 0.05;
  }
  const minus = (text) => text.replace(/-/g, "−");
  function signed(value) {
    if (value === 0) return "0";
    const number = Math.abs(value) >= 0.0005 ? value.toFixed(3)
      : value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
    return (value > 0 ? "+" : "") + minus(number);
  }
  // Of a number that has three digits only.
  const rough = (value) => value === 0 ? "0" : (value > 0 ? "+" : "") + minus(value.toPrecision(3));
  const percent = (share) => Number.isFinite(share)
    ? (share >= 0 ? "+" : "") + minus((100 * share).toFixed(1)) + " %" : "–";
  // Numbers packed in base64: float32, or float16 times a unit a row.
  function unpack(text, units) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = raw.charCodeAt(i);
    if (!units) {
      const view = new DataView(bytes.buffer), values = new Float32Array(bytes.length / 4);
      for (let i = 0; i < values.length; i++) values[i] = view.getFloat32(4 * i, true);
      return values;
    }
    const values = new Float32Array(bytes.length / 2), row = values.length / units.length;
    // Of each power its value; the lowest one has no leading bit.
    const steps = Array.from({length: 32}, (_, power) => 2 ** (Math.max(power, 1) - 25));
    for (let site = 0, i = 0; site < units.length; site++) {
      for (const end = i + row; i < end; i++) {
        const high = bytes[2 * i + 1], power = (high >> 2) & 31;
        const size = ((power ? 1024 : 0) + ((high & 3) << 8) + bytes[2 * i]) * steps[power];
        values[i] = (high & 0x80 ? -size : size) * units[site];
      }
    }
    return values;
  }
  return {rgb, colour, dark, signed, rough, percent, unpack};
}
