"use strict";
// The curves. A chart is drawn by uPlot; this file says which metrics stand in which chart, and reads colours from the
// style sheet, so that light and dark follow the system.

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLORS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"];
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [1, 2]];

// title, [metric, label] of each line, and [low, high] of a band around the first line; colors, if not those in order;
// distinct: a line with the numbers of another is left out
const CHARTS = [
  { title: "Validation", lines: [["val/accuracy", "accuracy"]], band: ["val-aux/accuracy_low", "val-aux/accuracy_high"], bandLabel: "95 % interval" },
  { title: "Validation loss", lines: [["val/loss", "loss"]] },
  { title: "Score", lines: [["critic/score/mean", "score"], ["critic/rewards/mean", "after KL"]], distinct: true },
  { title: "Reward parts", match: /^reward\/(?!error_rate|timeout_rate)(?!.*\/(max|min)$)/, strip: "reward/" },
  { title: "KL to the reference", lines: [["actor/reward_kl_penalty", "in the reward"], ["actor/kl_loss", "in the loss"]] },
  { title: "KL of the update", lines: [["actor/ppo_kl", "before to after"], ["mismatch/k3_kl", "engine to trainer"]] },
  { title: "Entropy", lines: [["actor/entropy", "nats a token"]] },
  { title: "Response length", lines: [["response_length/mean", "mean"]], band: ["response_length/min", "response_length/max"], bandLabel: "least to most" },
  { title: "Answers cut at the limit", lines: [["response_length/clip_ratio", "training"], ["val-aux/response_length/clip_ratio", "validation"]] },
  { title: "Clipped tokens", lines: [["actor/pg_clipfrac", "policy"], ["actor/pg_clipfrac_lower", "policy, lower"], ["critic/vf_clipfrac", "value"]] },
  { title: "Explained variance", lines: [["critic/vf_explained_var", "critic"]] },
  { title: "Gradient norm", lines: [["actor/grad_norm", "actor"], ["critic/grad_norm", "critic"], ["train/grad_norm", "model"]] },
  { title: "Loss", lines: [["actor/pg_loss", "policy"], ["critic/vf_loss", "value"], ["train/loss", "supervised"]] },
  { title: "Learning rate", lines: [["actor/lr", "actor"], ["critic/lr", "critic"], ["train/lr", "model"]] },
  { title: "Prompts with equal scores", lines: [["group/equal_ratio", "share"]] },
  { title: "Failed rewards", lines: [["reward/error_rate", "errors"], ["reward/timeout_rate", "time-outs"]] },
];
const MACHINE_CHARTS = [
  { title: "Seconds a step", match: /^timing_s\/(step|gen|update_actor|update_critic|reward|testing)$/, strip: "timing_s/" },
  { title: "Tokens a second", lines: [["perf/throughput", "step"], ["perf/throughput/gen", "generation"], ["perf/throughput/update", "update"]] },
  { title: "Memory, GB at most so far", lines: [["perf/max_memory_gb", "process or card"], ["perf/max_memory_reserved_gb", "reserved"]] },
];

const has = (run, name) => name in run.metrics && run.metrics[name].some(isNumber);

/** The charts of `specs` that a run has numbers for, their lines filled in. */
function chartsOf(run, specs) {
  return specs
    .map((spec) => {
      const named = spec.match
        ? Object.keys(run.metrics).filter((name) => spec.match.test(name)).map((name) => [name, name.slice(spec.strip.length)])
        : spec.lines;
      const text = ([name]) => JSON.stringify(run.metrics[name]);
      const isNew = (line, at, all) => !spec.distinct || all.findIndex((other) => text(other) === text(line)) === at;
      const lines = named.filter(([name]) => has(run, name)).filter(isNew).slice(0, COLORS.length);
      const band = spec.band && spec.band.every((name) => has(run, name)) ? spec.band : null;
      return { ...spec, lines, band };
    })
    .filter((spec) => spec.lines.length);
}

function smoothed(values, factor) {
  let mean = null;
  return values.map((value) => {
    if (!isNumber(value)) return value;
    mean = mean === null ? value : factor * mean + (1 - factor) * value;
    return mean;
  });
}

/** The number of a row of a column; where it has none, the last one before, with its step. */
function known(run, values, row) {
  if (row === null || row === undefined || isNumber(values[row])) return shown(values[row ?? -1]);
  const before = lastNumber(values.slice(0, row));
  return before === null ? shown(null) : `${shown(values[before])} (step ${run.steps[before]})`;
}

/** Series and columns of a chart. With smoothing the numbers themselves stand behind as a pale line. */
function columnsOf(run, spec, view) {
  const x = view.axis === "hours" ? run.seconds.map((seconds) => seconds / 3600) : run.steps;
  const columns = [x];
  const series = [{ label: view.axis === "hours" ? "hour" : "step", value: (_, value) => shown(value) }];
  const bands = [];
  const add = (values, options) => {
    columns.push(values);
    series.push({ spanGaps: true, value: (_, value, at, row) => known(run, columns[at], row), points: { show: values.filter(isNumber).length < 40, size: 5 }, ...options });
  };
  spec.lines.forEach(([name, label], place) => {
    const values = run.metrics[name];
    const at = spec.colors ? spec.colors[place] : place;
    const stroke = color(COLORS[at]);
    const dash = DASHES[at];
    if (view.smoothing) add(values, { label, stroke: `${stroke}66`, width: 1, class: "raw", points: { show: false } });
    add(view.smoothing ? smoothed(values, view.smoothing) : values, { label, stroke, dash, width: 2 });
  });
  if (spec.band) {
    const [low, high] = spec.band.map((name) => run.metrics[name]);
    const pale = `${color(COLORS[0])}88`;
    add(high, { label: `${spec.bandLabel}, high`, stroke: pale, width: 1, points: { show: false } });
    add(low, { label: `${spec.bandLabel}, low`, stroke: pale, width: 1, points: { show: false } });
    bands.push({ series: [columns.length - 2, columns.length - 1], fill: `${color(COLORS[0])}26` });
  }
  return { columns, series, bands };
}

/** Marks where health checks spoke: a triangle and a pale stretch at the bottom of the plot. */
function drawEvents(run, view) {
  const at = (step) => {
    const place = run.steps.findIndex((known) => known >= step);
    const nearest = place < 0 ? run.steps.length - 1 : place;
    return view.axis === "hours" ? run.seconds[nearest] / 3600 : step;
  };
  return (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const [first, last] of Object.values(run.events).flat()) {
      const from = plot.valToPos(at(first), "x", true);
      const to = plot.valToPos(at(last), "x", true);
      const size = 4 * devicePixelRatio;
      const bottom = bbox.top + bbox.height;
      ctx.fillStyle = color("--warn-fill");
      ctx.fillRect(from - 1, bottom - 2.5 * size, Math.max(to - from, 2), 2.5 * size);
      ctx.fillStyle = color("--warn");
      ctx.beginPath();
      ctx.moveTo(from, bottom - 2 * size);
      ctx.lineTo(from - size, bottom);
      ctx.lineTo(from + size, bottom);
      ctx.fill();
    }
    ctx.restore();
  };
}

/** A number of an axis in few letters: -2e-4 instead of -2.00e-4. */
function axisNumber(value) {
  if (!isNumber(value) || value === 0) return value === 0 ? "0" : "";
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e6 ? Number(value.toPrecision(3)).toExponential() : shown(value);
}

function axes(view) {
  const line = { stroke: color("--grid"), width: 1 };
  const font = "11px system-ui, sans-serif";
  const look = { stroke: color("--muted"), grid: line, ticks: line, font };
  const whole = view.axis === "hours" ? {} : { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5] };
  return [
    { ...look, ...whole, size: 26, space: 45 },
    { ...look, size: 52, values: (_, values) => values.map(axisNumber) },
  ];
}

function summary(run, spec) {
  return spec.lines
    .map(([name, label]) => {
      const places = run.metrics[name].map((value, at) => (isNumber(value) ? at : -1)).filter((at) => at >= 0);
      const [first, last] = [places[0], places[places.length - 1]];
      return `${label} ${shown(run.metrics[name][first])} at step ${run.steps[first]}, ${shown(run.metrics[name][last])} at step ${run.steps[last]}`;
    })
    .join("; ");
}

/** One chart in `parent`. Arrow keys move its cursor, Home and End go to the ends. */
function drawChart(parent, run, spec, view) {
  const { columns, series, bands } = columnsOf(run, spec, view);
  const figure = element("figure", { class: "chart", tabindex: "0", role: "group", "aria-label": `${spec.title}: ${summary(run, spec)}` });
  figure.append(element("figcaption", {}, element("h3", {}, spec.title)));
  parent.append(figure);
  const room = () => ({ width: Math.max(200, figure.clientWidth - 16), height: 180 });
  const plot = new uPlot(
    {
      ...room(), series, bands, axes: axes(view),
      scales: { x: { time: false }, y: { range: rangeOf } },
      cursor: { sync: { key: "run" }, y: false, points: { size: 7 } },
      legend: { markers: { width: 0 } },
      hooks: { draw: [drawEvents(run, view)], ready: [showLast], setCursor: [(plot) => plot.cursor.left < 0 && showLast(plot)] },
    },
    columns, figure,
  );
  markLegend(plot);
  new ResizeObserver(() => plot.setSize(room())).observe(figure);
  figure.addEventListener("keydown", (event) => moveCursor(event, plot, columns[0].length));
  return plot;
}

/** Room above and below the numbers, also around a line that is level. */
function rangeOf(_, low, high) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

/** The legend shows the last row of numbers while no cursor stands in the plot. */
function showLast(plot) {
  const x = plot.data[0];
  if (x.length) plot.setLegend({ idxs: plot.data.map((values) => lastNumber(values)) });
}

function lastNumber(values) {
  for (let at = values.length - 1; at >= 0; at -= 1) if (isNumber(values[at])) return at;
  return null;
}

/** Legend marks that show the dash of a line too, not its colour alone. */
function markLegend(plot) {
  plot.root.querySelectorAll(".u-legend .u-series").forEach((row, at) => {
    const mark = row.querySelector(".u-marker");
    const series = plot.series[at];
    if (!mark || !series.stroke) return;
    const dash = series.dash && series.dash.length ? series.dash : [14, 0];
    const stroke = series.stroke(plot, at);
    const total = dash.reduce((sum, part) => sum + part, 0);
    let from = 0;
    const stops = dash.map((part, place) => {
      const paint = place % 2 ? "transparent" : stroke;
      const text = `${paint} ${from}px ${from + part}px`;
      from += part;
      return text;
    });
    mark.style.border = "0";
    mark.style.background = `repeating-linear-gradient(90deg, ${stops.join(", ")})`;
    mark.style.backgroundSize = `${total}px`;
  });
}

function moveCursor(event, plot, count) {
  const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -count, End: count };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const now = plot.cursor.idx ?? count;
  const next = Math.min(count - 1, Math.max(0, now + moves[event.key]));
  plot.setCursor({ left: plot.valToPos(plot.data[0][next], "x"), top: plot.over.clientHeight / 2 }, true, true);
}
