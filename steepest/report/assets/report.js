"use strict";
// The page of one run.

const view = { axis: "step", smoothing: 0 };
let added = [];

function header(run) {
  byId("run-name").textContent = run.name;
  const setting = (key) => run.settings.find(([name]) => name === key)?.[1];
  const facts = [
    setting("actor_rollout_ref.model.path") ?? setting("model.path"),
    setting("algorithm.adv_estimator"),
    run.steps.length ? `up to step ${run.steps.at(-1)}, ${duration(run.seconds.at(-1))} after its first line` : "no step yet",
    `written ${new Date(run.written * 1000).toLocaleString()} by steepest ${run.version}`,
  ];
  byId("run-facts").textContent = facts.filter(Boolean).join(" · ");
}

function tiles(run) {
  const last = (name) => run.metrics[name]?.[lastNumber(run.metrics[name]) ?? 0];
  const best = has(run, "val/accuracy") ? Math.max(...run.metrics["val/accuracy"].filter(isNumber)) : null;
  const found = [
    ["Validation", last("val/accuracy"), best === null ? "" : `best ${shown(best)}`],
    ["Score", last("critic/score/mean"), "mean of the last step"],
    ["Loss", last("val/loss") ?? last("train/loss"), ""],
    ["KL", last("actor/reward_kl_penalty") ?? last("actor/kl_loss"), "to the reference"],
    ["Entropy", last("actor/entropy"), "nats a token"],
    ["Length", last("response_length/mean"), "tokens, mean"],
    ["Seconds a step", last("timing_s/step"), "last step"],
    ["Memory", last("perf/max_memory_gb"), "GB at most"],
  ].filter(([, value]) => isNumber(value));
  const problems = Object.values(run.events).flat().filter(([, end]) => end === run.steps.at(-1)).length;
  byId("tiles").replaceChildren(
    ...found.map(([name, value, more]) => tile(name, shown(value), more)),
    tile("Health", problems ? `${problems} problem${problems > 1 ? "s" : ""}` : "no problem", "in the last step", problems > 0),
  );
}

const tile = (name, value, more, bad = false) => element(
  "div", { class: bad ? "tile bad" : "tile" }, element("span", {}, name), element("b", {}, value), element("span", {}, more),
);

let plots = [];

function curves(run) {
  plots.forEach((plot) => plot.destroy());
  plots = [];
  for (const [id, specs] of [["charts", [...CHARTS, ...added]], ["time-charts", MACHINE_CHARTS]]) {
    byId(id).replaceChildren();
    for (const spec of chartsOf(run, specs)) plots.push(drawChart(byId(id), run, spec, view));
  }
  const thinned = run.every > 1 ? `One of ${run.every} steps is drawn. ` : "";
  byId("curves-note").textContent = `${thinned}Drag over a curve to zoom in, double-click to zoom out. A triangle on the axis: a health check spoke.`;
}

function controls(run) {
  byId("axis").addEventListener("change", (event) => {
    view.axis = event.target.value;
    curves(run);
  });
  byId("smoothing").addEventListener("change", (event) => {
    view.smoothing = Number(event.target.value);
    curves(run);
  });
  const names = Object.keys(run.metrics).filter((name) => has(run, name));
  byId("more-curves").append(...names.map((name) => element("option", { value: name }, name)));
  byId("more-curves").addEventListener("change", (event) => addCurve(run, event.target.value));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    curves(run);
    browser.detail();
  });
}

function addCurve(run, name) {
  if (!name || added.some((spec) => spec.title === name)) return;
  added.push({ title: name, lines: [[name, name.split("/").at(-1)]] });
  curves(run);
  byId("charts").lastElementChild.scrollIntoView({ block: "nearest" });
}

function health(run) {
  const names = Object.keys(run.events).sort();
  if (!names.length) {
    byId("events").replaceChildren(element("p", { class: "muted" }, "No health check has found a problem."));
    return;
  }
  const [first, last] = [run.steps[0], Math.max(run.steps.at(-1), run.steps[0] + 1)];
  byId("events").replaceChildren(...names.map((name) => {
    const stretches = run.events[name];
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 1000 18");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    for (const [from, to] of stretches) {
      const mark = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const left = ((from - first) / (last - first)) * 994;
      for (const [key, value] of [["x", left], ["y", 2], ["height", 14], ["width", Math.max(6, ((to - from) / (last - first)) * 994)]]) {
        mark.setAttribute(key, value);
      }
      svg.append(mark);
    }
    const steps = stretches.map(([from, to]) => (from === to ? `${from}` : `${from} to ${to}`));
    const said = steps.length > 4 ? [...steps.slice(0, 3), `... ${steps.at(-1)}`] : steps;
    return element(
      "div", { class: "lane" }, element("span", { class: "name" }, name.replaceAll("_", " ")), svg,
      element("span", { class: "muted" }, `step ${said.join(", ")}`),
    );
  }));
}

/** Seconds of each part of the steps over the whole run, and what the parts leave over. */
function shares(run) {
  const sums = Object.entries(run.metrics)
    .filter(([name]) => name.startsWith("timing_s/"))
    .map(([name, values]) => [name.slice(9), values.filter(isNumber).reduce((sum, value) => sum + value, 0)]);
  const outside = ["step", "testing", "save_checkpoint"];
  const step = sums.find(([name]) => name === "step")?.[1] ?? 0;
  const inside = sums.filter(([name]) => !outside.includes(name));
  const rest = step - inside.reduce((sum, [, seconds]) => sum + seconds, 0);
  const rows = [...inside, ...sums.filter(([name]) => outside.slice(1).includes(name)), ["other", rest]]
    .filter(([, seconds]) => seconds > 0)
    .sort((a, b) => b[1] - a[1]);
  const total = rows.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  byId("shares").replaceChildren(...rows.map(([name, seconds]) => {
    const bar = element("i");
    bar.style.width = `${(100 * seconds) / total}%`;
    return element(
      "div", { class: "share" }, element("span", {}, name.replaceAll("_", " ")), element("span", { class: "bar" }, bar),
      element("span", { class: "num" }, `${((100 * seconds) / total).toFixed(1)} % · ${duration(seconds)}`),
    );
  }));
}

const KINDS = [
  ["Given", (origin) => origin !== "default" && !origin.startsWith("derived"), true],
  ["Derived", (origin) => origin.startsWith("derived"), false],
  ["Default", (origin) => origin === "default", false],
];

function settings(run) {
  const query = byId("key-query").value.toLowerCase();
  const fits = (row) => row.some((text) => text.toLowerCase().includes(query));
  byId("keys").replaceChildren(...KINDS.map(([title, isOf, open]) => {
    const rows = run.settings.filter((row) => isOf(row[2]) && fits(row));
    const table = element("table", {}, ...rows.map((row) => element("tr", {}, ...row.map((text) => appendText(element("td"), text)))));
    return element("details", { open: (query ? rows.length > 0 : open) ? "" : false }, element("summary", {}, `${title} (${rows.length})`), table);
  }));
  if (!run.settings.length) byId("keys").replaceChildren(element("p", { class: "muted" }, "The run folder has no config.yaml."));
}

function metricTable(run) {
  const rows = Object.entries(run.metrics).map(([name, values]) => {
    const numbers = values.filter(isNumber);
    const cells = numbers.length ? [numbers[0], numbers.at(-1), Math.min(...numbers), Math.max(...numbers)] : [null, null, null, null];
    const draw = element("button", { type: "button", "aria-label": `draw ${name}`, onclick: () => addCurve(run, name) }, "draw");
    return element("tr", {}, element("td", {}, name), ...cells.map((cell) => element("td", {}, shown(cell))), element("td", {}, draw));
  });
  const names = ["metric", "first", "last", "least", "greatest", ""];
  byId("metric-table").replaceChildren(element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)))), element("tbody", {}, ...rows));
}

const run = JSON.parse(byId("data").textContent);
header(run);
tiles(run);
curves(run);
controls(run);
health(run);
shares(run);
const browser = new SampleBrowser(run);
settings(run);
byId("key-query").addEventListener("input", () => settings(run));
metricTable(run);
