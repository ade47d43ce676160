(looks, graphOf) => {
  // A case: inflated from its packed text, drawn from text nodes only; its graph is our own markup.
  const make = (tag, name = "", words = null) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (words !== null) element.textContent = words;
    return element;
  };
  const number = (value) => {
    if (value === 0) return "0";
    const text = Math.abs(value) >= 0.0005 ? value.toFixed(3) : value.toExponential(1);
    return (value > 0 ? "+" : "") + text.replace("-", "\u2212");
  };
  const inflate = (text) => {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).json();
  };
  function heatmap(data, box) {
    const names = Object.keys(data.rows);
    const choice = make("div", "choices");
    const legend = make("p", "key");
    for (const [name, words] of [["up", `red supports «${data.target}»`], ["down", `blue supports «${data.contrast}»`],
      ["grey", "grey: special and first tokens, left out of the scale"]]) {
      legend.append(make("span", `swatch ${name}`), make("span", "", words));
    }
    if (data.relevant.length) legend.append(make("span", "swatch mark"), make("span", "", "underlined: should decide"));
    const full = make("span", "full");
    legend.append(full);
    const prompt = make("div", "prompt");
    const readout = make("p", "readout", "Point at a token to read its relevance.");
    const grey = new Set(data.greyed), mark = new Set(data.relevant), lines = new Set(data.lines);
    const spans = data.tokens.map((text, i) => {
      const span = make("span", "t", text);
      if (mark.has(i)) span.classList.add("m");
      if (i === data.answer) prompt.append(make("span", "from", "written by the model:"));
      prompt.append(span);
      if (lines.has(i)) prompt.append(make("br"));
      return span;
    });
    prompt.append(make("span", "next", `«${data.target}» and not «${data.contrast}»`));
    const tones = {supported: "good", weak: "mid", contradicted: "against"};
    const check = make("p", "check");
    let shown = names[0];
    const show = (rules) => {
      shown = rules;
      check.replaceChildren();
      if (data.checks[rules]) {
        const [verdict, sentence, figures] = data.checks[rules];
        const why = sentence.replace(`${verdict}: `, "");
        check.append(make("span", `tag ${tones[verdict] ?? ""}`, verdict), ` ${why[0].toUpperCase()}${why.slice(1)}`, make("br"), make("span", "soft", figures));
      }
      const row = data.rows[rules];
      full.textContent = `full colour: ±${number(row.full).slice(1)} logits`;
      spans.forEach((span, i) => {
        const step = Math.max(-100, Math.min(100, Math.round(row.values[i] / 10))) + 100;
        span.classList.toggle("g", grey.has(i));
        span.classList.toggle("w", !grey.has(i) && looks.whites[step] === 1);
        span.style.background = grey.has(i) ? "" : looks.backs[step];
      });
      for (const button of choice.children) button.setAttribute("aria-pressed", button.textContent === rules);
    };
    for (const rules of names) {
      const button = make("button", "", rules);
      button.type = "button";
      button.addEventListener("click", () => show(rules));
      choice.append(button);
    }
    prompt.addEventListener("mouseover", (event) => {
      const i = spans.indexOf(event.target);
      if (i < 0) return;
      const row = data.rows[shown];
      readout.textContent = `«${data.tokens[i]}» position ${i}: ${number(row.values[i] / 1000 * row.full)} logits (${shown})`;
    });
    if (names.length > 1) box.append(choice);
    if (Object.keys(data.checks).length) box.append(check);
    box.append(legend, prompt, readout);
    if (names.length) show(names[0]);
  }
  function segments(data, box) {
    if (!data.segments.length) return;
    const largest = Math.max(...data.segments.map((row) => Math.abs(row[3])), 1e-12);
    const table = make("table", "segments"), head = make("tr");
    for (const [i, name] of ["segment", "tokens", "relevance", "over the largest"].entries()) {
      head.append(make("th", i ? "num" : "", name));
    }
    table.append(head);
    for (const [name, tokens, relevance, normalised] of data.segments) {
      const line = make("tr"), last = make("td", "num"), track = make("span", "track"), bar = make("span", "bar");
      bar.classList.add(normalised < 0 ? "down" : "up");
      bar.style.width = `${100 * Math.abs(normalised) / largest}%`;
      track.append(bar);
      last.append(track, number(normalised));
      line.append(make("td", "", name), make("td", "num", String(tokens)), make("td", "num", number(relevance)), last);
      table.append(line);
    }
    box.append(make("h4", "", "Segments"), table);
  }
  function draw(box, data) {
    box.replaceChildren();
    const lead = make("p", "question");
    lead.append("Why ", make("code", "up", data.target), " and not ", make("code", "down", data.contrast), "?");
    lead.append(make("span", "soft", ` Δℓ = ${number(data.delta)} · ${data.model}`));
    box.append(lead);
    heatmap(data, box);
    const pair = make("div", "two"), left = make("div"), right = make("div");
    segments(data, left);
    if (data.facts.length) {
      const list = make("dl", "facts");
      for (const [name, words] of data.facts) list.append(make("dt", "", name), make("dd", "", words));
      right.append(make("h4", "", "The case"), list);
    }
    pair.append(left, right);
    box.append(pair);
    if (data.graph) {
      const frame = make("div", "graph");
      frame.innerHTML = data.graph;
      box.append(make("h4", "", "Attribution graph"), frame);
      graphOf(data.uid);
    }
  }
  return {inflate, draw, make, number};
}
