"use strict";
// The page of several runs.

const view = { axis: "step", smoothing: 0 };
const added = [];
let plots = [];

const last = (run, name) => (has(run, name) ? run.metrics[name][lastNumber(run.metrics[name])] : null);

function table(id, head, rows) {
  const line = (cells, cell) => element("tr", {}, ...cells.map((text, at) => appendText(element(at ? cell : "th", { scope: at ? null : "row" }), text)));
  byId(id).replaceChildren(element("thead", {}, line(head, "th")), element("tbody", {}, ...rows.map((row) => line(row, "td"))));
}

function best(run) {
  if (!has(run, "val/accuracy")) return shown(null);
  const values = run.metrics["val/accuracy"];
  const at = values.indexOf(Math.max(...values.filter(isNumber)));
  return `${shown(values[at])} at step ${run.steps[at]}`;
}

function validated(run) {
  const [value, low, high] = ["val/accuracy", "val-aux/accuracy_low", "val-aux/accuracy_high"].map((name) => last(run, name));
  return isNumber(low) ? `${shown(value)} (${shown(low)} to ${shown(high)})` : shown(value);
}

function summaries(runs) {
  const mean = (run, name) => {
    const numbers = (run.metrics[name] ?? []).filter(isNumber);
    return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
  };
  const rows = [
    ["last step", (run) => shown(run.steps.at(-1))],
    ["time", (run) => duration(run.seconds.at(-1) ?? 0)],
    ["validation, last (95 %)", validated],
    ["validation, best", best],
    ["validation loss, last", (run) => shown(last(run, "val/loss"))],
    ["score, last", (run) => shown(last(run, "critic/score/mean"))],
    ["length, last", (run) => shown(last(run, "response_length/mean"))],
    ["seconds a step, mean", (run) => shown(mean(run, "timing_s/step"))],
    ["memory, GB at most", (run) => shown(last(run, "perf/max_memory_gb"))],
  ].map(([name, of]) => [name, ...runs.map(of)]);
  table("runs", ["", ...runs.map((run) => run.name)], rows.filter((row) => row.slice(1).some((text) => text !== shown(null))));
}

function differences(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, key) => run.settings[key] ?? "not there";
  const differing = keys.filter((key) => new Set(runs.map((run) => value(run, key))).size > 1);
  byId("differences-note").textContent = `${differing.length} of ${keys.length} keys differ.`;
  byId("keys-table").hidden = !differing.length;
  table("keys-table", ["key", ...runs.map((run) => run.name)], differing.map((key) => [key, ...runs.map((run) => value(run, key))]));
}

/** The metric `name` of all runs as one run whose lines are the runs. */
function together(runs, name) {
  const x = (run) => (view.axis === "hours" ? run.seconds : run.steps);
  const places = [...new Set(runs.flatMap(x))].sort((a, b) => a - b);
  const rows = new Map(places.map((place, at) => [place, at]));
  const metrics = {};
  for (const run of runs.filter((each) => has(each, name))) {
    const column = new Array(places.length).fill(null);
    run.metrics[name].forEach((value, at) => {
      if (isNumber(value)) column[rows.get(x(run)[at])] = value;
    });
    metrics[run.name] = column;
  }
  return { steps: places, seconds: places, metrics, events: {} };
}

function curves(runs) {
  plots.forEach((plot) => plot.destroy());
  plots = [];
  byId("charts").replaceChildren();
  const named = [...CHARTS, ...MACHINE_CHARTS].flatMap((spec) => (spec.lines ?? []).map(([name, label]) => [name, spec.lines.length > 1 ? `${spec.title}: ${label}` : spec.title]));
  for (const [name, title] of [...named, ...added.map((name) => [name, name])]) {
    const all = together(runs, name);
    const lines = runs.map((run) => [run.name, run.name]).filter(([run]) => run in all.metrics);
    const colors = lines.map(([run]) => runs.findIndex((each) => each.name === run));
    if (lines.length) plots.push(drawChart(byId("charts"), all, { title, lines, colors }, view));
  }
}

function controls(runs) {
  for (const [id, key, read] of [["axis", "axis", String], ["smoothing", "smoothing", Number]]) {
    byId(id).addEventListener("change", (event) => {
      view[key] = read(event.target.value);
      curves(runs);
    });
  }
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  byId("more-curves").append(...names.map((name) => element("option", { value: name }, name)));
  byId("more-curves").addEventListener("change", (event) => {
    if (!event.target.value || added.includes(event.target.value)) return;
    added.push(event.target.value);
    curves(runs);
    byId("charts").lastElementChild?.scrollIntoView({ block: "nearest" });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => curves(runs));
}

/** One entry a validation prompt, those first that most runs have answered. */
function sharedPrompts(runs) {
  const found = new Map();
  runs.forEach((run, place) => {
    for (const row of rowsOf(`validation-${place}`).rows) {
      const key = JSON.stringify([row.id, row.prompt]);
      if (!found.has(key)) found.set(key, { ...row, answers: runs.map(() => []) });
      found.get(key).answers[place].push({ ...row, parts: partsOf(row), title: `${run.name}, step ${row.step}` });
    }
  });
  const count = (entry) => entry.answers.filter((rows) => rows.length).length;
  return [...found.values()].sort((a, b) => count(b) - count(a));
}

class Answers {
  constructor(runs, leftOut) {
    this.runs = runs;
    this.leftOut = leftOut;
    this.entries = sharedPrompts(runs);
    const steps = new Set(this.entries.flatMap((entry) => entry.answers.flat()).map((answer) => answer.step));
    options(byId("f-step"), ["", ...[...steps].sort((a, b) => a - b)], "last of each run");
    this.prompts = new PromptList(() => this.detail());
    byId("f-step").addEventListener("change", () => this.list());
    byId("f-query").addEventListener("input", () => this.list());
    this.list();
  }

  /** The answers of each run to a prompt at the step that is chosen. */
  chosen(entry) {
    const step = byId("f-step").value;
    return entry.answers.map((rows) => rows.filter((row) => (step ? String(row.step) === step : row.step === rows.at(-1).step)));
  }

  list() {
    const query = byId("f-query").value.toLowerCase();
    const texts = (entry) => [...this.chosen(entry).flat().map((row) => row.response), ...messagesOf(entry.prompt).map((part) => part[1])];
    this.found = this.entries
      .filter((entry) => this.chosen(entry).some((rows) => rows.length))
      .filter((entry) => !query || texts(entry).some((text) => text.toLowerCase().includes(query)));
    const left = Object.values(this.leftOut).reduce((sum, steps) => sum + steps, 0);
    const more = left ? ` To keep the page small, ${left} more steps of the files are not on it.` : "";
    byId("samples-note").textContent = this.entries.length
      ? `${this.found.length} of ${this.entries.length} validation prompts.${more}`
      : "These runs have kept no validation samples: trainer.report_prompts is 0, or none was due yet.";
    this.prompts.fill(this.found.map((entry) => {
      const right = this.chosen(entry).map((rows) => (rows.length ? String(rows.filter((row) => outcomeOf(row) === "right").length) : "–"));
      return listed(String(entry.id), ` · right: ${right.join(" / ")}`, entry.prompt);
    }));
  }

  detail() {
    const entry = this.found[this.prompts.at];
    if (!entry) {
      byId("group-head").replaceChildren();
      byId("responses").replaceChildren();
      return;
    }
    byId("group-head").replaceChildren(...promptOf(entry));
    const cards = this.chosen(entry).flatMap((rows, place) => (rows.length
      ? rows.map((row) => card(row, true, null))
      : [element("article", { class: "card other" }, element("h3", {}, this.runs[place].name), element("p", { class: "parts" }, "no answer of this run at this step"))]));
    byId("responses").replaceChildren(...cards);
  }
}

const page = JSON.parse(byId("data").textContent);
byId("title").textContent = page.runs.map((run) => run.name).join(" · ");
byId("run-facts").textContent = `${page.runs.length} runs · written ${new Date(page.written * 1000).toLocaleString()} by steepest ${page.version}`;
summaries(page.runs);
differences(page.runs);
curves(page.runs);
controls(page.runs);
new Answers(page.runs, page.left_out);
