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

  // Links and addresses lead into folded parts; printing opens them.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const inner = target.querySelector(":scope > details.fold");
    if (inner) inner.open = true;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
  };
  for (const link of all('a[href^="#"]')) link.addEventListener("click", () => setTimeout(reveal));
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details.fold:not([open])");
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });

  // Downloads: a table, or the values behind a drawing, as CSV; a drawing as PNG.
  const text = (element) => element.textContent.replace(/\s+/g, " ").trim();
  const field = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);

  // The number behind a cell, or its text. A spreadsheet must not take a name for a formula.
  const csvValue = (cell) => {
    if (cell.dataset.v !== undefined) return cell.dataset.v;
    const value = text(cell) === "–" ? "" : text(cell);
    return /^[=+\-@]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value;
  };
  function csv(table) {
    const spans = all(".spans > *", table).flatMap((span) => Array(span.colSpan).fill(text(span)));
    const heads = [...table.tHead.rows].at(-1).cells;
    const names = [...heads].map((head, i) => (spans[i] ? `${spans[i]}: ${text(head)}` : text(head)));
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => [...row.cells].map(csvValue));
    return [names, ...rows].map((row) => row.map(field).join(",") + "\n").join("");
  }

  // A drawing whose colours and fonts are its own attributes, at twice its size.
  const PAINT = ["fill", "fill-opacity", "opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap",
    "stroke-linejoin", "font-family", "font-size", "font-weight", "text-anchor"];
  function standalone(svg) {
    const copy = svg.cloneNode(true);
    const originals = all("*", svg);
    all("*", copy).forEach((element, i) => {
      const style = getComputedStyle(originals[i]);
      for (const name of PAINT) element.setAttribute(name, style.getPropertyValue(name));
    });
    for (const unseen of all("title, .probe > rect:last-child", copy)) unseen.remove();
    const { width, height } = svg.viewBox.baseVal;
    copy.setAttribute("width", 2 * width);
    copy.setAttribute("height", 2 * height);
    const image = new Image();
    image.src = `data:image/svg+xml,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
    return image.decode().then(() => ({ image, width, height, svg }));
  }

  // The heading, the keys of the lines and the drawings of a figure on one canvas, in the colours of the page.
  async function picture(figure) {
    const drawn = all("svg:not(.slim)", figure).filter((svg) => !svg.closest(".off"));
    const images = await Promise.all(drawn.map(standalone));
    const gap = 16;
    const page = getComputedStyle(figure);
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d");
    const font = (weight) => (context.font = `${weight} 14px ${page.fontFamily}`);
    const view = figure.querySelector(".view:not(.off) .viewname");
    const title = [text(figure.querySelector("figcaption b")).replace(/\.$/, ""), view && text(view)].filter(Boolean).join(", ");
    const keys = all(".keys li", figure);

    // Row names of a heat map are left of its cells; everything else is below the one before.
    let x = gap, y = gap + 24 + (keys.length ? 26 : 0), width = 0, below = y;
    for (const image of images) {
      const adjacent = image.svg.closest(".maps") && image.svg.closest(".maps") === images[images.indexOf(image) - 1]?.svg.closest(".maps");
      if (!adjacent) [x, y] = [gap, below];
      Object.assign(image, { x, y });
      x += image.width;
      below = Math.max(below, y + image.height + 10);
      width = Math.max(width, x);
    }
    font(600);
    width = Math.max(width, gap + context.measureText(title).width);
    font(400);
    const places = [];
    x = gap;
    for (const key of keys) {
      places.push(x);
      x += 32 + context.measureText(text(key)).width + 22;
    }
    width = Math.max(width, x - 22);

    canvas.width = 2 * (width + gap);
    canvas.height = 2 * (below + gap - 10);
    context.scale(2, 2);
    context.fillStyle = page.backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = page.color;
    context.textBaseline = "middle";
    font(600);
    context.fillText(title, gap, gap + 8);
    font(400);
    keys.forEach((key, i) => {
      const style = getComputedStyle(key.firstElementChild);
      let top = gap + 34 - parseFloat(style.borderTopWidth) / 2;
      for (const side of ["Top", "Bottom"]) {
        const size = parseFloat(style[`border${side}Width`]);
        context.strokeStyle = style[`border${side}Color`];
        context.lineWidth = size;
        context.setLineDash(style[`border${side}Style`] === "dashed" ? [7, 5] : []);
        if (size) {
          context.beginPath();
          context.moveTo(places[i], top + size / 2);
          context.lineTo(places[i] + 24, top + size / 2);
          context.stroke();
        }
        top += size;
      }
      context.fillText(text(key), places[i] + 32, gap + 34);
    });
    for (const { image, x, y, width, height } of images) context.drawImage(image, x, y, width, height);
    return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject()), "image/png"));
  }

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function addButtons(place, name, actions) {
    const bar = document.createElement("div");
    const file = name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "") || "values";
    bar.className = "save";
    for (const [type, blob] of actions) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = type;
      button.title = `Download “${name}” as ${type}`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", async () => {
        try {
          save(await blob(), `${file}.${type.toLowerCase()}`);
        } catch {
          button.textContent = `${type} failed`;
        }
      });
      bar.append(button);
    }
    place(bar);
  }
  const csvOf = (table) => () => new Blob([csv(table)], { type: "text/csv;charset=utf-8" });
  for (const figure of all("figure")) {
    const name = text(figure.querySelector("figcaption b")).replace(/\.$/, "");
    const actions = [["CSV", csvOf(figure.querySelector(".values table"))], ["PNG", () => picture(figure)]];
    addButtons((bar) => figure.querySelector(".tooltip").before(bar), name, actions);
  }
  for (const table of all("table.data[id]")) {
    addButtons((bar) => table.closest(".scroll").after(bar), text(table.caption), [["CSV", csvOf(table)]]);
  }
})();
