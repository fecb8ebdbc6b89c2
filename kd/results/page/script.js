"use strict";
const table = document.querySelector("#results");
const body = table.tBodies[0];
const rows = [...body.rows];
const headers = [...table.tHead.rows[0].cells];

function value(row, index) {
  const cell = row.cells[index];
  if (!cell.classList.contains("number")) return cell.textContent.trim();
  return "value" in cell.dataset ? parseFloat(cell.dataset.value) : ""; // without a number it stands last
}

headers.forEach((header, index) => {
  header.querySelector("button").addEventListener("click", () => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    headers.forEach(other => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const sign = descending ? -1 : 1;
    rows.sort((one, other) => {
      const [a, b] = [value(one, index), value(other, index)];
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return sign * order;
    });
    body.append(...rows);
  });
});

const selects = [...document.querySelectorAll(".filters select")];
const search = document.querySelector(".filters input");
const count = document.querySelector("#count");

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const fits = selects.every(select => !select.value || row.dataset[select.name] === select.value);
    row.hidden = !(fits && words.every(word => text.includes(word)));
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${rows.length} rows`;
}

selects.forEach(select => select.addEventListener("change", filter));
search.addEventListener("input", filter);
filter();
