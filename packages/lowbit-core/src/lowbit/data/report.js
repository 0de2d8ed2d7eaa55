"use strict";
// Headings of sortable tables become buttons: one press sorts, the next turns the order round. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const collator = new Intl.Collator("en", { numeric: true });
  const heads = [...table.tHead.rows[0].cells];
  const number = (text) => parseFloat(text.replaceAll(",", "").replace("−", "-").replace("∞", "Infinity"));
  heads.forEach((head, column) => {
    const numeric = head.classList.contains("n");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      const text = (row) => row.cells[column].textContent;
      const empty = (row) => (numeric ? Number.isNaN(number(text(row))) : text(row) === "");
      const compare = (a, b) => (numeric ? number(text(a)) - number(text(b)) || 0 : collator.compare(text(a), text(b)));
      const rows = [...body.rows].sort(
        (a, b) => empty(a) - empty(b) || (empty(a) ? 0 : compare(a, b) * (down ? -1 : 1)),
      );
      body.append(...rows);
    });
  });
}
