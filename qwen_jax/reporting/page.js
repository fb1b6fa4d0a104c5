"use strict";
// Tables that a click on a header sorts, and a word filters. Without scripts the page is the same
// but for that.
(() => {
  const SORTED_FROM = 3, FILTERED_FROM = 12;

  /** A cell's number where it begins with one, as in "1,234 ± 5" or "< 0.001"; else null. */
  function numeric(cell) {
    const text = cell.title || cell.textContent;
    const found = /^[<\s]*([-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?)/i.exec(text);
    return found ? Number(found[1].replaceAll(",", "")) : null;
  }

  function compare(a, b) {
    const [x, y] = [numeric(a), numeric(b)];
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x !== null ? -1 : 1;  // Numbers before words.
    return a.textContent.localeCompare(b.textContent);
  }

  function sortable(table) {
    const body = table.tBodies[0];
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const up = header.getAttribute("aria-sort") !== "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows];
        const empty = (row) => row.cells[column].textContent.trim() === "";
        rows.sort((a, b) => {
          if (empty(a) || empty(b)) return empty(a) - empty(b);  // At the end either way.
          const order = compare(a.cells[column], b.cells[column]);
          return up ? order : -order;
        });
        body.append(...rows);
      });
    });
  }

  function filterable(table) {
    const input = document.createElement("input");
    input.type = "search";
    input.className = "filter";
    input.placeholder = `Filter ${table.tBodies[0].rows.length} rows`;
    input.setAttribute("aria-label", "Rows that hold these words");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of table.tBodies[0].rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    table.parentElement.before(input);
  }

  for (const table of document.querySelectorAll(".scroll > table")) {
    const rows = table.tBodies[0].rows.length;
    if (table.tHead && rows >= SORTED_FROM) sortable(table);
    if (table.tHead && rows >= FILTERED_FROM) filterable(table);
  }
})();
