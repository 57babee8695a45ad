// A number keeps its error and its unit: "98.3 ± 0.1", "+1.2 %" and dates never break.
const NUMBER = /[+−-]?\d[\d,.]*(?:\s?(?:±|×|to)\s?\d[\d,.]*)*(?:\s?%)?/g;
function joinNumbers() {
  for (const cell of document.querySelectorAll("article table.docutils :is(td, th)")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const text = walker.currentNode;
      text.data = text.data
        .replace(NUMBER, (found) => found.replace(/\s/g, "\u00a0"))
        .replace(/\d{4}-\d\d-\d\d/g, (date) => date.replaceAll("-", "\u2011"));
    }
  }
}
// A table that does not fit is set smaller; on a phone each of its rows becomes a list.
function fitTables() {
  const narrow = window.matchMedia("(max-width: 46em)").matches;
  for (const table of document.querySelectorAll("article table.docutils")) {
    table.classList.remove("stacked", "tight");
    const around = table.parentElement;
    const width = Math.max(table.scrollWidth, around.scrollWidth);
    if (width > around.clientWidth) table.classList.add(narrow ? "stacked" : "tight");
    const names = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => {
        cell.dataset.column = names[i] ? `${names[i]}: ` : "";
        cell.classList.toggle("blank", !cell.textContent.trim());
      });
  }
}
// A short word of code, such as an option, does not break after its hyphens.
function joinCode() {
  for (const word of document.querySelectorAll("article code .pre"))
    if (word.textContent.length < 32) word.style.whiteSpace = "nowrap";
}
document.addEventListener("DOMContentLoaded", () => {
  joinCode();
  joinNumbers();
  fitTables();
  addEventListener("resize", fitTables);
  document.addEventListener("toggle", fitTables, true); // tables in <details>
});
