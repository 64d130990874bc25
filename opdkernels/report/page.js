"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // The number behind a cell if it has one, otherwise its text. Missing values come last in both directions.
  const key = (cell) => {
    const value = cell.dataset.v;
    if (value === undefined) return cell.textContent.trim() === "–" ? null : cell.textContent.trim();
    return value === "" ? null : Number(value);
  };
  const ascending = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  function sort(table, header, index) {
    const was = header.getAttribute("aria-sort");
    const down = was === "none" ? !header.classList.contains("text") : was === "ascending";
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row.cells[index]), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : down ? ascending(b, a) : ascending(a, b)));
    body.append(...rows.map(([, row]) => row));
  }
  for (const table of all("table.data")) {
    all("th[aria-sort]", table).forEach((header, index) => {
      header.querySelector("button").addEventListener("click", () => sort(table, header, index));
    });
  }

  for (const form of all("form.filter")) {
    const table = document.getElementById(form.dataset.table);
    const [search, select, output] = ["input", "select", "output"].map((s) => form.querySelector(s));
    const heads = all("th[aria-sort]", table).map((h) => h.textContent.trim());
    const block = heads.indexOf("block");
    const rows = [...table.tBodies[0].rows].map((row) => ({
      row,
      text: [...row.cells].filter((c) => c.dataset.v === undefined).map((c) => c.textContent).join(" ").toLowerCase(),
      block: block < 0 ? "" : row.cells[block].textContent,
    }));
    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { row, text, block } of rows) {
        const keep = (!select.value || block === select.value) && words.every((word) => text.includes(word));
        row.hidden = !keep;
        shown += keep;
      }
      output.textContent = `${shown} of ${rows.length}`;
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    search.addEventListener("input", apply);
    select.addEventListener("change", apply);
    form.hidden = false;
    apply();
  }

  // A switch selects the view of the heat maps or one of the panels of its section.
  for (const group of all(".switch")) {
    const section = group.closest("section");
    const choose = (value) => {
      for (const button of all("button", group)) button.setAttribute("aria-pressed", String(button.value === value));
      for (const view of all(".view", section)) view.classList.toggle("off", !view.classList.contains(`view-${value}`));
      for (const panel of all(".panel", section)) panel.classList.toggle("off", panel.dataset.panel !== value);
    };
    for (const button of all("button", group)) button.addEventListener("click", () => choose(button.value));
    choose(group.querySelector("button").value);
    group.hidden = false;
  }

  // Tooltips without a pointer: a tap writes the tooltip below the drawing.
  for (const figure of all("figure")) {
    const tooltip = figure.querySelector(".tooltip");
    figure.addEventListener("click", (event) => {
      const title = event.target.closest("g")?.querySelector("title");
      if (!title || !tooltip) return;
      for (const marked of all(".picked", figure)) marked.classList.remove("picked");
      title.parentNode.classList.add("picked");
      tooltip.textContent = title.textContent;
      tooltip.classList.remove("quiet");
    });
  }
})();
