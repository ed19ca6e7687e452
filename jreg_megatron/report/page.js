"use strict";
// The switch between dark and light, and tables that sort by the column that is clicked.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const nameIt = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    nameIt();
  });
  system.addEventListener("change", nameIt);
  button.hidden = false;
  nameIt();

  const value = (row, column) => {
    const text = row.cells[column].textContent;
    const number = Number.parseFloat(text.replaceAll(",", "").replace("< ", ""));
    return Number.isNaN(number) ? text : number;
  };
  // Numbers before words, so that what is not known comes last.
  const compare = (a, b) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    if (body.rows.length < 2) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const sorter = document.createElement("button");
      sorter.type = "button";
      sorter.className = "sort";
      sorter.append(...head.childNodes);
      head.append(sorter);
      sorter.addEventListener("click", () => {
        const down = head.ariaSort === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [value(row, column), row]);
        const known = rows.filter(([key]) => key !== "–").sort(([a], [b]) => compare(a, b) * (down ? -1 : 1));
        body.append(...[...known, ...rows.filter(([key]) => key === "–")].map(([, row]) => row));
      });
    });
  }
})();
