(view) => {
  // Cases are drawn when they are opened, and taken away when they are closed again.
  const data = JSON.parse(document.getElementById("data").textContent), cases = data.cases;
  const rows = [...document.querySelectorAll("details.case")];
  for (const [i, row] of rows.entries()) {
    const box = row.querySelector(".body");
    const show = async () => {
      if (!row.open) { box.replaceChildren(); return; }
      const content = await view.inflate(cases[i].data);
      if (row.open) view.draw(box, content);
    };
    row.addEventListener("toggle", show);
    if (row.open) show(); // a browser that comes back to a page restores it so
  }
  const by = (id) => document.getElementById(id);
  if (!by("filters")) return;
  const fill = (id, words, values) => {
    by(id).append(new Option(words, ""), ...values.map((value) => new Option(value[0], value[1])));
  };
  const unique = (values) => [...new Set(values)];
  const named = (values) => unique(values).map((value) => [value, JSON.stringify(value)]);
  fill("benchmark", "all", named(cases.map((one) => one.benchmark)));
  fill("labeller", "anyone", named(cases.flatMap((one) => one.labels.map(([who]) => who))));
  fill("outcome", "all", [...named(cases.flatMap((one) => one.labels.map((label) => label[1]))), ["no label", "null"]]);
  fill("pattern", "all", [...named(cases.flatMap((one) => one.labels.map((label) => label[2])).filter((pattern) => pattern)), ["none", "null"]]);
  fill("segment", "all", unique(cases.flatMap((one) => Object.keys(one.signs))).flatMap((name) => [
    [`${name} > 0 (to the wrong token)`, JSON.stringify([name, 1])], [`${name} < 0 (to the right token)`, JSON.stringify([name, -1])]]));
  const checked = unique(cases.flatMap((one) => Object.keys(one.verdicts)));
  const verdicts = (rules) => {
    const found = cases.map((one) => one.verdicts[rules] || null);
    const named = checked.length > 1 ? ` (${rules})` : "";
    return ["supported", "weak", "contradicted", null].filter((verdict) => found.includes(verdict))
      .map((verdict) => [(verdict ?? "not checked") + named, JSON.stringify([rules, verdict])]);
  };
  if (by("verdict")) fill("verdict", "all", checked.flatMap(verdicts));
  const ids = ["benchmark", "labeller", "outcome", "pattern", "segment", "verdict"].filter(by);
  const texts = rows.map((row) => row.querySelector("summary").textContent.toLowerCase());
  function filter() {
    const want = Object.fromEntries(ids.map((id) => [id, by(id).value === "" ? undefined : JSON.parse(by(id).value)]));
    const text = by("text").value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row, i) => {
      const one = cases[i];
      const labels = one.labels.filter(([who]) => want.labeller === undefined || who === want.labeller);
      const is = (at, value) => value === undefined
        || (value === null ? !labels.some((label) => label[at]) : labels.some((label) => label[at] === value));
      const both = labels.some((label) => (want.outcome === undefined || label[1] === want.outcome)
        && (want.pattern === undefined || label[2] === want.pattern));
      const exact = want.outcome === null || want.pattern === null || both || (want.outcome === undefined && want.pattern === undefined);
      const keep = (want.benchmark === undefined || one.benchmark === want.benchmark)
        && (want.labeller === undefined || labels.length > 0 || want.outcome === null)
        && is(1, want.outcome) && is(2, want.pattern) && exact
        && (want.segment === undefined || one.signs[want.segment[0]] === want.segment[1])
        && (want.verdict === undefined || (one.verdicts[want.verdict[0]] || null) === want.verdict[1])
        && (!text || texts[i].includes(text));
      row.hidden = !keep;
      count += keep;
    });
    by("shown").textContent = `${count} of ${rows.length} cases`;
  }
  for (const id of [...ids, "text"]) by(id).addEventListener("input", filter);
  by("filters").hidden = false;
  filter();
}
