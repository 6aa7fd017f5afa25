// Tables of the class "robustclip-table": click a heading to sort, type or choose above the table to filter.
// Figures of the class "robustclip-figure": a link that saves the picture. Without this script all is complete and readable.

const numeric = new Intl.Collator("en", { numeric: true });

function sortValue(cell) {
  const text = (cell.dataset.sort || cell.textContent).trim();
  return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
}

function isMissing(value) {
  return ["", "–", "—", "nan", "due"].includes(value);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return numeric.compare(String(a), String(b));
}

// Rows without a value in the column stay at the end in both directions.
function sortRows(table, column, descending) {
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => ({ row, value: row.cells[column] ? sortValue(row.cells[column]) : "" }));
  keyed.sort((a, b) => isMissing(a.value) - isMissing(b.value) || (descending ? -1 : 1) * compare(a.value, b.value));
  body.append(...keyed.map((item) => item.row));
}

function addSorting(table) {
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, column, descending);
    });
  });
}

// The text of a place without the muted line below it.
function textOf(cell) {
  const copy = cell?.cloneNode(true);
  copy?.querySelectorAll("small").forEach((small) => small.remove());
  return copy?.textContent.trim() ?? "";
}

function searchBox(count) {
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = `Filter ${count} rows`;
  input.setAttribute("aria-label", "Show only rows that contain this text");
  return input;
}

// All values of a column in the order of sorting, with the number of their rows.
function selectBox(rows, column, name) {
  const cells = rows.map((row) => row.cells[column]).filter(Boolean);
  const values = new Map(cells.map((cell) => [textOf(cell), sortValue(cell)]));
  const ranked = [...values].sort(([, a], [, b]) => isMissing(a) - isMissing(b) || compare(a, b)).map(([text]) => text);
  const select = document.createElement("select");
  select.append(new Option("all", ""));
  for (const text of ranked) {
    select.append(new Option(`${text} (${cells.filter((cell) => textOf(cell) === text).length})`, text));
  }
  const label = document.createElement("label");
  label.append(`${name} `, select);
  return label;
}

// Above the table: a field for text, and a select box for each heading with data-filter. A row has to pass all of them.
function addFilters(table, frame) {
  const rows = [...table.tBodies[0].rows];
  const headings = [...table.tHead.rows[0].cells];
  const chosen = headings.flatMap((heading, column) => ("filter" in heading.dataset ? [column] : []));
  if (rows.length < 6 && !chosen.length) return;
  const search = searchBox(rows.length);
  const labels = chosen.map((column) => selectBox(rows, column, headings[column].textContent.trim()));
  const selects = labels.map((label) => label.querySelector("select"));
  const shown = document.createElement("span");
  shown.setAttribute("role", "status");
  const bar = document.createElement("div");
  bar.className = "robustclip-filters";
  bar.append(search, ...labels, shown);
  bar.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      const passes = selects.every(({ value }, i) => value === "" || textOf(row.cells[chosen[i]]) === value);
      row.hidden = !passes || !words.every((word) => text.includes(word));
    });
    const left = rows.filter((row) => !row.hidden).length;
    shown.textContent = left < rows.length ? `${left} of ${rows.length} rows` : "";
  });
  frame.before(bar);
}

// Numbers line up on the right; short texts stay in one line; long ones get room before the table starts to scroll.
function kindOf(texts) {
  const values = texts.filter((text) => !isMissing(text));
  if (values.every((text) => /^[-−+]?[\d.,]+ ?%?($|\s[[±†⚑(])/.test(text))) return "robustclip-number";
  return values.some((text) => text.length > 24) ? "robustclip-long" : "robustclip-short";
}

// Each place knows its heading, which stands beside it where a row is shown as a card.
function markColumns(table) {
  const rows = [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const kind = kindOf(rows.map((row) => textOf(row.cells[column])));
    for (const row of table.rows) row.cells[column]?.classList.add(kind);
    for (const row of rows) if (row.cells[column]) row.cells[column].dataset.label ??= heading.textContent.trim();
  });
}

// Wide tables scroll inside their frame instead of widening the page.
function frameOf(table) {
  const parent = table.parentElement;
  if (parent.classList.contains("robustclip-table-wrap")) return parent;
  const frame = document.createElement("div");
  frame.className = "robustclip-table-wrap";
  table.before(frame);
  frame.append(table);
  return frame;
}

// The picture is in the page already: a link that saves it costs nothing here, and would double it in the HTML.
function addSaving(figure) {
  const { src } = figure.querySelector("img");
  const link = document.createElement("a");
  link.textContent = src.slice("data:image/".length, src.indexOf(";")).toUpperCase();
  link.download = `figure.${link.textContent.toLowerCase()}`;
  link.href = src;
  figure.querySelector(".robustclip-save").prepend(link);
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("figure.robustclip-figure").forEach(addSaving);
  for (const table of document.querySelectorAll("table.robustclip-table")) {
    if (!table.tHead || !table.tBodies.length) continue;
    addFilters(table, frameOf(table));
    markColumns(table);
    addSorting(table);
  }
});
