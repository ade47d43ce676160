(uid) => {
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
  // The prediction is what to see first; it is at the right of a wide picture.
  frame.scrollLeft = Number(frame.dataset.x) - Number(frame.dataset.from) + 180 - frame.clientWidth;
}
