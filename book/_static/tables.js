// Tables of the class "robustclip-table": click a heading to sort, type above the table to filter.
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

function addFilter(table, frame) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 6) return;
  const input = document.createElement("input");
  input.type = "search";
  input.className = "robustclip-filter";
  input.placeholder = `Filter ${rows.length} rows`;
  input.setAttribute("aria-label", "Show only rows that contain this text");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
  });
  frame.before(input);
}

// Numbers line up on the right; short texts stay in one line; long ones get room before the table starts to scroll.
function kindOf(texts) {
  const values = texts.filter((text) => !isMissing(text));
  if (values.every((text) => /^[-−+]?[\d.,]+ ?%?($|\s[[±†⚑(])/.test(text))) return "robustclip-number";
  return values.some((text) => text.length > 24) ? "robustclip-long" : "robustclip-short";
}

// The text of a place without the muted line below it.
function textOf(cell) {
  const copy = cell?.cloneNode(true);
  copy?.querySelectorAll("small").forEach((small) => small.remove());
  return copy?.textContent.trim() ?? "";
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
    addFilter(table, frameOf(table));
    markColumns(table);
    addSorting(table);
  }
});
