(uid, data, parts) => {
  "use strict";
  // A long prompt in a notebook: colours, numbers and lists of the site that is chosen.
  const root = document.getElementById(uid);
  if (!root) return;
  const named = (name) => root.querySelector(`.lrp-${name}`);
  const {colour, signed, rough, unpack} = parts.look(data);
  const values = unpack(data.values, data.units), n = data.tokens.length;
  const greyed = new Set(data.greyed), number = data.units ? rough : signed;
  const readout = named("readout"), tops = named("tops"), chooser = named("site");
  let site = 0;

  function paint(span, i) {
    span.classList.toggle("g", greyed.has(i));
    span.style.background = `rgb(${colour(values[site * n + i] / data.scales[site])})`;
    span.removeAttribute("title");
  }
  const words = (i) => `«${data.tokens[i]}» · position ${i} · relevance ${number(values[site * n + i])}`
    + (data.labels.length > 1 ? ` · ${data.labels[site]}` : "")
    + (greyed.has(i) ? " · left out of the scale" : "");
  const tell = (i) => { readout.textContent = words(i); };
  const {spans} = parts.folded(root, {tokens: data.tokens, folds: data.folds, paint, tell, find: parts.find});
  named("box").addEventListener("mouseover", (event) => {
    const on = event.target.closest ? event.target.closest(".t") : null;
    if (!on) return;
    const i = Number(on.dataset.i);
    if (!on.title) on.title = words(i);
    tell(i);
  });

  function list() {
    const create = (name, text) => Object.assign(document.createElement(name), {textContent: text});
    tops.replaceChildren(...data.tops[site].map((side, at) => {
      const line = document.createElement("div");
      line.append(create("span", `most towards ${at ? data.contrast : data.target}:`));
      for (const [i, value] of side) {
        const link = create("button", "");
        link.type = "button";
        link.className = "lrp-link";
        link.dataset.go = i;
        link.title = `jump to position ${i}`;
        link.append(create("code", data.tokens[i]), value, create("small", `at ${i}`));
        line.append(link);
      }
      if (!side.length) line.append("none");
      return line;
    }));
  }
  function choose(at) {
    site = Math.max(0, Math.min(at, data.labels.length - 1));
    chooser.selectedIndex = site;
    root.querySelectorAll(".lrp-fold").forEach((piece, k) => {
      piece.querySelector(".lrp-sum").textContent = data.sums[site][k];
      piece.querySelector(".lrp-largest").textContent = data.largest[site][k];
      const [first, last] = data.folds[k];
      piece.firstElementChild.title = `positions ${first} to ${last} · Σ|relevance| ${data.sizes[site][k]}`;
    });
    if (data.folds.length) {
      named("share").textContent = data.share[site];
      named("total").textContent = data.total[site];
    }
    spans().forEach((span) => paint(span, Number(span.dataset.i)));
    readout.textContent = data.labels[site];
    list();
  }
  list();
  if (!chooser) return;
  chooser.selectedIndex = 0;
  chooser.addEventListener("change", () => choose(chooser.selectedIndex));
  named("earlier").addEventListener("click", () => choose(site - 1));
  named("later").addEventListener("click", () => choose(site + 1));
  named("sites").hidden = false;
}
