(bar, tokens, page) => {
  // A search box over tokens: text is found across them, whatever case it is in. What is shown in
  // place of whitespace is found by whitespace, and any run of it by any other; the marks of a
  // character's parts are no text.
  //
  // page: found(hits) is told all hits [[first token, last token], ...] and returns more words for
  // their count; go(hit) shows one.
  const named = (name) => bar.querySelector(`.lrp-${name}`);
  const query = named("query"), count = named("count");
  const plain = (text) => (text === "∅" ? "" : text).replace(/[¹²³⁴]⁄[₂₃₄]/g, "").replace(/[↵␍]/g, "\n").replace(/⇥/g, "\t")
    .replace(/·/g, " ").toLowerCase();
  const starts = new Uint32Array(tokens.length);
  const pieces = tokens.map(plain);
  pieces.forEach((piece, i) => { if (i) starts[i] = starts[i - 1] + pieces[i - 1].length; });
  const whole = pieces.join("");
  // The token that a character belongs to: the last that starts at it or before.
  function tokenAt(place) {
    let low = 0, high = starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (starts[middle] <= place) low = middle; else high = middle;
    }
    return low;
  }
  const number = (value) => value.toLocaleString("en");
  let hits = [], current = -1, searched = "", waiting = 0;
  function search() {
    clearTimeout(waiting);
    if (query.value === searched) return;
    searched = query.value;
    hits = [];
    current = -1;
    const wanted = plain(searched);
    if (wanted.trim()) {
      const pattern = wanted.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&").replace(/\s+/g, "\\s+");
      for (const hit of whole.matchAll(new RegExp(pattern, "g"))) {
        hits.push([tokenAt(hit.index), tokenAt(hit.index + hit[0].length - 1)]);
      }
    }
    const more = page.found(hits);
    count.textContent = !wanted.trim() ? "" : hits.length ? `${number(hits.length)} found${more}`
      : "not in the prompt";
  }
  function step(by) {
    search();
    if (!hits.length) return;
    current = (current < 0 && by < 0 ? hits.length - 1 : current + by + hits.length) % hits.length;
    count.textContent = `${number(current + 1)} of ${number(hits.length)}`;
    page.go(hits[current]);
  }
  query.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { query.value = ""; search(); }
    if (event.key !== "Enter") return;
    event.preventDefault();
    step(event.shiftKey ? -1 : 1);
  });
  named("previous").addEventListener("click", () => step(-1));
  named("next").addEventListener("click", () => step(1));
  query.value = "";  // a reload may restore it
  bar.hidden = false;
}
