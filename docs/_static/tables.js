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
document.addEventListener("DOMContentLoaded", () => {
  fitTables();
  addEventListener("resize", fitTables);
  document.addEventListener("toggle", fitTables, true); // tables in <details>
});
