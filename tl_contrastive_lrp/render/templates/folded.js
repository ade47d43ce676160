(root, page) => {
  // A long prompt whose tokens of low relevance are folded: opening pieces, searching across
  // tokens, jumping to one. A closed piece holds plain text; its tokens become elements when it
  // opens and text again when it closes, so that a page of any length stays light.
  //
  // page: tokens [pos] as they are shown, folds [[first, last], ...], paint(span, i) gives a token
  // its colours, tell(i) shows its numbers.
  const {tokens, folds, paint, tell} = page;
  const named = (name) => root.querySelector(`.lrp-${name}`);
  const box = named("box"), query = named("query"), count = named("count");
  const pieces = [...box.querySelectorAll(".lrp-fold")];
  const texts = pieces.map((piece) => piece.lastElementChild.textContent);
  let hits = [], current = -1, found = new Set();

  const breaks = (token) => Math.min(3, token.split("↵").length - 1);
  function fill(at) {
    const inner = pieces[at].lastElementChild;
    if (inner.firstElementChild) return;
    const made = document.createDocumentFragment();
    for (let i = folds[at][0]; i <= folds[at][1]; i++) {
      const span = document.createElement("span");
      span.className = found.has(i) ? "t lrp-hit" : "t";
      span.dataset.i = i;
      span.textContent = tokens[i];
      paint(span, i);
      made.append(span);
      for (let line = breaks(tokens[i]); line > 0; line--) made.append(document.createElement("br"));
    }
    inner.replaceChildren(made);
  }
  function open(at, wanted) {
    pieces[at].open = wanted;
    if (wanted) fill(at);
    else pieces[at].lastElementChild.textContent = texts[at];
  }
  pieces.forEach((piece, at) => piece.addEventListener("toggle", () => open(at, piece.open)));
  const all = (wanted) => pieces.forEach((_, at) => open(at, wanted));
  named("open").addEventListener("click", () => all(true));
  named("close").addEventListener("click", () => all(false));

  // The last of sorted starts that is not beyond a place.
  function last(starts, place) {
    let low = -1, high = starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (starts[middle] <= place) low = middle; else high = middle;
    }
    return low;
  }
  const firsts = folds.map((fold) => fold[0]);
  function foldOf(i) {
    const at = last(firsts, i);
    return at >= 0 && i <= folds[at][1] ? at : -1;
  }
  const present = (i) => box.querySelector(`.t[data-i="${i}"]`);
  function spanOf(i) {
    const at = foldOf(i);
    if (at >= 0) open(at, true);
    return present(i);
  }
  function lightUp(first, final) {
    box.querySelectorAll(".lrp-now").forEach((span) => span.classList.remove("lrp-now"));
    const span = spanOf(first);
    for (let i = first; i <= final; i++) spanOf(i).classList.add("lrp-now");
    span.scrollIntoView({block: "center"});
    tell(first);
    return span;
  }
  function focus(span) {
    span.tabIndex = -1;
    span.focus({preventScroll: true});
  }
  const jump = (i) => focus(lightUp(i, i));
  root.addEventListener("click", (event) => {
    const link = event.target.closest ? event.target.closest("[data-go]") : null;
    if (link) jump(Number(link.dataset.go));
  });
  // From the token one has jumped to, arrows lead on; a closed piece is one step.
  box.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], from = event.target.dataset.i;
    if (!step || from === undefined) return;
    const i = Number(from) + step;
    if (i < 0 || i >= tokens.length) return;
    event.preventDefault();
    const at = foldOf(i);
    if (at >= 0 && !pieces[at].open) pieces[at].firstElementChild.focus();
    else { focus(present(i)); tell(i); }
  });

  // What is shown in place of whitespace is found by whitespace, and any run of it by any other.
  const plain = (text) => (text === "∅" ? "" : text).replace(/[↵␍]/g, "\n").replace(/⇥/g, "\t")
    .replace(/·/g, " ").toLowerCase();
  const starts = new Uint32Array(tokens.length);
  let whole = "";
  tokens.forEach((token, i) => { starts[i] = whole.length; whole += plain(token); });
  function search() {
    const wanted = plain(query.value);
    hits = [];
    current = -1;
    if (wanted.trim()) {
      const pattern = wanted.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&").replace(/\s+/g, "\\s+");
      for (const hit of whole.matchAll(new RegExp(pattern, "g"))) {
        hits.push([last(starts, hit.index), last(starts, hit.index + hit[0].length - 1)]);
      }
    }
    found = new Set();
    for (const [from, to] of hits) for (let i = from; i <= to; i++) found.add(i);
    box.querySelectorAll(".lrp-now").forEach((span) => span.classList.remove("lrp-now"));
    box.querySelectorAll(".t").forEach((span) => {
      span.classList.toggle("lrp-hit", found.has(Number(span.dataset.i)));
    });
    const folded = hits.filter(([from]) => {
      const at = foldOf(from);
      return at >= 0 && !pieces[at].open;
    }).length;
    count.textContent = !wanted.trim() ? "" : !hits.length ? "not in the prompt"
      : `${hits.length.toLocaleString("en")} found${folded ? `, ${folded.toLocaleString("en")} folded` : ""}`;
  }
  function step(by) {
    if (!hits.length) return;
    current = (current < 0 && by < 0 ? hits.length - 1 : current + by + hits.length) % hits.length;
    count.textContent = `${(current + 1).toLocaleString("en")} of ${hits.length.toLocaleString("en")}`;
    lightUp(...hits[current]);
  }
  let waiting = 0, searched = "";
  const now = () => {
    clearTimeout(waiting);
    if (query.value !== searched) { searched = query.value; search(); }
  };
  query.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(now, 120); });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { query.value = ""; now(); }
    if (event.key !== "Enter") return;
    event.preventDefault();
    now();
    step(event.shiftKey ? -1 : 1);
  });
  named("previous").addEventListener("click", () => { now(); step(-1); });
  named("next").addEventListener("click", () => { now(); step(1); });
  query.value = "";  // a reload may restore it
  named("find").hidden = false;
  return {jump, spans: () => [...box.querySelectorAll(".t")]};
}
