// A table that does not fit breaks long words; on a phone each row becomes a list instead.
function fitTables() {
  const narrow = window.matchMedia("(max-width: 46em)").matches;
  for (const table of document.querySelectorAll("article table.docutils")) {
    table.classList.remove("stacked", "tight");
    if (table.scrollWidth > table.clientWidth) table.classList.add(narrow ? "stacked" : "tight");
    const names = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => (cell.dataset.column = names[i] ? `${names[i]}: ` : ""));
  }
}
document.addEventListener("DOMContentLoaded", () => {
  fitTables();
  addEventListener("resize", fitTables);
  document.addEventListener("toggle", fitTables, true); // tables in <details>
});
