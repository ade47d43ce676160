(element, data, {signed, percent}) => {
  // All tokens of a long prompt as a table, some rows at a time, made when it is opened.
  const details = element.closest("details"), rows = 200, n = data.tokens.length;
  let first = 0, made = false;
  const create = (name, text, className) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const body = create("tbody"), from = create("input"), upTo = create("span");
  function show(wanted) {
    first = Math.max(0, Math.min(wanted || 0, n - 1));
    const end = Math.min(n, first + rows), some = document.createDocumentFragment();
    for (let i = first; i < end; i++) {
      const row = create("tr", undefined, data.greyed[i] ? "quiet" : "");
      const cell = create("td");
      cell.append(create("code", data.tokens[i]));
      row.append(create("td", i, "num"), cell, create("td", data.ids[i], "num"),
        create("td", signed(data.relevance[i]), "num"),
        create("td", percent(data.relevance[i] / data.delta), "num"));
      if (data.measured) {
        const effect = data.measured[i];
        row.append(create("td", effect === null ? "–" : signed(effect), "num"));
      }
      some.append(row);
    }
    body.replaceChildren(some);
    from.value = first;
    upTo.textContent = `to ${end - 1} of ${n - 1}`;
  }
  function make() {
    made = true;
    const bar = create("p", undefined, "lrp-bar"), label = create("label", "from position ");
    Object.assign(from, {type: "number", min: 0, max: n - 1});
    from.addEventListener("change", () => show(Math.floor(Number(from.value))));
    label.append(from);
    bar.append(label, upTo, ...[["‹ earlier", -rows], ["later ›", rows]].map(([words, by]) => {
      const button = create("button", words);
      button.type = "button";
      button.addEventListener("click", () => first + by < n && show(first + by));
      return button;
    }));
    const frame = create("div", undefined, "scroll"), table = create("table");
    const head = create("thead"), titles = create("tr");
    const columns = ["position", "token", "id", "relevance", "of Δℓ"];
    if (data.measured) columns.push("measured effect");
    for (const words of columns) {
      const title = create("th", words, words === "token" ? "" : "num");
      title.scope = "col";
      titles.append(title);
    }
    head.append(titles);
    table.append(head, body);
    frame.append(table);
    element.replaceChildren(bar, frame);
    show(0);
  }
  details.addEventListener("toggle", () => details.open && !made && make());
}
