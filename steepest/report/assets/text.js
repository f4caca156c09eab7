"use strict";
// Elements, numbers, and texts of a model. A text of a model is only ever put into the page as a text node.

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** The rows of a script element, a JSON text a line; a damaged line is left out and counted. */
function rowsOf(id) {
  let damaged = 0;
  const rows = byId(id).textContent.split("\n").filter(Boolean).flatMap((line) => {
    try {
      return [JSON.parse(line)];
    } catch {
      damaged += 1;
      return [];
    }
  });
  return { rows, damaged };
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function shown(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  const rounded = Number.isInteger(value) ? value : Number(value.toPrecision(4));
  return rounded.toLocaleString("en", { maximumFractionDigits: 7 });
}

function duration(seconds) {
  if (seconds < 120) return `${shown(Number(seconds.toPrecision(3)))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Characters that cannot be seen, or that would change the order of the text around them. The joiners U+200C and
// U+200D stay: they shape letters and emoji and do nothing else.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\uFFFD]/gu;
const KEPT = new Set(["\n", "\t", "\u200c", "\u200d"]);

/** Append a model's text: unseen characters become visible escapes. Ends of lines are marked with ↵ where `lines` says
 * what follows the mark: "\n" or nothing. */
function appendText(parent, text, lines = null) {
  let from = 0;
  for (const found of text.matchAll(UNSEEN)) {
    const character = found[0];
    if (KEPT.has(character) && (lines === null || character !== "\n")) continue;
    parent.append(text.slice(from, found.index));
    if (character === "\n") parent.append(element("span", { class: "escape" }, "↵"), lines);
    else parent.append(element("span", { class: "escape" }, `U+${code(character)}`));
    from = found.index + character.length;
  }
  parent.append(text.slice(from));
  return parent;
}

const code = (character) => character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

/** A text on one line and of bounded length, for lists. */
function oneLine(text, limit = 80) {
  const line = text.slice(0, 4 * limit).replace(UNSEEN, " ").replace(/\s+/g, " ").trim();
  const letters = Array.from(line);
  return letters.length > limit ? `${letters.slice(0, limit).join("")}…` : line;
}

function messagesOf(prompt) {
  if (Array.isArray(prompt)) {
    return prompt.map((message) => [String(message.role ?? ""), asText(message.content)]);
  }
  return [["prompt", asText(prompt)]];
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value ?? null, null, 1));
