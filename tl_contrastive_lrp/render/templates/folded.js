(root, page) => {
  // A long prompt whose tokens of low relevance are folded: opening pieces, searching across
  // tokens, jumping to one. A closed piece holds plain text; its tokens become elements when it
  // opens and text again when it closes, so that a page of any length stays light.
  //
  // page: tokens [pos] as they are shown, folds [[first, last], ...], paint(span, i) gives a token
  // its colours, tell(i) shows its numbers, find is the function of find.js.
  const {tokens, folds, paint, tell} = page;
  const named = (name) => root.querySelector(`.lrp-${name}`);
  const box = named("box");
  const pieces = [...box.querySelectorAll(".lrp-fold")];
  const texts = pieces.map((piece) => piece.lastElementChild.textContent);
  let found = new Set();

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

  const firsts = folds.map((fold) => fold[0]);
  function foldOf(i) {
    let low = -1, high = firsts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (firsts[middle] <= i) low = middle; else high = middle;
    }
    return low >= 0 && i <= folds[low][1] ? low : -1;
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

  page.find(named("find"), tokens, {
    found(hits) {
      found = new Set();
      for (const [from, to] of hits) for (let i = from; i <= to; i++) found.add(i);
      box.querySelectorAll(".lrp-now").forEach((span) => span.classList.remove("lrp-now"));
      box.querySelectorAll(".t").forEach((span) => {
        span.classList.toggle("lrp-hit", found.has(Number(span.dataset.i)));
      });
      const closed = ([from]) => foldOf(from) >= 0 && !pieces[foldOf(from)].open;
      const folded = hits.filter(closed).length;
      return folded ? `, ${folded.toLocaleString("en")} folded` : "";
    },
    go: ([from, to]) => lightUp(from, to),
  });
  return {jump, spans: () => [...box.querySelectorAll(".t")]};
}
