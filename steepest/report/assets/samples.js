"use strict";
// The sample browser: a list of prompts that the filters let through, and the answers to one of them side by side.

const MEASURES = {
  advantage: { label: "advantage", kind: "diverging", middle: 0 },
  value: { label: "value", kind: "single" },
  ratio: { label: "ratio, trainer to engine", kind: "diverging", middle: 1, scale: Math.log },
  kl: { label: "KL to the reference", kind: "diverging", middle: 0 },
  log_prob: { label: "log-prob", kind: "single" },
  entropy: { label: "entropy", kind: "single" },
};

/** A reward says whether an answer is right by its part `acc`, else by its score. */
function outcomeOf(answer) {
  if (!isNumber(answer.score)) return "failed";
  const value = isNumber(answer.parts?.acc) ? answer.parts.acc : answer.score;
  return value > 0.5 ? "right" : "wrong";
}

const textOf = (answer) => (answer.tokens ? answer.tokens.join("") : answer.response);

/** One entry a prompt: of training each time it was sampled, of validation with its answers of all steps. */
function trainingEntries(rows) {
  return rows.map((group) => ({
    ...group,
    title: `step ${group.step}`,
    answers: group.responses.map((answer, at) => ({ ...answer, step: group.step, title: `answer ${at + 1} of ${group.num_responses}` })),
  }));
}

function validationEntries(rows) {
  const found = new Map();
  for (const row of rows) {
    if (!found.has(row.id)) found.set(row.id, { ...row, title: row.id, answers: [] });
    found.get(row.id).answers.push({ ...row, parts: partsOf(row), title: `step ${row.step}` });
  }
  return [...found.values()];
}

const partsOf = (row) => Object.fromEntries(
  Object.entries(row).filter(([name]) => name.startsWith("reward/")).map(([name, value]) => [name.slice(7), value]),
);

/** The list of prompts; the arrow keys walk over it. `show` is called with the place of the prompt that is chosen. */
class PromptList {
  constructor(show) {
    this.show = show;
    this.at = 0;
    byId("list").addEventListener("keydown", (event) => this.walk(event));
  }

  /** `items`: what stands on each button. The prompt at the same place stays chosen. */
  fill(items) {
    this.count = items.length;
    const button = (nodes, at) => element("button", { type: "button", "data-at": at, onclick: () => this.choose(at) }, ...nodes);
    byId("list").replaceChildren(...items.map((nodes, at) => element("li", {}, button(nodes, at))));
    byId("list").hidden = !items.length;
    this.choose(Math.min(this.at, Math.max(0, items.length - 1)));
  }

  walk(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, Home: -1e9, End: 1e9 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.choose(Math.min(this.count - 1, Math.max(0, this.at + moves[event.key])), true);
  }

  choose(at, focus = false) {
    this.at = at;
    for (const button of byId("list").querySelectorAll("button")) {
      const mine = Number(button.dataset.at) === at;
      button.setAttribute("aria-current", String(mine));
      button.tabIndex = mine ? 0 : -1;
      if (mine && focus) button.focus();
    }
    this.show(at);
  }
}

/** What the list shows of a prompt: a title, and the start of its last message. */
function listed(title, facts, prompt) {
  const last = messagesOf(prompt).at(-1)?.[1] ?? "";
  return [element("bdi", {}, title), facts, element("small", {}, element("bdi", {}, oneLine(last)))];
}

function promptOf(entry) {
  const parts = messagesOf(entry.prompt).map(([role, content]) => element(
    "div", { class: "message" }, element("div", { class: "role" }, role), appendText(element("div", { class: "text" }), content),
  ));
  const facts = element("p", { class: "muted" }, "prompt ", element("bdi", {}, String(entry.id)), ", data source ", element("bdi", {}, String(entry.data_source)));
  if (entry.ground_truth !== null && entry.ground_truth !== undefined) {
    facts.append(", ground truth ", appendText(element("bdi"), asText(entry.ground_truth)));
  }
  return [facts, ...parts];
}

class SampleBrowser {
  constructor(run) {
    this.run = run;
    const [training, validation] = ["training", "validation"].map(rowsOf);
    this.damaged = { train: training.damaged, val: validation.damaged };
    this.entries = { train: trainingEntries(training.rows), val: validationEntries(validation.rows) };
    this.split = this.entries.train.length || !this.entries.val.length ? "train" : "val";
    this.prompts = new PromptList(() => this.detail());
    this.measure = "advantage";
    for (const radio of document.querySelectorAll("input[name=split]")) {
      radio.checked = radio.value === this.split;
      radio.addEventListener("change", () => this.show(radio.value));
    }
    for (const id of ["f-step", "f-outcome", "f-cut", "f-source"]) byId(id).addEventListener("change", () => this.list());
    byId("f-query").addEventListener("input", () => this.list());
    byId("measure").addEventListener("change", (event) => {
      this.measure = event.target.value;
      this.detail();
    });
    this.show(this.split);
  }

  show(split) {
    this.split = split;
    const entries = this.entries[split];
    const answers = entries.flatMap((entry) => entry.answers);
    options(byId("f-step"), ["", ...new Set(answers.map((answer) => answer.step))], "all");
    options(byId("f-source"), ["", ...new Set(entries.map((entry) => entry.data_source))], "all");
    const known = Object.keys(MEASURES).filter((name) => answers.some((answer) => answer[name]));
    if (!known.includes(this.measure) && known.length) this.measure = known[0];
    byId("measure").replaceChildren(...known.map((name) => element("option", { value: name }, MEASURES[name].label)));
    byId("measure").value = this.measure;
    byId("measure-label").hidden = !known.length;
    this.list();
  }

  matches(entry, answer) {
    const [step, outcome, cut, query] = ["f-step", "f-outcome", "f-cut", "f-query"].map((id) => byId(id).value);
    if (step && String(answer.step) !== step) return false;
    if (outcome && outcomeOf(answer) !== outcome) return false;
    if (cut && (cut === "cut") !== Boolean(answer.truncated)) return false;
    if (!query) return true;
    const wanted = query.toLowerCase();
    return [textOf(answer), entry.searched ??= messagesOf(entry.prompt).map((part) => part[1]).join("\n")]
      .some((text) => text.toLowerCase().includes(wanted));
  }

  list() {
    const source = byId("f-source").value;
    const entries = this.entries[this.split];
    this.found = entries
      .filter((entry) => !source || entry.data_source === source)
      .map((entry) => ({ entry, answers: entry.answers.map((answer) => ({ answer, fits: this.matches(entry, answer) })) }))
      .filter(({ answers }) => answers.some(({ fits }) => fits));
    const count = this.found.reduce((sum, { answers }) => sum + answers.filter(({ fits }) => fits).length, 0);
    byId("samples-note").textContent = this.note(entries.length, count);
    this.prompts.fill(this.found.map((found) => this.item(found)));
  }

  note(total, count) {
    const key = this.split === "train" ? "training" : "validation";
    if (!total) return `This run has kept no ${key} samples: trainer.report_prompts is 0, or none was due yet.`;
    const left = this.run.left_out[key];
    const damaged = this.damaged[this.split];
    const more = (left ? ` To keep the page small, ${left} more steps of the file are not on it.` : "")
      + (damaged ? ` ${damaged} damaged lines of the file are left out.` : "");
    return `${this.found.length} of ${total} ${key === "training" ? "groups" : "prompts"}, ${count} answers fit the filters.${more}`;
  }

  item({ entry, answers }) {
    const right = answers.filter(({ answer }) => outcomeOf(answer) === "right").length;
    return listed(entry.title, ` · ${right}/${answers.length} right`, entry.prompt);
  }

  detail() {
    const found = this.found[this.prompts.at];
    byId("token-line").textContent = "";
    byId("legend").replaceChildren();
    if (!found) {
      byId("group-head").replaceChildren();
      byId("responses").replaceChildren();
      return;
    }
    byId("group-head").replaceChildren(...promptOf(found.entry));
    const paint = this.split === "train" ? painter(found.entry.answers, this.measure) : null;
    if (paint) {
      byId("legend").replaceChildren(...paint.legend());
      byId("token-line").textContent = "Point at a token, or focus an answer and press the arrow keys, to read its numbers.";
    }
    byId("responses").replaceChildren(...found.answers.map(({ answer, fits }) => card(answer, fits, paint)));
  }
}

function options(select, values, all) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => element("option", { value }, value === "" ? all : String(value))));
  select.value = values.map(String).includes(before) ? before : "";
}

function card(answer, fits, paint) {
  const outcome = outcomeOf(answer);
  const words = { right: "right", wrong: "wrong", failed: "reward failed" };
  const badges = [element("span", { class: `badge ${outcome}` }, words[outcome])];
  if (answer.truncated) badges.push(element("span", { class: "badge cut" }, "cut"));
  if (answer.status && answer.status !== "trained") badges.push(element("span", { class: "badge" }, answer.status.replace("_", " ")));
  const numbers = [`score ${shown(answer.score)}`, ...Object.entries(answer.parts ?? {}).map(([name, value]) => `${name} ${shown(value)}`)];
  if (answer.length) numbers.push(`${answer.length} tokens`);
  const parts = element("p", { class: "parts" }, numbers.join(" · "));
  if (answer.error) appendText(parts, ` · ${answer.error}`);
  const body = paint ? tokens(answer, paint) : appendText(element("div", { class: "text" }), answer.response);
  return element(
    "article", { class: fits ? "card" : "card other", "aria-label": answer.title },
    element("header", {}, element("h3", {}, answer.title), ...badges), parts, body,
  );
}

/** The tokens of an answer as one element that takes the focus; the arrow keys walk over its tokens. */
function tokens(answer, paint) {
  const box = element("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": `${answer.title}, ${answer.tokens.length} tokens` });
  const spans = answer.tokens.map((text, at) => {
    const span = appendText(element("bdi", { "data-at": at }), text || "·", "\n");
    const fill = paint.fill(answer[paint.name]?.[at]);
    if (fill) span.style.background = fill;
    else span.className = "none";
    return span;
  });
  const [place, count] = answer.left_out ?? [-1, 0];
  spans.forEach((span, at) => {
    if (at === place) box.append(element("span", { class: "gap" }, ` [${count} tokens are not kept] `));
    box.append(span);
  });
  let here = -1;
  const go = (at) => {
    spans[here]?.classList.remove("here");
    here = at;
    spans[at].classList.add("here");
    describe(answer, at);
  };
  box.addEventListener("pointerover", (event) => {
    const span = event.target.closest("bdi[data-at]");
    if (span) go(Number(span.dataset.at));
  });
  box.addEventListener("focus", () => spans.length && here < 0 && go(0));
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 };
    if (!(event.key in moves) || !spans.length) return;
    event.preventDefault();
    go(Math.min(spans.length - 1, Math.max(0, here + moves[event.key])));
    spans[here].scrollIntoView({ block: "nearest" });
  });
  return box;
}

function describe(answer, at) {
  const [place, count] = answer.left_out ?? [Infinity, 0];
  const numbers = Object.entries(MEASURES)
    .filter(([name]) => answer[name])
    .map(([name, { label }]) => `${label} ${shown(answer[name][at])}`);
  const token = answer.tokens[at] || "(part of the character before)";
  byId("token-line").replaceChildren(
    `token ${at + 1 + (at >= place ? count : 0)} `, appendText(element("bdi"), token, ""), ` ${numbers.join(" · ")}`,
  );
}

/** From a number to the color of a token, over the range of one group. Null: the group has no such numbers. */
function painter(answers, name) {
  const measure = MEASURES[name];
  const values = answers.flatMap((answer) => answer[name] ?? []).filter(isNumber);
  if (!values.length) return { name, fill: () => null, legend: () => [] };
  const strongest = Number(color("--strongest"));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (measure.kind === "single") {
    const paint = (share) => `rgba(${color("--single")}, ${(0.04 + share * (strongest - 0.04)).toFixed(3)})`;
    const fill = (value) => (isNumber(value) ? paint(high > low ? (value - low) / (high - low) : 0) : null);
    return { name, fill, legend: () => scale(measure.label, [low, high], [paint(0), paint(1)]) };
  }
  const distance = (value) => (measure.scale ? measure.scale(value) - measure.scale(measure.middle) : value - measure.middle);
  const widest = Math.max(...values.map((value) => Math.abs(distance(value)))) || 1;
  const paint = (share) => `rgba(${color(share < 0 ? "--minus" : "--plus")}, ${(Math.abs(share) * strongest).toFixed(3)})`;
  const fill = (value) => (isNumber(value) ? paint(distance(value) / widest) : null);
  const ends = measure.scale ? [Math.exp(-widest), Math.exp(widest)] : [measure.middle - widest, measure.middle + widest];
  return { name, fill, legend: () => scale(measure.label, ends, [paint(-1), paint(0), paint(1)]) };
}

function scale(label, [low, high], colors) {
  const bar = element("span", { class: "scale", role: "img", "aria-label": `colors from ${shown(low)} to ${shown(high)}` });
  bar.style.background = `linear-gradient(90deg, ${colors.join(", ")})`;
  const words = [`${label}: ${shown(low)}`, bar, shown(high), "dotted underline: the token has no such number"];
  return words.map((word) => (typeof word === "string" ? element("span", {}, word) : word));
}
