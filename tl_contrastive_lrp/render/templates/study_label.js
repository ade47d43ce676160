(view) => {
  // One case at a time. What was chosen is kept in the browser at every change; a label counts once
  // it is confirmed.
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const outcomes = data.outcomes.map(([name]) => name), patterns = data.patterns.map(([name]) => name);
  const known = new Set(data.cases.map((one) => one.id));
  const empty = () => ({outcome: null, pattern: undefined, note: "", date: "", done: false});
  let state = {labeller: "", at: 0, blind: data.blind, labels: {}};
  let stored = true, drawn = 0;
  try {
    const before = JSON.parse(localStorage.getItem(data.key) || "null");
    if (before && typeof before.labels === "object") state = {...state, ...before};
  } catch (error) { stored = false; }
  // A map without a prototype: an id such as "__proto__" is a key like any other.
  state.labels = Object.assign(Object.create(null), state.labels);
  state.at = Math.min(Math.max(0, state.at | 0), Math.max(0, data.cases.length - 1));
  const save = () => {
    try { localStorage.setItem(data.key, JSON.stringify(state)); } catch (error) { stored = false; }
    if (!stored) say("This browser keeps nothing for this page: download before you close it.");
  };
  const say = (words) => { by("message").textContent = words; };
  const one = () => data.cases[state.at];
  const label = () => state.labels[one().id] || empty();
  const automatic = () => one().unpacked && one().unpacked.automatic;
  const visible = () => automatic() && (!state.blind || label().done);
  const change = (what) => {
    state.labels[one().id] = {...label(), ...what};
    save();
    show();
  };
  function show() {
    const count = data.cases.filter((each) => (state.labels[each.id] || {}).done).length;
    by("count").textContent = `${count} of ${data.cases.length} labelled`;
    by("progress").style.width = `${100 * count / Math.max(1, data.cases.length)}%`;
    by("blind").checked = state.blind;
    if (!data.cases.length) return;
    const now = label();
    by("title").textContent = `${state.at + 1}. ${one().name}`;
    if (now.done) by("title").append(view.make("span", "done-mark", " ✓"));
    document.querySelectorAll("[data-outcome]").forEach((button) => {
      button.setAttribute("aria-pressed", button.dataset.outcome === now.outcome);
    });
    document.querySelectorAll("[data-pattern]").forEach((button) => {
      const chosen = now.pattern !== undefined && button.dataset.pattern === (now.pattern || "");
      button.setAttribute("aria-pressed", chosen);
    });
    if (by("note").value !== now.note) by("note").value = now.note;
    const box = by("auto"), auto = automatic();
    box.replaceChildren();
    if (!one().unpacked) box.textContent = "";
    else if (state.blind && !now.done) box.textContent = "The automatic label, if there is one, is hidden until you confirm yours.";
    else if (!auto) box.textContent = "There is no automatic label: no graph was made.";
    else {
      box.append("Automatic label: ", view.make("b", "", auto.outcome + (auto.pattern ? `, ${auto.pattern}` : "")), ` (${auto.note})`);
      if (!now.done && !now.outcome) box.append(". Enter confirms it.");
    }
  }
  async function go(to) {
    if (!data.cases.length) return;
    state.at = Math.min(Math.max(0, to), data.cases.length - 1);
    save();
    const here = one(), turn = ++drawn;
    by("case").setAttribute("aria-busy", "true");
    if (!here.unpacked) here.unpacked = await view.inflate(here.data);
    if (turn !== drawn) return; // the reader has gone on meanwhile
    view.draw(by("case"), here.unpacked);
    by("case").setAttribute("aria-busy", "false");
    show();
    scrollTo(0, 0);
  }
  const next = () => {
    const n = data.cases.length;
    for (let step = 1; step <= n; step++) {
      const at = (state.at + step) % n;
      if (!(state.labels[data.cases[at].id] || {}).done) return go(at);
    }
    return go(state.at);
  };
  function confirm() {
    if (!data.cases.length || !one().unpacked) return;
    if (!state.labeller.trim()) {
      by("labeller").classList.add("missing");
      by("labeller").focus();
      say("Write your name first: a label says whose it is.");
      return;
    }
    const now = label();
    let {outcome, pattern} = now;
    if (!outcome && visible()) {
      outcome = automatic().outcome;
      if (pattern === undefined) pattern = automatic().pattern;
    }
    if (!outcome) {
      say("Choose an outcome first: 1, 2 or 3.");
      return;
    }
    say("");
    const date = new Date().toISOString().replace(/\.\d+Z$/, "Z");
    change({outcome, pattern: pattern === undefined ? null : pattern, date, done: true});
    if (state.blind && automatic() && !now.done) {
      const same = automatic().outcome === outcome && (automatic().pattern || null) === (pattern || null);
      say(`${one().name}: the automatic label is ${same ? "the same" : `${automatic().outcome}${automatic().pattern ? `, ${automatic().pattern}` : ""}`}.`);
    }
    const last = state.at;
    next();
    if (data.cases.every((each) => (state.labels[each.id] || {}).done) && state.at === last) {
      say("All cases are labelled. Download the labels (d).");
    }
  }
  const lines = () => data.cases.filter((each) => (state.labels[each.id] || {}).done).map((each) => {
    const {outcome, pattern, note, date} = state.labels[each.id];
    return JSON.stringify({version: data.version, case_id: each.id, labeller: state.labeller.trim(), outcome, pattern: pattern || null, note, date});
  });
  function download() {
    const found = lines();
    if (!found.length) { say("There is nothing to download yet."); return; }
    const who = state.labeller.trim().replace(/[^\p{L}\p{N}_-]+/gu, "-");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${found.join("\n")}\n`], {type: "application/jsonl"}));
    link.download = `${data.file}-labels-${who}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`${found.length} labels downloaded as ${link.download}.`);
  }
  // Whole or not at all: a file with a line that is no label of this study changes nothing.
  function take(text) {
    const found = [];
    for (const [i, line] of text.split(/\r?\n/).entries()) {
      if (!line.trim()) continue;
      const fail = (why) => { throw new Error(`Nothing was imported: line ${i + 1} ${why}.`); };
      let row;
      try { row = JSON.parse(line); } catch (error) { fail("is no JSON"); }
      if (!row || row.version !== data.version) fail(`is no label of version ${data.version}`);
      if (!known.has(row.case_id)) fail(`is of ${JSON.stringify(row.case_id)}, which is not among these cases`);
      if (!outcomes.includes(row.outcome)) fail(`has the outcome ${JSON.stringify(row.outcome)}`);
      if (row.pattern && !patterns.includes(row.pattern)) fail(`has the pattern ${JSON.stringify(row.pattern)}`);
      if (typeof row.labeller !== "string" || !row.labeller.trim()) fail("has no labeller");
      found.push(row);
    }
    const who = [...new Set(found.map((row) => row.labeller.trim()))];
    if (who.length > 1 || (who.length && state.labeller.trim() && who[0] !== state.labeller.trim())) {
      throw new Error(`Nothing was imported: the labels are by ${who.join(", ")}, and yours is «${state.labeller}». Import only your own.`);
    }
    for (const row of found) {
      state.labels[row.case_id] = {outcome: row.outcome, pattern: row.pattern || null, note: String(row.note || ""), date: String(row.date || ""), done: true};
    }
    if (who.length) state.labeller = by("labeller").value = who[0];
    save();
    show();
    say(`${found.length} labels imported.`);
  }
  by("labeller").value = state.labeller;
  by("labeller").addEventListener("input", (event) => {
    state.labeller = event.target.value;
    event.target.classList.remove("missing");
    save();
  });
  by("note").addEventListener("input", (event) => change({note: event.target.value}));
  by("blind").addEventListener("change", (event) => { state.blind = event.target.checked; save(); show(); });
  by("import").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    event.target.value = "";
    if (!file) return;
    try { take(await file.text()); } catch (error) { say(error.message); }
  });
  document.querySelectorAll("[data-outcome]").forEach((button) => {
    button.addEventListener("click", () => change({outcome: button.dataset.outcome}));
  });
  document.querySelectorAll("[data-pattern]").forEach((button) => {
    button.addEventListener("click", () => change({pattern: button.dataset.pattern || null}));
  });
  const clear = () => { delete state.labels[one().id]; save(); show(); };
  for (const [id, act] of [["confirm", confirm], ["back", () => go(state.at - 1)], ["on", () => go(state.at + 1)],
    ["open", next], ["clear", clear], ["download", download]]) by(id).addEventListener("click", act);
  const keys = {Enter: confirm, ArrowLeft: () => go(state.at - 1), ArrowRight: () => go(state.at + 1), g: next, d: download,
    x: clear, n: () => change({pattern: null}), t: () => by("note").focus()};
  outcomes.forEach((name, i) => { keys[String(i + 1)] = () => change({outcome: name}); });
  patterns.forEach((name) => { keys[name[0].toLowerCase()] = () => change({pattern: name}); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=text],textarea");
    if (typing && event.key !== "Escape" && !(event.key === "Enter" && !event.shiftKey)) return;
    if (typing) event.target.blur();
    if (event.key === "Escape") return;
    if (typing && event.target.id === "labeller") { event.preventDefault(); return; }
    // Enter and arrows on a focused button or list are its own; keys here never act twice.
    if (event.key === "Enter" && event.target.matches("button,select,label,summary")) event.target.blur();
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || !data.cases.length) return;
    event.preventDefault();
    act();
  });
  go(state.at);
}
