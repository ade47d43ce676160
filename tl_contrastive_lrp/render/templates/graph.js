(uid, find) => {
  // What the pointer is on: its words below the picture, and all that touches it.
  const root = document.getElementById(uid);
  if (!root) return;
  const frame = root.querySelector(".f"), words = root.querySelector(".r");
  const nodes = [...root.querySelectorAll("[data-n]")], labels = [...root.querySelectorAll("text[data-p]")];
  const edges = [...root.querySelectorAll("[data-e]")].map((path) => {
    const [source, target] = path.dataset.e.split(" ").map(Number);
    return {path, source, target};
  });
  const rest = "Point at a circle, a line or a token to read its numbers and see what it is tied to.";
  words.textContent = rest;
  let near = null;
  function light(chosen) {
    root.querySelectorAll("path.on,[data-n].on,.c.on").forEach((each) => each.classList.remove("on"));
    root.classList.toggle("lit", chosen.length > 0);
    const touched = new Set();
    for (const edge of chosen) {
      edge.path.classList.add("on");
      touched.add(nodes[edge.source]).add(nodes[edge.target]);
    }
    const places = new Set([...touched].map((node) => node.dataset.p));
    touched.forEach((node) => node.classList.add("on"));
    labels.filter((label) => places.has(label.dataset.p)).forEach((label) => label.classList.add("on"));
  }
  root.addEventListener("mouseover", (event) => {
    const on = event.target.closest ? event.target.closest("[data-n],[data-e],text[data-p]") : null;
    if (on === near) return;
    near = on;
    if (!on) {
      words.textContent = rest;
      light([]);
      return;
    }
    words.textContent = on.querySelector("title").textContent;
    if (on.dataset.e) {
      light(edges.filter((edge) => edge.path === on));
    } else if (on.dataset.n) {
      const node = Number(on.dataset.n);
      light(edges.filter((edge) => edge.source === node || edge.target === node));
    } else {
      const here = (node) => nodes[node].dataset.p === on.dataset.p;
      light(edges.filter((edge) => here(edge.source) || here(edge.target)));
    }
  });
  root.addEventListener("mouseleave", () => { near = null; words.textContent = rest; light([]); });
  // A long prompt: where a position is drawn, alone or with others; search and lists lead there.
  const island = root.querySelector(".lrp-data");
  if (island) {
    const tokens = JSON.parse(island.textContent).tokens;
    const columns = [...root.querySelectorAll("[data-c]")].map((element) => {
      const [first, last, x] = element.dataset.c.split(" ").map(Number);
      return {element, first, last, x};
    });
    const show = (from, to = from) => {
      const column = columns.find(({first, last}) => first <= from && from <= last);
      const here = (node) => Number(nodes[node].dataset.p) === column.first;
      const tied = edges.filter((edge) => here(edge.source) || here(edge.target));
      light(tied);
      root.classList.add("lit");
      column.element.classList.add("on");
      near = null;
      const text = tokens.slice(from, to + 1).join("");
      words.textContent = `«${text}» position ${from}`
        + (column.first === column.last ? "" : ` · ${column.element.querySelector("title").textContent}`)
        + ` · ${tied.length} of the edges drawn begin or end here`;
      frame.scrollLeft = column.x - Number(frame.dataset.from) + 90 - frame.clientWidth / 2;
    };
    find(root.querySelector(".lrp-find"), tokens, {found: () => "", go: ([from, to]) => show(from, to)});
    root.addEventListener("click", (event) => {
      const link = event.target.closest ? event.target.closest("[data-go]") : null;
      if (link) show(Number(link.dataset.go));
    });
  }
  // The prediction is what to see first; it is at the right of a wide picture.
  frame.scrollLeft = Number(frame.dataset.x) - Number(frame.dataset.from) + 180 - frame.clientWidth;
}
