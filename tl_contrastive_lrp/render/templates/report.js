(parts) => {
  "use strict";
  // parts: functions of other files: look, and for a long prompt folded and table.
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const {rgb, colour, dark, signed, rough, percent, unpack} = parts.look(data);
  const grey = rgb(data.grey);

  // Numbers of a token, and the same token marked from the tables.
  const prompt = byId("prompt"), readout = byId("readout");
  let marked = null;
  const words = (i) => `«${data.tokens[i]}» · id ${data.ids[i]} · position ${i} · relevance `
    + `${signed(data.relevance[i])} · ${percent(data.relevance[i] / data.delta)} of Δℓ`
    + (data.greyed[i] ? " · left out of the scale" : "");
  const mark = (i) => {
    if (marked) marked.classList.remove("on");
    marked = i === null ? null : prompt.querySelector(`[data-i="${i}"]`);
    if (marked) {
      marked.classList.add("on");
      if (!marked.title) marked.title = words(i);
    }
    if (i !== null && (marked || data.ids)) readout.textContent = marked ? marked.title : words(i);
  };
  document.addEventListener("mouseover", (event) => {
    const near = event.target.closest ? event.target.closest("[data-i]") : null;
    mark(near ? near.dataset.i : null);
  });

  const include = byId("include"), gain = byId("gain"), times = byId("times");
  const counts = (i) => !data.greyed[i] || Boolean(include && include.checked);
  const limits = [...document.querySelectorAll(".limit")];
  const first = limits.map((limit) => limit.textContent);
  const strength = () => [1, 1.5, 2, 3, 5, 10, 20][gain.value];
  function shade(span, i, factor) {
    data.scales.forEach((scale, mode) => {
      const shade = colour(data.relevance[i] / scale * factor);
      span.style.setProperty("--" + "ab"[mode], `rgb(${shade})`);
      span.classList.toggle("wv"[mode], dark(shade));
    });
  }
  const strengthen = () => {
    const factor = strength();
    times.textContent = `×${factor}`;
    gain.setAttribute("aria-valuetext", `times ${factor}`);
    prompt.querySelectorAll(".t").forEach((span) => shade(span, Number(span.dataset.i), factor));
    limits.forEach((limit, at) => {
      const mode = limit.classList.contains("only") ? 0 : 1;
      limit.textContent = factor === 1 ? first[at] : (data.scales[mode] / factor).toPrecision(3);
    });
  };
  gain.addEventListener("input", strengthen);
  if (gain.value !== "0") strengthen();  // a reload may restore the controls
  byId("switches").hidden = false;

  // A long prompt: its tokens of low relevance are folded, its table is made when it is opened.
  let jump = null;
  if (parts.folded) {
    const section = prompt.closest("section");
    jump = parts.folded(section, {
      tokens: data.tokens,
      folds: data.folds,
      paint: (span, i) => {
        if (data.greyed[i]) span.classList.add("g");
        shade(span, i, strength());
      },
      tell: mark,
      find: parts.find,
    }).jump;
    parts.table(byId("rows"), data, {signed, percent});
  }

  const canvas = byId("canvas");
  const draw = canvas ? siteMap(canvas) : () => {};
  if (include) {
    const apply = () => {
      document.body.classList.toggle("all", include.checked);
      draw();
    };
    include.addEventListener("change", apply);
    apply();
  }

  function siteMap(canvas) {
    const values = unpack(data.resid, data.units);
    const sites = data.sites.length, n = data.tokens.length;
    const labels = data.sites.map((site) => site.replace("blocks.", "").replace("hook_", ""));
    const frame = byId("map"), per = byId("per"), cell = byId("cell");
    const rowHeight = Math.max(7, Math.min(18, Math.floor(560 / sites)));
    let left = 0, columns = 0, width = 0;

    // Weak positions would vanish beside the last one, which gathers all relevance in the end.
    const root = (x) => Math.sign(x) * Math.sqrt(Math.abs(x));
    // The position a column of pixels stands for: where there are more positions than columns, the
    // strongest of its share, so that no peak is lost.
    function pick(site, column) {
      const from = Math.floor(column * n / columns);
      const to = Math.max(from + 1, Math.floor((column + 1) * n / columns));
      let best = from, size = -1;
      for (let i = from; i < to; i++) {
        const here = counts(i) ? Math.abs(values[site * n + i]) : -0.5;
        if (here > size) { best = i; size = here; }
      }
      return best;
    }
    function scales() {
      const own = data.sites.map((_, site) => {
        let largest = 0;
        for (let i = 0; i < n; i++) {
          if (counts(i)) largest = Math.max(largest, Math.abs(values[site * n + i]));
        }
        return largest || 1;
      });
      return per.value === "shared" ? own.map(() => Math.max(...own)) : own;
    }
    function draw() {
      const context = canvas.getContext("2d");
      const ratio = window.devicePixelRatio || 1;
      context.font = "11px system-ui, sans-serif";
      left = Math.ceil(Math.max(...labels.map((label) => context.measureText(label).width))) + 8;
      const room = Math.max(120, frame.clientWidth - left - 1);
      width = Math.min(22, room / n);
      columns = Math.min(n, Math.floor(room));
      const inner = width * n, written = width >= 11 ? 92 : 22;
      const height = sites * rowHeight + written;
      canvas.width = Math.ceil((left + inner + 1) * ratio);
      canvas.height = Math.ceil(height * ratio);
      canvas.style.width = `${left + inner + 1}px`;
      canvas.style.height = `${height}px`;

      const pixels = new ImageData(columns, sites), scale = scales();
      for (let site = 0; site < sites; site++) {
        for (let column = 0; column < columns; column++) {
          const i = pick(site, column);
          const shade = counts(i) ? colour(root(values[site * n + i] / scale[site])) : grey;
          pixels.data.set([...shade, 255], 4 * (site * columns + column));
        }
      }
      const small = document.createElement("canvas");
      small.width = columns;
      small.height = sites;
      small.getContext("2d").putImageData(pixels, 0, 0);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, left + inner + 1, height);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, left, 0, inner, sites * rowHeight);

      context.font = "11px system-ui, sans-serif";
      context.fillStyle = "#5b5e68";
      context.textBaseline = "middle";
      context.textAlign = "right";
      const every = Math.ceil(12 / rowHeight);
      labels.forEach((label, site) => {
        if (site % every === 0 || site === sites - 1 && (sites - 1) % every >= every / 2) {
          context.fillText(label, left - 6, (site + 0.5) * rowHeight);
        }
      });
      context.strokeStyle = "rgba(0,0,0,.10)";
      context.strokeRect(left + 0.5, 0.5, inner - 1, sites * rowHeight - 1);
      const below = sites * rowHeight + 5;
      if (written > 30) {
        context.beginPath();
        for (let i = 1; i < n; i++) {
          context.moveTo(left + i * width, 0);
          context.lineTo(left + i * width, sites * rowHeight);
        }
        context.stroke();
        context.font = "11px ui-monospace, Menlo, Consolas, monospace";
        data.tokens.forEach((token, i) => {
          context.save();
          context.translate(left + (i + 0.5) * width, below);
          context.rotate(-Math.PI / 2);
          context.fillText(token.length > 13 ? `${token.slice(0, 12)}…` : token, 0, 0);
          context.restore();
        });
      } else {
        context.textAlign = "center";
        const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find(
          (each) => each * width >= 48) || 10000;
        for (let i = 0; i < n; i += step) {
          context.fillText(String(i), Math.max(left + 4, left + (i + 0.5) * width), below + 6);
        }
      }
    }
    function under(event) {
      const box = canvas.getBoundingClientRect();
      const site = Math.floor((event.clientY - box.top) / rowHeight);
      const x = (event.clientX - box.left - left) / (width * n);
      const on = site >= 0 && site < sites && x >= 0 && x < 1;
      return on ? {site, i: pick(site, Math.floor(x * columns))} : null;
    }
    canvas.addEventListener("mousemove", (event) => {
      const on = under(event);
      if (!on) return;
      const value = values[on.site * n + on.i];
      cell.textContent = `${data.sites[on.site]} · position ${on.i} «${data.tokens[on.i]}» · relevance `
        + (data.units ? rough : signed)(value);
      mark(on.i);
    });
    if (jump) {
      canvas.style.cursor = "pointer";
      canvas.addEventListener("click", (event) => {
        const on = under(event);
        if (on) jump(on.i);
      });
    }
    per.addEventListener("change", draw);
    window.addEventListener("resize", draw);
    draw();
    return draw;
  }
}
